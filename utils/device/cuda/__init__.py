"""What only CUDA runs: an attention kernel for decoding, whole tiles for the gradient's attention,
and quantized products of all rows at once."""

from . import attention, quantized_rows
from .attention import noting_rotations

WAYS = [attention.DISPATCHING, quantized_rows.IN_ROWS]
__all__ = ["WAYS", "noting_rotations"]
