"""Rows of tokens for `utils/pretrain.py`: packed text files, or prompts with completions.

The order of the rows is a function of seed and position alone, so a run that resumes needs to know
nothing but its step.
"""

import functools
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ..base.errors import UserError
from ..base.say import say
from ..base.task_progress import Progress
from ..base.text import shown
from ..model import served_prompt

END = "<|endoftext|>"
TokenPair = tuple[list[int], list[int]]
"""Of a prompt and of its completion."""


@dataclass
class Rows:
    """Sequences of one length: tokens (N, T+1), and mask (N, T) with ones on trained targets."""

    tokens: np.ndarray
    mask: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def length(self) -> int:
        return self.mask.shape[1]

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for array in (self.tokens, self.mask):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def unigram_entropy(self) -> float:
        """Nats per target: no model that ignores context can have a lower loss on these rows."""
        counts = np.bincount(self.tokens[:, 1:][self.mask])
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * np.log(shares)).sum())


@functools.lru_cache(maxsize=2)
def _permutation(total: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(total)


def batch_rows(total: int, size: int, step: int, seed: int) -> np.ndarray:
    """Rows of update `step` (from 0): every epoch is a new order, and no row is left out."""
    positions = range(step * size, (step + 1) * size)
    return np.array([_permutation(total, seed, p // total)[p % total] for p in positions])


def text_files(folder: str, suffixes: list[str], option: str) -> list[Path]:
    """The text files below `folder`, sorted by path.

    Raises:
        UserError: there is no such folder, or no such file in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"{option} = {folder!r}: no such folder of text files")
    files = sorted(p for p in root.rglob("*") if p.suffix in suffixes and p.is_file())
    if not files:
        raise UserError(f"{option} = {folder!r}: holds no file ending in {', '.join(suffixes)}")
    return files


def read_texts(files: list[Path]) -> Iterator[str]:
    for file in files:
        try:
            yield file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file} cannot be read as UTF-8 text: {error}") from None


def pack(documents: Iterable[list[int]], length: int, end: int) -> Rows:
    """Documents one after the other, `end` after each, cut into rows without padding.

    Neighbouring rows share one token, so that every token but the first is a target once. What
    does not fill a row at the very end is dropped.
    """
    parts = [np.array([end], dtype=np.int32)]
    parts += [np.array([*document, end], dtype=np.int32) for document in documents]
    stream = np.concatenate(parts)
    count = (len(stream) - 1) // length
    if not count:
        return Rows(np.empty((0, length + 1), np.int32), np.empty((0, length), bool))
    tokens = np.lib.stride_tricks.sliding_window_view(stream, length + 1)[::length][:count]
    return Rows(tokens, np.ones((count, length), dtype=bool))


SHORT = 5_000_000  # characters that are read in seconds


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Iterator[list[int]]:
    """Token ids of each text, many at a time: the tokenizer then uses every core."""
    short = sum(map(len, texts)) < SHORT
    with Progress(len(texts), "text", label="tokenize: ", quiet=short) as shown:
        for start in range(0, len(texts), 256):
            chunk = texts[start : start + 256]
            yield from tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]
            shown.step(len(chunk))


def text_rows(
    tokenizer: PreTrainedTokenizerFast, files: list[Path], length: int, option: str
) -> Rows:
    rows = pack(encode(tokenizer, list(read_texts(files))), length, tokenizer.eos_token_id)
    if not len(rows):
        raise UserError(f"{option}: its text is shorter than max_seq_length = {length} tokens")
    return rows


def read_pairs(path: str, option: str) -> list[tuple[str, str]]:
    """(prompt, completion) of each line of a JSONL file.

    Raises:
        UserError: no such file, or a line that is not such an object.
    """
    try:
        # Not splitlines: a text may hold U+2028, at which that would cut.
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option} = {path!r} cannot be read: {error}") from None
    numbered = enumerate(lines, start=1)
    pairs = [_pair(line, f"{path}, line {number}") for number, line in numbered if line.strip()]
    if not pairs:
        raise UserError(f"{option} = {path!r}: holds no line")
    return pairs


def _pair(line: str, where: str) -> tuple[str, str]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise UserError(f'{where}: {shown(row)} is no object with "prompt" and "completion"')
    for name in ("prompt", "completion"):
        if name not in row:
            has = ", ".join(map(json.dumps, row)) or "nothing"
            raise UserError(f'{where}: needs the texts "prompt" and "completion"; it has {has}')
        if not isinstance(row[name], str):
            raise UserError(f'{where}: "{name}" must be a text, not {shown(row[name])}')
    if not row["completion"]:
        raise UserError(
            f'{where}: "completion" is empty, so there is nothing to learn: delete the line'
        )
    return row["prompt"], row["completion"]


def chat_prompt(tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    message = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False))


def pair_rows(
    tokenizer: PreTrainedTokenizerFast,
    pairs: list[tuple[str, str]],
    length: int,
    use_chat_template: bool,
    option: str,
) -> Rows:
    """One row per pair, padded; only the completion and the end of text are targets.

    Prompt and completion are tokenized apart, as they are when a model generates.
    """
    if use_chat_template and not tokenizer.chat_template:
        raise UserError("use_chat_template = true: the tokenizer has no chat template")
    encoded = _encoded_pairs(tokenizer, pairs, use_chat_template)
    return padded(encoded, length, tokenizer.eos_token_id, option)


def _encoded_pairs(
    tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]], use_chat_template: bool
) -> list[TokenPair]:
    """Prompt, and completion with the end of text, of each pair."""
    prompts = [chat_prompt(tokenizer, p) if use_chat_template else p for p, _ in pairs]
    end = tokenizer.eos_token_id
    heads = list(encode(tokenizer, prompts))
    if not use_chat_template:  # an empty prompt, too, needs a token before the completion
        heads = [[end, *head] for head in heads]
    tails = [[*ids, end] for ids in encode(tokenizer, [text for _, text in pairs])]
    return list(zip(heads, tails, strict=True))


def padded(encoded: list[TokenPair], length: int, end: int, option: str) -> Rows:
    """Rows as long as the longest pair, rounded up to 32 or `length`, filled up with `end`.

    Pairs that are longer are left out and counted.

    Raises:
        UserError: all are.
    """
    pairs = [(head, tail) for head, tail in encoded if len(head) + len(tail) <= length + 1]
    if not pairs:
        raise UserError(f"{option}: every row is longer than max_seq_length = {length} tokens")
    if left_out := len(encoded) - len(pairs):
        count = len(encoded)
        say(f"{option}: {left_out} of {count} rows are longer than {length} tokens: left out")
    width = min(length, _rounded(max(len(head) + len(tail) for head, tail in pairs) - 1))
    tokens = np.full((len(pairs), width + 1), end, dtype=np.int32)
    mask = np.zeros((len(pairs), width), dtype=bool)
    for row, (head, tail) in enumerate(pairs):
        tokens[row, : len(head) + len(tail)] = head + tail
        mask[row, len(head) - 1 : len(head) + len(tail) - 1] = True
    return Rows(tokens, mask)


def _rounded(length: int) -> int:
    return -(-length // 32) * 32


def load_tokenizer(folder: str, option: str = "tokenizer_dir") -> PreTrainedTokenizerFast:
    """`option`: the setting that names the folder.

    Raises:
        UserError: no tokenizer there, or one without an end-of-text token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{option} = {folder!r} holds no tokenizer: {reason}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"{option} = {folder!r}: the tokenizer has no end-of-text token")
    served_prompt.ask_plainly(tokenizer, Path(folder))  # type: ignore[arg-type]
    return tokenizer  # type: ignore[return-value]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with one special token, the end of text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),  # elsewhere it prints empty lines
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )
