"""Log-probabilities of completions: the script's `token_logprobs`, faster and in less memory.

* The vocabulary projection (the head) is applied only to the hidden states that are scored, in
  pieces one after the other, so that the logits of no more than one piece exist.
* A prompt is read once for its group. Its completions attend to its keys and values, and through
  them their gradients flow back into it.

Before the first update both are compared with the plain way, on a few tokens of the run's own data;
what does not agree for a model's architecture is left out, and said.

Shapes as in the script, and: N scored positions, H hidden size, S tokens of the longest of P shared
prompts, R of the longest row that goes on from one.
"""

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from . import attention, batching, exponentials, runtime
from .batching import Pair
from .console import say
from .memory import MAX_LOGITS, Plan
from .out_of_memory import ran_out
from .prefix import PromptCache, RowCache

INNER = ("model", "transformer", "backbone")
"""Names under which mlx-lm's models keep what maps tokens to hidden states."""

MAX_CHECKED_WINDOW = 4096
"""Longest sliding window that the check goes beyond."""
HALF = (mx.bfloat16, mx.float16)
TOLERANCES, HALF_TOLERANCES = (0.01, 0.02), (0.1, 0.3)
"""Of log-probs (mean, absolute) and gradients (relative), in float32 (which may be TensorFloat32)
and in half precision. What is wrong is wrong by more: 0.8 without the gradient through prompts."""


def named(tree: Any) -> list[tuple[str, mx.array]]:
    """The arrays of a tree with their dotted names."""
    flat: Any = tree_flatten(tree)
    return flat


class StandIn:
    """In place of a model's layers: records what they return, or returns what it was given."""

    def __init__(self, inner: Any, hidden: mx.array | None = None) -> None:
        self.inner, self.hidden = inner, hidden

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        if self.hidden is None:
            self.hidden = self.inner(*args, **kwargs)
        return self.hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def text_model(model: Any) -> Any:
    """The part of a model of text and images that is a language model; itself for the others."""
    while hasattr(model, "language_model"):
        model = model.language_model
    return model


def with_stand_in(model: Any, hidden: mx.array | None = None) -> tuple[Any, StandIn]:
    """A view of the model (all arrays shared) with a stand-in for its layers."""
    view = copy.copy(model)
    name = next(name for name in INNER if hasattr(model, name))
    stand_in = StandIn(getattr(model, name), hidden)
    setattr(view, name, stand_in)
    return view, stand_in


def hidden_states(model: Any, tokens: mx.array, cache: Any = None) -> mx.array:
    """(B, T) tokens -> (B, T, H): what the head gets. Logits are never evaluated."""
    view, stand_in = with_stand_in(text_model(model))
    view(tokens, cache=cache)
    assert stand_in.hidden is not None
    return stand_in.hidden


def head(model: Any, hidden: mx.array) -> mx.array:
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

    @mx.custom_function
    def score(logits: mx.array) -> tuple[mx.array, ...]:
        z = logits.astype(mx.float32) / temperature
        normaliser = exponentials.logsumexp(z)
        chosen = mx.take_along_axis(z, targets[:, None], axis=-1)[:, 0]
        if not with_entropy:
            return (chosen - normaliser,)
        mean = (exponentials.exp(z - normaliser[:, None]) * z).sum(axis=-1)
        return chosen - normaliser, normaliser - mean

    @score.vjp
    def backward(logits: mx.array, cotangents: Any, outputs: Any) -> mx.array:
        return logit_gradient(logits, targets, temperature, cotangents, outputs)

    scores: Any = score(logits)
    return scores


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
    p = exponentials.exp(logp)
    gradient = d_logprob * ((columns == targets) - p)
    if d_entropy is not None and entropy is not None:
        gradient = gradient - d_entropy * p * (logp + entropy)
    return (gradient / temperature).astype(logits.dtype)


_fused_logit_gradient = mx.compile(_logit_gradient)


