"""What a page holds of a run's completions where time is short: updates and evaluations from all
over the run, the last and the first ones before others.

The store holds what was written at once, an update or an evaluation, in a piece that can be read by
itself, and each begins by saying what it is: so all are counted, and those that are wanted read.
"""

import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from ..base.text import Json
from . import completions, spans
from .completions import Group
from .page_source import SPREAD, Source, check, set_of

HEAD = re.compile(r'\{"n": ?(\d+), ?"update": ?(\d+), ?"kind": ?"(\w+)", ?"split": ?(null|"\w*")')
LOOKED_AT = 400  # bytes in which it stands, packed

T = TypeVar("T")
IsOver = Callable[[float], bool]
Numbered = list[tuple[int, Group]]
"""Groups with their numbers."""


@dataclass
class Part:
    """A piece of a file."""

    path: Path
    start: int
    end: int
    """Where the next one begins."""
    n: int
    """Of its first group."""
    update: int
    set: str


@dataclass
class Sample:
    """What was read, and how much there is."""

    groups: dict[Path, Numbered] = field(default_factory=dict)
    """In the order in which they were written."""
    whole: bool = True
    completions: int = 0
    updates: tuple[int, int] = (0, 0)
    """Of training: held, and all."""
    evaluations: tuple[int, int] = (0, 0)


def taken(source: Source, is_over: IsOver, for_looking: float, for_reading: float) -> Sample:
    """As much as fits into these shares of the time."""
    contents: dict[Path, bytes] = {}
    paths = source.spans()
    for path in dict.fromkeys([*paths[-1:], *paths[:1], *spread(paths)]):
        if contents and is_over(for_looking):
            break
        contents[path] = spans.contents(path, source.note_damage)
    parts = [part for path in sorted(contents) for part in parts_of(source, path, contents[path])]
    read: dict[int, Numbered] = {}
    for i in in_order(parts):
        groups, all_of_it = read_part(
            source, parts[i], contents[parts[i].path], is_over, for_reading
        )
        read[i] = groups
        if not all_of_it:
            break
    sample = Sample(whole=len(contents) == len(paths))
    for i in sorted(read):
        sample.groups.setdefault(parts[i].path, []).extend(read[i])
    count(sample, parts, read, int(source.settings.get("num_generations") or 1))
    return sample


def parts_of(source: Source, path: Path, data: bytes) -> Iterator[Part]:
    starts = [*spans.starts(data)]
    if data and starts[:1] != [0]:
        source.note_damage(path, "it does not begin as a file of a store")
    for start, end in zip(starts, [*starts[1:], len(data)], strict=True):
        if found := HEAD.match(beginning(data, start)):
            n, update, kind, split = found.groups()
            name = set_of(kind, None if split == "null" else split.strip('"'))
            yield Part(path, start, end, int(n), int(update), name)
        elif end < len(data) or not spans.is_torn(data, start):
            source.note_damage(path, f"the piece at byte {start:,} cannot be read")


def beginning(data: bytes, start: int) -> str:
    try:
        text = zlib.decompressobj(31).decompress(data[start : start + LOOKED_AT], LOOKED_AT)
    except zlib.error:
        return ""
    return text.decode(errors="replace")


def in_order(parts: Sequence[Part]) -> list[int]:
    """Numbers of parts: the last and the first of each set, evaluations before training, and then
    others from all over the run."""
    ends: list[int] = []
    for name in sorted({part.set for part in parts}):  # "eval ..." comes before "train"
        own = [i for i, part in enumerate(parts) if part.set == name]
        ends += [own[-1], own[0]]
    return [*dict.fromkeys([*ends, *spread(range(len(parts)))])]


def spread(things: Sequence[T]) -> list[T]:
    """In an order in which the first ones are from all over, however many they are."""
    return [things[i] for i in sorted(range(len(things)), key=lambda i: i * SPREAD % 1)]


def read_part(
    source: Source, part: Part, data: bytes, is_over: IsOver, share: float
) -> tuple[Numbered, bool]:
    """Its groups, and whether there was time for all of them."""
    groups: Numbered = []
    piece = spans.unpacked(data, part.start)
    if piece is None:
        if part.end < len(data) or not spans.is_torn(data, part.start):
            source.note_damage(part.path, f"the piece at byte {part.start:,} cannot be read")
        return groups, True
    for line in piece.lines:
        if is_over(share):
            return groups, False
        group: Json = completions.as_line(line, Group.__required_keys__)
        try:
            number = group.pop("n")
            check(group)
            groups.append((number, group))
        except (LookupError, TypeError, AttributeError) as error:
            source.note_damage(part.path, f"it is not as this version writes it ({error!r})")
    return groups, True


def count(sample: Sample, parts: Sequence[Part], read: dict[int, Numbered], size: int) -> None:
    """How much there is, and how much of it was read; `size`: of a group of training."""
    sample.whole = sample.whole and len(read) == len(parts)
    for i, part in enumerate(parts):
        following = parts[i + 1].n if i + 1 < len(parts) else part.n + len(read.get(i, []))
        each = size if part.set == "train" else 1
        sample.completions += max(following - part.n, 0) * each
    sample.updates = held(parts, read, lambda name: name == "train")
    sample.evaluations = held(parts, read, lambda name: name != "train")


def held(
    parts: Sequence[Part], read: dict[int, Numbered], wanted: Callable[[str], bool]
) -> tuple[int, int]:
    every = {(part.set, part.update) for part in parts if wanted(part.set)}
    some = {(parts[i].set, parts[i].update) for i, own in read.items() if own}
    return len(some & every), len(every)
