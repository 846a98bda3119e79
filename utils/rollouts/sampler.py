"""Completions of many prompts in as few batches as memory allows."""

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..base.errors import RunError, UserError
from ..data.completion import Completion
from ..device import cores
from ..memory import this_machine
from ..memory.memory import RolloutSize
from ..memory.plan import HEADROOM
from ..model.loading import LoadedModel
from ..settings.checks import room_for_sampling
from ..settings.run_settings import Settings
from . import caches, merged_layers
from .stop_rule import Reader, StopRule

Batch = Generator[tuple[mx.array, mx.array], None, list[Completion]]
"""Completions of one batch; what it yields, tokens and their log-probs, is to be computed."""


@dataclass(frozen=True)
class Sampling:
    """How to sample; temperature 0 is greedy."""

    temperature: float
    max_tokens: int
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def sampling_settings(
    a: Settings, prefix_tokens: int, temperature: float, max_tokens: int
) -> Sampling:
    """By the settings, and by what a completion's limit leaves after the reasoning prefix."""
    max_tokens = min(max_tokens, room_for_sampling(a, prefix_tokens))
    if temperature == 0:  # the best token is in every filter
        return Sampling(temperature, max_tokens)
    return Sampling(temperature, max_tokens, a.top_k, a.top_p, a.min_p)


class Sampler:
    """Asks a policy, with everything about asking that does not change during a run.

    Args:
        sample_batch: The script's, which samples one batch: (policy, prompts, rows, keys, how,
            reader) -> Batch.
        stop: Where completions end, and the text that they begin with.
        memory: How much is sampled at once.
        pulse: Called with "sampling" every now and then; may raise to stop.
    """

    def __init__(
        self,
        sample_batch: Callable[..., Batch],
        stop: StopRule,
        memory: RolloutSize,
        pulse: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.sample_batch, self.stop, self.memory, self.pulse = sample_batch, stop, memory, pulse

    def __call__(
        self,
        policy: nn.Module,
        prompts: list[list[int]],
        keys: Sequence[np.ndarray],
        how: Sampling,
        so_far: Callable[[list[Completion]], None] = lambda _: None,
    ) -> list[Completion]:
        """len(keys) / len(prompts) completions of each prompt, in order, by (2,) random keys.

        `so_far` gets the completions that are done: none at the start, all at the end. When memory
        runs out, all is done once more in smaller batches, which changes no sample.

        Raises:
            UserError: there are no prompts.
            RunError: out of memory again, or the policy's probabilities are not numbers.
        """
        if not prompts:
            raise UserError("there is nothing to sample: the list of rows is empty")
        longest = max(map(len, prompts)) + how.max_tokens

        def most() -> int:  # less once memory has run out
            return min(self.memory.rows_at_once(longest), len(keys))

        def in_batches() -> list[Completion]:
            so_far([])
            view = merged_layers.joined(policy, self.memory.spare_for_rollouts)
            together = cores.batches_at_once(most())
            places, group = math.ceil(most() / together), len(keys) // len(prompts)
            chunks = list(caches.batches(view, len(keys), group, places, together))
            completions: list[Completion] = []
            for start in range(0, len(chunks), together):
                at_once = chunks[start : start + together]
                readers = [Reader(self.stop, len(c), places, how.max_tokens) for c in at_once]
                batches = [
                    self.batch(view, prompts, keys, how, chunk, reader)
                    for chunk, reader in zip(at_once, readers, strict=True)
                ]
                for finished in cores.in_turns(
                    batches, partial(self.between, readers, completions, so_far)
                ):
                    completions += finished
                so_far(completions)
            return completions

        completions = self.memory.sample(in_batches, most)
        refuse_broken_policy(completions)
        return completions

    def between(
        self,
        readers: Sequence[Reader],
        before: list[Completion],
        so_far: Callable[[list[Completion]], None],
    ) -> None:
        """While batches are sampled: a sign of life, and what is done of them, if that is more."""
        self.pulse("sampling")
        known = sum(len(reader.done) for reader in readers)
        done = list(before)
        for reader in readers:
            done += reader.finished()
            if len(reader.done) < len(reader.rows):
                break
        if sum(len(reader.done) for reader in readers) > known:
            so_far(done)

    def batch(
        self,
        policy: nn.Module,
        prompts: list[list[int]],
        keys: Sequence[np.ndarray],
        how: Sampling,
        chunk: range,
        reader: Reader,
    ) -> Batch:
        """Completions n of `chunk`, each of prompt n // group by keys[n], not yet begun."""
        group = len(keys) // len(prompts)
        first, last = chunk[0] // group, chunk[-1] // group
        rows = [n // group - first for n in chunk]
        own_keys = np.stack([keys[n] for n in chunk])
        return self.sample_batch(policy, prompts[first : last + 1], rows, own_keys, how, reader)


def sampler_of_command(
    sample_batch: Callable[..., Batch], stop: StopRule, a: Settings, loaded: LoadedModel, rows: int
) -> Sampler:
    """For a command that does nothing but sample, `rows` at once.

    It puts a view in the place of the loaded model, unpacked and joined as far as memory allows.
    """
    room = HEADROOM * this_machine.budget_bytes(a) - mx.get_active_memory()
    # What is unpacked or joined goes: both are there only before anything is sampled.
    loaded.model = merged_layers.joined(merged_layers.unpacked(loaded.model, room), room)
    return Sampler(sample_batch, stop, RolloutSize(rows))


def refuse_broken_policy(completions: Sequence[Completion]) -> None:
    """Probabilities that are not numbers train nothing, and may never show in the loss.

    Raises:
        RunError: the weights are broken.
    """
    if not all(math.isfinite(x) for completion in completions for x in completion.logprobs):
        raise RunError(
            "the policy's probabilities are not finite numbers: its weights are broken; go on from "
            "an earlier checkpoint with a lower learning rate, or try dtype = float32"
        )
