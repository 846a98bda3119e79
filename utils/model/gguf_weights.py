"""Write a GGUF file out as a model folder: config.json, weights, tokenizer.

The numbers are those of the file, in float32 where it holds them quantized, or packed in MLX's
affine quantization where that holds the very same numbers. What llama.cpp changed for itself is
undone: the order of rows that its rotary embedding wants, and the 1 added to Gemma's norms.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..base.errors import UserError
from .gguf_file import GGUF, Tensor, unpack
from .gguf_tokenizer import context_length, end_tokens, token_number, tokens_of, write_tokenizer
from .shape import JsonObject, ModelConfig

if TYPE_CHECKING:
    import mlx.core as mx
    import numpy as np

SHARD_BYTES = 2**30
SCALES = (  # 0 and 1 stand for none
    "attention.scale", "attention.clamp_kqv", "embedding_scale", "logit_scale", "residual_scale",
    "rope.scaling.attn_factor",
)  # fmt: skip
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
FOUR_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


class Architecture(NamedTuple):
    """What llama.cpp calls an architecture, in terms of mlx-lm."""

    model_type: str
    class_name: str
    extra_names: dict[str, str] = {}  # noqa: RUF012  never changed
    paired_rows: bool = False
    """llama.cpp rotates neighbours; its rows of q and k stand in that order."""
    norms_plus_one: bool = False
    biases: tuple[str, ...] = ()
    """Layers that always have one."""


ALWAYS_TIED = ("gemma", "gemma2")  # in mlx-lm
QKV = ("attn_q", "attn_k", "attn_v")
LLAMA = Architecture("llama", "LlamaForCausalLM", paired_rows=True)
ARCHITECTURES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", biases=QKV),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", HEAD_NORMS),
    "gemma": Architecture("gemma", "GemmaForCausalLM", norms_plus_one=True),
    "gemma2": Architecture("gemma2", "Gemma2ForCausalLM", FOUR_NORMS, norms_plus_one=True),
    "gemma3": Architecture(
        "gemma3_text", "Gemma3ForCausalLM", HEAD_NORMS | FOUR_NORMS, norms_plus_one=True
    ),
}


class Packing(NamedTuple):
    """A GGUF type in MLX's affine quantization: number = scale x level + bias, 32 to a scale."""

    bits: int
    middle: int
    """The level that means zero, where the type stores no bias of its own."""


GROUP_SIZE = 32
PACKINGS = {
    "Q4_0": Packing(4, 8),
    "Q4_1": Packing(4, 0),
    "Q5_0": Packing(5, 16),
    "Q5_1": Packing(5, 0),
    "Q8_0": Packing(8, 128),
}


def write_model(file: GGUF, folder: Path, keep_quantized: bool = False) -> str:
    """Write config.json, generation_config.json, weights and tokenizer to a new folder.

    Returns what stayed packed, in a line.

    Raises:
        UserError: an unknown architecture, or weights or a tokenizer that do not go with it.
    """
    config = model_config(file)
    check_tensors(file, config)
    folder.mkdir(parents=True)
    write_tokenizer(file, folder)
    packed = packable(file) if keep_quantized else []
    if keep_quantized:
        config |= quantization(file, packed)
    write_json(folder / "config.json", config)
    ends = {"bos_token_id": config.get("bos_token_id"), "eos_token_id": config["eos_token_id"]}
    write_json(folder / "generation_config.json", {k: v for k, v in ends.items() if v is not None})
    write_weights(file, config, packed, folder)
    return what_is_packed(file, packed)


def kinds_of(file: GGUF, but: frozenset[str] = frozenset()) -> str:
    """How many tensors have each type, apart from those named: "210 Q4_1, 61 F32"."""
    kinds = Counter(tensor.kind for name, tensor in file.tensors.items() if name not in but)
    ordered = sorted(kinds.items(), key=lambda pair: (-pair[1], pair[0]))
    return ", ".join(f"{count} {kind}" for kind, count in ordered)


def what_is_packed(file: GGUF, packed: list[str]) -> str:
    single = [name for name, tensor in file.tensors.items() if len(tensor.shape) < 2]
    others = kinds_of(file, frozenset([*packed, *single]))
    text = f"{len(packed)} matrices stay packed"
    if not others:
        return text
    return f"{text}; {others} do not (MLX's quantization holds {', '.join(PACKINGS)} exactly)"


