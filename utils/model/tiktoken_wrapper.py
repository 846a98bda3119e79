"""nanochat's tiktoken tokenizer behind the few methods of a Hugging Face tokenizer that we use.

A nanochat folder holds `tokenizer.tiktoken` (one "base64-token rank" per line) and
`tokenizer_config.json` with "pattern" (the split pattern) and "special_tokens" ({name: id}).
The chat format is that of karpathy/nanochat, `nanochat/tokenizer.py`, `render_conversation`.
"""

import base64
import binascii
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from ..data.tokenizer import Messages

CHAT_TOKENS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
)


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            token, rank = line.split(" ")
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"{path}, line {number}: not 'base64-token rank'") from error
    return ranks


def _read_config(path: Path) -> tuple[str, dict[str, int]]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return config["pattern"], dict(config["special_tokens"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path}: needs "pattern" and "special_tokens" ({error!r})') from error


def _check_tokens(ranks: dict[bytes, int], special_tokens: dict[str, int]) -> None:
    """Refuse tables on which tiktoken panics or decoding fails later. Raises ValueError."""
    if missing := [name for name in CHAT_TOKENS if name not in special_tokens]:
        raise ValueError(f"special_tokens lacks {', '.join(missing)}")
    if missing_bytes := sum(bytes([i]) not in ranks for i in range(256)):
        raise ValueError(f"the ranks lack {missing_bytes} of the 256 single bytes")
    if b"" in ranks:
        raise ValueError("the ranks hold an empty token")
    ids = [*ranks.values(), *special_tokens.values()]
    if not all(type(i) is int for i in ids) or sorted(ids) != list(range(len(ids))):
        raise ValueError(f"the {len(ids)} tokens need the ids 0 to {len(ids) - 1}, each once")


def _merge_system(messages: Messages) -> Messages:
    """nanochat knows no system role: its text opens the first user message."""
    roles = [message["role"] for message in messages]
    if roles[:2] == ["system", "user"]:
        merged = f"{messages[0]['content']}\n\n{messages[1]['content']}"
        messages, roles = [{"role": "user", "content": merged}, *messages[2:]], roles[1:]
    if not roles or roles != (["user", "assistant"] * len(roles))[: len(roles)]:
        raise ValueError(f"nanochat needs user and assistant in turns, user first; got {roles}")
    return messages


class TiktokenTokenizerWrapper:
    """Encodes text as ordinary text always: special tokens come from the chat template only.

    Raises ImportError without the extra `nanochat`, ValueError for ranks, special tokens or a
    pattern that make no tokenizer.
    """

    chat_template = "nanochat"  # not None: this tokenizer renders conversations
    has_chat_template = True

    def __init__(
        self, ranks: dict[bytes, int], pattern: str, special_tokens: dict[str, int]
    ) -> None:
        try:
            import tiktoken
        except ImportError as error:
            raise ImportError(
                "nanochat models need the package tiktoken: uv sync --extra nanochat, "
                'or pip install "mlx-grpo[nanochat]"'
            ) from error
        _check_tokens(ranks, special_tokens)
        self.ranks, self.pattern, self.special_tokens = ranks, pattern, special_tokens
        self.encoding = tiktoken.Encoding(
            "nanochat", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens
        )
        self.bos_token_id = special_tokens["<|bos|>"]
        self.eos_token_id = special_tokens["<|assistant_end|>"]
        self.eos_token_ids = {self.eos_token_id, self.bos_token_id}

    @property
    def vocab_size(self) -> int:
        """One more than the highest id; the model's table may be padded beyond it."""
        return self.encoding.n_vocab

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Ids of `text`; `add_special_tokens` puts <|bos|> in front."""
        ids = self.encoding.encode_ordinary(text)
        return [self.bos_token_id, *ids] if add_special_tokens else ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Text of `ids`, incomplete UTF-8 as U+FFFD. Raises KeyError for an id without a token."""
        special = set(self.special_tokens.values()) if skip_special_tokens else set()
        return self.encoding.decode([i for i in map(int, ids) if i not in special])

    def apply_chat_template(
        self,
        messages: Messages,
        tokenize: bool = True,
        add_generation_prompt: bool = True,
        return_dict: bool = False,
    ) -> list[int] | str:
        """Render a conversation as ids, or as text when `tokenize` is false.

        Raises ValueError unless user and assistant take turns (a system message may come first).
        """
        if return_dict:
            raise ValueError("return_dict is not supported: there is only one sequence of ids")
        ids = self.conversation_ids(messages, add_generation_prompt)
        return ids if tokenize else self.decode(ids)

    def conversation_ids(self, messages: Messages, add_generation_prompt: bool) -> list[int]:
        """The same as ids. Raises ValueError as that does."""
        ids = [self.bos_token_id]
        for message in _merge_system(messages):
            start = self.special_tokens[f"<|{message['role']}_start|>"]
            end = self.special_tokens[f"<|{message['role']}_end|>"]
            ids += [start, *self.encode(message["content"]), end]
        if add_generation_prompt:
            ids.append(self.special_tokens["<|assistant_start|>"])
        return ids

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the two files that `from_pretrained` reads into `folder`, creating it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        ordered = sorted(self.ranks.items(), key=lambda item: item[1])
        lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ordered]
        (folder / "tokenizer.tiktoken").write_text("".join(lines))
        config = {"pattern": self.pattern, "special_tokens": self.special_tokens}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Load a nanochat folder. Raises FileNotFoundError, or ValueError naming file and line."""
        folder = Path(folder)
        ranks = _read_ranks(folder / "tokenizer.tiktoken")
        return cls(ranks, *_read_config(folder / "tokenizer_config.json"))
