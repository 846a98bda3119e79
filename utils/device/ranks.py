"""The processes that train together: alone by default, or several that `mlx.launch` started.

A rank rolls out, scores and learns from whole groups of completions; every estimator sees all of
them, and gradients are summed, so that any number of ranks gives the same update. `here()` is this
process: of one alone, all is its own, and there is nothing to add.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from ..base.text import Json
from .typed import Tree

Costs = Sequence[float]


class Alone:
    """One process, which does everything."""

    rank, size = 0, 1

    def places(self, costs: Costs) -> list[int]:
        """Which of so many pieces of work this rank does; `costs` are what each is expected to."""
        return list(range(len(costs)))

    def all_say(self, value: Json, key: str = "") -> list[Json]:
        """What every rank says here, by rank: JSON, whose floats keep all their digits. Asked again
        by the same key, this rank gets the same and the others hear nothing."""
        return [value]

    def added(self, tree: Tree) -> Tree:
        """The sum over ranks of arrays, in float32."""
        return tree

    def of_first(self, arrays: dict) -> dict:
        """Rank 0's arrays by name, on every rank."""
        return arrays

    def check(self) -> None:
        """Raise what ends the run, if another rank did."""

    def listen(self, asked: Callable[[], int], obey: Callable[[int], NoReturn]) -> None:
        """`asked`: which signal wants this rank to end (0: none); `obey` raises for one."""

    def tell(self, error: BaseException | int) -> None:
        """All ranks are to end: this one failed, or got a signal (its number)."""

    @contextmanager
    def by_itself(self) -> Iterator[None]:
        """What this rank does in the block, no other does a part of."""
        yield


ALONE = Alone()
team: list[Alone] = [ALONE]  # the newest is in force


def here() -> Alone:
    return team[-1]