def write_json(path: Path, content: JsonObject) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def architecture_of(file: GGUF) -> Architecture:
    name = file.need("general.architecture", str)
    if name not in ARCHITECTURES:
        raise UserError(
            f"{file.path} has the architecture {name!r}; those that can be converted are "
            f"{', '.join(ARCHITECTURES)}. Others: convert the model's Hugging Face folder instead"
        )
    return ARCHITECTURES[name]


def model_config(file: GGUF) -> ModelConfig:
    """config.json as mlx-lm and transformers read it."""
    architecture = architecture_of(file)
    name = file.need("general.architecture", str)
    refuse_what_is_not_read(file, name)
    hidden = file.need(f"{name}.embedding_length", int)
    heads = one_for_all_layers(file, f"{name}.attention.head_count", None)
    head_dim = file.get(f"{name}.attention.key_length", int) or hidden // max(heads, 1)
    check_heads(file, name, head_dim)
    vocabulary = file.tensors["token_embd.weight"].shape[0] if has_embedding(file) else 0
    config: ModelConfig = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "hidden_size": hidden,
        "num_hidden_layers": layer_count(file, name),
        "intermediate_size": one_for_all_layers(file, f"{name}.feed_forward_length", None),
        "num_attention_heads": heads,
        "num_key_value_heads": one_for_all_layers(file, f"{name}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": file.need(f"{name}.attention.layer_norm_rms_epsilon", float),
        "rope_theta": file.get(f"{name}.rope.freq_base", float) or 10000.0,
        "max_position_embeddings": context_length(file),
        "vocab_size": vocabulary,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": plain_dtype(file),
        "eos_token_id": one_or_list(end_tokens(file)),
    }
    bos = token_number(file, tokens_of(file), "bos")
    if bos is not None:
        config["bos_token_id"] = bos
    if scaling := rope_scaling(file, name, config):
        config["rope_scaling"] = scaling
    return config | settings_of(architecture, file, name, config)


def layer_count(file: GGUF, name: str) -> int:
    layers = file.need(f"{name}.block_count", int)
    if layers > len(file.tensors):
        raise UserError(f"{file.path} has {layers} layers, but {len(file.tensors)} tensors")
    return layers


def settings_of(
    architecture: Architecture, file: GGUF, name: str, config: ModelConfig
) -> ModelConfig:
    """What only some architectures have."""
    if architecture.model_type == "llama":
        biased = "blk.0.attn_q.bias" in file.tensors
        return {"attention_bias": biased, "mlp_bias": "blk.0.ffn_up.bias" in file.tensors}
    if architecture.model_type == "gemma2":
        return {
            "query_pre_attn_scalar": attention_scalar(config, layers_of_27b=46),
            "attn_logit_softcapping": file.get(f"{name}.attn_logit_softcapping", float) or 50.0,
            "final_logit_softcapping": file.get(f"{name}.final_logit_softcapping", float) or 30.0,
            "sliding_window": file.get(f"{name}.attention.sliding_window", int) or 4096,
        }
    if architecture.model_type == "gemma3_text":
        return {
            "query_pre_attn_scalar": attention_scalar(config, layers_of_27b=62),
            "sliding_window": file.need(f"{name}.attention.sliding_window", int),
            "sliding_window_pattern": sliding_pattern(file, name),
            "rope_local_base_freq": file.get(f"{name}.rope.freq_base_swa", float) or 10000.0,
        }
    return {}


def sliding_pattern(file: GGUF, name: str) -> int:
    """Every so many layers one attends to everything; a file may say it layer by layer."""
    key = f"{name}.attention.sliding_window_pattern"
    slides = file.metadata.get(key)
    if not isinstance(slides, list):
        return file.get(key, int) or 6
    period = next((n for n, slide in enumerate(slides, 1) if not slide), len(slides) + 1)
    if any(bool(slide) != (n % period > 0) for n, slide in enumerate(slides, 1)):
        raise UserError(f"{file.path}: {key} follows no period, which mlx-lm's gemma3 needs")
    return period


def attention_scalar(config: ModelConfig, layers_of_27b: int) -> int:
    """Not in the file: head_dim, but in the models of 27 B hidden_size / heads."""
    if config["num_hidden_layers"] == layers_of_27b:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return int(config["head_dim"])


