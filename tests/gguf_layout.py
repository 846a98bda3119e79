"""Write random checkpoints as llama.cpp's converter does: names, order of rows, norms, tokenizer.

uv run python tests/gguf_layout.py        # prints the table of types in utils/README.md
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma": gguf.MODEL_ARCH.GEMMA,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3": gguf.MODEL_ARCH.GEMMA3,
}
CONTROL, USER_DEFINED, NORMAL = 3, 4, 1


def interleaved(rows, heads):
    """Rows of q or k in llama.cpp's order, as convert_hf_to_gguf.py puts them."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def as_ggml(name, value, config, architecture):
    """A tensor of Hugging Face's layout as llama.cpp stores it."""
    if architecture == "llama" and "q_proj" in name:
        return interleaved(value, config["num_attention_heads"])
    if architecture == "llama" and "k_proj" in name:
        return interleaved(value, config["num_key_value_heads"])
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return value + 1
    return value


def stored(value, kind):
    """Its bytes in a type; of a type that the package cannot make, random ones."""
    try:
        return gguf.quantize(value, kind)
    except NotImplementedError:
        return random_blocks(value, kind)


HALVES = {  # where the scales in half precision stand in a block, in bytes
    Kind.Q2_K: (80, 82), Kind.Q3_K: (108,), Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,),
    Kind.IQ4_XS: (0,), Kind.IQ4_NL: (0,), Kind.IQ2_XXS: (0,), Kind.IQ2_XS: (0,), Kind.IQ2_S: (0,),
    Kind.IQ3_XXS: (0,), Kind.IQ3_S: (0,), Kind.IQ1_S: (0,),
}  # fmt: skip


def random_blocks(value, kind, seed=0):
    shape = gguf.quant_shape_to_byte_shape(value.shape, kind)
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, size=shape, dtype=np.uint8)
    size = gguf.GGML_QUANT_SIZES[kind][1]
    flat = blocks.reshape(-1, size)
    for place in HALVES[kind]:
        scales = rng.uniform(0.5, 1, len(flat)).astype(np.float16) / 512
        flat[:, place : place + 2] = scales[:, None].view(np.uint8)
    return blocks


