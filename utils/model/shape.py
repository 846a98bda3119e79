"""What a model's config.json and the headers of its weights say about its size."""

import json
import math
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ..base.text import in_one_line, shown

MAX_PARTS = 10_000  # layers or experts; the largest models have some hundreds
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself
# Of the safetensors format; the last ones are packed in whole bytes.
DTYPE_BITS = {
    **{"F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32},
    **{"F16": 16, "BF16": 16, "I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8},
    **{"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8},
    **{"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4},
}
DTYPE_NAMES = {4: "F32", 2: "BF16"}
JsonObject = dict[str, Any]
"""Of a file: each value is checked where it is read."""
ModelConfig = JsonObject
"""What a config.json holds."""


LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_transformer_layers")
INNER = ("intermediate_size", "n_inner", "ff_intermediate_size", "ffn_hidden_size")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_n_heads")
EXPERTS_PER_TOKEN = (
    "num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_top_k", "moe_topk",
)  # fmt: skip
MAY_BE_0 = ("moe_intermediate_size", *EXPERTS, *EXPERTS_PER_TOKEN)
NO_HEADS = {"heads": 0, "kv_heads": 0, "head_dim": 0}
"""What a model's parts are called differs between families."""


class Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class ModelShape:
    """What the plan needs to know about a model; sizes as in its config.json."""

    parameters: int
    """Weights as a person counts them: a packed 4-bit matrix counts its unpacked entries."""
    bytes_on_disk: int
    bytes_by_dtype: dict[str, int]
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    """Width of the MLP, of one expert in a mixture of experts."""
    vocab_size: int
    quantized_bits: int | None
    tied: bool
    experts: int = 1
    experts_per_token: int = 1
    activation: str = "silu"
    state: int | None = None
    """Values that a block without attention keeps of a row, however long; None: it keeps the keys
    and values of every token."""
    scanned: int = 0
    """Values that a step of such a block from token to token keeps for the backward pass."""


def _size(config: ModelConfig, source: str, *names: str, default: int | None = None) -> int:
    """The first of `names` (families differ) that the configuration sets; the largest of a list,
    which has one for each layer."""
    value = next((config[name] for name in names if config.get(name) is not None), default)
    if isinstance(value, list) and value and all(type(part) is int for part in value):
        value = max(value)
    if type(value) is not int or not 1 <= value < 2**31:
        raise ValueError(f"{source}: {names[0]} must be a positive integer, got {shown(value)}")
    return value


def _table(config: ModelConfig, source: str, *names: str) -> JsonObject:
    """The first of `names` that the configuration sets, an object; empty when none is."""
    value: object = next((config[name] for name in names if config.get(name)), {})
    if not isinstance(value, dict):
        raise ValueError(f"{source}: {names[0]} must be an object, got {shown(value)}")
    return value


def _text_config(config: ModelConfig, source: str) -> ModelConfig:
    """The configuration of the language model, which stands deeper in one that also sees; dbrx has
    parts of it deeper, too."""
    config = {**config, **_table(config, source, "text_config")}
    parts = (_table(config, source, name) for name in ("attn_config", "ffn_config"))
    return {**next(parts), **next(parts), **config}


class Sizes(Protocol):
    """The first of `names` that a configuration sets."""

    def __call__(self, *names: str, default: int | None = None) -> int: ...


def _attention(size: Sizes, hidden: int) -> dict[str, int]:
    heads = size("num_attention_heads", "n_head", "n_heads", "num_heads", "num_query_heads")
    return {
        "heads": heads,
        "kv_heads": size(*KV_HEADS, default=heads),
        "head_dim": size("head_dim", default=hidden // heads),
    }


def _mamba(size: Sizes, hidden: int) -> dict[str, int]:
    """Its projections are an MLP's: two into the inner width, one out of it."""
    inner, state = size("intermediate_size", "d_inner"), size("state_size", "d_state", default=16)
    kept = inner * (state + size("conv_kernel", "d_conv", default=4) - 1)
    return {**NO_HEADS, "state": kept, "scanned": 3 * inner * state}


def _mamba2(size: Sizes, hidden: int) -> dict[str, int]:
    """It computes up to 256 tokens at once, as attention that the heads of its state give."""
    heads = size("num_heads")
    inner, state = heads * size("head_dim"), size("ssm_state_size", "state_size")
    convolved = inner + 2 * size("n_groups", default=1) * state
    kept = inner * state + convolved * (size("conv_kernel", default=4) - 1)
    own = {"intermediate_size": inner, "state": kept, "scanned": 3 * heads * 256}
    return {**NO_HEADS, **own}


def _rwkv7(size: Sizes, hidden: int) -> dict[str, int]:
    """Receptance, key, value and output have the sizes of attention without groups."""
    head_dim = size("head_dim", default=64)
    sizes = dict.fromkeys(("heads", "kv_heads"), max(1, hidden // head_dim))
    kept = hidden * (head_dim + 2)
    return {**sizes, "head_dim": head_dim, "state": kept, "scanned": 4 * hidden * head_dim}


def _dimensions(config: ModelConfig, source: str) -> dict[str, int]:
    """The sizes in ModelShape that the configuration gives, with the usual fallbacks."""
    config = _text_config(config, source)
    dense = [name for name in MAY_BE_0 if config.get(name) == 0]  # has none, and says so
    config = {name: value for name, value in config.items() if name not in dense}

    def size(*names: str, default: int | None = None) -> int:
        return _size(config, source, *names, default=default)

    hidden = size("hidden_size", "n_embd", "d_model", "hidden_dim", "model_dim")
    kind = config.get("model_type")
    without = WITHOUT_ATTENTION.get(kind) if isinstance(kind, str) else None
    return {
        "hidden_size": hidden,
        "layers": size(*LAYERS, default=_kinds_of_layers(config)),
        "intermediate_size": size("moe_intermediate_size", *INNER, default=4 * hidden),
        "vocab_size": size("vocab_size", "num_vocab"),
        "experts": size(*EXPERTS, default=1),
        "experts_per_token": size(*EXPERTS_PER_TOKEN, default=1),
        **(without or _attention)(size, hidden),
    }


def sizes_problem(config: ModelConfig) -> str:
    """Why a run could not plan its memory for a model, and so not train it; empty if it can."""
    try:
        _dimensions(config, "config.json")
    except ValueError as error:
        return str(error)
    return ""


def _kinds_of_layers(config: ModelConfig) -> int | None:
    """How many layers a list of their kinds is for: nemotron_h has nothing else."""
    kinds = config.get("hybrid_override_pattern")
    return len(kinds) if isinstance(kinds, str | list) else None


WITHOUT_ATTENTION = {"mamba": _mamba, "falcon_mamba": _mamba, "mamba2": _mamba2, "rwkv7": _rwkv7}


def _activation(config: ModelConfig, source: str) -> str:
    config = _text_config(config, source)
    return str(config.get("hidden_act") or config.get("hidden_activation") or "silu")


def _parse_json(text: str | bytes, source: str) -> JsonObject:
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{source}: not JSON (nested too deeply)") from error
    except ValueError as error:
        raise ValueError(f"{source}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{source}: a JSON object was expected, not {type(value).__name__}")
    return value


def _read_json(path: Path) -> JsonObject:
    if not path.is_file():
        raise ValueError(f"{path}: missing")
    return _parse_json(path.read_bytes(), str(path))


def _tensor(name: str, entry: JsonObject, source: str) -> tuple[int, int, Tensor]:
    """(start, end, tensor) of a header entry whose shape and offsets agree."""
    try:
        start, end = entry["data_offsets"]
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        sizes = all(type(n) is int and 0 <= n < 2**31 for n in shape)
        agree = end - start == -(-math.prod(shape) * DTYPE_BITS[dtype] // 8)
        good = sizes and type(start) is type(end) is int and 0 <= start <= end and agree
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{source}: bad header entry for tensor {shown(name)}") from error
    if not good:
        raise ValueError(f"{source}: bad header entry for tensor {shown(name)}")
    return start, end, Tensor(dtype, shape, end - start)


def _header(path: Path) -> tuple[JsonObject, int]:
    """What stands before the weights: 8 bytes of length, then JSON; and where that ends."""
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else None
        if length is None or length > min(path.stat().st_size - 8, MAX_HEADER_BYTES):
            raise ValueError(f"{path}: truncated, or not a safetensors file (no complete header)")
        return _parse_json(file.read(length), str(path)), 8 + length


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises ValueError saying what is wrong with the file.
    """
    header, end_of_header = _header(path)
    header.pop("__metadata__", None)
    entries = {name: _tensor(name, entry, str(path)) for name, entry in header.items()}
    places = sorted((start, end) for start, end, _ in entries.values())
    if any(a[1] > b[0] for a, b in pairwise(places)):
        raise ValueError(f"{path}: tensors overlap, so the file is damaged")
    last = max((end for _, end in places), default=0)
    missing = end_of_header + last - path.stat().st_size
    if missing > 0:
        raise ValueError(f"{path}: truncated, {missing:,} bytes of weights are missing")
    return {name: tensor for name, (_, _, tensor) in entries.items()}


def shards(model_dir: Path) -> list[Path]:
    """The weight files that mlx_lm would load; an index names the ones that must be there.

    Raises ValueError when one is missing, or the index is damaged.
    """
    index = model_dir / "model.safetensors.index.json"
    if index.is_file():
        names = _read_json(index).get("weight_map")
        if not isinstance(names, dict):
            raise ValueError(f"{index}: has no weight_map")
        for name in sorted(set(map(str, names.values()))):
            if not (model_dir / name).is_file():
                raise ValueError(f"{model_dir / name}: missing, but {index.name} names it")
    shards = sorted(model_dir.glob("model*.safetensors"))
    if not shards:
        raise ValueError(f"{model_dir}: no model*.safetensors in this folder")
    return shards


def _packed_bits(config: ModelConfig, path: str, source: str) -> int:
    """Bits per weight of the quantized layer at `path`; layers may differ from the default."""
    quantization = _table(config, source, "quantization", "quantization_config")
    own = quantization.get(path)
    bits = own.get("bits") if isinstance(own, dict) else None
    bits = bits or quantization.get("bits") or 4
    if type(bits) is not int or not 1 <= bits <= 32:
        raise ValueError(f"{source}: quantization of {shown(bits)} bits is impossible")
    return bits


def _count_parameters(config: ModelConfig, tensors: dict[str, Tensor], source: str) -> int:
    total = 0
    for name, tensor in tensors.items():
        path, _, kind = name.rpartition(".")
        packed = f"{path}.scales" in tensors
        if packed and kind == "weight":
            total += math.prod(tensor.shape) * 32 // _packed_bits(config, path, source)
        elif not (packed and kind in ("scales", "biases")):
            total += math.prod(tensor.shape)
    return total


def _shape(config: ModelConfig, tensors: dict[str, Tensor], source: str) -> ModelShape:
    head = [name for name in tensors if "lm_head." in name]
    tied = bool(config.get("tie_word_embeddings", not head))
    if tied:  # some checkpoints store the head although it is the embedding; mlx_lm drops it
        tensors = {name: tensor for name, tensor in tensors.items() if name not in head}
    by_dtype: dict[str, int] = {}
    for tensor in tensors.values():
        by_dtype[tensor.dtype] = by_dtype.get(tensor.dtype, 0) + tensor.nbytes
    quantized = any(name.endswith(".scales") for name in tensors)
    sizes = _dimensions(config, source)
    if max(sizes["layers"], sizes["experts"]) > MAX_PARTS:  # each takes time and memory to build
        raise ValueError(f"{source}: over {MAX_PARTS:,} layers or experts are not believable")
    return ModelShape(
        parameters=_count_parameters(config, tensors, source),
        bytes_on_disk=sum(by_dtype.values()),
        bytes_by_dtype=by_dtype,
        quantized_bits=_packed_bits(config, "", source) if quantized else None,
        tied=tied,
        activation=_activation(config, source),
        **sizes,
    )


def read_shape(model_dir: Path) -> ModelShape:
    """Shape of the model in a folder, from config.json and the headers of its shards.

    Raises ValueError naming the file and what is wrong with it (missing, truncated, not JSON, ...).
    """
    model_dir = Path(model_dir)
    if not model_dir.is_dir():
        raise ValueError(f"{model_dir}: no such folder")
    source = model_dir / "config.json"
    config = _read_json(source)
    tensors: dict[str, Tensor] = {}
    for shard in shards(model_dir):
        tensors |= read_header(shard)
    return _shape(config, tensors, str(source))


def read_hub_shape(name: str, revision: str | None = None) -> ModelShape:
    """Shape of a model on the Hugging Face hub: a cached copy, else a few kB of headers.

    Raises ValueError when the name is unknown, has no safetensors, or the hub is out of reach.
    """
    from huggingface_hub import (
        get_hf_file_metadata,
        get_safetensors_metadata,
        hf_hub_download,
        hf_hub_url,
        try_to_load_from_cache,
    )
    from huggingface_hub.errors import HTTPError, NotASafetensorsRepoError

    try:
        if not isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            # One question without the download's five retries: offline, the answer comes at once.
            get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision), timeout=10)
        config_file = Path(hf_hub_download(name, "config.json", revision=revision))
        if any(config_file.parent.glob("model*.safetensors")):
            return read_shape(config_file.parent)
        metadata = get_safetensors_metadata(name, revision=revision)
    except (HTTPError, NotASafetensorsRepoError, OSError) as error:
        text = in_one_line(str(error))
        raise ValueError(f"{name}: cannot be read from the hub ({text})") from error
    tensors = {
        key: Tensor(info.dtype, tuple(info.shape), info.data_offsets[1] - info.data_offsets[0])
        for file in metadata.files_metadata.values()
        for key, info in file.tensors.items()
    }
    return _shape(_read_json(config_file), tensors, f"{name}/config.json")


def projections(size: dict[str, int]) -> list[tuple[int, int]]:
    """(inputs, outputs) of every matrix in one llama-like block."""
    hidden, inner = size["hidden_size"], size["intermediate_size"]
    query, kv = size["heads"] * size["head_dim"], size["kv_heads"] * size["head_dim"]
    attention = [(hidden, query), (hidden, kv), (hidden, kv), (query, hidden)]
    router = [(hidden, size["experts"])] if size["experts"] > 1 else []
    return (
        attention + router + [(hidden, inner), (hidden, inner), (inner, hidden)] * size["experts"]
    )


def shape_from_config(config: ModelConfig, dtype_bytes: float) -> ModelShape:
    """Shape by arithmetic for llama- and qwen-like models, for tables without weights.

    dtype_bytes: bytes per weight, 0.5625 for 4 bits with groups of 64. Raises ValueError for a
    missing or impossible size.
    """
    size = _dimensions(config, "config")
    kind = str(config.get("model_type", ""))
    tied = bool(config.get("tie_word_embeddings", False))
    query, kv = size["heads"] * size["head_dim"], size["kv_heads"] * size["head_dim"]
    block = sum(inputs * outputs for inputs, outputs in projections(size))
    block += 2 * size["hidden_size"]  # two norms
    if kind.startswith("qwen2") or config.get("attention_bias"):
        block += query + 2 * kv
    if kind.startswith("qwen3"):
        block += 2 * size["head_dim"]  # norms of queries and keys
    tables = size["vocab_size"] * size["hidden_size"] * (1 if tied else 2)
    parameters = size["layers"] * block + tables + size["hidden_size"]
    on_disk = round(parameters * dtype_bytes)
    return ModelShape(
        parameters=parameters,
        bytes_on_disk=on_disk,
        bytes_by_dtype={DTYPE_NAMES.get(int(dtype_bytes), "U32"): on_disk},
        quantized_bits=int(dtype_bytes * 8) if dtype_bytes < 2 else None,
        tied=tied,
        activation=_activation(config, "config"),
        **size,
    )
