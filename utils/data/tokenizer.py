"""What is asked of a tokenizer: mlx-lm's, or nanochat's behind the same few methods."""

from collections.abc import Iterable
from typing import Any, Protocol

Messages = list[dict[str, str]]
"""A conversation, each message with role and content."""


class Tokenizer(Protocol):
    @property
    def eos_token_ids(self) -> Iterable[int]:
        """The tokens that end a text."""

    def encode(self, text: str, /, *, add_special_tokens: bool = ...) -> list[int]: ...

    def decode(self, ids: list[int], /) -> str: ...

    def apply_chat_template(self, messages: Messages, /, *, add_generation_prompt: bool) -> Any:
        """Token ids, unless the options of a template make something else of them."""

    def save_pretrained(self, folder: str, /) -> object: ...
