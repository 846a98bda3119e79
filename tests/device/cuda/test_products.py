"""Products by a kernel of our own: which it takes, and, on CUDA, that they are MLX's."""

import mlx.core as mx
import mlx.nn as nn
import pytest

from utils.device import runtime
from utils.device.cuda import products, swiglu

needs_cuda = pytest.mark.skipif(not mx.cuda.is_available(), reason="needs CUDA")


@pytest.mark.parametrize(
    ("rows", "outputs", "inputs", "dtype", "fits"),
    [
        (512, 3072, 576, mx.bfloat16, True),  # SmolLM2
        (8, 960, 576, mx.float16, True),
        (64, 2048, 1536, mx.bfloat16, True),
        (64, 17920, 1536, mx.bfloat16, False),  # of 1.5B: cuBLAS is faster
        (8, 960, 576, mx.float32, False),
        (8, 960, 560, mx.bfloat16, False),
        (8, 992, 576, mx.bfloat16, False),
    ],
)
def test_products_of_few_rows_in_half_precision_are_taken(rows, outputs, inputs, dtype, fits):
    assert products.fits(rows, mx.zeros((outputs, inputs), dtype)) == fits


def test_it_is_for_cuda_alone(monkeypatch):
    for platform in ("cpu", "metal", "cuda"):
        monkeypatch.setattr(runtime, "platform_name", lambda name=platform: name)
        assert products.applies() == (platform == "cuda")


@needs_cuda
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("rows", [1, 2, 31, 33, 64, 200, 512])
@pytest.mark.parametrize("sizes", [(960, 576), (576, 1536), (128, 64)])
def test_products_are_those_of_mlx_in_float32(dtype, rows, sizes):
    """With and without the norm before, SwiGLU and the sum after it."""
    outputs, inputs = sizes
    keys = mx.random.split(mx.random.key(rows), 4)
    with mx.stream(mx.gpu):
        x = mx.random.normal((rows, inputs), key=keys[0]).astype(dtype)
        matrix = (mx.random.normal((outputs, inputs), key=keys[1]) / inputs**0.5).astype(dtype)
        weight = mx.random.normal((inputs,), key=keys[2]).astype(dtype)
        residual = mx.random.normal((rows, outputs), key=keys[3]).astype(dtype)
        floats = [a.astype(mx.float32) for a in (x, matrix, weight, residual)]
        normed = mx.fast.rms_norm(floats[0], floats[2], 1e-5)
        gate, inner = mx.split(normed @ floats[1].T, 2, axis=-1)
        norm = weight, 1e-5
        cases = [
            (floats[0] @ floats[1].T, products.product(x, matrix)),
            (normed @ floats[1].T, products.product(x, matrix, norm)),
            (floats[0] @ floats[1].T + floats[3], products.product(x, matrix, residual=residual)),
            (nn.silu(gate) * inner, products.product(x, matrix, norm, swiglu=True)),
        ]
        for expected, got in cases:
            apart = mx.linalg.norm(got.astype(mx.float32) - expected)
            assert got.shape == expected.shape
            assert (apart / mx.linalg.norm(expected)).item() < 0.01


@needs_cuda
def test_the_check_before_its_first_use_passes():
    with mx.stream(mx.gpu):
        assert products.problem() == ""


@needs_cuda
@pytest.mark.parametrize("width", [8, 1536, 8960])
def test_swiglu_of_a_product_is_mlxs(width):
    with mx.stream(mx.gpu):
        product = mx.random.normal((5, 2 * width), key=mx.random.key(0)).astype(mx.bfloat16)
        gate, x = mx.split(product.astype(mx.float32), 2, axis=-1)
        expected, got = nn.silu(gate) * x, swiglu.of_product(product).astype(mx.float32)
        assert mx.abs(got - expected).max().item() < 0.05


def test_swiglu_reads_eight_numbers_at_a_time():
    assert swiglu.fits(1536)
    assert not swiglu.fits(1532)
