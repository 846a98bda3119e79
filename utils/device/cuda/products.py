"""Products of a few hundred rows with a matrix, and what comes before and after them.

MLX asks cuBLAS anew for every product, which takes its host several times as long as the launch of
a kernel. A decode step of a small model is 121 products and more host than GPU. The kernel here
takes RMSNorm before the product, and SwiGLU or the sum with the residual stream after it, into the
same launch. For larger products cuBLAS is faster, see `fits`.
"""

import functools
from collections.abc import Callable
from typing import cast

import mlx.core as mx

from .. import runtime
from ..patch import Way, difference

WIDE = 32  # columns of the result that a block computes
DEPTH, STAGES = 64, 3  # columns of both matrices that a block has at a time, and how often
LARGEST = 1e9  # multiplications


def fits(rows: int, matrix: mx.array) -> bool:
    """Whether `product` takes (rows, K) times this (N, K) matrix, and is no slower than cuBLAS."""
    whole = len(matrix) % (2 * WIDE) == 0 and matrix.shape[1] % DEPTH == 0
    half = matrix.dtype in (mx.bfloat16, mx.float16)
    return whole and half and rows * matrix.size <= LARGEST


def product(
    x: mx.array,
    matrix: mx.array,
    norm: tuple[mx.array, float] | None = None,
    residual: mx.array | None = None,
    swiglu: bool = False,
) -> mx.array:
    """(B, K) rows times the transpose of an (N, K) matrix: (B, N), or (B, N / 2) with `swiglu`.

    `norm` are the weight and epsilon of an RMSNorm of the rows. With `swiglu` the first half of the
    columns are gates of the second. A `residual` (B, N) is added.
    """
    rows, outputs = len(x), len(matrix) // (2 if swiglu else 1)
    down, across, tiles = (2, 2, 1) if rows <= 32 else (4, 1, 2)
    (out,) = _kernel(norm is not None, residual is not None, swiglu)(
        inputs=[x, matrix, norm[0] if norm else x, residual if residual is not None else x],
        template=[
            *(("T", x.dtype), ("HALF", x.dtype == mx.float16), ("K", x.shape[1]), ("N", outputs)),
            *(("DOWN", down), ("ACROSS", across), ("TILES", tiles)),
            ("EPSILON", round((norm[1] if norm else 0) * 1e12)),
        ],
        grid=(outputs // WIDE * 128, -(-rows // (16 * down)), 1),
        threadgroup=(128, 1, 1),
        output_shapes=[(rows, outputs)],
        output_dtypes=[x.dtype],
    )
    return out


@functools.cache
def _kernel(norm: bool, residual: bool, swiglu: bool) -> Callable[..., list[mx.array]]:
    name = "product" + "_of_norm" * norm + "_and_sum" * residual + "_and_swiglu" * swiglu
    constants: dict[str, int] = {"NORM": norm, "RESIDUAL": residual, "SWIGLU": swiglu}
    constants |= {"DEPTH": DEPTH, "STAGES": STAGES}
    lines = [f"constexpr int {name} = {int(value)};" for name, value in constants.items()]
    made = mx.fast.cuda_kernel(
        name=name,
        input_names=["x", "matrix", "weight", "residual"],
        output_names=["out"],
        source="\n".join([*lines, SHORT]),
    )
    return cast(Callable[..., list[mx.array]], made)


def applies() -> bool:
    return runtime.platform_name() == "cuda"


def problem() -> str:
    """Of all forms, by the sizes of blocks that there are."""
    keys = mx.random.split(mx.random.key(0), 4)
    for rows in (3, 70):
        x = mx.random.normal((rows, 128), key=keys[0]).astype(mx.bfloat16)
        matrix = (mx.random.normal((128, 128), key=keys[1]) / 11).astype(mx.bfloat16)
        weight = mx.random.normal((128,), key=keys[2]).astype(mx.bfloat16)
        residual = mx.random.normal((rows, 128), key=keys[3]).astype(mx.bfloat16)
        normed = mx.fast.rms_norm(x, weight, 1e-5)
        gate, inner = mx.split(normed @ matrix.T, 2, axis=-1)
        pairs = [
            (normed @ matrix.T, product(x, matrix, norm=(weight, 1e-5))),
            (x @ matrix.T + residual, product(x, matrix, residual=residual)),
            (gate * mx.sigmoid(gate) * inner, product(x, matrix, (weight, 1e-5), swiglu=True)),
        ]
        found = [problem for plain, own in pairs if (problem := difference(plain, own, 0.02))]
        if found:
            return found[0]
    return ""


WAY = Way("products of few rows by a kernel of our own", applies, problem, lambda _: None)


# A block of 4 warps, DOWN of them below each other, computes 16 DOWN rows of 32 columns. What it
# needs of both matrices comes STAGES times DEPTH columns ahead, asynchronously, in pieces of 16
# bytes, whose places are exchanged by rows so that no two of a warp's reads share a bank. A warp
# multiplies 16 rows by 16 TILES columns with the tensor cores. RMSNorm's weight goes into the rows
# before, its factor, for which every thread adds up the squares that it has, into the sums after.
SOURCE = """
constexpr int WIDE = 16 * TILES * ACROSS, HIGH = 16 * DOWN, PIECES = DEPTH / 8;
constexpr int TALL = SWIGLU ? 2 * WIDE : WIDE, SETS = SWIGLU ? 2 : 1;
__shared__ alignas(128) T a[STAGES][HIGH * DEPTH];
__shared__ alignas(128) T b[STAGES][TALL * DEPTH];

const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
const int down = warp % DOWN, across = warp / DOWN;
const int first_row = blockIdx.y * HIGH, first_column = blockIdx.x * WIDE, rows = x_shape[0];

auto copy = [](T* to, const T* from) {
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from));
};
auto place = [](int row, int piece) { return row * DEPTH + (piece ^ row % 8) * 8; };
auto fetch = [&](int turn) {
  if (turn < K / DEPTH) {
    T* to_a = a[turn % STAGES];
    T* to_b = b[turn % STAGES];
    #pragma unroll
    for (int n = thread; n < HIGH * PIECES; n += 128) {
      const int row = min(first_row + n / PIECES, rows - 1);  // those beyond are not stored
      copy(to_a + place(n / PIECES, n % PIECES),
           x + int64_t(row) * K + turn * DEPTH + n % PIECES * 8);
    }
    #pragma unroll
    for (int n = thread; n < TALL * PIECES; n += 128) {
      const int row = n / PIECES;
      const int column = first_column + (row < WIDE ? row : N + row - WIDE);
      copy(to_b + place(row, n % PIECES),
           matrix + int64_t(column) * K + turn * DEPTH + n % PIECES * 8);
    }
  }
  asm volatile("cp.async.commit_group;");
};
auto load = [](unsigned (&to)[4], const T* from) {
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(from));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at));
};
auto multiply = [](float (&sum)[4], const unsigned (&p)[4], unsigned q0, unsigned q1) {
  if (HALF) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "r"(q0), "r"(q1));
  } else {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "r"(q0), "r"(q1));
  }
};

struct Pair { T x[2]; };
float sum[SETS][TILES][2][4] = {}, squares[2] = {};
for (int n = 0; n < STAGES - 1; n++) fetch(n);
for (int turn = 0; turn < K / DEPTH; turn++) {
  asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2));
  __syncthreads();
  fetch(turn + STAGES - 1);
  const T* from_a = a[turn % STAGES];
  const T* from_b = b[turn % STAGES];
  #pragma unroll
  for (int part = 0; part < DEPTH / 16; part++) {
    unsigned p[4];
    load(p, from_a + place(down * 16 + lane % 16, part * 2 + lane / 16));
    if (NORM) {
      #pragma unroll
      for (int i = 0; i < 4; i++) {
        const int column = turn * DEPTH + part * 16 + lane % 4 * 2 + (i / 2) * 8;
        Pair numbers = *reinterpret_cast<Pair*>(&p[i]);
        const Pair factors = *reinterpret_cast<const Pair*>(weight + column);
        #pragma unroll
        for (int j = 0; j < 2; j++) {
          const float number = static_cast<float>(numbers.x[j]);
          squares[i % 2] += number * number;
          numbers.x[j] = static_cast<T>(number * static_cast<float>(factors.x[j]));
        }
        p[i] = *reinterpret_cast<unsigned*>(&numbers);
      }
    }
    #pragma unroll
    for (int set = 0; set < SETS; set++) {
      #pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
        unsigned q[4];
        const int row = set * WIDE + (across * TILES + tile) * 16 + lane / 16 * 8 + lane % 8;
        load(q, from_b + place(row, part * 2 + lane / 8 % 2));
        multiply(sum[set][tile][0], p, q[0], q[1]);
        multiply(sum[set][tile][1], p, q[2], q[3]);
      }
    }
  }
}

#pragma unroll
for (int half = 0; half < 2; half++) {
  float factor = 1;
  if (NORM) {
    float total = squares[half];
    total += __shfl_xor_sync(0xffffffff, total, 1);
    total += __shfl_xor_sync(0xffffffff, total, 2);
    factor = rsqrtf(total / K + EPSILON * 1e-12f);
  }
  const int row = first_row + down * 16 + half * 8 + lane / 4;
  if (row >= rows) continue;
  #pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
    #pragma unroll
    for (int side = 0; side < 2; side++) {
      const int column = first_column + (across * TILES + tile) * 16 + side * 8 + lane % 4 * 2;
      const int64_t at = int64_t(row) * N + column;
      Pair result;
      #pragma unroll
      for (int j = 0; j < 2; j++) {
        float value = factor * sum[0][tile][side][half * 2 + j];
        if (SWIGLU) {
          value = value / (1 + expf(-value)) * factor * sum[SETS - 1][tile][side][half * 2 + j];
        }
        if (RESIDUAL) value += static_cast<float>(residual[at + j]);
        result.x[j] = static_cast<T>(value);
      }
      *reinterpret_cast<Pair*>(out + at) = result;
    }
  }
}
"""
# MLX looks a kernel up by a hash of all of its source at every launch.
SHORT = "\n".join(line.strip() for line in SOURCE.splitlines())
