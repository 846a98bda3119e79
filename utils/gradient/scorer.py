"""Log-probabilities of completions: the script's `token_logprobs`, faster and in less memory.

* The vocabulary projection (the head) is applied only to the hidden states that are scored, in
  pieces one after the other, so that the logits of no more than one piece exist.
* A prompt is read once for its group. Its completions attend to its keys and values, and through
  them their gradients flow back into it.

Both are compared with the plain way when a scorer is made, on a few of the run's own prompts; what
does not agree for a model's architecture is left out, and said.

Shapes as in the script, and: N scored positions, H hidden size, S tokens of the longest of P shared
prompts, R of the longest row that goes on from one.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..base.say import say
from ..data.completion import Completion
from ..device import runtime
from ..memory.plan import MAX_LOGITS, Plan
from ..memory.retry import ran_out
from .agreement import (
    MAX_CHECKED_WINDOW,
    disagreement,
    gradient_of_first,
    plain_batch,
    splitting_problem,
)
from .head import head_logprobs, head_parameters, hidden_states
from .micro_batch import Layout, MicroBatch, SharedPrompts
from .packing import Pack, Pair, Row, Shapes, layout_groups, layout_rows, pack_groups, pack_rows
from .shared_prompts import CompletionCache, PromptCache


def shared_hidden_states(model: nn.Module, shared: SharedPrompts) -> mx.array:
    """(B', R, H) of all tokens of the rows but the last."""
    from mlx_lm.models.cache import make_prompt_cache

    read = [PromptCache() for _ in make_prompt_cache(model)]
    hidden_states(model, shared.prompts, read)
    rows = shared.rows[:, :-1]
    offsets = mx.repeat(shared.lengths, rows.shape[0] // shared.prompts.shape[0])  # (B',)
    masks: list[mx.array] = []
    caches = [CompletionCache(cache.state, offsets, masks) for cache in read]
    return hidden_states(model, rows, caches)


class Plain(Protocol):
    """The script's `token_logprobs`."""

    def __call__(
        self, model: nn.Module, tokens: mx.array, width: int, temperature: float, with_entropy: bool
    ) -> tuple[mx.array, mx.array | None]: ...


class Scorer:
    """Cuts updates into micro-batches, and scores them.

    Until `check` has found out what a model's architecture allows, it does so the plain way.

    Args:
        plain: What it must agree with.
        compiled: Whether the gradient is compiled, once per shape.
        first: The model and the prompts to `check` before the first micro-batches are made: when a
            run has said what it is, and where it is met when memory runs out.
    """

    def __init__(
        self,
        plain: Plain,
        compiled: bool,
        first: tuple[nn.Module, Sequence[list[int]]] | None = None,
    ) -> None:
        self.plain, self.unchecked = plain, first
        self.shapes = Shapes(
            bucketed=compiled or runtime.platform_name() == "cuda",
            overhead=32 if mx.default_device() == mx.cpu else 1024,
        )
        self.names: list[str] = []  # the trainable parameters of the head
        self.piece, self.keep = MAX_LOGITS, False
        self.splits = self.shares = False
        self.vocabulary = 1

    def __call__(
        self, model: nn.Module, batch: MicroBatch, temperature: float, with_entropy: bool = False
    ) -> tuple[mx.array, mx.array | None]:
        """(B, W) log-probs, and entropies if wanted, of the tokens where the batch's mask is 1."""
        layout = batch.layout
        if layout is None:
            width = batch.mask.shape[1]
            return self.plain(model, batch.tokens, width, temperature, with_entropy)
        if layout.shared is not None:
            tokens = layout.shared.rows  # (B', R + 1)
            hidden = shared_hidden_states(model, layout.shared)
        else:
            tokens = batch.tokens  # (B, T)
            hidden = hidden_states(model, tokens[:, :-1])
        hidden = hidden.reshape(-1, hidden.shape[-1])[layout.scored]  # (N, H)
        targets = tokens[:, 1:].reshape(-1)[layout.scored]
        how = temperature, with_entropy, self.piece, self.keep
        scores = head_logprobs(model, self.names, hidden, targets, *how)
        placed = [score[layout.window] * batch.mask for score in scores]
        return placed[0], placed[1] if with_entropy else None

    def micro_batches(
        self,
        prompts: Sequence[list[int]],
        completions: Sequence[Completion],
        advantages: np.ndarray,
        weights: np.ndarray,
        used: Sequence[int],
        plan: Plan,
    ) -> list[MicroBatch]:
        """The `used` (indices) of B prompts with their completions, advantages and weights, (B,),
        in padded batches of as many tokens as planned."""
        if self.unchecked:
            self.check(*self.unchecked)
        self.piece, self.keep = plan.piece_logits, plan.keep_logits
        pairs = [(prompt, c.ids) for prompt, c in zip(prompts, completions, strict=True)]
        return [
            self.pad(
                [prompts[i] for i in pack.rows],
                [completions[i] for i in pack.rows],
                advantages[pack.rows],
                weights[pack.rows],
                pack,
            )
            for pack in self.pack(pairs, used, plan.micro_batch_tokens)
        ]

    def pad(
        self,
        prompts: Sequence[list[int]],
        completions: Sequence[Completion],
        advantages: np.ndarray,
        weights: np.ndarray,
        pack: Pack,
    ) -> MicroBatch:
        """The sequences of a pack. The window is wide enough for every completion."""
        length, count = self.shapes.length, self.shapes.rows(len(prompts))
        pairs = [(prompt, c.ids) for prompt, c in zip(prompts, completions, strict=True)]
        total = 1 + length(max(len(prompt) + len(ids) for prompt, ids in pairs) - 1)
        width = length(total - min(map(len, prompts)))
        tokens = np.zeros((count, total), np.int32)
        mask, sampled = np.zeros((2, count, width), np.float32)
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            end = len(prompt) + len(completion.ids)
            tokens[i, :end] = prompt + completion.ids
            # The prediction of token t stands at t - 1, and the window starts at total - 1 - width.
            window = slice(len(prompt) + width - total, end + width - total)
            mask[i, window] = completion.mask
            sampled[i, window] = completion.logprobs

        def per_row(values: np.ndarray | Sequence[int]) -> mx.array:
            return mx.array(np.pad(np.asarray(values, np.float32), (0, count - len(pairs))))

        return MicroBatch(
            mx.array(tokens),
            mx.array(mask),
            mx.array(sampled * mask),
            per_row(advantages),
            per_row(weights),
            per_row(pack.rows),
            self.layout(pack, pairs, [c.mask for c in completions], mask, total),
        )

    def layout(
        self,
        pack: Pack,
        pairs: Sequence[Pair],
        masks: Sequence[list[int]],
        mask: np.ndarray,
        total: int,
    ) -> Layout | None:
        """What is read and scored instead of all of (B, total) tokens: `masks` are those of the
        completions, `mask` is (B, W)."""
        if pack.shared:
            left = iter(pairs)
            groups = [[next(left) for _ in group] for group in pack.groups]
            return layout_groups(groups, masks, mask, self.shapes)
        return layout_rows(mask, total, self.shapes) if self.splits else None

    def pack(self, pairs: Sequence[Pair], used: Sequence[int], budget: int) -> list[Pack]:
        """Which of the `used` pairs of an update go together, at most `budget` tokens each."""
        numbers: dict[tuple[int, ...], int] = {}  # prompt -> group
        rows = [
            Row(
                i,
                numbers.setdefault(tuple(pairs[i][0]), len(numbers)),
                len(pairs[i][0]),
                len(pairs[i][1]),
            )
            for i in used
        ]
        pack = pack_groups if self.shares else pack_rows
        most = math.inf if self.splits else MAX_LOGITS // self.vocabulary
        return pack(rows, int(min(budget, most)), self.shapes)

    def check(self, model: nn.Module, prompts: Sequence[list[int]]) -> None:
        """Find out which of the fast ways agree with the plain one for this model, its copies and
        its reference, on some prompts of the run."""
        self.vocabulary = model(mx.zeros((1, 1), mx.int32)).shape[-1]  # a shape: never evaluated
        problem = splitting_problem(model, prompts[0])
        self.unchecked = None
        if problem:
            say(f"scoring   logits of all positions at once: {problem}")
            return
        self.splits = True
        self.names = head_parameters(model)
        problem = self.sharing_problem(model, prompts)
        self.shares = not problem
        if problem:
            say(f"scoring   every completion reads its own prompt: {problem}")

    def sharing_problem(self, model: nn.Module, prompts: Sequence[list[int]]) -> str:
        """Why prompts can't be shared; empty if they can.

        Compares log-probs, and the gradient of the first trained block's smallest parameters, which
        passes through every block above it and through the keys and values of the prompts.
        """
        from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

        kinds = {type(layer) for layer in make_prompt_cache(model)}
        if other := kinds - {KVCache, RotatingKVCache}:
            return f"this model keeps more than keys and values ({other.pop().__name__})"
        groups = sample_groups(model, prompts)
        pairs = [pair for group in groups for pair in group]
        plain = plain_batch(pairs)
        masks = [[1] * len(ids) for _, ids in pairs]
        layout = layout_groups(groups, masks, np.array(plain.mask), Shapes(bucketed=True))
        shared = dataclasses.replace(plain, layout=layout)
        try:
            expected, got = (gradient_of_first(model, self, b) for b in (plain, shared))
            return disagreement(model, expected, got)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            return f"its code refuses ({error})"
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            return f"memory ran out in comparing the two ({error})"


def sample_groups(model: nn.Module, prompts: Sequence[list[int]]) -> list[list[Pair]]:
    """Two short prompts with two completions each; longer than a sliding window if there is."""
    from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

    caches = make_prompt_cache(model)
    windows = [c.max_size for c in caches if isinstance(c, RotatingKVCache)]
    length = 9 + max((w for w in windows if w <= MAX_CHECKED_WINDOW), default=0)
    first, last = prompts[0] * length, prompts[-1] * 6
    ends = [(prompts[i % len(prompts)] * 8)[:n] for i, n in enumerate((8, 5, 3, 7))]
    groups = ((first[-length:], ends[:2]), (last[-6:], ends[2:]))
    return [[(prompt, ids) for ids in both] for prompt, both in groups]
