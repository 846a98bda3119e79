"""What several cores do at once, in turns or not, and only where that is safe."""

import dataclasses
import itertools
import os
import types

import mlx.core as mx
import pytest
from helpers import make_config, make_trainer

from utils.device import cores as streams


def at_once(trainer):
    return trainer.memory.micro_batches_at_once(trainer.args, trainer.update_step)


def test_one_after_the_other_where_several_would_not_do(model_dir, data_dir, tmp_path, monkeypatch):
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o")
    monkeypatch.setattr(streams, "cores", lambda: 2)
    assert at_once(trainer) == 1, "its memory is measured on the first rollout"
    trainer.run.state.update_step, trainer.args.num_iterations = 1, 2
    assert at_once(trainer) == 1, "of which this is the second update"
    trainer.run.state.update_step = 2
    assert at_once(trainer) == 4
    plan = dataclasses.replace(trainer.memory.plan, summed_gradients=trainer.memory.plan.gradients)
    for tight, count in ((0.9, 1), (2.1, 1), (4.1, 2), (5.9, 2)):
        budget = plan.resident + plan.summed_gradients
        budget = 2 * budget + tight * (plan.gradient_peak - budget + plan.gradients)
        trainer.memory.plan = dataclasses.replace(plan, budget_bytes=int(budget))
        assert at_once(trainer) == count
    trainer.memory.plan = plan
    monkeypatch.setattr(streams, "cores", lambda: 1)
    assert at_once(trainer) == 1
    monkeypatch.setattr(streams, "cores", lambda: 2)
    for name in ("use_compile", "gradient_checkpointing"):
        setattr(trainer.args, name, True)
        assert at_once(trainer) == 1
        setattr(trainer.args, name, False)
    assert [streams.batches_at_once(rows) for rows in (1, 199, 200, 1000)] == [1, 1, 2, 2]
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    assert (at_once(trainer), streams.batches_at_once(200)) == (1, 1), "a GPU is one core"


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


def test_large_batches_are_sampled_on_several_cores(model_dir, data_dir, tmp_path, monkeypatch):
    """The same completions, in turns, and rewards see all of them."""
    settings = {"stop_strings": ["t", "0"], "gradient_accumulation_steps": 3}
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", **settings)
    expected = trainer.generate_responses([2, 0, 5])
    monkeypatch.setattr(streams, "cores", lambda: 3)
    monkeypatch.setattr(streams, "ROWS", 5)
    sizes, order, sample = [], [], trainer.sampler.sample_batch

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

    monkeypatch.setattr(trainer.sampler, "sample_batch", noted)
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
    clock = types.SimpleNamespace(monotonic=lambda: 0.0)
    monkeypatch.setattr(streams, "time", clock)

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
    clock.monotonic = itertools.count(step=2 * streams.EVERY).__next__
    between.clear()
    streams.in_turns([count("c", 3)], lambda: between.append(1))
    assert len(between) > 2, "but now and then"
    clock.monotonic = lambda: 0.0
    assert streams.in_turns([count("alone", 1)]) == ["alone"]
    assert seen[-1] == ("alone", before)
    assert str(mx.default_stream(mx.cpu)) == before
