"""The plan meets the machine: corrected by the first update, advice when memory runs out."""

import dataclasses

import mlx.core as mx
import mlx_lm
from helpers import as_batch, digest, make_trainer, run_training, stop_after

from utils.memory import plan as memory_plan
from utils.memory import suggestions, this_machine

GB = 10**9


def trainer_with(model_dir, data_dir, folder, **settings):
    trainer = make_trainer(model_dir, data_dir, folder, reward=digest, **settings)
    trainer.train_step(trainer.prompts_of_update(0))
    return trainer


def given_budget(trainer, share):
    """The trainer planned for `share` of the memory that it needs by the plan."""
    budget = int(share * trainer.memory.plan.needed / memory_plan.HEADROOM)
    wanted = dataclasses.replace(trainer.memory.plan.demand, budget_bytes=budget)
    trainer.memory.plan = suggestions.planned(trainer.memory.plan.shape, **vars(wanted))


def batch_of(rows, tokens):
    return as_batch(tokens=mx.zeros((rows, tokens)), mask=mx.ones((rows, 1)))


def after_a_peak(trainer, peak, monkeypatch):
    """The micro-batch size after an update that is said to have taken `peak` bytes."""
    rows, size = 8, trainer.memory.plan.micro_batch_tokens
    monkeypatch.setattr(trainer.memory.meter, "peak", lambda: peak)
    batch = batch_of(rows, -(-size // rows))
    trainer.memory.recalibrate([batch, batch])
    return trainer.memory.plan.micro_batch_tokens


def test_micro_batches_shrink_when_the_measured_ones_would_not_fit(
    model_dir, data_dir, tmp_path, monkeypatch, capsys
):
    trainer = trainer_with(model_dir, data_dir, tmp_path / "o")
    assert trainer.run.state.measured_factor == 1, "as planned, nothing is said"
    given_budget(trainer, 1.0)
    before = trainer.memory.plan.micro_batch_tokens
    assert after_a_peak(trainer, 2 * trainer.memory.plan.needed, monkeypatch) < before
    out = capsys.readouterr().out
    assert out.count("times what was planned") == 1
    assert f"not {before:,}" in out


def test_micro_batches_grow_only_where_the_plan_had_cut_them(
    model_dir, data_dir, tmp_path, monkeypatch
):
    trainer = trainer_with(model_dir, data_dir, tmp_path / "o")
    given_budget(trainer, 0.8)
    plan, before = trainer.memory.plan, trainer.memory.plan.micro_batch_tokens
    base = plan.resident + plan.summed_gradients
    little = base + 0.6 * (plan.gradient_peak - base)
    assert after_a_peak(trainer, little, monkeypatch) > before
    given_budget(trainer, 100.0)
    whole = trainer.memory.plan.micro_batch_tokens
    assert after_a_peak(trainer, little, monkeypatch) == whole


def test_micro_batches_that_were_half_full_count_twice(model_dir, data_dir, tmp_path, monkeypatch):
    """Completions may become longer than those of the first update."""
    trainer = trainer_with(model_dir, data_dir, tmp_path / "o")
    given_budget(trainer, 0.8)
    plan = trainer.memory.plan
    base = plan.resident + plan.summed_gradients
    peak = int(base + 0.8 * (plan.gradient_peak - base))
    monkeypatch.setattr(trainer.memory.meter, "peak", lambda: peak)
    batch = batch_of(1, plan.micro_batch_tokens // 2)
    trainer.memory.recalibrate([batch, batch])
    assert 1.55 < trainer.run.state.measured_factor < 1.65
    after_a_peak(trainer, 100 * GB * GB, monkeypatch)
    assert trainer.run.state.measured_factor == 5.0, "what else took memory is not the plan's fault"


def test_what_ran_out_of_memory_stays_halved(model_dir, data_dir, tmp_path, monkeypatch):
    trainer = trainer_with(model_dir, data_dir, tmp_path / "o")
    given_budget(trainer, 0.8)
    plan = trainer.memory.plan
    sizes = {"rollout_batch_size": plan.rollout_batch_size // 2}
    trainer.memory.resize(**sizes)
    base = plan.resident + plan.summed_gradients
    after_a_peak(trainer, base + 0.6 * (plan.gradient_peak - base), monkeypatch)
    assert trainer.memory.plan.micro_batch_tokens > plan.micro_batch_tokens, "it was planned anew"
    assert trainer.memory.plan.rollout_batch_size == plan.rollout_batch_size // 2
    trainer.memory.plan = plan
    trainer.memory.resize(micro_batch_tokens=plan.micro_batch_tokens // 2)
    trainer.memory.apply_factor()
    assert trainer.memory.plan.micro_batch_tokens == plan.micro_batch_tokens // 2


def test_a_given_micro_batch_is_left_alone(model_dir, data_dir, tmp_path, monkeypatch):
    trainer = trainer_with(model_dir, data_dir, tmp_path / "o", micro_batch_tokens=200)
    assert after_a_peak(trainer, 100 * GB * GB, monkeypatch) == 200


def test_a_correction_is_kept_over_a_stop(model_dir, data_dir, tmp_path):
    def correct(trainer):
        trainer.run.state.measured_factor = 2.5
        stop_after(1)(trainer)

    def with_little(trainer):
        given_budget(trainer, 0.8)
        planned.append(trainer.memory.plan.micro_batch_tokens)

    planned = []
    run_training(model_dir, data_dir, tmp_path / "o", correct, max_updates=2)
    settings = {"resume": "auto", "max_updates": 2}
    _, resumed = run_training(model_dir, data_dir, tmp_path / "o", with_little, **settings)
    assert resumed.run.state.measured_factor == resumed.memory.plan.demand.measured_factor == 2.5
    assert resumed.memory.plan.micro_batch_tokens < planned[0], "and it acts"


def test_advice_for_too_little_memory_is_what_would_need_less(model_dir, data_dir, tmp_path):
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", micro_batch_tokens=1)
    assert trainer.memory.advice().startswith("moment_bits = 8")


def test_merged_weights_in_several_files_are_a_model(model_dir, data_dir, tmp_path, monkeypatch):
    from mlx_lm import utils

    one_each = {"max_file_size_gb": 0}
    shards = utils.make_shards
    monkeypatch.setattr(utils, "make_shards", lambda weights, **_: shards(weights, **one_each))
    settings = {"train_type": "lora", "max_updates": 1, "eval_samples": 3}
    _, trainer = run_training(model_dir, data_dir, tmp_path / "o", **settings)
    final = tmp_path / "o" / "final"
    assert len(list(final.glob("model-*.safetensors"))) > 10
    tokens = mx.array([[5, 6, 7]])
    loaded = mlx_lm.load(str(final))[0](tokens)
    assert mx.allclose(loaded, trainer.model(tokens), atol=1e-4)


def test_a_merged_model_that_does_not_fit_is_not_evaluated(model_dir, data_dir, tmp_path, capsys):
    def tight(trainer):
        trainer.memory.plan = dataclasses.replace(trainer.memory.plan, final_bytes=10**15)

    settings = {"train_type": "lora", "max_updates": 1, "eval_samples": 3}
    run_training(model_dir, data_dir, tmp_path / "o", tight, **settings)
    out = capsys.readouterr().out
    assert "fused     not evaluated: 1000000.0 GB more do not fit" in out


def test_adapters_are_counted_as_they_are(model_dir, data_dir, tmp_path):
    """Loaded ones may have another rank than lora_rank."""
    settings = {"train_type": "lora", "lora_rank": 4, "max_updates": 1}
    run_training(model_dir, data_dir, tmp_path / "o", **settings)
    adapters = str(tmp_path / "o" / "final" / "adapters")
    trainer = make_trainer(model_dir, data_dir, tmp_path / "p", adapter_path=adapters)
    expected = this_machine.trainable_parameters(trainer.model)
    assert trainer.memory.plan.trainable_parameters == expected
    assert trainer.memory.plan.moments == 8 * expected
