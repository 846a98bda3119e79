"""Numbers of other libraries than Python's count as what they are, and nothing else counts."""

import math
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction

import mlx.core as mx
import numpy as np
import pytest
import sympy

from utils.base.errors import RunError
from utils.rewards import returned
from utils.rewards.calls import Extras, RewardCalls, checked


class Scalar:
    """As PyTorch's without dimensions: all that it has is item()."""

    def __init__(self, value):
        self.value = value

    def item(self):
        return self.value


class Verdict:
    """As SymPy's true: it has a truth value and is no number."""

    def __init__(self, passed):
        self.passed = passed

    def __bool__(self):
        return self.passed


class Sized:
    """As PyTorch's of more than one number, or of none."""

    def item(self):
        raise RuntimeError("a Tensor with 2 elements cannot be converted to Scalar")


x = sympy.Symbol("x")
NUMBERS = [
    *[(0, 0.0), (-2, -2.0), (True, 1.0), (False, 0.0), (0.25, 0.25), (10**30, 1e30)],
    *[(Decimal("0.5"), 0.5), (Decimal(-3), -3.0), (Fraction(1, 3), 1 / 3)],
    *[(np.float16(0.5), 0.5), (np.int64(7), 7.0), (np.bool_(True), 1.0), (np.array(0.5), 0.5)],
    *[(np.longdouble("0.5"), 0.5), (np.array([0.5]), 0.5), (np.array(True), 1.0)],
    *[(mx.array(0.5), 0.5), (mx.array(0.5, mx.bfloat16), 0.5), (mx.array(True), 1.0)],
    *[(sympy.true, 1.0), (sympy.false, 0.0), (sympy.Eq(x, x), 1.0), (sympy.Integer(2) > 3, 0.0)],
    *[(sympy.Integer(2), 2.0), (sympy.Rational(1, 4), 0.25), (sympy.Float("0.5"), 0.5)],
    *[(sympy.sqrt(2), 2**0.5), (sympy.pi, math.pi), (sympy.S.One, 1.0)],
    *[(Scalar(0.5), 0.5), (Scalar(True), 1.0), (Scalar(Decimal("0.5")), 0.5)],
    *[(Verdict(True), 1.0), (Verdict(False), 0.0)],
]
NONE = [
    *["1", b"1", np.str_("1"), np.array("1"), Scalar("1")],
    *[[], [1.0], {}, (), {1}, np.array([1.0, 2.0]), np.array([]), Sized(), object(), int, Scalar],
    *[1j, np.complex64(1), sympy.I, x, sympy.Eq(x, 1), sympy.nan, sympy.zoo],
    *[Decimal("NaN"), Decimal("sNaN"), math.nan, np.float64("nan"), np.ma.masked],
    *[10**400, Fraction(10**400), timedelta(seconds=1), np.timedelta64(1, "s"), Scalar(None)],
]
INFINITE = [math.inf, Decimal("-Infinity"), Decimal("1e400"), sympy.oo, np.float32("inf")]


def named(value):
    """Without the address that an object has in this process."""
    return repr(value).partition(" at 0x")[0]


@pytest.mark.parametrize(("value", "number"), NUMBERS, ids=named)
def test_numbers_and_truth_values_count(value, number):
    columns = {"completions": [[{"content": "text"}]]}
    assert checked("own", [value], columns) == [pytest.approx(number, rel=1e-12)]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [*NONE, *INFINITE], ids=named)
def test_anything_else_stops_the_run(value):
    columns = {"completions": [[{"content": "text"}]]}
    with pytest.raises(RunError, match=r"not a finite number or None, for the completion:\ntext"):
        checked("own", [value], columns)


class Column:
    """As Polars and Arrow have it: no sequence, but a method that makes a list."""

    def to_list(self):
        return [0.5, None]


@pytest.mark.parametrize("values", [[1, 0], (1, 0), range(1, -1, -1), np.array([True, False])])
def test_lists_tuples_and_arrays_hold_one_value_a_completion(values):
    columns = {"completions": [[{"content": "a"}], [{"content": "b"}]]}
    assert checked("own", values, columns) == [1.0, 0.0]
    assert returned.listed(Column()) == [0.5, None]


@pytest.mark.parametrize(
    "values", ["10", b"10", bytearray(b"10"), {1, 0}, {"a": 1, "b": 2}, iter([1, 0]), None, 1.0]
)
def test_what_has_no_order_or_no_length_is_no_list(values):
    columns = {"completions": [[{"content": "a"}], [{"content": "b"}]]}
    with pytest.raises(RunError, match="not a list of one number a completion"):
        checked("own", values, columns)


def test_a_function_that_mixes_libraries_is_summed_as_numbers():
    def own(completions, log_metric, **_):
        log_metric("share", Decimal("0.25"))
        log_metric("solved", sympy.true)
        return [Decimal("0.5"), sympy.true, None, np.float32(2)]

    calls = RewardCalls()
    columns = {"completions": [[{"content": str(n)}] for n in range(4)]}
    values = calls({"own": own}, columns)["own"]
    assert values.tolist()[:2] == [0.5, 1.0]
    assert math.isnan(values[2])
    assert values[3] == 2.0
    assert calls.logged.metrics == {"share": [0.25], "solved": [1.0]}
    with pytest.raises(TypeError, match="is no number"):
        Extras().log_metric("name", "0.5")
