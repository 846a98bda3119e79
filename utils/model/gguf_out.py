"""Write a model folder as a GGUF file for llama.cpp, Ollama and LM Studio.

What llama.cpp wants changed is done here: the order of rows that its rotary embedding needs, the 1
in Gemma's norms, Llama 3's stretched positions as divisors. What a GGUF file cannot say is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.errors import RunError, UserError, disk_errors_named
from . import gguf_weights, ollama
from .gguf_file import open_gguf
from .gguf_vocabulary import PROBES, describe
from .gguf_weights import (
    ARCHITECTURES,
    Architecture,
    attention_scalar,
    llama3_divisors,
    names_of,
)
from .hf_config import translate_config
from .shape import JsonObject, ModelConfig
from .writing import flat

if TYPE_CHECKING:
    import mlx.core as mx
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter

KINDS = {"f16": "F16", "q8_0": "Q8_0", "bf16": "BF16", "f32": "F32"}
"""What matrices can be stored as; what has one dimension stays in float32, as llama.cpp needs."""
FILE_TYPES = {"f16": 1, "q8_0": 7, "bf16": 32, "f32": 0}
FAMILIES = {
    **{a.model_type: name for name, a in ARCHITECTURES.items() if name != "mistral"},
    "mistral": "llama",
}
NAMES_OF_KINDS = ("rope_type", "type", "rope_theta", "truncate")
SCALINGS = {
    "linear": ("factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": (
        *("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    ),
}
NO_CHANGE = {"beta_fast": 32, "beta_slow": 1, "mscale": 1, "mscale_all_dim": 0}
LIMITS = {"f16": 65504.0, "q8_0": 65504.0 * 127, "bf16": 3e38, "f32": 3e38}


def check_family(config: ModelConfig, source: str, *, dequantized: bool = False) -> None:
    """Raises UserError for what cannot become a GGUF file, as far as config.json tells.

    dequantized: what is quantized will be unpacked first.
    """
    if not dequantized and (config.get("quantization") or config.get("quantization_config")):
        raise UserError(
            f"{source} is quantized, and a GGUF file would hold rounded numbers rounded again: add "
            "--dequantize, or better convert the model that is not quantized (a run's final/ is)"
        )
    if config.get("model_type") not in FAMILIES:
        raise UserError(
            f"{source} has the model_type {config.get('model_type')!r}; those that can become a "
            f"GGUF file are {', '.join(sorted(FAMILIES))}"
        )


def write_gguf(folder: Path, path: Path, kind: str, name: str, source: str) -> list[str]:
    """Write the model of `folder` to the file `path`; what a person should know of the result.

    kind: of the matrices, a key of KINDS. source: what the user calls the folder.

    Raises:
        UserError: something that a GGUF file cannot hold.
        DiskError: a full disk.
    """
    import mlx.core as mx
    from mlx.utils import tree_map
    from mlx_lm.utils import load_config, load_model, load_tokenizer

    given = load_config(folder)
    check_family(given, source)
    config = given | translate_config(given)
    family = FAMILIES[config["model_type"]]
    architecture = ARCHITECTURES[family]
    model, config = load_model(folder, lazy=True, model_config=config)
    settings = resolved(model.args, config, source)
    tokenizer = load_tokenizer(folder, eos_token_ids=config.get("eos_token_id"))
    weights = flat(model.parameters())
    model.update(tree_map(lambda _: mx.array([]), model.parameters()))  # one at a time, below
    vocabulary = describe(tokenizer, weights["model.embed_tokens.weight"].shape[0], source)
    numbers = metadata(family, architecture, settings, source)
    general = {"general.name": name, "general.file_type": FILE_TYPES[kind]}
    general |= {"general.quantization_version": 2} if kind == "q8_0" else {}
    tensors = Tensors(weights, architecture, settings, kind, source)
    with disk_errors_named(path):
        write_file(path, family, general | numbers | vocabulary.metadata, tensors)
    return [*tensors.notes, *vocabulary.notes]


def resolved(args: object, config: ModelConfig, source: str) -> ModelConfig:
    """The model's settings as mlx-lm took them, with its defaults."""
    found: ModelConfig = {k: v for k, v in vars(args).items() if not k.startswith("_")}
    heads = found["num_attention_heads"]
    found["head_dim"] = found.get("head_dim") or found["hidden_size"] // heads
    found["num_key_value_heads"] = found.get("num_key_value_heads") or heads
    context = found.get("max_position_embeddings") or config.get("max_position_embeddings")
    if type(context) is not int:
        raise UserError(f"{source}/config.json lacks max_position_embeddings, its context")
    found["max_position_embeddings"] = context
    check_computation(found, source)
    return found


