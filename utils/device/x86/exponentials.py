"""Exponentials on x86-64 processors, where MLX computes them one by one.

Of float32 numbers there, MLX's `exp` takes 9 ns each and its sigmoid 13; its `power`, which asks
the C library, takes 3 and is no less exact; a product takes 0.3. Everywhere else these functions
are MLX's own.
"""

import math
import platform

import mlx.core as mx
import mlx.nn as nn

from ..patch import Way, difference, replace
from ..swiglu import Swiglu
from ..typed import with_gradient

Pair = tuple[mx.array, mx.array]
X86 = platform.machine() in ("x86_64", "AMD64")


def are_slow() -> bool:
    """Whether this is such a processor, and computing is done on it."""
    return X86 and mx.default_device() == mx.cpu


def exp(x: mx.array) -> mx.array:
    """e to the power of x."""
    return mx.power(math.e, x) if x.dtype == mx.float32 and are_slow() else mx.exp(x)


def logsumexp(x: mx.array) -> mx.array:
    """(..., N) finite numbers -> (...,) the logarithm of the sum of their exponentials."""
    if x.dtype != mx.float32 or not are_slow():
        return mx.logsumexp(x, axis=-1)
    best = mx.stop_gradient(x.max(axis=-1, keepdims=True))
    return mx.log(exp(x - best).sum(axis=-1)) + best[..., 0]


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) * x of float32 arrays."""
    return _swiglu(gate, x)[0]


def _product_and_share(gate: mx.array, x: mx.array) -> Pair:
    share = 1 / (1 + mx.power(1 / math.e, gate))
    return gate * x * share, share


def _swiglu_gradient(primals: Pair, cotangents: Pair, outputs: Pair) -> Pair:
    gate, x = primals
    scaled = cotangents[0] * outputs[1]
    return scaled * x * (1 + gate * (1 - outputs[1])), scaled * gate


_swiglu = with_gradient(_product_and_share, _swiglu_gradient)


def switch_on(model: nn.Module) -> None:
    """Let the model's blocks use `swiglu` where exponentials are slow."""
    from mlx_lm.models import activations

    replace(model, "swiglu", activations.swiglu, choosing)


def problem() -> str:
    x = mx.random.normal((4, 256), key=mx.random.key(0)) * 8
    pairs: tuple[Pair, ...] = (
        (mx.exp(x), exp(x)),
        (mx.logsumexp(x, axis=-1), logsumexp(x)),
        (nn.silu(x) * x, swiglu(x, x)),
    )
    return next(filter(None, (difference(a, b, 1e-5) for a, b in pairs)), "")


WAYS = [Way("exponentials by power", are_slow, problem, switch_on)]


def choosing(plain: Swiglu) -> Swiglu:
    """mlx-lm's function, but for float32 arrays."""

    def swiglu_of(gate: mx.array, x: mx.array) -> mx.array:
        both = gate.dtype == x.dtype == mx.float32
        return swiglu(gate, x) if both and are_slow() else plain(gate, x)

    return swiglu_of
