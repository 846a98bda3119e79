"""The part of an update that one forward and backward pass reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import mlx.core as mx
import mlx.nn as nn

Gradient = TypeVar("Gradient")


@dataclass
class SharedPrompts:
    """What is read instead of `MicroBatch.tokens` where each of P prompts is read once: S tokens of
    them, R of the rows that go on from them."""

    prompts: mx.array  # (P, S) without their last tokens, which are the first of the rows
    lengths: mx.array  # (P,)
    rows: mx.array  # (B', R + 1), B' / P of each prompt in order


@dataclass
class Layout:
    """Which N predictions the head scores, of all positions that are read."""

    scored: mx.array  # (N,)
    window: mx.array  # (B, W) which of the N belongs where the mask is 1; the first, elsewhere
    shared: SharedPrompts | None = None


@dataclass
class MicroBatch:
    """B sequences of T tokens, of which the loss sees a window, the last W predictions.

    Sequences that only fill up the batch have mask, weight and advantage 0.
    """

    tokens: mx.array  # (B, T) prompt, completion, padding
    mask: mx.array  # (B, W) 1 where a token was sampled; 0 for what was given, and padding
    sampler_logprobs: mx.array  # (B, W)
    advantages: mx.array  # (B,)
    weights: mx.array  # (B,) of each token of a sequence in the loss
    completion: mx.array  # (B,) which one of the update
    layout: Layout | None = None  # None: the plain way

    old_logprobs: mx.array | None = None  # (B, W); None: the current policy is its own anchor
    ref_logprobs: mx.array | None = None  # (B, W); None: there is no KL penalty in the loss
    selected: mx.array | None = None  # (B, W) 1 where there is a policy gradient; None: everywhere
    kl_coeff: mx.array | None = None  # () in force; None: as it is set
    entropy_weight: mx.array | None = None  # () of a token's entropy in the loss
    scale: mx.array | None = None  # () of the loss while its gradient is computed (float16)

    @property
    def count(self) -> int:
        return len(self.mask)

    @property
    def trained(self) -> mx.array:
        """(B, W) 1 where there is a policy gradient."""
        return self.mask if self.selected is None else self.mask * self.selected

    @property
    def tokens_read(self) -> int:
        """By the model: groups may share their prompts."""
        shared = self.layout and self.layout.shared
        return shared.prompts.size + shared.rows.size if shared else self.tokens.size

    def arrays(self) -> dict:
        """As a tree of what is there, which `mx.compile` takes."""
        return tree_of(self)

    @classmethod
    def of_arrays(cls, tree: dict) -> MicroBatch:
        """The batch of which `arrays` made the tree."""
        own = dict(tree)
        if layout := own.pop("layout", None):
            shared = layout.get("shared")
            parts = {**layout, "shared": SharedPrompts(**shared)} if shared else layout
            own["layout"] = Layout(**parts)
        return cls(**own)


def tree_of(part: MicroBatch | Layout | SharedPrompts) -> dict:
    """Field -> array, or the same of a part; without those that are None."""
    return {
        name: tree_of(value) if isinstance(value, Layout | SharedPrompts) else value
        for name, value in vars(part).items()
        if value is not None
    }


def compiled(
    function: Callable[[MicroBatch], Gradient], model: nn.Module
) -> Callable[[MicroBatch], Gradient]:
    """The function of a batch, compiled once for each shape of one."""

    def of_arrays(arrays: dict) -> Gradient:
        return function(MicroBatch.of_arrays(arrays))

    # Weights and random state go in and out, or they would be compiled in as constants.
    state = [model.state, mx.random.state]
    faster = mx.compile(of_arrays, inputs=state, outputs=state)
    return lambda batch: faster(batch.arrays())