def check_computation(settings: ModelConfig, source: str) -> None:
    """Raises UserError for what mlx-lm would compute, and llama.cpp would not."""
    if settings.get("rope_traditional"):
        raise UserError(f"{source}: rope_traditional has no counterpart in a GGUF file")
    of_llama = settings["model_type"] in ("llama", "mistral")
    layers = (settings.get("layer_types") or []) if of_llama else []
    if any(kind != "full_attention" for kind in layers):
        raise UserError(f"{source}: layer_types with sliding windows have no counterpart in GGUF")


def metadata(
    family: str, architecture: Architecture, settings: ModelConfig, source: str
) -> JsonObject:
    """The model's numbers under llama.cpp's names; whole numbers, fractions and texts."""
    head = settings["head_dim"]
    numbers: JsonObject = {
        "context_length": settings["max_position_embeddings"],
        "embedding_length": settings["hidden_size"],
        "block_count": settings["num_hidden_layers"],
        "feed_forward_length": settings["intermediate_size"],
        "attention.head_count": settings["num_attention_heads"],
        "attention.head_count_kv": settings["num_key_value_heads"],
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": float(settings["rms_norm_eps"]),
        "rope.freq_base": float(settings["rope_theta"]),
        "rope.dimension_count": head,
        "vocab_size": settings["vocab_size"],
    }
    numbers |= of_gemma(family, settings, source)
    numbers |= stretched(settings, source)
    return {f"{family}.{key}": value for key, value in numbers.items()}


def of_gemma(family: str, settings: ModelConfig, source: str) -> JsonObject:
    """Raises UserError for a scale of the attention that llama.cpp would compute otherwise."""
    if family not in ("gemma2", "gemma3"):
        return {}
    wanted = attention_scalar(settings, layers_of_27b=46 if family == "gemma2" else 62)
    if settings["query_pre_attn_scalar"] != wanted:
        raise UserError(
            f"{source}: query_pre_attn_scalar = {settings['query_pre_attn_scalar']}, where "
            f"llama.cpp takes {wanted} for a {family} of this size"
        )
    window = {"attention.sliding_window": settings.get("sliding_window") or 4096}
    if family == "gemma2":
        caps = ("attn_logit_softcapping", "final_logit_softcapping")
        return window | {cap: float(settings[cap]) for cap in caps}
    return window | {
        "attention.sliding_window_pattern": settings["sliding_window_pattern"],
        "rope.freq_base_swa": float(settings["rope_local_base_freq"]),
    }


def stretched(settings: ModelConfig, source: str) -> JsonObject:
    """How positions are stretched; Llama 3's rule becomes a tensor."""
    scaling = settings.get("rope_scaling") or {}
    kind = kind_of(scaling)
    if kind == "default":
        return {}
    check_scaling(scaling, kind, source)
    original = scaling.get("original_max_position_embeddings")
    said: JsonObject = {}
    if original is not None:
        said["rope.scaling.original_context_length"] = int(original)
    if kind == "llama3":
        return said
    return said | {"rope.scaling.type": kind, "rope.scaling.factor": float(scaling["factor"])}


def kind_of(scaling: JsonObject) -> str:
    return str(scaling.get("rope_type") or scaling.get("type") or "default")


def check_scaling(scaling: JsonObject, kind: str, source: str) -> None:
    """Raises UserError for what our reader, or llama.cpp, would not take from the file."""
    if kind not in SCALINGS:
        raise UserError(
            f"{source}: rope_scaling of the type {kind!r}; a GGUF file is written with "
            f"{', '.join(SCALINGS)}"
        )
    given = {k: v for k, v in scaling.items() if v is not None and NO_CHANGE.get(k) != v}
    other = sorted(set(given) - {*SCALINGS[kind], *NAMES_OF_KINDS})
    if other:
        raise UserError(
            f"{source}: rope_scaling's {other[0]} = {given[other[0]]!r} is not written to GGUF"
        )


