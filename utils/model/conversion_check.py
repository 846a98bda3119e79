"""Does a converted model work? It reads a fixed text, as its source does, and both are compared.

Nothing here imports MLX at module level: `--help` of the converter has to stay quick.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..base.errors import RunError, readable
from ..base.say import complain
from ..data import files
from ..data.tokenizer import Tokenizer
from ..device import runtime
from . import loading
from .shape import ModelConfig

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

PROMPT = "Two and two make"
FIXED_TEXT = (
    "A farmer has 17 sheep and buys 25 more at the market. How many sheep does she have now? "
    "She starts with 17 and adds 25, so there are 17 + 25 = 42 sheep. The answer is 42.\n"
    "def add(a, b):\n    return a + b\n"
    "Water boils at a lower temperature on a mountain, because the air is thinner there."
)
FAR_APART = 0.5  # nats: the average token became e^0.5 = 1.6 times more or less probable


class Reading(NamedTuple):
    """How a model reads the fixed text, and what it is made of."""

    tokens: list[int]
    logprobs: list[float]
    """Of every token after the first."""
    chance: float
    """Log-prob of a token if all were equally probable."""
    parameters: int
    bits_per_weight: float
    continuation: str
    """A few tokens generated after the prompt."""


class Loaded(NamedTuple):
    """A text or vision model in one form."""

    model: nn.Module
    tokenizer: Tokenizer
    forward: Callable[[mx.array], mx.array]
    """ids (1, T) -> logits (1, T, vocabulary)"""
    generate: Callable[[int], str]
    """number of tokens -> what follows the prompt"""


def load_text_model(folder: Path, trust: bool, model_config: ModelConfig) -> Loaded:
    from mlx_lm import generate, load

    model, tokenizer, *_ = load(
        str(folder),
        tokenizer_config={"trust_remote_code": trust},
        model_config=model_config,
        trust_remote_code=trust,
    )
    prompt = tokenizer.encode(PROMPT) or [0]
    files.check_ids(str(folder), prompt, loading.embeddings(model))
    return Loaded(
        model,
        tokenizer,
        model,
        lambda count: generate(model, tokenizer, prompt=prompt, max_tokens=count),
    )


def load_vision_model(folder: Path, trust: bool, model_config: ModelConfig) -> Loaded:
    """Without an image, its language model reads and writes alone."""
    from mlx_vlm import generate, load

    model, processor = load(str(folder), trust_remote_code=trust)
    return Loaded(
        model,
        getattr(processor, "tokenizer", processor),
        lambda ids: model(ids, None, None).logits,
        lambda count: generate(model, processor, PROMPT, max_tokens=count).text,
    )


def read_fixed_text(folder: Path, trust: bool, vision: bool, model_config: ModelConfig) -> Reading:
    """Load a model; let it read and write. In float32 on the CPU, as the trainer runs there."""
    import mlx.core as mx
    import numpy as np
    from mlx_lm.utils import compute_bits_per_weight, get_total_parameters

    load = load_vision_model if vision else load_text_model
    loaded = load(folder, trust, model_config)
    model = loaded.model
    size = get_total_parameters(model), compute_bits_per_weight(model)
    if mx.default_device() == mx.cpu:
        model.set_dtype(mx.float32)  # the CPU has no mixture of experts in half precision
    tokens = list(loaded.tokenizer.encode(FIXED_TEXT))
    if len(tokens) < 2:
        raise RunError("the tokenizer makes less than two tokens of a text of 60 words")
    files.check_ids(str(folder), tokens, loading.embeddings(model))
    logits = loaded.forward(mx.array([tokens]))[0, :-1].astype(mx.float32)  # (T - 1, vocabulary)
    chosen = mx.take_along_axis(logits, mx.array(tokens[1:])[:, None], axis=-1)[:, 0]
    logprobs = chosen - mx.logsumexp(logits, axis=-1)  # (T - 1,)
    if not loading.are_numbers(logits):
        raise RunError(f"{folder} computes NaN or inf")
    numbers = [float(value) for value in np.array(logprobs)]
    return Reading(tokens, numbers, -math.log(logits.shape[-1]), *size, loaded.generate(8))


def read_source(
    folder: Path, trust: bool, vision: bool, model_config: ModelConfig
) -> Reading | None:
    """How the source reads the fixed text; None if it does not fit into memory."""
    import mlx.core as mx

    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if mx.default_device() == mx.cpu:
        size *= 2  # at worst: half precision, computed in float32
    if size > runtime.device_memory_bytes():
        text = f"the source ({size / 1e9:,.1f} GB) does not fit into memory to compare with"
        complain(text)
        return None
    reading = read_fixed_text(folder, trust, vision, model_config)
    mx.clear_cache()
    return reading


def compare(before: Reading | None, after: Reading) -> str:
    """What changed in the log-probs of the fixed text, in a sentence."""
    mean = sum(after.logprobs) / len(after.logprobs)
    text = f"log-prob per token of a fixed text ({len(after.logprobs)} tokens): {mean:.3f}"
    if before is None:
        return f"{text}; not compared with the source"
    if before.tokens != after.tokens:
        raise RunError("the converted tokenizer reads a fixed text differently from the source's")
    pairs = zip(before.logprobs, after.logprobs, strict=True)
    differences = [abs(old - new) for old, new in pairs]
    average = sum(differences) / len(differences)
    source = sum(before.logprobs) / len(before.logprobs)
    text += f", source {source:.3f}; difference to the source: mean {average:.2g}, "
    text += f"largest {max(differences):.2g}"
    if source < before.chance:
        text += "\nnote: to the source this text is less probable than chance, so that says little"
    elif average > FAR_APART:
        text += "\nwarning: that is far from the source; more bits would bring it closer"
    return text


def describe(folder: Path, after: Reading) -> str:
    """What a model folder or file is, in a line."""
    files = [folder] if folder.is_file() else folder.rglob("*")
    size = sum(file.stat().st_size for file in files if file.is_file())
    bits = 8 * size / after.parameters if folder.is_file() else after.bits_per_weight
    count, unit = after.parameters, "B" if after.parameters >= 1e9 else "M"
    return (
        f"{count / (1e9 if unit == 'B' else 1e6):.3g} {unit} parameters, {readable(size)} on disk, "
        f"{bits:.2f} bits per weight; it continues "
        f"{PROMPT!r} with {after.continuation!r}"
    )
