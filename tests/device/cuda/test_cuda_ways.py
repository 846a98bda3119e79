"""What stands in for operations that MLX's CUDA backend is slow at: the same results.

Run on the CPU, where the functions are called as they would be on CUDA; how fast they are there is
in benchmarks/RESULTS.md.
"""

import sys

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from helpers import make_trainer, micro_batches, rollout

from utils.device import fast, runtime
from utils.device.cuda import attention


def masks(rows, length, own):
    """Kinds of masks of (rows, heads, length, own) attention that models pass."""
    seen = mx.random.uniform(shape=(rows, 1, length, own), key=mx.random.key(3)) < 0.7
    seen = seen | (mx.arange(own) == 0)
    added = mx.where(seen, mx.array(0, mx.bfloat16), mx.array(-mx.inf, mx.bfloat16))
    square = mx.arange(length)[:, None] + (own - length) >= mx.arange(own)
    squares = {"bool": seen, "added": added, "square": square}
    return {"none": None, "causal": "causal", "keys": seen[:, :, :1], **squares}


@pytest.mark.parametrize("kind", ["none", "causal", "keys", "bool", "added", "square"])
def test_attention_in_tiles_is_the_same(kind):
    """As MLX on CUDA wants it for its fused backward pass: 128 queries, of which 37 are real."""
    rows, length, own = 2, 37, 37 if kind == "causal" else 50
    shapes = ((rows, 4, length, 16), (rows, 2, own, 16), (rows, 2, own, 16))
    keys = mx.random.split(mx.random.key(1), 3)
    arrays = [
        mx.random.normal(shape, key=key).astype(mx.bfloat16)
        for shape, key in zip(shapes, keys, strict=True)
    ]
    mask, tiles = masks(rows, length, own)[kind], []

    def plain(queries, keys, values, mask):
        tiles.append(queries.shape[2])
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.25, mask=mask)

    def both(function):
        out = function(*arrays)
        return mx.vjp(lambda *a: [function(*a)], arrays, [mx.cos(out)])

    expected = both(lambda *a: plain(*a, mask=mask))
    tiles.clear()
    got = both(lambda *a: attention.in_tiles(plain, *a, mask))
    assert set(tiles) == {128}
    for a, b in zip(got[0] + got[1], expected[0] + expected[1], strict=True):
        assert a.shape == b.shape
        assert mx.isfinite(a).all()
        assert mx.abs(a.astype(mx.float32) - b.astype(mx.float32)).max() < 0.02


@pytest.mark.parametrize(
    ("length", "dtype", "size"),
    [
        (256, mx.bfloat16, 16),
        (1, mx.bfloat16, 16),
        (37, mx.float32, 16),
        (37, mx.bfloat16, 136),
        (37, mx.bfloat16, 12),
    ],
)
def test_attention_is_not_padded_for_nothing(length, dtype, size):
    x = mx.zeros((1, 2, length, size), dtype)
    seen = []

    def plain(queries, keys, values, mask):
        seen.extend([queries.shape, keys.shape])
        return queries

    assert attention.in_tiles(plain, x, x, x, "causal").shape == x.shape
    assert seen == [x.shape] * 2


def test_the_gradient_goes_by_tiles_on_cuda(grpo, model_dir, data_dir, tmp_path, monkeypatch):
    """Prompts, and rows that share them or not; never the decode steps of rollouts."""
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", dtype="bfloat16")
    sample = rollout(trainer)
    module = sys.modules[type(trainer.model).__module__]
    plain = module.scaled_dot_product_attention
    expected = trainer.loss_and_grad(micro_batches(trainer, sample)[0])[0][2]
    calls, in_tiles = [], attention.in_tiles

    def counted(function, queries, keys, *rest):
        calls.append((queries.shape[2], keys.shape[2]))
        return in_tiles(function, queries, keys, *rest)

    monkeypatch.setattr(module, "scaled_dot_product_attention", plain)
    assert not fast.problem_of(attention.DISPATCHING)
    monkeypatch.setattr(attention, "in_tiles", counted)
    monkeypatch.setattr(runtime, "platform_name", lambda: "cuda")
    fast.switch_on(trainer.model)
    trainer.generate_responses([0])
    assert not calls
    got = trainer.loss_and_grad(micro_batches(trainer, sample)[0])[0][2]
    assert mx.abs(got - expected).max() < 0.1  # bfloat16
    kinds = {queries == keys for queries, keys in calls}
    assert trainer.scorer.shares
    assert kinds == {True, False}, "prompts see themselves, rows their prompt as well"


@pytest.fixture
def in_rows(monkeypatch):
    """Products by rows as on CUDA."""
    monkeypatch.setattr(runtime, "platform_name", lambda: "cuda")
    fast.switch_on(nn.Module())
    once = nn.QuantizedLinear.__call__
    fast.switch_on(nn.Module())
    assert nn.QuantizedLinear.__call__ is once


def test_products_with_quantized_weights_are_of_one_matrix(in_rows, quantized_dir, monkeypatch):
    model, _ = mlx_lm.load(str(quantized_dir))
    shapes, product = [], mx.quantized_matmul
    monkeypatch.setattr(
        mx, "quantized_matmul", lambda x, *a, **k: (shapes.append(x.shape), product(x, *a, **k))[1]
    )
    got = model(mx.array([[5, 6, 7], [8, 9, 10]]))
    assert shapes
    assert all(len(shape) == 2 and shape[0] == 6 for shape in shapes)
    with monkeypatch.context() as patch:
        patch.setattr(nn.QuantizedLinear, "__call__", nn.QuantizedLinear.__call__.__wrapped__)
        patch.setattr(
            nn.QuantizedEmbedding, "as_linear", nn.QuantizedEmbedding.as_linear.__wrapped__
        )
        expected = model(mx.array([[5, 6, 7], [8, 9, 10]]))
    assert mx.abs(got - expected).max() < 1e-5


def test_elsewhere_quantized_layers_stay_mlxs():
    fast.switch_on(nn.Module())
    assert hasattr(nn.QuantizedLinear.__call__, "__wrapped__") == (
        runtime.platform_name() == "cuda"
    )
