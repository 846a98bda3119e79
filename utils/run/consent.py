"""Whether a run may be overwritten that was made of other data, or of another model.

`overwrite = true` in a preset says that the preset may be run twice. It does not say that a run of
one's own questions may go because the preset was typed again: that has to be typed, too.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..base.errors import UserError
from ..base.text import shown
from ..settings import reading
from ..settings.run_settings import Settings
from . import folders, ours

PATHS = ("model_name", "adapter_path", "dataset")
MADE_OF = (
    *PATHS,
    *("dataset_config", "dataset_mix", "train_split", "question_column", "answer_column"),
)
# On which the fingerprint of the data depends as well: where one differs, it says nothing.
SHAPING = (
    *("system_prompt", "reasoning_prefix", "chat_template", "chat_template_kwargs"),
    *("max_prompt_length", "max_train_samples", "eval_samples", "curriculum", "curriculum_column"),
)


def refuse_without(command: str, config: Settings, made_of: Mapping[str, object]) -> None:
    """Raises UserError where `overwrite` is a file's word only, and the run in the folder was made
    of something else; `made_of`: fingerprints, as far as they are known by now."""
    if not config.overwrite or "overwrite" not in config.inherited:
        return
    output_dir = config.located(config.output_dir)
    if not ours.remains(output_dir):
        return
    if changed := "; ".join(differences(output_dir, config, made_of)):
        raise UserError(
            f"output_dir {config.output_dir} holds a run that was made of something else "
            f"({changed}), and overwrite = true is in the settings file only. Choose another "
            f"output_dir, or replace the run:\n  {command} --set overwrite=true"
        )


def differences(output_dir: Path, config: Settings, made_of: Mapping[str, object]) -> Iterator[str]:
    """What that run was made of, and this one is not."""
    before, now = folders.settings_of(output_dir), reading.recorded(config)
    if not before:
        yield f"{ours.CONFIG} does not say of what"
        return
    before = reading.recorded(type(config)()) | before
    for name in MADE_OF:
        if not same(name, before[name], now[name], config):
            yield f"{name} was {shown(before[name])}, is {shown(now[name])}"
    record = ours.read_object(output_dir / ours.PROVENANCE)
    names = {"model_sha256": "the files of the model"}
    if all(before[name] == now[name] for name in SHAPING):
        names["data_sha256"] = "the training data"
    for name, what in names.items():
        if name in record and made_of.get(name, record[name]) != record[name]:
            yield f"{what} have changed since"


def same(name: str, before: object, now: object, config: Settings) -> bool:
    """Whether two values of a setting mean the same: a path can be written in several ways."""
    if name not in PATHS or not (isinstance(before, str) and isinstance(now, str) and before):
        return before == now
    return os.path.realpath(config.located(before)) == os.path.realpath(config.located(now))
