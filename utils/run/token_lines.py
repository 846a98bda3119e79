"""What was sampled, token by token, as a line of JSON: written fast, since there are many.

Log-probabilities have three decimals: a thousandth of a probability, which is what float16 would
keep of most of them.
"""

import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypedDict

import numpy as np

from ..base.text import json_line
from ..data.completion import Completion
from ..data.tokenizer import Tokenizer
from ..gradient.micro_batch import MicroBatch

UNIT = 1000  # parts of a log-probability that are told apart
LEAST = -30.0  # the smallest log-probability that is looked up
UNCLEAR = "\ufffd"  # what half a character is decoded to
MOST_KNOWN = 10_000  # tokens that make characters together


class TokenLine(TypedDict):
    """One list for each completion of the group `n`; None for one whose text held a secret."""

    n: int
    ids: list[list[int] | None]
    sampled_logprobs: list[list[float | None] | None]
    trained_logprobs: list[list[float | None] | None]
    mask: list[list[int] | None]
    """None: all were sampled."""
    pieces: dict[str, str]
    """Text by id, of those that no earlier line of the file has."""
    joined: list[tuple[int, int, str]]
    """(completion, token, text) where only several tokens together make characters: the last of
    them has the text, those before it have none."""


class Pieces:
    """The text of tokens; each is asked for once. After `learn` nothing more is asked about these
    lists of tokens, so that another thread may use what is known: tokenizers are for one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.texts: dict[int, str] = {}
        self.unclear: set[int] = set()
        self.of_several: dict[tuple[int, ...], str] = {}
        self.written: set[int] = set()  # to the present file

    def begin_file(self) -> None:
        self.written = set()

    def learn(self, lists: Iterable[Sequence[int]]) -> None:
        if len(self.of_several) > MOST_KNOWN:
            self.of_several.clear()
        lists = [*lists]
        for token in set[int]().union(*lists).difference(self.texts):
            self.text(token)
        for ids in lists:
            self.joined(ids)

    def new(self, lists: Iterable[Sequence[int]]) -> dict[str, str]:
        """Text by id of those that are not in the file yet."""
        new = set[int]().union(*lists) - self.written
        self.written |= new
        return {str(token): self.text(token) for token in sorted(new)}

    def text(self, token: int) -> str:
        if token not in self.texts:
            # The first token of a text may lose its space: the second says what it is within one.
            once, twice = (self.tokenizer.decode([token] * times) for times in (1, 2))
            text = twice.removeprefix(once) if twice.startswith(once) else once
            self.texts[token] = text
            if UNCLEAR in text:
                self.unclear.add(token)
        return self.texts[token]

    def joined(self, ids: Sequence[int]) -> list[tuple[int, str]]:
        """(place, text) of the tokens that are parts of characters."""
        found: list[tuple[int, str]] = []
        if self.unclear.isdisjoint(ids):
            return found
        begun: list[int] = []
        for place, token in enumerate(ids):
            if not begun and token not in self.unclear:
                continue
            begun.append(token)
            text = self.together(tuple(begun))
            if text.endswith(UNCLEAR) and len(begun) < 8:  # more to come
                found.append((place, ""))
            else:
                found.append((place, text))
                begun = []
        if begun:
            found[-1] = found[-1][0], self.together(tuple(begun))
        return found

    def together(self, ids: tuple[int, ...]) -> str:
        if ids not in self.of_several:
            self.of_several[ids] = self.tokenizer.decode([*ids])
        return self.of_several[ids]


def trained_logprobs(batches: Sequence[MicroBatch]) -> dict[int, np.ndarray]:
    """Completion -> log-probs of its sampled tokens, by the policy before it learnt from them."""
    found: dict[int, np.ndarray] = {}
    for batch in batches:
        if batch.old_logprobs is None:
            continue
        logprobs, mask = np.array(batch.old_logprobs), np.array(batch.mask) > 0
        for row, number in enumerate(np.array(batch.completion, int).tolist()):
            if mask[row].any():  # others only fill up the batch
                found[number] = logprobs[row, mask[row]]
    return found


def token_line(
    n: int,
    completions: Sequence[Completion | None],
    trained: Sequence[np.ndarray | None],
    pieces: Pieces,
) -> str:
    """A TokenLine; a completion that is None is left out."""
    known = [(i, completion) for i, completion in enumerate(completions) if completion]
    new = pieces.new(completion.ids for _, completion in known)
    joined = [(i, *pair) for i, completion in known for pair in pieces.joined(completion.ids)]
    sampled = [np.array(c.logprobs, float) if c else None for c in completions]
    after = map(placed, trained, completions, sampled)
    parts = {
        "n": str(n),
        "ids": listed(map(ids_text, completions)),
        "sampled_logprobs": listed(map(decimals, sampled)),
        "trained_logprobs": listed(map(decimals, after)),
        "mask": listed(mask_text(c) for c in completions),
        "pieces": json_line(new),
        "joined": json_line(joined),
    }
    return "{" + ",".join(f'"{name}":{text}' for name, text in parts.items()) + "}"


def placed(
    trained: np.ndarray | None, completion: Completion | None, sampled: np.ndarray | None
) -> np.ndarray | None:
    """(T,) log-probs, 0 where a token was given; None if they are those of the sampler, as far as
    is stored, or not known."""
    if trained is None or completion is None or sampled is None:
        return None
    own = np.array(completion.mask, bool)
    if own.sum() != len(trained):
        return None
    found = np.zeros(len(own))
    found[own] = trained
    same = np.abs(found - sampled)[own] <= 1 / UNIT
    return None if same.all() else found


def ids_text(completion: Completion | None) -> str:
    return "null" if completion is None else f"[{','.join(map(str, completion.ids))}]"


def mask_text(completion: Completion | None) -> str:
    if completion is None or 0 not in completion.mask:
        return "null"
    return json.dumps(completion.mask, separators=(",", ":"))


def listed(texts: Iterable[str]) -> str:
    return f"[{','.join(texts)}]"


def decimals(values: np.ndarray | None) -> str:
    """Log-probs as a JSON list."""
    if values is None:
        return "null"
    if not (values >= LEAST).all():
        return json.dumps([round(x, 3) if math.isfinite(x) else None for x in values.tolist()])
    places = np.rint(np.minimum(values, 0) * -UNIT).astype(int).tolist()
    return f"[{','.join(map(table().__getitem__, places))}]"


@functools.cache
def table() -> list[str]:
    return ["0.0", *(f"-{i / UNIT}" for i in range(1, 1 + int(-LEAST * UNIT)))]


def tokens_of(line: TokenLine | None, i: int, pieces: Mapping[str, str]) -> dict:
    """What a Kept has of the tokens of completion `i`."""
    ids = line["ids"][i] if line else None
    if line is None or ids is None:
        return {
            **{"ids": [], "pieces": [], "sampled_logprobs": [], "trained_logprobs": None},
            "mask": [],
        }
    texts, mask, trained = [pieces.get(str(x), "") for x in ids], line["mask"][i], None
    for number, place, text in line["joined"]:
        if number == i:
            texts[place] = text
    if line["trained_logprobs"][i] is not None:
        trained = numbers(line["trained_logprobs"][i])
    return {
        "ids": ids,
        "pieces": texts,
        "sampled_logprobs": numbers(line["sampled_logprobs"][i]),
        "trained_logprobs": trained,
        "mask": [1] * len(ids) if mask is None else mask,
    }


def numbers(values: list[float | None] | None) -> list[float]:
    if values is None or None not in values:
        return values or []  # type: ignore[return-value]
    return [math.nan if value is None else value for value in values]
