"""Draws at the ends of the scale, where rounding could reach entries without weight."""

import mlx.core as mx
import numpy as np
import pytest

from utils.rollouts import draw


def weights(rows, entries, seed=0):
    """Half of them are 0, among these the first and the last of each row and of each block."""
    generator = np.random.default_rng(seed)
    made = generator.random((rows, entries)).astype(np.float32)
    made *= generator.random((rows, entries)) < 0.5
    for start in range(0, entries, draw.BLOCK):
        made[:, start : start + 2] = made[:, start + draw.BLOCK - 2 : start + draw.BLOCK] = 0
    made[:, -1] = 0
    return made


@pytest.mark.parametrize("uniform", [0.0, 2**-32, 0.5, 1 - 2**-24, 1.0])
@pytest.mark.parametrize("entries", [2, 127, 128, 129, 700])
def test_only_what_has_weight_is_drawn(monkeypatch, entries, uniform):
    """Also where the product of a uniform number below 1 and the total is rounded to the total."""
    given = weights(400, entries)
    given[:, entries // 2] = 1e-3  # at least this one
    monkeypatch.setattr(mx.random, "uniform", lambda key: 0 * key[0].astype(mx.float32) + uniform)
    keys = mx.zeros((400, 2), mx.uint32)
    drawn = np.array(draw.draw(mx.array(given), keys))
    assert drawn.max() < entries
    assert (given[np.arange(400), drawn] > 0).all()


@pytest.mark.parametrize("beyond", [1.0, 1 + 2**-23, 2.0, float("inf")])
def test_no_target_lies_behind_the_last_weight(beyond):
    given = weights(2000, 128, seed=1)
    total = np.array(mx.cumsum(mx.array(given), axis=-1))[:, -1]
    index, left = draw.passed(mx.array(given), mx.array(total * np.float32(beyond)))
    last = np.array([np.flatnonzero(row)[-1] for row in given])
    assert (np.array(index) == last).all()
    assert (np.array(left) < given[np.arange(2000), last] + 1e-5).all()


def test_no_target_lies_before_the_first_weight():
    given = weights(200, 128, seed=2)
    for target in (0.0, -1.0):
        index, left = draw.passed(mx.array(given), mx.full((200,), target))
        assert np.array(index).tolist() == [np.flatnonzero(row)[0] for row in given]
        assert (np.array(left) == 0).all()
