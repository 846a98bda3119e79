"""What tells attention whose keys and values it gets, by the cache that comes with them."""

from typing import NamedTuple, Protocol

import mlx.core as mx


class Rotation(NamedTuple):
    """Arguments of `mx.fast.rope` but for the offset."""

    dims: int
    traditional: bool
    frequencies: tuple[float, ...]  # of each pair of numbers, in radians a position


class Rotated(NamedTuple):
    """What a rotary embedding was applied to, and how."""

    x: mx.array
    rotation: Rotation


class Rows(Protocol):
    """What the rows of a batch see: `rollouts.caches.Rows`, with its meanings."""

    padding: mx.array
    all_seen: mx.array
    position: mx.array | None
    offset_at_position: mx.array | None
    rotated: dict[int, Rotated]


class GradientCache:
    """Base of the caches that stand in for a prompt where a gradient is taken."""


class DecodeCache:
    """Base of the caches of rollouts, which take one token a row at a time.

    `rows` has a `position` while a step is traced that is compiled for every position; `keys` and
    `values` are all that is stored.
    """

    rows: Rows
    keys: mx.array  # (B, heads, positions, head size)
    values: mx.array
