"""Completions of many prompts in as few batches as memory allows."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from . import caches, out_of_memory, stopping, views
from .stop_rule import StopRule


def sampled(
    trainer: Any,
    sample_batch: Callable[..., list[Any]],
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
        RunError: out of memory again, or the policy's probabilities are not numbers.
    """
    stop = StopRule(trainer.tokenizer, how.stop_strings)
    prompts, group = [row["prompt_ids"] for row in rows], len(keys) // len(rows)

    def in_batches() -> list[Any]:
        trainer.reward_calls.reset()  # what began on batches that did not fit
        policy = views.joined(model, trainer.plan.spare_for_rollouts)
        completions: list[Any] = []
        for chunk in caches.batches(policy, len(keys), group, trainer.plan.rollout_batch_size):
            first, last = chunk[0] // group, chunk[-1] // group
            completions += sample_batch(
                policy,
                prompts[first : last + 1],
                [n // group - first for n in chunk],
                np.stack(keys[chunk[0] : chunk[-1] + 1]),
                how,
                stop,
                partial(trainer.pulse, "sampling"),
            )
            for completion in completions[-len(chunk) :]:
                completion.text = trainer.args.reasoning_prefix + completion.text
            after_batch(completions)
        return completions

    completions = out_of_memory.sampled(trainer, in_batches, len(keys))
    stopping.refuse_broken_policy(completions)
    return completions
