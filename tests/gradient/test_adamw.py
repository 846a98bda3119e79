"""AdamW in place: the same as MLX's own, and what lets bfloat16 weights move."""

import copy
import math

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from helpers import flat, mostly_long, one_operation_at_a_time, run_training, stop_after
from mlx.utils import tree_map, tree_unflatten

from utils.base.errors import UserError
from utils.device import rounding as rounding_module
from utils.gradient import adamw

BETAS = (0.9, 0.999)


def network(dtype=mx.float32, width=64):
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(width, 4 * width), nn.gelu, nn.Linear(4 * width, width))
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return model


def slopes(model, update, size=0.1):
    keys = iter(mx.random.split(mx.random.key(update), 8))
    return tree_map(lambda p: size * mx.random.normal(p.shape, key=next(keys)), model.parameters())


def follow(model, updates=5, learning_rate=1e-3, **how):
    """(largest distance from mlx's AdamW over float32 weights, how far those moved at most)."""
    ours = adamw.AdamW(model, BETAS, weight_decay=0.1, **how)
    theirs = optim.AdamW(learning_rate, list(BETAS), weight_decay=0.1, bias_correction=True)
    start = flat(ours.masters(model))
    weights = tree_unflatten(list(start.items()))
    for update in range(updates):
        grads = slopes(model, update)
        weights = theirs.apply_gradients(tree_map(lambda g: 0.5 * g, grads), weights)
        ours.update(model, grads, learning_rate, 0.5)
    expected, actual = flat(weights), flat(ours.masters(model))
    distance = max(mx.abs(actual[n] - x).max().item() for n, x in expected.items())
    return distance, max(mx.abs(x - start[n]).max().item() for n, x in expected.items())


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("chunk", [2**24, 1000])
def test_an_update_is_that_of_mlx_over_float32_weights(dtype, chunk, monkeypatch):
    """Also where weights are cut into pieces."""
    monkeypatch.setattr(adamw, "CHUNK", chunk)
    model = network(dtype)
    pieces = [len(adamw.cut(weight)) for weight in flat(model.parameters()).values()]
    assert max(pieces) == (1 if chunk > 1000 else 22)
    distance, moved = follow(model)
    assert moved > 4e-3
    assert distance < 1e-6
    assert {x.dtype for x in flat(model.parameters()).values()} == {dtype}


SHAPES = [((9000,), 7936), ((300, 60), 7680), ((8, 64, 100), 6400), ((3, 40, 512), 20480)]


@pytest.mark.parametrize(("shape", "size"), SHAPES)
def test_pieces_are_whole_blocks_whatever_the_first_axis_is(shape, size, monkeypatch):
    """Experts lie one behind the other: few rows, each of them large, the last too large."""
    monkeypatch.setattr(adamw, "CHUNK", 8000)
    array = mx.arange(math.prod(shape)).reshape(shape)
    pieces = adamw.cut(array)
    assert {piece.size for piece in pieces[:-1]} == {size}
    assert size % adamw.BLOCK == 0
    assert mx.array_equal(mx.concatenate(pieces), array)


def test_an_update_of_experts_takes_no_more_memory_than_of_a_matrix(monkeypatch):
    monkeypatch.setattr(adamw, "CHUNK", 2**19)

    def peak(*shape):
        model = nn.Module()
        model.weight = mx.zeros(shape, mx.bfloat16)
        optimizer = adamw.AdamW(model, BETAS)
        slope = {"weight": mx.ones(shape, mx.bfloat16)}
        mx.eval(slope)
        mx.synchronize()
        with one_operation_at_a_time():
            mx.reset_peak_memory()
            before = mx.get_active_memory()
            optimizer.update(model, slope, 1e-3)
        return mx.get_peak_memory() - before

    assert peak(16, 512, 512) < 1.1 * peak(16 * 512, 512)


def test_a_compiled_update_is_the_same():
    distance, _ = follow(network(mx.bfloat16), compiled=True)
    assert distance < 1e-6


def test_8_bit_moments_stay_close():
    distance, moved = follow(network(), updates=20, moment_bits=8)
    assert 1e-6 < distance < 0.2 * moved


def test_a_float32_is_two_halves():
    values = mx.random.normal((10_000,)) * mx.exp(8 * mx.random.normal((10_000,)))
    weight, low = adamw.split(values)
    assert (weight.dtype, low.dtype) == (mx.bfloat16, mx.int16)
    assert mx.array_equal(adamw.join(weight, low), values)
    nearest = values.astype(mx.bfloat16)
    ties = (low == -(2**15)) | (low == 2**15 - 1)
    assert mx.array_equal(mx.where(ties, nearest, weight), nearest)


