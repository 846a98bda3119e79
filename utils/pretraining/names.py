"""Names of the trainer's settings for those of `utils/pretrain.py`, and pairs that say the same."""

from collections.abc import Iterable, Mapping

from ..base.errors import UserError

ALIASES = {
    "learning_rate": "lr",
    "lora_learning_rate": "lora_lr",
    "output_dir": "out_dir",
    "model_name": "initial_checkpoint_dir",
    "dataset": "train_data_path",
    "data": "train_data_path",
    "batch_size": "global_batch_size",
    "max_grad_norm": "max_norm",
    "save_steps": "save_interval",
    "logging_steps": "log_interval",
    "eval_steps": "eval_interval",
    "use_compile": "compile",
    "adam_eps": "eps",
}
"""The trainer's name -> the one here, which is LitGPT's."""
# The first has no effect where the second is above 0; whichever was typed last counts.
INSTEAD = (("max_tokens", "num_epochs"), ("lr_warmup_steps", "warmup_ratio"))
# The same, but both may stand in a file: which of them counts depends on what is trained.
WITH_ADAPTERS = (("lr", "lora_lr"),)


def own_name(key: str) -> str:
    return ALIASES.get(key, key)


def refuse_two_names(keys: Iterable[str], where: str) -> None:
    """Raises UserError where a setting stands under both of its names, or what excludes it, too."""
    given = {*keys}
    pairs = [(alias, own, "are the same setting") for alias, own in ALIASES.items()]
    own_names = {own_name(key) for key in given}
    for one, other, why in (*pairs, *((*pair, "say the same in two ways") for pair in INSTEAD)):
        found = own_names if (one, other) in INSTEAD else given
        if {one, other} <= found:
            raise UserError(f"{one} and {other} {why}: leave one of them out of {where}")


def settled(values: Mapping[str, object], typed: Iterable[str]) -> dict[str, int]:
    """What was typed takes the place of what says the same in the file: settings to change."""
    given = {*typed}
    return {
        second: 0
        for first, second in (*INSTEAD, *WITH_ADAPTERS)
        if first in given and second not in given and values.get(second)
    }
