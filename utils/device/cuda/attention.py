"""Attention on CUDA where MLX's fused kernels leave out what GRPO needs.

The gradient: MLX has a fused backward pass for whole tiles of 128 queries only, see `in_tiles`.

One new token per row: MLX's kernel for one query takes no mask, and no number of keys that is on
the device, and reads the keys and values once for every query head. `to_rows` reads them once for
all. One H200, microseconds a layer with 12 heads on 2 of keys and values, head size 128, bfloat16
(`benchmarks/micro.py --stage attention` has all layers of a model, in turn):

    rows  positions  MLX, no mask  `to_rows`
      16        278            33         41
      64        278            52         42
     256        278           168         84
      64      1,200           202         56
      64      4,400           523        132
      16      4,400           164        124
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from .. import runtime
from ..marks import DecodeCache, GradientCache, Rotated, Rotation, Rows
from ..patch import Way, difference, replace

TILE = 128  # mlx/backend/cuda: ScaledDotProductAttentionVJP
# Of a block of `to_rows`: the best for this table among 2 to 16 warps, and 8 to 32 lanes. Positions
# are loaded a turn ahead: 64 rows at 4,400 took 225 microseconds without, 132 with it.
WORKERS, AT_ONCE = 16, 4
# So many blocks of heads of 64 keep the GPU busy with a warp each, and joining the parts of more
# takes longer than they save.
MANY, FEW_WORKERS = 1024, 4
NUMBERS = 56  # of queries that a lane holds in registers: 7 heads of 128

Attention = Callable[..., mx.array]
"""What maps queries, keys and values to their means: mlx-lm's function, with its keywords."""
Mask = mx.array | str | None
"""An array, "causal", or nothing."""


def applies() -> bool:
    return runtime.platform_name() == "cuda"


def switch_on(model: nn.Module) -> None:
    """Let the model's attention go by this module where its cache is ours or none.

    With other caches nothing changes.
    """
    from mlx_lm.models import base

    name = "scaled_dot_product_attention"
    replace(model, name, base.scaled_dot_product_attention, dispatching)


def problem() -> str:
    """Of whole tiles; decoding compares its first steps itself (rollouts/compiled_step.py)."""
    shape = (1, 2, TILE + 2, 64)
    queries, keys, values = (
        mx.random.normal(shape, dtype=mx.bfloat16, key=mx.random.key(n)) for n in range(3)
    )
    plain = partial(mx.fast.scaled_dot_product_attention, scale=64**-0.5)
    args = queries, keys, values
    return difference(plain(*args, mask="causal"), in_tiles(plain, *args, "causal"), 0.02)


DISPATCHING = Way("attention by kernels of our own", applies, problem, switch_on)


def dispatching(plain: Attention) -> Attention:
    """mlx-lm's attention function, but for caches with rows of their own and for the gradient."""

    @wraps(plain)
    def attention(
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        cache: object,
        scale: float,
        mask: Mask,
        sinks: mx.array | None = None,
    ) -> mx.array:
        if sinks is None and (cache is None or isinstance(cache, GradientCache)):
            return in_tiles(partial(plain, cache=cache, scale=scale), queries, keys, values, mask)
        if not isinstance(cache, DecodeCache) or cache.rows.position is None:
            return plain(queries, keys, values, cache, scale=scale, mask=mask, sinks=sinks)
        alike = fits(queries, keys, values, cache.keys, cache.values)
        if sinks is not None or mask is not cache.rows.all_seen or not alike:
            raise ValueError("its attention is not a plain one to all tokens")
        rotation = None
        query, key = (cache.rows.rotated.get(id(x)) for x in (queries, keys))
        if query and key and query.rotation == key.rotation:  # the kernel's: what MLX made goes
            queries, keys, rotation = query.x, key.x, query.rotation
        return to_rows(queries, keys, values, cache, scale, rotation)

    return attention


def in_tiles(
    plain: Attention, queries: mx.array, keys: mx.array, values: mx.array, mask: Mask
) -> mx.array:
    """plain(queries, keys, values, mask=mask) of (B, heads, T, D), with T padded to whole tiles.

    What is added comes last: causal attention does not look there, and with a mask the queries that
    are added see everything, but what they see is dropped. One H200, 1.5B in bfloat16, gradient of
    64 completions of 200 tokens with shared prompts: 354 ms without, 340 ms with it.
    """
    count = queries.shape[2]
    causal = isinstance(mask, str)
    rest = -count % TILE
    if rest == 0 or not has_tiles(queries) or (causal and count != keys.shape[2]):
        return plain(queries, keys, values, mask=mask)
    if causal:
        keys, values = padded(keys, rest), padded(values, rest)
    elif isinstance(mask, mx.array) and mask.shape[-2] == count:
        mask = padded(mask, rest)
    return plain(padded(queries, rest), keys, values, mask=mask)[:, :, :count]


