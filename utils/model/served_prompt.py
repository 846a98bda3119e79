"""The prompt that a model folder carries, so that what is served is asked as it was trained.

chat_template.jinja adds system prompt and reasoning prefix, for every program that reads such
folders. Beside it lie the original template and grpo_prompt.json, the marker: the commands here ask
through the original and add both themselves, so that nothing is added twice.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..base.errors import UserError
from ..base.json_files import read_object, write_json
from ..base.text import redact
from ..data import served_template
from ..data.files import Row
from ..data.tokenizer import Tokenizer
from ..settings import reading
from ..settings.run_settings import Settings
from .shape import JsonObject

MARKER, TEMPLATE = "grpo_prompt.json", "chat_template.jinja"
ORIGINAL = "chat_template.original.jinja"
FIRST_ROWS = 100  # of the training data, on which both ways are compared
FORMAT = 1
# What of a run's settings says how its model is asked (the first ones) and judged.
PROMPT_SETTINGS = 5
OF_A_RUN = (
    *("system_prompt", "reasoning_prefix", "chat_template", "chat_template_kwargs", "stop_strings"),
    *("max_prompt_length", "max_completion_length", "eval_max_new_tokens", "seed"),
    *("dataset", "dataset_config", "train_split", "test_split", "question_column"),
    *("answer_column", "temperature", "top_k", "top_p", "min_p", "reward_funcs", "reward_weights"),
    "reward_kwargs",
)


@dataclass(frozen=True)
class ServedPrompt:
    """How a run asks, as a model's folder is to say it."""

    settings: JsonObject
    """Of the run: what its prompts and their evaluation are made of."""
    template: str | None
    """For programs that know no more than the folder; None where no template can say it."""
    original: str | None
    """The template without what is added."""
    trouble: str
    """Why such programs do not ask as training did; empty where they do."""


def of_run(tokenizer: Tokenizer, config: Settings, rows: Sequence[Row]) -> ServedPrompt:
    """The prompt of a run whose training prompts are `rows` (with `prompt` and `prompt_ids`)."""
    original = served_template.of_training(tokenizer, config)
    recorded = reading.recorded(config)
    settings = {name: recorded[name] for name in OF_A_RUN}
    settings |= served_template.prompt_settings(config)
    if original is None:
        return ServedPrompt(settings, None, None, "its prompts are not made by a Jinja template")
    try:
        template, trouble = served_template.fitting(tokenizer, config, original, rows[:FIRST_ROWS])
    except UserError as error:
        return ServedPrompt(settings, None, None, str(error))
    if config.chat_template == "plain":
        original = served_template.template_of(tokenizer)
    return ServedPrompt(settings, template, original, trouble)


def write(folder: Path, prompt: ServedPrompt) -> None:
    """Into a folder of a model or of adapters, whose tokenizer is written already."""
    if prompt.template is not None:
        (folder / TEMPLATE).write_text(redact(prompt.template), encoding="utf-8", newline="")
    if prompt.original is not None:
        (folder / ORIGINAL).write_text(redact(prompt.original), encoding="utf-8", newline="")
    write_json(folder / MARKER, {"format": FORMAT, "settings": prompt.settings})


def carry_over(source: Path, folder: Path) -> None:
    """What a model was asked by, into the folder of what was made of it."""
    for name in (MARKER, ORIGINAL):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def settings_in(folder: Path) -> JsonObject:
    """The settings that a folder of a model or of adapters carries; empty if it carries none.

    Raises:
        UserError: the marker is damaged.
    """
    marker = read_object(folder / MARKER)
    if marker:
        settings = marker.get("settings")
        if marker.get("format") != FORMAT or not isinstance(settings, dict):
            raise UserError(
                f"{folder / MARKER} is not of format {FORMAT}: delete it, and say how to ask the "
                "model with --config or --set"
            )
        return settings
    try:  # of another program's conversion, which keeps the template alone
        text = (folder / TEMPLATE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    apart = served_template.taken_apart(text)
    return apart[1] if apart else {}


def ask_plainly(tokenizer: Tokenizer, folder: Path) -> None:
    """Give a tokenizer that was read from `folder` the original template of a served one."""
    apart = served_template.taken_apart(served_template.template_of(tokenizer))
    if apart is None:
        return
    original: str | None = apart[0]
    kept = folder / ORIGINAL
    if kept.is_file():
        original = kept.read_text(encoding="utf-8")
    elif apart[1]["chat_template"] == "plain":
        original = None
    served_template.put_template(tokenizer, original)
