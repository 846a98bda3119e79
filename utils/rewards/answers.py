"""What a completion answers, and whether that is the expected answer."""

import re
from decimal import Decimal


def extract_xml_answer(text: str) -> str:
    """What a completion answers, in its last complete <answer>...</answer>; empty if nothing."""
    for part in reversed(text.split("<answer>")[1:]):
        answer, closing, _ = part.partition("</answer>")
        if closing:
            return answer.strip()
    return ""


NUMBER = re.compile(r"[-+]?\$?(\d{1,3}(,\d{3})+|\d+)(\.\d*)?|[-+]?\$?\.\d+", re.ASCII)


def as_number(text: str) -> Decimal | None:
    """The number that `text` writes ("-3", "$1,234.00"); None when it is not just a number."""
    if not NUMBER.fullmatch(text.strip()):
        return None
    return Decimal(text.strip().replace("$", "").replace(",", ""))


def same_answer(given: str, expected: str) -> bool:
    """Equal as numbers where both are numbers ("1,234.00" and "$1234"), else as text."""
    numbers = as_number(given), as_number(expected)
    return numbers[0] == numbers[1] if None not in numbers else given.strip() == expected.strip()
