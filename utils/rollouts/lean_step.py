"""A decode step of Llama and Qwen2 in five to eight operations a layer.

mlx-lm's own is 27: views of what a product has made, of heads, of transposed weights. A view costs
MLX's host a third of a launch, and a product several launches, for cuBLAS is asked anew each time;
a small model's step is bound by just that. So here products are of matrices, two dimensions each,
with weights that are transposed beforehand; two kernels read the parts of a product where they are;
and small products are kernels of our own, with the norm before and the sum after (device/cuda).
One H200, SmolLM2-135M in bfloat16, 128 rows: 1.6 times the tokens/s (`benchmarks/ragged.py`).
"""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn

from ..device import fast
from ..device.marks import Rotation
from .caches import RolloutCache

MODULES = ("mlx_lm.models.llama", "mlx_lm.models.qwen2")

Step = Callable[[mx.array, list[RolloutCache]], mx.array]
"""(B, 1) tokens and the cache of each layer -> (B, 1, V) logits."""


class Matrix(NamedTuple):
    """Of a linear layer."""

    matrix: mx.array  # (outputs, inputs)
    transposed: mx.array  # the same, as a view that is there already
    bias: mx.array | None

    @classmethod
    def of(cls, layer: nn.Module) -> "Matrix":
        return cls(layer.weight, layer.weight.T, layer.get("bias"))


class Layer(NamedTuple):
    """What a block is made of."""

    attention: nn.Module
    norms: tuple[nn.Module, nn.Module]
    projections: Matrix  # of queries, keys and values
    output: Matrix
    gate_and_up: Matrix
    down: Matrix


def of(model: nn.Module) -> Step | None:
    """The step of a view whose products are joined (rollouts/merged_layers.py); None where a part
    of the model is not what it takes."""
    cuda = fast.part("cuda")
    if cuda is None or type(model).__module__ not in MODULES:
        return None
    layers = _layers(model.layers, cuda)
    if not layers:
        return None
    mx.eval([x.transposed for layer in layers for x in layer if isinstance(x, Matrix)])
    small = cuda.products.fits(1, layers[0].output.matrix)
    products = cuda.products if small and not fast.problem_of(cuda.products.WAY) else None

    def step(tokens: mx.array, cache: list[RolloutCache]) -> mx.array:
        x = model.model.embed_tokens(tokens[:, 0])  # (B, H)
        for layer, stored in zip(layers, cache, strict=True):
            x = _applied(layer, x, stored, cuda, products)
        return _logits(model, model.model.norm(x))[:, None]

    return step


def _applied(
    layer: Layer, x: mx.array, cache: RolloutCache, cuda: ModuleType, products: ModuleType | None
) -> mx.array:
    """(B, H) -> (B, H)."""
    own, second = layer.attention, layer.norms[1]
    product = _of_norm(layer.norms[0], x, layer.projections, products)
    rotation = _rotation(own, cache, x)
    seen = cuda.attention.to_rows_of_product(product, own.n_heads, cache, own.scale, rotation)
    x = _with_sum(x, seen, layer.output, products)
    matrix = layer.gate_and_up.matrix
    if products and products.fits(len(x), matrix):
        inner = products.product(x, matrix, (second.weight, second.eps), swiglu=True)
    else:
        inner = cuda.swiglu.of_product(second(x) @ layer.gate_and_up.transposed)
    return _with_sum(x, inner, layer.down, products)


def _of_norm(norm: nn.Module, x: mx.array, by: Matrix, products: ModuleType | None) -> mx.array:
    if products and by.bias is None and products.fits(len(x), by.matrix):
        return cast(mx.array, products.product(x, by.matrix, (norm.weight, norm.eps)))
    normed = cast(mx.array, norm(x))
    bias = by.bias
    return normed @ by.transposed if bias is None else mx.addmm(bias, normed, by.transposed)


def _with_sum(x: mx.array, of: mx.array, by: Matrix, products: ModuleType | None) -> mx.array:
    if products and products.fits(len(x), by.matrix):
        return cast(mx.array, products.product(of, by.matrix, residual=x))
    return mx.addmm(x, of, by.transposed)


def _rotation(attention: nn.Module, cache: RolloutCache, x: mx.array) -> Rotation:
    """What its rotary embedding does to heads, as `noting_rotations` sees it."""
    heads = mx.zeros((len(x), 1, 1, cache.keys.shape[3]), x.dtype)
    rotated = cache.rows.rotated.get(id(attention.rope(heads, offset=cache.offset)))
    if rotated is None or rotated.x is not heads:
        raise ValueError("its rotary embedding is not one that the kernel can do")
    return rotated.rotation


def _logits(model: nn.Module, x: mx.array) -> mx.array:
    tied = model.args.tie_word_embeddings
    return model.model.embed_tokens.as_linear(x) if tied else model.lm_head(x)


def _layers(blocks: Sequence[nn.Module], cuda: ModuleType) -> list[Layer]:
    """Of all blocks, or none."""
    found = [layer for layer in map(_layer, blocks) if layer is not None]
    fit = all(cuda.swiglu.fits(layer.down.matrix.shape[1]) for layer in found)
    return found if fit and len(found) == len(blocks) else []


def _layer(block: nn.Module) -> Layer | None:
    attention, mlp = block.self_attn, block.mlp
    if getattr(block, "use_sliding", False):
        return None
    projections = _joined([attention.q_proj, attention.k_proj, attention.v_proj])
    gate_and_up = _joined([mlp.gate_proj, mlp.up_proj])
    plain = [type(x) is nn.Linear and "bias" not in x for x in (attention.o_proj, mlp.down_proj)]
    if projections is None or gate_and_up is None or "bias" in gate_and_up or not all(plain):
        return None
    return Layer(
        attention,
        (block.input_layernorm, block.post_attention_layernorm),
        Matrix.of(projections),
        Matrix.of(attention.o_proj),
        Matrix.of(gate_and_up),
        Matrix.of(mlp.down_proj),
    )


def _joined(parts: Sequence[object]) -> nn.Module | None:
    """The plain linear layer that computes all these, if there is one."""
    products = {id(x): x for x in (_product(part) for part in parts)}
    product = products.popitem()[1]
    layer = getattr(product, "layer", None)
    return layer if not products and type(layer) is nn.Linear else None


def _product(part: object) -> object:
    """The `Product` whose method stands in for a layer of the view."""
    return getattr(getattr(part, "func", None), "__self__", None)
