"""Rounding to bfloat16 at random."""

import mlx.core as mx

from utils.device import rounding


def test_the_noise_decides_between_the_two_neighbours():
    low, high = 1.0, 1.0078125
    third = mx.array([low + (high - low) / 4] * 4)
    noise = mx.array([0, 3 * 2**14 - 1, 3 * 2**14, 2**16 - 1], mx.uint32)
    assert rounding.round_at_random(third, noise).tolist() == [low, low, high, high]
    assert rounding.round_at_random(third, noise + 2**20).tolist() == [low, low, high, high]
    exact = mx.array([1.5, -2.0, 0.0, high])
    assert rounding.round_at_random(exact, noise).tolist() == exact.tolist()


def test_words_are_as_many_as_asked_for_and_depend_on_the_key():
    for count in (1, 2, 7):
        words = rounding.random_words(count, mx.random.key(3))
        assert (words.shape, words.dtype) == ((count,), mx.uint32)
    assert len({*rounding.random_words(999, mx.random.key(3)).tolist()}) == 999
    assert words.tolist() != rounding.random_words(7, mx.random.key(4)).tolist()
