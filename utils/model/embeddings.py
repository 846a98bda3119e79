"""Embeddings whose gradient is summed in float32.

MLX adds up the gradient of a row in the type of the weights, one occurrence of its token after the
other: in bfloat16, 4,000 equal ones come to 256, because 256 + 1 is 256 again. Other weights get
theirs from matrix products, which add in float32.
"""

import mlx.core as mx
import mlx.nn as nn

from ..device.typed import with_gradient

HALF = (mx.bfloat16, mx.float16)


class Embedding(nn.Embedding):
    def __call__(self, x: mx.array) -> mx.array:
        if not self.training or self.weight.dtype not in HALF:
            return super().__call__(x)

        def rows(weight: mx.array) -> mx.array:
            return weight[x]

        def summed(weight: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
            total = mx.zeros(weight.shape, mx.float32).at[x].add(cotangent.astype(mx.float32))
            return total.astype(weight.dtype)

        return with_gradient(rows, summed)(self.weight)


def sum_in_float32(model: nn.Module) -> None:
    """Let the embeddings of a model that is trained in full do so."""
    for _, module in model.named_modules():
        if type(module) is nn.Embedding:
            object.__setattr__(module, "__class__", Embedding)
