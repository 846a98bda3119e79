"""Products with quantized weights on CUDA, all rows of a batch as one matrix.

MLX's CUDA kernels (mlx/backend/cuda/quantized/qmm) take each item of a batch as a product of its
own, so a decode step of (B, 1, H) unpacks all weights B times. One H200, 1.5B, a step of 64 rows:
42.7 ms, and 11.7 ms as one matrix.
"""

from collections.abc import Callable
from functools import wraps

import mlx.core as mx
import mlx.nn as nn

from .. import runtime
from ..patch import Way, difference

Apply = Callable[..., mx.array]
"""A method of a layer, as its class has it: (layer, x) -> y."""


def in_rows(plain: Apply) -> Apply:
    """plain(layer, x) of (..., H), computed on (N, H)."""

    @wraps(plain)
    def call(layer: nn.Module, x: mx.array) -> mx.array:
        y = plain(layer, x.reshape(-1, x.shape[-1]))
        return y.reshape(*x.shape[:-1], y.shape[-1])

    return call


def applies() -> bool:
    """MLX's Metal and CPU kernels see by themselves that the weights are the same for all."""
    return runtime.platform_name() == "cuda"


def switch_on(_: nn.Module) -> None:
    """Let the quantized layers of this process, of every model and copy, go by rows."""
    if hasattr(nn.QuantizedLinear.__call__, "__wrapped__"):
        return
    patched: list[tuple[type[nn.Module], str]] = [
        (nn.QuantizedLinear, "__call__"),
        (nn.QuantizedEmbedding, "as_linear"),
    ]
    for layer, name in patched:
        setattr(layer, name, in_rows(getattr(layer, name)))


def problem() -> str:
    plain = nn.QuantizedLinear.__call__
    plain = getattr(plain, "__wrapped__", plain)
    layer = nn.QuantizedLinear(64, 64)
    x = mx.random.normal((3, 1, 64), key=mx.random.key(0))
    return difference(plain(layer, x), in_rows(plain)(layer, x), 1e-2)


IN_ROWS = Way("quantized products in rows", applies, problem, switch_on)
