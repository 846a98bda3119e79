"""SwiGLU of one product: of its two halves in one kernel, without a view of either."""

import functools
from collections.abc import Callable
from typing import cast

import mlx.core as mx

AT_ONCE, THREADS = 8, 128


def fits(width: int) -> bool:
    """Whether `of_product` takes halves so wide: a thread reads 8 numbers at a time."""
    return width % AT_ONCE == 0


def of_product(product: mx.array) -> mx.array:
    """(B, 2 I), the gates before what they are for -> (B, I) silu(gate) * x."""
    rows, width = len(product), product.shape[1] // 2
    (out,) = _kernel()(
        inputs=[product],
        template=[("T", product.dtype), ("WIDTH", width), ("AT_ONCE", AT_ONCE)],
        grid=(-(-width // AT_ONCE // THREADS) * THREADS, rows, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(rows, width)],
        output_dtypes=[product.dtype],
    )
    return out


@functools.cache
def _kernel() -> Callable[..., list[mx.array]]:
    made = mx.fast.cuda_kernel(
        name="swiglu_of_product", input_names=["product"], output_names=["out"], source=SOURCE
    )
    return cast(Callable[..., list[mx.array]], made)


SOURCE = """
struct alignas(AT_ONCE * sizeof(T)) Part { T x[AT_ONCE]; };
const int column = (blockIdx.x * blockDim.x + threadIdx.x) * AT_ONCE;
if (column < WIDTH) {
  const T* row = product + int64_t(blockIdx.y) * 2 * WIDTH + column;
  const Part gate = *reinterpret_cast<const Part*>(row);
  const Part x = *reinterpret_cast<const Part*>(row + WIDTH);
  Part result;
  #pragma unroll
  for (int i = 0; i < AT_ONCE; i++) {
    const float g = static_cast<float>(gate.x[i]);
    result.x[i] = static_cast<T>(g / (1 + expf(-g)) * static_cast<float>(x.x[i]));
  }
  *reinterpret_cast<Part*>(out + int64_t(blockIdx.y) * WIDTH + column) = result;
}
"""
