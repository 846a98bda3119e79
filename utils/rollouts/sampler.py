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
from ..data.files import Row
from ..device import cores
from ..memory.memory import RolloutSize
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
    given: int = 0
    """Tokens that tools and environments may give beside those."""

    @property
    def longest(self) -> int:
        """Tokens of the longest completion."""
        return self.max_tokens + self.given


def sampling_settings(
    a: Settings, prefix_tokens: int, temperature: float, max_tokens: int
) -> Sampling:
    """By the settings, and by what a completion's limit leaves after the reasoning prefix."""
    room = room_for_sampling(a, prefix_tokens)
    max_tokens = min(max_tokens, room)
    given = room - max_tokens if a.has_turns else 0
    if temperature == 0:  # the best token is in every filter
        return Sampling(temperature, max_tokens, given=given)
    return Sampling(temperature, max_tokens, a.top_k, a.top_p, a.min_p, given)


@dataclass(frozen=True)
class Asked:
    """What a call of the sampler is about: keys[n] is for question n // group."""

    questions: Sequence[Row]
    keys: Sequence[np.ndarray]
    how: Sampling

    @property
    def group(self) -> int:
        return len(self.keys) // len(self.questions)


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
        questions: Sequence[Row],
        keys: Sequence[np.ndarray],
        how: Sampling,
        so_far: Callable[[list[Completion]], None] = lambda _: None,
    ) -> list[Completion]:
        """len(keys) / len(questions) completions of each question, in order, by (2,) random keys.

        Of a question, `prompt_ids` are what the model reads.

        `so_far` gets the completions that are done: none at the start, all at the end. When memory
        runs out, all is done once more in smaller batches, which changes no sample.

        Raises:
            UserError: there are no questions.
            RunError: out of memory again, or the policy's probabilities are not numbers.
        """
        if not questions:
            raise UserError("there is nothing to sample: the list of rows is empty")
        asked = Asked(questions, keys, how)
        longest = max(len(question["prompt_ids"]) for question in questions) + how.longest

        def most() -> int:  # less once memory has run out
            return min(self.memory.rows_at_once(longest), len(keys))

        def in_batches() -> list[Completion]:
            so_far([])
            view = merged_layers.joined(policy, self.memory.spare_for_rollouts)
            together = cores.batches_at_once(most())
            places = math.ceil(most() / together)
            chunks = list(caches.batches(view, len(keys), self.alike(asked), places, together))
            completions: list[Completion] = []
            for start in range(0, len(chunks), together):
                at_once = chunks[start : start + together]
                begun = [self.begin(view, asked, chunk, places) for chunk in at_once]
                readers, batches = map(list, zip(*begun, strict=True))
                for finished in cores.in_turns(
                    batches, partial(self.between, readers, completions, so_far)
                ):
                    completions += finished
                so_far(completions)
            return completions

        completions = self.sample(in_batches, most)
        refuse_broken_policy(completions)
        return completions

    def sample(
        self, work: Callable[[], list[Completion]], most: Callable[[], int]
    ) -> list[Completion]:
        """What `work` samples, `most()` at once, or fewer when memory runs out."""
        return self.memory.sample(work, most)

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
            if not reader.all_done:
                break
        if sum(len(reader.done) for reader in readers) > known:
            so_far(done)

    def alike(self, asked: Asked) -> int:
        """How many completions in a row follow the same prompt."""
        return asked.group

    def begin(
        self, policy: nn.Module, asked: Asked, chunk: range, places: int
    ) -> tuple[Reader, Batch]:
        """The batch of the completions n of `chunk`, not yet begun, and who reads it."""
        reader = Reader(self.stop, len(chunk), places, asked.how.max_tokens)
        group = asked.group
        first, last = chunk[0] // group, chunk[-1] // group
        prompts = [question["prompt_ids"] for question in asked.questions[first : last + 1]]
        rows = [n // group - first for n in chunk]
        keys = np.stack([asked.keys[n] for n in chunk])
        return reader, self.sample_batch(policy, prompts, rows, keys, asked.how, reader)


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
