"""The memory plan of a run, from config.json and safetensors headers alone.

The plan serves `--dry-run`, and chooses the rollout batch and the micro-batch when they are 0.

What is counted, in bytes (P parameters, b bytes per weight, GB are 10^9 bytes):

* Full fine-tuning: weights b*P, what they lack of float32 masters 2*P when b < 4 (float16: 4*P;
  with master_weights = false none), two float32 moments 8*P (8-bit: 2.03*P), gradients b*P, and
  their float32 sum 4*P when an update has several micro-batches. LoRA and DoRA: the same for the
  float32 adapters only, which are counted when they are loaded.
* Rollout phase: rollout copy, reference, views of joined or merged weights (utils/views.py) where
  there is room, KV cache with its copy while it grows, logits of one step.
* Gradient phase, for a block like llama's (H hidden size, Q = heads*head_dim, K =
  kv_heads*head_dim, I intermediate size): kept for the backward pass 4H + 3Q + 2K + 5I values per
  token and layer, each prompt counted once for its group, and for each row the keys and values of
  its prompt; temporaries 3H + 4I of one layer. On a GPU 3I instead of 5I (utils/activations.py),
  but not in experts, which get their tokens one a row, as in a rollout.
  Attention probabilities are kept, but not by CUDA's fused kernels, which take something with the
  masks of shared prompts. With gradient checkpointing H per layer, plus one whole layer.
  Logits of one piece of the completion positions (utils/scoring.py), and, without checkpointing
  and where there is room, of all in the weights' type. The backward pass begins with all
  activations, and ends with all gradients.
* Work in flight: CUDA's queue holds what operations that are not done yet still use, but MLX waits
  where memory is short, so that it decides about the peak and not about what fits.
* Writing `final/`: merged adapters, 1 GB at a time.

Checked against mx.get_peak_memory of whole updates by benchmarks/plan_accuracy.py (RESULTS.md) and
tests/test_memory.py. Mixtures of experts and blocks unlike llama's are rough estimates; `HEADROOM`
is for the rest. The first update corrects the plan (utils/planning.py)."""

import bisect
import json
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from .text import in_one_line, shown

GB = 10**9
HEADROOM = 0.9  # of the budget: the rest is the allocator's cache, the process and the estimate
QUANTIZED_BITS = 4.5  # 4 bits and, per group of 64, a scale and a bias of 16 bits
MAX_MICRO_BATCH_TOKENS = 20_480  # beyond it a GPU gains nothing, and Metal's watchdog bites
# Measured on 2 cores, models/tiny-math, gradient of 64 sequences: 0.48 s in parts of 600 tokens,
# 0.54 s in parts of 1,200, 0.98 s in parts of 4,800, which no cache holds.
CPU_MICRO_BATCH_TOKENS = 1_024
# Logits of one piece: a 32nd of the budget, and no more than keeps a GPU busy.
PIECE_PART = 32
MAX_PIECE_LOGITS = 2**29
# GPU kernels index with 32 bits: logits made at once, tokens x vocabulary, must stay below.
# Measured on one H200: 64 x 236 x 151,936 logits of a 4-bit model came back wrong, without error.
MAX_LOGITS = 2**31 - 1
KV_CACHE_STEP = 256  # mlx_lm.models.cache.KVCache.step
ROLLOUT_LOGIT_COPIES = 4  # raw, tempered, Gumbel noise, log-probs; float32
LARGEST_FILE = 2**30  # utils/checkpoints.py: merged weights that exist at once
# MLX on CUDA waits when ten graphs of 1 GB are in its queue, which then holds one more.
QUEUE_BYTES = 11 * GB  # see in_flight_bytes
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


def _size(config: dict[str, Any], source: str, *names: str, default: int | None = None) -> int:
    """The first of `names` (families differ) that the configuration sets."""
    value = next((config[name] for name in names if config.get(name) is not None), default)
    if type(value) is not int or not 1 <= value < 2**31:
        raise ValueError(f"{source}: {names[0]} must be a positive integer, got {shown(value)}")
    return value


def _table(config: dict[str, Any], source: str, *names: str) -> dict[str, Any]:
    """The first of `names` that the configuration sets, an object; empty when none is."""
    value: Any = next((config[name] for name in names if config.get(name)), {})
    if not isinstance(value, dict):
        raise ValueError(f"{source}: {names[0]} must be an object, got {shown(value)}")
    return value