class Numbers(dict):
    """Keys of the metadata that every architecture has, under its name."""

    def __init__(self, config, name):
        heads = config["num_attention_heads"]
        head = config.get("head_dim", config["hidden_size"] // heads)
        super().__init__(
            {
                f"{name}.context_length": config["max_position_embeddings"],
                f"{name}.embedding_length": config["hidden_size"],
                f"{name}.block_count": config["num_hidden_layers"],
                f"{name}.feed_forward_length": config["intermediate_size"],
                f"{name}.attention.head_count": heads,
                f"{name}.attention.head_count_kv": config["num_key_value_heads"],
                f"{name}.attention.key_length": head,
                f"{name}.attention.value_length": head,
                f"{name}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
                f"{name}.rope.freq_base": config["rope_theta"],
            }
        )
        if "sliding_window" in config:
            self[f"{name}.attention.sliding_window"] = config["sliding_window"]
        if name == "gemma3":
            self["gemma3.attention.sliding_window_pattern"] = config["sliding_window_pattern"]
            self["gemma3.rope.freq_base_swa"] = config["rope_local_base_freq"]
        if name == "llama":
            self["llama.rope.dimension_count"] = head


def byte_level_tokenizer(folder, pre="smollm"):
    """Metadata of a folder's tokenizer.json, a byte-level BPE."""
    content = json.loads((folder / "tokenizer.json").read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    vocabulary = content["model"]["vocab"]
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokens = sorted(vocabulary, key=vocabulary.get)
    tokens += [f"[PAD{n}]" for n in range(len(tokens), size)]
    special = {entry["content"] for entry in content["added_tokens"] if entry["special"]}
    merges = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL if t in special else NORMAL for t in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": vocabulary[settings["eos_token"]],
        "tokenizer.ggml.padding_token_id": vocabulary[settings["pad_token"]],
        "tokenizer.chat_template": settings["chat_template"],
    }


def random_model(folder, model_type, **settings):
    """A model whose every number is random: norms and biases too, which would hide an error."""
    import mlx.core as mx
    from conftest import make_model

    extra = {"gemma3_text": {"query_pre_attn_scalar": 16, "sliding_window": 8}}
    extra["gemma3_text"] |= {"sliding_window_pattern": 2, "rope_local_base_freq": 700.0}
    extra["gemma2"] = {"query_pre_attn_scalar": 16}
    values = extra.get(model_type, {}) | {"rope_theta": 50000.0} | settings
    make_model(folder, model_type=model_type, **values)
    rng = np.random.default_rng(0)
    weights = {}
    for name, old in mx.load(str(folder / "model.safetensors")).items():
        around = 1 if name.endswith("norm.weight") and "gemma" not in model_type else 0
        weights[name] = mx.array(rng.normal(around, 0.2, old.shape), dtype=mx.float32)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return folder


def add_value(writer, key, value):
    kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    getattr(writer, f"add_{kinds[type(value)]}")(key, value)


def write_gguf(
    path,
    folder,
    name,
    *,
    kinds=lambda tensor: Kind.F32,
    tokenizer=None,
    tensors=None,
    replace=None,
    endian=None,
    **metadata,
):
    """A folder in Hugging Face's layout as a GGUF file; `kinds` gives each matrix its type.

    Metadata named `a__b` stand for `a.b`; None leaves a key out.
    """
    import mlx.core as mx

    config = json.loads((folder / "config.json").read_text())
    shards = [mx.load(str(file)) for file in sorted(folder.glob("*.safetensors"))]
    weights = {name: array for shard in shards for name, array in shard.items()}
    names = gguf.get_tensor_name_map(ARCHITECTURES[name], config["num_hidden_layers"])
    order = {} if endian is None else {"endianess": endian}
    writer = gguf.GGUFWriter(path, name, **order)
    values = Numbers(config, name) | (tokenizer or byte_level_tokenizer(folder))
    values |= {key.replace("__", "."): value for key, value in metadata.items()}
    for key, value in values.items():
        if value is not None:
            add_value(writer, key, value)
    for long, array in weights.items():
        value = np.array(array.astype(mx.float32))
        short = names.get_name(long, try_suffixes=(".weight", ".bias"))
        value = as_ggml(long, value, config, name)
        value = (replace or {}).get(short, value).astype(np.float32)
        kind = kinds(short) if value.ndim == 2 else Kind.F32
        writer.add_tensor(short, stored(value, kind), raw_dtype=kind)
    for short, value in (tensors or {}).items():
        writer.add_tensor(short, value.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


TYPES = (
    *("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "MXFP4", "TQ1_0", "TQ2_0"),
    *(kind.name for kind in HALVES),
)


def numbers_of(folder):
    """Every matrix of a model folder in float32, dequantized where it is packed."""
    import mlx.core as mx

    weights = mx.load(str(folder / "model.safetensors"))
    how = json.loads((folder / "config.json").read_text()).get("quantization", {})
    found = {}
    for name, weight in weights.items():
        if name.endswith(".weight") and weight.ndim == 2:
            parts = [weights.get(name.replace("weight", part)) for part in ("scales", "biases")]
            if parts[0] is not None:
                scales, biases = (part.astype(mx.float32) for part in parts)
                size = {key: how[key] for key in ("group_size", "bits")}
                weight = mx.dequantize(weight, scales, biases, **size)
            found[name] = np.array(weight.astype(mx.float32))
    return found


def difference(path, *words):
    """Mean difference of the matrices to the file's numbers, against their mean size; bits."""
    from hf_layout import convert, reported

    from utils.model import gguf_file, gguf_weights

    plain, out = path.parent / "plain", path.parent / "out"
    gguf_weights.write_model(gguf_file.open_gguf(path), plain)
    code, said, err = convert("--hf-path", path, *words, "--output-dir", out, "--force")
    if code:
        assert "has nothing that stays packed exactly" in err, err
        shutil.rmtree(plain)
        return None
    wanted, found = numbers_of(plain), numbers_of(out)
    apart = sum(np.abs(wanted[name] - found[name]).sum(dtype=np.float64) for name in wanted)
    size = sum(np.abs(value).sum(dtype=np.float64) for value in wanted.values())
    shutil.rmtree(plain)
    return apart / size, reported(said)[2]


def row(path, source, kind):
    """Cells of the table for one type."""
    write_gguf(path, source, "llama", kinds=lambda name: Kind[kind])
    block, size = gguf.GGML_QUANT_SIZES[Kind[kind]]
    cells = [kind, f"{8 * size / block:.3g}"]
    for words in (("--dtype", "float32"), (), ("--keep-quantized",)):
        measured = difference(path, *words)
        if measured is None:
            cells.append("refused")
        else:
            bits = f" ({measured[1]:.1f} bits)" if words == ("--keep-quantized",) else ""
            cells.append(f"{measured[0]:.2g}{bits}")
    return f"| {' | '.join(cells)} |"


HEAD = "| type | bits in the file | `--dtype float32` | default | `--keep-quantized` |"


def table():
    """Markdown: how far the converted numbers are from those of the file, for every type."""
    lines = [HEAD, "|---" * 5 + "|"]
    with tempfile.TemporaryDirectory() as name:
        settings = {"hidden": 256, "layers": 1, "intermediate_size": 256}
        source = random_model(Path(name) / "hf", "llama", **settings)
        lines += [row(Path(name) / "m.gguf", source, kind) for kind in TYPES]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
