"""What reward functions say of themselves."""

import functools

from utils.rewards.about import LONGEST, about
from utils.rewards.workers import InWorkers


def polite(completions, word="please", **_):
    """1 for each completion
    that is polite.

    Asked for by many.
    """
    return [float(word in c[0]["content"]) for c in completions]


class Graded:
    """A grade."""

    def __call__(self, completions, **_):
        """Not this."""
        return [0.0 for _ in completions]


def silent(completions, **_):
    return [0.0 for _ in completions]


def test_the_first_paragraph_of_the_docstring_is_told():
    bound = functools.partial(polite, word="thanks")
    told = about({"polite": polite, "bound": bound, "grade": Graded(), "silent": silent})
    said = "1 for each completion that is polite."
    assert told == {"polite": said, "bound": said, "grade": "A grade."}


def test_that_of_a_function_in_workers_is_told():
    beside = InWorkers("polite", polite, {}, None, 1.0)
    assert about({"polite": beside}) == {"polite": "1 for each completion that is polite."}


def test_a_long_one_is_cut():
    def long(**_):
        pass

    long.__doc__ = "word " * 200
    assert len(about({"long": long})["long"]) == LONGEST + 3


def test_those_of_the_script_say_what_they_give(grpo):
    told = about(grpo.REWARDS)
    assert told["correctness"].startswith("2.0 for the right answer")
    assert told.keys() == grpo.REWARDS.keys()
