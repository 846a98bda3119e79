"""rwkv7's gradients are numbers, and the right ones."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import make_model
from helpers import flat, make_trainer
from mlx.utils import tree_map

from utils.model import rwkv7

SIZES = {"norm_eps": 1e-5, "head_dim": 16}
SIZES |= dict.fromkeys(
    ("a_low_rank_dim", "v_low_rank_dim", "gate_low_rank_dim", "decay_low_rank_dim"), 8
)
TOKENS = mx.array([[3, 4, 5, 6, 7, 8, 9, 3, 4]])


@pytest.fixture
def folder(tmp_path):
    return make_model(tmp_path / "rwkv7", model_type="rwkv7", vocab=384, **SIZES)


def loss(model):
    logits = model(TOKENS[:, :-1]).astype(mx.float32)
    return nn.losses.cross_entropy(logits, TOKENS[:, 1:]).mean()


def test_an_update_of_fresh_weights_is_a_number(folder, data_dir, tmp_path):
    """mlx-lm's own gradient of these was NaN: their k_k is 0, and so is every key."""
    trainer = make_trainer(folder, data_dir, tmp_path / "o", max_new_tokens=4, stop_strings=[])
    assert not mx.any(trainer.model.layers[0].attn.k_k)
    [record] = trainer.train_step([0, 1])
    assert record["skipped"] == 0
    assert 0 < record["grad_norm"] < 100


def test_the_gradient_is_that_of_mlx_lm_and_of_finite_differences(folder, data_dir, tmp_path):
    """Where that one is a number: a model that has been trained."""
    trainer = make_trainer(folder, data_dir, tmp_path / "o")
    model = trainer.model
    noise = tree_map(
        lambda p: 0.3 * mx.random.normal(p.shape, key=mx.random.key(p.size)), model.parameters()
    )
    model.update(tree_map(mx.add, model.parameters(), noise))
    model.train()
    got = flat(nn.value_and_grad(model, loss)(model)[1])
    model.eval()
    expected = flat(nn.value_and_grad(model, loss)(model)[1])
    for name, value in expected.items():
        assert mx.allclose(got[name], value, rtol=1e-4, atol=1e-6), name
    for name in ("model.layers.0.attn.k_k", "model.layers.1.attn.k_proj.weight"):
        weight, step = flat(model.parameters())[name], 1e-2
        way = got[name] / mx.linalg.norm(got[name].reshape(-1))
        values = []
        for sign in (1, -1):
            model.load_weights([(name, weight + sign * step * way)], strict=False)
            values.append(loss(model).item())
        model.load_weights([(name, weight)], strict=False)
        slope = (values[0] - values[1]) / (2 * step)
        assert (got[name] * way).sum().item() == pytest.approx(slope, rel=0.02), name


def test_a_norm_of_0_has_the_gradient_0():
    x = mx.array([[0.0, 0.0], [3.0, 4.0], [1e-9, 0.0]])
    assert np.array(rwkv7.l2_norm(x)) == pytest.approx(np.array([[0, 0], [0.6, 0.8], [0.01, 0]]))
    gradient = mx.grad(lambda x: (rwkv7.l2_norm(x) * mx.array([1.0, 0.0])).sum())(x)
    assert gradient[0].tolist() == [0, 0]
    assert gradient[1].tolist() == pytest.approx([0.2 * 0.64, -0.2 * 0.48])
