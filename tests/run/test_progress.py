"""What one sees while a run goes on: in a terminal of some size, in a pipe, and when quiet."""

import sys
import types

import numpy as np
import pytest
from helpers import make_trainer, run_training
from terminals import Terminal

from utils.base import screen
from utils.memory.meter import Meter
from utils.run import progress
from utils.run.log import RunLog
from utils.run.state import State

RUN = {
    **{"max_updates": 4, "eval_samples": 3, "eval_steps": 4, "eval_every_updates": 0},
    **{"reward_funcs": ["helpers:digest", "xmlcount"], "num_generations": 4, "batch_size": 2},
}


def shown_in(columns, rows, monkeypatch, model_dir, data_dir, folder, **settings):
    """(screens while the run went on, the last one) of a run in a terminal of that size."""
    file, screens = Terminal(columns, rows), []
    monkeypatch.setattr(sys, "stdout", file)
    monkeypatch.setattr(screen, "terminal", lambda: file)
    monkeypatch.setattr(screen, "MEASURED", (columns, rows))
    monkeypatch.setattr(screen, "LEAST", 0.0)
    monkeypatch.setattr(progress, "READABLE", 0.0)
    show = screen.Block.draw

    def watched(block):
        show(block)
        screens.append(file.lines())

    monkeypatch.setattr(screen.Block, "draw", watched)
    run_training(model_dir, data_dir, folder, **{**RUN, "report": False, **settings})
    return screens, file.lines()


def test_a_terminal_shows_figures_curves_and_samples(model_dir, data_dir, tmp_path, monkeypatch):
    screens, last = shown_in(80, 40, monkeypatch, model_dir, data_dir, tmp_path / "o")
    begun = [lines[-1] for lines in screens if lines[-1].startswith("update 0/4 |")]
    assert next(line for line in begun if line[-1] != "|").endswith("| evaluating on test")
    block = next(
        lines[-7:] for lines in screens if len(lines) > 7 and lines[-7].startswith("update 3/4 |")
    )
    reward, rewards, exact, cost, best, worst = block[1:]
    assert reward.startswith("reward  ")
    assert {*screen.SPARKS} & {*reward}
    assert "helpers:digest" in rewards
    assert "xmlcount" in rewards
    assert exact.startswith("exact match")
    assert "tokens/s" in cost
    assert " GB" in cost
    assert best.startswith("best   ")
    assert worst.startswith("worst   ")
    assert "(expected " in best
    assert all(len(line) < 80 for line in block)
    assert not any("|" in line for line in last), "nothing of it stays"
    assert last[-1] == "finished  all 4 updates"
    assert not any(line.startswith("update  ") for line in last), "lines are for elsewhere"


@pytest.mark.parametrize(("columns", "rows"), [(40, 40), (80, 6)])
def test_little_room_has_one_line(columns, rows, model_dir, data_dir, tmp_path, monkeypatch):
    screens, last = shown_in(columns, rows, monkeypatch, model_dir, data_dir, tmp_path / "o")
    bars = [line for lines in screens for line in lines if "/4 |" in line]
    assert bars
    assert all(len(line) < columns for line in bars)
    assert not any(line.startswith("best") for lines in screens for line in lines)
    assert not any("|" in line for line in last)


def test_a_quiet_run_says_only_how_it_ended(model_dir, data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(screen, "terminal", lambda: pytest.fail("nothing is drawn"))
    run_training(model_dir, data_dir, tmp_path / "o", **RUN, quiet=True)
    words = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line[0] != " "]
    assert words == ["result", "saved", "next", "finished"]


def test_a_pipe_gets_lines_with_every_reward(model_dir, data_dir, tmp_path, capsys):
    run_training(model_dir, data_dir, tmp_path / "o", **RUN)
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("update  ")]
    assert [line.split()[:4] for line in lines] == [
        ["update", f"{n}", "of", "4"] for n in range(1, 5)
    ]
    for line in lines:
        assert "(helpers:digest " in line
        assert ", xmlcount " in line
        assert ", exact match " in line
        assert ", length " in line
        assert " tokens/s" in line
        assert (" left" in line) == ("4 of 4" not in line)


