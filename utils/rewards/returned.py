"""What a reward function returned, as numbers: whatever library its author took them from."""

import math
import numbers
from collections.abc import Callable, Sequence
from datetime import timedelta
from types import NoneType
from typing import SupportsFloat, cast

import numpy as np

AS_LIST = ("tolist", "to_list", "to_pylist")  # NumPy and PyTorch; Polars; Arrow
AS_PYTHON = ("item", "as_py")  # NumPy, PyTorch and MLX; Arrow


def listed(values: object) -> Sequence[object] | None:
    """The list, tuple, array or column of one value per completion; None for anything else."""
    made = method(values, AS_LIST)
    values = made() if made else values
    is_list = isinstance(values, Sequence) and not isinstance(values, str | bytes | bytearray)
    return cast(Sequence[object], values) if is_list else None


def method(value: object, names: Sequence[str]) -> Callable[[], object] | None:
    """The first of these methods that it has."""
    found = (getattr(value, name, None) for name in names if not isinstance(value, type))
    return next((m for m in found if callable(m)), None)


def as_float(value: object) -> float:
    """A number, or true or false; NaN for what is none, or beyond any float."""
    try:
        return number(value)
    except (TypeError, ValueError, ArithmeticError, RuntimeError):
        return math.nan


def number(value: object) -> float:
    """A number, or true or false, of Python, decimal, NumPy, SymPy or an array library.

    Raises:
        TypeError, ValueError, ArithmeticError, RuntimeError: it is none, or beyond any float.
    """
    if np.ma.is_masked(value):  # its number is the one that was to be hidden
        raise TypeError(f"{value!r} is no number")
    if made := method(value, AS_PYTHON):
        value = made()  # of an array with more than one number it raises
    is_complex = isinstance(value, numbers.Complex) and not isinstance(value, numbers.Real)
    if is_complex or isinstance(value, NoneType | str | bytes | bytearray | timedelta):
        raise TypeError(f"{value!r} is no number")
    if hasattr(value, "__float__") or hasattr(value, "__index__"):
        return float(cast(SupportsFloat, value))
    # SymPy's true is neither a number nor Python's True; lists, too, have a truth value.
    if hasattr(type(value), "__bool__") and not hasattr(value, "__len__"):
        return float(bool(value))
    raise TypeError(f"{value!r} is no number")
