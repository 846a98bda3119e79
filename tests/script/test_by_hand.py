"""Steps by hand, as from a notebook, and steps that fail halfway."""

import dataclasses

import numpy as np
import pytest
from helpers import digest, load_script, make_trainer, snapshot

from utils.base.errors import RunError
from utils.device import cores
from utils.memory.plan import Plan


def out_of_memory(*_):
    raise RuntimeError("[malloc] Unable to allocate 9 bytes.")


def failing_once(trainer, name, error, at):
    """The trainer's method, which raises `error` in its call number `at`, from 1."""
    inner, calls = getattr(trainer, name), []

    def call(*args):
        calls.append(args)
        if len(calls) == at:
            raise error
        return inner(*args)

    setattr(trainer, name, call)


def test_a_penalty_in_the_reward_is_of_completions_that_are_masked_too(
    model_dir, data_dir, tmp_path
):
    """Their reward counts in the group's mean, so their distance does."""
    settings = {"kl_coeff": 0.5, "kl_placement": "reward", "mask_truncated_completions": True}
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", digest, **settings)
    moved = trainer.ref_model.parameters()
    trainer.ref_model.update({"model": {"norm": {"weight": 2 * moved["model"]["norm"]["weight"]}}})
    rollout = trainer.roll_out([0, 1], {})
    cells = rollout.completions.reshape(-1)
    for n, why in enumerate(("length", "stop") * 4):
        cells[n] = dataclasses.replace(cells[n], finish_reason=why)
    metrics = {}
    penalty = trainer.kl_penalty(rollout, metrics)
    assert (np.abs(penalty) > 1e-4).all()
    trainer.args.mask_truncated_completions = False
    assert trainer.kl_penalty(rollout, {}) == pytest.approx(penalty, abs=1e-6)
    assert sum(len(b.mask) for b in trainer.micro_batches(rollout, np.ones((2, 4)))) == 8
    trainer.args.mask_truncated_completions = True
    assert sum(len(b.mask) for b in trainer.micro_batches(rollout, np.ones((2, 4)))) == 4


def test_memory_that_runs_out_in_a_later_step_by_hand_is_met_with_less(
    model_dir, data_dir, tmp_path
):
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", digest)
    trainer.train_step([0, 1])
    failing_once(trainer, "loss_and_grad", RuntimeError("[malloc] Unable to allocate"), 1)
    trainer.train_step([2, 3])
    assert trainer.update_step == 2
    assert trainer.memory.plan.halved == ("micro_batch_tokens",)


def test_memory_that_runs_out_after_an_update_that_was_left_out_is_not_retried(
    model_dir, data_dir, tmp_path, monkeypatch
):
    """A new cut would have neither the anchors nor the reference's log-probs."""
    settings = {"num_iterations": 2, "kl_coeff": 0.1}
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", digest, **settings)
    inner, norms = trainer.loss_and_grad, []

    def loss_and_grad(batch):
        if norms:
            out_of_memory()
        return inner(batch)

    def global_norm(*_):
        norms.append(1)
        return float("nan")

    trainer.loss_and_grad = loss_and_grad
    monkeypatch.setattr(load_script().adamw, "global_norm", global_norm)
    with pytest.raises(RunError, match="after the first step of a rollout"):
        trainer.train_step([0, 1])