def _dimensions(config: dict[str, Any], source: str) -> dict[str, Any]:
    """The fields of ModelShape that the configuration gives, with the usual fallbacks."""
    config = {**config, **_table(config, source, "text_config")}

    def size(*names: str, default: int | None = None) -> int:
        return _size(config, source, *names, default=default)

    hidden = size("hidden_size", "n_embd", "d_model")
    heads = size("num_attention_heads", "n_head")
    return {
        "hidden_size": hidden,
        "layers": size("num_hidden_layers", "n_layer"),
        "heads": heads,
        "kv_heads": size("num_key_value_heads", default=heads),
        "head_dim": size("head_dim", default=hidden // heads),
        "intermediate_size": size("moe_intermediate_size", "intermediate_size", default=4 * hidden),
        "vocab_size": size("vocab_size"),
        "experts": size("num_experts", "num_local_experts", default=1),
        "experts_per_token": size("num_experts_per_tok", default=1),
        "activation": str(config.get("hidden_act") or config.get("hidden_activation") or "silu"),
    }


def _parse_json(text: str | bytes, source: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{source}: not JSON (nested too deeply)") from error
    except ValueError as error:
        raise ValueError(f"{source}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{source}: a JSON object was expected, not {type(value).__name__}")
    return value


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: missing")
    return _parse_json(path.read_bytes(), str(path))


def _tensor(name: str, entry: Any, source: str) -> tuple[int, int, Tensor]:
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


def _read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file: 8 bytes of length, a JSON header, then the data."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else None
        if length is None or length > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(f"{path}: truncated, or not a safetensors file (no complete header)")
        header = _parse_json(file.read(length), str(path))
    header.pop("__metadata__", None)
    entries = {name: _tensor(name, entry, str(path)) for name, entry in header.items()}
    places = sorted((start, end) for start, end, _ in entries.values())
    if any(a[1] > b[0] for a, b in pairwise(places)):
        raise ValueError(f"{path}: tensors overlap, so the file is damaged")
    missing = 8 + length + max((end for _, end in places), default=0) - size
    if missing > 0:
        raise ValueError(f"{path}: truncated, {missing:,} bytes of weights are missing")
    return {name: tensor for name, (_, _, tensor) in entries.items()}


def _shards(model_dir: Path) -> list[Path]:
    """The weight files that mlx_lm would load; an index names the ones that must be there."""
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


def _packed_bits(config: dict[str, Any], path: str, source: str) -> int:
    """Bits per weight of the quantized layer at `path`; layers may differ from the default."""
    quantization = _table(config, source, "quantization", "quantization_config")
    own = quantization.get(path)
    bits = own.get("bits") if isinstance(own, dict) else None
    bits = bits or quantization.get("bits") or 4
    if type(bits) is not int or not 1 <= bits <= 32:
        raise ValueError(f"{source}: quantization of {shown(bits)} bits is impossible")
    return bits


def _count_parameters(config: dict[str, Any], tensors: dict[str, Tensor], source: str) -> int:
    total = 0
    for name, tensor in tensors.items():
        path, _, kind = name.rpartition(".")
        packed = f"{path}.scales" in tensors
        if packed and kind == "weight":
            total += math.prod(tensor.shape) * 32 // _packed_bits(config, path, source)
        elif not (packed and kind in ("scales", "biases")):
            total += math.prod(tensor.shape)
    return total


def _shape(config: dict[str, Any], tensors: dict[str, Tensor], source: str) -> ModelShape:
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
    for shard in _shards(model_dir):
        tensors |= _read_header(shard)
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


def _projections(size: dict[str, int]) -> list[tuple[int, int]]:
    """(inputs, outputs) of every matrix in one llama-like block."""
    hidden, inner = size["hidden_size"], size["intermediate_size"]
    query, kv = size["heads"] * size["head_dim"], size["kv_heads"] * size["head_dim"]
    attention = [(hidden, query), (hidden, kv), (hidden, kv), (query, hidden)]
    router = [(hidden, size["experts"])] if size["experts"] > 1 else []
    return (
        attention + router + [(hidden, inner), (hidden, inner), (inner, hidden)] * size["experts"]
    )


def shape_from_config(config: dict[str, Any], dtype_bytes: float) -> ModelShape:
    """Shape by arithmetic for llama- and qwen-like models, for tables without weights.

    dtype_bytes: bytes per weight, 0.5625 for 4 bits with groups of 64. Raises ValueError for a
    missing or impossible size.
    """
    size = _dimensions(config, "config")
    kind = str(config.get("model_type", ""))
    tied = bool(config.get("tie_word_embeddings", False))
    query, kv = size["heads"] * size["head_dim"], size["kv_heads"] * size["head_dim"]
    block = sum(inputs * outputs for inputs, outputs in _projections(size))
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
        **size,
    )


@dataclass(frozen=True)
class Settings:
    """What `plan` takes beside the shape: the settings of a run that decide about memory."""

    train_type: str
    """"full", "lora" or "dora"."""
    prompts_per_update: int
    num_generations: int
    prompt_tokens: int
    """Longest prompt, in tokens."""
    completion_tokens: int
    """Longest completion, in tokens: max_new_tokens."""
    quantize_for_rollouts: bool
    has_reference: bool
    """kl_coeff > 0."""
    sync_every_updates: int
    gradient_checkpointing: bool
    train_dtype_bytes: int
    """Bytes of a weight and an activation in training: 2, or 4 for float32."""
    budget_bytes: int
    """What the run may use: `runtime.device_memory_bytes()`."""
    master_bytes: int = 2
    """Beside each half-precision weight in full fine-tuning (utils/optimizers.py): 2, 4 or 0."""
    moment_bytes: float = 8.0
    """Of both moments of a trained weight: 8, or about 2 when they are 8-bit."""
    measured_factor: float = 1.0
    """Measured over planned bytes of a micro-batch, from the first update of the run."""
    compiled: bool = False
    """use_compile."""
    entropy_bonus: bool = False
    """entropy_coeff > 0. (Entropies without a gradient, of top_entropy_quantile, take less than the
    gradient after them.)"""
    shares_prompts: bool = True
    """Whether a prompt is read once for its group in the gradient phase (utils/scoring.py)."""
    platform: str = "metal"
    """"cpu", "metal" or "cuda": what MLX keeps for the backward pass differs."""
    lora_rank: int = 8
    lora_layers: int = -1
    """Blocks with adapters, counted from the last; -1 or 0 = all."""
    trainable_parameters: int | None = None
    """None: all of them, or adapters on every matrix of the adapted blocks."""
    rollout_batch_size: int = 0
    """Rows that are sampled together; 0 = as many as fit."""
    micro_batch_tokens: int = 0
    """Tokens in one forward and backward pass; 0 = as many as fit."""

    @property
    def sequence(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens of a prompt and of a completion, padded as for a compiled step."""
        step = 32 if self.compiled or self.platform == "cuda" else 1
        prompt, completion = -(-self.prompt_tokens // step), -(-self.completion_tokens // step)
        return prompt * step, completion * step

    @property
    def completions(self) -> int:
        return self.prompts_per_update * self.num_generations

    def trained_layers(self, layers: int) -> int:
        """Blocks whose activations the backward pass needs: none below the first adapter."""
        if self.train_type == "full" or self.lora_layers <= 0:
            return layers
        return min(self.lora_layers, layers)


@dataclass(frozen=True)
class Plan:
    """Bytes by part, the batch sizes they were computed for, and the verdict."""

    shape: ModelShape
    settings: Settings
    weights: int
    master_weights: int
    moments: int
    rollout_copy: int
    reference_copy: int
    trainable_parameters: int
    checkpoint_bytes: int
    """One checkpoint-N on disk: what is trained, its float32 master and moments."""
    final_bytes: int
    """`final/` on disk: the weights."""
    budget_bytes: int
    gradients: int = 0
    """Of one micro-batch."""
    summed_gradients: int = 0
    """The sum over several micro-batches, in float32."""
    kv_cache: int = 0
    """Of one rollout batch, at full length."""
    rollout_logits: int = 0
    views: int = 0
    """Joined and merged weights for sampling, where there is room for them."""
    activations: int = 0
    """Of one micro-batch: what is kept for its backward pass."""
    temporaries: int = 0
    """Of the backward pass of one block."""
    logits: int = 0
    """Of the largest piece of a micro-batch's logits, with their gradients."""
    piece_logits: int = 0
    keep_logits: bool = False
    """Whether the logits of all pieces are kept: made once instead of twice."""
    in_flight: int = 0
    """What operations that are not yet done still hold, beyond what the computation needs."""
    rollout_batch_size: int = 0
    micro_batch_tokens: int = 0
    halved: tuple[str, ...] = ()
    """Which of the two memory ran out with, so that they are smaller now than planned."""
    suggestions: tuple[str, ...] = ()
    """Settings that would make it fit, each alone if one is enough. Empty when it fits."""

    @property
    def resident(self) -> int:
        """What is there in both phases."""
        parts = (self.weights, self.master_weights, self.moments)
        return sum(parts) + self.rollout_copy + self.reference_copy

    def rows_at_once(self, longest: int) -> int:
        """How many sequences of up to `longest` tokens to sample together.

        Those of a rollout, and more of an evaluation if they fit into what the run needs anyway.
        """
        if self.settings.rollout_batch_size or "rollout_batch_size" in self.halved:
            return self.rollout_batch_size
        row = (self.kv_cache + self.rollout_logits) / self.rollout_batch_size
        row *= max(1, longest / self.settings.sequence)
        fitting = int((self.needed - self.resident - self.views) // row)
        return max(self.rollout_batch_size, min(fitting, MAX_LOGITS // self.shape.vocab_size))

    @property
    def rollout_peak(self) -> int:
        return self.resident + self.kv_cache + self.rollout_logits + self.views

    @property
    def spare_for_rollouts(self) -> float:
        """What a view of the policy that samples faster may take (utils/views.py)."""
        without = self.resident + self.kv_cache + self.rollout_logits
        return HEADROOM * self.budget_bytes - without

    @property
    def gradient_needed(self) -> int:
        """The backward pass begins with all activations, and ends with all gradients."""
        begins = self.activations + max(self.logits, self.temporaries)
        ends = self.gradients + self.temporaries
        if self.settings.gradient_checkpointing:
            ends += self.activations
        return self.resident + self.summed_gradients + max(begins, ends)

    @property
    def gradient_peak(self) -> int:
        """MLX lets work in flight take more, as far as there is memory."""
        more = min(self.gradient_needed + self.in_flight, self.budget_bytes)
        return max(self.gradient_needed, more)

    @property
    def writing_peak(self) -> int:
        """Adapters are merged for `final/` one file after the other."""
        merged = 0 if self.settings.train_type == "full" else min(self.final_bytes, LARGEST_FILE)
        return self.resident + merged

    @property
    def fits_with_final(self) -> bool:
        """Whether the merged model can be evaluated beside the run."""
        return self.rollout_peak + self.final_bytes <= HEADROOM * self.budget_bytes

    @property
    def peak(self) -> int:
        return max(self.rollout_peak, self.gradient_peak, self.writing_peak)

    @property
    def needed(self) -> int:
        """The peak when MLX waits for work in flight, as it does where memory is short."""
        return max(self.rollout_peak, self.gradient_needed, self.writing_peak)

    @property
    def by_phase(self) -> dict[str, int]:
        return {"rollout": self.rollout_peak, "gradient": self.gradient_peak}

    @property
    def fits(self) -> bool:
        return self.needed <= HEADROOM * self.budget_bytes

    def table(self) -> str:
        """The plan as aligned plain text, several lines, in GB (10^9 bytes) or MB."""
        rows = [(label, getattr(self, name)) for name, label in _TABLE.items()]
        lines = [f"{label:<42}{_readable(value):>12}" for label, value in rows if value]
        lines += [
            f"rollout batch {self.rollout_batch_size:,} completions, "
            f"micro-batch {self.micro_batch_tokens:,} tokens",
            f"{'fits' if self.fits else 'DOES NOT FIT'}: {_readable(self.needed)} of "
            f"{_readable(self.budget_bytes)}, of which {1 - HEADROOM:.0%} stay in reserve",
        ]
        if self.suggestions:
            lines += ["it would fit with:", *(f"  {text}" for text in self.suggestions)]
        return "\n".join(lines)


_TABLE = {
    "weights": "weights",
    "master_weights": "what weights lack of float32",
    "moments": "optimizer moments",
    "rollout_copy": "rollout copy",
    "reference_copy": "reference copy",
    "kv_cache": "KV cache of one rollout batch",
    "rollout_logits": "logits of one rollout step",
    "views": "weights joined for sampling",
    "gradients": "gradients",
    "summed_gradients": "their sum over micro-batches",
    "activations": "activations of one micro-batch",
    "temporaries": "temporaries of one block",
    "logits": "or logits of one piece, with gradients",
    "in_flight": "held by work in flight",
    "rollout_peak": "peak of the rollout phase",
    "gradient_peak": "peak of the gradient phase",
    "writing_peak": "peak while final/ is written",
    "checkpoint_bytes": "disk: one checkpoint",
    "final_bytes": "disk: final model",
}


def _readable(count: float) -> str:
    return f"{count / GB:,.2f} GB" if count >= GB / 10 else f"{count / 1e6:,.2f} MB"


def _adapter_parameters(shape: ModelShape, settings: Settings) -> int:
    matrices = _projections(vars(shape))
    block = settings.lora_rank * sum(inputs + outputs for inputs, outputs in matrices)
    if settings.train_type == "dora":
        block += sum(outputs for _, outputs in matrices)  # the magnitudes
    return block * settings.trained_layers(shape.layers)


def _copies(shape: ModelShape, settings: Settings, weights: int, adapters: int) -> tuple[int, int]:
    """Bytes of the rollout copy and of the reference (design: the three policies)."""
    four_bit = int(shape.parameters * QUANTIZED_BITS / 8)
    stale = settings.sync_every_updates > 1
    if settings.train_type == "full":
        whole = four_bit if settings.quantize_for_rollouts else weights
        rollout = whole if settings.quantize_for_rollouts or stale else 0
        return rollout, whole if settings.has_reference else 0
    base = four_bit if settings.quantize_for_rollouts and shape.quantized_bits is None else 0
    return base + (adapters if base or stale else 0), 0


def _constant_parts(shape: ModelShape, settings: Settings) -> dict[str, Any]:
    """Every part that does not depend on the batch sizes."""
    width = settings.train_dtype_bytes
    quantized = shape.quantized_bits is not None
    weights = shape.bytes_on_disk if quantized else shape.parameters * width
    full = settings.train_type == "full"
    trainable = settings.trainable_parameters
    if trainable is None:
        trainable = shape.parameters if full else _adapter_parameters(shape, settings)
    adapters = 0 if full else 4 * trainable
    master = settings.master_bytes * trainable if full and width < 4 else 0
    moments = round(settings.moment_bytes * trainable)
    rollout, reference = _copies(shape, settings, weights, adapters)
    return {
        "weights": weights + adapters,
        "master_weights": master,
        "moments": moments,
        "rollout_copy": rollout,
        "reference_copy": reference,
        "trainable_parameters": trainable,
        "checkpoint_bytes": (weights if full else adapters) + master + moments,
        "final_bytes": weights if full else round(shape.parameters * width),  # fused, unpacked
    }


def _row_bytes(shape: ModelShape, settings: Settings) -> tuple[int, int]:
    """KV cache and logits of one row of a rollout batch."""
    before = max(settings.prompt_tokens, settings.sequence - KV_CACHE_STEP)
    length = settings.sequence + before  # a cache that grows is copied
    values = 2 * shape.layers * shape.kv_heads * shape.head_dim * length
    return values * settings.train_dtype_bytes, ROLLOUT_LOGIT_COPIES * 4 * shape.vocab_size


class MicroBatch(NamedTuple):
    """Rows that are read in one forward and backward pass, each prompt once for its group."""

    rows: int
    prompts: int
    settings: Settings

    @property
    def tokens(self) -> int:
        """Tokens that the blocks compute."""
        prompt, completion = self.settings.lengths
        return self.prompts * prompt + self.rows * completion


def _micro_batch(settings: Settings, rows: int) -> MicroBatch:
    groups = -(-rows // settings.num_generations)
    return MicroBatch(rows, groups if settings.shares_prompts else rows, settings)


def block_bytes(shape: ModelShape, batch: MicroBatch) -> tuple[int, int]:
    """What the blocks keep for the backward pass, and the temporaries of one (module docstring)."""
    settings = batch.settings
    width, hidden = settings.train_dtype_bytes, shape.hidden_size
    query, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    inner = shape.intermediate_size * shape.experts_per_token
    prompt, completion = settings.lengths
    lean = settings.platform != "cpu" and shape.experts == 1 and shape.activation == "silu"
    kept = 3 if lean else 5  # utils/activations.py
    token = width * (4 * hidden + 3 * query + 2 * kv + kept * inner)
    temporary = width * (3 * hidden + 4 * inner)
    # Attention: what a completion sees of its prompt is copied for each row.
    joined = batch.rows * prompt * 2 * kv if settings.shares_prompts else 0
    before = batch.prompts * prompt * (prompt if settings.shares_prompts else prompt + completion)
    scores = shape.heads * (before + batch.rows * completion * (prompt + completion))
    passing = 2 * scores
    if settings.platform == "cuda":  # fused; with masks of shared prompts, fitted to one H200
        scores, passing = (6 * scores // 5 if settings.shares_prompts else 0), 0
    layer = token * batch.tokens + width * (joined + scores)
    once = temporary * batch.tokens + width * passing
    layers = settings.trained_layers(shape.layers)
    if settings.gradient_checkpointing:
        return width * hidden * batch.tokens * layers, layer + once
    return layer * layers, once


def piece_of_logits(settings: Settings) -> int:
    """Logits of a piece of the scored positions (utils/scoring.py)."""
    return min(settings.budget_bytes // PIECE_PART // _logit_bytes(settings), MAX_PIECE_LOGITS)


def _logit_bytes(settings: Settings) -> int:
    """Of a logit whose gradient is computed: float32, in place of which comes the gradient."""
    width = settings.train_dtype_bytes
    return 4 + (width if width < 4 else 0)


def head_bytes(shape: ModelShape, batch: MicroBatch, keep: bool) -> int:
    """Logits of a piece with their gradient, and those of all pieces if they are kept.

    An entropy with a gradient makes p log p beside them in float32, 2 more on the way back where
    that is not one kernel (measured on a CPU: 3.0; what its queue holds, included).

    More than one piece of a head that is trained: also the gradient of a piece, and the old sum.
    """
    settings = batch.settings
    width = settings.train_dtype_bytes
    scored = batch.rows * settings.lengths[1]
    every = scored * shape.vocab_size
    made = min(every, piece_of_logits(settings))
    matrix = shape.vocab_size * shape.hidden_size * width
    sums = 2 * matrix if settings.train_type == "full" and made < every else 0
    queue = 2 if settings.platform == "cpu" else 1
    logits = queue * made * _logit_bytes(settings) + (every if keep else queue * made) * width
    if settings.entropy_bonus:
        logits += 4 * made * (3 if settings.platform == "cpu" else 1)
    return logits + 2 * scored * shape.hidden_size * width + sums


def _rollout_rows(shape: ModelShape, settings: Settings, left: float, row: int) -> int:
    """All completions of the update if they fit, else whole groups, else single rows."""
    most = max(1, min(settings.completions, MAX_LOGITS // shape.vocab_size))
    if settings.rollout_batch_size:
        return min(settings.rollout_batch_size, most)
    rows = max(1, min(most, int(left // row)))
    return rows - rows % settings.num_generations if rows > settings.num_generations else rows


def in_flight_bytes(shape: ModelShape, batch: MicroBatch, parts: tuple[int, int, int]) -> int:
    """What MLX's CUDA queue holds at the peak beyond what the computation needs.

    Fitted to the peaks of one H200 (benchmarks/plan_accuracy.py). The CPU's queue is part of the
    other estimates.
    """
    kept, temporary, logits = parts
    if batch.settings.platform != "cuda":
        return 0
    recomputed = batch.settings.gradient_checkpointing
    layers = batch.settings.trained_layers(shape.layers)
    everything = temporary * layers if recomputed else kept
    most = QUEUE_BYTES if recomputed else 5 * GB + 2 * temporary
    return int(min(most, everything // 10 + logits))


def _plan_of(plan: Plan, batch: MicroBatch, keep: bool = False) -> Plan:
    """The plan of the gradient phase with such micro-batches."""
    shape, settings, trainable = plan.shape, plan.settings, plan.trainable_parameters
    factor = settings.measured_factor
    parts = (*block_bytes(shape, batch), head_bytes(shape, batch, keep))
    kept, temporary, logits = (round(part * factor) for part in parts)
    width = settings.train_dtype_bytes if settings.train_type == "full" else 4
    plan = replace(
        plan,
        gradients=width * trainable,
        summed_gradients=4 * trainable if batch.rows < settings.completions else 0,
        activations=kept,
        temporaries=temporary,
        logits=logits,
        piece_logits=piece_of_logits(settings),
        keep_logits=keep,
        in_flight=in_flight_bytes(shape, batch, (kept, temporary, logits)),
        micro_batch_tokens=settings.micro_batch_tokens or batch.tokens,
    )
    if keep or settings.platform != "cuda":
        return plan
    # Where there is room, the queue also holds the logits of the pieces that follow.
    scored = batch.rows * settings.lengths[1] * shape.vocab_size
    others = round(max(0, scored - plan.piece_logits) * _logit_bytes(settings) * factor)
    room = int(HEADROOM * plan.budget_bytes) - plan.by_phase["gradient"]
    return replace(plan, in_flight=plan.in_flight + max(0, min(others, room)))


def _with_largest_micro_batch(plan: Plan) -> Plan:
    """The most rows whose bytes and tokens fit: at least one, at most the whole update."""
    settings = plan.settings
    wanted, completions = settings.micro_batch_tokens, settings.completions
    cap = CPU_MICRO_BATCH_TOKENS if settings.platform == "cpu" else MAX_MICRO_BATCH_TOKENS
    limit = wanted or cap

    def of(rows: int) -> Plan:
        batch = _micro_batch(settings, rows)
        kept = _plan_of(plan, batch, keep=True)
        spare = kept.fits and not settings.gradient_checkpointing
        return kept if spare else _plan_of(plan, batch)

    def fits(rows: int) -> bool:
        tokens = _micro_batch(settings, rows).tokens
        return tokens <= limit and (bool(wanted) or of(rows).fits)

    # Monotone but for the last step: a whole update needs no sum.
    if fits(completions):
        return of(completions)
    most = 1 + bisect.bisect_left(range(2, completions), True, key=lambda r: not fits(r))
    group = settings.num_generations  # which is cut evenly where it has to be
    even = of(most // group * group or math.ceil(group / math.ceil(group / most)))
    largest = of(most)
    return replace(
        even, micro_batch_tokens=largest.micro_batch_tokens, keep_logits=largest.keep_logits
    )


def _build(shape: ModelShape, settings: Settings) -> Plan:
    constant = _constant_parts(shape, settings)
    plan = Plan(shape, settings, **constant, budget_bytes=settings.budget_bytes)
    cache, logits = _row_bytes(shape, settings)
    left = HEADROOM * settings.budget_bytes - plan.resident
    rows = _rollout_rows(shape, settings, left, cache + logits)
    plan = _with_largest_micro_batch(plan)
    plan = replace(
        plan, kv_cache=rows * cache, rollout_logits=rows * logits, rollout_batch_size=rows
    )
    return replace(plan, views=_views(plan))


def _views(plan: Plan) -> int:
    """Bytes of the views that utils/views.py makes of the policy that samples."""
    shape, settings = plan.shape, plan.settings
    packed = settings.quantize_for_rollouts or shape.quantized_bits is not None
    width = QUANTIZED_BITS / 8 if packed else settings.train_dtype_bytes
    kv = shape.kv_heads * shape.head_dim
    together = shape.heads * shape.head_dim + 2 * kv
    if shape.experts == 1:
        together += 2 * shape.intermediate_size
    joined = together * shape.hidden_size * shape.layers * width
    matrices = sum(inputs * outputs for inputs, outputs in _projections(vars(shape)))
    merged = matrices * settings.trained_layers(shape.layers) * width
    merges = settings.train_type != "full" and not packed and merged <= plan.spare_for_rollouts
    low_rank = settings.train_type == "lora" and packed  # other adapted layers are not alike
    adapted = settings.train_type != "full" and not merges and not low_rank
    joins = settings.platform != "metal" and not adapted and joined <= plan.spare_for_rollouts
    return int(merged * merges + joined * joins)


class Case(NamedTuple):
    """A run that could be planned instead, and what the user would have to write for it."""

    text: str
    shape: ModelShape
    settings: Settings


Remedy = Callable[[Case], Iterator[Case]]
"""Ways to change a run, the mildest first; none when it does not apply."""


def _changed(case: Case, text: str, **changes: Any) -> Case:
    return Case(text, case.shape, replace(case.settings, **changes))


def _halvings(case: Case, key: str, field: str, least: int) -> Iterator[Case]:
    value = getattr(case.settings, field) // 2
    while value >= least:
        yield _changed(case, f"{key} = {value}", **{field: value})
        value //= 2


def _with_8_bit_moments(case: Case) -> Iterator[Case]:
    if case.settings.moment_bytes > 3:
        yield _changed(case, "moment_bits = 8", moment_bytes=2.03)


def _without_masters(case: Case) -> Iterator[Case]:
    s = case.settings
    if s.train_type == "full" and s.train_dtype_bytes == 2 and s.master_bytes == 2:
        yield _changed(case, "master_weights = false", master_bytes=0)


def _as_lora(case: Case) -> Iterator[Case]:
    if case.settings.train_type == "full":
        yield _changed(case, 'train_type = "lora"', train_type="lora", trainable_parameters=None)


def _as_four_bit(case: Case) -> Iterator[Case]:
    """A converted base; it is trained through LoRA, so this changes the train type as well."""
    if case.shape.quantized_bits is None:
        parameters = case.shape.parameters
        packed = int(parameters * QUANTIZED_BITS / 8)
        shape = replace(case.shape, quantized_bits=4, bytes_on_disk=packed)
        lora = next(_as_lora(case), case)
        text = "a 4-bit model (uv run python utils/convert_model.py --hf-path MODEL --quantize)"
        prefix = f"{lora.text} on " if lora is not case else ""
        yield Case(prefix + text, shape, lora.settings)


def _with_automatic_batches(case: Case) -> Iterator[Case]:
    if case.settings.rollout_batch_size or case.settings.micro_batch_tokens:
        text = "rollout_batch_size = 0 and micro_batch_tokens = 0"
        yield _changed(case, text, rollout_batch_size=0, micro_batch_tokens=0)


def _with_checkpointing(case: Case) -> Iterator[Case]:
    if not case.settings.gradient_checkpointing:
        yield _changed(case, "gradient_checkpointing = true", gradient_checkpointing=True)


def _without_reference(case: Case) -> Iterator[Case]:
    if case.settings.has_reference and case.settings.train_type == "full":
        yield _changed(case, "kl_coeff = 0", has_reference=False)


def _with_other_rollout_copy(case: Case) -> Iterator[Case]:
    """Quantizing shrinks a copy that is needed anyway, and adds one where there was none."""
    other = not case.settings.quantize_for_rollouts
    text = f"quantize_for_rollouts = {str(other).lower()}"
    yield _changed(case, text, quantize_for_rollouts=other)
    if case.settings.sync_every_updates > 1:
        yield _changed(case, "sync_every_updates = 1", sync_every_updates=1)


def _with_fewer_generations(case: Case) -> Iterator[Case]:
    yield from _halvings(case, "num_generations", "num_generations", 2)


def _with_shorter_completions(case: Case) -> Iterator[Case]:
    yield from _halvings(case, "max_new_tokens", "completion_tokens", 32)


# In the order in which they cost least: first what changes no result, last what changes the task.
_REMEDIES: tuple[Remedy, ...] = (
    _with_automatic_batches,
    _with_checkpointing,
    _with_other_rollout_copy,
    _without_reference,
    _with_8_bit_moments,
    _without_masters,
    _as_lora,
    _as_four_bit,
    _with_fewer_generations,
    _with_shorter_completions,
)


def _fits(case: Case) -> bool:
    return _build(case.shape, case.settings).fits


def _apply(case: Case, remedies: Sequence[Remedy]) -> tuple[Case, list[str]]:
    """One remedy after the other until it fits, each as mild as it may be; those that save nothing
    are left."""
    texts: list[str] = []
    for remedy in remedies:
        if _fits(case):
            break
        before = _build(case.shape, case.settings).needed
        smaller = [c for c in remedy(case) if _build(c.shape, c.settings).needed < before]
        if smaller:
            case = next(filter(_fits, smaller), smaller[-1])
            texts.append(case.text)
    return case, texts


def _combined(start: Case) -> str:
    """A set of remedies that fits and from which none can be dropped, the costliest first."""
    case, texts = _apply(start, _REMEDIES)
    if not _fits(case):
        needed = _readable(_build(case.shape, case.settings).needed / HEADROOM)
        return f"a smaller model: even with {' and '.join(texts)} this one needs {needed}"
    chosen = list(_REMEDIES)
    for remedy in reversed(_REMEDIES):
        fewer = [other for other in chosen if other is not remedy]
        case, rest = _apply(start, fewer)
        # A mild remedy must not be dropped at the price of more of a costly one.
        if _fits(case) and set(rest) < set(texts):
            chosen, texts = fewer, rest
    return " and ".join(texts)


def _suggestions(shape: ModelShape, settings: Settings) -> tuple[str, ...]:
    start = Case("", shape, settings)
    single: list[str] = []
    for remedy in _REMEDIES:
        single += [case.text for case in islice(filter(_fits, remedy(start)), 1)]
    return tuple(single) or (_combined(start),)


def plan(shape: ModelShape, **settings: Any) -> Plan:
    """Plan the memory of a run; the keywords are the fields of `Settings`.

    Batch sizes left at 0 are chosen: as many rows as fit the budget, in whole groups where one
    fits, and a micro-batch of as many sequences as fit, up to MAX_MICRO_BATCH_TOKENS (on
    a CPU CPU_MICRO_BATCH_TOKENS). Suggestions come from planning again with each change.

    Raises:
        TypeError: unknown or missing keyword.
        ValueError: an unknown train_type, full fine-tuning of a quantized model, a size below 1.
    """
    wanted = Settings(**settings)
    if wanted.train_type not in ("full", "lora", "dora"):
        raise ValueError(f"train_type must be full, lora or dora, not {wanted.train_type!r}")
    if wanted.train_type == "full" and shape.quantized_bits is not None:
        raise ValueError("a quantized model cannot be trained in full, only by lora or dora")
    positive = ("prompts_per_update", "num_generations", "prompt_tokens", "completion_tokens")
    for name in positive:
        if getattr(wanted, name) < 1:
            raise ValueError(f"{name} must be at least 1, not {getattr(wanted, name)}")
    result = _build(shape, wanted)
    return result if result.fits else replace(result, suggestions=_suggestions(shape, wanted))
