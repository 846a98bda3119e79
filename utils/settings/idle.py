"""Settings that another one leaves without effect: told, not refused.

What could lead somebody astray about the result is refused (checks.py). These are about how often,
where to and which of something that does not happen: the run goes on, and says so once.
"""

from collections.abc import Callable, Iterator

from .checks import short
from .run_settings import Settings, differs

Rule = tuple[str, Callable[[Settings], bool], str]
"""Settings, when they have no effect, and why."""


def _local(c: Settings) -> bool:
    return c.located(c.dataset).exists()


def _one_file(c: Settings) -> bool:
    return c.located(c.dataset).is_file()


def _no_test(c: Settings) -> bool:
    return c.eval_samples == 0


def _no_subset(c: Settings) -> bool:
    return c.eval_every_updates == 0 or c.eval_subset_size == 0


def _never_evaluated(c: Settings) -> bool:
    return _no_test(c) and _no_subset(c)


RULES: tuple[Rule, ...] = (
    (
        "save_total_limit max_ckpt_gb",
        lambda c: c.save_steps == 0,
        "save_steps = 0 writes one checkpoint, at the end",
    ),
    ("dataset_config", _local, "dataset is on this disk, and only the hub's have configurations"),
    ("train_split test_split", _one_file, "dataset is one file, which has no splits"),
    ("test_split", _no_test, "eval_samples = 0 asks no test question"),
    ("eval_steps", _no_test, "eval_samples = 0 turns evaluation on the test split off"),
    (
        "eval_max_new_tokens eval_metric",
        _never_evaluated,
        "eval_samples = 0 and eval_every_updates = 0 or eval_subset_size = 0: nothing is evaluated",
    ),
    ("eval_subset_size", lambda c: c.eval_every_updates == 0, "eval_every_updates = 0"),
    ("eval_every_updates", lambda c: c.eval_subset_size == 0, "eval_subset_size = 0"),
    (
        "chat_template_kwargs",
        lambda c: c.chat_template == "plain",
        'chat_template = "plain" has no arguments',
    ),
    (
        "wandb_project wandb_entity",
        lambda c: "wandb" not in c.report_to,
        "report_to does not name wandb",
    ),
    (
        "plot_every",
        lambda c: not {"tensorboard", "wandb", "trackio"} & set(c.report_to),
        "report_to names no tracker that shows distributions (tensorboard, wandb, trackio)",
    ),
    ("max_completions_gb", lambda c: c.keep_completions == "none", 'keep_completions = "none"'),
    ("log_completions", lambda c: c.quiet, "quiet = true shows none"),
    (
        "logging_steps",
        lambda c: not (c.log_jsonl or c.report_to or c.log_completions),
        "log_jsonl = false, no report_to and no log_completions: nothing is recorded",
    ),
    (
        "lora_rank lora_scale lora_layers lora_keys lora_dropout",
        lambda c: bool(c.adapter_path),
        "the adapters of adapter_path have their own",
    ),
)


def lines(c: Settings, train_type: str, platform: str) -> Iterator[str]:
    """A line for each group of settings that were typed, and do nothing.

    Values of this project's presets, and defaults, are not spoken of. `train_type` is what the run
    trains ("full", "lora", "dora"), `platform` what it trains on ("metal", "cuda", "cpu").
    """
    typed = c.explicit - (c.inherited if c.from_preset else frozenset())
    yield from filter(None, [learning_rate(c, train_type)])
    if "wired_limit_gb" in typed and platform != "metal":
        yield "wired_limit_gb has no effect here: only Metal keeps memory resident"
    said: set[str] = set()
    for names, without_effect, why in RULES:
        idle = [n for n in names.split() if n in typed - said and differs(c, n)]
        if idle and without_effect(c):
            said.update(idle)
            yield _line(idle, why)


def _line(names: list[str], why: str) -> str:
    return f"{' and '.join(names)} {'have' if len(names) > 1 else 'has'} no effect: {why}"


def learning_rate(c: Settings, train_type: str) -> str:
    """A line for who typed a learning_rate while adapters train; empty for others."""
    if train_type == "full" or "learning_rate" not in c.explicit - c.inherited:
        return ""
    rate = short(c.lora_learning_rate)
    return f"learning_rate has no effect on adapters; lora_learning_rate = {rate} counts"
