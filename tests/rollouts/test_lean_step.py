"""Decode steps in few operations are the model's own."""

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from conftest import make_model
from helpers import random_prompts, sample
from mlx.utils import tree_map
from test_compiled_step import as_on_cuda  # noqa: F401

from utils.device.cuda import swiglu
from utils.rollouts import compiled_step, lean_step, merged_layers

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SIZES = {"hidden_size": 64, "intermediate_size": 72}


@pytest.fixture
def as_on_gpu(monkeypatch, as_on_cuda):  # noqa: F811
    """Views as they are on a GPU, too: those for a CPU share the angles of the rotary embedding."""
    monkeypatch.setattr(merged_layers, "share_rotations", lambda _: None)
    return as_on_cuda


def loaded(folder, **settings):
    model, tokenizer = mlx_lm.load(str(make_model(folder, **settings)))
    # Biases of attention are 0 in a new model, so that nothing would show.
    noise = lambda x: x + 0.1 * mx.random.normal(x.shape, key=mx.random.key(x.size))  # noqa: E731
    model.update(tree_map(noise, model.parameters()))
    return model, tokenizer


def joined(model):
    return merged_layers.joined(model, np.inf)


@pytest.mark.parametrize(
    ("family", "extra"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": False, "rope_scaling": LLAMA3}),
        ("qwen2", {"tie_word_embeddings": True}),
    ],
)
def test_lean_steps_sample_the_same(grpo, tmp_path, as_on_gpu, family, extra):
    """With prompts of several lengths, places that are filled again, and caches that grow."""
    model, tokenizer = loaded(tmp_path / "m", model_type=family, **extra)
    prompts, stops = random_prompts(5, 23, 2, 40), tuple("taei01")
    rows = [n % len(prompts) for n in range(12)]
    plain = sample(grpo, (model, tokenizer), prompts, rows, stops=stops)
    as_on_gpu(True)
    ours = sample(grpo, (joined(model), tokenizer), prompts, rows, stops=stops, places=8)
    assert list(compiled_step._usable.values()) == ["lean"]
    assert [c.ids for c in ours] == [c.ids for c in plain]
    for a, b in zip(ours, plain, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


@pytest.mark.parametrize("why", ["quantized", "not joined", "sliding", "bias", "scaled"])
def test_what_is_otherwise_takes_the_models_own_step(grpo, tmp_path, as_on_gpu, why, capsys):
    extra = {
        "sliding": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
        "bias": {"attention_bias": True},
        "scaled": {"rope_scaling": YARN},
    }.get(why, {})
    model, tokenizer = loaded(tmp_path / "m", **extra)
    if why == "quantized":
        nn.quantize(model, 64, 4)
    view = model if why == "not joined" else joined(model)
    prompts = random_prompts(9, 7)
    plain = sample(grpo, (model, tokenizer), prompts)
    as_on_gpu(True)
    ours = sample(grpo, (view, tokenizer), prompts)
    assert [c.ids for c in ours] == [c.ids for c in plain]
    assert "lean" not in compiled_step._usable.values()
    assert (lean_step.of(view) is None) == (why != "scaled")


def test_a_lean_step_that_differs_is_left_out(grpo, tmp_path, as_on_gpu, monkeypatch, capsys):
    model, tokenizer = loaded(tmp_path / "m")
    prompts = random_prompts(9, 7)
    plain = sample(grpo, (model, tokenizer), prompts)
    monkeypatch.setattr(swiglu, "of_product", lambda x: x[:, : x.shape[1] // 2])
    as_on_gpu(True)
    ours = sample(grpo, (joined(model), tokenizer), prompts)
    assert [c.ids for c in ours] == [c.ids for c in plain]
    assert list(compiled_step._usable.values()) == ["its own"]
    assert "lean steps of llama left out, and slower for it: the logits differ" in (
        capsys.readouterr().out
    )
