"""Random checkpoints in the layout in which transformers saves them: names, bf16, shards, index.

uv run python tests/hf_layout.py        # converts each and prints the table of utils/README.md
"""

import contextlib
import io
import json
import re
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
from conftest import ROOT, make_tokenizer

CLASSES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCABULARY, EXPERTS = 64, 128, 4, 2, 16, 4, 384, 4


def make_config(model_type, tied):
    """As transformers 4 writes it; no value is mlx-lm's default, which would hide a lost one."""
    config = {
        "architectures": [CLASSES[model_type]],
        "model_type": model_type,
        "torch_dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-6,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "rope_theta": 50000.0,
        "tie_word_embeddings": tied,
        "eos_token_id": 2,
    }
    if model_type in ("qwen3", "gemma3_text"):
        config["head_dim"] = HEAD_DIM
    if model_type == "mixtral":
        config |= {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}
    if model_type == "gemma3_text":
        config |= {
            "query_pre_attn_scalar": 16,
            "sliding_window": 8,
            "sliding_window_pattern": 2,
            "rope_local_base_freq": 700.0,
        }
    return config


def as_transformers_5(config):
    """The same settings where transformers 5 puts them."""
    config = dict(config, dtype=config["torch_dtype"])
    rope = {"rope_theta": config.pop("rope_theta"), "rope_type": "default"}
    config["rope_parameters"] = rope
    del config["torch_dtype"]
    if config["model_type"] == "gemma3_text":
        local = {"rope_theta": config.pop("rope_local_base_freq"), "rope_type": "default"}
        config["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}
        period = config.pop("sliding_window_pattern")
        kinds = ["sliding_attention"] * (period - 1) + ["full_attention"]
        config["layer_types"] = kinds * (LAYERS // period)
    return config


def layer_shapes(model_type):
    """Name below model.layers.N. -> shape."""
    query, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes = {
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
        "self_attn.q_proj.weight": (query, HIDDEN),
        "self_attn.k_proj.weight": (kv, HIDDEN),
        "self_attn.v_proj.weight": (kv, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, query),
    }
    if model_type == "qwen2":
        shapes |= {
            "self_attn.q_proj.bias": (query,),
            "self_attn.k_proj.bias": (kv,),
            "self_attn.v_proj.bias": (kv,),
        }
    if model_type in ("qwen3", "gemma3_text"):
        shapes |= {f"self_attn.{x}_norm.weight": (HEAD_DIM,) for x in "qk"}
    if model_type == "gemma3_text":
        shapes |= {f"{x}_feedforward_layernorm.weight": (HIDDEN,) for x in ("pre", "post")}
    return shapes | mlp_shapes(model_type)


def mlp_shapes(model_type):
    wide, narrow = (INNER, HIDDEN), (HIDDEN, INNER)
    if model_type != "mixtral":
        sizes = {"gate_proj": wide, "up_proj": wide, "down_proj": narrow}
        return {f"mlp.{name}.weight": size for name, size in sizes.items()}
    shapes = {"block_sparse_moe.gate.weight": (EXPERTS, HIDDEN)}
    for expert in range(EXPERTS):
        for name, size in (("w1", wide), ("w2", narrow), ("w3", wide)):
            shapes[f"block_sparse_moe.experts.{expert}.{name}.weight"] = size
    return shapes


def weight_shapes(model_type, tied):
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        inside = layer_shapes(model_type)
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in inside.items()}
    return shapes if tied else shapes | {"lm_head.weight": (VOCABULARY, HIDDEN)}


def random_weights(model_type, tied, seed=0):
    import mlx.core as mx

    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in weight_shapes(model_type, tied).items():
        value = rng.normal(0, 0.2, shape)
        if name.endswith("norm.weight") and model_type != "gemma3_text":  # which adds the 1 itself
            value += 1
        weights[name] = mx.array(value, dtype=mx.bfloat16)
    return weights


def write_checkpoint(folder, model_type, *, tied=True, shards=1, transformers=4):
    import mlx.core as mx

    folder.mkdir(parents=True)
    config = make_config(model_type, tied)
    config = as_transformers_5(config) if transformers == 5 else config
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    make_tokenizer(folder)
    weights = random_weights(model_type, tied)
    names, places = sorted(weights), {}
    for n in range(shards):
        part = names[n * len(names) // shards : (n + 1) * len(names) // shards]
        file = f"model-{n + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else None
        file = file or "model.safetensors"
        places |= dict.fromkeys(part, file)
        content = {name: weights[name] for name in part}
        mx.save_safetensors(str(folder / file), content, metadata={"format": "pt"})
    if shards > 1:
        index = {"metadata": {}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def convert(*words):
    """Run the command in this process: (exit code, stdout, stderr)."""
    from utils import convert_model

    out, err = io.StringIO(), io.StringIO()
    argv = ["convert_model.py", *map(str, words)]
    with (
        mock.patch.object(sys, "argv", argv),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = convert_model.main()
    return code, out.getvalue(), err.getvalue()


def reported(out):
    """Mean and largest difference, and bits per weight, of what the command printed."""
    found = re.search(r"difference to the source: mean (\S+), largest (\S+)", out)
    bits = re.search(r"([\d.]+) bits per weight", out)
    return float(found[1]), float(found[2]), float(bits[1])


COLUMNS = {
    "as it is": (),
    "float16": ("--dtype", "float16"),
    "8 bits": ("-q", "--bits", "8"),
    "4 bits": ("-q",),
    "mixed_4_6": ("-q", "--quant-predicate", "mixed_4_6"),
    "mxfp4": ("-q", "--q-mode", "mxfp4"),
    "2 bits": ("-q", "--bits", "2"),
}


def table():
    """Markdown: the mean difference of every architecture in every column."""
    lines = [f"| model | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    with tempfile.TemporaryDirectory() as name:
        sources = {"tiny-math, trained (llama)": ROOT / "models" / "tiny-math"}
        for model_type in CLASSES:
            source = write_checkpoint(Path(name) / model_type, model_type, tied=False, shards=2)
            sources[f"{model_type}, random"] = source
        for label, source in sources.items():
            cells = []
            for words in COLUMNS.values():
                target = Path(name) / "out"
                code, out, err = convert(
                    "--hf-path", source, *words, "--output-dir", target, "--force"
                )
                assert code == 0, err
                cells.append(f"{reported(out)[0]:.2g}")
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
