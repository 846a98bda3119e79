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
