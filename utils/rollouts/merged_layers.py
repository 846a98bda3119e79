"""Views of the policy for sampling: the same function in fewer and larger operations.

Decoding is bound by what the host spends on each operation until a batch has hundreds of rows.
A view shares the policy's arrays, except for those that it merges or joins.
"""

import copy
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..device import runtime
from ..device.rounding import random_words, round_at_random
from . import caches, compiled_step

# Layers that the models of mlx-lm which have them apply to one and the same input.
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("c_q", "c_k", "c_v"))


def merged(model: nn.Module, room: float, unpack: bool = False) -> nn.Module:
    """A view with the adapters multiplied out into the weights, which are rounded anew.

    Only for rollouts, whose importance weights correct for the rounding. Quantized layers are
    unpacked if `unpack`, but not on Metal, where products with them are fast: one H200, 1.5B, 64
    rows of 256 tokens took 3.5 s, unpacked 1.8 to 2.1 (`benchmarks/update_cost.py --bits 4`); a
    2-core CPU, `configs/tiny_math.toml` with models/tiny-math in 4 bits, 985 tokens/s, unpacked
    8,200 (without a fast BLAS 806 and 1,320). Else, or where there is no room, they keep their
    adapters beside them, see `LowRank`. The model itself where it has none, or where the new
    weights take more than half of `room` bytes: joining them may take as much again.
    """
    for whole in (True, False) if unpack and _better_unpacked(model) else (False,):
        view = _merged(model, whole)
        if _computed(view, model, room):
            return view
    return model


def unpacked(model: nn.Module, room: float) -> nn.Module:
    """A view with quantized layers unpacked, as `merged` does it, and adapters as they are.

    For evaluations: no adapter is rounded. The model itself on Metal, where nothing is quantized,
    or where the new weights take more than half of `room` bytes.
    """
    from mlx_lm.utils import dequantize_model

    if not _better_unpacked(model):
        return model
    view = copy.deepcopy(model)
    dequantize_model(view)
    return view if _computed(view, model, room) else model


def _better_unpacked(model: nn.Module) -> bool:
    """Whether quantized layers, if it has any, should be unpacked where there is room.

    Not on Metal, and not where scales are bytes (mxfp4): those come out in bfloat16, whatever type
    the model computes in.
    """
    scales = [module.scales for module in model.modules() if "scales" in module]
    floats = all(mx.issubdtype(x.dtype, mx.floating) for x in scales)
    return bool(scales) and floats and runtime.platform_name() != "metal"


def _merged(model: nn.Module, unpack: bool) -> nn.Module:
    """The view, of which nothing is computed yet."""
    from mlx_lm.utils import dequantize_model

    view = copy.deepcopy(model)  # shares arrays
    found = [(n, m) for n, m in view.named_modules() if "lora_a" in m and "linear" in m]
    if found and unpack:
        dequantize_model(view)
    layers = _with_adapters(found)
    layers += [(n, LowRank.of(m)) for n, m in found if LowRank.can_be(m)]
    view.update_modules(tree_unflatten(layers))
    return view


