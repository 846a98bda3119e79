"""A gradient in float16 that does not vanish below the smallest number of that type.

The gradient by a logit is the weight of its token in the loss, about 1 / (completions x length),
times a probability, and float16 ends at 6e-8. Unscaled, the relative error against float32 in a
small random model is 0.014 for 64 completions of 256 tokens, 0.07 for 256 of 512 (the default
size), 0.29 for 1,024 of 512, and nothing is left for 1,024 of 4,096; scaled it is 0.008 for all of
them (tests/gradient/test_loss_scale.py).

So the loss is multiplied by a power of two, which is exact in floating point, and its gradient is
divided by it in float32. The largest scale that is safe is taken: a token's share of the loss comes
to at most 1, and all shares of a micro-batch to at most MOST_IN_ALL, since the gradient by a weight
is a sum over tokens, which must not exceed 65,504. Where it does all the same, in a model with
large activations, the update is computed once more with a smaller scale.

bfloat16 has the range of float32 and needs none of this; nothing changes for either.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from ..base.say import say
from ..device.typed import Tree
from .adamw import global_norm
from .head import named_arrays
from .micro_batch import MicroBatch, compiled

MOST_IN_ALL = 2.0**10
LOWER = 2.0**-8
MOST_ATTEMPTS = 6

Loss = Callable[[MicroBatch], tuple[mx.array, Any, Any]]
"""batch -> loss, and what else is wanted."""


def scale_of(batch: MicroBatch) -> float:
    """The largest power of two that is safe for the weights and advantages of a micro-batch."""
    weights, advantages = np.array(batch.weights, float), np.array(batch.advantages, float)
    shares = weights * np.abs(advantages)  # (B,) of each token in the loss
    shares = shares if shares.any() else weights  # only a penalty or a bonus has a gradient
    total = (shares * np.array(batch.mask).sum(axis=1)).sum()
    largest = max(shares.max(), total / MOST_IN_ALL)
    return math.ldexp(1.0, -math.frexp(largest)[1]) if largest > 0 else 1.0


class LossScale:
    """Gradients of a model, scaled where something of it is float16: weights, or the scales of
    quantized ones, since activations have their type."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.needed = any(p.dtype == mx.float16 for _, p in named_arrays(model.parameters()))
        self.attempts = 0

    def value_and_grad(self, loss: Loss, compile: bool) -> Callable[[MicroBatch], Any]:
        """batch -> (what `loss` returns, its gradient by what trains), `compile`d if wanted."""

        def unscaled(batch: MicroBatch) -> Any:
            """The scale is an input, or a compiled function would be compiled for each anew."""
            scale = mx.array(1.0) if batch.scale is None else batch.scale

            def scaled(batch: MicroBatch) -> tuple[mx.array, mx.array, Any, Any]:
                value, *rest = loss(batch)
                return value * scale, value, *rest

            (_, *results), gradient = nn.value_and_grad(self.model, scaled)(batch)
            return tuple(results), tree_map(lambda g: g.astype(mx.float32) / scale, gradient)

        plain = unscaled if self.needed else nn.value_and_grad(self.model, loss)
        function = compiled(plain, self.model) if compile else plain
        if not self.needed:
            return function

        def with_scale(batch: MicroBatch) -> Any:
            scale = scale_of(batch) * LOWER**self.attempts
            return function(dataclasses.replace(batch, scale=mx.array(scale, mx.float32)))

        return with_scale

    def overflowed(self, loss: float, gradient: Tree) -> bool:
        """Whether an update's gradient has overflowed float16, and is to be computed once more.

        A scale is lowered for one update only: what comes next does not depend on what was before,
        so that a resumed run has the same gradients.
        """
        again = self.needed and math.isfinite(loss) and self.attempts + 1 < MOST_ATTEMPTS
        again = again and not math.isfinite(global_norm(gradient))
        self.attempts = self.attempts + 1 if again else 0
        if again:
            share = LOWER**self.attempts
            say(f"float16   the gradient is too large: computed once more at {share:.2g} of it")
        return again