def test_random_rounding_takes_the_two_neighbours_and_is_right_on_average():
    values = mx.random.normal((64,))
    noise = [mx.arange(2**16, dtype=mx.uint32) + (n << 16) for n in (0, 7)]  # all odds, once
    for bits in noise:
        rounded = rounding_module.round_at_random(values[:, None], bits).astype(mx.float32)
        assert mx.abs(rounded.mean(axis=1) - values).max().item() < 2e-5
        assert max(len(set(row)) for row in rounded.tolist()) == 2
        assert (mx.abs(rounded - values[:, None]) / mx.abs(values[:, None])).max().item() < 2**-7


@pytest.mark.parametrize("levels", [127, 255])
def test_codes_of_moments_are_right_on_average(levels):
    values = mx.exp(2 * mx.random.normal((adamw.BLOCK * 4,)))
    values = values if levels == 255 else values * mx.sign(mx.random.normal(values.shape))
    total, count = mx.zeros(values.shape), 400
    for _ in range(count):
        noise = mx.random.uniform(shape=values.shape)
        codes, scales = adamw.quantize(values, noise, levels)
        decoded = adamw.dequantize(codes, scales, levels)
        error = mx.abs(decoded - values) / mx.abs(values)
        largest = mx.repeat(scales, adamw.BLOCK)
        seen = mx.abs(values) > largest * 2 ** (-(levels - 2) / adamw.STEPS_PER_OCTAVE)
        assert mx.where(seen, error, 0).max().item() < 2 ** (1 / 8) - 1
        total += decoded
        mx.eval(total)
    bias = mx.where(seen, (total / count - values) / mx.abs(values), 0)
    assert abs(bias.mean().item()) < 1e-3
    assert seen.sum().item() > 0.9 * values.size


def test_zeros_stay_zeros_and_second_moments_do_not_vanish():
    zeros = mx.zeros((adamw.BLOCK,))
    codes, scales = adamw.quantize(zeros, zeros, 127)
    assert adamw.dequantize(codes, scales, 127).tolist() == zeros.tolist()
    spike = mx.where(mx.arange(adamw.BLOCK) == 3, 1.0, 1e-30)
    for noise in 0.0, 0.5:  # the second would round them down
        codes, scales = adamw.quantize(spike, zeros + noise, 255)
        assert adamw.dequantize(codes, scales, 255).min().item() > 1e-10


def test_rounding_at_random_is_decided_by_the_seed():
    def after_an_update(seed):
        model = network(mx.bfloat16)
        rounding = {"master_weights": False, "seed": seed}
        adamw.AdamW(model, BETAS, **rounding).update(model, slopes(model, 0), 1e-4)
        return mx.concatenate([x.reshape(-1) for x in flat(model.parameters()).values()])

    first = after_an_update(0)
    assert mx.array_equal(first, after_an_update(0))
    assert not mx.array_equal(first, after_an_update(1))


MODES = {
    "plain": None,
    "master": {},
    "rounded": {"master_weights": False},
    "8-bit": {"moment_bits": 8},
    "rounded, 8-bit": {"master_weights": False, "moment_bits": 8},
}


def learn(mode, updates=60, learning_rate=1e-6):
    """Fit a linear teacher in bfloat16: (share of weights that moved, loss before and after)."""
    model = network(mx.bfloat16)
    teacher = network(mx.float32, 64)
    teacher.update(tree_map(lambda p: p + 0.01 * mx.sign(p), teacher.parameters()))
    x = mx.random.normal((256, 64), key=mx.random.key(9))
    target = teacher(x)

    def loss(model):
        return mx.square(model(x.astype(mx.bfloat16)).astype(mx.float32) - target).mean()

    function = nn.value_and_grad(model, loss)
    if mode == "plain":
        plain = optim.AdamW(learning_rate, bias_correction=True)
    else:
        optimizer = adamw.AdamW(model, BETAS, **MODES[mode])
    start = copy.deepcopy(flat(model.parameters()))
    before = function(model)[0].item()
    for _ in range(updates):
        _, grads = function(model)
        if mode == "plain":
            plain.update(model, grads)
        else:
            optimizer.update(model, grads, learning_rate)
        mx.eval(model.parameters())
    end = flat(model.parameters())
    moved = sum((end[n] != w).sum().item() for n, w in start.items())
    return moved / sum(w.size for w in start.values()), before, function(model)[0].item()


@pytest.fixture(scope="module")
def plain():
    return learn("plain")


@pytest.mark.parametrize("mode", mostly_long([mode for mode in MODES if mode != "plain"], "master"))
def test_bfloat16_weights_move_at_1e_6_where_plain_ones_do_not(mode, plain):
    stuck, before, plain_after = plain
    moved, same, after = learn(mode)
    assert same == before
    assert moved > 5 * stuck
    assert before - after > 3 * (before - plain_after)


