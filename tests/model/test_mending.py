"""Models that mlx-lm can sample from only: mended, they are trained, and it is the same model."""

import sys

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, make_model
from helpers import digest, make_trainer
from mlx_lm.models.cache import make_prompt_cache

from utils.model import mending

SIZES = {
    "attention_bias": False,
    "conv1d_width": 4,
    "logits_soft_cap": 30.0,
    "attention_window_size": 16,
    "block_types": ["recurrent", "attention"],
}


@pytest.fixture
def folder(tmp_path):
    return make_model(tmp_path / "griffin", model_type="recurrent_gemma", **SIZES)


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("length", [1, 2, 7])
def test_the_scan_is_the_recurrence(length, state):
    x, a = (mx.random.normal((2, length, 3), key=mx.random.key(n)) for n in (1, 2))
    h0 = mx.random.normal((2, 3), key=mx.random.key(3)) if state else None
    states, last = mending.scan(x, a, h0)
    expected = np.zeros((2, 3)) if h0 is None else np.array(h0)
    for t in range(length):
        expected = np.array(a)[:, t] * expected + np.array(x)[:, t]
        assert np.array(states)[:, t] == pytest.approx(expected, abs=1e-5)
    assert np.array(last) == pytest.approx(expected, abs=1e-5)


def test_its_gradient_is_that_of_writing_into_an_array():
    x, a = (mx.random.normal((2, 7, 3), key=mx.random.key(n)) for n in (1, 2))
    weights = mx.random.normal((2, 7, 3), key=mx.random.key(3))

    def loss(scan, x, a):
        states, last = scan(x, a, None)
        return (weights * states).sum() + last.sum()

    def plainly(x, a, h0):
        state, y = mx.zeros((2, 3)), mx.zeros_like(x)
        for t in range(7):
            state = a[:, t] * state + x[:, t]
            y[:, t] = state
        return y, state

    for got, expected in zip(
        mx.grad(lambda x, a: loss(mending.scan, x, a), argnums=(0, 1))(x, a),
        mx.grad(lambda x, a: loss(plainly, x, a), argnums=(0, 1))(x, a),
        strict=True,
    ):
        assert mx.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("train_type", ["full", "lora"])
def test_it_is_frozen_and_trained(folder, data_dir, tmp_path, train_type):
    """mlx-lm's class makes no module of itself: 'Model' object has no attribute '_no_grad'."""
    trainer = make_trainer(
        folder, data_dir, tmp_path / "o", max_new_tokens=4, stop_strings=[], train_type=train_type
    )
    [record] = trainer.train_step([0, 1])
    assert record["skipped"] == 0
    assert 0 < record["grad_norm"] < 1000


def test_gemma3n_shares_keys_and_values_in_training_too(data_dir, tmp_path):
    """Its layers that share had keys of their own where there was no cache: another model."""
    sys.path.append(str(ROOT / "docs"))
    import tiny_models

    folder = tiny_models.make("gemma3n", tmp_path / "gemma3n")
    trainer = make_trainer(folder, data_dir, tmp_path / "o", train_type="lora", reward=digest)
    tokens = mx.array([[5, 6, 7, 8, 9, 10, 11]])
    cache = make_prompt_cache(trainer.model)
    cached = [trainer.model(tokens[:, t : t + 1], cache=cache) for t in range(tokens.shape[1])]
    assert mx.allclose(mx.concatenate(cached, axis=1), trainer.model(tokens), atol=1e-4)
    adapted = {n for n, m in trainer.model.named_modules() if "lora_a" in m}
    assert {n.rpartition(".")[2] for n in adapted} > {"q_proj", "down_proj", "linear_left"}
    [record] = trainer.train_step([0, 1])
    assert record["sampler_mismatch"] < 1e-4
    assert 0 < record["grad_norm"] < 1000
