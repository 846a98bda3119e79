"""A chat template that asks as training asked, for programs that know nothing of training.

Servers send what a person wrote through the template in the model's folder. The template made here
adds the system prompt and the reasoning prefix around the original one, which stands in it
unchanged and can be taken out again (`taken_apart`), even where only the template was kept.
"""

import copy
import json
import re
from collections.abc import Sequence
from typing import Any, TypeAlias

from ..settings import reading
from ..settings.run_settings import Settings
from .chat_template import chat_ids, read
from .files import Row
from .tokenizer import Messages, Tokenizer

PromptSettings: TypeAlias = "dict[str, Any]"  # by their names in the settings, as JSON takes them
PROMPT = ("system_prompt", "reasoning_prefix", "chat_template", "chat_template_kwargs")
START, END = "{#- The prompt of an MLX-GRPO run: ", " -#}\n"
# mlx-lm always says whether to think, so that a template can't see whether a caller did.
ALWAYS = ("enable_thinking", "thinking")
# Beside the settings, in the template: the prefix, after a space where the tokenizer adds one, and
# the line break at the end, which is not rendered and so can't stay within.
PREFIX, BREAK = "served_prefix", "line_break"


def prompt_settings(config: Settings) -> PromptSettings:
    """How a run asks, without secrets: a template in a file is not named, but contained."""
    recorded = reading.recorded(config)
    values = {name: recorded[name] for name in (*PROMPT, "stop_strings")}
    return values | {"chat_template": "plain" if config.chat_template == "plain" else ""}


def template_of(tokenizer: Tokenizer) -> str | None:
    """The tokenizer's own template; None where it has none, or renders in Python."""
    # mlx-lm keeps a renderer in Python, which comes before a template, under this name.
    if getattr(tokenizer, "_chat_template", None) is not None:
        return None
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):  # several by name, as Command R has
        template = template.get("default")
    return template if isinstance(template, str) and hasattr(tokenizer, "bos_token") else None


def put_template(tokenizer: Tokenizer, template: str | None) -> None:
    """Give the tokenizer another template (of several, another default)."""
    wrapper: Any = tokenizer
    if isinstance(wrapper.chat_template, dict):
        wrapper.chat_template = {**wrapper.chat_template, "default": template}
        return
    wrapper.chat_template = template
    if hasattr(wrapper, "has_chat_template"):  # mlx-lm's wrapper looks once
        wrapper.has_chat_template = template is not None


def of_training(tokenizer: Tokenizer, config: Settings) -> str | None:
    """The template that prompts of training go through; None if it is not written in Jinja.

    Raises:
        UserError: `chat_template` names a file that can't be read.
    """
    if config.chat_template == "plain":
        return plain(tokenizer) if hasattr(tokenizer, "bos_token") else None
    return (
        read(str(config.located(config.chat_template)))
        if config.chat_template
        else template_of(tokenizer)
    )


def plain(tokenizer: Tokenizer) -> str:
    """`chat_template = "plain"` in Jinja, with what the tokenizer puts before any text."""
    first = "{{ bos_token }}" if tokenizer.encode("") else ""
    return first + "{% for message in messages %}{{ message['content'] | trim }}\n\n{% endfor %}"


def served(original: str, settings: PromptSettings) -> str:
    """`original` with system prompt, template arguments and reasoning prefix of training.

    A system message of the caller's own takes the place of the prompt; so do arguments of the
    template, except for whether to think.
    """
    end = re.search(r"(\r\n|\r|\n)\Z", original)
    if end and settings["reasoning_prefix"]:
        settings = settings | {BREAK: end[0]}
        original = original[: end.start()]
    return head(settings, original) + original + tail(settings)


def head(settings: PromptSettings, original: str) -> str:
    """What stands before the original template: see `served`."""
    blocks = []
    for name, value in settings["chat_template_kwargs"].items():
        keep = "" if name in ALWAYS else f" if {name} is not defined or {name} is none else {name}"
        blocks.append(f"set {name} = {literal(value)}{keep}")
    if settings["system_prompt"]:
        system = f"{{'role': 'system', 'content': {literal(settings['system_prompt'])}}}"
        own = "messages and messages[0]['role'] in ['system', 'developer']"
        blocks.append(f"set messages = messages if {own} else [{system}] + messages")
    comment = json.dumps(settings, ensure_ascii=False).replace("#}", "#\\u007d")
    text = START + comment + END + "".join(f"{{%- {block} -%}}\n" for block in blocks)
    if original[:1].isspace():  # "-" would take this away, too; without it, one line break goes
        text = "".join(text.rsplit("-", 1))
    return text


def tail(settings: PromptSettings) -> str:
    """What stands behind it. An expression, next to which no white space is stripped."""
    prefix = settings.get(PREFIX, settings["reasoning_prefix"])
    return f"{{{{ {literal(prefix)} if add_generation_prompt else '' }}}}" if prefix else ""


def literal(value: object) -> str:
    """A setting's value as Jinja writes it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{literal(k)}: {literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def taken_apart(template: object) -> tuple[str, PromptSettings] | None:
    """The original template in one that `served` made, and the settings; None for any other."""
    if not isinstance(template, str) or not template.startswith(START):
        return None
    try:
        settings = json.loads(template[len(START) : template.index("#}")].rstrip(" -"))
        starts, end = (head(settings, " "), head(settings, "")), tail(settings)
    except (ValueError, TypeError, LookupError, AttributeError):
        return None  # a person has written into it
    start = next((start for start in starts if template.startswith(start)), None)
    if start is None or not template.endswith(end):
        return None
    original = template[len(start) : len(template) - len(end)] + settings.get(BREAK, "")
    return original, {k: v for k, v in settings.items() if k not in (PREFIX, BREAK)}


def fitting(
    tokenizer: Tokenizer, config: Settings, original: str, rows: Sequence[Row]
) -> tuple[str, str]:
    """The served template, and why it does not ask for all rows as training did; empty if it does.

    The rows hold `prompt` (messages) and `prompt_ids`. A prefix is tokenized apart in training, and
    with the rest of the prompt in a server: SentencePiece puts a space before what stands alone.

    Raises:
        UserError: the template fails for a row.
    """
    settings = prompt_settings(config)
    templates = [served(original, settings)]
    if config.reasoning_prefix:
        templates.append(served(original, settings | {PREFIX: f" {settings['reasoning_prefix']}"}))
    wrong = [differing(tokenizer, config, template, rows) for template in templates]
    best = wrong.index(min(wrong))
    trouble = f"{wrong[best]} of {len(rows)} prompts get other tokens"
    return templates[best], trouble if wrong[best] else ""


def by_a_caller(config: Settings, row: Row) -> Messages:
    """The messages of a question without the system prompt that the template is to add."""
    first, *rest = row["prompt"]
    added = config.system_prompt and first == {"role": "system", "content": config.system_prompt}
    return rest if added else row["prompt"]


def differing(tokenizer: Tokenizer, config: Settings, template: str, rows: Sequence[Row]) -> int:
    """How many rows get other ids by this template, asked as a server asks, than in training."""
    plainly = copy.copy(config)
    plainly.chat_template, plainly.chat_template_kwargs = "", {}
    before = template_of(tokenizer)
    put_template(tokenizer, template)
    try:
        asked = [chat_ids(tokenizer, plainly, by_a_caller(config, row)) for row in rows]
    finally:
        put_template(tokenizer, before)
    return sum(ids != row["prompt_ids"] for ids, row in zip(asked, rows, strict=True))
