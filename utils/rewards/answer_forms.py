"""In which forms the expected answers of a data set are, and which of them a run can't read."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from ..base.text import counted, shown
from ..settings.run_settings import Settings
from .answers import as_number
from .mathematics import LONGEST, read
from .number_forms import boxed, read_number, unframed

EXACT = ("correctness", "cosine")
"""The rewards for answers that compare as exact match does."""
ANSWER_REWARDS = (*EXACT, "math", "last_number")
LOOKED_AT = 200  # answers that math-verify reads before a run; a formula takes it milliseconds
CUT = 60  # characters of an answer that is shown

FORMS = {
    "number": ("number", "numbers"),
    "fraction": ("fraction", "fractions"),
    "percent": ("percentage", "percentages"),
    "boxed": ("in a box", "in boxes"),
    "latex": ("formula", "formulas"),
    "text": ("text", "texts"),
}
LATEX = re.compile(r"\\[A-Za-z]|[$^{}=<>]")
WORD = re.compile(r"[^\W\d_]{2,}")


def form(answer: str) -> str:
    """One of FORMS."""
    if as_number(answer) is not None:
        return "number"
    if boxed(answer):
        return "boxed"
    number = read_number(answer)
    if number is None:
        formula = LATEX.search(answer) or (re.search(r"\d", answer) and not WORD.search(answer))
        return "latex" if formula else "text"
    if number.percent:
        return "percent"
    return "number" if number.value.denominator == 1 or number.decimal else "fraction"


def is_exact(answer: str) -> bool:
    """Whether exact match means something: a number, or words without one."""
    if form(answer) in ("number", "fraction", "percent"):
        return True
    inside = unframed(answer)
    if read_number(inside):
        return True
    return form(inside) == "text" and not re.search(r"\d", inside)


def forms(answers: Sequence[str]) -> str:
    """ "7,400 numbers, 73 fractions"."""
    counts = Counter[str]()
    for answer, times in Counter(answers).items():
        counts[form(answer)] += times
    found = [(counts[name], words) for name, words in FORMS.items() if counts[name]]
    return ", ".join(f"{count:,} {words[count > 1]}" for count, words in found)


def advice(config: Settings, train: Sequence[str], test: Sequence[str]) -> Iterator[str]:
    """What to set where built-in rewards or the evaluation can't read some answers.

    Of functions of one's own nobody knows what they read.
    """
    names = [name for name in config.reward_funcs if name in ANSWER_REWARDS]
    if "math" in names:
        yield from unread_by_math(train)
    elif exact := [name for name in names if name in EXACT]:
        yield from unread_exactly(train, exact, "add math to reward_funcs")
    if "last_number" in names:
        yield from no_numbers(train)
    if config.eval_metric == "em":
        also = "" if "math" in names else ", with math in reward_funcs"
        what = f'set eval_metric = "math"{also}'
        yield from unread_exactly(test, ["exact match"], what)


def unread_exactly(answers: Sequence[str], names: Sequence[str], advice: str) -> Iterator[str]:
    unread = [answer for answer in answers if not is_exact(answer)]
    if unread:
        compare = "compare" if len(names) > 1 else "compares"
        number = counted(len(unread), "answer")
        sample = short(unread[0])
        yield f"{' and '.join(names)} {compare} {number} only to the letter ({sample}): {advice}"


def no_numbers(answers: Sequence[str]) -> Iterator[str]:
    others = [answer for answer in answers if read_number(answer) is None]
    if others:
        number = counted(len(others), "answer")
        yield f"last_number does not apply to {number} that are no numbers ({short(others[0])})"


def unread_by_math(answers: Sequence[str]) -> Iterator[str]:
    different = [answer for answer in dict.fromkeys(answers) if as_number(answer) is None]
    some = different[:: max(1, len(different) // LOOKED_AT)][:LOOKED_AT]
    unread = [a for a in some if len(a) > LONGEST or not read(a).readable]
    if unread:
        of = "" if len(some) == len(different) else f" of {len(some)} looked at"
        yield (
            f"math can't read {counted(len(unread), 'answer')}{of} ({short(unread[0])}): it does "
            "not apply there; write the answer alone into the answer column"
        )


def short(answer: str) -> str:
    return shown(answer if len(answer) <= CUT else f"{answer[:CUT]}...")
