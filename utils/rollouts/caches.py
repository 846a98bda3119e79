"""KV caches of a rollout batch: each prompt is read once, and its cache is copied to its group.

Three kinds, whichever the model's own caches allow:

* plain KV caches in every layer (most models): `RolloutCache`, with one set of positions and one
  mask for all layers; no mask when all rows begin at the same position;
* caches that mlx-lm can merge (rotating ones, recurrent state, mixtures): mlx-lm's batch caches;
* any other: the rows of one prompt, which need no padding, in caches of the model's own kind.
"""

import functools
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, ParamSpec, Protocol, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..base.say import say
from ..device.marks import DecodeCache, Rotated

STEP = 256  # positions by which a cache grows, as mlx-lm's; utils/memory/plan.py counts on it
PREFILL_TOKENS = 16_384  # of all prompts in one forward pass; longer ones are read in pieces
NOTHING = mx.zeros((0, 0, 0, 0))  # what a cache holds before its first token

P = ParamSpec("P")
R = TypeVar("R")
Layer = Any
"""One layer's cache: ours, or one of mlx-lm's, whose kinds have no method in common."""
Cache = list[Layer]


class Waiting(Protocol):
    """Rows that leave a batch and come back (rollouts/waiting.py)."""

    def save(self, cache: Cache, staying: int, rows: list[int]) -> None:
        """Before rows leave the batch, in which some stay, and to which those come back that go on
        from the prompts `rows`."""

    def read(
        self, model: nn.Module, prompts: list[list[int]], rows: list[int], max_tokens: int
    ) -> Cache | None:
        """The cache of rows that have left before; None where they have not."""


