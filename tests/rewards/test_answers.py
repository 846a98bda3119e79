"""What a completion answers, and which answers are the same."""

import pytest

from utils.rewards.answers import as_number, extract_xml_answer, same_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<reasoning>\nx\n</reasoning>\n<answer>\n72\n</answer>", "72"),
        ("<answer>72</answer>", "72"),
        ("<answer>1</answer> no: <answer>2</answer> done", "2"),
        ("<answer>1</answer> <answer>2", "1"),
        ("<answer>1 <answer>2</answer>", "2"),
        ("<answer>72", ""),
        ("72</answer>", ""),
        ("</answer>72<answer>", ""),
        ("72", ""),
        ("", ""),
    ],
)
def test_extract_xml_answer(text, answer):
    assert extract_xml_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1234", 1234),
        ("1,234.00", 1234),
        ("$1234", 1234),
        (" 1,234,567 ", 1234567),
        ("-3", -3),
        ("+3", 3),
        ("-$3", -3),
        ("3.", 3),
        (".5", 0.5),
        ("0.1", None),
        ("12,34", None),
        ("1,2345", None),
        ("3 apples", None),
        ("3 4", None),
        ("1e3", None),
        ("nan", None),
        ("Infinity", None),
        ("٣", None),
        ("-", None),
        ("", None),
    ],
)
def test_as_number(text, number):
    if text == "0.1":  # exact, which 0.1 as a float is not
        assert str(as_number(text)) == "0.1"
    else:
        assert as_number(text) == number


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("1,234.00", "1234", True),
        ("$1234", "1,234", True),
        ("-3", "-3.0", True),
        ("-3", "3", False),
        ("0.1", ".10", True),
        ("12345678901234567890", "12345678901234567891", False),
        ("Paris ", "Paris", True),
        ("paris", "Paris", False),
        ("3 apples", "3", False),
        ("", "3", False),
    ],
)
def test_same_answer(one, other, same):
    assert same_answer(one, other) is same
    assert same_answer(other, one) is same