def has_embedding(file: GGUF) -> bool:
    tensor = file.tensors.get("token_embd.weight")
    return tensor is not None and len(tensor.shape) == 2


def one_or_list(numbers: list[int]) -> int | list[int] | None:
    if not numbers:
        return None
    return numbers[0] if len(numbers) == 1 else numbers


def one_for_all_layers(file: GGUF, key: str, otherwise: int | None) -> int:
    """A number that may be written once or for every layer. Raises UserError where they differ."""
    value = file.metadata.get(key)
    if isinstance(value, list):
        if len(set(value)) != 1:
            raise UserError(f"{file.path} has layers of different kinds: {key} = {value[:8]}")
        return int(value[0])
    if value is None and otherwise is not None:
        return otherwise
    return file.need(key, int)


def refuse_what_is_not_read(file: GGUF, name: str) -> None:
    """Raises UserError for numbers that would make the model compute something else."""
    if file.get(f"{name}.expert_count", int):
        raise UserError(
            f"{file.path} is a mixture of experts, whose GGUF form is not read; convert the "
            "model's Hugging Face folder instead"
        )
    for key in SCALES:
        value = file.get(f"{name}.{key}", float)
        if value not in (None, 0, 1):
            raise UserError(f"{file.path}: {name}.{key} = {value:g} has no counterpart in mlx-lm")


def check_heads(file: GGUF, name: str, head_dim: int) -> None:
    """Raises UserError for heads that mlx-lm's architectures do not have."""
    for key in ("attention.head_count", "attention.head_count_kv"):
        if one_for_all_layers(file, f"{name}.{key}", 1) < 1:
            raise UserError(f"{file.path}: {name}.{key} = 0")
    for key in ("attention.value_length", "rope.dimension_count"):
        number = file.get(f"{name}.{key}", int)
        if number is not None and number != head_dim:
            raise UserError(f"{file.path}: {name}.{key} = {number}, but a head has {head_dim}")


def plain_dtype(file: GGUF) -> str:
    """The type of most numbers; bfloat16 where they are quantized."""
    sizes: Counter[str] = Counter()
    for tensor in file.tensors.values():
        sizes[DTYPES.get(tensor.kind, "bfloat16")] += math.prod(tensor.shape)
    return sizes.most_common(1)[0][0]


def rope_scaling(file: GGUF, name: str, config: ModelConfig) -> JsonObject | None:
    """How positions are stretched. Raises UserError for a way that mlx-lm does not have."""
    if "rope_freqs.weight" in file.tensors:
        return llama3_scaling(file, name, config)
    kind = file.get(f"{name}.rope.scaling.type", str) or "none"
    factor = file.get(f"{name}.rope.scale_linear", float)  # of 2023
    if kind == "none" and factor not in (None, 0, 1):
        return {"rope_type": "linear", "type": "linear", "factor": factor}
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise UserError(f"{file.path} stretches positions by {kind!r}; linear and yarn can be read")
    scaling: JsonObject = {
        "rope_type": kind,
        "type": kind,
        "factor": file.need(f"{name}.rope.scaling.factor", float),
    }
    original = file.get(f"{name}.rope.scaling.original_context_length", int)
    if original is not None:
        scaling["original_max_position_embeddings"] = original
    return scaling


def llama3_scaling(file: GGUF, name: str, config: ModelConfig) -> JsonObject:
    """Llama 3's rule, found again from the divisors of the frequencies that follow from it."""
    import numpy as np

    divisors = unpack(file.tensors["rope_freqs.weight"])
    original = file.get(f"{name}.rope.scaling.original_context_length", int) or 8192
    scaling: JsonObject = {
        "rope_type": "llama3",
        "factor": float(divisors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }
    expected = llama3_divisors(scaling, config)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-3):
        raise UserError(
            f"{file.path} stretches positions by a rule of its own (rope_freqs.weight), which is "
            "not that of Llama 3"
        )
    return scaling


def llama3_divisors(scaling: JsonObject, config: ModelConfig) -> np.ndarray:
    """By what Llama 3's rule divides each frequency: 1 for fast ones, `factor` for slow ones."""
    import numpy as np

    width, factor = config["head_dim"], scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelengths = 2 * math.pi * config["rope_theta"] ** (np.arange(0, width, 2) / width)
    turns = scaling["original_max_position_embeddings"] / wavelengths
    smooth = np.clip((turns - low) / (high - low), 0, 1)  # 0: slow, 1: fast
    return 1 / ((1 - smooth) / factor + smooth)


