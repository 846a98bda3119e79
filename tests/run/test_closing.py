"""What is said when a run ends."""

import math
import shlex
import types
from pathlib import Path

import pytest
from helpers import run_training, stop_after

from utils.memory.meter import Meter
from utils.run import closing, course
from utils.run.log import RunLog
from utils.run.state import State


def log_of(updates, history, metric="em"):
    records = [
        {
            "update": n,
            "reward_mean": n / 50,
            "reward/correctness": 0.0 if n < 50 else 1.0,
            "reward/none": math.nan,
            "completion_length": 20.0,
            "truncation_rate": 0.0,
        }
        for n in range(1, updates + 1)
    ]
    state = State(update_step=updates, elapsed=3725.0, course=course.extended({}, records))
    state.history = [{"em": em, "em_subset": 600, "update": n} for n, em in history]
    return RunLog(types.SimpleNamespace(output_dir="o", eval_metric=metric), state)


def test_the_table_shows_where_the_run_came_from_and_where_it_got():
    log = log_of(100, [(0, 0.242), (50, 0.6), (100, 0.945)])
    assert [*closing.table(log, Meter(most=430_000_000))] == [
        "                       updates 1-10  91-100",
        "          reward               0.11    1.91",
        "          correctness          0.00    1.00",
        "          length               20.0    20.0",
        "          exact match on test 24.2% [20.9%, 27.8%] -> 94.5% [92.4%, 96.1%]",
        "          in brackets, 95 % intervals of 600 questions",
        "          1:02:05 in all, at most 0.43 GB for arrays",
    ]


@pytest.mark.parametrize(
    ("updates", "history", "metric", "shown"),
    [
        (0, [], "em", []),
        (1, [(1, 0.5)], "em", ["exact match on test 50.0% [46.0%, 54.0%]"]),
        (1, [(0, 0.5), (1, math.nan)], "em", []),
        (1, [(0, 1.5), (1, 2.0)], "correctness", []),
    ],
)
def test_it_shows_nothing_that_is_not_known(updates, history, metric, shown):
    lines = [line.strip() for line in closing.table(log_of(updates, history, metric), Meter())]
    assert [line for line in lines if "brackets" not in line] == [*shown, "1:02:05 in all"]


def test_what_to_type_next_is_one_command():
    _, command = closing.next_step(Path("outputs/my run/final").parent)
    words = shlex.split(command)
    assert words[-4:] == ["--model", "outputs/my run/final", "--grpo-prompt", "your question"]
    assert Path(words[-5]).is_file()


def test_the_last_lines_say_where_all_is(model_dir, data_dir, tmp_path, capsys):
    run_training(model_dir, data_dir, tmp_path / "o", max_updates=2, eval_samples=2)
    lines = capsys.readouterr().out.splitlines()
    words = [line.split()[0] for line in lines]
    assert words[-4:-2] == ["saved", "next"]
    assert words[-1] == "finished"
    assert str(tmp_path / "o/final") in lines[-4]
    assert str(tmp_path / "o/final") in lines[-2]
    assert words[-5] == "kept"
    assert " in all, at most " in lines[-6]


def test_a_resumed_run_knows_its_whole_course(model_dir, data_dir, tmp_path, capsys):
    def rows():
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        return [x for x in lines if x and x[0] in ("reward", "length", "helpers:digest", "updates")]

    settings = {"max_updates": 4}
    run_training(model_dir, data_dir, tmp_path / "whole", **settings)
    whole = rows()
    assert len(whole) == 3
    run_training(model_dir, data_dir, tmp_path / "cut", stop_after(2), **settings)
    assert rows() == []
    run_training(model_dir, data_dir, tmp_path / "cut", resume="auto", **settings)
    assert rows() == whole
