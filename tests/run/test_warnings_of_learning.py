"""The warnings come just beyond their thresholds, and not just before."""

import json
import math
import re

import numpy as np
import pytest
from helpers import run_training

from utils.run import warnings_of_learning

HEALTHY = {"reward_mean": 1.0, "entropy": 1.0, "kl": 0.01}
HEALTHY |= {"groups_without_signal": 0.2, "truncation_rate": 0.1}


def warnings(before, then, window=10):
    """Said over a window of each; a figure may be one for even and one for odd updates."""
    state, said = {}, []
    for n in range(4 * window):
        record = HEALTHY | (before if n < window else then)
        record = {name: x[n % 2] if isinstance(x, tuple) else x for name, x in record.items()}
        state = warnings_of_learning.watched(state, [record], window)
        said += [state["warning"]] if state["warning"] else []
    return said


def around(mean, noise):
    """A figure whose standard deviation over an even number of updates is the noise."""
    return mean - noise, mean + noise


NOISY = {"reward_mean": around(1.0, 0.2)}
LITTLE = {"reward_mean": around(1.0, 0.1)}
CASES = {
    "cut off": ({}, "truncation_rate", 0.99, 0.991, "every completion was cut off"),
    "variance": ({}, "groups_without_signal", 0.99, 0.991, "no group had any variance"),
    "kl": ({}, "kl", 0.99, 1.01, "far from its reference"),
    "kl of 4 bits": ({"kl": 0.4}, "kl", 1.99, 2.01, "far from its reference"),
    "half": ({}, "reward_mean", 0.501, 0.499, "the reward has collapsed"),
    "half below 0": ({"reward_mean": -1.0}, "reward_mean", -1.499, -1.501, "reward has collapsed"),
    "noise": (NOISY, "reward_mean", 0.21, 0.19, "the reward has collapsed"),
    "entropy": ({}, "entropy", 0.101, 0.099, "the entropy has collapsed"),
    "high entropy": ({"entropy": 3.0}, "entropy", 0.301, 0.299, "the entropy has collapsed"),
}


@pytest.mark.parametrize("what", CASES)
def test_a_figure_on_either_side_of_its_threshold(what):
    before, name, quiet, loud, text = CASES[what]
    assert warnings(before, {name: quiet}) == []
    said = warnings(before, {name: loud})
    assert said
    assert all(text in warning for warning in said)


def test_entropy_may_fall_where_the_reward_gains_more_than_its_noise():
    collapsed = {"entropy": 0.05}
    assert warnings(LITTLE, collapsed | {"reward_mean": around(1.11, 0.1)}) == []
    (said, *_) = warnings(LITTLE, collapsed | {"reward_mean": around(1.09, 0.1)})
    assert "the reward has not gained by it" in said
    assert warnings({}, collapsed | {"reward_mean": 1.001}) == [], "there is no noise"


def rewards(*names, right=()):
    """(P, G, F) values of 2 x 3 completions."""
    values = np.zeros((2, 3, len(names)))
    for name in right:
        values[1, 2, names.index(name)] = 1.0
    return values


def warned(names, right_in=(), updates=8, window=4, **figures):
    """Said over some updates, in one of which a reward for answers is above 0."""
    state, said = {}, []
    for n in range(updates):
        values = rewards(*names, right=[name for name, update in right_in if update == n])
        state = warnings_of_learning.noted(
            state, values, names, "72", f"{'x' * 90}</answer>\x1b[2J"
        )
        state = json.loads(json.dumps(state))
        state = warnings_of_learning.watched(state, [HEALTHY | figures], window)
        said += [state["warning"]] if state["warning"] else []
    return said


def test_an_answer_that_was_never_right():
    (first, second) = warned(["correctness", "int"])
    assert first == second, "once a window"
    assert first.startswith("correctness has never been above 0 (expected '72', a completion ended")
    assert "xxx</answer>\\x1b[2J')" in first, "shown, not sent"
    assert len(first) < 350
    (both, _) = warned(["correctness", "math"])
    assert both.startswith("correctness and math have never been above 0")
    (one, _) = warned(["correctness", "math"], [("correctness", 1)])
    assert one.startswith("math has never been above 0")


@pytest.mark.parametrize("name", ["correctness", "math", "cosine"])
@pytest.mark.parametrize("update", [0, 3])
def test_one_right_answer_is_enough(name, update):
    assert warned([name], [(name, update)]) == []
    assert warned(["own.py:correctness", "int"]) == [], "of these nobody knows"


def test_rewards_that_never_applied_or_are_negative_were_never_right():
    for value in (math.nan, -1.0):
        values = np.full((2, 3, 1), value)
        state = warnings_of_learning.noted({}, values, ["cosine"], "72", "7")
        assert state["wrong"] == {"cosine": {"expected": "72", "end": "7"}}


def test_answers_that_were_all_cut_off_are_the_cause():
    said = warned(["correctness"], truncation_rate=1.0)
    assert all("cut off" in text for text in said)
    assert "never been above 0" in warned(["correctness"], groups_without_signal=1.0)[0]


def test_a_run_says_it_with_a_sample(model_dir, data_dir, tmp_path, capsys):
    """A random model answers nothing; the sample is of its data and of its completions."""
    settings = {"reward_funcs": ["correctness", "xmlcount"], "watchdog_window": 2}
    settings |= {"max_new_tokens": 24, "stop_strings": ["t", "0"]}
    run_training(model_dir, data_dir, tmp_path / "o", lambda _: None, max_updates=3, **settings)
    (said,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    answers = [row["answer"] for row in map(json.loads, (data_dir / "train.jsonl").open())]
    expected = re.search(r"never been above 0 \(expected '(-?\d+)', a completion ended in '", said)[
        1
    ]
    assert any(answer.endswith(f"#### {expected}") or answer == expected for answer in answers)
