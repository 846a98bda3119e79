"""Completions of many prompts in as few batches as memory allows."""

import math
from collections.abc import Callable, Generator
from functools import partial
from typing import Any

import numpy as np

from ..base.errors import RunError, UserError
from ..device import cores
from ..memory import retry
from . import caches, merged_layers
from .stop_rule import StopRule


def sampled(
    trainer: Any,
    sample_batch: Callable[..., Generator[Any, None, list[Any]]],
    model: Any,
    rows: list[dict[str, Any]],
    keys: list[np.ndarray],
    how: Any,
    after_batch: Callable[[list[Any]], None],
) -> list[Any]:
    """len(keys) / len(rows) completions of each row, by the script's `sample_batch`.

    `after_batch` gets all completions so far. When memory runs out, all is done once more in
    smaller batches, which changes no sample.

    Raises:
        UserError: there are no rows.
        RunError: out of memory again, or the policy's probabilities are not numbers.
    """
    if not rows:
        raise UserError("there is nothing to sample: the list of rows is empty")
    stop = StopRule(trainer.tokenizer, how.stop_strings)
    prompts, group = [row["prompt_ids"] for row in rows], len(keys) // len(rows)
    longest = max(map(len, prompts)) + how.max_tokens

    def most() -> int:  # less once memory has run out
        return min(trainer.plan.rows_at_once(longest), len(keys))

    def sampler(policy: Any, chunk: range) -> Generator[Any, None, list[Any]]:
        """Completion n is the one of prompt n // group by keys[n]."""
        first, last = chunk[0] // group, chunk[-1] // group
        rows = [n // group - first for n in chunk]
        own_prompts, own_keys = prompts[first : last + 1], np.stack([keys[n] for n in chunk])
        completions = yield from sample_batch(policy, own_prompts, rows, own_keys, how, stop)
        for completion in completions:
            completion.text = trainer.args.reasoning_prefix + completion.text
        return completions

    def in_batches() -> list[Any]:
        trainer.reward_calls.reset()  # what began on batches that did not fit
        policy = merged_layers.joined(model, trainer.plan.spare_for_rollouts)
        together = cores.batches_at_once(most())
        chunks = list(caches.batches(policy, len(keys), group, math.ceil(most() / together)))
        completions: list[Any] = []
        for start in range(0, len(chunks), together):
            samplers = [sampler(policy, chunk) for chunk in chunks[start : start + together]]
            for finished in cores.in_turns(samplers, partial(trainer.pulse, "sampling")):
                completions += finished
            after_batch(completions)
        return completions

    completions = retry.sampled(trainer, in_batches, most)
    refuse_broken_policy(completions)
    return completions


def refuse_broken_policy(completions: list[Any]) -> None:
    """Probabilities that are not numbers train nothing, and may never show in the loss.

    Raises:
        RunError: the weights are broken.
    """
    if not all(math.isfinite(x) for completion in completions for x in completion.logprobs):
        raise RunError(
            "the policy's probabilities are not finite numbers: its weights are broken; go on from "
            "an earlier checkpoint with a lower learning rate, or try dtype = float32"
        )
