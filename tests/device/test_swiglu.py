"""SwiGLU with a backward pass of our own: mlx-lm's values and gradients, from less memory."""

import sys

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from helpers import one_operation_at_a_time
from mlx_lm.models import activations as mlx_lms

from utils.device import swiglu

lean = swiglu.lean(mlx_lms.swiglu)


def numbers(dtype, *shape):
    generator = np.random.default_rng(len(shape))
    return mx.array(generator.normal(0, 3, shape).astype(np.float32)).astype(dtype)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(mx.float32, 1e-6), (mx.bfloat16, 1e-2)])
def test_values_and_gradients_are_mlx_lms(dtype, tolerance, compiled):
    gate, x, cotangent = (numbers(dtype, 3, 7, 32)[n] for n in range(3))
    gate[0, :4] = mx.array([-90.0, 90.0, 0.0, -1e-6])

    def both(function):
        def run(gate, x, cotangent):
            return mx.vjp(lambda *a: [function(*a)], [gate, x], [cotangent])

        return (mx.compile(run) if compiled else run)(gate, x, cotangent)

    (ours, our_gradients), (theirs, their_gradients) = both(lean), both(mlx_lms.swiglu)
    assert mx.array_equal(ours[0], theirs[0]), "the forward pass is mlx-lm's"
    for a, b in zip(our_gradients, their_gradients, strict=True):
        assert a.dtype == dtype
        assert mx.isfinite(a).all()
        largest = mx.abs(b.astype(mx.float32)).max()
        assert mx.abs(a.astype(mx.float32) - b.astype(mx.float32)).max() <= tolerance * largest


def test_only_its_inputs_are_kept():
    """A chain of six, each of whose backward passes needs what it kept when all are done."""
    size, count = 2**18, 6

    def peak(function):
        def chain(x):
            for _ in range(count):
                x = function(x, x + 1)
            return x.sum()

        x = mx.full((2, size // 2), 0.1)
        mx.eval(x)
        mx.synchronize()
        with one_operation_at_a_time():
            mx.reset_peak_memory()
            before = mx.get_active_memory()
            mx.eval(mx.grad(chain)(x))
        return (mx.get_peak_memory() - before) / x.nbytes

    # Of each link: the gate (the link before), x, and for MLX's own sigmoid and silu.
    assert peak(lean) <= peak(mlx_lms.swiglu) - 1.5 * count


def switch_on(model):
    if swiglu.applies():
        swiglu.switch_on(model)


def test_blocks_take_it_on_a_gpu_for_more_than_one_token(model_dir, monkeypatch):
    model, _ = mlx_lm.load(str(model_dir))
    module = sys.modules[type(model).__module__]
    monkeypatch.setattr(module, "swiglu", mlx_lms.swiglu)
    tokens = mx.array([[5, 6, 7, 8]])
    expected = model(tokens)
    switch_on(model)
    if mx.default_device() == mx.cpu:
        assert module.swiglu is mlx_lms.swiglu, "another exponential would cost more"
    used = []
    monkeypatch.setattr(mx, "custom_function", lambda f: Recorded(f, used))
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    switch_on(model)
    ours = module.swiglu
    switch_on(model)
    assert module.swiglu is ours, "replaced once"
    assert mx.array_equal(model(tokens), expected)
    assert len(used) == len(model.layers)
    model(tokens[:, :1])
    assert len(used) == len(model.layers), "a decode step has no gradient"


class Recorded:
    """A function that counts its calls, with a `vjp` that changes nothing."""

    def __init__(self, function, calls):
        self.function, self.calls = function, calls

    def __call__(self, *arguments):
        self.calls.append(1)
        return self.function(*arguments)

    def vjp(self, function):
        return function
