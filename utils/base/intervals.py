"""How far a share of right answers may be from that of all questions."""

import math

WIDE = 0.1  # an interval of more than ten points is shown beside the figure
TOO_WIDE = 0.35  # no usual progress leaves one


def wilson(mean: float, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """The interval of a proportion that stays within 0 and 1 (Wilson 1927), of 95 %."""
    centre = mean + z * z / (2 * trials)
    half = z * math.sqrt(mean * (1 - mean) / trials + (z / (2 * trials)) ** 2)
    scale = 1 + z * z / trials
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def percent(mean: float, trials: int) -> str:
    """`24.2% [20.9%, 27.8%]`."""
    low, high = wilson(mean, trials)
    return f"{mean:.1%} [{low:.1%}, {high:.1%}]"


def note(share: float, questions: int) -> str:
    """The interval beside an exact match, where it is wide; empty elsewhere."""
    low, high = wilson(share, questions)
    return f", 95% interval {low:.0%} to {high:.0%}" if high - low > WIDE else ""


def too_few(share: float, questions: int) -> str:
    """What to say where so few questions cannot show progress; empty elsewhere."""
    low, high = wilson(share, questions)
    if high - low <= TOO_WIDE:
        return ""
    few = "1 question is" if questions == 1 else f"{questions} questions are"
    return (
        f"{few} too few to see learning: {share:.0%} may be anything from {low:.0%} to {high:.0%}"
    )