def batches(
    model: nn.Module, count: int, group: int, places: int, together: int = 1
) -> Iterator[range]:
    """Cut `count` rows, `group` of each prompt, into batches with so many `places` each.

    In as many as are sampled `together`, if a row can have any place that another has left.
    Otherwise in batches of `places` rows, and of one prompt.
    """
    refillable = _can_batch(model)
    size = -(-count // together) if refillable else places
    start = 0
    while start < count:
        end = min(start + size, count)
        if not refillable:
            end = min(end, start - start % group + group)
        yield range(start, end)
        start = end


def _can_batch(model: nn.Module) -> bool:
    """Whether rows of prompts of different lengths can be in one batch."""
    from mlx_lm.models.cache import make_prompt_cache

    if type(model).__module__.endswith(".afm7"):
        _say_once(
            "rollouts  one prompt at a time: afm7 of mlx-lm counts a batch's padding as tokens"
        )
        return False
    return all(map(_is_mergeable, make_prompt_cache(model))) and _takes_masks(model)


def _takes_masks(model: nn.Module) -> bool:
    """Whether a batch with padding goes through; only shapes are checked, nothing is computed."""
    try:
        rows = [0, 1] * 11  # no number of heads, with which these could be confused
        cache = prefill(model, [[0, 0, 0], [0, 0]], rows, 2)
        model(mx.zeros((len(rows), 1), mx.int32), cache=cache)
    except ValueError:  # gemma2 of mlx-lm 0.32: its own attention can't broadcast (B, 1, 1, N)
        name = type(model).__module__.rpartition(".")[2]
        _say_once(f"rollouts  one prompt at a time: {name} of mlx-lm can't mask a batch's padding")
        return False
    return True


def _is_mergeable(layer: Layer) -> bool:
    parts = getattr(layer, "caches", None)  # of a CacheList
    if parts is not None:
        return all(map(_is_mergeable, parts))
    if not hasattr(layer, "merge"):
        _say_once(f"rollouts  one prompt at a time: mlx-lm can't batch {type(layer).__name__}")
        return False
    return True


_say_once = functools.cache(say)


def prefill(model: nn.Module, prompts: list[list[int]], rows: list[int], max_tokens: int) -> Cache:
    """The cache, one per layer, of `rows` (indices into `prompts`).

    It holds all but the last token of each prompt, and has room for `max_tokens` from there on.
    The prompts of the rows must be one where `batches` keeps them apart.
    """
    from mlx_lm.models.cache import KVCache, make_prompt_cache

    used = sorted({*rows})
    prompts, rows = [prompts[row] for row in used], [used.index(row) for row in rows]
    layers = make_prompt_cache(model)
    if all(type(layer) is KVCache for layer in layers):
        return _row_caches(model, layers, prompts, rows, max_tokens)
    if all(map(_is_mergeable, layers)):
        return _merged_caches(model, prompts, rows)
    assert len(prompts) == 1, f"{type(layers[0]).__name__} can't hold several prompts"
    _read(model, layers, [prompts[0][:-1]])
    keep_rows(layers, rows)
    return layers


def refill(
    cache: Cache,
    keep: list[int],
    model: nn.Module,
    prompts: list[list[int]],
    rows: list[int],
    max_tokens: int,
    waiting: Waiting | None = None,
) -> None:
    """Keep the rows `keep`, and put `rows` (indices into `prompts`) behind them, as `prefill` has
    them, or `waiting`, which knows rows that have left before."""
    if waiting:
        waiting.save(cache, len(keep), rows)
    if not rows:
        if keep:  # else all is sampled
            keep_rows(cache, keep)
        return
    new = waiting.read(model, prompts, rows, max_tokens) if waiting else None
    new = new or prefill(model, prompts, rows, max_tokens)
    if isinstance(cache[0], RolloutCache):
        shared, index = cache[0].rows, mx.array(keep, mx.int32)
        unused = shared.keep(keep)
        shift = shared.extend(new[0].rows, cache[0].end - unused, max_tokens)
        for layer, other in zip(cache, new, strict=True):
            layer.refill(index, unused, other, shift)
    elif keep:
        keep_rows(cache, keep)
        for layer, other in zip(cache, new, strict=True):
            layer.extend(other)
    else:
        cache[:] = new


def keep_rows(cache: Cache, keep: list[int]) -> None:
    """Drop all rows but `keep` (indices in order) from every layer."""
    index = mx.array(keep)
    shared = cache[0].rows if isinstance(cache[0], RolloutCache) else None
    unused = shared.keep(keep) if shared is not None else None
    for layer in cache:
        if unused is not None:
            layer.keep(index, unused)
        elif hasattr(layer, "filter"):
            layer.filter(index)
        else:  # the batch is the first axis of everything that a cache holds
            held = layer.__dict__
            held.update({name: _taken(value, index) for name, value in held.items()})


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """The function compiled where that pays: fewer launches on a GPU; nothing to gain on a CPU."""
    return function if mx.default_device() == mx.cpu else mx.compile(function)


def _taken(value: object, index: mx.array) -> object:
    if isinstance(value, (list, tuple)):
        return type(value)(_taken(part, index) for part in value)
    return value[index] if isinstance(value, mx.array) and value.ndim > 1 else value


def _read(model: nn.Module, cache: Cache, prompts: list[list[int]]) -> None:
    """Run the model over right-padded token lists, if they have any; only caches are evaluated."""
    longest = max(map(len, prompts))
    tokens = mx.array([prompt + [0] * (longest - len(prompt)) for prompt in prompts])
    piece = max(3, PREFILL_TOKENS // len(prompts))
    starts = list(range(0, longest, piece))
    if longest % piece == 1 < longest:
        starts[-1] -= 1  # one token alone is a step of decoding to mlx-lm's rotating batch caches
    for start, end in pairwise([*starts, longest]):
        model(tokens[:, start:end], cache=cache)
        if longest > piece:
            mx.eval([layer.state for layer in cache])
            mx.clear_cache()


def _row_caches(
    model: nn.Module, layers: Cache, prompts: list[list[int]], rows: list[int], max_tokens: int
) -> Cache:
    # Padding comes later than its prompt, so no token of the prompt sees it.
    _read(model, layers, [prompt[:-1] for prompt in prompts])
    lengths = [len(prompt) - 1 for prompt in prompts]
    shared = Rows([lengths[row] for row in rows], max_tokens)
    width, index = max(lengths), mx.array(rows)
    caches = [RolloutCache(shared) for _ in layers]
    for cache, layer in zip(caches, layers, strict=True) if shared.width else ():
        # Cut to what is in use: a capacity of 256, 512, ... makes MLX on CUDA take cuDNN for one
        # query, which is slower than its own kernel (64 rows, H200: 4.6 against 3.9 ms a step).
        keys, values = (_at_the_end(x, lengths, width) for x in (layer.keys, layer.values))
        cache.keys = mx.take(keys[:, :, width - shared.width :], index, axis=0)
        cache.values = mx.take(values[:, :, width - shared.width :], index, axis=0)
    return caches


def _at_the_end(x: mx.array, lengths: list[int], width: int) -> mx.array:
    """(P, heads, T, D) -> (P, heads, width, D), the first `lengths` of each moved to the end."""
    if min(lengths) == width:
        return x[:, :, :width]
    index = np.arange(width) - (width - np.array(lengths))[:, None]  # (P, width)
    return mx.take_along_axis(x, mx.array(np.maximum(index, 0))[:, None, :, None], axis=2)


def _merged_caches(model: nn.Module, prompts: list[list[int]], rows: list[int]) -> Cache:
    from mlx_lm.models.cache import make_prompt_cache

    caches = [make_prompt_cache(model) for _ in prompts]
    ragged = len({*map(len, prompts)}) > 1
    # Not every recurrent model keeps padding out of its state: those read one prompt at a time.
    alone = ragged and not all(hasattr(layer, "offset") for layer in caches[0])
    for prompt, cache in zip(prompts, caches, strict=True) if alone else ():
        _read(model, cache, [prompt[:-1]])
    merged = [layers[0].merge(list(layers)) for layers in zip(*caches, strict=True)]
    if not alone:
        _read_together(model, merged, prompts)
    keep_rows(merged, rows)
    return merged


def _read_together(model: nn.Module, merged: Cache, prompts: list[list[int]]) -> None:
    """Read prompts of any lengths into caches that hold them all."""
    lengths = [len(prompt) - 1 for prompt in prompts]
    padding = [max(lengths) - length for length in lengths]
    padded = merged if any(padding) else []
    for layer in padded:
        layer.prepare(lengths=lengths, right_padding=padding)
    _read(model, merged, [prompt[:-1] for prompt in prompts])
    for layer in padded:
        layer.finalize()


class Rows:
    """What the layers of a batch share: where each row begins, and so what it sees.

    All rows get their next token at the same position. A prompt ends where the batch was when its
    row came; what is before it, in its row, is padding.
    """

    def __init__(self, lengths: list[int], max_tokens: int) -> None:
        self.width = max(lengths)  # positions that the prompts take
        self.limit = self.width + max_tokens  # no position beyond it will be used
        self.longest = self.limit  # tokens of a row
        # Only in a step that is compiled for every position (utils/rollouts/compiled_step.py):
        self.position: mx.array | None = None  # (B,) of the tokens
        self.offset_at_position: mx.array | None = None  # (B,) the same without padding
        self.all_seen = mx.array(True)  # stands for the mask of all that they see
        self.rotated: dict[int, Rotated] = {}  # by id, see noting_rotations in device/cuda
        self._set([self.width - length for length in lengths])

    def _set(self, begins: list[int]) -> None:
        self.begins, self.padded = begins, any(begins)
        # (B,). The sum is on the device: CUDA kernels would read lists from the host's memory.
        self.padding = mx.array(begins) + 0
        mx.async_eval(self.padding)  # or compiled steps would compute it each time
        self._visible: mx.array | None = None  # (B, 1, 1, limit)
        self._offset, self._offset_end = self.padding, -1

    def be_at(self, position: mx.array | None, padding: mx.array) -> None:
        """A step that is compiled for every position begins, or ends with None."""
        self.position, self.padding = position, padding
        self.offset_at_position = None if position is None else position - padding

    def offset(self, end: int) -> mx.array | int:
        """RoPE position of the token at position `end`: one for all, or (B,) where rows differ."""
        if self.offset_at_position is not None:
            return self.offset_at_position
        if not self.padded:
            return end
        if self._offset_end != end:  # once for all layers
            self._offset, self._offset_end = end - self.padding, end
        return self._offset

    def mask(self, end: int, window: int | None) -> mx.array | None:
        """(B, 1, 1, end + 1) what the token at position `end` sees; None: everything.

        With a `window`, only so many tokens up to this one.
        """
        if not self.padded and (window is None or end < window):
            return None
        if self._visible is None:
            behind = mx.arange(self.limit) >= self.padding[:, None]
            self._visible = behind[:, None, None]
        visible = self._visible[..., : end + 1]
        return visible if window is None else visible & (mx.arange(end + 1) > end - window)

    def keep(self, keep: list[int]) -> int:
        """Drop rows. Returns how many positions, from 0 on, only padding is left at: they go."""
        begins = [self.begins[i] for i in keep]
        unused = min(begins, default=0)
        self.limit -= unused
        self._set([begin - unused for begin in begins])
        return unused

    def extend(self, other: "Rows", end: int, max_tokens: int) -> int:
        """Rows of other prompts, which end at position `end`, where the batch is.

        Returns by how many positions all rows move: longer prompts need more room before it.
        """
        shift = max(0, other.width - end)
        self.limit = max(self.limit + shift, end + shift + max_tokens)
        self.longest = max(self.longest, other.longest)
        own = [begin + shift for begin in self.begins]
        self._set(own + [begin + end + shift - other.width for begin in other.begins])
        return shift


class RolloutCache(DecodeCache):
    """One layer's keys and values of the rows of a batch; takes one token at a time."""

    rows: Rows

    def __init__(self, rows: Rows) -> None:
        self.rows, self.end = rows, rows.width  # `end` positions are in use
        self.keys = self.values = NOTHING

    @property
    def offset(self) -> mx.array | int:
        return self.rows.offset(self.end)

    def make_mask(
        self, count: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | None:
        assert count == 1
        if self.rows.position is None:
            return self.rows.mask(self.end, window_size)
        everything = window_size is None or self.rows.longest <= window_size
        return self.rows.all_seen if everything else None

    def make_room(self, keys: mx.array, values: mx.array) -> None:
        """Room for one token more, of keys and values like these, if there is none."""
        if self.end >= self.keys.shape[2]:
            room = min(STEP, max(1, self.rows.limit - self.end))
            self.keys = _grown(self.keys, keys, room)
            self.values = _grown(self.values, values, room)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Store (B, heads, 1, head size) at the next position; returns all positions in use.

        In a step compiled for every position, device/cuda/attention.py stores them, and takes
        what is in use from here.
        """
        if self.rows.position is not None:
            return keys, values
        self.make_room(keys, values)
        end = self.end = self.end + 1
        self.keys[:, :, end - 1 : end], self.values[:, :, end - 1 : end] = keys, values
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """Of all positions in use; afm7 has layers that attend to those of another."""
        return self.keys[:, :, : self.end], self.values[:, :, : self.end]

    def keep(self, index: mx.array, unused: int) -> None:
        """Keep the rows of `index`, without the first, `unused` positions."""
        self.keys, self.values = (x[:, :, unused:][index] for x in (self.keys, self.values))
        self.end -= unused

    def refill(self, index: mx.array, unused: int, other: "RolloutCache", shift: int) -> None:
        """Keep the rows of `index`, without the first, `unused` positions, moved by `shift`; the
        other's come behind them. There is as much room as before, or steps that are compiled would
        be compiled anew."""
        end = self.end - unused + shift
        kept, count = index.size, index.size + len(other.rows.begins)

        def both(own: mx.array, new: mx.array) -> mx.array:
            like = own if own.size else new
            if not like.size:  # prompts of one token, at the first step
                return NOTHING
            shape = count, like.shape[1], max(end, own.shape[2]), like.shape[3]
            joined = mx.zeros(shape, like.dtype)
            if own.size and kept:
                joined[:kept, :, shift:end] = own[:, :, unused : self.end][index]
            if new.size:
                joined[kept:, :, end - new.shape[2] : end] = new
            return joined

        self.keys, self.values = both(self.keys, other.keys), both(self.values, other.values)
        self.end = end


def _grown(stored: mx.array, new: mx.array, room: int) -> mx.array:
    zeros = mx.zeros((*new.shape[:2], room, new.shape[3]), new.dtype)
    return mx.concatenate([stored, zeros], axis=2) if stored.size else zeros
