"""The three policies: what is copied, what is shared, and how each enters the loss."""

import copy
import dataclasses
import gc
import math

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from conftest import make_model
from helpers import as_batch, digest, flat, make_trainer, mostly_long, spy_on_gradients
from mlx.utils import tree_map
from mlx_lm.models.mla import MultiLinear

from utils.model import copies

LARGE = 0.02  # a learning rate that moves the policy visibly in one update


def byte_count(model):
    return sum(x.nbytes for x in flat(model.parameters()).values())


def packed_bytes(model):
    """Bytes of the 4-bit layers alone: weights, scales, biases."""
    layers = [module for _, module in model.named_modules() if hasattr(module, "bits")]
    assert {layer.bits for layer in layers} == {4}
    return sum(byte_count(layer) for layer in layers)


def new_bytes(action):
    """Memory that an action leaves allocated."""
    gc.collect()
    mx.synchronize()
    mx.clear_cache()  # or larger buffers would be used again, and count in full
    before = mx.get_active_memory()
    action()
    gc.collect()
    mx.synchronize()
    return mx.get_active_memory() - before


def about(count):
    return pytest.approx(count, rel=0.3)  # exact on the CPU; Metal rounds up to pages


def rescored(grpo, model, batch):
    """(B, W) log-probs of a micro-batch under a model, at the temperature 1 of these tests."""
    return grpo.token_logprobs(model, batch.tokens, batch.mask.shape[1], 1.0)[0]


def largest_difference(one, other):
    return max(mx.abs(one[name] - other[name]).max().item() for name in one)


# The sampling policy.


def test_nothing_is_copied_when_nothing_is_quantized_or_stale(model_dir, data_dir, tmp_path):
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o")
    trainer.train_step([0, 1])
    assert trainer.model_old is trainer.model
    assert trainer.ref_model is None


def test_full_fine_tuning_samples_from_a_4_bit_copy_made_anew(grpo, model_dir, data_dir, tmp_path):
    trainer = make_trainer(
        model_dir, data_dir, tmp_path / "o", quantize_for_rollouts=True, learning_rate=LARGE
    )
    assert trainer.model_old is None, "made just before it is needed"
    count = new_bytes(trainer.refresh_old_policy)
    assert count == about(packed_bytes(trainer.model_old)), "the rest is shared"
    assert count < 0.17 * byte_count(trainer.model)
    assert isinstance(trainer.model_old.model.embed_tokens, nn.QuantizedEmbedding)
    assert not flat(trainer.model_old.trainable_parameters())
    first = trainer.model_old
    trainer.train_step([0, 1])
    calls, _ = spy_on_gradients(trainer)
    trainer.train_step([0, 1])
    assert trainer.model_old is not first
    batch = calls[0][0]
    gap = rescored(grpo, trainer.model_old, batch) - batch.sampler_logprobs
    assert mx.abs(gap * batch.mask).max() < 2e-4, "log-probs are those of the 4-bit sampler"
    expected = grpo.quantize_copy(trainer.model)
    weight = "model.layers.1.mlp.up_proj.weight"
    stale = flat(trainer.model_old.parameters())[weight]
    assert not mx.array_equal(flat(expected.parameters())[weight], stale), "before the refresh"
    copy_policy, held = trainer.copy_policy, []
    trainer.copy_policy = lambda: held.append(trainer.model_old) or copy_policy()
    trainer.refresh_old_policy()
    assert held == [None], "never two copies at once"
    for name, value in flat(trainer.model_old.parameters()).items():
        assert mx.array_equal(value, flat(expected.parameters())[name])


