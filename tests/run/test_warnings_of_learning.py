"""The warnings come just beyond their thresholds, and not just before."""

import pytest

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
