"""What a completion answers, and which answers are the same."""

# ruff: noqa: RUF001 (signs of Unicode that look like those of ASCII are the point)
import pytest
from conftest import ROOT
from fuzz import time_limit

from utils.rewards.answers import as_number, extract_xml_answer, same_answer

GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"


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


# What is equal to what, as docs/rewards.md says.

SAME = [
    ("3/4", r"\boxed{3/4}"),
    ("0.75", "3/4"),
    (r"\frac{3}{4}", "0.75"),
    ("1 3/4", "1.75"),
    ("x=5", "5"),
    ("x = 5", "x=5"),
    ("12", "12%"),
    ("0.12", "12%"),
    ("12 percent", r"12\%"),
    ("3/25", "12%"),
    ("−3", "-3"),
    ("−3", "−3.0"),
    ("−1/2", "-0.5"),
    ("1e5", "100000"),
    ("5e-06", "0.000005"),
    (r"1.5\times10^{-3}", "0.0015"),
    ("1 000 000", "1,000,000"),
    (r"1\,000", "1000"),
    ("$18", "18"),
    ("18 €", "€18"),
    ("**73**", "73"),
    (r"\boxed{Paris}", "Paris"),
    ("$x^2$", "x^2"),
    ("(−1, 2)", "(-1, 2)"),
    ("72.0", "72"),
]
DIFFERENT = [
    ("0.333", "1/3"),
    ("0.12", "12"),
    ("1.2", "12%"),
    ("x=5", "y=5"),
    ("$5", "€5"),
    ("$12", "12%"),
    ("1,2", "12"),
    ("1,2", "1.2"),
    ("21/2", "2.5"),
    ("5 cm", "5"),
    ("18 dollars", "18"),
    ("the answer is 5", "5"),
    ("5, 7", "7"),
    (r"\boxed{5} or \boxed{7}", "7"),
    ("1e5", "1e6"),
    ("100000000000000000001", "1e20"),
    (r"\sqrt{4}", "2"),
    ("x+1", "1+x"),
    ("Paris.", "Paris"),
    ("**Paris**", "Paris"),
    ("New  York", "New York"),
    (r"\text{Paris}", "Paris"),
    ("seven", "7"),
    ("٤٢", "42"),
    ("４２", "42"),
    ("", "0"),
    ("-", "−3"),
]


@pytest.mark.parametrize("same", [True, False])
def test_the_same_number_or_the_same_text(same):
    for one, other in SAME if same else DIFFERENT:
        assert same_answer(one, other) is same, (one, other)
        assert same_answer(other, one) is same, (other, one)


def as_it_was(given, expected):
    """Exact match as plain numbers or to the letter, which GSM8K was scored by."""
    numbers = as_number(given), as_number(expected)
    return numbers[0] == numbers[1] if None not in numbers else given.strip() == expected.strip()


@pytest.mark.skipif(not GSM8K.is_dir(), reason=f"no GSM8K files in {GSM8K}")
def test_the_results_of_gsm8k_do_not_change(grpo):
    """On all rows, whatever a completion may well say there; only more ways to write the right
    number are right."""
    rows = [
        row
        for split in ("train", "test")
        for row in grpo.load_questions(grpo.MLXGRPOConfig(dataset=str(GSM8K)), split)
    ]
    assert len(rows) == 8133
    for row, following in zip(rows, [*rows[1:], rows[0]], strict=True):
        expected = row["answer"]
        assert expected == row["solution"].rpartition("####")[2].strip()
        number = int(expected.replace(",", ""))
        givens = [
            *(
                expected,
                f"{expected}.0",
                f"{'-' * (number < 0)}${abs(number):,}",
                f"{number}.00",
                f"{number}.",
                f"{number:+d}",
            ),
            *(following["answer"], str(number + 1), str(-number), f"{number}0", f"{number / 8:g}"),
            *(
                "",
                f"{number} apples",
                f"about {number}",
                f"{number} or {number + 1}",
                f"{number}, 1",
            ),
            *(f"<{number}>", f"{2 * number + 1}/2", row["solution"], row["question"]),
        ]
        for given in givens:
            assert same_answer(given, expected) is as_it_was(given, expected), (given, expected)
        assert all(same_answer(given, expected) for given in givens[:6])
        assert same_answer(f"\\boxed{{{expected}}}", expected)


def test_a_long_text_takes_no_time_that_grows():
    with time_limit(10):
        for piece in ("1,000", r"\boxed{", "$", "(", "x = 5 ", "9", "\\[", "½"):
            assert not same_answer(piece * 20_000, "5")
            assert not same_answer("5", piece * 20_000)
