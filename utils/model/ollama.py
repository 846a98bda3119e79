"""A Modelfile for Ollama, which does not read the chat template in a GGUF file.

Its templates are Go's. What a template here puts before and after a question becomes text there, so
that a question is asked as training asked it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.errors import UserError, reason
from ..base.json_files import read_object

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

QUESTION = "@@@ the question @@@"
QUOTES = '"""'  # end a text in a Modelfile


def modelfile(file: str, tokenizer: TokenizerWrapper, folder: Path) -> tuple[str, list[str]]:
    """The text of a Modelfile for the GGUF `file` beside it, and what it does not say."""
    lines = [f"FROM ./{file}"]
    notes = []
    template = template_of(tokenizer)
    if template is None:
        notes.append(
            "the Modelfile has no TEMPLATE: the chat template cannot be told as text before and "
            "after a question"
        )
    else:
        if "strftime_now" in str(tokenizer.chat_template):
            notes.append("the Modelfile's TEMPLATE holds today's date, as the template gave it")
        lines.append(f"TEMPLATE {QUOTES}{template}{QUOTES}")
    lines += [f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}" for text in stops(folder)]
    return "\n".join(lines) + "\n", notes


def template_of(tokenizer: TokenizerWrapper) -> str | None:
    """Text before the question, the place of the question, and text behind; None where it fails."""
    if not isinstance(getattr(tokenizer, "chat_template", None), str | dict):
        return None
    try:
        text = rendered(tokenizer, QUESTION)
    except UserError:
        return None
    first = tokenizer.bos_token or ""
    if tokenizer.encode("")[:1] == [tokenizer.bos_token_id]:  # Ollama puts it there itself
        text = text.removeprefix(first)
    before, _, after = text.partition(QUESTION)
    if text.count(QUESTION) != 1 or QUOTES in text:
        return None
    return f"{literal(before)}{{{{ .Prompt }}}}{literal(after)}"


def rendered(tokenizer: TokenizerWrapper, question: str) -> str:
    """The text that a question becomes.

    Raises:
        UserError: the template fails.
    """
    asked = [{"role": "user", "content": question}]
    try:
        return str(tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False))
    except Exception as error:  # a template is code: it can raise anything
        raise UserError(f"the chat template fails for a question alone: {reason(error)}") from error


def literal(text: str) -> str:
    """As Go's templates show it unchanged."""
    return text.replace("{{", '{{ "{{" }}')


def stops(folder: Path) -> list[str]:
    """The stop strings that a folder's generation settings name.

    Raises:
        UserError: the file is damaged, and what it says would be lost.
    """
    found = read_object(folder / "generation_config.json").get("stop_strings")
    found = [found] if isinstance(found, str) else found
    return [text for text in found or [] if isinstance(text, str)]