def test_weights_and_counters_that_do_not_belong_together_are_not_saved(
    model_dir, data_dir, tmp_path
):
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", digest, num_iterations=2)
    before = snapshot(trainer)
    failing_once(trainer, "apply_gradients", KeyboardInterrupt(), 2)
    with pytest.raises(KeyboardInterrupt):
        trainer.train_step([0, 1])
    assert snapshot(trainer) != before
    with pytest.raises(RunError, match="was not saved: an update was stopped halfway"):
        trainer.save_checkpoint(tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_step_that_failed_takes_the_same_prompts_again(model_dir, data_dir, tmp_path):
    """Dynamic sampling, whose second round fails."""

    def run(fails):
        trainer = make_trainer(
            model_dir,
            data_dir,
            tmp_path / "o",
            lambda completions, **_: [0.0] * len(completions),
            dynamic_sampling=2,
        )
        asked, generate = [], trainer.generate_responses
        trainer.generate_responses = lambda batch: asked.append([*batch]) or generate(batch)
        batch = trainer.prompts_of_update(0)
        if fails:
            failing_once(trainer, "compute_rewards", RunError("the server is down"), 2)
            with pytest.raises(RunError):
                trainer.train_step(batch)
            asked.clear()
        trainer.train_step(batch)
        return asked, trainer.run.state.drawn

    asked, drawn = run(False)
    assert run(True) == (asked, drawn)
    assert len({n for batch in asked for n in batch}) == drawn == 6


def test_prompts_may_be_an_array(model_dir, data_dir, tmp_path):
    results = []
    for batch in ([0, 1], (0, 1), np.array([0, 1])):
        trainer = make_trainer(model_dir, data_dir, tmp_path / "o", digest)
        trainer.train_step(batch)
        results.append(snapshot(trainer))
    assert results[0] == results[1] == results[2]


def test_an_evaluation_takes_no_value_that_was_begun_for_a_rollout(
    model_dir, data_dir, tmp_path, monkeypatch
):
    """Whose completions nobody scored."""
    monkeypatch.setattr(cores, "EVERY", 0)
    asked = []

    class Slow:
        per_prompt = True

        async def __call__(self, completions, **_):
            asked.append(len(completions))
            return [float(len(c[0]["content"])) for c in completions]

    settings = {"eval_metric": "helpers:digest", "reward_funcs": ["helpers:digest"]}
    settings |= {"eval_samples": 5, "rollout_batch_size": 4}
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", None, **settings)
    trainer.reward_funcs = {"helpers:digest": Slow()}
    expected = trainer.evaluate_em(trainer.eval_dataset)
    trainer.generate_responses([0, 1])
    assert trainer.rewards.calls.parts, "begun while the second prompt was sampled"
    asked.clear()
    assert trainer.evaluate_em(trainer.eval_dataset) == expected
    assert sum(asked) == len(trainer.eval_dataset)


def test_two_trainers_of_one_model_checkpoint_its_layers_once(model_dir, data_dir, tmp_path):
    grpo = load_script()
    one = make_trainer(model_dir, data_dir, tmp_path / "o", gradient_checkpointing=True)
    kinds = [type(layer) for layer in one.model.layers]
    rows = one.train_dataset
    other = grpo.MLXGRPOTrainer(one.loaded, one.reward_funcs, one.args, rows, [])
    assert [type(layer) for layer in other.model.layers] == kinds


def test_the_learning_rate_follows_the_number_of_updates(model_dir, data_dir, tmp_path):
    settings = {"lr_scheduler_type": "linear", "warmup_ratio": 0.0, "learning_rate": 0.5}
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", **settings)
    trainer.total_updates = 4
    assert [trainer.lr_schedule(n) for n in (1, 4)] == pytest.approx([0.5, 0.125])
    trainer.total_updates = 400
    assert trainer.lr_schedule(4) > 0.49


def test_what_ran_out_of_memory_stays_so_beside_a_measured_factor(model_dir, data_dir, tmp_path):
    """A resumed run finds both in its checkpoint."""
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o")
    memory, state = trainer.memory, trainer.run.state
    plan: Plan = memory.plan
    small = dataclasses.replace(plan.demand, budget_bytes=int(1.2 * plan.needed))
    memory.plan = dataclasses.replace(plan, demand=small)
    state.measured_factor, state.halved = 3.0, {"micro_batch_tokens": 20}
    settings = vars(trainer.args)
    memory.go_on(settings, settings)
    assert memory.plan.micro_batch_tokens == 20
    assert memory.plan.halved == ("micro_batch_tokens",)
    assert state.halved == {"micro_batch_tokens": 20}
