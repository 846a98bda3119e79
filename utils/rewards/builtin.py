"""Rewards beyond those in the script: the last number, equivalent mathematics, length, repetition.

They take TRL's keywords; parameters with a default are what `reward_kwargs` may set, and `max_len`
is max_new_tokens unless it is set. Lengths are sampled tokens, the stop token included.
"""

import math
import re
from collections.abc import Callable

from .answers import last_text, same_answer
from .importing import Rewards
from .mathematics import equivalent, import_math_verify
from .number_forms import read_number
from .scoring_models import RewardModel
from .servers import Judge, RemoteReward

# A minus between two operands is none of the number: the last one of "12-5" is 5.
NUMBERS = re.compile(
    r"(?:(?<![\w)\]])[-+])?\$?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)", re.ASCII
)


def table(extract_answer: Callable[[str], str], correctness: Callable[..., list]) -> Rewards:
    """The built-in rewards of this folder by name, with the script's reading of answers."""

    def math_reward_func(completions: list, answer: list[str], **_: object) -> list[float | None]:
        """1.0 for an equivalent answer, None where the expected one can't be read."""
        import_math_verify()  # complains before anything is loaded
        texts = [last_text(c) for c in completions]
        given = [extract_answer(text) or text for text in texts]
        values = [equivalent(g, str(a)) for g, a in zip(given, answer, strict=True)]
        return [None if value is None else float(value) for value in values]

    def cosine_reward_func(
        completions: list,
        completion_ids: list,
        answer: list[str],
        max_len: int = 0,
        min_value_wrong: float = -1.0,
        max_value_wrong: float = -0.5,
        min_value_correct: float = 0.5,
        max_value_correct: float = 1.0,
        **_: object,
    ) -> list[float]:
        """Cosine in the length: short right answers earn most, short wrong ones least."""
        right = correctness(completions=completions, answer=answer)
        bounds = {
            True: (min_value_correct, max_value_correct),
            False: (max_value_wrong, min_value_wrong),  # as in the paper: swapped
        }
        pairs = zip(completion_ids, right, strict=True)
        return [cosine_scaled(len(ids), max_len, *bounds[value > 0]) for ids, value in pairs]

    return {
        "environment": environment_reward_func,
        "last_number": last_number_reward_func,
        "math": math_reward_func,
        "cosine": cosine_reward_func,
        "length": length_reward_func,
        "soft_overlong": soft_overlong_reward_func,
        "repetition": repetition_reward_func,
        "remote_rm": RemoteReward,
        "judge": Judge,
        "reward_model": RewardModel,
    }


def environment_reward_func(completions: list, **columns: list) -> list[float | None]:
    """What the environment of a conversation says of it."""
    return columns.get("environment_rewards") or [None] * len(completions)


def last_number_reward_func(
    completions: list, answer: list[str], **_: object
) -> list[float | None]:
    """1.0 if the last number of the text is the expected one, None where that is no number."""
    given = (last_number(last_text(c)) for c in completions)
    pairs = ((g, str(a)) for g, a in zip(given, answer, strict=True))
    return [None if read_number(a) is None else float(same_answer(g, a)) for g, a in pairs]


def last_number(text: str) -> str:
    """The last number that a text writes ("so 12-5 = $7." ends in "$7"); empty without one."""
    found = NUMBERS.findall(text)
    return found[-1] if found else ""


def cosine_scaled(length: int, max_len: int, at_end: float, at_start: float) -> float:
    """From `at_start` for length 0 to `at_end` for max_len and beyond (arXiv:2502.03373, C.1)."""
    cosine = math.cos(math.pi * min(length / max_len, 1.0))
    return at_end + 0.5 * (at_start - at_end) * (1 + cosine)


def length_reward_func(
    completion_ids: list, max_len: int = 0, target: int = 0, penalty: float = -1.0, **_: object
) -> list[float]:
    """0 up to `target` tokens, then linearly down to `penalty` at max_len."""
    if not 0 <= target < max_len:
        raise ValueError(f"target = {target} must be at least 0 and below max_len = {max_len}")
    over = (max(0, min(len(ids), max_len) - target) for ids in completion_ids)
    return [penalty * tokens / (max_len - target) for tokens in over]


def soft_overlong_reward_func(
    completion_ids: list, max_len: int = 0, cache: int = 0, **_: object
) -> list[float]:
    """DAPO's soft overlong punishment (arXiv:2503.14476, eq. 13): 0 up to max_len - cache, then
    down to -1 at max_len. `cache` 0 is a fifth of max_len, as in the paper."""
    cache = cache or max(1, max_len // 5)
    if not 0 < cache <= max_len:
        raise ValueError(f"cache = {cache} must be above 0 and at most max_len = {max_len}")
    free = max_len - cache
    return [-min(max(0, len(ids) - free) / cache, 1.0) for ids in completion_ids]


def repetition_reward_func(
    completion_ids: list, ngram_size: int = 3, max_penalty: float = -1.0, **_: object
) -> list[float]:
    """max_penalty x the share of token n-grams that repeat an earlier one (arXiv:2502.03373, C.2).

    0 for completions shorter than an n-gram.
    """
    if ngram_size < 1 or max_penalty > 0:
        raise ValueError(
            f"ngram_size = {ngram_size} must be at least 1, max_penalty = {max_penalty} at most 0"
        )
    return [max_penalty * repeated_share(ids, ngram_size) for ids in completion_ids]


def repeated_share(ids: list[int], size: int) -> float:
    ngrams = list(zip(*(ids[i:] for i in range(size)), strict=False))
    return 1 - len({*ngrams}) / len(ngrams) if ngrams else 0.0
