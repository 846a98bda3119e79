"""What a run says of its expected answers: their forms, and those that it can't read."""

from types import SimpleNamespace

import pytest

from utils.rewards import answer_forms

OF_EACH = {
    "number": ["72", "-3", "1,234.50", "$5", "1e5", "x = 5", "**73**"],
    "fraction": ["3/4", r"\frac12", "1 1/2", "\u00bd"],
    "percent": ["12%", r"12\%", "12 percent"],
    "boxed": [r"\boxed{3/4}", r"We get \boxed{x}.", r"\boxed{5} and \boxed{6}"],
    "latex": [r"\sqrt{2}", "$x$", "x^2", "(1,2)", "2x", "x=y", "3:30", r"\text{no}"],
    "text": ["blue", "New York", "5 cm", "The answer is 180", "A", "no", ""],
}


@pytest.mark.parametrize("form", OF_EACH)
def test_forms(form):
    assert {answer: answer_forms.form(answer) for answer in OF_EACH[form]} == dict.fromkeys(
        OF_EACH[form], form
    )


@pytest.mark.parametrize(
    ("answer", "exact"),
    [
        *(("72", True), ("3/4", True), ("12%", True), (r"\boxed{3/4}", True), ("blue", True)),
        *((r"\boxed{blue}", True), ("A", True), ("New York", True)),
        *((r"\sqrt{2}", False), ("(1,2)", False), ("5 cm", False), ("The answer is 180", False)),
        *((r"We get \boxed{5}.", True), (r"\boxed{\sqrt{2}}", False), ("x+1", False)),
    ],
)
def test_what_exact_match_can_be_used_for(answer, exact):
    assert answer_forms.is_exact(answer) is exact


def test_forms_are_counted_in_one_line():
    answers = ["72"] * 1200 + ["1/2", "2/3", r"\sqrt{2}", "12%", "blue", r"\boxed{1}"]
    said = "1,200 numbers, 2 fractions, 1 percentage, 1 in a box, 1 formula, 1 text"
    assert answer_forms.forms(answers) == said
    assert answer_forms.forms([]) == ""


def advice(funcs, train, test=(), metric="em"):
    config = SimpleNamespace(reward_funcs=funcs, eval_metric=metric)
    return [*answer_forms.advice(config, train, list(test))]


FORMULAS = ["7", r"\sqrt{2}", r"\pi", "5 cm"]
SETS = 'set eval_metric = "math"'


@pytest.mark.parametrize(
    ("funcs", "train", "test", "metric", "lines"),
    [
        (["correctness", "int"], ["7", "1/2", "12%", "blue"], ["7"], "em", []),
        (
            ["correctness", "int"],
            FORMULAS,
            ["7"],
            "em",
            [
                r"correctness compares 3 answers only to the letter ('\\sqrt{2}'): "
                "add math to reward_funcs"
            ],
        ),
        (
            ["correctness", "cosine"],
            [r"\pi"],
            FORMULAS,
            "em",
            [
                r"correctness and cosine compare 1 answer only to the letter ('\\pi'): add math to "
                "reward_funcs",
                r"exact match compares 3 answers only to the letter ('\\sqrt{2}'): "
                f"{SETS}, with math in reward_funcs",
            ],
        ),
        (
            ["math"],
            FORMULAS,
            FORMULAS,
            "em",
            [rf"exact match compares 3 answers only to the letter ('\\sqrt{{2}}'): {SETS}"],
        ),
        (["math", "correctness"], FORMULAS, FORMULAS, "math", []),
        (["own.py:reward"], FORMULAS, [], "own.py:reward", []),
        (
            ["math"],
            ["7", "5 apples and 7 pears", "3", "x" * 1001],
            [],
            "math",
            [
                "math can't read 2 answers ('5 apples and 7 pears'): it does not apply there; "
                "write the answer alone into the answer column"
            ],
        ),
        (
            ["last_number"],
            ["7", "$1,200", "3/4", "blue", "red"],
            [],
            "last_number",
            ["last_number does not apply to 2 answers that are no numbers ('blue')"],
        ),
    ],
    ids=["all", "exact", "both", "math", "as it says", "own", "unread", "last number"],
)
def test_what_a_run_is_told_to_set(funcs, train, test, metric, lines):
    assert advice(funcs, train, test, metric) == lines


def test_not_every_formula_is_read_before_a_run(monkeypatch):
    read = []
    real = answer_forms.read
    monkeypatch.setattr(answer_forms, "read", lambda text: read.append(text) or real(text))
    answers = [f"{n} apples and {n} pears" for n in range(1000)]
    (line,) = advice(["math"], answers + ["7"] * 1000, metric="math")
    assert len(read) == answer_forms.LOOKED_AT
    assert "200 answers of 200 looked at ('0 apples and 0 pears')" in line
    long = "It is " + "very " * 100
    assert len(advice(["correctness"], [f"{long}5"])[0]) < 200
