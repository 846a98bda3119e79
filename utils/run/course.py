"""The course of a run in at most 64 spans of updates: for its curve, and for its first and last
figures. It is JSON and part of a checkpoint, so that a resumed run has the whole of it."""

from collections.abc import Mapping, Sequence
from typing import Any

from .state import Record
from .warnings_of_learning import is_known

MOST = 64
TENTH = 10
Course = dict[str, Any]
"""`span`: updates of each; `sums`: by name, the sum and count of each span."""


def extended(course: Course, records: Sequence[Record]) -> Course:
    """With some more updates; the old one stays as it is."""
    span, sums = course.get("span", 1), {**course.get("sums", {})}
    for record in records:
        while (record["update"] - 1) // span >= MOST:
            span, sums = 2 * span, {name: in_pairs(pairs) for name, pairs in sums.items()}
        place = (record["update"] - 1) // span
        for name, value in figures(record).items():
            pairs = sums.get(name, [])
            pairs = pairs + [[0.0, 0]] * (place + 1 - len(pairs))  # a new list
            total, count = pairs[place]
            sums[name] = [*pairs[:place], [total + value, count + 1], *pairs[place + 1 :]]
    return {"span": span, "sums": sums}


def figures(record: Record) -> dict[str, float]:
    """Of the record, those that have a course."""
    own = ("reward_mean", "completion_length", "truncation_rate")
    return {
        name: float(value)
        for name, value in record.items()
        if (name in own or name.startswith("reward/")) and is_known(value)
    }


def in_pairs(pairs: list[list[float]]) -> list[list[float]]:
    """Two spans as one."""
    even = [*pairs, [0.0, 0]] if len(pairs) % 2 else pairs
    return [[a[0] + b[0], a[1] + b[1]] for a, b in zip(even[::2], even[1::2], strict=True)]


def curve(course: Course, name: str) -> list[float]:
    """The mean of each span that has one."""
    return [total / count for total, count in course.get("sums", {}).get(name, []) if count]


def ends(course: Course, update: int) -> tuple[int, int]:
    """Up to which update the first tenth goes, and from which on the last; at least one each."""
    span = course.get("span", 1)
    spans = -(-update // span)
    tenth = max(1, spans // TENTH)
    return min(update, tenth * span), (spans - tenth) * span + 1


def at_the_ends(course: Course, update: int) -> Mapping[str, tuple[float | None, float | None]]:
    """The means of every figure within the `ends`; None where it has no value there."""
    span, (to, since) = course.get("span", 1), ends(course, update)

    def mean(pairs: list[list[float]]) -> float | None:
        count = sum(pair[1] for pair in pairs)
        return sum(pair[0] for pair in pairs) / count if count else None

    first, last = -(-to // span), (since - 1) // span
    sums = course.get("sums", {})
    return {name: (mean(pairs[:first]), mean(pairs[last:])) for name, pairs in sums.items()}
