"""Everything that a run which goes on needs beside weights and optimizer."""

import copy
import random
from dataclasses import dataclass, field, fields
from typing import Any, Self

import mlx.core as mx
import numpy as np

from ..base.text import shown

FORMAT = 2
"""Of checkpoints; the first (up to git revision 3862b3f) did not say so, and is read as well."""

NEWER: dict[str, Any] = {"halved": {}, "groups_kept": 0, "course": {}}
"""What checkpoints of this format may lack."""

Record = dict[str, Any]
"""What the log says of an update or an evaluation."""
Random = dict[str, list]
"""States of the random generators of Python, NumPy and MLX."""


@dataclass
class State:
    """Where a run is. All of it is JSON; lists and dicts change in place: see `copied`."""

    step: int = 0
    """Batches of prompts."""
    update_step: int = 0
    """Optimizer updates."""
    rollout: int = 0
    """Calls of `train_step`."""
    drawn: int = 0
    """Prompts that dynamic sampling took from the stream."""
    last_sync: int = 0
    """Update after which the sampling policy was refreshed."""
    bad_updates: int = 0
    """Updates in a row that were not finite."""
    elapsed: float = 0.0
    """Seconds."""
    kl_coeff: float = 0.0
    """Which `kl_target` moves."""
    reward_moments: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    """Of all rewards: count, mean, sum of squared deviations."""
    measured_factor: float = 1.0
    """Measured over planned memory of a micro-batch."""
    halved: dict[str, int] = field(default_factory=dict)
    """Sizes that memory ran out with, as they are since."""
    history: list[Record] = field(default_factory=list)
    """Evaluations on the test split."""
    pending: list[Record] = field(default_factory=list)
    """Updates that wait for their record."""
    watched: dict[str, Any] = field(default_factory=dict)
    """What the warnings of learning go by."""
    course: dict[str, Any] = field(default_factory=dict)
    """Of rewards and lengths, from the first update on."""
    notes: list[str] = field(default_factory=list)
    """What a person should know of later, for the next record."""
    unreported: tuple[tuple[int, int], list[Record]] | None = None
    """(step, update) before an update that was done but not reported on, and its records."""
    log_bytes: int = 0
    groups_kept: int = 0
    """Prompts in the store of completions."""
    random: Random = field(default_factory=dict)

    def copied(self) -> Self:
        """As it is now: lists are copied, records are shared."""
        other = copy.copy(self)
        for own in fields(self):
            value = getattr(self, own.name)
            setattr(other, own.name, value.copy() if isinstance(value, list | dict) else value)
        return other

    def take(self, counters: dict[str, Any]) -> None:
        """Become what a checkpoint says, in place.

        Raises:
            KeyError: something is missing.
            ValueError: something is not of its kind, or impossible, or of a newer version.
        """
        if counters.get("format", 1) not in range(1, FORMAT + 1):
            raise ValueError(
                f"format = {shown(counters['format'])}: it was written by a newer version, this "
                f"one reads up to {FORMAT}"
            )
        for own in fields(self):
            value = (
                counters.get(own.name, NEWER[own.name]) if own.name in NEWER else counters[own.name]
            )
            check(own.name, value, getattr(self, own.name))
            setattr(self, own.name, value)


def check(name: str, value: object, own: object) -> None:
    """Raise ValueError where a value is not of the kind of our own."""
    if isinstance(own, int | float):
        right = is_count(value, isinstance(own, float), 2**63 if name == "log_bytes" else 2**31)
    elif isinstance(own, list) and name != "reward_moments":
        kind = str if name == "notes" else dict
        right = isinstance(value, list) and all(isinstance(part, kind) for part in value)
    else:
        right = own is None or isinstance(value, type(own))
    if not right:
        raise ValueError(f"{name} = {shown(value)}")


def is_count(value: object, or_part: bool, most: int) -> bool:
    """Whether it is a whole number from 0 to below `most`, or a part of one where that may be."""
    if type(value) is int or (or_part and isinstance(value, float)):
        return 0 <= value < most
    return False


def random_states() -> Random:
    """Sampling has its own keys, but reward functions may draw."""
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, keys.tolist(), *rest],  # type: ignore[union-attr]
        "mlx": np.array(mx.random.state[0]).tolist(),  # type: ignore[index]
    }


def seed_random_states(seed: int) -> None:
    random.seed(seed)
    np.random.seed(np.random.SeedSequence(seed).generate_state(8))
    mx.random.seed(seed)


def restore_random_states(states: Random) -> None:
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(states["numpy"]))
    high, low = states["mlx"]
    mx.random.seed(high << 32 | low)
