"""Chat messages to token ids, through whichever template there is."""

import json
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from ..base.errors import UserError, panics_as_errors
from ..settings.run_settings import Settings
from .tokenizer import Messages, Tokenizer

# transformers gives templates this function. The formats of public ones are all literals.
NOW = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
SECONDS = 10.0  # for one prompt, which takes a template milliseconds


def chat_ids(
    tokenizer: Tokenizer, config: Settings, messages: Messages, *, opening: bool = True
) -> list[int]:
    """Token ids of the messages with the opening of the answer, without the reasoning prefix.

    opening: false for a conversation that ends in an answer.

    Raises:
        UserError: the tokenizer has no chat template, or its template refuses the messages.
    """
    if config.chat_template == "plain":
        text = "\n\n".join(message["content"].strip() for message in messages) + "\n\n"
        return tokenizer.encode(text)
    options = template_options(tokenizer, config)
    which = f"chat template ({config.chat_template or config.model_name})"
    try:
        with time_limit(SECONDS, which), panics_as_errors():
            return tokenizer.apply_chat_template(messages, add_generation_prompt=opening, **options)
    except UserError:
        raise
    except Exception as error:  # a template is code, although in a sandbox: it can raise anything
        hint = '; system_prompt = "" leaves the system message out' if config.system_prompt else ""
        raise UserError(f"{which} refuses the prompt: {error}{hint}") from error


def template_options(tokenizer: Tokenizer, config: Settings) -> dict[str, Any]:
    """What the tokenizer is to be called with: arguments, and a template that is not its own."""
    options = dict(config.chat_template_kwargs)
    if config.tool_schemas:
        options["tools"] = list(config.tool_schemas)
    if config.chat_template:
        options["chat_template"] = read(str(config.located(config.chat_template)))
    elif getattr(tokenizer, "has_chat_template", True) is False:
        raise UserError(
            f"the tokenizer of {config.model_name} has no chat template: set chat_template to a "
            'Jinja file, or chat_template = "plain"'
        )
    template = options.get("chat_template", getattr(tokenizer, "chat_template", ""))
    if isinstance(template, str) and "strftime_now" in template:
        options["chat_template"] = dated(template, config.started_on)
    return options


@cache
def dated(template: str, started_on: str) -> str:
    """The template with the date on which the run began in place of today's: resumed on another
    day, it asks the same."""
    began = datetime.fromisoformat(started_on)
    return NOW.sub(lambda match: json.dumps(began.strftime(match[2]), ensure_ascii=False), template)


@cache
def read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"chat_template = {path!r} cannot be read: {error}") from None


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raise UserError when the block takes longer (in the main thread, where signals arrive).

    The sandbox of a template bounds a loop, not loops within loops: it can run for hours.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise UserError(f"{what} took over {seconds:g} seconds for one prompt: it may never end")

    before = signal.signal(signal.SIGALRM, stop)
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left)
        signal.signal(signal.SIGALRM, before)
