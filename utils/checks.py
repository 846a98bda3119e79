"""What settings may be: ranges, choices, and combinations that make no sense together.

All of it is checked before anything is loaded; a complaint names key, value and what is allowed.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

from .datafiles import MIX_KEYS
from .errors import UserError

LIMITS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "text": (lambda v: v.strip() != "", "model_name output_dir dataset train_split test_split"),
    "above 0 and finite": (
        lambda v: 0 < v < math.inf,
        "learning_rate lora_learning_rate lora_scale temperature max_grad_norm importance_cap "
        "reward_timeout",
    ),
    "at least 0 and finite": (
        lambda v: 0 <= v < math.inf,
        "kl_coeff weight_decay max_hours wired_limit_gb cache_limit_gb",
    ),
    "at least 2 (a group needs another completion to compare with)": (
        lambda v: v >= 2,
        "num_generations",
    ),
    "at least 1": (
        lambda v: v >= 1,
        "lora_rank batch_size gradient_accumulation_steps num_epochs num_iterations "
        "sync_every_updates max_new_tokens max_prompt_length max_completion_length "
        "eval_max_new_tokens logging_steps",
    ),
    "at least 0": (
        lambda v: v >= 0,
        "max_train_samples max_updates top_k eval_steps eval_samples eval_every_updates "
        "eval_subset_size log_completions save_steps save_total_limit rollout_batch_size "
        "micro_batch_tokens",
    ),
    "at least 0, below 2 ** 64": (lambda v: 0 <= v < 2**64, "seed"),
    "-1 (all) or at least 1": (lambda v: v == -1 or v >= 1, "lora_layers"),
    "above 0, at most 1": (lambda v: 0 < v <= 1, "top_p"),
    "between 0 and 1": (lambda v: 0 <= v <= 1, "min_p warmup_ratio"),
    "at least 0, below 1": (lambda v: 0 <= v < 1, "lora_dropout adam_beta1 adam_beta2"),
    "above 0, below 1": (lambda v: 0 < v < 1, "clip_eps"),
}
CHOICES = {
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "train_type": ("auto", "full", "lora", "dora"),
    "loss_type": ("grpo", "dapo", "dr_grpo"),
    "curriculum": ("none", "weights", "easy_to_hard"),
    "lr_scheduler_type": ("cosine", "linear", "constant"),
}


def contradictions(c: Any) -> Iterator[tuple[str, bool]]:
    """(complaint, does it apply) for settings that make no sense together."""
    yield "reward_funcs is empty: nothing would be learned", not c.reward_funcs
    yield (
        f"reward_weights has {len(c.reward_weights)} values for {len(c.reward_funcs)} reward_funcs",
        len(c.reward_weights) not in (0, len(c.reward_funcs)),
    )
    yield "reward_funcs names a function twice", len({*c.reward_funcs}) != len(c.reward_funcs)
    for name, given in c.reward_kwargs.items():
        yield (
            f"reward_kwargs names {name!r}, which is not among reward_funcs: "
            f"{', '.join(c.reward_funcs)}",
            name not in c.reward_funcs,
        )
        yield (
            f"reward_kwargs.{name} = {given!r} must be a table such as {{key = value}}",
            not isinstance(given, dict),
        )
    yield (
        "adapter_path needs train_type lora or dora",
        bool(c.adapter_path) and (c.train_type == "full"),
    )
    yield (
        "lora_dropout with gradient_checkpointing: a layer computed again would draw another mask, "
        "and its gradient would be wrong; leave one of them out",
        c.lora_dropout > 0 and c.gradient_checkpointing,
    )
    yield (
        f"eval_metric = {c.eval_metric!r} is neither em nor one of reward_funcs",
        c.eval_metric not in ("em", *c.reward_funcs),
    )
    weighted = [part for part in c.dataset_mix if "weight" in part]
    yield (
        f"curriculum = {c.curriculum} orders all questions by difficulty, so the weights in "
        "dataset_mix would have no effect: leave one of them out",
        c.curriculum == "easy_to_hard" and bool(weighted),
    )
    yield (
        "shuffle = false keeps the order of the data, but weights draw at random: leave one out",
        not c.shuffle and (bool(weighted) or c.curriculum == "weights"),
    )
    yield (
        "max_train_samples has no effect on dataset_mix: write samples = N in its tables",
        bool(c.dataset_mix) and c.max_train_samples > 0,
    )
    yield (
        "dataset_mix: a weight in every table or in none (then each question comes once an epoch)",
        len(weighted) not in (0, len(c.dataset_mix)),
    )
    for text in c.stop_strings:
        yield "stop_strings holds an empty string", not text
        yield f"stop string {text!r} is part of reasoning_prefix", text in c.reasoning_prefix


def check_mix(mix: list[dict[str, Any]]) -> None:
    """Refuse tables of dataset_mix with unknown keys or impossible values. Raises UserError."""
    names = [part.get("dataset") for part in mix]
    for part in mix:
        for key, value in part.items():
            kind = MIX_KEYS.get(key)
            if kind is None:
                raise UserError(f"dataset_mix: unknown key {key!r}; known: {', '.join(MIX_KEYS)}")
            number = isinstance(value, int | kind) and not isinstance(value, bool)
            right = isinstance(value, str) if kind is str else number and 0 < value < math.inf
            if not right:
                wanted = "text" if kind is str else "a number above 0"
                raise UserError(f"dataset_mix: {key} = {value!r} must be {wanted}")
        if not part.get("dataset"):
            raise UserError(f"dataset_mix: a table without dataset: {part}")
        if names.count(part["dataset"]) > 1:
            raise UserError(f"dataset_mix: {part['dataset']!r} occurs twice")


def check(c: Any) -> None:
    """Check every value and combination of an MLXGRPOConfig.

    Raises:
        UserError: the first complaint.
    """
    for rule, (holds, names) in LIMITS.items():
        for name in names.split():
            if not holds(getattr(c, name)):
                raise UserError(f"{name} = {getattr(c, name)!r} must be {rule}")
    for name, allowed in CHOICES.items():
        if getattr(c, name) not in allowed:
            raise UserError(f"{name} = {getattr(c, name)!r}, allowed: {', '.join(allowed)}")
    check_mix(c.dataset_mix)
    for complaint, wrong in contradictions(c):
        if wrong:
            raise UserError(complaint)


def refuse_dead_settings(c: Any, train_type: str) -> None:
    """Refuse what was set on purpose and could have no effect."""
    if c.dataset_mix and c.eval_samples and "dataset" not in c.explicit:
        raise UserError(
            "dataset_mix is trained on; set dataset too, on which the run is evaluated (or "
            "eval_samples = 0)"
        )
    if "curriculum_column" in c.explicit and c.curriculum == "none":
        raise UserError("curriculum_column has no effect with curriculum = none: leave it out")
    dead = sorted(name for name in c.explicit if name.startswith("lora_"))
    if train_type == "full" and dead:
        raise UserError(f"{', '.join(dead)} has no effect with train_type = full: leave it out")
