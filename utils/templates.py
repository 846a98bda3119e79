"""Chat messages to token ids, through whichever template there is."""

from functools import cache
from pathlib import Path
from typing import Any

from .errors import UserError


def chat_ids(tokenizer: Any, config: Any, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of the messages with the opening of the answer, without the reasoning prefix.

    Raises:
        UserError: the tokenizer has no chat template, or its template refuses the messages.
    """
    import jinja2

    options = dict(config.chat_template_kwargs)
    if config.chat_template == "plain":
        text = "\n\n".join(message["content"].strip() for message in messages) + "\n\n"
        return tokenizer.encode(text)
    if config.chat_template:
        options["chat_template"] = read(config.chat_template)
    elif getattr(tokenizer, "has_chat_template", True) is False:
        raise UserError(
            f"the tokenizer of {config.model_name} has no chat template: set chat_template to a "
            'Jinja file, or chat_template = "plain"'
        )
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)
    except (jinja2.TemplateError, TypeError) as error:
        hint = '; system_prompt = "" leaves the system message out' if config.system_prompt else ""
        raise UserError(
            f"chat template ({config.chat_template or config.model_name}) refuses the prompt: "
            f"{error}{hint}"
        ) from None


@cache
def read(path: str) -> str:
    return Path(path).read_text(encoding="utf-8")
