"""What tells attention whose keys and values it gets, by the cache that comes with them."""

from typing import Any

import mlx.core as mx


class GradientCache:
    """Base of the caches that stand in for a prompt where a gradient is taken."""


class DecodeCache:
    """Base of the caches of rollouts, which take one token a row at a time.

    `rows` (rollouts/caches.py) says what the rows see, and has a `position` while a step is traced
    that is compiled for every position; `keys` and `values` are all that is stored.
    """

    rows: Any
    keys: mx.array  # (B, heads, positions, head size)
    values: mx.array
