"""The order in which an epoch goes through the training questions."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from ..settings.run_settings import Settings
from .files import Row


class PromptOrder:
    """`order(epoch)`: (N,) indices into the N training questions, in the order to ask them.

    It depends on the settings and the epoch alone, so that a resumed run goes on where it was.
    With weights (of questions or of mixed data sets) an epoch is N draws; otherwise each question
    comes once.
    """

    def __init__(self, config: Settings, rows: list[Row]) -> None:
        self.seed, self.shuffle, self.count = config.seed, config.shuffle, len(rows)
        self.weights = sampling_weights(config, rows)
        self.difficulty: np.ndarray | None = None
        if config.curriculum == "easy_to_hard":
            self.difficulty = np.array([row[config.curriculum_column] for row in rows])
        self.last: tuple[int, np.ndarray] = (-1, np.arange(0))

    def __call__(self, epoch: int) -> np.ndarray:
        if self.last[0] != epoch:
            self.last = epoch, self.order(np.random.default_rng([self.seed, epoch]))
        return self.last[1]

    def draw(self, count: int, position: int, used: set[int]) -> tuple[list[int], int]:
        """The next rows of the shuffled stream, which wraps, that are not `used` in this update,
        and the position after them."""
        rows: list[int] = []
        end = position + 2 * self.count  # nothing is new after that
        while len(rows) < count and position < end:
            epoch, place = divmod(position, self.count)
            row = int(self(epoch)[place])
            position += 1
            if row not in used:
                used.add(row)
                rows.append(row)
        return rows, position

    def order(self, rng: np.random.Generator) -> np.ndarray:
        if self.weights is not None:
            return weighted_order(rng, self.weights)
        order = rng.permutation(self.count) if self.shuffle else np.arange(self.count)
        if self.difficulty is not None:
            order = order[np.argsort(self.difficulty[order], kind="stable")]
        return order


def sampling_weights(config: Settings, rows: list[Row]) -> np.ndarray | None:
    """(N,) relative frequencies of the questions; None where each is to come once an epoch."""
    shares = {part["dataset"]: part["weight"] for part in config.dataset_mix if "weight" in part}
    if config.curriculum != "weights" and not shares:
        return None
    weights = np.ones(len(rows))
    if config.curriculum == "weights":
        weights = np.array([row[config.curriculum_column] for row in rows])
    if shares:
        names = np.array([row["data_source"] for row in rows])
        for name, share in shares.items():
            part = names == name
            weights[part] *= share / max(weights[part].sum(), 1e-300)
    return weights


def weighted_order(rng: np.random.Generator, weights: np.ndarray) -> np.ndarray:
    """N draws of N rows: each row N * weight / sum times, rounded up or down at random.

    Systematic resampling, so that the counts are as near to their expectation as whole numbers can
    be; a row that comes k times comes about every N / k draws, not several times in one update.
    """
    count = len(weights)
    rows = rng.permutation(count)
    edges = np.floor(np.cumsum(count * weights[rows] / weights.sum()) + rng.random())
    edges[-1] = count
    times = np.diff(edges, prepend=0).astype(int)  # (N,) how often each of `rows` comes
    copy = np.arange(count) - np.repeat(np.cumsum(times) - times, times)
    start = np.repeat(rng.random(count), times)
    when = (copy + start) / np.repeat(times, times)  # within the epoch, from 0 to 1
    return np.repeat(rows, times)[np.argsort(when, kind="stable")]


def occurrences(rows: Iterable[int]) -> list[tuple[int, int]]:
    """Each row with how often it came before."""
    rows = [*rows]
    return [(row, rows[:place].count(row)) for place, row in enumerate(rows)]


def subset(rows: list[Row], samples: int) -> list[Row]:
    """The `samples` rows (0: all) that every run is evaluated on, whatever its seed."""
    order = np.random.default_rng(0).permutation(len(rows))
    return [rows[i] for i in order[: samples or len(rows)]]


@dataclass
class Stream:
    """The questions of all epochs one after the other, for one update, which takes none twice."""

    order: PromptOrder
    position: int
    used: set[int] = field(default_factory=set)

    def draw(self, count: int) -> list[int]:
        """The next ones; fewer where nothing is new."""
        rows, self.position = self.order.draw(count, self.position, self.used)
        return rows

    @classmethod
    def after(cls, order: PromptOrder, position: int, rows: Sequence[int]) -> Self:
        """From a position on, as if these had been drawn there."""
        stream = cls(order, position)
        stream.draw(len(rows))
        stream.used.update(rows)
        return stream
