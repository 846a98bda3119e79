"""Keys and values of rows that wait: when they come back, only what is new is read."""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..gradient.shared_prompts import CompletionCache
from .caches import Cache, RolloutCache, Rows

Layers = list[tuple[mx.array, mx.array]]
"""Keys and values of each layer, (B, heads, T, head size)."""


@dataclass
class Saved:
    """Rows that left a batch together."""

    layers: Layers
    begins: np.ndarray  # (B,) position of the first token
    lengths: np.ndarray  # (B,) tokens

    def at_the_start(self, rows: list[int], width: int) -> Layers:
        """Some of the rows, moved to position 0."""
        index = self.begins[rows][:, None] + np.arange(width)
        last = self.layers[0][0].shape[2] - 1
        return taken(self.layers, mx.array(rows), np.minimum(index, last))


def taken(layers: Layers, rows: mx.array, index: np.ndarray) -> Layers:
    """(B, T) positions of some rows of each layer."""
    where = mx.array(index)[:, None, :, None]
    return [
        (mx.take_along_axis(k[rows], where, axis=2), mx.take_along_axis(v[rows], where, axis=2))
        for k, v in layers
    ]


class Reading(CompletionCache):
    """A block's cache while rows go on from what was saved of them; keeps what is new."""

    new: tuple[mx.array, mx.array]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.new = keys, values
        return super().update_and_fetch(keys, values)


class Waiting:
    """The rows of a batch that may come back, by numbers of their own.

    The reader says who leaves (`leaving`: place in the batch, number), how much of each one's text
    counts (`lengths`: what was sampled beyond does not), and which prompt is whose (`owners`).
    Memory is planned for so many `places`, whether rows are in the batch or wait: where there are
    more, those beyond are read again.
    """

    def __init__(self, places: int) -> None:
        self.places = places
        self.leaving: list[tuple[int, int]] = []
        self.lengths: dict[int, int] = {}
        self.owners: dict[int, int] = {}
        self.saved: dict[int, tuple[Saved, int]] = {}

    def forget(self, number: int) -> None:
        """It does not come back."""
        self.lengths.pop(number, None)
        self.saved.pop(number, None)

    def save(self, cache: Cache, staying: int, rows: list[int]) -> None:
        """Before rows leave the batch, in which some stay, and to which those come back that go on
        from the prompts `rows`."""
        leaving = self.worth_keeping(staying, {self.owners.get(row, -1) for row in rows})
        self.leaving = []
        if not leaving or not isinstance(cache[0], RolloutCache) or not cache[0].keys.size:
            return
        places, end = [i for i, _ in leaving], cache[0].end
        begins = np.array([cache[0].rows.begins[i] for i in places])
        most = [self.lengths[number] for _, number in leaving]
        index = mx.array(places)
        layers = [(c.keys[:, :, :end][index], c.values[:, :, :end][index]) for c in cache]
        mx.async_eval(layers)  # or they would hold the whole batch's
        own = Saved(layers, begins, np.minimum(end - begins, most))
        self.saved |= {number: (own, row) for row, (_, number) in enumerate(leaving)}

    def worth_keeping(self, staying: int, coming: set[int]) -> list[tuple[int, int]]:
        """Of those that leave, the ones that come back at once, and as many more as have room."""
        room = self.places - staying - len(coming) - len(self.saved.keys() - coming)
        waiting = self.lengths.keys() - coming
        later = [pair for pair in self.leaving if pair[1] in waiting]
        return [pair for pair in self.leaving if pair[1] in coming] + later[: max(0, room)]

    def read(
        self, model: nn.Module, prompts: list[list[int]], rows: list[int], max_tokens: int
    ) -> Cache | None:
        """The cache of `rows` (indices into `prompts`) as `prefill` has it; None where something
        is not known of one."""
        numbers = [self.owners.get(row, -1) for row in rows]
        if not all(number in self.saved for number in numbers):
            return None
        places = [self.saved.pop(number) for number in numbers]
        lengths = np.array([own.lengths[row] for own, row in places])
        state = together(places, int(lengths.max()))
        news = [prompts[row][n:-1] for row, n in zip(rows, lengths.tolist(), strict=True)]
        count = max(1, max(map(len, news)))
        tokens = mx.array([new + [0] * (count - len(new)) for new in news])
        masks: list[mx.array] = []
        reading = [Reading(layer, mx.array(lengths), masks) for layer in state]
        model(tokens, cache=reading)
        totals = lengths + np.array([len(new) for new in news])
        return as_rollout(state, reading, lengths, totals, max_tokens)


def together(places: list[tuple[Saved, int]], width: int) -> Layers:
    """Saved rows in this order, each from position 0 on."""
    groups: dict[int, list[int]] = {}
    for n, (own, _) in enumerate(places):
        groups.setdefault(id(own), []).append(n)
    parts = [
        places[members[0]][0].at_the_start([places[n][1] for n in members], width)
        for members in groups.values()
    ]
    order = mx.array(np.argsort([n for ns in groups.values() for n in ns]))
    return [
        (mx.concatenate([k for k, _ in layer])[order], mx.concatenate([v for _, v in layer])[order])
        for layer in zip(*parts, strict=True)
    ]


def as_rollout(
    state: Layers, reading: list[Reading], lengths: np.ndarray, totals: np.ndarray, most: int
) -> Cache:
    """What was saved and what was read, each row's end at the end."""
    rows = Rows(totals.tolist(), most)
    token = np.arange(rows.width) - (rows.width - totals)[:, None]  # (B, width)
    width = state[0][0].shape[2]
    index = np.where(token < lengths[:, None], token, width + token - lengths[:, None])
    caches = [RolloutCache(rows) for _ in state]
    whole = [
        (mx.concatenate([k, layer.new[0]], axis=2), mx.concatenate([v, layer.new[1]], axis=2))
        for (k, v), layer in zip(state, reading, strict=True)
    ]
    aligned = taken(whole, mx.arange(len(totals)), np.maximum(index, 0))
    for cache, (keys, values) in zip(caches, aligned, strict=True):
        cache.keys, cache.values = keys, values
    return caches
