"""The course of a run, in few figures, whatever its length."""

import json

import pytest

from utils.run import course


def records(numbers):
    return [{"update": n, "reward_mean": float(n), "reward/int": None, "lr": 1.0} for n in numbers]


@pytest.mark.parametrize("updates", [1, 2, 64, 65, 128, 1000])
def test_a_curve_has_the_mean_of_every_span(updates):
    made = {}
    for record in records(range(1, updates + 1)):
        made = course.extended(made, [record])
    assert course.extended({}, records(range(1, updates + 1))) == made
    span = made["span"]
    spans = [range(a, min(a + span, updates + 1)) for a in range(1, updates + 1, span)]
    assert len(spans) <= 64
    assert course.curve(made, "reward_mean") == [sum(s) / len(s) for s in spans]
    assert made["sums"].keys() == {"reward_mean"}


def test_it_is_json_and_not_changed_in_place():
    first = course.extended({}, records([1, 2]))
    kept = json.dumps(first)
    second = course.extended(first, records([3]))
    assert json.dumps(first) == kept
    assert json.loads(json.dumps(second)) == second


@pytest.mark.parametrize(
    ("updates", "to", "since"), [(1, 1, 1), (2, 1, 2), (50, 5, 46), (150, 12, 141), (129, 12, 121)]
)
def test_its_ends_are_a_tenth_each(updates, to, since):
    made = course.extended({}, records(range(1, updates + 1)))
    assert course.ends(made, updates) == (to, since)
    before, after = course.at_the_ends(made, updates)["reward_mean"]
    assert before == (1 + to) / 2
    assert after == (since + updates) / 2


def test_what_has_no_value_there_is_absent():
    some = {"update": 30, "reward/late": 2.0}
    made = course.extended({}, [*records(range(1, 30)), some])
    assert course.at_the_ends(made, 30)["reward/late"] == (None, 2.0)
    assert course.curve(made, "reward/late") == [2.0]
