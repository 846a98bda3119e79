"""Draw tokens by their weights, each row with a random key of its own."""

import mlx.core as mx

BLOCK = 128


def draw(weights: mx.array, keys: mx.array) -> mx.array:
    """(B, V) weights, (B, 2) keys -> (B,) entries, each drawn in proportion to its weight.

    Inverse transform sampling: where the running sum of the weights passes a uniform share of
    their total. Blocks of the vocabulary first, then the entries of one block: a running sum over
    150,000 float32 numbers would be too rough, and slower.
    """
    uniform = mx.vmap(lambda key: mx.random.uniform(key=key))(keys)  # (B,)
    padding = -weights.shape[-1] % BLOCK
    weights = mx.pad(weights, [(0, 0), (0, padding)]) if padding else weights
    weights = weights.reshape(len(weights), -1, BLOCK)
    totals = weights.sum(axis=-1)  # (B, blocks)
    block, left = passed(totals, uniform * totals.sum(axis=-1))
    entries = mx.take_along_axis(weights, block[:, None, None], axis=1)[:, 0]  # (B, BLOCK)
    return block * BLOCK + passed(entries, left)[0]


def passed(weights: mx.array, target: mx.array) -> tuple[mx.array, mx.array]:
    """(B, N), (B,) -> where each running sum passes its target, and how far the target is in it."""
    running = mx.cumsum(weights, axis=-1)
    # Rounding must not put the target before the first or behind the last positive weight.
    target = mx.clip(target[:, None], 0, running[:, -1:] * (1 - 2**-23))
    index = (running <= target).sum(axis=-1, keepdims=True)  # (B, 1)
    before = mx.take_along_axis(running - weights, index, axis=-1)
    return index[:, 0], (target - before)[:, 0]


CANDIDATES = 1024  # on the CPU, where finding so many costs a twentieth of sorting 150,000


def threshold(weights: mx.array, top_p: float) -> mx.array:
    """(B, V) weights >= 0 -> (B, 1) the smallest weight in each row's nucleus.

    The nucleus is the smallest set of largest weights that has the share `top_p` of their total.
    """
    if mx.default_device() == mx.cpu and weights.shape[-1] > 4 * CANDIDATES:
        cut, fits = _cut(mx.topk(weights, CANDIDATES), weights.sum(axis=-1, keepdims=True), top_p)
        if fits.all().item():
            return cut
    return _cut(weights, weights.sum(axis=-1, keepdims=True), top_p)[0]


def _cut(weights: mx.array, total: mx.array, top_p: float) -> tuple[mx.array, mx.array]:
    """The cut from a row's largest weights, (B, K), and whether it lies among them."""
    ascending = mx.sort(weights, axis=-1)
    outside = (1 - top_p) * total
    running = mx.cumsum(ascending, axis=-1)
    smaller = total - running[:, -1:]  # of those that are not among the K
    beyond = (running + smaller <= outside).sum(axis=-1, keepdims=True)
    last = mx.minimum(beyond, weights.shape[-1] - 1)  # always keep one
    return mx.take_along_axis(ascending, last, axis=-1), smaller <= outside
