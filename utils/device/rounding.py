"""Rounding to bfloat16 that is right on average."""

import mlx.core as mx


def round_at_random(values: mx.array, noise: mx.array) -> mx.array:
    """Float32 to one of its two bfloat16 neighbours, with odds such that the mean is the value.

    noise: uint32, of which the low 16 bits are used.
    """
    bits = mx.view(values, mx.uint32) + (noise & 0xFFFF)
    return mx.view((bits >> 16).astype(mx.uint16), mx.bfloat16)


def random_words(count: int, key: mx.array) -> mx.array:
    """(count,) uniform uint32: what new keys are made of (MLX has no other call for raw bits)."""
    return mx.random.split(key, -(-count // 2)).reshape(-1)[:count]
