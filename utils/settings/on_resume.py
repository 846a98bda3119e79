"""Which settings may change when a run goes on."""

from ..base.errors import UserError
from . import reading
from .reading import Value
from .run_settings import Settings

MAY_CHANGE = {
    *("resume", "overwrite", "max_hours", "logging_steps", "log_jsonl", "log_completions"),
    *("quiet", "wandb_project", "wandb_entity"),
    *("report_to", "save_steps", "save_total_limit", "eval_steps", "eval_samples", "run_name"),
    *("eval_every_updates", "eval_subset_size", "eval_max_new_tokens", "output_dir"),
    *("closing_note", "rollout_batch_size", "micro_batch_tokens", "gradient_checkpointing"),
    *("wired_limit_gb", "cache_limit_gb", "memory_limit_gb", "use_compile"),
    *("max_ckpt_gb", "save_best", "early_stopping_patience", "watchdog_window"),
    *("report", "remote_rm_url", "reward_timeout", "reward_workers"),
    *("environment_timeout", "rank_timeout"),
    *("keep_completions", "max_completions_gb", "plot_every"),
}


def changes(before: dict[str, Value], config: Settings) -> dict[str, tuple[Value, Value]]:
    """Setting -> (before, now) where they differ; one that was not known yet had its default."""
    before = reading.recorded(type(config)()) | before
    now = reading.recorded(config)
    return {name: (before[name], now[name]) for name in now if before[name] != now[name]}


def refuse_changes(before: dict[str, Value], config: Settings) -> None:
    changed = [
        f"{name} (was {old!r}, is {new!r})"
        for name, (old, new) in changes(before, config).items()
        if name not in MAY_CHANGE
    ]
    if changed:
        raise UserError(
            f"resume: these settings differ from the run's: {', '.join(changed)}; set them back, "
            "or start anew in another output_dir"
        )