def _with_adapters(found: Sequence[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """In place of those that are on plain linear layers, by name."""
    adapters = [(n, m) for n, m in found if type(m.linear) is nn.Linear]
    keys = mx.random.split(mx.random.key(0), max(1, len(adapters)))
    return [(name, _with_adapter(m, key)) for (name, m), key in zip(adapters, keys, strict=False)]


def _with_adapter(adapter: nn.Module, key: mx.array) -> nn.Module:
    """A linear layer that computes the same. bfloat16 weights are rounded at random.

    Rounding to the nearest would lose all that is less than half a step of the weight, so nearly
    the whole adapter in the first updates; at random, it is there on average.
    """
    dtype = adapter.linear.weight.dtype
    exact = copy.copy(adapter)  # lets its float32 weights go: the view's layers stay a while
    exact.linear = copy.copy(adapter.linear)
    exact.linear.weight = adapter.linear.weight.astype(mx.float32)
    layer = exact.fuse()
    if dtype == mx.bfloat16:
        noise = random_words(layer.weight.size, key).reshape(layer.weight.shape)
        layer.weight = round_at_random(layer.weight, noise)
    layer.weight = layer.weight.astype(dtype)
    return layer


def _computed(view: nn.Module, model: nn.Module, room: float) -> bool:
    """Whether something is new in the view, and takes half of `room` bytes at most: then it is
    computed."""
    new = _new_arrays(view, model)
    if not new or 2 * sum(x.nbytes for x in new) > room:
        return False
    for array in new:  # one by one, for each takes float32 copies while it is made
        mx.eval(array)
    return True


def _new_arrays(view: nn.Module, model: nn.Module) -> list[mx.array]:
    """The view's arrays that the model has not: under another name, without `linear`, or packed."""
    old: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    new: dict[str, mx.array] = dict(tree_flatten(view.parameters()))
    return [x for name, x in new.items() if name not in old or x.shape != old[name].shape]


def joined(model: nn.Module, room: float) -> nn.Module:
    """A view in which linear layers of the same input are one matrix product.

    Returns the model itself where there are none, where the copy of their weights takes more than
    half of `room` bytes, for merging may have taken the other half, and on Metal, where launches
    are cheap and nothing was measured.
    """
    view = copy.deepcopy(model)
    found = _joinable(view)
    size = sum(x.nbytes for _, _, layers in found for layer in layers for x in _arrays(layer))
    if not found or 2 * size > room or runtime.platform_name() == "metal":
        return model
    for module, names, layers in found:
        product = Product(layers)
        for i, name in enumerate(names):
            setattr(module, name, partial(product.part, i))
    if mx.default_device() == mx.cpu:
        share_rotations(view)
    return view


def _joinable(view: nn.Module) -> list[tuple[nn.Module, tuple[str, ...], list[nn.Module]]]:
    """Modules with layers that can be joined: the names of these there, and the layers."""
    return [
        (module, names, [module[name] for name in names])
        for _, module in view.named_modules()
        for names in TOGETHER
        if _alike([module.get(name) for name in names])
    ]


def share_rotations(view: nn.Module) -> None:
    """Let the layers of a view compute the angles of their rotary embedding once a step.

    On a CPU that is most of what `nn.RoPE` takes: 64 rows with offsets of their own 0.09 ms a layer
    for the queries, and again for the keys.
    """
    shared: dict[tuple, Angles] = {}
    for module in list(view.modules()):
        rope = module.get("rope")
        if type(rope) is nn.RoPE and not rope.traditional:
            angles = shared.setdefault((rope.dims, rope.base, rope.scale), Angles(rope))
            module.rope = partial(_rotated, rope, angles)


class Angles:
    """Cosines and sines at the last offset, from what `nn.RoPE` makes of unit vectors."""

    def __init__(self, rope: nn.Module) -> None:
        self.rope = rope
        self.offset: mx.array | int | None = None
        self.factors: tuple[mx.array, mx.array] | None = None

    def __call__(self, offset: mx.array | int, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """(1 or B, 1, 1, D) factors of a number itself, and of the one half a width away."""
        numbers = isinstance(offset, int) and isinstance(self.offset, int)
        same = offset == self.offset if numbers else offset is self.offset
        if same and self.factors is not None:
            return self.factors
        half = self.rope.dims // 2
        unit = mx.repeat(mx.eye(2, dtype=dtype), half, axis=1)[:, None]  # (2, 1, D): 1 in a half
        unit = mx.broadcast_to(unit, (getattr(offset, "size", 1), *unit.shape))
        first, second = mx.split(self.rope(unit, offset=offset), 2, axis=1)
        in_first = mx.arange(2 * half) < half
        factors = mx.where(in_first, first, second), mx.where(in_first, second, first)
        self.offset, self.factors = offset, factors
        return factors


def _rotated(rope: nn.Module, angles: Angles, x: mx.array, offset: mx.array | int = 0) -> mx.array:
    """(B, heads, T, D) -> what `rope` makes of it."""
    if x.shape[2] > 1 or x.shape[3] != rope.dims:
        return rope(x, offset=offset)
    own, other = angles(offset, x.dtype)
    half = rope.dims // 2
    return x * own + mx.concatenate([x[..., half:], x[..., :half]], axis=-1) * other


class LowRank(nn.Module):
    """A quantized linear layer and its adapter (..., H) -> (..., O), in three operations.

    LoRA layers scale and cast their float32 matrices in every step, here that is done once. One
    H200, 1.5B in 4 bits, an update of 16 x 512 tokens: 6.3 s instead of 13.1.
    """

    def __init__(self, linear: nn.Module, a: mx.array, b: mx.array) -> None:
        super().__init__()
        self.linear, self.a, self.b = linear, a, b  # (H, R), (R, O)

    def __call__(self, x: mx.array) -> mx.array:
        return mx.addmm(self.linear(x), x @ self.a, self.b)

    @staticmethod
    def can_be(adapter: nn.Module) -> bool:
        """Whether it is LoRA on a layer whose scales have the type that it computes in: mxfp4's are
        bytes."""
        from mlx_lm.tuner.lora import LoRALinear

        quantized = isinstance(adapter.linear, nn.QuantizedLinear)
        floats = quantized and mx.issubdtype(adapter.linear.scales.dtype, mx.floating)
        return floats and isinstance(adapter, LoRALinear)

    @classmethod
    def of(cls, adapter: nn.Module) -> "LowRank":
        dtype = adapter.linear.scales.dtype  # what the layer computes in
        a = (adapter.scale * adapter.lora_a).astype(dtype)
        return cls(adapter.linear, a, adapter.lora_b.astype(dtype))

    @classmethod
    def joined(cls, layers: list["LowRank"]) -> "LowRank":
        """Layers of the same input as one: each reads its own columns of the common a."""
        a = mx.concatenate([layer.a for layer in layers], axis=1)
        b = mx.zeros((a.shape[1], sum(layer.b.shape[1] for layer in layers)), a.dtype)
        row = column = 0
        for layer in layers:
            end = row + layer.b.shape[0], column + layer.b.shape[1]
            b[row : end[0], column : end[1]] = layer.b
            row, column = end
        return cls(_joined([layer.linear for layer in layers]), a, b)


def _joined(layers: Sequence[nn.Module]) -> nn.Module:
    """Plain linear layers as one, their outputs side by side."""
    layer = copy.copy(layers[0])
    for name in layers[0]:
        layer[name] = mx.concatenate([other[name] for other in layers])
    return layer


def _arrays(layer: nn.Module) -> list[mx.array]:
    arrays: dict[str, mx.array] = dict(tree_flatten(layer.parameters()))
    return list(arrays.values())


def _alike(layers: Sequence[nn.Module | None]) -> bool:
    """Whether these are linear layers that differ in nothing but their number of outputs."""
    found = [layer for layer in layers if layer is not None]
    if len(found) < len(layers):
        return False
    if all(type(layer) is LowRank for layer in found):
        return _alike([layer.linear for layer in found])
    if {type(layer) for layer in found} not in ({nn.Linear}, {nn.QuantizedLinear}):
        return False
    return len({_kind(layer) for layer in found}) == 1


def _kind(layer: nn.Module) -> tuple:
    """What a linear layer is, but for its number of outputs."""
    return (
        *(getattr(layer, name, None) for name in ("group_size", "bits", "mode")),
        *((name, x.dtype, x.shape[1:]) for name, x in sorted(layer.items())),
    )


class Product:
    """Linear layers as one: the first that is applied to an input computes all of them."""

    def __init__(self, layers: list[nn.Module]) -> None:
        low_rank = [layer for layer in layers if isinstance(layer, LowRank)]
        self.layer = LowRank.joined(low_rank) if low_rank else _joined(layers)
        mx.eval(_arrays(self.layer))
        bases = [layer.linear for layer in low_rank] or layers
        self.cuts = list(accumulate(len(base.weight) for base in bases))[:-1]
        self.x: mx.array | None = None
        self.parts: list[mx.array | None] = []

    def part(self, i: int, x: mx.array) -> mx.array:
        """What layer i makes of x. Given once and let go, or it would stay until the next input."""
        part = self.parts[i] if x is self.x else None
        if part is None:
            made = mx.split(self.layer(x), self.cuts, axis=-1)
            part, self.x, self.parts = made[i], x, [*made]
        self.parts[i] = None
        if all(other is None for other in self.parts):
            self.x = None
        return part


STEPS = 4  # decode steps that are timed
WORTH_A_LINE = 1.1  # times as long as a step of the policy
AFFORDABLE = 0.1  # seconds a step of the policy may take for the comparison to be worth making


def cost_of_quantizing(
    policy: nn.Module, quantized: Callable[[], nn.Module], rows: int, room: float
) -> str | None:
    """A line on what 4-bit rollouts cost here, from a few decode steps of both; None if nothing.

    On one H200 a 4-bit step of 64 rows takes two to three times as long as in bfloat16, on machines
    bound by memory bandwidth it is the other way round: so it is measured, at the run's own number
    of rows. Not where a step is slow (a large model on a CPU): that would take many seconds.
    """
    own = _step_seconds(joined(merged(policy, room), room), rows)
    if own is None:
        return None
    packed = _step_seconds(joined(quantized(), room), rows, limit=float("inf"))
    if packed is None or packed < WORTH_A_LINE * own:
        return None
    return (
        f"4-bit rollouts cost speed here: {1000 * packed:.3g} ms a step of {rows} rows against "
        f"{1000 * own:.3g}; quantize_for_rollouts = false avoids that"
    )


def _step_seconds(model: nn.Module, rows: int, limit: float = AFFORDABLE) -> float | None:
    """The best time of a decode step after two that warm up; None if one takes over `limit`."""
    cache = caches.prefill(model, [[1, 1]], [0] * rows, STEPS + 2)
    forward = compiled_step.forward(model, cache)
    seconds = []
    for step in range(STEPS + 2):
        start = time.perf_counter()
        mx.eval(forward(mx.ones((rows, 1), mx.int32)))
        seconds.append(time.perf_counter() - start)
        # On a GPU the first step also compiles kernels.
        if seconds[-1] > limit and (step > 0 or mx.default_device() == mx.cpu):
            return None
    return min(seconds[2:])
