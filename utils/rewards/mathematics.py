"""Whether two answers say the same mathematics: numbers as numbers, the rest by math-verify.

docs/rewards.md says which answers are the same, and why.
"""

import dataclasses
import functools
import math
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from types import ModuleType
from typing import Any

from ..base.errors import UserError
from .number_forms import Quantity, boxed, read_number
from .wording import UNIT, said, tidied

LONGEST = 1000  # characters that math-verify is to read: its time grows with their square

# Decimals agree to six places; small numbers, and large ones that are rounded, to six digits.
PLACES, DIGITS = Fraction(5, 10**7), Fraction(5, 10**6)
SMALL, LARGE = Fraction(1, 1000), Fraction(10**15)
BOUND = re.compile(r"\s*(?:[<>]|\\(?:[lg]eq?|[lg]t|neq?)\b)")  # math-verify drops it
DEEPEST = 20  # brackets within brackets
FARTHEST = "1e400"  # size of the numbers that are compared here
NOT_COMPUTED = (
    *(ArithmeticError, AttributeError, NotImplementedError, RecursionError, TypeError, ValueError),
)

Expression = Any
"""SymPy's, or the text that could not be made one."""


@dataclass(frozen=True)
class Reading:
    """What a text answers; nothing where that is unclear."""

    words: str = ""
    number: Quantity | None = None
    unit: str = ""
    parsed: tuple[Expression, ...] = ()

    @property
    def readable(self) -> bool:
        expressions = [part for part in self.parsed if not isinstance(part, str)]
        return bool(self.words or self.number or expressions)


def equivalent(given: str, expected: str) -> bool | None:
    """Whether two answers say the same mathematics ("0.5", "\\frac12", "1/2").

    `given` may be an answer or a whole text. None: the expected answer can't be read.

    Raises:
        UserError: the package math-verify is not installed.
    """
    import_math_verify()
    if given.strip() == expected.strip():
        return True
    if len(expected) > LONGEST or not read(expected).readable:
        return None
    return same(read(expected), read(given[-LONGEST:]))  # what a text concludes stands at its end


@functools.lru_cache(maxsize=4096)
def read(text: str) -> Reading:
    """What a text answers."""
    text = tidied(text)
    boxes = {*boxed(text)}
    if len(boxes) == 1:
        return read(boxes.pop())
    if boxes or "\\begin" in text:  # several boxes that stand together are a set
        return Reading(parsed=parsed(text))
    if number := read_number(text):
        return Reading(number=number, unit=UNIT.get(number.currency, ""))
    answer = said(text)
    if number := read_number(answer.formula):
        number = dataclasses.replace(number, value=number.value * 10**answer.zeros)
        return Reading(number=number, unit=answer.unit or UNIT.get(number.currency, ""))
    if not answer.formula or answer.zeros:
        return Reading(words=answer.words)
    return Reading(parsed=parsed(answer.formula), unit=answer.unit)


def parsed(formula: str) -> tuple[Expression, ...]:
    """As math-verify reads it: in a box, it takes all of it for the formula."""
    if nested(formula) > DEEPEST or BOUND.match(formula):
        return ()
    text = formula if "\\boxed" in formula else f"\\boxed{{{formula}}}"
    return tuple(import_math_verify().parse(text, parsing_timeout=time_limit()))


def nested(formula: str) -> int:
    """How deeply, by brackets of any kind: math-verify takes minutes for hundreds of them."""
    depth = deepest = 0
    for character in formula:
        depth += (character in "({[") - (character in ")}]")
        deepest = max(deepest, depth)
    return deepest


def same(expected: Reading, given: Reading) -> bool:
    if expected.words or given.words:
        return expected.words == given.words
    if expected.unit and given.unit and expected.unit != given.unit:
        return False
    if expected.number and given.number:
        return close(expected.number, given.number)
    return bool(expressions(expected)) and verified(expressions(expected), expressions(given))


