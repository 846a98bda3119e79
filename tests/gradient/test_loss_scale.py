"""A gradient in float16 does not vanish in large updates, and what overflows is computed again."""

import dataclasses
import math

import mlx.core as mx
import numpy as np
import pytest
from conftest import make_model
from helpers import (
    as_batch,
    as_rollout,
    completion,
    flat,
    gradient,
    make_trainer,
    micro_batches,
    mostly_long,
    rollout,
    spy_on_gradients,
    tiny_model,
)
from mlx.utils import tree_map

from utils.gradient import loss_scale
from utils.gradient.agreement import relative_error

SIZES = [(4, 8), (64, 256), (256, 512), (1024, 512), (1024, 4096)]  # completions, tokens of each


def apart(expected, got):
    return relative_error([expected[k] for k in expected], [got[k] for k in expected])


def of_a_large_update(batches, completions, length):
    """The same few completions, weighed as in an update of so many."""
    for batch in batches:
        batch.weights = mx.where(batch.weights > 0, 1.0 / (completions * length), 0.0)
    return batches


def some_noise_on(p):
    return p + 0.05 * mx.random.normal(p.shape, key=mx.random.key(p.size))


def trainers(folder, data_dir, tmp_path, **settings):
    """One that computes in float16, and one in float32 with the very same weights."""
    pair = []
    for wanted in (mx.float32, mx.float16):
        trainer = make_trainer(folder, data_dir, tmp_path / "o", dtype="float16", **settings)
        if trainer.loaded.train_type != "full":
            adapters = trainer.model.trainable_parameters()
            trainer.model.update(tree_map(some_noise_on, adapters))
        if wanted == mx.float32:
            trainer.model.set_dtype(wanted)
            trainer.loss_scale = loss_scale.LossScale(trainer.model)
            trainer.loss_and_grad = trainer.make_loss_and_grad()
        assert trainer.loss_scale.needed == (wanted == mx.float16)
        pair.append(trainer)
    return pair


WAYS = {
    "plain": {"plain": True},
    "packed": {},
    "compiled": {"use_compile": True},
    "checkpointed": {"gradient_checkpointing": True},
    "both": {"use_compile": True, "gradient_checkpointing": True},
    "pieces": {"pieces": True},  # by the head's own backward pass
    "pieces compiled": {"pieces": True, "use_compile": True},
    "entropy": {"entropy_coeff": 0.01},
    "reference": {"kl_coeff": 0.05},
    "lora": {"train_type": "lora", "lora_rank": 4},
    "dora": {"train_type": "dora", "lora_rank": 4},
    "4bit": {"train_type": "lora", "lora_rank": 4, "quantized": True},
    "4bit compiled": {
        **{"train_type": "lora", "lora_rank": 4, "quantized": True},
        **{"use_compile": True, "gradient_checkpointing": True},
    },
}


@pytest.mark.parametrize("way", mostly_long(WAYS, "plain", "packed", "pieces", "lora", "4bit"))
def test_float16_has_the_gradient_of_float32_at_every_size(
    model_dir, quantized_dir, data_dir, tmp_path, way
):
    """Without the scale nearly nothing was left of it in an update of 1,024 x 4,096 tokens."""
    settings = dict(WAYS[way])
    plain, pieces = settings.pop("plain", False), settings.pop("pieces", False)
    folder = quantized_dir if settings.pop("quantized", False) else model_dir
    pair = trainers(folder, data_dir, tmp_path, **settings)
    sample = rollout(pair[0])

    def gradient_of(trainer, size):
        if pieces:
            small = {"piece_logits": 5 * 384, "keep_logits": False}
            trainer.memory.plan = dataclasses.replace(trainer.memory.plan, **small)
        batches = of_a_large_update(micro_batches(trainer, sample, 10**6), *size)
        assert batches[0].layout is not None
        assert not pieces or trainer.scorer.piece == 5 * 384
        for batch in batches:
            batch.layout = None if plain else batch.layout
            if trainer.args.entropy_coeff:
                batch.entropy_weight = mx.array(trainer.args.entropy_coeff / math.prod(size))
            if trainer.ref_model is not None:
                batch.ref_logprobs = mx.zeros(batch.mask.shape) - 3.0
        return gradient(trainer, batches)[1]

    expected = gradient_of(pair[0], (1, 1))
    # MLX's products with 4-bit weights have twice the error of others, on the CPU.
    bound = 0.04 if folder == quantized_dir else 0.02
    for size in SIZES if way == "plain" else SIZES[-1:]:
        got = gradient_of(pair[1], size)
        assert all(g.dtype == mx.float32 for g in got.values())
        assert apart(expected, {name: g * math.prod(size) for name, g in got.items()}) < bound, size