def hf_names(file: GGUF) -> dict[str, str]:
    """Names in the file and in Hugging Face's layout, of every tensor that may occur."""
    layers = layer_count(file, file.need("general.architecture", str))
    return names_of(architecture_of(file), layers)


def names_of(architecture: Architecture, layers: int) -> dict[str, str]:
    names = {f"{short}.weight": f"{long}.weight" for short, long in TOP_NAMES.items()}
    if architecture.model_type in ALWAYS_TIED:
        del names["output.weight"]
    for short, long in (LAYER_NAMES | architecture.extra_names).items():
        for layer in range(layers):
            for part in ("weight", "bias"):
                names[f"blk.{layer}.{short}.{part}"] = f"model.layers.{layer}.{long}.{part}"
    return names


def check_tensors(file: GGUF, config: ModelConfig) -> None:
    """Raises UserError for a tensor that is missing, unknown, or of another shape."""
    expected = expected_shapes(file, config)
    for name in expected:
        if name not in file.tensors:
            raise UserError(f"{file.path} is no complete model: it lacks the tensor {name}")
    tokens = len(tokens_of(file))
    if tokens > config["vocab_size"]:
        rows = config["vocab_size"]
        raise UserError(f"{file.path} has {tokens} tokens, but embeddings for {rows}")
    known = hf_names(file)
    for name, tensor in file.tensors.items():
        if name not in known and name != "rope_freqs.weight":
            raise UserError(f"{file.path} has the tensor {name}, which is not known here")
        if name in expected and tensor.shape != expected[name]:
            raise UserError(
                f"{file.path}: tensor {name} has the shape {tensor.shape}, but the metadata say "
                f"{expected[name]}"
            )


