"""The cut of top_p sampling, without sorting the whole vocabulary where that pays."""

from typing import Any

CANDIDATES = 1024  # on the CPU, where finding so many costs a twentieth of sorting 150,000


def threshold(weights: Any, top_p: float) -> Any:
    """(B, V) weights >= 0 -> (B, 1) the smallest weight in each row's nucleus.

    The nucleus is the smallest set of largest weights that has the share `top_p` of their total.
    """
    import mlx.core as mx

    if mx.default_device() == mx.cpu and weights.shape[-1] > 4 * CANDIDATES:
        cut, fits = _cut(mx.topk(weights, CANDIDATES), weights.sum(axis=-1, keepdims=True), top_p)
        if fits.all().item():
            return cut
    return _cut(weights, weights.sum(axis=-1, keepdims=True), top_p)[0]


def _cut(weights: Any, total: Any, top_p: float) -> tuple[Any, Any]:
    """The cut from a row's largest weights, (B, K), and whether it lies among them."""
    import mlx.core as mx

    ascending = mx.sort(weights, axis=-1)
    outside = (1 - top_p) * total
    running = mx.cumsum(ascending, axis=-1)
    smaller = total - running[:, -1:]  # of those that are not among the K
    beyond = (running + smaller <= outside).sum(axis=-1, keepdims=True)
    last = mx.minimum(beyond, weights.shape[-1] - 1)  # always keep one
    return mx.take_along_axis(ascending, last, axis=-1), smaller <= outside
