"""A model taken apart: hidden states, and log-probabilities of few logits at a time."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..device import fast
from ..device.typed import Tree, with_gradient

T = TypeVar("T")
INNER = ("model", "transformer", "backbone")
"""Names under which mlx-lm's models keep what maps tokens to hidden states."""


def named_arrays(tree: Tree) -> list[tuple[str, mx.array]]:
    """The arrays of a tree with their dotted names."""
    arrays: dict[str, mx.array] = dict(tree_flatten(tree))
    return list(arrays.items())


class StandIn:
    """In place of a model's layers: records what they return, or returns what it was given."""

    def __init__(self, inner: nn.Module, hidden: mx.array | None = None) -> None:
        self.inner, self.hidden = inner, hidden

    def __call__(self, *args: object, **kwargs: object) -> mx.array:
        if self.hidden is None:
            self.hidden = self.inner(*args, **kwargs)
        return self.hidden

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)


def text_model(model: nn.Module) -> nn.Module:
    """The part of a model of text and images that is a language model; itself for the others."""
    while hasattr(model, "language_model"):
        model = model.language_model
    return model


def with_stand_in(model: nn.Module, hidden: mx.array | None = None) -> tuple[nn.Module, StandIn]:
    """A view of the model (all arrays shared) with a stand-in for its layers."""
    view = copy.copy(model)
    name = next(name for name in INNER if hasattr(model, name))
    stand_in = StandIn(getattr(model, name), hidden)
    setattr(view, name, stand_in)
    return view, stand_in


def hidden_states(
    model: nn.Module, tokens: mx.array, cache: Sequence[object] | None = None
) -> mx.array:
    """(B, T) tokens -> (B, T, H): what the head gets. Logits are never evaluated."""
    view, stand_in = with_stand_in(text_model(model))
    view(tokens, cache=cache)
    assert stand_in.hidden is not None
    return stand_in.hidden


def head(model: nn.Module, hidden: mx.array) -> mx.array:
    """(N, H) hidden states -> (N, V) logits, with whatever the model does after its projection."""
    view, _ = with_stand_in(text_model(model), hidden[None])
    # Not [0]: MLX would gather, and scatter in the backward pass: copies of all logits, and 46 of
    # 372 ms (one H200, 1.5B in bfloat16, gradient of 64 completions of 256 tokens).
    return view(mx.zeros((1, hidden.shape[0]), mx.int32)).squeeze(0)


def from_logits(
    logits: mx.array, targets: mx.array, temperature: float, with_entropy: bool
) -> tuple[mx.array, ...]:
    """(N, V) logits, (N,) targets -> float32 (N,) log-probs, and entropies if wanted.

    The backward pass makes one more (N, V) array, of the logits' type.
    """

    def score(logits: mx.array) -> tuple[mx.array, ...]:
        z = logits.astype(mx.float32) / temperature
        normaliser = fast.logsumexp(z)
        chosen = mx.take_along_axis(z, targets[:, None], axis=-1)[:, 0]
        if not with_entropy:
            return (chosen - normaliser,)
        mean = (fast.exp(z - normaliser[:, None]) * z).sum(axis=-1)
        return chosen - normaliser, normaliser - mean

    def backward(
        logits: mx.array, cotangents: Sequence[mx.array], scores: Sequence[mx.array]
    ) -> mx.array:
        return logit_gradient(logits, targets, temperature, cotangents, scores)

    return with_gradient(score, backward)(logits)


def logit_gradient(
    logits: mx.array,
    targets: mx.array,
    temperature: float,
    cotangents: Sequence[mx.array],
    scores: Sequence[mx.array],
) -> mx.array:
    """(N, V) gradient by the logits from those by the (N,) `scores` that `from_logits` returned."""
    chosen = mx.take_along_axis(logits, targets[:, None], axis=-1).astype(mx.float32)
    normaliser = chosen / temperature - scores[0][:, None]
    rest = [column[:, None] for column in (*cotangents, *scores[1:])]
    fuse = mx.default_device() == mx.gpu  # on the CPU it would wait for a C++ compiler
    formula = _fused_logit_gradient if fuse else _logit_gradient
    columns = mx.arange(logits.shape[-1])
    return formula(logits, columns, targets[:, None], mx.array(temperature), normaliser, *rest)


def _logit_gradient(
    logits: mx.array,
    columns: mx.array,
    targets: mx.array,
    temperature: mx.array,
    normaliser: mx.array,
    d_logprob: mx.array,
    d_entropy: mx.array | None = None,
    entropy: mx.array | None = None,
) -> mx.array:
    """d log p = onehot - p and d H = -p (log p + H), both over the temperature."""
    logp = logits.astype(mx.float32) / temperature - normaliser
    p = fast.exp(logp)
    if logits.dtype == mx.float32:  # the rounding of logp is much of 1 - p where p is nearly 1
        p = p / p.sum(axis=-1, keepdims=True)
    gradient = d_logprob * ((columns == targets) - p)
    if d_entropy is not None and entropy is not None:
        gradient = gradient - d_entropy * p * (logp + entropy)
    return (gradient / temperature).astype(logits.dtype)


_fused_logit_gradient = mx.compile(_logit_gradient)


