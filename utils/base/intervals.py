"""How sure a share is."""

import math


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
