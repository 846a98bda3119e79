"""AdamW that works in place, and three ways to keep what its small steps would lose in bfloat16.

A bfloat16 weight of 0.03 can change by 1.2e-4 or not at all, and an update at a learning rate of
1e-6 is a hundredth of that: rounded to the nearest, most weights never move (benchmarks/
bf16_updates.py). So half-precision weights are given one of these:

* `master_weights = true`: the float32 weight that they are the rounding of. For bfloat16 only the
  16 bits that rounding took off are stored (`low`, 2 bytes a weight): weight and `low` together are
  the float32 master, bit for bit. For float16 the master itself is stored (4 bytes).
* `master_weights = false`: nothing. The step is taken in float32 and rounded up or down at random,
  with the odds that make it right on average (stochastic rounding; bfloat16 only).

`moment_bits = 8` keeps AdamW's moments as the logarithm of their magnitude in steps of 1/8 octave,
relative to the largest of a block of 256: `m` with a sign and 127 steps (16 octaves), `v` with 255
(32 octaves). A step of `v` at beta2 = 0.999 is far below this resolution, so it, too, is rounded at
random. 2.03 bytes for both instead of 8. (Dettmers et al., arXiv:2110.02861, quantize in blocks;
logarithmic steps and random rounding are ours.)

In place: every array of the state is an input that nothing else holds when it is computed anew, so
MLX gives its memory to the result. Weights are taken in parts of CHUNK, a few at a time. Tried on
one H200 with 1.5 B bfloat16 parameters: all at once is fastest (38 ms, and 20 ms with whole float32
masters), but takes 15 to 25 GB more, because what several compiled kernels share is made as an
array of its own; part by part with the host waiting for each, 66 ms and 1.4 GB;
mlx.optimizers.AdamW over float32 masters with clip_grad_norm, 106 ms and 18 GB."""

import math
from collections.abc import Iterator
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from ..base.errors import UserError
from ..device.rounding import random_words, round_at_random
from ..device.typed import Tree
from ..settings.run_settings import Settings

BLOCK = 256  # neighbours that share the scale of their 8-bit moments
IN_FLIGHT = 2
LEAST_QUANTIZED = 4096  # smaller arrays (norms, biases) keep float32 moments
STEPS_PER_OCTAVE = 8
LEVELS = {"m": 127, "v": 255}
CHUNK = 2**24  # weights that are computed together: what bounds the temporaries

Arrays = dict[str, mx.array]


