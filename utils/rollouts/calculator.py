"""A calculator for models: exact arithmetic, of what is written as numbers and signs alone."""

import ast
import math
import operator
import re
from collections.abc import Callable
from fractions import Fraction

LONGEST = 200  # characters of an expression
LARGEST = 10_000  # bits of a number
DIGITS = 12  # of a result that is no integer
SIGNS = str.maketrans({"\u00d7": "*", "\u00f7": "/", "\u2212": "-", "^": "**"})
BETWEEN_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
Operation = Callable[[Fraction, Fraction], Fraction]


def power(base: Fraction, exponent: Fraction) -> Fraction:
    """Exact for whole exponents."""
    if exponent.denominator == 1:
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if base not in (-1, 0, 1) and abs(exponent) * bits > 2 * LARGEST:
            raise ValueError("the result is too large")
        return Fraction(base**exponent)
    root = float(base) ** float(exponent)
    if isinstance(root, complex):
        raise ValueError("the root of a negative number is none")
    return Fraction(root)


OPERATIONS: dict[type[ast.operator], Operation] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
    ast.Mod: operator.mod,
    ast.Pow: power,
}


def calculator(expression: str) -> str:
    """Calculates the value of an arithmetic expression.

    Args:
        expression: Numbers with + - * / // % ** and parentheses, such as (12 + 3) * 4.
    """
    if len(expression) > LONGEST:
        raise ValueError(f"the expression is longer than {LONGEST} characters")
    text = BETWEEN_THOUSANDS.sub("", expression.translate(SIGNS)).strip()
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ValueError(f"{expression!r} is no arithmetic expression") from None
    try:
        return written(value(tree.body))
    except ZeroDivisionError:
        raise ValueError("division by zero") from None
    except OverflowError:
        raise ValueError("the result is too large") from None


def value(node: ast.expr) -> Fraction:
    """Of a part of an expression. Raises ValueError."""
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            result = Fraction(str(number)) if abs(number) < math.inf else Fraction(2) ** LARGEST
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=part):
            result = -value(part) if isinstance(sign, ast.USub) else value(part)
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in OPERATIONS:
            result = OPERATIONS[type(sign)](value(left), value(right))
        case _:
            raise ValueError("only numbers, + - * / // % ** and parentheses are allowed")
    if max(result.numerator.bit_length(), result.denominator.bit_length()) > LARGEST:
        raise ValueError("the result is too large")
    return result


def written(number: Fraction) -> str:
    """All digits of an integer, 12 of another number."""
    if number.denominator == 1:
        return str(number.numerator)
    return f"{float(number):.{DIGITS}g}"
