"""Batches on several cores at once: MLX computes each stream of a CPU on one thread."""

import math
import os
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Protocol, TypeVar

import mlx.core as mx

from .typed import Tree

T = TypeVar("T")
MOST = 8  # streams: over all of them, MLX has about a hundred operations under way
EVERY = 0.1  # seconds between signs of life
ROWS = 100  # of a batch on a core of its own: half of 64 would be no faster there


class Config(Protocol):
    """The settings that decide whether cores are used."""

    use_compile: bool
    gradient_checkpointing: bool


def are_used(config: Config) -> bool:
    """Whether cores compute micro-batches of their own: those of a CPU.

    Not compiled ones, which stay on the stream that they were traced on; and not checkpointed ones,
    which take 1.4 times the memory in the order of operations that `take_turns` asks for.
    """
    slow = config.use_compile or config.gradient_checkpointing
    return mx.default_device() == mx.cpu and not slow and cores() > 1


def take_turns(config: Config) -> None:
    """Have MLX order operations broadly, or it dispatches one stream's before it begins another's.

    It reads this once, before the first thing that it computes.
    """
    if are_used(config):
        os.environ.setdefault("MLX_BFS_MAX_WIDTH", "1000")


def cores() -> int:
    """Of those that this process may use, as many as it can keep busy."""
    every = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        every = len(os.sched_getaffinity(0))
    return min(MOST, every)


def batches_at_once(rows: int) -> int:
    """Into how many batches to cut so many rows, to sample each on a core."""
    return max(1, min(cores(), rows // ROWS)) if mx.default_device() == mx.cpu else 1


def in_turns(
    samplers: Sequence[Generator[Tree, None, T]], between: Callable[[], None] = lambda: None
) -> list[T]:
    """What the generators return; what they yield is computed together, before they go on.

    On a stream each if there are several: an evaluation of models/tiny-math on 2 cores takes 1.3 s
    instead of 1.9. Now and then, `between` is called.
    """
    results: dict[int, T] = {}
    called = -math.inf
    while len(results) < len(samplers):
        mx.async_eval(_next_step(samplers, results))
        if time.monotonic() - called > EVERY:
            between()
            called = time.monotonic()
    return [results[i] for i in range(len(samplers))]


def _next_step(samplers: Sequence[Generator[Tree, None, T]], results: dict[int, T]) -> list[Tree]:
    """What those without a result yield next; `results` gets what the others return."""
    step = []
    for i, sampler in enumerate(samplers):
        if i in results:
            continue
        own = mx.stream(streams(cores())[i]) if len(samplers) > 1 else nullcontext()
        try:
            with own:
                step.append(next(sampler))
        except StopIteration as end:
            results[i] = end.value
    return step


@cache
def streams(count: int) -> list[mx.Stream]:
    """Streams of the CPU, the default one first."""
    return [mx.default_stream(mx.cpu), *(mx.new_stream(mx.cpu) for _ in range(count - 1))]
