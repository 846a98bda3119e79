"""Types that MLX's own annotations leave open."""

from collections.abc import Callable, Mapping, Sequence
from typing import ParamSpec, TypeVar, cast

import mlx.core as mx

P = ParamSpec("P")
R = TypeVar("R")

Tree = mx.array | Sequence["Tree"] | Mapping[str, "Tree"]
"""Arrays in lists, tuples and dicts, such as the parameters of a model."""


def with_gradient(function: Callable[P, R], gradient: Callable[..., Tree]) -> Callable[P, R]:
    """The function, whose backward pass is gradient(primals, cotangents, outputs)."""
    made = mx.custom_function(function)
    made.vjp(gradient)
    return cast(Callable[P, R], made)
