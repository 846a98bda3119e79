"""Functions of ours in place of those that mlx-lm's models look up in their own modules."""

import sys
from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn


class Way(NamedTuple):
    """One replacement, of functions of MLX or mlx-lm, for the whole process."""

    name: str
    applies: Callable[[], bool]
    """Whether this machine is one for it; MLX's default device may change in between."""
    problem: Callable[[], str]
    """Why it does not compute what the plain way does; empty if it does."""
    switch_on: Callable[[nn.Module], None]
    """For the modules that the model is made of; twice does no harm."""


def difference(plain: mx.array, ours: mx.array, tolerance: float) -> str:
    """In words, how far apart two results are, relative to the larger; empty within tolerance."""
    plain, ours = plain.astype(mx.float32), ours.astype(mx.float32)
    apart = float(mx.abs(plain - ours).max() / mx.maximum(mx.abs(plain).max(), 1e-30))
    return "" if apart <= tolerance else f"it differs by {apart:.2g}"


def replace(
    model: nn.Module, name: str, plain: Callable, ours: Callable[[Callable], Callable]
) -> None:
    """Where a module of the model's layers has `plain` as `name`, let it have ours(plain).

    For the whole process. What has been replaced is left as it is.
    """
    for place in {type(module).__module__ for module in model.modules()}:
        module = sys.modules[place]
        if getattr(module, name, None) is plain:
            setattr(module, name, ours(plain))
