"""Numbers that settings of pretraining may not be."""

import math

import pytest

from utils.base.errors import UserError
from utils.pretraining.ranges import check_numbers


def test_numbers_in_range_and_what_is_no_number_pass():
    check_numbers(
        {"lr": 1e-3, "steps": 1, "warmup": 0, "on": False, "name": "-1", "x": None}, "warmup"
    )


@pytest.mark.parametrize("value", [-1, -0.5, math.nan, math.inf])
@pytest.mark.parametrize(("name", "low"), [("lr", "more than 0"), ("warmup", "0 or more")])
def test_no_number_is_negative_or_not_finite(name, low, value):
    with pytest.raises(UserError, match=f"{name} = {value!r}: must be {low}"):
        check_numbers({name: value}, ["warmup"])


def test_only_some_may_be_zero():
    check_numbers({"warmup": 0.0}, ["warmup"])
    with pytest.raises(UserError, match="lr = 0: must be more than 0"):
        check_numbers({"warmup": 0, "lr": 0}, ["warmup"])
