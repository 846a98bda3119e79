"""Tokens that were given, not sampled (mask 0): context that nothing learns from or counts."""

import dataclasses

import mlx.core as mx
import numpy as np
import pytest
from helpers import (
    as_rollout,
    completion,
    digest,
    flat,
    gradient,
    load_script,
    make_trainer,
    micro_batches,
    relative_difference,
    rollout,
)
from mlx import nn

from utils.run.log import rollout_metrics

LOSSES = sorted(load_script().LOSSES)
GIVEN = [7, 3, 9]


def planted(sampled, at, ids=GIVEN, logprob=0.0):
    """The completion with tokens given before its token `at`."""
    parts = {
        "ids": ids,
        "logprobs": [logprob] * len(ids),
        "mask": [0] * len(ids),
    }
    whole = {n: getattr(sampled, n)[:at] + x + getattr(sampled, n)[at:] for n, x in parts.items()}
    return dataclasses.replace(sampled, **whole)


def sample(trainer, **how):
    """(rows, completions, advantages) with given tokens amid every completion but the first."""
    rows, completions, advantages = rollout(trainer)
    amid = [planted(c, len(c.ids) // 2, **how) if n else c for n, c in enumerate(completions)]
    return rows, amid, advantages


@pytest.mark.parametrize("use_compile", [False, True])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_their_log_probs_change_neither_loss_nor_gradient(
    model_dir, data_dir, tmp_path, loss_type, use_compile
):
    settings = {"loss_type": loss_type, "kl_coeff": 0.2, "use_compile": use_compile}
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", **settings)
    results = []
    for logprob in (0.0, -30.0):
        batches = micro_batches(trainer, sample(trainer, logprob=logprob))
        for batch in batches:
            current = trainer.compute_grpo_loss(batch)[2]
            wrong = (1 - batch.mask) * logprob
            batch.old_logprobs, batch.ref_logprobs = 1.02 * current + wrong, 0.9 * current + wrong
        results.append(gradient(trainer, batches))
    (loss, one), (same_loss, same) = results
    assert loss == same_loss
    assert relative_difference(one, same) == 0


@pytest.mark.parametrize("tokens", [1, 10**6])
def test_the_gradient_is_that_of_the_sampled_tokens_in_their_context(
    model_dir, data_dir, tmp_path, tokens
):
    """Against the sum written out over whole logits, one completion after the other."""
    settings = {"loss_type": "reinforce", "temperature": 1.0}
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", **settings)
    rows, completions, advantages = sample(trainer)
    count = sum(c.sampled for c in completions)

    def written_out(model):
        total = mx.array(0.0)
        for row, c, advantage in zip(rows, completions, advantages, strict=True):
            ids = mx.array([row["prompt_ids"] + c.ids])
            logprobs = nn.log_softmax(model(ids[:, :-1]), axis=-1)
            start = len(row["prompt_ids"])
            for place, own in enumerate(c.mask):
                if own:
                    chosen = logprobs[0, start + place - 1, c.ids[place]]
                    total = total - float(advantage) * chosen / count
        return total

    _, expected = nn.value_and_grad(trainer.model, written_out)(trainer.model)
    batches = micro_batches(trainer, (rows, completions, advantages), tokens)
    for batch in batches:  # as if sampled in this context: no importance weight
        batch.sampler_logprobs = trainer.compute_grpo_loss(batch)[2]
    _, got = gradient(trainer, batches)
    assert relative_difference(flat(expected), got) < 2e-5


def test_they_are_context_of_what_follows(model_dir, data_dir, tmp_path):
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o")
    row, sampled = trainer.train_dataset[0], completion([4, 5, 6, 8])
    found = []
    for ids in ([7, 3, 9], [7, 3, 11]):
        own = planted(sampled, 2, ids)
        (batch,) = micro_batches(trainer, ([row], [own], [1.0]))
        logprobs = np.array(trainer.compute_grpo_loss(batch)[2])[0]
        found.append(logprobs[np.array(batch.mask)[0] > 0])
    one, other = found
    assert len(one) == 4
    assert one[:2] == pytest.approx(other[:2], abs=1e-6)
    assert np.abs(one[2:] - other[2:]).max() > 1e-3


@pytest.mark.parametrize("at", ["start", "end"])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_they_have_no_part_in_the_weights(model_dir, data_dir, tmp_path, loss_type, at):
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", loss_type=loss_type)
    rows, completions, advantages = rollout(trainer)
    longer = [planted(c, 0 if at == "start" else len(c.ids)) for c in completions]
    one, other = (
        np.concatenate([np.array(b.weights) for b in micro_batches(trainer, (rows, c, advantages))])
        for c in (completions, longer)
    )
    assert sorted(one) == sorted(other)
    assert one.min() > 0


def test_what_follows_nothing_changes_nothing(model_dir, data_dir, tmp_path):
    """Tokens given after the last that was sampled are the context of none."""
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o")
    rows, completions, advantages = rollout(trainer)
    longer = [planted(c, len(c.ids)) for c in completions]
    one, other = (
        gradient(trainer, micro_batches(trainer, (rows, c, advantages)))
        for c in (completions, longer)
    )
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    assert relative_difference(one[1], other[1]) < 2e-5


def test_the_log_counts_what_was_sampled(model_dir, data_dir, tmp_path):
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o")
    rows, completions, _ = rollout(trainer)
    figures = []
    for some in (completions, [planted(c, 1) for c in completions]):
        cells = np.array(some, object).reshape(3, 4)
        whole = as_rollout(trainer, rows, some)
        own = dataclasses.replace(whole, completions=cells, rewards=np.eye(3, 4))
        own.values = own.rewards[..., None]
        figures.append(rollout_metrics(own, np.eye(3, 4), ["r"]))
    assert figures[0] == figures[1]
    assert figures[0]["tokens"] == sum(len(c.ids) for c in completions)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("soft_overlong", {"max_len": 6, "cache": 4}),
        ("length", {"max_len": 6, "target": 1}),
        ("repetition", {"ngram_size": 2}),
    ],
)
def test_rewards_of_length_count_what_was_sampled(model_dir, data_dir, tmp_path, name, settings):
    words = {"reward_funcs": [name], "reward_kwargs": {name: settings}}
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", None, **words)
    trainer.rewards.start()
    questions = [trainer.train_dataset[0]] * 2
    values = [
        trainer.compute_rewards(questions, some)[0].tolist()
        for some in (
            [completion([5, 6, 5, 6]), completion([5, 6, 7])],
            [planted(completion([5, 6, 5, 6]), 2, [5, 6] * 4), planted(completion([5, 6, 7]), 3)],
        )
    ]
    assert values[0] == values[1]
    assert len({*values[0]}) == 2, "or nothing would be compared"


def test_an_update_learns_from_completions_that_hold_them(model_dir, data_dir, tmp_path):
    """The whole step: two iterations, a reference, adapters that move."""
    settings = {"num_iterations": 2, "kl_coeff": 0.1, "entropy_coeff": 0.01}
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", digest, **settings)
    generate = trainer.generate_responses
    trainer.generate_responses = lambda batch: [planted(c, 1) for c in generate(batch)]
    one, two = trainer.train_step([0, 1])
    assert one["tokens"] == sum(c.sampled for c in trainer.rollout.completions.reshape(-1))
    assert one["sampler_mismatch"] > 1e-3, "what was given is context that the sampler lacked"
    assert one["grad_norm"] > 0
    assert two["policy_reward"] != one["policy_reward"]
