"""What only CUDA runs: kernels for decoding (attention, SwiGLU), whole tiles for the gradient's
attention, and quantized products of all rows at once."""

from . import attention, products, quantized_rows, swiglu
from .attention import noting_rotations

WAYS = [attention.DISPATCHING, quantized_rows.IN_ROWS]
__all__ = ["WAYS", "attention", "noting_rotations", "products", "swiglu"]
