"""The calculator: right to the last digit, and nothing but one."""

import pytest

from utils.rollouts.calculator import calculator


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("12345 + 67890", "80235"),
        ("(12 + 3) * -4", "-60"),
        ("99999999999 * 99999999999", "9999999999800000000001"),
        ("7 / 2", "3.5"),
        ("0.1 + 0.2", "0.3"),
        ("10 / 3", "3.33333333333"),
        ("-7 // 2", "-4"),
        ("-7 % 3", "2"),
        ("2^10", "1024"),
        ("2 ** -2", "0.25"),
        ("2 ** 0.5", "1.41421356237"),
        ("1,234,567 + 1", "1234568"),
        ("6 \u00d7 7 \u2212 2", "40"),
        ("2 ** 3 ** 2", "512"),
    ],
)
def test_results(expression, result):
    assert calculator(expression) == result


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("1 / 0", "division by zero"),
        ("0 ** -1", "division by zero"),
        ("9 ** 9 ** 9", "too large"),
        ("9 ** 99999999999", "too large"),
        ("1e400", "too large"),
        ("(-8) ** 0.5", "root of a negative number"),
        ("12 +", "is no arithmetic expression"),
        ("", "is no arithmetic expression"),
        ("1\0", "is no arithmetic expression"),
        ("(" * 150 + ")" * 50, "is no arithmetic expression"),
        ("1 + " * 60, "longer than 200 characters"),
        ("1 + x", "only numbers"),
        ("True + 1", "only numbers"),
        ("'a' * 9", "only numbers"),
        ("1 < 2", "only numbers"),
        ("[1, 2]", "only numbers"),
        ("abs(-1)", "only numbers"),
        ("__import__('os').system('true')", "only numbers"),
        ("1j", "only numbers"),
        ("~1", "only numbers"),
        ("1 << 9", "only numbers"),
    ],
)
def test_anything_else_is_told(expression, problem):
    with pytest.raises(ValueError, match=problem):
        calculator(expression)


def test_a_long_chain_of_signs_is_no_trouble():
    assert calculator("-" * 198 + "1") == "1"
