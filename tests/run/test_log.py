"""The record of a run: a JSON object a line, in the log and in trackers."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from utils.run.log import RunLog, spread


def test_a_record_of_the_log_and_its_trackers_hold_no_secrets(tmp_path):
    seen = []
    log = RunLog(SimpleNamespace(output_dir=tmp_path, log_jsonl=True))
    log.tracker = SimpleNamespace(log=seen.append)
    log.write({"update": 1, "note": "https://ann:hunter2@host.example/reward?name=x&api_key=p4r"})
    shown = {"update": 1, "note": "https://***@host.example/reward?name=x&api_key=***"}
    assert seen == [shown]
    assert json.loads((tmp_path / "training_log.jsonl").read_text()) == shown


def scored(log, *scores, split="test"):
    """Evaluations of these updates and scores."""
    for update, em, cut in scores:
        figures = {"em": em, "em_subset": 600, "truncation_rate": cut}
        log.evaluation({"update": update, "split": split, **figures})


@pytest.fixture
def log(tmp_path):
    settings = {"log_jsonl": False, "eval_metric": "em", "eval_max_new_tokens": 8, "quiet": False}
    return RunLog(SimpleNamespace(output_dir=tmp_path, from_preset=False, **settings))


def test_evaluations_are_shown_where_they_change(log, capsys):
    scored(log, *((n, 0.1, 0.0) for n in range(0, 50, 10)), (50, 0.6, 0.0), (60, 0.6, 0.0))
    scored(log, (60, 0.5, 0.0), split="train")
    log.say_what_stayed()
    assert capsys.readouterr().out.splitlines() == [
        "eval      update    0  exact match 10.0% on test (600 questions, greedy)",
        "eval      update   50  exact match 10.0% -> 60.0% on test (600 questions, greedy)",
        "eval      update   60  exact match 50.0% on train (600 questions, greedy)",
        "eval      update   60  exact match 60.0% on test, as since update 50",
    ]
    assert [record["em"] for record in log.history] == [0.1] * 5 + [0.6] * 2


def test_an_evaluation_that_is_cut_off_more_is_a_change(log, capsys):
    scored(log, (0, 0.1, 0.0), (1, 0.1, 0.04), (2, math.nan, 0.0), (3, 0.2, 0.0))
    assert [line[23:].strip() for line in capsys.readouterr().out.splitlines()] == [
        "exact match 10.0% on test (600 questions, greedy)",
        "exact match 10.0% on test (600 questions, greedy, 4% cut off)",
        "em gave no value on test (600 questions, greedy)",
        "exact match 20.0% on test (600 questions, greedy)",
    ]


def test_a_quiet_run_still_warns(log, capsys):
    log.args.quiet = True
    scored(log, (0, 0.1, 0.5), (1, 0.1, 0.5))
    log.say_what_stayed()
    (line,) = capsys.readouterr().out.splitlines()
    assert "raise it" in line


def test_completions_are_spread_over_prompts():
    assert spread(8, 4, 0) == []
    assert spread(8, 4, 1) == [0]
    assert spread(8, 4, 2) == [0, 28]
    assert spread(8, 4, 8) == [0, 4, 8, 12, 16, 20, 24, 28]
    assert spread(2, 4, 5) == [0, 1, 2, 4, 5]
    assert spread(2, 4, 99) == [*range(8)]
    assert spread(1, 4, 3) == [0, 1, 2]


def test_a_completion_is_shown_with_each_reward(log, capsys):
    texts = [SimpleNamespace(text=f"answer {n}", finish_reason="stop") for n in range(4)]
    rollout = SimpleNamespace(
        prompts=np.array([1, 0]),
        completions=np.array(texts, dtype=object).reshape(2, 2),
        rewards=np.array([[1.5, 0.0], [math.nan, 2.0]]),
        values=np.array([[[1.0, 0.5], [0.0, 0.0]], [[math.nan, math.nan], [2.0, math.nan]]]),
    )
    questions = [{"question": f"question {n}", "answer": f"{n}"} for n in range(2)]
    log.args.log_completions = 2
    log.completions(questions, rollout, ["right", "form"], {"length": [7, 8, 9, 10]})
    assert capsys.readouterr().out.splitlines() == [
        "--- reward 1.50 (right 1.00, form 0.50), stop: question 1",
        "answer 0",
        "    (expected 1)",
        "    length: 7",
        "--- reward none (right none, form none), stop: question 0",
        "answer 2",
        "    (expected 0)",
        "    length: 9",
    ]
