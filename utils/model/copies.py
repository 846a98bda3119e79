"""Other policies made of the one that learns: without its adapters, or in 4 bits."""

import copy
import re

import mlx.nn as nn

from ..base.say import say
from . import loading


def quantize_copy(model: nn.Module) -> nn.Module:
    """A frozen 4-bit copy (groups of 64); what is quantized or can't be grouped is shared."""
    quantized = copy.deepcopy(model)  # shares arrays until nn.quantize replaces them
    nn.quantize(quantized, group_size=64, bits=4, class_predicate=lambda _, m: _can_quantize(m))
    quantized.freeze()
    return quantized


def quantizes(model: nn.Module) -> bool:
    """Whether `quantize_copy` changes any layer; says which it would leave as they are.

    Nothing of a model that is quantized already: whoever left a layer in full precision had a
    reason.
    """
    if loading.is_quantized(model):
        return False
    floats = {n: m for n, m in model.named_modules() if hasattr(m, "to_quantized")}
    shared = {re.sub(r"\.\d+\.", ".*.", n) for n, m in floats.items() if not _can_quantize(m)}
    if shared:
        names = ", ".join(sorted(shared))
        say(f"policy    not a multiple of 64 wide, so rollouts use them unquantized: {names}")
    return any(map(_can_quantize, floats.values()))


def _can_quantize(module: nn.Module) -> bool:
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % 64 == 0