@pytest.mark.parametrize("train_type", ["lora", "dora"])
def test_adapters_share_a_base_that_is_quantized_once(
    model_dir, data_dir, tmp_path, monkeypatch, train_type
):
    calls = []
    quantize = nn.quantize
    monkeypatch.setattr(nn, "quantize", lambda *a, **k: (calls.append(1), quantize(*a, **k)))
    trainer = make_trainer(
        model_dir,
        data_dir,
        tmp_path / "o",
        quantize_for_rollouts=True,
        train_type=train_type,
        lora_learning_rate=LARGE,
    )
    count = new_bytes(trainer.refresh_old_policy)
    assert count == about(packed_bytes(trainer.model_old)), "adapters and norms are shared"
    policy, packed = trainer.model_old, trainer.model_old.model.layers[0].mlp.up_proj.linear.weight
    for _ in range(3):
        trainer.train_step([0, 1])
    assert len(calls) == 1
    assert trainer.model_old is policy
    assert policy.model.layers[0].mlp.up_proj.linear.weight is packed
    added = new_bytes(trainer.refresh_old_policy)
    assert added <= 0, "adapters are shared until the next update"
    adapters = flat(trainer.model.trainable_parameters())
    for name, value in flat(policy.parameters()).items():
        if name in adapters:
            assert mx.array_equal(value, adapters[name])
    assert trainer.model.model.layers[0].mlp.up_proj.linear.weight.dtype == mx.float32


@pytest.mark.parametrize("sync", [1, 3])
def test_a_4_bit_base_is_never_copied(quantized_dir, data_dir, tmp_path, sync):
    trainer = make_trainer(
        quantized_dir, data_dir, tmp_path / "o", quantize_for_rollouts=True, sync_every_updates=sync
    )
    assert trainer.loaded.train_type == "lora"
    count = new_bytes(trainer.refresh_old_policy)
    assert count <= 0
    assert (trainer.model_old is trainer.model) == (sync == 1)
    (record,) = trainer.train_step([0, 1])
    assert record["importance_weight"] == pytest.approx(1.0, abs=1e-4)


def test_a_partly_quantized_base_is_left_as_it_was_made(quantized_dir, data_dir, tmp_path, grpo):
    """Whoever left a layer in full precision had a reason."""
    trainer = make_trainer(quantized_dir, data_dir, tmp_path / "o")
    layer = trainer.model.model.layers[0].mlp
    layer.up_proj.linear = nn.Linear(64, 128, bias=False)
    trainer.args.quantize_for_rollouts = True
    trainer.set_up_policies()
    trainer.refresh_old_policy()
    assert trainer.model_old is trainer.model


def test_importance_weights_are_near_1_when_nothing_is_quantized(model_dir, data_dir, tmp_path):
    records = {}
    for quantized in (False, True):
        trainer = make_trainer(
            model_dir, data_dir, tmp_path / "o", quantize_for_rollouts=quantized, max_new_tokens=20
        )
        calls, _ = spy_on_gradients(trainer)
        (records[quantized],) = trainer.train_step([0, 1])
        batch, _, logprobs = calls[0]
        mask = np.array(batch.mask) > 0
        gap = np.array(logprobs)[mask] - np.array(batch.sampler_logprobs)[mask]
        found = records[quantized]
        assert found["sampler_mismatch"] == pytest.approx(np.abs(gap).mean(), rel=1e-3, abs=1e-6)
        weights = np.minimum(np.exp(gap), 2)
        assert found["importance_weight"] == pytest.approx(weights.mean(), abs=1e-4)
        assert found["importance_capped"] == pytest.approx((np.exp(gap) > 2).mean(), abs=1e-4)
    assert records[False]["importance_weight"] == pytest.approx(1.0, abs=1e-4)
    assert records[False]["importance_capped"] == 0
    assert records[False]["sampler_mismatch"] < 1e-4
    assert records[True]["sampler_mismatch"] > 0.05
    assert records[True]["importance_capped"] > 0


def test_layers_that_cannot_be_grouped_stay_and_are_named_once(data_dir, tmp_path, capsys):
    folder = make_model(tmp_path / "wide", intermediate_size=160)  # down_proj reads 160 values
    trainer = make_trainer(folder, data_dir, tmp_path / "o", quantize_for_rollouts=True)
    said = capsys.readouterr().out
    trainer.train_step([0, 1])
    assert said.count("model.layers.*.mlp.down_proj") == 1
    assert "up_proj" not in said
    assert "down_proj" not in capsys.readouterr().out
    layer = trainer.model_old.model.layers[1].mlp
    assert type(layer.down_proj) is nn.Linear
    assert type(layer.up_proj) is nn.QuantizedLinear


# Stale rollouts and several updates on one rollout.


