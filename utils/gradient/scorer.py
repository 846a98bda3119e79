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

import math
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ..base.say import say
from ..device import runtime
from ..memory.plan import MAX_LOGITS, Plan
from ..memory.retry import ran_out
from . import packing
from .agreement import (
    MAX_CHECKED_WINDOW,
    disagreement,
    gradient_of_first,
    plain_batch,
    splitting_problem,
)
from .head import head_logprobs, head_parameters, hidden_states, text_model
from .packing import Pair
from .shared_prompts import CompletionCache, PromptCache


def shared_hidden_states(
    model: Any, prompts: mx.array, lengths: mx.array, rows: mx.array
) -> mx.array:
    """(P, S) prompts of (P,) lengths, and (B, R) tokens that go on from them -> rows' (B, R, H)."""
    from mlx_lm.models.cache import make_prompt_cache

    read = [PromptCache() for _ in make_prompt_cache(text_model(model))]
    hidden_states(model, prompts, read)
    offsets = mx.repeat(lengths, rows.shape[0] // prompts.shape[0])  # (B,)
    masks: list[mx.array] = []
    return hidden_states(
        model, rows, [CompletionCache(cache.state, offsets, masks) for cache in read]
    )


class Scorer:
    """Scores the micro-batches that it cuts; `plain` is what it must agree with.

    Until `check` has found out what a model's architecture allows, it is the plain way.
    """

    def __init__(self, plain: Callable, compiled: bool) -> None:
        self.plain = plain
        self.shapes = packing.Shapes(
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
        pack: packing.Pack | None = None,
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
    ) -> list[packing.Pack]:
        """Cut the `used` pairs of an update into micro-batches of as many tokens as planned."""
        self.piece, self.keep = plan.piece_logits, plan.keep_logits
        if used and not self.checked:
            self.check(model, [pairs[i] for i in used])
        numbers: dict[tuple[int, ...], int] = {}  # prompt -> group
        rows = [
            packing.Row(
                i,
                numbers.setdefault(tuple(pairs[i][0]), len(numbers)),
                len(pairs[i][0]),
                len(pairs[i][1]),
            )
            for i in used
        ]
        pack = packing.pack_groups if self.shares else packing.pack_rows
        most = math.inf if self.splits else MAX_LOGITS // self.vocabulary
        return pack(rows, int(min(plan.micro_batch_tokens, most)), self.shapes)

    def layout(
        self, pack: packing.Pack, pairs: Sequence[Pair], mask: np.ndarray, total: int
    ) -> dict[str, np.ndarray]:
        """What `__call__` reads beside (B, total) tokens and their (B, W) mask."""
        if pack.shared:
            left = iter(pairs)
            groups = [[next(left) for _ in group] for group in pack.groups]
            return packing.layout_groups(groups, mask, self.shapes)
        return packing.layout_rows(mask, total, self.shapes) if self.splits else {}

    def check(self, model: Any, pairs: Sequence[Pair]) -> None:
        """Find out which of the fast ways agree with the plain one for this model."""
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
        padded = packing.Shapes(bucketed=True)
        arrays = packing.layout_groups(groups, np.array(batch["mask"]), padded)
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