def test_a_line_is_the_mean_since_the_last_one(monkeypatch):
    monkeypatch.setattr(screen, "terminal", lambda: None)
    log = RunLog(types.SimpleNamespace(output_dir="o", eval_metric="em"))
    said = []
    shown = progress.RunProgress(log, Meter(), 40, quiet=False)
    shown.tell = said.append
    empty = {"completion_length": 8.0, "kl": None}
    for number, reward in enumerate((1.0, None, 3.0, 5.0)):
        shown.update([{**empty, "reward_mean": reward, "update": number + 1}], 1, None)
    assert [line.split("  ")[-1][:11] for line in said] == ["reward 1.00", "reward 4.00"]


def test_the_metric_that_is_evaluated_is_shown(tmp_path):
    """A mean reward is no share of answers: 2.3 is not 230 %."""
    record = {"reward_mean": 1.0, "completion_length": 9.0, "kl": None, "truncation_rate": 0.25}
    for metric, text in (("em", "exact match 230.0%"), ("correctness", "correctness 2.300")):
        log = RunLog(types.SimpleNamespace(output_dir=tmp_path, eval_metric=metric))
        log.state.history = [{"em": 2.3}]
        found = progress.figures_of(record, log)
        assert found == ["reward 1.00", text, "length 9", "25% cut off"]


def trainer_with(rewards, texts):
    completions = np.array([types.SimpleNamespace(text=text) for text in texts], dtype=object)
    rollout = types.SimpleNamespace(
        prompts=np.array([1, 0]),
        completions=completions.reshape(2, -1),
        rewards=np.array(rewards).reshape(2, -1),
    )
    return types.SimpleNamespace(rollout=rollout, train_dataset=[{"answer": "a"}, {"answer": "b"}])


def test_the_best_and_the_worst_are_of_those_that_have_a_reward():
    trainer = trainer_with([np.nan, 2.0, 0.5, 0.5], ["n", "two", "half", "half too"])
    found = progress.best_and_worst(trainer)
    assert found == {
        "best": progress.Sample(2.0, "b", "two"),
        "worst": progress.Sample(0.5, "a", "half"),
    }
    assert [*progress.best_and_worst(trainer_with([1.0] * 4, "abcd"))] == ["best"]
    assert progress.best_and_worst(trainer_with([np.nan] * 4, "abcd")) == {}
    assert progress.best_and_worst(types.SimpleNamespace(rollout=None)) == {}


EVIL = "\x1b[2J\x1b]0;gotcha\x07\u202e\x9b31m\r\0 https://ann:hunter2@host/"


def test_hostile_completions_are_shown_and_not_obeyed(monkeypatch):
    file = Terminal(120, 24)
    monkeypatch.setattr(screen, "terminal", lambda: file)
    monkeypatch.setattr(screen, "MEASURED", (120, 24))
    log = RunLog(types.SimpleNamespace(output_dir="o", eval_metric="em"), State())
    shown = progress.RunProgress(log, Meter(), 4, quiet=False)
    record = {"update": 1, "reward_mean": 1.0, "completion_length": 8.0, "kl": None}
    trainer = trainer_with([1.0, 2.0, 3.0, 4.0], [EVIL] * 4)
    with shown:
        monkeypatch.setattr(screen, "LEAST", 0.0)
        monkeypatch.setattr(progress, "READABLE", 0.0)
        shown.update([record], 1, trainer)
        lines = file.lines()
    told = r"\x1b[2J\x1b]0;gotcha\x07\u202e\x9b31m \x00 https://***@host/"
    assert [line[:5] for line in lines[-2:]] == ["best ", "worst"]
    assert all(line.endswith(told) for line in lines[-2:])
    assert "hunter2" not in file.written
    assert "\x07" not in file.written


def test_an_evaluation_is_no_sampling(model_dir, data_dir, tmp_path):
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", eval_samples=2)
    stages = []
    trainer.run.progress = types.SimpleNamespace(stage=stages.append)
    trainer.evaluate("test")
    assert {*stages} == {"evaluating on test"}
    trainer.train_step([0, 1])
    assert {"sampling", "gradient"} <= {*stages}