def cut(array: mx.array) -> list[mx.array]:
    """Views of an array along its first axis, of at most about CHUNK elements each."""
    if array.size <= CHUNK:
        return [array]
    width = array.size // len(array)
    whole = BLOCK // math.gcd(BLOCK, width)  # rows that fill blocks: all pieces but the last do
    rows = max(whole, CHUNK // width // whole * whole)
    return [array[start : start + rows] for start in range(0, len(array), rows)]


def groups(arrays: Arrays) -> list[list[str]]:
    """Names of arrays in groups of at most CHUNK elements (a larger one is alone)."""
    result: list[list[str]] = []
    count = CHUNK
    for name, array in arrays.items():
        if count + array.size > CHUNK:
            result.append([])
            count = 0
        result[-1].append(name)
        count += array.size
    return result


class Pipeline:
    """Evaluates what it is given, and lets the host run no further ahead than IN_FLIGHT parts.

    All at once, every part would have its temporaries at the same time; one by one, the device
    would wait for the host in between.
    """

    def __init__(self) -> None:
        self.parts: list[Tree] = []

    def add(self, arrays: Tree) -> None:
        mx.async_eval(arrays)
        self.parts.append(arrays)
        if len(self.parts) > IN_FLIGHT:
            mx.eval(self.parts.pop(0))


def accumulate(total: Tree | None, new: Tree) -> Tree:
    """The sum of gradients, in float32 from the second on; the first are taken as they are.

    Lazy: evaluated together with the pass that makes `new`, each array of it goes as it is added.
    """
    if total is None:
        return new
    # On the CPU, compiling waits for a C++ compiler.
    add = sum_in_float32 if mx.default_device() == mx.cpu else compiled_sum
    return tree_map(add, total, new)


def sum_in_float32(one: mx.array, other: mx.array) -> mx.array:
    return one.astype(mx.float32) + other.astype(mx.float32)


compiled_sum = mx.compile(sum_in_float32, shapeless=True)


def global_norm(gradients: Tree, compiled: bool = False) -> float:
    """sqrt(sum of squares) over all gradients, in float32, without a float32 copy of them all."""
    arrays: Arrays = dict(tree_flatten(gradients))
    squares: list[mx.array] = []
    pipeline = Pipeline()
    for names in groups(arrays):
        first = len(squares)
        for piece in (piece for name in names for piece in cut(arrays[name])):
            squares.append(compiled_square(piece) if compiled else square(piece))
            if len(names) == 1:
                pipeline.add(squares[-1])
        pipeline.add(squares[first:])
    return float(mx.sqrt(mx.stack(squares).sum()))


def square(array: mx.array) -> mx.array:
    return mx.square(array.astype(mx.float32)).sum()


compiled_square = mx.compile(square)


def join(weight: mx.array, low: mx.array) -> mx.array:
    """The float32 that `split` took apart."""
    high = mx.view(weight, mx.int16).astype(mx.int32) << 16
    return mx.view(high + low.astype(mx.int32), mx.float32)


def split(master: mx.array) -> tuple[mx.array, mx.array]:
    """A float32 as the nearest bfloat16 (halves away from 0) and the int16 of bits that it lacks.

    A float's bits, read as an integer, count the floats from 0 on, so the difference is exact.
    """
    bits = mx.view(master, mx.int32)
    high = (bits + 0x8000) >> 16
    weight = mx.view(high.astype(mx.int16), mx.bfloat16)
    return weight, (bits - (high << 16)).astype(mx.int16)


def quantize(values: mx.array, noise: mx.array, levels: int) -> tuple[mx.array, mx.array]:
    """(N,) float32 to (N,) codes and the (N / BLOCK,) largest magnitudes of the blocks.

    Code k > 0 means largest * 2 ** ((k - levels) / 8) and 0 means 0; the sign is the code's own.
    noise: (N,) in [0, 1), decides between the two nearest such that the mean is the value.
    """
    blocks = values.reshape(-1, BLOCK)
    largest = mx.maximum(mx.abs(blocks).max(axis=1, keepdims=True), 1e-37)  # never 0 / 0
    return _encode(blocks, largest, noise.reshape(-1, BLOCK), levels), largest.reshape(-1)


def _encode(blocks: mx.array, largest: mx.array, noise: mx.array, levels: int) -> mx.array:
    ratio = mx.abs(blocks) / largest
    below = mx.clip(mx.floor(levels + STEPS_PER_OCTAVE * mx.log2(ratio)), 0, levels)
    lower, upper = _magnitude(below, levels), _magnitude(below + 1, levels)
    code = mx.minimum(below + (noise * (upper - lower) < ratio - lower), levels)
    if levels == LEVELS["m"]:
        return (code * mx.sign(blocks)).astype(mx.int8).reshape(-1)
    # A second moment of 0 would divide by nothing: the least level is its floor.
    return mx.maximum(code, 1).astype(mx.uint8).reshape(-1)


def _magnitude(code: mx.array, levels: int) -> mx.array:
    octaves = (code - levels) * (math.log(2) / STEPS_PER_OCTAVE)
    return mx.where(code > 0, mx.exp(octaves), 0.0)


def dequantize(codes: mx.array, largest: mx.array, levels: int) -> mx.array:
    """(N,) codes and (N / BLOCK,) scales to (N,) float32."""
    signed = codes.reshape(-1, BLOCK).astype(mx.float32)
    return (mx.sign(signed) * _magnitude(mx.abs(signed), levels) * largest[:, None]).reshape(-1)


def master_of(weight: mx.array, state: Arrays) -> mx.array:
    """The float32 weight that an update moves."""
    if "low" in state:
        return join(weight, state["low"])
    return state.get("master", weight).astype(mx.float32)


def step(
    weight: mx.array,
    gradient: mx.array,
    state: Arrays,
    key: mx.array,
    factors: list[mx.array],
    *,
    betas: tuple[float, float],
    eps: float,
    rounds: bool,
) -> tuple[Arrays, mx.array]:
    """AdamW for one piece of a weight: its new state and value.

    factors: on the gradient, on the weight (decay), on m (learning rate with its correction), and
    on sqrt(v) (its correction).
    """
    clip, keep, rate, root = factors
    noise = random_words(weight.size, key).reshape(weight.shape)  # computed where it is used
    gradient = gradient.astype(mx.float32) * clip
    m = betas[0] * moment("m", state, weight) + (1 - betas[0]) * gradient
    v = betas[1] * moment("v", state, weight) + (1 - betas[1]) * mx.square(gradient)
    master = keep * master_of(weight, state) - rate * m / (mx.sqrt(v) * root + eps)
    new = {**stored("m", m, state, noise), **stored("v", v, state, noise)}
    if "low" in state:
        weight, new["low"] = split(master)
    elif rounds and weight.dtype == mx.bfloat16:
        weight = round_at_random(master, noise)
    else:
        new |= {"master": master} if "master" in state else {}
        weight = master.astype(weight.dtype)
    return new, weight


def moment(name: str, state: Arrays, weight: mx.array) -> mx.array:
    """A moment of a piece in float32."""
    if f"{name}_scale" not in state:
        return state[name]
    return dequantize(state[name], state[f"{name}_scale"], LEVELS[name]).reshape(weight.shape)


def stored(name: str, values: mx.array, state: Arrays, noise: mx.array) -> Arrays:
    """A moment as the state keeps it. m is rounded by other bits of the noise than v."""
    if f"{name}_scale" not in state:
        return {name: values}
    bits = noise & 0xFFFF if name == "m" else noise >> 16
    fraction = bits.astype(mx.float32).reshape(-1) / 2**16
    codes, scales = quantize(values.reshape(-1), fraction, LEVELS[name])
    return {name: codes, f"{name}_scale": scales}


class AdamW:
    """AdamW (arXiv:1711.05101) with bias correction, over the trainable weights of a model.

    The second matrix of LoRA's adapters, `lora_b`, has `lora_plus_ratio` times the learning rate
    (LoRA+, arXiv:2402.12354). `state` has the arrays of each weight: "m" and "v" (with "m_scale"
    and "v_scale" when they are 8-bit), and "low" or "master" of a half-precision weight. `steps`
    counts the updates.
    """

    def __init__(
        self,
        model: nn.Module,
        betas: tuple[float, float],
        *,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        master_weights: bool = True,
        moment_bits: int = 32,
        lora_plus_ratio: float = 1.0,
        seed: int = 0,
        compiled: bool = False,
    ) -> None:
        """Raises UserError if master_weights = false has nothing to act on."""
        self.betas, self.weight_decay = betas, weight_decay
        self.master_weights, self.moment_bits, self.seed = master_weights, moment_bits, seed
        self.lora_plus_ratio = lora_plus_ratio
        rule = partial(step, betas=betas, eps=eps, rounds=not master_weights)
        self.rule = mx.compile(rule) if compiled else rule
        self.steps = 0
        self.learning_rate = 0.0
        weights: Arrays = dict(tree_flatten(model.trainable_parameters()))
        dtypes = {str(weight.dtype).rpartition(".")[2] for weight in weights.values()}
        if not master_weights and "bfloat16" not in dtypes:
            raise UserError(
                "master_weights = false has no effect: it is for bfloat16 weights, and these are "
                f"{', '.join(dtypes)} (dtype = auto is float32 on the CPU)"
            )
        self.state = {n: [self._new_state(piece) for piece in cut(w)] for n, w in weights.items()}
        mx.eval(self.state)

    def _new_state(self, weight: mx.array) -> Arrays:
        state: Arrays = {}
        coded = self.moment_bits == 8 and weight.size >= LEAST_QUANTIZED and not weight.size % BLOCK
        for name, dtype in (("m", mx.int8), ("v", mx.uint8)):
            state[name] = mx.zeros(weight.size, dtype) if coded else mx.zeros(weight.shape)
            if coded:
                state[f"{name}_scale"] = mx.zeros(weight.size // BLOCK)
        if self.master_weights and weight.dtype == mx.bfloat16:
            state["low"] = mx.zeros(weight.shape, mx.int16)
        elif self.master_weights and weight.dtype == mx.float16:
            state["master"] = weight.astype(mx.float32)
        return state

    def masters(self, model: nn.Module) -> Tree:
        """The float32 weights as a tree like the model's."""
        weights: Arrays = dict(tree_flatten(model.trainable_parameters()))
        return tree_unflatten([(name, self._master(name, w)) for name, w in weights.items()])

    def _master(self, name: str, weight: mx.array) -> mx.array:
        parts = zip(cut(weight), self.state[name], strict=True)
        joined = [master_of(piece, state) for piece, state in parts]
        return joined[0] if len(joined) == 1 else mx.concatenate(joined)

    def arrays(self) -> Arrays:
        """The whole state as dotted name -> array, for a checkpoint."""
        return {"steps": mx.array(self.steps), **dict(tree_flatten(self.state))}

    def load(self, arrays: Arrays) -> None:
        """Take the state of `arrays()`.

        Raises:
            ValueError: it is the state of other weights, or of another kind of optimizer.
        """
        mine = self.arrays()
        for name in sorted(mine.keys() | arrays.keys()):
            if name not in mine or name not in arrays or mine[name].shape != arrays[name].shape:
                raise ValueError(f"the optimizer's state does not fit the model: {name}")
        self.steps = int(arrays["steps"])
        for name, parts in self.state.items():
            for i, part in enumerate(parts):
                self.state[name][i] = {key: arrays[f"{name}.{i}.{key}"] for key in part}

    def update(
        self, model: nn.Module, gradients: Tree, learning_rate: float, scale: float = 1.0
    ) -> None:
        """Move the model's weights against `scale` times the gradients."""
        self.steps += 1
        self.learning_rate = learning_rate
        usual = self._factors(scale, learning_rate)
        of_second = self._factors(scale, learning_rate * self.lora_plus_ratio)
        keys = self._keys()
        weights: Arrays = dict(tree_flatten(model.trainable_parameters()))
        arrays: Arrays = dict(tree_flatten(gradients))
        pipeline = Pipeline()
        for names in groups(weights):
            new = {}
            for name in names:
                parts = cut(weights.pop(name)), cut(arrays[name])
                factors = of_second if name.endswith(".lora_b") else usual
                new[name] = self._updated(name, parts, keys, factors, pipeline)
            model.update(tree_unflatten(list(new.items())))
            pipeline.add([new, [self.state[name] for name in names]])
        mx.eval(model.parameters(), self.state)

    def _factors(self, scale: float, learning_rate: float) -> list[mx.array]:
        """Those of `step`: arrays, or a compiled rule would be compiled anew for each value."""
        beta1, beta2 = self.betas
        return [
            mx.array(x)
            for x in (
                scale,
                1 - learning_rate * self.weight_decay,
                learning_rate / (1 - beta1**self.steps),
                1 / math.sqrt(1 - beta2**self.steps),
            )
        ]

    def _updated(
        self,
        name: str,
        parts: tuple[list[mx.array], list[mx.array]],
        keys: Iterator[mx.array],
        factors: list[mx.array],
        pipeline: Pipeline,
    ) -> mx.array:
        """One weight after the update; its state is replaced."""
        new = []
        state = self.state[name]
        for i, (piece, slope) in enumerate(zip(*parts, strict=True)):
            state[i], value = self.rule(piece, slope, state[i], next(keys), factors)
            new.append(value)
            if len(state) > 1:
                pipeline.add([state[i], value])
        return new[0] if len(new) == 1 else mx.concatenate(new)

    def _keys(self) -> Iterator[mx.array]:
        """A random key for each piece, from (seed, update): a resumed run rounds the same way."""
        (word,) = np.random.SeedSequence((self.seed, 3, self.steps)).generate_state(1, np.uint64)
        key = mx.random.key(int(word))
        return iter(mx.random.split(key, sum(map(len, self.state.values()))))


def make(model: nn.Module, config: Settings) -> AdamW:
    """The optimizer of an MLXGRPOConfig."""
    return AdamW(
        model,
        (config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay,
        master_weights=config.master_weights,
        moment_bits=config.moment_bits,
        lora_plus_ratio=config.lora_plus_ratio,
        seed=config.seed,
        compiled=config.use_compile,
    )


def learning_rate(peak: float, updates: int, warmup_ratio: float, kind: str, update: int) -> float:
    """Of `update` 1..updates: linear warm-up to the peak, then by lr_scheduler_type.

    It would be 0 one update before the first and one after the last: an update at a rate of 0
    wastes its rollout.
    """
    warmup = max(1, int(updates * warmup_ratio))
    if update <= warmup:
        return peak * update / warmup
    done = (update - warmup) / (updates + 1 - warmup)
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1}
    return peak * shape[kind]