@pytest.mark.parametrize("quantized", [False, True])
def test_a_stale_policy_samples_and_the_current_one_anchors(
    grpo, model_dir, data_dir, tmp_path, quantized
):
    trainer = make_trainer(
        model_dir,
        data_dir,
        tmp_path / "o",
        sync_every_updates=3,
        learning_rate=LARGE,
        quantize_for_rollouts=quantized,
        reward=digest,
    )
    calls, _ = spy_on_gradients(trainer)
    for update in range(7):
        anchor = copy.deepcopy(trainer.model)
        if update % 3 == 0:  # refreshed just before the rollout of updates 0, 3 and 6
            sampler = grpo.quantize_copy(anchor) if quantized else anchor
        (record,) = trainer.train_step([0, 1])
        batch, _, logprobs = calls[update]
        mask, recorded = batch.mask, batch.sampler_logprobs
        assert mx.abs((rescored(grpo, sampler, batch) - recorded) * mask).max() < 2e-4
        assert mx.abs((rescored(grpo, anchor, batch) - logprobs) * mask).max() < 2e-4
        gap = (mx.abs(logprobs - recorded) * mask).sum().item() / mask.sum().item()
        assert record["sampler_mismatch"] == pytest.approx(gap, rel=1e-3, abs=1e-6)
        assert (gap > 1e-3) == (update % 3 > 0 or quantized)
        assert record["clip_low"] == record["clip_high"] == 0, "the ratio is to the current policy"
        assert batch.old_logprobs is None


def test_the_anchor_is_the_policy_at_the_first_use(grpo, model_dir, data_dir, tmp_path):
    trainer = make_trainer(
        model_dir,
        data_dir,
        tmp_path / "o",
        num_iterations=3,
        quantize_for_rollouts=True,
        sync_every_updates=2,
        learning_rate=LARGE,
    )
    start = copy.deepcopy(trainer.model)
    calls, _ = spy_on_gradients(trainer)
    records = trainer.train_step([0, 1])
    assert [record["update"] for record in records] == [1, 2, 3]
    assert calls[0][0].old_logprobs is None
    first, *later = calls
    width, temperature = first[0].mask.shape[1], trainer.args.temperature
    anchor = grpo.token_logprobs(start, first[0].tokens, width, temperature)[0]
    for batch, _, logprobs in later:
        assert mx.array_equal(batch.old_logprobs, first[2]), "fixed over the iterations"
        assert mx.allclose(batch.old_logprobs, anchor * batch.mask, atol=1e-4)
        moved = mx.abs(logprobs - batch.old_logprobs) * batch.mask
        assert moved.max().item() > 0.01, "the ratio has left 1"


def test_clipping_acts_from_the_second_iteration_on(model_dir, data_dir, tmp_path):
    results = {}
    for clip_eps in (0.2, 0.001):
        # Large enough to leave 1 +- 0.001, not so large that every token leaves 1 +- 0.2 too.
        settings = {"num_iterations": 2, "learning_rate": 1e-3, "clip_eps": clip_eps}
        trainer = make_trainer(model_dir, data_dir, tmp_path / "o", **settings)
        _, gradients = spy_on_gradients(trainer)
        results[clip_eps] = trainer.train_step([0, 1]), gradients
    (wide, wide_gradients), (narrow, narrow_gradients) = results.values()
    assert largest_difference(wide_gradients[0], narrow_gradients[0]) == 0
    assert largest_difference(wide_gradients[1], narrow_gradients[1]) > 1e-3
    for first, second in (wide, narrow):
        assert first["clip_low"] == first["clip_high"] == 0
        assert second["clip_low"] > 0
        assert second["clip_high"] > 0
    assert narrow[1]["clip_high"] > wide[1]["clip_high"]
    assert wide[1]["policy_reward"] > wide[0]["policy_reward"] + 0.01, "good tokens became likelier"


# The reference.


def base_logits(folder, tokens):
    return mlx_lm.load(str(folder))[0](tokens)