class Tensors:
    """The weights under llama.cpp's names, in the order of the file, read one after another."""

    def __init__(
        self,
        weights: dict[str, mx.array],
        architecture: Architecture,
        settings: ModelConfig,
        kind: str,
        source: str,
    ) -> None:
        self.weights = weights
        self.architecture, self.settings = architecture, settings
        self.kind, self.source = kind, source
        self.notes: list[str] = []
        names = names_of(architecture, settings["num_hidden_layers"])
        self.names = {short: long for short, long in names.items() if long in weights}
        unknown = sorted(set(weights) - set(self.names.values()))
        if unknown:
            raise UserError(f"{source} has the weight {unknown[0]}, which has no place in GGUF")
        scaling = settings.get("rope_scaling") or {}
        self.divisors = llama3_divisors(scaling, settings) if kind_of(scaling) == "llama3" else None
        narrow = [s for s in self.names if self.stored_as(s) == "F16" and self.kind == "q8_0"]
        if narrow:
            self.notes.append(
                f"{len(narrow)} matrices are stored as f16: their width is no multiple of 32"
            )

    def stored_as(self, short: str) -> str:
        shape = self.weights[self.names[short]].shape
        if len(shape) < 2:
            return "F32"
        return "F16" if self.kind == "q8_0" and shape[-1] % 32 else KINDS[self.kind]

    def infos(self) -> Iterator[tuple[str, tuple[int, ...], GGMLQuantizationType]]:
        from gguf import GGMLQuantizationType

        if self.divisors is not None:
            yield "rope_freqs.weight", self.divisors.shape, GGMLQuantizationType.F32
        for short, long in self.names.items():
            yield (
                short,
                tuple(self.weights[long].shape),
                GGMLQuantizationType[self.stored_as(short)],
            )

    def contents(self) -> Iterator[np.ndarray]:
        """Bytes, in the order of `infos`; each weight is let go afterwards."""
        import numpy as np
        from gguf import GGMLQuantizationType, quantize

        if self.divisors is not None:
            yield self.divisors.astype(np.float32)
        for short, long in self.names.items():
            kind = GGMLQuantizationType[self.stored_as(short)]
            value = self.as_llama_cpp_has_it(short, self.weights[long])
            self.weights[long] = self.weights[long][:0]
            yield quantize(value, kind)

    def as_llama_cpp_has_it(self, short: str, weight: mx.array) -> np.ndarray:
        import mlx.core as mx
        import numpy as np

        value = np.array(weight.astype(mx.float32))
        if not np.isfinite(value).all():
            raise UserError(f"{self.source} has NaN or inf in {self.names[short]}")
        if value.ndim > 1 and np.abs(value).max(initial=0) > LIMITS[self.kind]:
            raise UserError(
                f"{self.source}: {self.names[short]} has numbers above {LIMITS[self.kind]:g}, the "
                f"largest that {self.kind} holds; take --gguf-type bf16"
            )
        if self.architecture.norms_plus_one and short.endswith("norm.weight"):
            value = value + 1
        heads = {
            "attn_q": self.settings["num_attention_heads"],
            "attn_k": self.settings["num_key_value_heads"],
        }.get(short.split(".")[-2])
        if self.architecture.paired_rows and heads is not None:
            value = side_by_side(value, heads)
        return value


def read_back(path: Path, folder: Path, kind: str) -> None:
    """Write the GGUF file out as a model folder, as a GGUF file of others would be read."""
    file = open_gguf(path)
    packed = kind == "q8_0" and bool(gguf_weights.packable(file))
    gguf_weights.write_model(file, folder, keep_quantized=packed)


def compare_tokenizers(source: Path, back: Path) -> list[str]:
    """What the tokenizer of the file reads otherwise than the source's, in a line each.

    Raises:
        RunError: it reads a plain text otherwise.
    """
    from mlx_lm.utils import load_tokenizer

    before, after = load_tokenizer(source), load_tokenizer(back)
    for text in PROBES:
        if before.encode(text) != after.encode(text):
            raise RunError(
                f"the tokenizer in the GGUF file would read {text!r} otherwise than the source's: "
                "it cannot be said in GGUF. Nothing was written"
            )
    if not isinstance(before.chat_template, str | dict):
        return []
    try:
        texts = [ollama.rendered(tokenizer, PROBES[0]) for tokenizer in (before, after)]
    except UserError as error:
        return [str(error)]
    ids = [t.encode(texts[0], add_special_tokens=False) for t in (before, after)]
    if texts[0] != texts[1] or ids[0] != ids[1]:
        return ["a question in the chat template gets other tokens from the file than in training"]
    return []


def side_by_side(rows: np.ndarray, heads: int) -> np.ndarray:
    """What turns together, half a head apart, beside each other: gguf_weights.halves_again's
    other way round."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_file(path: Path, family: str, values: JsonObject, tensors: Tensors) -> None:
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGUFWriter

    logging.getLogger("gguf").setLevel(logging.WARNING)
    writer = GGUFWriter(path, family)
    try:
        writer.add_type("model")
        for key, value in values.items():
            add_value(writer, key, value)
        for name, shape, kind in tensors.infos():
            block, size = GGML_QUANT_SIZES[kind]
            count = int(np.prod(shape))
            writer.add_tensor_info(
                name, shape, np.dtype(np.float32), count // block * size, raw_dtype=kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for content in tensors.contents():
            writer.write_tensor_data(content)
        writer.flush()
    finally:
        writer.close()


def add_value(writer: GGUFWriter, key: str, value: object) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
