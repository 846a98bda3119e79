"""Functions that are faster than MLX's own on x86-64: the same values and gradients."""

import math
import sys

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx_lm.models import activations

from utils.device import fast
from utils.device.x86 import exponentials
from utils.rollouts import merged_layers

EXTREMES = [-math.inf, -200.0, -88.5, -1e-6, 0.0, 3.5, 88.5, 200.0]


@pytest.fixture(params=[True, False], ids=["slow", "fast"])
def are_slow(request, monkeypatch):
    """Both ways, whatever processor this is."""
    monkeypatch.setattr(exponentials, "are_slow", lambda: request.param)
    return request.param


def numbers(*shape):
    return mx.array(np.random.default_rng(1).normal(0, 6, shape).astype(np.float32))


def test_exp(are_slow):
    x = numbers(40, 50)
    assert np.array(exponentials.exp(x)) == pytest.approx(np.exp(np.array(x, float)), rel=5e-6)
    ends = exponentials.exp(mx.array(EXTREMES))
    assert (ends[0].item(), ends[1].item(), ends[-1].item()) == (0, 0, math.inf)
    assert math.isnan(exponentials.exp(mx.array([math.nan])).item())
    half = mx.array([1.5, -3.0], mx.bfloat16)
    assert mx.array_equal(exponentials.exp(half), mx.exp(half)), "e itself has no such bits"


def test_logsumexp(are_slow):
    x = numbers(3, 4, 50)
    cotangent = [numbers(3, 4)]

    def plain(x):
        return mx.logsumexp(x, axis=-1)

    for ours, mlxs in zip(
        *(mx.vjp(f, [x], cotangent) for f in (exponentials.logsumexp, plain)), strict=True
    ):
        assert np.array(ours[0]) == pytest.approx(np.array(mlxs[0]), rel=1e-4, abs=1e-5)
    assert exponentials.logsumexp(mx.array([1e4, 1e4])).item() == pytest.approx(1e4 + math.log(2))


def test_swiglu(are_slow):
    gate, x = numbers(6, 70), numbers(70, 6).T
    gate[0, : len(EXTREMES) - 1] = mx.array(EXTREMES[1:])

    def plain(gate, x):
        return nn.silu(gate) * x

    for ours, mlxs in zip(
        *(mx.vjp(f, [gate, x], [x]) for f in (exponentials.swiglu, plain)), strict=True
    ):
        for a, b in zip(ours, mlxs, strict=True):
            assert np.isfinite(np.array(a)).all()
            assert np.array(a) == pytest.approx(np.array(b), rel=1e-4, abs=1e-4)


def test_a_models_blocks_take_it_where_that_pays(model_dir, are_slow, monkeypatch):
    model, _ = mlx_lm.load(str(model_dir))
    module = sys.modules[type(model).__module__]
    monkeypatch.setattr(module, "swiglu", activations.swiglu)
    fast.switch_on(model)  # compares it with the plain way, once
    monkeypatch.setattr(module, "swiglu", activations.swiglu)
    tokens = mx.array([[5, 6, 7, 8]])
    expected = model(tokens)
    used = []
    monkeypatch.setattr(
        exponentials, "swiglu", lambda *a: (used.append(1), activations.swiglu(*a))[1]
    )
    for _ in range(2):
        fast.switch_on(model)
        assert mx.abs(model(tokens) - expected).max().item() < 1e-4
    assert len(used) == (2 * len(model.layers) if are_slow else 0)
    model.set_dtype(mx.bfloat16)
    model(tokens)
    assert len(used) == (2 * len(model.layers) if are_slow else 0), "bfloat16 has MLX's own"


@pytest.mark.parametrize("rope", [nn.RoPE(16), nn.RoPE(16, base=500.0, scale=0.5)])
def test_layers_share_the_angles_of_a_step(rope):
    class Block(nn.Module):
        def __init__(self, rope):
            super().__init__()
            self.rope = rope

    others = nn.RoPE(16, base=rope.base, scale=2.0), nn.RoPE(8, base=rope.base, scale=rope.scale)
    view = nn.Module()
    view.layers = [Block(rope), Block(rope), *map(Block, others)]
    merged_layers.share_rotations(view)
    first, second, *unlike = view.layers
    calls, plain = [], type(rope).__call__
    each = mx.array([3, 0, 700])
    for offset in (0, 4, 1000, each, each, mx.array([1, 2, 3])):
        for heads, block in ((2, first), (1, second)):
            x = numbers(3, heads, 1, 16)
            ours = np.array(block.rope(x, offset=offset))
            assert ours == pytest.approx(np.array(rope(x, offset=offset)), abs=1e-4)
        for other, block in zip(others, unlike, strict=True):  # angles of their own
            x = numbers(3, 2, 1, other.dims)
            ours = np.array(block.rope(x, offset=offset))
            assert ours == pytest.approx(np.array(other(x, offset=offset)), abs=1e-4)
    x = numbers(1, 2, 5, 16)
    assert mx.array_equal(first.rope(x, offset=2), rope(x, offset=2)), "many tokens go by MLX's"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.RoPE, "__call__", lambda *a, **k: (calls.append(1), plain(*a, **k))[1])
        for offset in (1000, 1000, each, each):
            first.rope(x[:, :, :1], offset=offset)
            second.rope(x[:, :, :1], offset=offset)
    assert len(calls) == 2, "once an offset"