def head_logprobs(
    model: Any,
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
    own = dict(named(model.trainable_parameters()))
    names = [name for name in names if name in own]
    parameters: list[Any] = [with_row_major_gradient(own[name]) for name in names]

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
    in_parts = mx.custom_function(forward)

    @in_parts.vjp
    def backward(primals: Any, cotangents: Any, scores: Any) -> tuple[mx.array, list[mx.array]]:
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

    scores: Any = in_parts(hidden, parameters)
    return scores


@mx.custom_function
def with_row_major_gradient(weight: mx.array) -> mx.array:
    """The weight itself. Its gradient comes from products with its transpose, so column by column,
    and is added to that of the embedding, row by row: one H200, 16 ms if not made alike first."""
    return weight


@with_row_major_gradient.vjp
def _row_major(weight: mx.array, gradient: mx.array, _: mx.array) -> mx.array:
    return mx.contiguous(gradient)


def _gradient_of(
    targets: mx.array, temperature: float, cotangents: Any, scores: Any, logits: mx.array
) -> mx.array:
    return logit_gradient(logits, targets, temperature, cotangents, scores)


def vjp_of(
    function: Callable, gradient: Callable[[mx.array], mx.array], primals: list[mx.array]
) -> list[mx.array]:
    """Gradients by `primals` when the one by y = function(*primals) is gradient(y), a function of
    the value that `mx.vjp` would want before there is one."""
    end = mx.custom_function(lambda y: mx.zeros(()))
    end.vjp(lambda y, *_: gradient(y))
    return mx.vjp(lambda *x: end(function(*x)), primals, [mx.ones(())])[1]


def with_parameters(
    model: Any, names: Sequence[str], values: Sequence[mx.array], call: Callable[[], Any]
) -> Any:
    """call() while the named trainable parameters are `values`; then the model has its own back."""
    own = dict(named(model.trainable_parameters())) if names else {}
    model.update(tree_unflatten(list(zip(names, values, strict=True))))
    try:
        return call()
    finally:  # what is not supported is found out by its errors
        model.update(tree_unflatten([(name, own[name]) for name in names]))


def shared_hidden_states(
    model: Any, prompts: mx.array, lengths: mx.array, rows: mx.array
) -> mx.array:
    """(P, S) prompts of (P,) lengths, and (B, R) tokens that go on from them -> rows' (B, R, H)."""
    from mlx_lm.models.cache import make_prompt_cache

    read = [PromptCache() for _ in make_prompt_cache(text_model(model))]
    hidden_states(model, prompts, read)
    offsets = mx.repeat(lengths, rows.shape[0] // prompts.shape[0])  # (B,)
    masks: list[mx.array] = []
    return hidden_states(model, rows, [RowCache(cache.state, offsets, masks) for cache in read])


def splitting_problem(model: Any, ids: list[int]) -> str:
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


def head_parameters(model: Any) -> list[str]:
    """Names of the trainable parameters that the logits depend on beside the hidden states."""
    blocks = {id(p) for layer in model.layers for _, p in named(layer.parameters())}
    outside = [(n, p) for n, p in named(model.trainable_parameters()) if id(p) not in blocks]
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


def plain_batch(pairs: Sequence[Pair]) -> dict[str, mx.array]:
    """(B, T) tokens of a few pairs, and a (B, T - 1) mask of the predictions of completions."""
    total = max(len(prompt) + len(ids) for prompt, ids in pairs)
    tokens = np.zeros((len(pairs), total), np.int32)
    mask = np.zeros((len(pairs), total - 1), np.float32)
    for row, (prompt, ids) in enumerate(pairs):
        end = len(prompt) + len(ids)
        tokens[row, :end] = prompt + ids
        mask[row, len(prompt) - 1 : end - 1] = 1
    return {"tokens": mx.array(tokens), "mask": mx.array(mask)}


def gradient_of_first(
    model: Any, scorer: Any, batch: dict[str, mx.array]
) -> tuple[mx.array, list[mx.array]]:
    """(N,) log-probs of completions, and the gradient of a mix of them by a few small parameters of
    the first trained block."""
    trained = (layer for layer in model.layers if named(layer.trainable_parameters()))
    block = next(trained)
    smallest = sorted(named(block.trainable_parameters()), key=lambda item: item[1].size)[:4]
    names = [name for name, _ in smallest]
    mask = batch["mask"]
    signs = mx.where(mx.arange(mask.size).reshape(mask.shape) % 3, 1.0, -1.0)  # (B, W)

    def mixed(values: list[mx.array]) -> tuple[mx.array, mx.array]:
        run = partial(scorer, model, batch, 1.0)
        logprobs, _ = with_parameters(block, names, values, run)
        logprobs = logprobs * mask
        return (logprobs * signs).sum(), logprobs

    (_, logprobs), gradient = mx.value_and_grad(mixed)([value for _, value in smallest])
    return logprobs.sum(axis=1) / mask.sum(axis=1), gradient


def disagreement(
    model: Any, expected: tuple[mx.array, list[mx.array]], got: tuple[mx.array, list[mx.array]]
) -> str:
    """What is too far apart of (values, gradients), in words; empty if nothing is."""
    if expected[0].shape != got[0].shape:
        return f"what is computed has shape {got[0].shape} instead of {expected[0].shape}"
    half = any(p.dtype in HALF for _, p in named(model.parameters()))
    most = HALF_TOLERANCES if half else TOLERANCES
    apart = float(mx.abs(expected[0] - got[0]).mean())
    if not apart <= most[0]:
        return f"what is computed differs by {apart:.2g} from the plain way"
    gradients = [[g.astype(mx.float32) for g in side] for side in (expected[1], got[1])]
    error = sum(float(mx.square(a - b).sum()) for a, b in zip(*gradients, strict=True))
    norm = sum(float(mx.square(a).sum()) for a in gradients[0])
    relative = math.sqrt(error / norm) if norm else 0.0
    return "" if relative <= most[1] else f"gradients differ by {relative:.2g} from the plain way"


class Scorer:
    """Scores the micro-batches that it cuts; `plain` is what it must agree with.

    Until `check` has found out what a model's architecture allows, it is the plain way.
    """

    def __init__(self, plain: Callable, compiled: bool) -> None:
        self.plain = plain
        self.shapes = batching.Shapes(
            bucketed=compiled or runtime.platform_name() == "cuda",
            overhead=32 if mx.default_device() == mx.cpu else 1024,
        )
        self.names: list[str] = []  # the trainable parameters of the head
        self.vocabulary = 1
        self.piece, self.keep = MAX_LOGITS, False
        self.splits = self.shares = self.checked = False

    def __call__(
        self,
        model: Any,
        batch: dict[str, mx.array],
        temperature: float,
        with_entropy: bool = False,
    ) -> tuple[mx.array, mx.array | None]:
        """(B, W) log-probs, and entropies if wanted, of the tokens where the batch's mask is 1."""
        if "window" not in batch:
            width = batch["mask"].shape[1]
            return self.plain(model, batch["tokens"], width, temperature, with_entropy)
        if "prompts" in batch:
            tokens = batch["rows"]  # (B', R + 1)
            shared = batch["prompts"], batch["prompt_lengths"], tokens[:, :-1]
            hidden = shared_hidden_states(model, *shared)
        else:
            tokens = batch["tokens"]  # (B, T)
            hidden = hidden_states(model, tokens[:, :-1])
        hidden = hidden.reshape(-1, hidden.shape[-1])[batch["scored"]]  # (N, H)
        targets = tokens[:, 1:].reshape(-1)[batch["scored"]]
        how = temperature, with_entropy, self.piece, self.keep
        scores = head_logprobs(model, self.names, hidden, targets, *how)
        placed = [score[batch["window"]] * batch["mask"] for score in scores]
        return placed[0], placed[1] if with_entropy else None

    def micro_batches(
        self,
        model: Any,
        rows: Sequence[dict[str, Any]],
        responses: Sequence[Any],
        per_row: dict[str, np.ndarray],
        used: Sequence[int],
        plan: Plan,
    ) -> list[dict[str, mx.array]]:
        """The `used` of B row-completion pairs in padded batches; `per_row` arrays are (B,)."""
        pairs = [(row["prompt_ids"], r.ids) for row, r in zip(rows, responses, strict=True)]
        return [
            self.pad(
                [rows[i] for i in pack.rows],
                [responses[i] for i in pack.rows],
                {name: values[pack.rows] for name, values in per_row.items()},
                pack,
            )
            for pack in self.pack(model, pairs, used, plan)
        ]

    def pad(
        self,
        rows: Sequence[dict[str, Any]],
        responses: Sequence[Any],
        per_row: dict[str, np.ndarray] | None = None,
        pack: batching.Pack | None = None,
    ) -> dict[str, mx.array]:
        """(B, T) tokens, prompt then completion then padding, and the (B, W) windows for the loss.

        The window is the last W of the T - 1 predictions: wide enough for every completion. Rows
        that only fill up the batch have mask and weight 0. A `pack` adds what `__call__` reads
        instead of the tokens.
        """
        pairs = [(row["prompt_ids"], r.ids) for row, r in zip(rows, responses, strict=True)]
        length, count = self.shapes.length, self.shapes.rows(len(pairs))
        total = 1 + length(max(len(prompt) + len(ids) for prompt, ids in pairs) - 1)
        width = length(total - min(len(prompt) for prompt, _ in pairs))
        tokens = np.zeros((count, total), np.int32)
        mask, sampled = np.zeros((2, count, width), np.float32)
        for i, (prompt, ids) in enumerate(pairs):
            end = len(prompt) + len(ids)
            tokens[i, :end] = prompt + ids
            # The prediction of token t stands at t - 1, and the window starts at total - 1 - width.
            window = slice(len(prompt) + width - total, end + width - total)
            mask[i, window] = 1
            sampled[i, window] = responses[i].logprobs
        arrays = {"tokens": tokens, "mask": mask, "sampler_logprobs": sampled}
        for name, values in (per_row or {}).items():
            arrays[name] = np.pad(np.asarray(values, np.float32), (0, count - len(pairs)))
        if pack:
            arrays |= self.layout(pack, pairs, mask, total)
        return {name: mx.array(x) for name, x in arrays.items()}

    def pack(
        self, model: Any, pairs: Sequence[Pair], used: Sequence[int], plan: Plan
    ) -> list[batching.Pack]:
        """Cut the `used` pairs of an update into micro-batches of as many tokens as planned."""
        self.piece, self.keep = plan.piece_logits, plan.keep_logits
        if used and not self.checked:
            self.check(model, [pairs[i] for i in used])
        numbers: dict[tuple[int, ...], int] = {}  # prompt -> group
        rows = [
            batching.Row(
                i,
                numbers.setdefault(tuple(pairs[i][0]), len(numbers)),
                len(pairs[i][0]),
                len(pairs[i][1]),
            )
            for i in used
        ]
        pack = batching.pack_groups if self.shares else batching.pack_rows
        most = math.inf if self.splits else MAX_LOGITS // self.vocabulary
        return pack(rows, int(min(plan.micro_batch_tokens, most)), self.shapes)

    def layout(
        self, pack: batching.Pack, pairs: Sequence[Pair], mask: np.ndarray, total: int
    ) -> dict[str, np.ndarray]:
        """What `__call__` reads beside (B, total) tokens and their (B, W) mask."""
        if pack.shared:
            left = iter(pairs)
            groups = [[next(left) for _ in group] for group in pack.groups]
            return batching.layout_groups(groups, mask, self.shapes)
        return batching.layout_rows(mask, total, self.shapes) if self.splits else {}

    def check(self, model: Any, pairs: Sequence[Pair]) -> None:
        """Find out which of the fast ways agree with the plain one for this model."""
        attention.install(model)
        self.vocabulary = model(mx.zeros((1, 1), mx.int32)).shape[-1]  # its shape: never evaluated
        problem = splitting_problem(model, pairs[0][0])
        self.checked = True
        if problem:
            say(f"scoring   logits of all positions at once: {problem}")
            return
        self.splits = True
        self.names = head_parameters(model)
        problem = self.sharing_problem(model, pairs)
        self.shares = not problem
        if problem:
            say(f"scoring   every completion reads its own prompt: {problem}")

    def sharing_problem(self, model: Any, pairs: Sequence[Pair]) -> str:
        """Why prompts can't be shared; empty if they can.

        Compares log-probs, and the gradient of the first trained block's smallest parameters, which
        passes through every block above it and through the keys and values of the prompts.
        """
        from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

        kinds = {type(layer) for layer in make_prompt_cache(text_model(model))}
        if other := kinds - {KVCache, RotatingKVCache}:
            return f"this model keeps more than keys and values ({other.pop().__name__})"
        groups = self.sample(model, pairs)
        batch = plain_batch([pair for group in groups for pair in group])
        shared = dict(batch)
        padded = batching.Shapes(bucketed=True)
        arrays = batching.layout_groups(groups, np.array(batch["mask"]), padded)
        shared |= {name: mx.array(values) for name, values in arrays.items()}
        try:
            expected, got = (gradient_of_first(model, self, b) for b in (batch, shared))
            return disagreement(model, expected, got)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            return f"its code refuses ({error})"
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            return f"memory ran out in comparing the two ({error})"

    @staticmethod
    def sample(model: Any, pairs: Sequence[Pair]) -> list[list[Pair]]:
        """Two short prompts with two completions each; longer than a sliding window if there is."""
        from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

        caches = make_prompt_cache(text_model(model))
        windows = [c.max_size for c in caches if isinstance(c, RotatingKVCache)]
        length = 9 + max((w for w in windows if w <= MAX_CHECKED_WINDOW), default=0)
        first, last = pairs[0][0] * length, pairs[-1][0] * 6
        ends = [(pairs[i % len(pairs)][1] * 8)[:n] for i, n in enumerate((8, 5, 3, 7))]
        groups = ((first[-length:], ends[:2]), (last[-6:], ends[2:]))
        return [[(prompt, ids) for ids in both] for prompt, both in groups]