@pytest.mark.parametrize("held", [False, True])
def test_no_second_copy_of_what_is_updated(held, monkeypatch):
    """Above the state there are only temporaries of a few pieces: each array's memory is reused,
    unless something else holds it."""
    monkeypatch.setattr(adamw, "CHUNK", 1000)
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(64)))
    model.set_dtype(mx.bfloat16)
    optimizer = adamw.AdamW(model, BETAS)
    grads = tree_map(mx.ones_like, model.parameters())
    mx.eval(grads)
    optimizer.update(model, grads, 1e-3)
    mx.synchronize()
    others = list(optimizer.arrays().values()) if held else []
    limit = mx.set_memory_limit(1)  # no queue: the peak of the computation itself
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    adamw.global_norm(grads)
    optimizer.update(model, grads, 1e-3)
    extra = mx.get_peak_memory() - before
    mx.set_memory_limit(limit)
    state = sum(x.nbytes for x in optimizer.arrays().values())
    assert (extra > 0.75 * state) if others else (extra < 0.25 * state)


def test_gradients_are_added_in_float32_and_one_is_taken_as_it_is():
    first, second = ({"a": mx.full((3,), x, mx.bfloat16)} for x in (1.0, 2**-9))
    assert adamw.accumulate(None, first) is first
    total = adamw.accumulate(first, second)
    assert total["a"].dtype == mx.float32
    assert total["a"].tolist() == [1 + 2**-9] * 3


def test_the_norm_is_taken_in_float32(monkeypatch):
    grads = {"a": mx.full((300, 100), 0.1, mx.bfloat16), "b": mx.array([3.0])}
    value = float(mx.array(0.1, mx.bfloat16).astype(mx.float32))
    expected = np.sqrt(30_000 * value**2 + 9)
    for chunk in (2**24, 1000):
        monkeypatch.setattr(adamw, "CHUNK", chunk)
        assert adamw.global_norm(grads) == pytest.approx(expected, rel=1e-4)


def test_state_of_another_optimizer_is_refused():
    model = network(mx.bfloat16)
    state = adamw.AdamW(model, BETAS).arrays()
    with pytest.raises(ValueError, match=r"does not fit the model: layers\.0\.bias\.0\.low"):
        adamw.AdamW(model, BETAS, master_weights=False).load(state)


def test_random_rounding_needs_bfloat16():
    with pytest.raises(UserError, match="these are float32"):
        adamw.AdamW(network(), BETAS, master_weights=False)


@pytest.mark.parametrize("mode", [{"master_weights": False}, {"moment_bits": 8}])
def test_a_run_goes_on_bit_by_bit(mode, model_dir, data_dir, tmp_path):
    settings = {"dtype": "bfloat16", "max_updates": 3, "learning_rate": 1e-4, "max_new_tokens": 4}
    settings |= mode
    _, whole = run_training(model_dir, data_dir, tmp_path / "whole", **settings)
    run_training(model_dir, data_dir, tmp_path / "parts", stop_after(2), **settings)
    _, resumed = run_training(model_dir, data_dir, tmp_path / "parts", resume="auto", **settings)
    for name, value in whole.optimizer.arrays().items():
        assert mx.array_equal(value, resumed.optimizer.arrays()[name]), name
    for name, value in flat(whole.model.parameters()).items():
        assert mx.array_equal(value, flat(resumed.model.parameters())[name]), name


def adapted(kind):
    from mlx_lm.tuner.dora import DoRALinear
    from mlx_lm.tuner.lora import LoRALinear

    model = network()
    model.freeze()
    layer = {"lora": LoRALinear, "dora": DoRALinear}[kind].from_base(model.layers[0], r=4)
    model.layers[0] = layer
    layer.unfreeze(keys=["lora_a", "lora_b", *(["m"] if kind == "dora" else [])])
    return model


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_lora_plus_is_two_optimizers_of_mlx(kind):
    """The second matrix at 16 times the rate, and decay; DoRA's magnitudes at the plain one."""
    model, ratio, rate = adapted(kind), 16.0, 1e-4
    start = flat(model.trainable_parameters())
    assert set(start) == {"layers.0.lora_a", "layers.0.lora_b"} | (
        {"layers.0.m"} if kind == "dora" else set()
    )
    ours = adamw.AdamW(model, BETAS, weight_decay=0.1, lora_plus_ratio=ratio)
    theirs = {
        second: optim.AdamW(rate * (ratio if second else 1), list(BETAS), weight_decay=0.1,
                            bias_correction=True)
        for second in (False, True)
    }  # fmt: skip
    parts = {
        second: {n: x for n, x in start.items() if n.endswith("lora_b") == second}
        for second in (False, True)
    }
    for update in range(5):
        keys = iter(mx.random.split(mx.random.key(update), 8))
        grads = {n: mx.random.normal(x.shape, key=next(keys)) for n, x in start.items()}
        for second, weights in parts.items():
            of_part = {n: grads[n] for n in weights}
            parts[second] = theirs[second].apply_gradients(of_part, weights)
        ours.update(model, tree_unflatten(list(grads.items())), rate)
    for name, weight in flat(model.trainable_parameters()).items():
        expected = (parts[True] | parts[False])[name]
        assert mx.abs(weight - expected).max().item() < 1e-6
        assert mx.abs(weight - start[name]).max().item() > 2e-4