@pytest.mark.parametrize("train_type", ["lora", "dora"])
@pytest.mark.parametrize("base", mostly_long(["float", "4bit"], "4bit"))
def test_the_reference_of_adapters_is_the_base_bit_for_bit(
    model_dir, quantized_dir, data_dir, tmp_path, train_type, base
):
    folder = model_dir if base == "float" else quantized_dir
    trainer = make_trainer(
        folder,
        data_dir,
        tmp_path / "o",
        train_type=train_type,
        kl_coeff=0.1,
        lora_learning_rate=0.1,
    )
    tokens = mx.array([list(range(3, 40))])
    expected = base_logits(folder, tokens)
    (record,) = trainer.train_step([0, 1])
    assert 0 <= record["kl"] < 1e-6, "adapters start as nothing"
    kls = [trainer.train_step([0, 1])[0]["kl"] for _ in range(2)]
    assert kls[1] > 1e-4
    assert mx.array_equal(trainer.ref_model(tokens), expected)
    assert not mx.allclose(trainer.model(tokens), expected, atol=0.1)
    shared = new_bytes(trainer.set_up_policies)
    assert shared <= 0, "the reference shares every array"


@pytest.mark.parametrize("quantized", [False, True])
def test_the_reference_of_full_fine_tuning_stays_where_it_was(
    grpo, model_dir, data_dir, tmp_path, quantized
):
    trainer = make_trainer(
        model_dir,
        data_dir,
        tmp_path / "o",
        kl_coeff=0.1,
        quantize_for_rollouts=quantized,
        learning_rate=LARGE,
    )
    tokens = mx.array([list(range(3, 40))])
    start = trainer.model(tokens)
    expected = grpo.quantize_copy(trainer.model)(tokens) if quantized else start
    kls = [trainer.train_step([0, 1])[0]["kl"] for _ in range(3)]
    assert (kls[0] > 0.01) if quantized else (kls[0] == 0)
    assert kls[2] > kls[0] + 1e-3
    assert mx.array_equal(trainer.ref_model(tokens), expected)
    assert not mx.allclose(trainer.model(tokens), start, atol=0.1)


@pytest.mark.parametrize(
    ("settings", "warned"),
    [
        ({"quantize_for_rollouts": True, "kl_coeff": 0.1}, True),
        ({"quantize_for_rollouts": False, "kl_coeff": 0.1}, False),
        ({"quantize_for_rollouts": True, "kl_coeff": 0.1, "train_type": "lora"}, False),
        ({"quantize_for_rollouts": True}, False),
    ],
)
def test_a_reference_that_quantization_moved_is_warned_of_once(
    model_dir, data_dir, tmp_path, capsys, settings, warned
):
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", max_updates=2, **settings)
    (tmp_path / "o").mkdir()
    assert trainer.train() == 0
    assert capsys.readouterr().out.count("error of the 4-bit reference") == warned


def test_kl_coeff_changes_the_gradient_once_the_policy_has_moved(model_dir, data_dir, tmp_path):
    results = {}
    for kl_coeff in (1e-9, 1.0):
        settings = {"kl_coeff": kl_coeff, "learning_rate": LARGE}
        trainer = make_trainer(model_dir, data_dir, tmp_path / "o", **settings)
        _, gradients = spy_on_gradients(trainer)
        for rows in ([0, 1], [2, 3]):
            trainer.train_step(rows)
        results[kl_coeff] = gradients
    first, second = zip(*results.values(), strict=True)
    assert largest_difference(*first) < 1e-6, "k3 has its minimum where the policy is the reference"
    assert largest_difference(*second) > 1e-3


# The loss by hand.


@pytest.fixture(scope="module")
def options(grpo):
    return grpo.MLXGRPOConfig()


def one_token(ratio, advantage, **extra):
    """A batch of one token whose policy is `ratio` times as likely as its anchor, and log-probs."""
    arrays = {
        "mask": mx.array([[1.0]]),
        "advantages": mx.array([advantage]),
        "weights": mx.array([1.0]),
        "old_logprobs": mx.array([[-1.0]]),
        "sampler_logprobs": mx.array([[-1.0]]),
        **extra,
    }
    return as_batch(**arrays), mx.array([[-1.0 + math.log(ratio)]])


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "moves", "clipped"),
    [
        (1.0, 1.0, -1.0, True, None),
        (1.1, 1.0, -1.1, True, None),
        (1.5, 1.0, -1.2, False, "clip_high"),
        (1.5, -1.0, 1.5, True, None),  # too likely and bad: never clipped
        (0.5, -1.0, 0.8, False, "clip_low"),
        (0.5, 1.0, -0.5, True, None),
    ],
)
def test_the_clipped_surrogate(grpo, options, ratio, advantage, loss, moves, clipped):
    batch, logprobs = one_token(ratio, advantage)
    found, sums = grpo.grpo_loss(logprobs, batch, options)
    assert found.item() == pytest.approx(loss, rel=1e-6)
    gradient = mx.grad(lambda x: grpo.grpo_loss(x, batch, options)[0])(logprobs).item()
    assert gradient == pytest.approx(-advantage * ratio if moves else 0.0, rel=1e-6)
    assert [name for name in ("clip_low", "clip_high") if sums[name].item()] == [
        name for name in [clipped] if name
    ]
    assert sums["policy_reward"].item() == pytest.approx(ratio * advantage, rel=1e-6)


