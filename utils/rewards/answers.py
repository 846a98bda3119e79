"""What a completion answers, and whether that is the expected answer.

docs/rewards.md says which answers are the same, and why.
"""

import re
from decimal import Decimal

from .number_forms import read_number, unframed


def last_text(completion: list) -> str:
    """What the model said last, in a conversation as reward functions get it."""
    own = [m for m in completion if m.get("role", "assistant") == "assistant"]
    return str(own[-1]["content"]) if own else ""


def extract_xml_answer(text: str) -> str:
    """What a completion answers, in its last complete <answer>...</answer>; empty if nothing."""
    for part in reversed(text.split("<answer>")[1:]):
        answer, closing, _ = part.partition("</answer>")
        if closing:
            return answer.strip()
    return ""


NUMBER = re.compile(r"[-+]?\$?(\d{1,3}(,\d{3})+|\d+)(\.\d*)?|[-+]?\$?\.\d+", re.ASCII)


def as_number(text: str) -> Decimal | None:
    """The number that `text` writes plainly ("-3", "$1,234.00"); None for any other way.

    Most answers are such numbers, and this reads them ten times as fast as `read_number`.
    """
    if not NUMBER.fullmatch(text.strip()):
        return None
    return Decimal(text.strip().replace("$", "").replace(",", ""))


def same_answer(given: str, expected: str) -> bool:
    """Equal as numbers where both are numbers, in whatever way they are written, else as text."""
    given, expected = given.strip(), expected.strip()
    if given == expected:
        return True
    plain = as_number(given), as_number(expected)
    if None not in plain:
        return plain[0] == plain[1]
    number = read_number(expected)
    if number and (other := read_number(given)):
        return number.equals(other)
    return as_text(given) == as_text(expected)


def as_text(answer: str) -> str:
    """Without \\boxed{} and $ $ around it, and with one sign for minus; else to the letter."""
    return unframed(answer).replace("\u2212", "-")