def expected_shapes(file: GGUF, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors that must be there."""
    architecture = architecture_of(file)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config["head_dim"]
    queries, keys = (config[key] * head for key in ("num_attention_heads", "num_key_value_heads"))
    shapes = {
        "attn_q": (queries, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_output": (hidden, queries),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }
    found: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (config["vocab_size"], hidden),
        "output_norm.weight": (hidden,),
    }
    for layer in range(config["num_hidden_layers"]):
        for short in LAYER_NAMES | architecture.extra_names:
            norm = (head,) if short in HEAD_NORMS else (hidden,)
            found[f"blk.{layer}.{short}.weight"] = shapes.get(short, norm)
        for short in architecture.biases:
            found[f"blk.{layer}.{short}.bias"] = shapes[short][:1]
    return found


def packable(file: GGUF) -> list[str]:
    """The tensors whose numbers MLX's affine quantization holds exactly."""
    return [
        name
        for name, tensor in file.tensors.items()
        if tensor.kind in PACKINGS and len(tensor.shape) == 2 and fits_half(tensor)
    ]


def fits_half(tensor: Tensor) -> bool:
    """Is the bias, some levels times the scale, a number in float16 too?"""
    import numpy as np

    _, _, biases = parts_of(tensor)
    return bool(np.isfinite(biases).all())


def quantization(file: GGUF, packed: list[str]) -> ModelConfig:
    """config.json's entry: the commonest width for all, the others by name."""
    if not packed:
        kinds = ", ".join(sorted({tensor.kind for tensor in file.tensors.values()}))
        raise UserError(
            f"{file.path} has nothing that stays packed exactly (its types: {kinds}; possible: "
            f"{', '.join(PACKINGS)}). Leave out --keep-quantized, or use --quantize"
        )
    bits = {name: PACKINGS[file.tensors[name].kind].bits for name in packed}
    usual = Counter(bits.values()).most_common(1)[0][0]
    names = hf_names(file)
    entry: JsonObject = {"group_size": GROUP_SIZE, "bits": usual, "mode": "affine"}
    for name, width in bits.items():
        if width != usual:
            layer = names[name].removesuffix(".weight")
            entry[layer] = {"group_size": GROUP_SIZE, "bits": width, "mode": "affine"}
    return {"quantization": entry, "quantization_config": entry, "torch_dtype": "float16"}


def parts_of(tensor: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Levels (rows, width) as whole numbers, and the scales and biases (rows, width / 32)."""
    import numpy as np

    packing = PACKINGS[tensor.kind]
    rows, width = tensor.shape
    blocks = np.ascontiguousarray(tensor.data).view(np.uint8).reshape(rows, width // GROUP_SIZE, -1)
    scales = blocks[..., :2].copy().view(np.float16)[..., 0]
    if tensor.kind in ("Q4_1", "Q5_1"):
        biases = blocks[..., 2:4].copy().view(np.float16)[..., 0]
    else:
        with np.errstate(over="ignore"):  # seen by fits_half
            biases = (scales.astype(np.float32) * -packing.middle).astype(np.float16)
    return levels_of(tensor.kind, blocks).reshape(rows, width), scales, biases


def levels_of(kind: str, blocks: np.ndarray) -> np.ndarray:
    """The whole numbers of each block of 32, from 0 upwards."""
    import numpy as np

    if kind == "Q8_0":
        return blocks[..., 2:] ^ np.uint8(128)  # signed bytes, moved up by 128
    low = blocks[..., -16:]  # the first 16 in the lower halves, the others in the upper ones
    levels = np.concatenate([low & 15, low >> 4], axis=-1)
    if kind in ("Q5_0", "Q5_1"):
        high = np.unpackbits(blocks[..., -20:-16], axis=-1, bitorder="little")
        levels = levels | (high << 4)
    return levels


def pack(tensor: Tensor) -> dict[str, mx.array]:
    """MLX's three arrays: the levels, their bits one after another, scales and biases."""
    import mlx.core as mx
    import numpy as np

    levels, scales, biases = parts_of(tensor)
    bits = PACKINGS[tensor.kind].bits
    apart = np.unpackbits(levels[..., None], axis=-1, bitorder="little")[..., :bits]
    words = np.packbits(apart.reshape(len(levels), -1), axis=-1, bitorder="little").view(np.uint32)
    return {"weight": mx.array(words), "scales": mx.array(scales), "biases": mx.array(biases)}


def write_weights(file: GGUF, config: ModelConfig, packed: list[str], folder: Path) -> None:
    """In shards, so that a large model need not fit into memory."""
    import mlx.core as mx

    shard: dict[str, mx.array] = {}
    size, count = 0, 0
    for name, array in arrays(file, config, set(packed)):
        if shard and size + array.nbytes > SHARD_BYTES:
            count += 1
            mx.save_safetensors(str(folder / f"model-{count:05d}.safetensors"), shard)
            shard, size = {}, 0
        shard[name] = array
        size += array.nbytes
    name = f"model-{count + 1:05d}.safetensors" if count else "model.safetensors"
    mx.save_safetensors(str(folder / name), shard, {"format": "mlx"})


def arrays(file: GGUF, config: ModelConfig, packed: set[str]) -> Iterator[tuple[str, mx.array]]:
    """All weights under their names in Hugging Face's layout, one after another."""
    architecture = architecture_of(file)
    names = hf_names(file)
    for name, tensor in file.tensors.items():
        if name == "rope_freqs.weight":
            continue
        parts = pack(tensor) if name in packed else {"": plain(tensor)}
        for part, array in parts.items():
            if architecture.norms_plus_one and name.endswith("norm.weight"):
                array = array - 1
            if architecture.paired_rows:
                array = halves_again(name, array, config)
            yield (names[name].removesuffix("weight") + part if part else names[name]), array


def plain(tensor: Tensor) -> mx.array:
    """The numbers in the file's own type, in float32 where they are quantized."""
    import mlx.core as mx

    array = mx.array(unpack(tensor))
    return array.astype(getattr(mx, DTYPES.get(tensor.kind, "float32")))


def halves_again(name: str, array: mx.array, config: ModelConfig) -> mx.array:
    """Rows of q and k as Hugging Face orders them: what turns together half a head apart.

    llama.cpp puts them side by side: row 2i of a head is row i, row 2i + 1 is row i + half.
    """
    counts = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    heads = next((n for short, n in counts.items() if f".{short}." in name), None)
    if heads is None:
        return array
    rest = array.shape[1:]
    return array.reshape(heads, -1, 2, *rest).swapaxes(1, 2).reshape(array.shape)