def test_the_figures_of_the_module(model_dir, data_dir, tmp_path, monkeypatch):
    """With the scale and without it: that the test above can fail."""
    exact, half = trainers(model_dir, data_dir, tmp_path)
    sample = rollout(exact)
    exact_gradient = gradient(exact, of_a_large_update(micro_batches(exact, sample), 1, 1))[1]

    def error(size):
        """The loss is proportional to 1 / size, and so is a gradient that is exact."""
        got = gradient(half, of_a_large_update(micro_batches(half, sample), *size))[1]
        return apart(exact_gradient, {k: g * math.prod(size) for k, g in got.items()})

    errors = [error(size) for size in SIZES]
    assert errors == [errors[0]] * len(SIZES), "a power of two: not a bit depends on the size"
    assert errors[0] == pytest.approx(0.008, rel=0.2)
    monkeypatch.setattr(loss_scale, "scale_of", lambda batch: 1.0)
    errors = [error(size) for size in SIZES]
    assert errors == pytest.approx([0.008, 0.014, 0.074, 0.29, 1.04], rel=0.05)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_other_types_are_not_touched(model_dir, data_dir, tmp_path, dtype):
    """Not a bit of theirs, nor the type of their gradients."""
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", dtype=dtype)
    assert not trainer.loss_scale.needed
    batch = micro_batches(trainer, rollout(trainer), 10**6)[0]
    (loss, _, _), got = trainer.loss_and_grad(batch)
    assert batch.scale is None
    plain = mx.value_and_grad(lambda weights: loss_of(trainer, weights, batch))
    expected_loss, expected = plain(trainer.model.trainable_parameters())
    assert loss.item() == expected_loss.item()
    for name, value in flat(expected).items():
        assert flat(got)[name].dtype == value.dtype == getattr(mx, dtype)
        assert mx.array_equal(flat(got)[name], value), name


def loss_of(trainer, weights, batch):
    trainer.model.update(weights)
    return trainer.compute_grpo_loss(batch)[0]


def test_the_scale_is_the_largest_power_of_two_that_is_safe():
    def scale(weights, advantages, lengths):
        mask = mx.array([[1.0] * n + [0.0] * (max(lengths) - n) for n in lengths])
        given = mx.array(weights, mx.float32), mx.array(advantages, mx.float32)
        return loss_scale.scale_of(as_batch(mask=mask, weights=given[0], advantages=given[1]))

    assert scale([2**-10, 2**-11], [1.0, -2.0], [3, 2]) == 2**9, "2^-10 x 2^9 < 1 <= 2^-10 x 2^10"
    assert scale([0.7e-3, 0.1e-3], [0.5, 3.0], [3, 2]) == 2**11
    assert scale([2**-20] * 2, [1.9, 0.1], [4096, 4096]) == 2**17, "the sum would pass 1,024"
    assert scale([2**-10] * 2, [0.0, 0.0], [3, 2]) == 2**9, "only a penalty has a gradient"
    assert scale([1.0], [300.0], [1]) == 2**-9, "what would overflow by itself is made smaller"
    assert scale([0.0], [0.0], [1]) == 1.0


@pytest.fixture
def loud(tmp_path):
    """A model with hidden states in the thousands: sums of them over tokens leave float16."""
    folder = make_model(tmp_path / "loud", tie_word_embeddings=False)
    weights = mx.load(str(folder / "model.safetensors"))
    weights["model.norm.weight"] = weights["model.norm.weight"] * 6000
    weights["lm_head.weight"] = weights["lm_head.weight"] / 6000
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    return folder


def test_an_update_that_overflows_is_computed_with_a_smaller_scale(
    loud, data_dir, tmp_path, monkeypatch, capsys
):
    attempts, results = [], []
    for trainer in trainers(loud, data_dir, tmp_path, num_iterations=2):
        _, clipped = spy_on_gradients(trainer)
        inner = trainer.loss_and_grad

        def seen(batch, inner=inner, trainer=trainer):
            attempts.append(trainer.loss_scale.attempts)
            return inner(batch)

        trainer.loss_and_grad = seen
        trainer.optimizer.update = lambda *_: None  # the same weights for the second iteration
        records = trainer.learn(*sampled(trainer))
        assert [r["skipped"] for r in records] == [0, 0]
        results.append(clipped[0])
    assert attempts[:2] == [0, 0], "float32: once for each iteration"
    assert attempts[2:] == [0, 1, 0, 1], "each update begins anew: a resumed one has the same"
    assert apart(*results) < 0.02
    assert "computed once more at 0.0039 of it" in capsys.readouterr().out


def sampled(trainer):
    """A rollout of 36 tokens that pull one logit the same way, and its advantages."""
    rows = trainer.train_dataset[:3]
    completions = [completion([7] * 12, [-30.0] * 12) for _ in rows]  # importance weights 2
    return as_rollout(trainer, rows, completions), np.array([[1.0], [0.9], [0.8]])


def test_what_is_not_finite_for_another_reason_is_left_out_as_ever(
    model_dir, data_dir, tmp_path, capsys
):
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", dtype="float16")
    norm = trainer.model.model.norm
    norm.weight = norm.weight * mx.array(float("nan"), mx.float16)
    records = trainer.learn(*sampled(trainer))
    assert [r["skipped"] for r in records] == [1]
    assert "once more" not in capsys.readouterr().out, "the loss was no number either"


def test_a_gradient_that_stays_infinite_is_given_up(model_dir):
    scale = loss_scale.LossScale(tiny_model(dtype=mx.float16))
    endless = {"weight": mx.array([float("inf")])}
    tries = [scale.overflowed(0.0, endless) for _ in range(loss_scale.MOST_ATTEMPTS)]
    assert tries == [True] * (loss_scale.MOST_ATTEMPTS - 1) + [False]
    assert scale.attempts == 0
    assert not scale.overflowed(0.0, {"weight": mx.zeros(3)})