def expressions(reading: Reading) -> tuple[Expression, ...]:
    """As math-verify has them; a number that was read here is made one of its own."""
    if reading.number is None:
        return reading.parsed
    number = reading.number
    import sympy

    value = sympy.Rational(number.value.numerator, number.value.denominator)
    if number.percent:
        return parsed(f"{number.value}\\%")
    return (sympy.Float(value, 15) if number.decimal else value,)


def close(one: Quantity, other: Quantity) -> bool:
    """Equal, or as equal as decimals can be that are rounded."""
    if one.equals(other):
        return True
    if not one.comparable(other) or not (one.decimal or other.decimal):
        return False
    scientific = one.scientific or other.scientific
    return any(agree(a, b, scientific) for a, b in one.values(other))


def agree(a: Fraction, b: Fraction, rounded: bool = True) -> bool:
    """To six places; to six digits where both are small, or large and `rounded`."""
    size = max(abs(a), abs(b))
    relative = size < SMALL or (rounded and size >= LARGE)
    return abs(a - b) <= (DIGITS * size if relative else PLACES)


def verified(expected: tuple[Expression, ...], given: tuple[Expression, ...]) -> bool:
    """math-verify's comparison. It rounds to six places, whatever the size of the numbers."""
    if not given:
        return False
    from math_verify.errors import TimeoutException
    from math_verify.utils import timeout

    places = 0
    try:
        one, other, rounded, places = timeout(time_limit())(sizes)(expected, given)
        if one is not None and other is not None and rounded:
            return agree(one, other)
    except TimeoutException:
        return False
    except NOT_COMPUTED:
        pass  # math-verify has other ways
    return bool(
        import_math_verify().verify(
            [*expected],
            [*given],
            float_rounding=6 + places,
            numeric_precision=15 + places,
            timeout_seconds=time_limit(),
        )
    )


def sizes(
    expected: tuple[Expression, ...], given: tuple[Expression, ...]
) -> tuple[Fraction | None, Fraction | None, bool, int]:
    """Both as numbers, if they are; whether one may be rounded; places needed beyond six."""
    import sympy

    first = [x for x in (expected[0], given[0]) if isinstance(x, sympy.Basic)]
    rounded = any(x.has(sympy.Float) for x in first)
    return value_of(expected[0]), value_of(given[0]), rounded, more_places(expected + given)


def value_of(expression: Expression) -> Fraction | None:
    """Of an expression that is a real number of a sensible size; None of any other."""
    import sympy

    if not isinstance(expression, sympy.Expr) or expression.has(sympy.UnevaluatedExpr):
        return None
    if not (expression.is_number and expression.is_extended_real):
        return None
    value, bound = expression.evalf(30), sympy.Float(FARTHEST)
    if not isinstance(value, sympy.Number) or not value.is_finite:
        return None
    if value and not 1 / bound < abs(value) < bound:
        return None
    exact = sympy.Rational(value)
    return Fraction(int(exact.p), int(exact.q))


def more_places(expressions: tuple[Expression, ...]) -> int:
    """Beyond six that the smallest number in them needs."""
    sizes = [abs(x) for e in expressions for x in numbers_in(e) if x and abs(x) < SMALL]
    if not sizes:
        return 0
    least = min(sizes)
    return math.ceil(math.log10(least.denominator) - math.log10(least.numerator))


def numbers_in(expression: Expression) -> Iterator[Fraction]:
    value = value_of(expression)
    if value is not None:
        yield value
        return
    for part in getattr(expression, "args", ()):
        yield from numbers_in(part)


def time_limit() -> int | None:
    """In seconds. Limits are alarms, which only a main thread can set."""
    return 5 if threading.current_thread() is threading.main_thread() else None


def import_math_verify() -> ModuleType:
    try:
        import math_verify
    except ImportError:
        raise UserError(
            "the reward math needs the package math-verify: uv sync --extra math, or pip install "
            "'.[math]'"
        ) from None
    return math_verify