def has_tiles(queries: mx.array) -> bool:
    """Whether MLX has fused kernels for them: of several tokens, in half precision."""
    count, size = queries.shape[2:]
    half = queries.dtype in (mx.bfloat16, mx.float16)
    return count > 1 and half and size <= 128 and size % 8 == 0


def padded(x: mx.array, more: int) -> mx.array:
    """(..., T, D) with so many rows more, of zeros or, in a mask, of what may be seen."""
    widths = [(0, 0)] * (x.ndim - 2) + [(0, more), (0, 0)]
    return mx.pad(x, widths, constant_values=mx.array(x.dtype == mx.bool_, x.dtype))


def fits(*arrays: mx.array) -> bool:
    """Whether `to_rows` takes these: on a GPU, for heads of up to 256 in steps of 16."""
    alike, size = len({(x.dtype, x.shape[-1]) for x in arrays}) == 1, arrays[0].shape[-1]
    return mx.default_device() == mx.gpu and alike and size <= 256 and size % lanes_of(size) == 0


def lanes_of(size: int) -> int:
    """Threads for a head of so many numbers: of 64 each reads 16 bytes at once."""
    return 8 if size == 64 else 16


@contextmanager
def noting_rotations(rows: Rows) -> Iterator[None]:
    """Let `rows` know which arrays are rotary embeddings at its offset, and of what.

    `to_rows` does the same to what it loads: two kernels less a layer, and those that nobody needs
    any more are dropped when the step is compiled. One H200, 1.5B, steps of both kinds in turn
    (`benchmarks/micro.py --stage decode`): 1.10 to 1.19 times faster at 64 rows, 1.08 to 1.12
    at 256: the GPU waits for the host, which starts 315 kernels a step instead of 371.
    """
    fast: Any = mx.fast
    plain = fast.rope
    kept: list[mx.array] = []  # or an id could come again

    def rope(x: mx.array, dims: int, **how: Any) -> mx.array:
        y = plain(x, dims, **how)
        rotation = rotation_of(dims, x.shape[-1], **how)
        if rotation and how["offset"] is rows.offset_at_position:
            rows.rotated[id(y)] = Rotated(x, rotation)
            kept.append(y)
        return y

    fast.rope = rope
    try:
        yield
    finally:
        fast.rope = plain
        rows.rotated.clear()