@pytest.mark.parametrize(
    ("weight", "capped"), [(0.1, False), (1.0, False), (1.9, False), (7.0, True)]
)
def test_the_importance_weight_is_capped_and_has_no_gradient(grpo, options, weight, capped):
    sampler = mx.array([[-1.0 - math.log(weight)]])
    batch, logprobs = one_token(1.0, 2.0, sampler_logprobs=sampler)
    used = min(weight, 2.0)
    for anchored in (batch, dataclasses.replace(batch, old_logprobs=None)):
        loss, sums = grpo.grpo_loss(logprobs, anchored, options)
        assert loss.item() == pytest.approx(-2 * used, rel=1e-5)
        gradient = mx.grad(lambda x, b=anchored: grpo.grpo_loss(x, b, options)[0])(logprobs)
        assert gradient.item() == pytest.approx(-2 * used, rel=1e-5)
        assert sums["importance_weight"].item() == pytest.approx(used, rel=1e-5)
        assert sums["importance_capped"].item() == capped


@pytest.mark.parametrize("gap", [0.0, 0.5, -0.5, 3.0, -3.0, 50.0, -50.0])
def test_k3_is_not_negative_is_guarded_and_has_no_importance_weight(grpo, gap):
    """k3 = exp(ref - log pi) - (ref - log pi) - 1, the log-ratio within +-20 and k3 at most 10."""
    ref, sampler = mx.array([[-1.0 + gap]]), mx.array([[-2.0]])
    batch, logprobs = one_token(1.0, 0.0, ref_logprobs=ref, sampler_logprobs=sampler)
    loss, sums = grpo.grpo_loss(logprobs, batch, grpo.MLXGRPOConfig(kl_coeff=0.5))
    within = max(-20.0, min(20.0, gap))
    k3 = min(math.exp(within) - within - 1, 10.0)
    assert sums["kl"].item() == pytest.approx(k3, rel=1e-5, abs=1e-6)
    assert k3 >= 0
    assert loss.item() == pytest.approx(0.5 * k3, rel=1e-5, abs=1e-6)


def test_masked_tokens_count_nowhere(grpo, options):
    batch, logprobs = one_token(1.3, 1.0)
    arrays = batch.arrays().items()
    wide = as_batch(**{k: mx.concatenate([v, v], axis=1) if v.ndim == 2 else v for k, v in arrays})
    wide.mask = mx.array([[1.0, 0.0]])
    twice = mx.concatenate([logprobs, logprobs + 5], axis=1)
    alone, together = (grpo.grpo_loss(x, b, options) for x, b in ((logprobs, batch), (twice, wide)))
    assert together[0].item() == alone[0].item()
    assert tree_map(mx.array.item, together[1]) == tree_map(mx.array.item, alone[1])


def test_latent_attention_is_unpacked_too():
    """mlx-lm's own left it packed, and a run on a 4-bit DeepSeek ended without `final/`."""
    model = nn.Module()
    model.plain, model.latent = nn.Linear(64, 32, bias=False), MultiLinear(64, 16, 4)
    before = flat(model.parameters())
    nn.quantize(model, group_size=32, bits=8)
    copies.dequantize(model)
    after = flat(model.parameters())
    assert after.keys() == before.keys()
    assert type(model.latent) is MultiLinear
    x = mx.random.normal((1, 4, 3, 64), key=mx.random.key(1))
    assert model.latent(x).shape == (1, 4, 3, 16)
    for name, value in before.items():
        assert mx.allclose(after[name], value, atol=2e-3)
