"""Recorded and recomputed log-probs agree; any split of an update has the same gradient."""

import copy
import dataclasses

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers import as_batch, gradient, make_trainer, micro_batches, relative_difference, rollout
from mlx.utils import tree_flatten, tree_map

from utils.gradient.packing import Pack


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("kl_coeff", [0.0, 0.3])
def test_any_split_gives_the_same_gradient(model_dir, data_dir, tmp_path, loss_type, kl_coeff):
    trainer = make_trainer(
        model_dir, data_dir, tmp_path / "o", loss_type=loss_type, kl_coeff=kl_coeff
    )
    sample = rollout(trainer)
    assert len({len(r.ids) for r in sample[1]}) > 3, "lengths must be ragged"

    def with_reference(batches):
        for batch in batches if kl_coeff else []:
            wide = batch.mask.shape
            batch.ref_logprobs = mx.zeros(wide) - 3.0
        return batches

    loss, whole = gradient(trainer, with_reference(micro_batches(trainer, sample, 10**6)))
    for tokens in (1, 60, 150):
        batches = with_reference(micro_batches(trainer, sample, tokens))
        assert len(batches) > 1
        part_loss, parts = gradient(trainer, batches)
        assert relative_difference(whole, parts) <= 1e-5
        assert part_loss == pytest.approx(loss, rel=1e-5, abs=1e-6)


def test_one_prompt_at_a_time_is_the_same_gradient(model_dir, data_dir, tmp_path):
    """Accumulation: the weights are those of the update, however its prompts are grouped."""
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o")
    prompts, responses, advantages = rollout(trainer)
    whole = gradient(trainer, micro_batches(trainer, (prompts, responses, advantages), 10**6))[1]
    order = np.random.default_rng(0).permutation(len(prompts))
    shuffled = [prompts[i] for i in order], [responses[i] for i in order], advantages[order]
    assert (
        relative_difference(whole, gradient(trainer, micro_batches(trainer, shuffled, 90))[1])
        <= 1e-5
    )


def test_compiled_gradient_equals_eager_also_after_an_update(model_dir, data_dir, tmp_path):
    """The trap: a compiled step that captured the weights as constants never sees the update."""
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o")
    batch = micro_batches(trainer, rollout(trainer), 10**6)[0]
    trainer.args.use_compile = True
    compiled = trainer.make_loss_and_grad()
    trainer.args.use_compile = False
    eager = trainer.make_loss_and_grad()
    for number in (1, 2):
        (loss, _, _), fast = compiled(batch)
        (expected, _, _), slow = eager(batch)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
        assert relative_difference(dict(tree_flatten(slow)), dict(tree_flatten(fast))) <= 1e-4
        before = copy.deepcopy(trainer.model)
        trainer.apply_gradients(0.0, slow, number)
        moved = tree_map(
            lambda a, b: mx.abs(a - b).max(), before.parameters(), trainer.model.parameters()
        )
        assert max(x.item() for _, x in tree_flatten(moved)) > 1e-4


def test_gradient_checkpointing_changes_nothing(model_dir, data_dir, tmp_path):
    plain = make_trainer(model_dir, data_dir, tmp_path / "a")
    sample = rollout(plain)
    expected = gradient(plain, micro_batches(plain, sample, 10**6))[1]
    recomputing = make_trainer(model_dir, data_dir, tmp_path / "b", gradient_checkpointing=True)
    assert recomputing.generate_responses([0])[0].ids, "rollouts go on working"
    got = gradient(recomputing, micro_batches(recomputing, sample, 10**6))[1]
    assert relative_difference(expected, got) <= 1e-5


def recomputed(grpo, trainer, prompts, responses):
    ids, zeros = [row["prompt_ids"] for row in prompts], np.zeros(len(prompts))
    pack = Pack([list(range(len(prompts)))])
    batch = trainer.scorer.pad(ids, responses, zeros, zeros, pack)
    width = batch.mask.shape[1]
    temperature = trainer.args.temperature
    logprobs, _ = grpo.token_logprobs(trainer.model, batch.tokens, width, temperature)
    return batch, logprobs


def mismatch(batch, logprobs):
    return (mx.abs(logprobs - batch.sampler_logprobs) * batch.mask).max().item()


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_recorded_and_recomputed_logprobs_agree(grpo, model_dir, data_dir, tmp_path, temperature):
    trainer = make_trainer(
        model_dir, data_dir, tmp_path / "o", temperature=temperature, max_new_tokens=20
    )
    prompts, responses, _ = rollout(trainer)
    batch, logprobs = recomputed(grpo, trainer, prompts, responses)
    assert batch.mask.sum().item() == sum(len(r.ids) for r in responses)
    assert mismatch(batch, logprobs) <= 1e-4
    assert np.std([x for r in responses for x in r.logprobs]) > 0.1, "not all the same number"


def test_an_off_by_one_in_either_would_be_seen(grpo, model_dir, data_dir, tmp_path):
    """The check above can fail: shift the record, or what is recomputed, by one token."""
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", max_new_tokens=20)
    prompts, responses, _ = rollout(trainer)
    batch, logprobs = recomputed(grpo, trainer, prompts, responses)
    shifted_record = dataclasses.replace(
        batch, sampler_logprobs=mx.roll(batch.sampler_logprobs, 1, axis=1)
    )
    assert mismatch(shifted_record, logprobs) > 0.1
    assert mismatch(batch, mx.roll(logprobs, 1, axis=1)) > 0.1
    wrong_tokens = mx.roll(batch.tokens, 1, axis=1)
    width = batch.mask.shape[1]
    assert mismatch(batch, grpo.token_logprobs(trainer.model, wrong_tokens, width, 1.0)[0]) > 0.1


def test_on_policy_gradient_is_advantage_times_score(grpo):
    """With the ratio at 1 the gradient of the loss is -A * grad log pi, not zero."""
    logprobs = mx.array([[-1.0, -2.0, -0.5], [-0.3, -0.7, -9.0]])
    batch = as_batch(
        mask=mx.array([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]),
        advantages=mx.array([2.0, -1.0]),
        weights=mx.array([1 / 6, 1 / 4]),
        sampler_logprobs=logprobs,
    )
    grad = mx.grad(lambda x: grpo.grpo_loss(x, batch, grpo.MLXGRPOConfig())[0])(logprobs)
    expected = mx.array([[-2 / 6] * 3, [1 / 4, 1 / 4, 0.0]])
    assert mx.allclose(grad, expected, atol=1e-6)
    assert nn.Module is not None