def head_logprobs(
    model: nn.Module,
    names: Sequence[str],
    hidden: mx.array,
    targets: mx.array,
    temperature: float,
    with_entropy: bool = False,
    piece: int = 2**28,
    keep: bool = False,
) -> tuple[mx.array, ...]:
    """(N, H) hidden states, (N,) targets -> (N,) log-probs, and entropies if wanted.

    Pieces of at most `piece` logits are chained by `mx.depends` in both directions, because MLX
    would otherwise make the logits of all before it reduces the first. The backward pass makes them
    again, unless it is to `keep` them. `names` are the trainable parameters that the head uses:
    what a `mx.custom_function` does not take as an argument has no gradient.
    """
    count, vocabulary = hidden.shape[0], head(model, hidden[:1]).shape[-1]
    most = max(1, piece // vocabulary)  # positions of a piece
    size = -(-count // -(-count // most))
    parts = [slice(start, start + size) for start in range(0, count, size)]
    own = dict(named_arrays(model.trainable_parameters()))
    names = [name for name in names if name in own]
    parameters = [with_row_major_gradient(own[name]) for name in names]

    def logits_of(hidden: mx.array, *parameters: mx.array) -> mx.array:
        return with_parameters(model, names, parameters, partial(head, model, hidden))

    def forward(hidden: mx.array, parameters: list[mx.array]) -> tuple[mx.array, ...]:
        scores: list[tuple[mx.array, ...]] = []
        for part in parts:
            chained = mx.depends([hidden[part]], list(scores[-1]) if scores else [])[0]
            logits = logits_of(chained, *parameters)
            scores.append(from_logits(logits, targets[part], temperature, with_entropy))
        return tuple(mx.concatenate([*column]) for column in zip(*scores, strict=True))

    if keep or len(parts) == 1:
        return forward(hidden, parameters)

    def backward(
        primals: tuple[mx.array, list[mx.array]],
        cotangents: Sequence[mx.array],
        scores: Sequence[mx.array],
    ) -> tuple[mx.array, list[mx.array]]:
        hidden, parameters = primals
        d_hidden: list[mx.array] = []
        totals: list[mx.array] = []
        for part in parts:
            chained = mx.depends([hidden[part]], [*d_hidden[-1:], *totals])[0]
            given = [c[part] for c in cotangents]
            gradient = partial(
                _gradient_of, targets[part], temperature, given, [s[part] for s in scores]
            )
            first, *rest = vjp_of(logits_of, gradient, [chained, *parameters])
            d_hidden.append(first)
            pairs = zip(totals, rest, strict=True)
            totals = [total + new for total, new in pairs] if totals else rest
        return mx.concatenate(d_hidden), totals

    return with_gradient(forward, backward)(hidden, parameters)


def _itself(weight: mx.array) -> mx.array:
    return weight


def _row_major(weight: mx.array, gradient: mx.array, _: mx.array) -> mx.array:
    return mx.contiguous(gradient)


with_row_major_gradient = with_gradient(_itself, _row_major)
"""A weight's gradient comes from products with its transpose, so column by column, and is added to
that of the embedding, row by row: one H200, 16 ms if not made alike first."""


def _gradient_of(
    targets: mx.array,
    temperature: float,
    cotangents: Sequence[mx.array],
    scores: Sequence[mx.array],
    logits: mx.array,
) -> mx.array:
    return logit_gradient(logits, targets, temperature, cotangents, scores)


def vjp_of(
    function: Callable[..., mx.array],
    gradient: Callable[[mx.array], mx.array],
    primals: list[mx.array],
) -> list[mx.array]:
    """Gradients by `primals` when the one by y = function(*primals) is gradient(y), a function of
    the value that `mx.vjp` would want before there is one."""
    end = with_gradient(lambda y: mx.zeros(()), lambda y, *_: gradient(y))
    return mx.vjp(lambda *x: end(function(*x)), primals, [mx.ones(())])[1]


def with_parameters(
    model: nn.Module, names: Sequence[str], values: Sequence[mx.array], call: Callable[[], T]
) -> T:
    """call() while the named trainable parameters are `values`; then the model has its own back."""
    own = dict(named_arrays(model.trainable_parameters())) if names else {}
    model.update(tree_unflatten(list(zip(names, values, strict=True))))
    try:
        return call()
    finally:  # what is not supported is found out by its errors
        model.update(tree_unflatten([(name, own[name]) for name in names]))


def head_parameters(model: nn.Module) -> list[str]:
    """Names of the trainable parameters that the logits depend on beside the hidden states."""
    blocks = {id(p) for layer in model.layers for _, p in named_arrays(layer.parameters())}
    outside = [(n, p) for n, p in named_arrays(model.trainable_parameters()) if id(p) not in blocks]
    names = [name for name, _ in outside]
    hidden = hidden_states(model, mx.zeros((1, 1), mx.int32))[0]
    hidden = mx.random.normal(hidden.shape, key=mx.random.key(0)).astype(hidden.dtype)

    def logits(*values: mx.array) -> mx.array:
        return with_parameters(model, names, values, partial(head, model, hidden))

    values = [value for _, value in outside]
    if not values:
        return []
    _, gradients = mx.vjp(logits, values, [mx.ones_like(logits(*values))])
    return [n for n, g in zip(names, gradients, strict=True) if bool(mx.any(g != 0))]
