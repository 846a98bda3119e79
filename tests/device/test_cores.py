"""Micro-batches on several cores at once: the same update, and only where that is safe."""

import dataclasses
import os

import mlx.core as mx
import pytest
from helpers import flat, make_config, make_trainer

from utils.device import cores as streams
from utils.gradient import on_cores
from utils.memory import this_machine

SETTINGS = {"micro_batch_tokens": 70, "train_type": "lora", "lora_dropout": 0.3}


def updated(model_dir, data_dir, folder, monkeypatch, cores, **settings):
    """Weights, log-records and devices' streams after three rollouts of two updates each."""
    monkeypatch.setattr(streams, "cores", lambda: cores)
    used, stream = [], mx.stream
    monkeypatch.setattr(mx, "stream", lambda s: (used.append(str(s)), stream(s))[1])
    settings = {**SETTINGS, "num_iterations": 2, "max_updates": 6, **settings}
    trainer = make_trainer(model_dir, data_dir, folder, **settings)
    records = [r for batch in ([0, 1], [2, 3], [4, 5]) for r in trainer.train_step(batch)]
    monkeypatch.setattr(mx, "stream", stream)
    return flat(trainer.model.trainable_parameters()), records, used


@pytest.mark.parametrize("kl_coeff", [0.0, 0.1])
def test_cores_change_no_weight(model_dir, data_dir, tmp_path, monkeypatch, kl_coeff):
    """With dropout, anchors and a reference."""
    arguments = (model_dir, data_dir, tmp_path / "o", monkeypatch)
    alone, records, unused = updated(*arguments, 1, kl_coeff=kl_coeff)
    several, again, used = updated(*arguments, 3, kl_coeff=kl_coeff)
    assert not unused
    assert len(set(used)) == 3
    for name, weight in alone.items():
        assert mx.array_equal(weight, several[name]), name
    for one, other in zip(records, again, strict=True):
        assert one["loss"] == other["loss"]
        assert one["grad_norm"] == other["grad_norm"]


def test_one_after_the_other_where_several_would_not_do(model_dir, data_dir, tmp_path, monkeypatch):
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o")
    monkeypatch.setattr(streams, "cores", lambda: 2)
    assert this_machine.at_once(trainer) == 1, "its memory is measured on the first rollout"
    trainer.update_step, trainer.args.num_iterations = 1, 2
    assert this_machine.at_once(trainer) == 1, "of which this is the second update"
    trainer.update_step = 2
    assert this_machine.at_once(trainer) == 4
    plan = dataclasses.replace(trainer.plan, summed_gradients=trainer.plan.gradients)
    for tight, count in ((0.9, 1), (2.1, 1), (4.1, 2), (5.9, 2)):
        budget = plan.resident + plan.summed_gradients
        budget = 2 * budget + tight * (plan.gradient_peak - budget + plan.gradients)
        trainer.plan = dataclasses.replace(plan, budget_bytes=int(budget))
        assert this_machine.at_once(trainer) == count
    trainer.plan = plan
    monkeypatch.setattr(streams, "cores", lambda: 1)
    assert this_machine.at_once(trainer) == 1
    monkeypatch.setattr(streams, "cores", lambda: 2)
    for name in ("use_compile", "gradient_checkpointing"):
        setattr(trainer.args, name, True)
        assert this_machine.at_once(trainer) == 1
        setattr(trainer.args, name, False)
    assert [streams.batches_at_once(rows) for rows in (1, 199, 200, 1000)] == [1, 1, 2, 2]
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    assert (this_machine.at_once(trainer), streams.batches_at_once(200)) == (1, 1), (
        "a GPU is one core"
    )


def test_mlx_is_asked_to_take_turns_unless_it_was_told_otherwise(model_dir, tmp_path, monkeypatch):
    config = make_config(model_dir, tmp_path, tmp_path / "o")
    for cores, before, after in ((2, None, "1000"), (2, "20", "20"), (1, None, None)):
        monkeypatch.setattr(streams, "cores", lambda cores=cores: cores)
        monkeypatch.setenv("MLX_BFS_MAX_WIDTH", before or "")
        if before is None:
            monkeypatch.delenv("MLX_BFS_MAX_WIDTH")
        streams.take_turns(config)
        assert os.environ.get("MLX_BFS_MAX_WIDTH") == after


@pytest.mark.parametrize(
    ("allowed", "there", "used"),
    [(3, 64, 3), (64, 64, streams.MOST), (None, 4, 4), (None, None, 1)],
)
def test_cores_are_those_that_this_process_may_use(monkeypatch, allowed, there, used):
    monkeypatch.setattr(os, "cpu_count", lambda: there)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # as on macOS
    if allowed:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(allowed), raising=False)
    assert streams.cores() == used


def test_a_long_micro_batch_has_a_core_of_its_own(monkeypatch):
    monkeypatch.setattr(streams, "cores", lambda: 2)
    batches = [{"tokens": mx.zeros((1, n))} for n in (40, 9, 9, 9)]
    used = [work for _, work in on_cores.spread(lambda _: mx.default_stream(mx.cpu), batches, 4)]
    assert used[1] == used[2] == used[3] != used[0]


def test_large_batches_are_sampled_on_several_cores(model_dir, data_dir, tmp_path, monkeypatch):
    """The same completions, in turns, and rewards see all of them."""
    settings = {"stop_strings": ["t", "0"], "gradient_accumulation_steps": 3}
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", **settings)
    expected = trainer.generate_responses([2, 0, 5])
    monkeypatch.setattr(streams, "cores", lambda: 3)
    monkeypatch.setattr(streams, "ROWS", 5)
    sizes, order, sample = [], [], trainer.sample.__globals__["sample_batch"]

    def noted(model, prompts, rows, *rest):
        number = len(sizes)
        sizes.append(len(rows))
        sampler = sample(model, prompts, rows, *rest)
        while True:
            order.append(number)
            try:
                yield next(sampler)
            except StopIteration as end:
                return end.value

    monkeypatch.setitem(trainer.sample.__globals__, "sample_batch", noted)
    ours = trainer.generate_responses([2, 0, 5])
    assert sizes == [6, 6]
    assert order[:4] == [0, 1, 0, 1]
    assert [r.ids for r in ours] == [r.ids for r in expected]
    assert [r.text for r in ours] == [r.text for r in expected]
    for a, b in zip(ours, expected, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


def test_generators_take_turns_on_streams_of_their_own(monkeypatch):
    """Those that end sooner do not keep the others from going on; results stay in order."""
    monkeypatch.setattr(streams, "cores", lambda: 3)
    seen, between = [], []

    def count(name, steps):
        for _ in range(steps):
            seen.append((name, str(mx.default_stream(mx.cpu))))
            yield mx.zeros(1)
        return name

    before = str(mx.default_stream(mx.cpu))
    assert streams.in_turns([count("a", 3), count("b", 1)], lambda: between.append(1)) == ["a", "b"]
    assert [name for name, _ in seen] == ["a", "b", "a", "a"]
    assert len({stream for name, stream in seen if name == "a"}) == 1
    assert len({stream for _, stream in seen}) == 2
    assert len(between) == 1, "not every step"
    assert streams.in_turns([count("alone", 1)]) == ["alone"]
    assert seen[-1] == ("alone", before)
    assert str(mx.default_stream(mx.cpu)) == before
