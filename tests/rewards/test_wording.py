"""Which value a text commits itself to, and in which unit."""

import pytest

from utils.rewards.wording import Said, said, tidied, unit_of


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("5 apples", Said(formula="5")),
        ("5 cm", Said(formula="5", unit="cm")),
        ("42 km/h", Said(formula="42", unit="km/h")),
        ("it is 5 square meters", Said(formula="5", unit="m^2")),
        ("5 million dollars", Said(formula="5", unit="dollar", zeros=6)),
        ("the sum is x + 1 there", Said(formula="x + 1")),
        ("it is not 5 but 7", Said(formula="7")),
        ("7, not 5", Said(formula="7")),
        ("it is 5 or 7", Said(formula="5, 7")),
        ("5 or 7", Said(formula="5 or 7")),
        ("not 5", Said()),
        ("between 5 and 7", Said()),
        ("at least 5", Said()),
        ("minus 5 degrees", Said(formula="-5", unit="degree")),
        ("New York", Said(words="new york")),
        ("\\text{ New York }", Said(words="new york")),
        ("x + 1", Said(formula="x + 1")),
        ("", Said()),
    ],
)
def test_what_is_said(text, found):
    assert said(text) == found


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("The answer is **5**.", "5"),
        ("**Answer:** 5 cm\nBecause of 3", "5 cm"),
        ("<answer>\n5\n</answer>", "5"),
        ("The answer is the sum of both. So it is 5.", "the sum of both. So it is 5"),
        ("Answer: B. It has 3 sides.", "B"),
        ("$x^2$", "x^2"),
        ("2**3**4", "2**3**4"),
        ("3 * 4 * 5", "3 * 4 * 5"),
        ("a_1 + a_2", "a_1 + a_2"),
        ("Answer:", "Answer"),
        ("\\text{no solution}", "\\text{no solution}"),
    ],
)
def test_what_is_around_an_answer(text, left):
    assert tidied(text) == left


def test_one_name_for_a_unit():
    same = ["km/h", "kilometers per hour", "kmph", "kilometre per hour"]
    assert {unit_of(text.split()) for text in same} == {"km/h"}
    same = ["cm^2", "cm2", "square centimeters", "sq cm", "cm^{2}"]
    assert {unit_of(text.split()) for text in same} == {"cm^2"}
    assert [unit_of([text]) for text in ("apples", "n", "N", "km/apple")] == ["", "", "N", ""]
    assert unit_of([]) == ""
