"""Rewards for the form of an answer: reasoning, then the answer, each in its tags."""

import re

from .answers import extract_xml_answer, last_text
from .calls import Completions

INTEGER = re.compile(r"[-\u2212]?(\d{1,3}(,\d{3})+|\d+)", re.ASCII)


def int_reward_func(completions: Completions, **_: object) -> list[float]:
    """0.5 for an answer that is an integer ("-3" and "1,234" are)."""
    given = (extract_xml_answer(last_text(c)) for c in completions)
    return [0.5 if INTEGER.fullmatch(g) else 0.0 for g in given]


TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")


def well_formed(text: str, between: str, inside: str) -> bool:
    """Exactly one of each tag, in order, nothing else outside but white space.

    `between` separates </reasoning> from <answer>; `inside` must stand at both inner edges of each
    pair of tags. Not one regular expression, whose time could grow faster than the length.
    """
    text = text.strip()
    if [text.count(tag) for tag in TAGS] != [1] * 4:
        return False
    if not (text.startswith(TAGS[0]) and text.endswith(TAGS[3])):
        return False
    reasoning, _, rest = text[len(TAGS[0]) : -len(TAGS[3])].partition(TAGS[1])
    gap, opening, answer = rest.partition(TAGS[2])
    edges = all(t.startswith(inside) and t.endswith(inside) for t in (reasoning, answer))
    return bool(opening) and edges and (gap == between if between else not gap.strip())


def strict_format_reward_func(completions: Completions, **_: object) -> list[float]:
    """0.5 for the tags each on a line of their own."""
    return [0.5 if well_formed(last_text(c), "\n", "\n") else 0.0 for c in completions]


def soft_format_reward_func(completions: Completions, **_: object) -> list[float]:
    """0.5 for the tags in order, however they are spaced."""
    return [0.5 if well_formed(last_text(c), "", "") else 0.0 for c in completions]


def xmlcount_reward_func(completions: Completions, **_: object) -> list[float]:
    """0.25 per complete pair of tags, minus 0.001 per character after </answer>, at least 0."""
    return [xmlcount(last_text(c)) for c in completions]


def xmlcount(text: str) -> float:
    pairs = ((TAGS[0], TAGS[1]), (TAGS[2], TAGS[3]))
    score = 0.25 * sum(
        text.count(a) == text.count(b) == 1 and text.index(a) < text.index(b) for a, b in pairs
    )
    trailing = text.rpartition(TAGS[3])[2].strip() if TAGS[3] in text else ""
    return max(0.0, score - 0.001 * len(trailing))
