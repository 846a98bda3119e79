"""How an update is cut into micro-batches: which rows go together, and how far they are padded.

Any cut has the same gradient, since the weights of the loss are fixed before it. This one is the
cheapest by the tokens that are computed, padding included.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .micro_batch import Layout, SharedPrompts


@dataclass(frozen=True)
class Shapes:
    """Sizes that arrays are padded to, and what one more micro-batch costs."""

    bucketed: bool = False
    """Pad to few sizes: a compiled function is traced once per shape. Otherwise to none."""
    overhead: int = 32
    """Cost of a micro-batch beside its tokens, in tokens."""

    def length(self, tokens: int) -> int:
        """A row's tokens: the next multiple of 32."""
        return -(-tokens // 32) * 32 if self.bucketed else tokens

    def rows(self, count: int) -> int:
        """1, 2, 4, and multiples of 8."""
        if not self.bucketed:
            return count
        return -(-count // 8) * 8 if count > 4 else 1 << max(count - 1, 0).bit_length()

    def scored(self, count: int, room: int) -> int:
        """Positions that the head is applied to, of `room`: quarters of it."""
        quarter = -(-room // 4) if self.bucketed else 1
        return min(room, -(-count // quarter) * quarter)


Pair = tuple[list[int], list[int]]
"""Token ids of a prompt and of its completion."""


@dataclass(frozen=True)
class Row:
    """A prompt and its completion, in tokens. Rows of one group have the same prompt."""

    index: int
    group: int
    prompt: int
    completion: int


@dataclass(frozen=True)
class Pack:
    """A micro-batch: the indices of its rows, by group where groups share their prompt."""

    groups: list[list[int]]
    shared: bool = False

    @property
    def rows(self) -> list[int]:
        return [index for group in self.groups for index in group]


def cheapest_cut(
    count: int, tokens: Callable[[int, int], int], budget: int, overhead: int
) -> list[range]:
    """Cut 0..count-1 into runs with the fewest tokens in all, and each within budget or of one.

    `tokens(start, stop)` must grow with the run. Between equal cuts the more even one is taken.
    """
    best, starts = [0.0], [0]
    for stop in range(1, count + 1):
        options = []
        for start in range(stop - 1, -1, -1):
            size = tokens(start, stop)
            if size > budget and start < stop - 1:
                break
            uneven = 1e-3 * size * min(1.0, size / budget)
            options.append((best[start] + size + uneven + overhead, start))
        least, first = min(options)
        best.append(least)
        starts.append(first)
    runs: list[range] = []
    while count:
        runs.insert(0, range(starts[count], count))
        count = starts[count]
    return runs


def pack_rows(rows: Sequence[Row], budget: int, shapes: Shapes) -> list[Pack]:
    """Micro-batches of rows of about the same length, each with its prompt."""
    rows = sorted(rows, key=lambda row: (row.prompt + row.completion, row.index))

    def tokens(start: int, stop: int) -> int:
        last = rows[stop - 1]  # the longest
        return shapes.rows(stop - start) * (1 + shapes.length(last.prompt + last.completion - 1))

    runs = cheapest_cut(len(rows), tokens, budget, shapes.overhead)
    return [Pack([[rows[i].index for i in run]]) for run in runs]


def pack_groups(rows: Sequence[Row], budget: int, shapes: Shapes) -> list[Pack]:
    """Micro-batches of groups, each prompt once. A group is cut, and its prompt repeated, where it
    exceeds the budget or its completions are so uneven that this is cheaper."""
    by_group: dict[int, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row.completion, row.index)):
        by_group.setdefault(row.group, []).append(row)
    pieces: list[list[Row]] = []
    for members in by_group.values():

        def cut_tokens(start: int, stop: int, members: list[Row] = members) -> int:
            return shared_tokens([members[start:stop]], shapes)

        runs = cheapest_cut(len(members), cut_tokens, budget, shapes.overhead)
        pieces += [members[run.start : run.stop] for run in runs]
    pieces.sort(key=lambda piece: (shapes.rows(len(piece)), piece[-1].completion, piece[0].prompt))

    def joined_tokens(start: int, stop: int) -> int:
        return shared_tokens(pieces[start:stop], shapes)

    runs = cheapest_cut(len(pieces), joined_tokens, budget, shapes.overhead)
    return [Pack([[row.index for row in pieces[i]] for i in run], shared=True) for run in runs]


def shared_tokens(pieces: Sequence[Sequence[Row]], shapes: Shapes) -> int:
    """Tokens of one micro-batch of these pieces: their prompts once, and their padded rows."""
    prompt = shapes.length(max(piece[0].prompt for piece in pieces) - 1)
    row = shapes.length(max(r.completion for piece in pieces for r in piece))
    each = shapes.rows(max(map(len, pieces)))
    return len(pieces) * (prompt + each * row)


def layout_rows(mask: np.ndarray, total: int, shapes: Shapes) -> Layout:
    """Which of the (B, total - 1) predictions are scored, and where the (B, W) window has them."""
    count, width = mask.shape
    rows, columns = np.nonzero(mask)
    flat = rows * (total - 1) + columns + total - 1 - width
    return Layout(*picked(flat, mask, count * (total - 1), shapes))


def layout_groups(
    groups: Sequence[Sequence[Pair]],
    masks: Iterable[Sequence[int]],
    mask: np.ndarray,
    shapes: Shapes,
) -> Layout:
    """The arrays of shared prompts: (P, S) without their last tokens, and (P * each, R + 1) rows
    that start with it.

    `masks` has the masks of the groups' completions in order. So have the rows of `mask` (B, W),
    and empty ones that fill it up.
    """
    prompts = [group[0][0] for group in groups]
    longest = max(len(ids) for group in groups for _, ids in group)
    each, room = shapes.rows(max(map(len, groups))), shapes.length(longest)
    read = np.zeros((len(groups), max(1, shapes.length(max(map(len, prompts)) - 1))), np.int32)
    rows = np.zeros((len(groups) * each, room + 1), np.int32)
    flat: list[np.ndarray] = []
    left = iter(masks)
    for g, group in enumerate(groups):
        read[g, : len(prompts[g]) - 1] = prompts[g][:-1]
        for n, (prompt, ids) in enumerate(group, g * each):
            rows[n, : 1 + len(ids)] = [prompt[-1], *ids]
            flat.append(n * room + np.flatnonzero(next(left)))
    scored, window = picked(np.concatenate(flat), mask, rows.shape[0] * room, shapes)
    lengths = np.array([len(prompt) - 1 for prompt in prompts], np.int32)
    shared = SharedPrompts(mx.array(read), mx.array(lengths), mx.array(rows))
    return Layout(scored, window, shared)


def picked(
    flat: np.ndarray, mask: np.ndarray, room: int, shapes: Shapes
) -> tuple[mx.array, mx.array]:
    """(N,) predictions, of `room`, that the head is applied to, and (B, W) which of them belongs
    where the mask is 1; the first, elsewhere."""
    scored = np.zeros(shapes.scored(len(flat), room), np.int32)
    scored[: len(flat)] = flat
    window = np.zeros(mask.shape, np.int32)
    window[np.nonzero(mask)] = np.arange(len(flat))
    return mx.array(scored), mx.array(window)
