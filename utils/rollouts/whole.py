"""Work that each rank does a part of, whole on every rank."""

from collections.abc import Callable, Sequence

import mlx.nn as nn
import numpy as np

from ..base.text import Json
from ..data.completion import Completion
from ..data.files import Row
from ..device import ranks
from .sampler import Sampler, Sampling


def dealt(count: int) -> list[int]:
    """Which of so many prompts this rank rolls out; all are taken to cost the same."""
    return ranks.here().places([1.0] * count)


def shared_out(costs: Sequence[float], work: Callable[[list[int]], np.ndarray]) -> np.ndarray:
    """`work` on the places of a list, on each rank some of them, with an item for each place.

    `costs`: what each place is expected to take.
    """
    mine = ranks.here().places(costs)
    return whole(mine, work(mine))[0]


def answers(
    sampler: Sampler,
    policy: nn.Module,
    questions: list[Row],
    keys: list[np.ndarray],
    how: Sampling,
) -> list[Completion]:
    """One completion of each question; raises UserError if there is none."""

    def asked(mine: list[int]) -> np.ndarray:
        own = [questions[i] for i in mine], [keys[i] for i in mine]
        return np.array(sampler(policy, *own, how) if mine or not questions else [], dtype=object)

    return shared_out([len(question["prompt_ids"]) for question in questions], asked).tolist()


def whole(mine: Sequence[int], *arrays: np.ndarray) -> list[np.ndarray]:
    """Arrays of which this rank has the rows `mine`, with those of all, in order.

    Objects in them are completions.
    """
    if ranks.here().size == 1:
        return list(arrays)
    said = ranks.here().all_say([[*mine], [packed(array.tolist()) for array in arrays]])
    return [
        joined([(where, theirs[n]) for where, theirs in said], array)
        for n, array in enumerate(arrays)
    ]


def packed(value: object) -> Json:
    if isinstance(value, list):
        return [packed(part) for part in value]
    return vars(value) if isinstance(value, Completion) else value


def unpacked(value: Json) -> Json:
    if isinstance(value, list):
        return [unpacked(part) for part in value]
    return Completion(**value) if isinstance(value, dict) else value


def joined(parts: list[tuple[list[int], list[Json]]], like: np.ndarray) -> np.ndarray:
    """The rows of all parts, each at its place."""
    count = sum(len(where) for where, _ in parts)
    found = np.empty((count, *like.shape[1:]), like.dtype)
    for where, rows in parts:
        for place, row in zip(where, rows, strict=True):
            found[place] = unpacked(row)
    return found


def own_groups(used: list[int], lengths: np.ndarray) -> list[int]:
    """Of the completions that give a gradient, those that this rank learns from: whole groups.

    `lengths`: (P, G) tokens of each.
    """
    group = lengths.shape[1]
    costs = np.zeros(len(lengths))
    for n in used:
        costs[n // group] += lengths.flat[n]
    mine = {*ranks.here().places(costs.tolist())}
    return [n for n in used if n // group in mine]


def total(values: np.ndarray) -> np.ndarray:
    """The sum over ranks, of numbers that are on the host."""
    if ranks.here().size == 1:
        return values
    return np.sum(ranks.here().all_say(values.tolist()), axis=0)


def of_all(key: str, arrays: Sequence[np.ndarray]) -> np.ndarray:
    """(N,) arrays of all ranks, one after the other.

    A rank whose memory runs out asks once more by the same key, and gets the same, while the others
    go on.
    """
    own = np.concatenate([np.zeros(0, np.float32), *arrays])
    if ranks.here().size > 1:
        own = np.concatenate([*map(np.array, ranks.here().all_say(own.tolist(), key))])
    return own if own.size else np.zeros(1)