def rotation_of(
    dims: int,
    size: int,
    traditional: bool,
    base: float | None,
    scale: float,
    freqs: mx.array | None = None,
    **_: object,
) -> Rotation | None:
    """As the kernel takes it; None where the lanes of a pair are no power of two apart."""
    own, half = size // lanes_of(size), dims // 2
    if own == 0 or (own % 2 if traditional else half % own or (half // own) & (half // own - 1)):
        return None
    if base:
        periods = [base ** (n / half) for n in range(half)]
    else:
        assert freqs is not None, "`mx.fast.rope` takes one of the two"
        periods = cast(list[float], freqs.tolist())
    return Rotation(dims, traditional, tuple(scale / period for period in periods))


@functools.cache
def on_device(numbers: tuple[float, ...]) -> mx.array:
    array = mx.array(numbers, mx.float32) + 0  # else it would be in the host's memory
    mx.eval(array)
    return array


def to_rows(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: DecodeCache,
    scale: float,
    rotation: Rotation | None = None,
) -> mx.array:
    """(B, heads, 1, D) queries to all that the tokens at `cache.rows.position` see.

    `cache` has (B, groups, N, D) keys and values. The tokens' own (B, groups, 1, D) ones are stored
    there, in place: MLX would copy all of them for each token while the GPU is not yet done with
    the one before. So nothing else may hold them. A `rotation` is applied to queries and keys.
    """
    heads = queries.shape[1]
    return _launched("parts", [queries, keys, values], heads, queries.shape, cache, scale, rotation)


def to_rows_of_product(
    product: mx.array, heads: int, cache: DecodeCache, scale: float, rotation: Rotation
) -> mx.array:
    """The same for a (B, (heads + 2 groups) D) product, whose columns are the queries, keys and
    values one after the other: (B, heads D).

    MLX would make six views of it, and a view costs the host about as much as a kernel.
    """
    shape = len(product), heads * cache.keys.shape[3]
    return _launched("product", [product], heads, shape, cache, scale, rotation)


def _launched(
    given: str,
    tokens: list[mx.array],
    heads: int,
    shape: tuple[int, ...],
    cache: DecodeCache,
    scale: float,
    rotation: Rotation | None,
) -> mx.array:
    groups, size = cache.keys.shape[1], cache.keys.shape[3]
    lanes, rows = lanes_of(size), len(tokens[0])
    most = max(1, NUMBERS * lanes // size)
    together = max(n for n in range(1, most + 1) if heads // groups % n == 0)
    blocks = heads // together
    workers = FEW_WORKERS if lanes == 8 and blocks * rows >= MANY else WORKERS
    dims, traditional, frequencies = rotation or Rotation(0, False, (0.0,))
    sizes = {"D": size, "HEADS": together, "LANES": lanes, "WORKERS": workers, "AT_ONCE": AT_ONCE}
    sizes |= {"DIMS": dims, "TRADITIONAL": traditional}
    seen = cache.rows.padding, cache.rows.position
    (out,) = kernel(scale, given)(
        inputs=[*tokens, cache.keys, cache.values, *seen, on_device(frequencies)],
        template=[("T", tokens[0].dtype), *sizes.items()],
        grid=(blocks * workers * lanes, rows, 1),
        threadgroup=(workers * lanes, 1, 1),
        output_shapes=[shape],
        output_dtypes=[tokens[0].dtype],
    )
    return out


@functools.cache
def kernel(scale: float, given: str = "parts") -> Callable[..., list[mx.array]]:
    """The kernel of `to_rows`; MLX compiles it for each type and size that it meets."""
    names, where = GIVEN[given]
    made = mx.fast.cuda_kernel(
        name="attention_to_rows" if given == "parts" else "attention_to_rows_of_product",
        input_names=[*names, "keys", "values", "padding", "position", "frequencies"],
        output_names=["out"],
        source=SOURCE.replace("WHERE", where).replace("SCALE", f"{float(scale)!r}f"),
        # The stored ones are, and the others are parts of what one product computes for all three.
        ensure_row_contiguous=False,
    )
    return cast(Callable[..., list[mx.array]], made)


# How the tokens come, and where those of a block's row, group and first head are there.
GIVEN = {
    "parts": (
        ("queries", "new_keys", "new_values"),
        """
const T* own_key = new_keys + row * new_keys_strides[0] + group * new_keys_strides[1];
const T* own_value = new_values + row * new_values_strides[0] + group * new_values_strides[1];
const T* own_query = queries + row * queries_strides[0] + head * queries_strides[1];
const int64_t next_query = queries_strides[1];
""",
    ),
    "product": (
        ("product",),
        """
const T* own_query = product + row * product_strides[0];
const T* own_key = own_query + (int64_t(gridDim.x) * HEADS + group) * D;
const T* own_value = own_key + int64_t(groups) * D;
own_query += head * D;
const int64_t next_query = D;
""",
    ),
}

# A block computes HEADS query heads of one group of a row. A worker, LANES threads of a warp, takes
# AT_ONCE positions at a time, and of each a lane has D / LANES numbers; so keys and values are read
# once for all heads. The workers' softmaxes are put together at the end.
SOURCE = """
constexpr int OWN = D / LANES;
constexpr float LOWEST = -1e30f;
struct alignas((OWN & -OWN) * sizeof(T)) Part { T x[OWN]; };
__shared__ float bests[WORKERS][HEADS], totals[WORKERS][HEADS], outs[WORKERS][D];

const int lane = threadIdx.x % LANES, worker = threadIdx.x / LANES, row = blockIdx.y;
const int groups = keys_shape[1], room = keys_shape[2];
const int group = blockIdx.x / (gridDim.x / groups);
const int64_t head = blockIdx.x * HEADS;  // the first of the block's
const int64_t start = (int64_t(row) * groups + group) * room * D + lane * OWN;
const int gap = padding[row], last = position[row] - gap;  // positions before the row's own

// Rotary embedding: of two numbers APART lanes, or next to each other. `last` is the offset.
constexpr int APART = TRADITIONAL || DIMS == 0 ? 0 : DIMS / 2 / OWN;
float cosine[OWN], sine[OWN];
#pragma unroll
for (int i = 0; i < OWN && DIMS; i++) {
  const int d = lane * OWN + i;
  const int pair = TRADITIONAL ? d / 2 : d % (DIMS / 2);
  sincosf(d < DIMS ? last * frequencies[pair] : 0.0f, &sine[i], &cosine[i]);
  if (TRADITIONAL ? d % 2 == 0 : d < DIMS / 2) sine[i] = -sine[i];
}
auto rotate = [&](float (&x)[OWN]) {
  float other[OWN];
  #pragma unroll
  for (int i = 0; i < OWN; i++) {
    other[i] = TRADITIONAL ? x[i ^ 1] : __shfl_xor_sync(0xffffffff, x[i], APART);
  }
  #pragma unroll
  for (int i = 0; i < OWN; i++) x[i] = x[i] * cosine[i] + other[i] * sine[i];
};

WHERE
Part new_key = *reinterpret_cast<const Part*>(own_key + lane * OWN);
const Part new_value = *reinterpret_cast<const Part*>(own_value + lane * OWN);
if (DIMS) {
  float x[OWN];
  #pragma unroll
  for (int i = 0; i < OWN; i++) x[i] = static_cast<float>(new_key.x[i]);
  rotate(x);
  #pragma unroll
  for (int i = 0; i < OWN; i++) new_key.x[i] = static_cast<T>(x[i]);
}
if (worker == 0) {
  const int64_t at = start + int64_t(last + gap) * D;
  *reinterpret_cast<Part*>(const_cast<T*>(keys + at)) = new_key;
  *reinterpret_cast<Part*>(const_cast<T*>(values + at)) = new_value;
}

float q[HEADS][OWN], sum[HEADS][OWN], best[HEADS], total[HEADS];
#pragma unroll
for (int h = 0; h < HEADS; h++) {
  best[h] = LOWEST;
  total[h] = 0;
  const Part part = *reinterpret_cast<const Part*>(own_query + h * next_query + lane * OWN);
  #pragma unroll
  for (int i = 0; i < OWN; i++) {
    q[h][i] = SCALE * 1.44269504f * static_cast<float>(part.x[i]);  // exponents of 2, not e
    sum[h][i] = 0;
  }
  if (DIMS) rotate(q[h]);
}

// All workers of a warp take as many turns: they exchange numbers.
Part next_key[AT_ONCE], next_value[AT_ONCE];
auto load = [&](int n) {
  #pragma unroll
  for (int j = 0; j < AT_ONCE; j++) {
    const int64_t at = start + int64_t(n + j + gap) * D;
    const bool stored = n + j < last;
    next_key[j] = stored ? *reinterpret_cast<const Part*>(keys + at) : new_key;
    next_value[j] = stored ? *reinterpret_cast<const Part*>(values + at) : new_value;
  }
};
load(worker * AT_ONCE);
for (int first = 0; first <= last; first += WORKERS * AT_ONCE) {
  const int n = first + worker * AT_ONCE;
  Part key[AT_ONCE], value[AT_ONCE];
  #pragma unroll
  for (int j = 0; j < AT_ONCE; j++) {
    key[j] = next_key[j];
    value[j] = next_value[j];
  }
  load(n + WORKERS * AT_ONCE);
  #pragma unroll
  for (int h = 0; h < HEADS; h++) {
    float score[AT_ONCE], top = best[h];
    #pragma unroll
    for (int j = 0; j < AT_ONCE; j++) {
      score[j] = 0;
      #pragma unroll
      for (int i = 0; i < OWN; i++) score[j] += q[h][i] * static_cast<float>(key[j].x[i]);
      #pragma unroll
      for (int other = LANES / 2; other; other /= 2) {
        score[j] += __shfl_xor_sync(0xffffffff, score[j], other);
      }
      score[j] = n + j <= last ? score[j] : LOWEST;
      top = fmaxf(top, score[j]);
    }
    const float factor = exp2f(best[h] - top);
    best[h] = top;
    total[h] *= factor;
    #pragma unroll
    for (int i = 0; i < OWN; i++) sum[h][i] *= factor;
    #pragma unroll
    for (int j = 0; j < AT_ONCE; j++) {
      const float weight = exp2f(score[j] - top);
      total[h] += weight;
      #pragma unroll
      for (int i = 0; i < OWN; i++) sum[h][i] += weight * static_cast<float>(value[j].x[i]);
    }
  }
}

#pragma unroll
for (int h = 0; h < HEADS; h++) {
  if (lane == 0) {
    bests[worker][h] = best[h];
    totals[worker][h] = total[h];
  }
  #pragma unroll
  for (int i = 0; i < OWN; i++) outs[worker][lane * OWN + i] = sum[h][i];
  __syncthreads();
  for (int i = threadIdx.x; i < D; i += blockDim.x) {
    float top = LOWEST, weighted = 0, weights = 0;
    for (int w = 0; w < WORKERS; w++) top = fmaxf(top, bests[w][h]);
    for (int w = 0; w < WORKERS; w++) {
      const float factor = exp2f(bests[w][h] - top);
      weights += factor * totals[w][h];
      weighted += factor * outs[w][i];
    }
    out[(int64_t(row) * gridDim.x * HEADS + head + h) * D + i] = static_cast<T>(weighted / weights);
  }
  __syncthreads();
}
"""
