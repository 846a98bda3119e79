"""Other policies made of the one that learns: in 4 bits, or in full precision."""

import copy
import inspect
import re

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

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
        say(f"policy    can't be packed in 64s, so rollouts use them unquantized: {names}")
    return any(map(_can_quantize, floats.values()))


def dequantize(model: nn.Module) -> nn.Module:
    """The model in full precision, in place; mlx-lm's own leaves the latent attention of DeepSeek
    and its like packed, and what is written so can't be read again."""
    from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
    from mlx_lm.utils import dequantize_model

    model = dequantize_model(model)
    plain = []
    for name, packed in model.named_modules():
        if isinstance(packed, QuantizedMultiLinear):
            how = packed.group_size, packed.bits, packed.mode
            weight = mx.dequantize(packed.weight, packed.scales, packed.get("biases"), *how)
            heads, outputs, inputs = weight.shape
            layer = MultiLinear(inputs, outputs, heads)
            layer.weight = weight
            plain.append((name, layer))
    model.update_modules(tree_unflatten(plain))
    return model


def _can_quantize(module: nn.Module) -> bool:
    if not hasattr(module, "to_quantized") or module.weight.shape[-1] % 64:
        return False
    return "mode" in inspect.signature(module.to_quantized).parameters  # afm7's can't be told
