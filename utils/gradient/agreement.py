"""Whether a fast way computes what the plain one does."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .head import INNER, head, hidden_states, named_arrays, text_model, with_parameters
from .micro_batch import MicroBatch
from .packing import Pair

MAX_CHECKED_WINDOW = 4096
"""Longest sliding window that the check goes beyond."""
HALF = (mx.bfloat16, mx.float16)
TOLERANCES, HALF_TOLERANCES = (0.01, 0.02), (0.1, 0.3)
"""Of log-probs (mean, absolute) and gradients (relative), in float32 (which may be TensorFloat32)
and in half precision. What is wrong is wrong by more: 0.8 without the gradient through prompts."""


def splitting_problem(model: nn.Module, ids: list[int]) -> str:
    """Why head and layers can't be taken apart; empty if they can."""
    model = text_model(model)
    if not any(hasattr(model, name) for name in INNER):
        return f"{type(model).__module__} keeps its layers under an unknown name"
    tokens = mx.array([ids[-16:]])
    try:
        got = head(model, hidden_states(model, tokens).squeeze(0))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        return f"its layers can't be called apart from its head ({error})"
    return disagreement(model, (model(tokens)[0], []), (got, []))


def plain_batch(pairs: Sequence[Pair]) -> MicroBatch:
    """A few pairs as they are, in a window of all T - 1 predictions."""
    total = max(len(prompt) + len(ids) for prompt, ids in pairs)
    tokens = np.zeros((len(pairs), total), np.int32)
    mask = np.zeros((len(pairs), total - 1), np.float32)
    for row, (prompt, ids) in enumerate(pairs):
        end = len(prompt) + len(ids)
        tokens[row, :end] = prompt + ids
        mask[row, len(prompt) - 1 : end - 1] = 1
    none, each = mx.zeros(mask.shape), mx.zeros(len(pairs))
    return MicroBatch(mx.array(tokens), mx.array(mask), none, each, each, each)


Score = Callable[[nn.Module, MicroBatch, float], tuple[mx.array, mx.array | None]]
"""(model, batch, temperature) -> (B, W) log-probs, and entropies or None."""


def gradient_of_first(
    model: nn.Module, scorer: Score, batch: MicroBatch
) -> tuple[mx.array, list[mx.array]]:
    """(N,) log-probs of completions, and the gradient of a mix of them by a few small parameters of
    the first trained block."""
    trained = (layer for layer in model.layers if named_arrays(layer.trainable_parameters()))
    block = next(trained)
    smallest = sorted(named_arrays(block.trainable_parameters()), key=lambda item: item[1].size)[:4]
    names = [name for name, _ in smallest]
    mask = batch.mask
    signs = mx.where(mx.arange(mask.size).reshape(mask.shape) % 3, 1.0, -1.0)  # (B, W)

    def mixed(values: list[mx.array]) -> tuple[mx.array, mx.array]:
        run = partial(scorer, model, batch, 1.0)
        logprobs, _ = with_parameters(block, names, values, run)
        logprobs = logprobs * mask
        return (logprobs * signs).sum(), logprobs

    (_, logprobs), gradient = mx.value_and_grad(mixed)([value for _, value in smallest])
    return logprobs.sum(axis=1) / mask.sum(axis=1), gradient


def disagreement(
    model: nn.Module,
    expected: tuple[mx.array, list[mx.array]],
    got: tuple[mx.array, list[mx.array]],
) -> str:
    """What is too far apart of (values, gradients), in words; empty if nothing is."""
    if expected[0].shape != got[0].shape:
        return f"what is computed has shape {got[0].shape} instead of {expected[0].shape}"
    half = any(p.dtype in HALF for _, p in named_arrays(model.parameters()))
    most = HALF_TOLERANCES if half else TOLERANCES
    apart = float(mx.abs(expected[0] - got[0]).mean())
    if not apart <= most[0]:
        return f"what is computed differs by {apart:.2g} from the plain way"
    relative = relative_error(expected[1], got[1])
    return "" if relative <= most[1] else f"gradients differ by {relative:.2g} from the plain way"


def relative_error(expected: Sequence[mx.array], got: Sequence[mx.array]) -> float:
    """The norm of the differences over that of what is expected, of all arrays together."""
    pairs = [
        (a.astype(mx.float32), b.astype(mx.float32)) for a, b in zip(expected, got, strict=True)
    ]
    error = sum(float(mx.square(a - b).sum()) for a, b in pairs)
    norm = sum(float(mx.square(a).sum()) for a, _ in pairs)
    return math.sqrt(error / norm) if norm else 0.0
