"""Prompts that are read once for all their completions, and blocks that are computed twice.

Both stand in for what mlx-lm passes to a block. They belong together because keys and values leave
a block through its cache, where `mx.checkpoint` cannot see them: gradients would be silently wrong.
"""

import copy

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from ..device import runtime
from ..device.marks import GradientCache


class PromptCache(GradientCache):
    """A block's cache while the prompts are read: `state` becomes their (P, K, S, D) keys, values.

    Prompts are padded on the right, where causal attention does not look.
    """

    offset = 0

    def __init__(self) -> None:
        self.state: tuple[mx.array, ...] = ()

    def make_mask(
        self, length: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        from mlx_lm.models.base import create_causal_mask

        if return_array or (window_size and length > window_size):
            return create_causal_mask(length, window_size=window_size)
        return "causal" if length > 1 else None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.state = keys, values
        return keys, values


class CompletionCache(GradientCache):
    """A block's cache while B rows are read that go on from P prompts, B / P each, in order.

    Args:
        state: (P, K, S, D) keys and values of the prompts, S tokens with their padding.
        lengths: (B,) tokens of each row's prompt: the position of its first token.
        masks: collects the masks that are made, because they are no business of the gradient.
    """

    def __init__(
        self, state: tuple[mx.array, ...], lengths: mx.array, masks: list[mx.array]
    ) -> None:
        self.state, self.offset, self.masks = state, lengths, masks

    def make_mask(
        self, length: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array:
        keys = self.state[0]
        lengths = self.offset[:, None, None]  # (B, 1, 1)
        before = mx.arange(keys.shape[2])  # (S,): positions in the prompt
        query, own = mx.arange(length)[:, None], mx.arange(length)  # (R, 1), (R,)
        in_prompt, in_row = before < lengths, query >= own
        if window_size:
            in_prompt = in_prompt & (lengths + query - before < window_size)
            in_row = in_row & (query - own < window_size)
        wide = (lengths.shape[0], length)
        halves = [mx.broadcast_to(m, (*wide, m.shape[-1])) for m in (in_prompt, in_row)]
        mask = mx.concatenate(halves, axis=-1)[:, None]  # (B, 1, R, S + R)
        if runtime.platform_name() == "cuda":
            # MLX would turn it into one for each head, in every block.
            mask = mx.where(mask, mx.array(0, keys.dtype), mx.array(-mx.inf, keys.dtype))
        self.masks.append(mask)
        return mask

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return join(self.state[0], keys), join(self.state[1], values)


def join(prompts: mx.array, rows: mx.array) -> mx.array:
    """(P, K, S, D) and (B, K, R, D) -> (B, K, S + R, D), each prompt before its B / P rows."""
    groups, (count, heads, _, size) = prompts.shape[0], rows.shape
    each = count // groups
    before = mx.broadcast_to(prompts[:, None], (groups, each, *prompts.shape[1:]))
    after = rows.reshape(groups, each, *rows.shape[1:])
    return mx.concatenate([before, after], axis=3).reshape(count, heads, -1, size)


def checkpoint_layers(model: nn.Module) -> None:
    """Gradient checkpointing for the blocks of this model only; rollouts stay as they are.

    `mlx_lm.tuner.trainer.grad_checkpoint` patches the class instead, so every model of the process.
    """
    types = {type(layer): _checkpointed(type(layer)) for layer in model.layers}
    for layer in model.layers:
        object.__setattr__(layer, "__class__", types[type(layer)])


def _checkpointed(layer_type: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a block's type whose forward pass keeps nothing but its inputs."""
    if getattr(layer_type, "checkpointed", False):  # by an earlier trainer of the same model
        return layer_type

    def call(self: nn.Module, *args: object, **kwargs: object) -> object:
        caches = [a for a in (*args, *kwargs.values()) if hasattr(a, "update_and_fetch")]
        cache = caches[0] if caches else PromptCache()
        if not isinstance(cache, PromptCache | CompletionCache):
            return layer_type.__call__(self, *args, **kwargs)
        # MLX keeps `forward` with the arrays that it makes. If it held what holds them, nothing of
        # this circle would ever be freed.
        inner = copy.copy(cache)
        given = tree_map(lambda value: inner if value is cache else value, [list(args), kwargs])
        masks = cache.masks if isinstance(cache, CompletionCache) else []

        def inputs(value: object) -> bool:
            """What has a gradient: closed over, anything else counts as constant."""
            floats = isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating)
            return floats and not any(value is mask for mask in masks)

        arrays: list[mx.array] = []
        tree_map(lambda value: arrays.append(value) if inputs(value) else None, given)

        def forward(
            parameters: dict, state: tuple[mx.array, ...], arrays: list[mx.array]
        ) -> tuple[object, tuple[mx.array, ...]]:
            new = iter(arrays)
            args, kwargs = tree_map(lambda value: next(new) if inputs(value) else value, given)
            own = self.trainable_parameters()
            self.update(parameters)
            inner.state = state
            try:
                return layer_type.__call__(self, *args, **kwargs), inner.state
            finally:
                self.update(own)
                inner.state = ()

        out, cache.state = mx.checkpoint(forward)(self.trainable_parameters(), cache.state, arrays)
        return out

    return type(layer_type.__name__, (layer_type,), {"__call__": call, "checkpointed": True})
