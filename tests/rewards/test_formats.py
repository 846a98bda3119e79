"""The five rewards of the documents: the answer, and its form."""

import pytest
from fuzz import time_limit

PERFECT = "<reasoning>\nthree\ntimes four\n</reasoning>\n<answer>\n12\n</answer>"


def reward(grpo, name, text, answer="12"):
    (value,) = grpo.REWARDS[name](completions=[[{"content": text}]], answer=[answer], prompts=[])
    return value


OF_THE_DOCUMENTS = ["correctness", "int", "strict_format", "soft_format", "xmlcount"]


def all_rewards(grpo, text, answer="12"):
    return [reward(grpo, name, text, answer) for name in OF_THE_DOCUMENTS]


def test_a_perfect_answer_that_stopped_earns_every_maximum(grpo):
    """Sampling stops right after </answer>: no line break follows, and none is asked for."""
    assert list(grpo.REWARDS)[:5] == OF_THE_DOCUMENTS
    assert all_rewards(grpo, PERFECT) == [2.0, 0.5, 0.5, 0.5, 0.5]
    assert all_rewards(grpo, f"\n \t{PERFECT}\n\n ") == [2.0, 0.5, 0.5, 0.5, 0.5]


def test_the_empty_answer_earns_nothing(grpo):
    for text in ("", "   \n", "12", "<reasoning>", "</answer>", "</answer>12<answer>"):
        assert all_rewards(grpo, text) == [0.0] * 5


@pytest.mark.parametrize(
    ("given", "expected", "equal"),
    [
        ("1234", "1,234.00", True),
        ("$1234", "1,234", True),
        ("-$5", "-5.0", True),
        ("+3", "3", True),
        ("12.", "12", True),
        (".5", "0.50", True),
        ("0", "-0", True),
        ("10000000000000001", "10000000000000000", False),  # equal as floats
        ("12", "1,2", False),
        ("12 apples", "12", False),
        ("blue", " blue\n", True),
        ("Blue", "blue", False),
        ("", "12", False),
        ("1e3", "1000", True),
        ("१२", "12", False),  # digits, but not the ones asked for
        ("nan", "nan", True),
    ],
)
def test_correctness_compares_numbers_as_numbers(grpo, given, expected, equal):
    text = f"<answer>{given}</answer>"
    assert reward(grpo, "correctness", text, expected) == (2.0 if equal else 0.0)


def test_the_last_complete_answer_counts(grpo):
    assert grpo.extract_xml_answer("<answer>1</answer> no <answer>2</answer> <answer>3") == "2"
    assert grpo.extract_xml_answer("<answer>1 <answer>\n2\n</answer>") == "2"
    assert grpo.extract_xml_answer("answer</answer>") == ""
    assert grpo.extract_hash_answer("#### 1\nso\n#### 1,234 ") == "1,234"
    assert grpo.extract_hash_answer("1,234") is None


@pytest.mark.parametrize("number", ["-3", "\u22123", "1,234", "0", "007", "-12,345,678"])
def test_integers(grpo, number):
    assert reward(grpo, "int", f"<answer>{number}</answer>") == 0.5


@pytest.mark.parametrize(
    "text", ["3.0", "1,23", "12,3456", "--3", "+3", "- 3", "three", "3\n4", "٣", ""]
)
def test_not_integers(grpo, text):
    assert reward(grpo, "int", f"<answer>{text}</answer>") == 0.0


def test_soft_format_takes_any_spacing_and_strict_format_own_lines(grpo):
    spaced = {
        "<reasoning>a</reasoning><answer>b</answer>": (0.0, 0.5),
        "<reasoning>a\nb</reasoning>\n\n <answer>c\nd</answer>": (0.0, 0.5),
        "<reasoning>\na\nb\n</reasoning>\n<answer>\nc\nd\n</answer>\n": (0.5, 0.5),
        "<reasoning>\n</reasoning>\n<answer>\n</answer>": (0.5, 0.5),
        "<reasoning>\na\n</reasoning>\n\n<answer>\nb\n</answer>": (0.0, 0.5),
        "<reasoning>\na</reasoning>\n<answer>\nb\n</answer>": (0.0, 0.5),
        "<reasoning>\na\n</reasoning>\n<answer>\nb</answer>": (0.0, 0.5),
        "<reasoning>\na\n</reasoning>\n<answer>b\n</answer>": (0.0, 0.5),
    }
    for text, values in spaced.items():
        got = reward(grpo, "strict_format", text), reward(grpo, "soft_format", text)
        assert got == values, text


@pytest.mark.parametrize(
    "text",
    [
        PERFECT + PERFECT,
        PERFECT + "<answer>\n12\n</answer>",
        PERFECT.replace("three", "<answer>\n1\n</answer>"),
        PERFECT.replace("three", "<reasoning>"),
        PERFECT.replace("12", "<reasoning>\n12\n</reasoning>"),
        PERFECT.replace("</answer>", ""),
        PERFECT.replace("</reasoning>", ""),
        PERFECT.replace("<answer>", ""),
        PERFECT.replace("<reasoning>", ""),
        PERFECT.replace("</reasoning>\n<answer>", "</reasoning>\nso\n<answer>"),
        "so\n" + PERFECT,
        PERFECT + "\nso",
        "<answer>\n12\n</answer>\n<reasoning>\nx\n</reasoning>",
        "<reasoning>\n<answer>\nx\n</reasoning>\n12\n</answer>",
    ],
    ids=range(14),
)
def test_nested_duplicate_unclosed_and_surrounded_tags_have_no_format(grpo, text):
    assert reward(grpo, "strict_format", text) == 0.0
    assert reward(grpo, "soft_format", text) == 0.0


def test_xmlcount_pays_a_quarter_per_pair_and_charges_what_follows(grpo):
    scores = {
        "<reasoning>a</reasoning>": 0.25,
        "<answer>a</answer>": 0.25,
        "</reasoning>a<reasoning><answer>b</answer>": 0.25,
        "<reasoning>a</reasoning><answer>b": 0.25,
        "<reasoning>a</reasoning><reasoning>b</reasoning><answer>c</answer>": 0.25,
        "<answer>1</answer><answer>2</answer>": 0.0,
        PERFECT + "\n" + "x" * 100: 0.4,
        PERFECT + "x": 0.499,
        PERFECT + "x" * 10_000: 0.0,
    }
    for text, value in scores.items():
        assert reward(grpo, "xmlcount", text) == pytest.approx(value, abs=1e-12), text[:80]


HOSTILE = {
    "plain": "a",
    "spaces": " ",
    "openings": "<reasoning>",
    "answers": "<answer>",
    "pairs": "<answer>1</answer>",
    "closings": "</answer>",
    "digits": "1",
    "groups": "1,000",
    "almost": "<reasoning>\n</reasoning>\n<answer>\n",
}


@pytest.mark.parametrize("unit", HOSTILE.values(), ids=HOSTILE)
def test_rewards_are_linear_in_the_length(grpo, unit):
    """5,000,000 characters of the worst kind take tenths of a second, bare and inside the tags;
    ways that start anew at every tag would take hours."""
    filling = unit * (5_000_000 // len(unit))
    for text in (filling, PERFECT.replace("three", filling), PERFECT.replace("12", filling)):
        with time_limit(60):
            all_rewards(grpo, text, answer=filling)
