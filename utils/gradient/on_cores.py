"""Micro-batches of an update on several cores at once."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import mlx.core as mx

from ..device import cores
from .micro_batch import MicroBatch

T = TypeVar("T")


def spread(
    work: Callable[[MicroBatch], T], batches: Sequence[MicroBatch], count: int
) -> Iterator[tuple[MicroBatch, T]]:
    """Each batch with work(batch), which MLX has not computed yet unless `count` > 1."""
    for start in range(0, len(batches), count):
        group = batches[start : start + count]
        if len(group) == 1:
            yield group[0], work(group[0])
            continue
        tokens, results = [0] * cores.cores(), []
        for batch in group:
            least = tokens.index(min(tokens))
            tokens[least] += batch.tokens_read
            with mx.stream(cores.streams(cores.cores())[least]):
                results.append(work(batch))
        mx.eval(results)  # together: one after the other, the second would wait for the first
        for batch in group:
            yield batch, results.pop(0)
