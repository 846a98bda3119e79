"""A model of each of mlx-lm's architectures in a few kB, with tiny-math's tokenizer.

The weights are random. Its config.json is made from the names of the architecture's own arguments:
what means the same has the same size in all of them. `ODD` has what names do not say.
"""

import dataclasses
import importlib
import json
import pkgutil
import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "models/tiny-math"
SEED = 7
NULL = ("rope_scaling", "n_shared_experts")  # some have to be told that there is none

JsonObject = dict[str, Any]

WIDTH, INNER, HEADS, KV_HEADS, HEAD, VOCABULARY = 64, 128, 4, 2, 16, 448
BY_NAME = {
    **dict.fromkeys(["hidden_size", "hidden_dim", "d_model", "model_dim", "n_embd", "dim"], WIDTH),
    **dict.fromkeys(["num_hidden_layers", "num_layers", "n_layers", "n_layer"], 2),
    **dict.fromkeys(["num_transformer_layers", "num_dense_layers_total"], 2),
    **dict.fromkeys(["num_attention_heads", "num_heads", "n_heads", "n_head"], HEADS),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads", "n_kv_heads"], KV_HEADS),
    **dict.fromkeys(
        ["intermediate_size", "ff_intermediate_size", "mlp_hidden_size", "n_inner"], INNER
    ),
    **dict.fromkeys(["dense_intermediate_size", "intermediate_size_mlp"], INNER),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], 64),
    **dict.fromkeys(["moe_shared_expert_intermediate_size"], 64),
    **dict.fromkeys(["vocab_size", "num_vocab", "embedding_size"], VOCABULARY),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"], 512),
    **dict.fromkeys(["num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_k", "moe_top_k", "moe_topk"], 2),
    **dict.fromkeys(["num_shared_experts", "n_shared_experts", "n_group", "topk_group"], 1),
    **dict.fromkeys(["moe_layer_freq", "moe_layer_interval", "decoder_sparse_step"], 1),
    **dict.fromkeys(["first_k_dense_replace", "num_dense_layers"], 1),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank"], 32),
    **dict.fromkeys(["sliding_window", "attention_window_size", "window_size"], 16),
    **dict.fromkeys(
        ["conv_kernel", "linear_conv_kernel_dim", "conv_L_cache", "short_conv_kernel_size"], 4
    ),
    **dict.fromkeys(["ssm_state_size", "state_size", "mamba_d_state"], 16),
    **dict.fromkeys(["linear_num_value_heads", "linear_num_key_heads", "mamba_num_heads"], HEADS),
    **dict.fromkeys(["n_groups", "group_norm_size"], 1),
    **dict.fromkeys(["rope_theta", "rope_freq_constant", "rope_embedding_base"], 10000.0),
    "head_dim": HEAD,
    "mlp_only_layers": [],
    "layer_types": ["sliding_attention", "full_attention"],
    "qk_rope_head_dim": 8,
    "sliding_window_pattern": 2,
    "partial_rotary_factor": 0.5,
    "query_pre_attn_scalar": 16,
}
ENDINGS = (("_head_dim", HEAD), ("_eps", 1e-6), ("epsilon", 1e-6), ("low_rank_dim", 8))
BY_TYPE = {"bool": False, "float": 1.0, "str": "silu", "dict": {}, "int": 2}

TEXT = {
    "gemma3": "gemma3_text",
    "gemma3n": "gemma3n.TextConfig",
    "gemma4": "gemma4_text",
    "kimi_k25": "deepseek_v3",
    "kimi_k3": "kimi_k3.TextArgs",
    "kimi_vl": "kimi_vl.TextArgs",
    "lfm2-vl": "lfm2",
    "llama4": "llama4.TextArgs",
    "minimax_m3_vl": "minimax_m3_vl.TextArgs",
    "mistral3": "llama",
    "muse_spark": "muse_spark.TextArgs",
    "pixtral": "llama",
    "qwen2_vl": "qwen2",
    "qwen3_5": "qwen3_5.TextModelArgs",
    "qwen3_5_moe": "qwen3_5.TextModelArgs",
    "qwen3_vl": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
}
"""Of what also sees: the arguments of its text_config, by architecture or class."""
YARN = {
    "type": "yarn", "rope_type": "yarn", "rope_theta": 10000.0, "factor": 1.0,
    "original_max_position_embeddings": 512, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32,
    "beta_slow": 1, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
BY_KIND = {
    kind: {"rope_type": "default", "rope_theta": 10000.0}
    for kind in ("sliding_attention", "full_attention")
}
LINEAR = ["linear_attention", "full_attention"]
KDA = {
    "kda_layers": [1], "full_attn_layers": [2], "num_heads": 4, "head_dim": 32,
    "short_conv_kernel_size": 4,
}  # fmt: skip
MAMBA = {
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_d_conv": 4,
    "mamba_n_groups": 1, "mamba_proj_bias": False, "mamba_conv_bias": True,
}  # fmt: skip
GATED_DELTA = {"linear_key_head_dim": 32, "linear_value_head_dim": 32}
ODD: dict[str, JsonObject] = {
    "afm7": {"num_layers": 3, "num_kv_reuse_layers": 1},
    "baichuan_m1": {"sliding_window_layers": [0], "conv_window": 2},
    "bailing_hybrid": {"layer_group_size": 2},
    "bailing_moe_linear": {"layer_group_size": 2},
    "bailing_moe_v3": {"layer_group_size": 2},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"rope_scaling": YARN, "topk_method": "greedy"},
    "exaone4": {
        "rope_scaling": {"type": "default"},
        "sliding_window_pattern": "LG",
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "exaone_moe": {"is_moe_layer": [False, True]},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64},
    "gemma3": {"vocab_size": VOCABULARY},
    "gemma3n.TextConfig": {
        "num_hidden_layers": 3,
        "num_kv_shared_layers": 1,
        "vocab_size_per_layer_input": VOCABULARY,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "activation_sparsity_pattern": [0.5, 0.0, 0.0],
        "hidden_size_per_layer_input": 16,
        "altup_num_inputs": 2,
        "altup_coef_clip": 120.0,
        "altup_correct_scale": True,
        "altup_active_idx": 0,
        "laurel_rank": 8,
        "final_logit_softcapping": 30.0,
    },
    "gemma4": {"vocab_size": VOCABULARY},
    "gemma4_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": VOCABULARY,
        "num_experts": None,
    },
    "glm4_moe": {"rope_scaling": None},
    "glm_moe_dsa": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    },
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {
        **MAMBA,
        "mamba_d_head": 32,
        "layer_types": ["mamba", "attention"],
        "shared_intermediate_size": 64,
    },
    "hunyuan": {
        "cla_share_factor": 2,
        "num_shared_expert": 1,
        "use_cla": True,
        "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0},
    },
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_conv": 4,
    },
    "kimi_k3.TextArgs": {
        "linear_attn_config": KDA,
        "num_experts_per_token": 2,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "num_key_value_heads": 4,
    },
    "kimi_linear": {
        "linear_attn_config": KDA,
        "num_experts_per_token": 2,
        "first_k_dense_replace": 1,
        "qk_nope_head_dim": 16,
    },
    "lfm2": {
        "layer_types": ["conv", "full_attention"],
        "block_dim": 64,
        "conv_L_cache": 3,
        "block_multiple_of": 32,
        "block_ffn_dim_multiplier": 1.0,
        "block_ff_dim": 128,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4.TextArgs": {
        "model_type": "llama4_text",
        "num_hidden_layers": 4,
        "attention_chunk_size": 16,
        "interleave_moe_layer_step": 2,
        "rope_scaling": None,
        "num_experts_per_tok": 1,
    },
    "llama4_text": {"no_rope_layers": [1, 0]},
    "longcat_flash": {
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
        "zero_expert_num": 1,
        "attention_method": "MLA",
        "zero_expert_type": "identity",
        "ffn_hidden_size": 128,
        "expert_ffn_hidden_size": 64,
    },
    "longcat_flash_ngram": {
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
        "zero_expert_num": 1,
        "ffn_hidden_size": 128,
        "expert_ffn_hidden_size": 64,
    },
    "mamba": {"use_conv_bias": True, "time_step_rank": 4},
    "mamba2": {
        "head_dim": 32,
        "time_step_limit": [0.0, 100.0],
        "time_step_rank": 4,
        "use_conv_bias": True,
    },
    "mellum": {"rope_parameters": BY_KIND},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [1, 0],
        "moe_layer_freq": [0, 1],
        "routed_scaling_factor": 1.0,
        "sliding_window_size": 16,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "n_shared_experts": None,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "add_swa_attention_sink_bias": True,
    },
    "minicpm3": {
        "rope_scaling": {
            "original_max_position_embeddings": 512,
            "short_factor": 1.0,
            "long_factor": 1.0,
        }
    },
    "minimax_m3_vl.TextArgs": {
        "shared_intermediate_size": 64,
        "rotary_dim": 8,
        "moe_layer_freq": [0, 1],
    },
    "ministral3": {"rope_parameters": YARN},
    "mistral4": {"rope_parameters": YARN, "qk_head_dim": 24, "head_dim": 24},
    "muse_spark": {"audio_config": {"out_hidden_size": 64}},
    "muse_spark.TextArgs": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "layer_rope_theta": [10000.0, 10000.0],
        "moe_hidden_size": 64,
        "num_shared_experts": 0,
        "mlp_layer_types": ["sparse", "sparse"],
    },
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 2.0}},
            {"attention": {"no_op": True}, "ffn": {"ffn_mult": 1.0}},
        ]
    },
    "nemotron_h": {
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": True,
        "hybrid_override_pattern": ["M", "*", "-", "E"],
        "layer_types": None,
    },
    "olmo_hybrid": {**GATED_DELTA, "layer_types": LINEAR},
    "openelm": {
        "num_query_heads": [4, 4],
        "num_kv_heads": [2, 2],
        "ffn_multipliers": [1.0, 2.0],
        "ffn_dim_divisor": 32,
    },
    "phi3small": {"vocab_size": 100_352},  # it knows tokens that must not be sampled
    "phixtral": {"rotary_dim": 8},
    "plamo": {"n_shared_head": 2},
    "plamo2": {"num_hidden_layers": 2, "hidden_size_per_head": 16, "mamba_num_heads": 4},
    "qwen": {"kv_channels": 16},
    "qwen3_5.TextModelArgs": {
        **GATED_DELTA,
        "full_attention_interval": 2,
        "model_type": "qwen3_5_text",
    },
    "qwen3_next": {**GATED_DELTA, "full_attention_interval": 2},
    "recurrent_gemma": {
        "block_types": ["recurrent", "attention"],
        "conv1d_width": 4,
        "logits_soft_cap": 30.0,
    },
    "spark2_5": {"rope_parameters": BY_KIND},
}
"""What the names of an architecture do not say."""


def architectures() -> list[str]:
    """Modules of mlx_lm.models that make a model, found without importing one: not all can be."""
    import mlx_lm

    folder = Path(mlx_lm.__file__).parent / "models"
    found = sorted(name for _, name, _ in pkgutil.iter_modules([str(folder)]))
    return [n for n in found if _makes_a_model((folder / f"{n}.py").read_text(encoding="utf-8"))]


def _makes_a_model(source: str) -> bool:
    """Whether it has, or imports, what mlx-lm looks for."""
    import ast

    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return {"Model", "ModelArgs"} <= names


def config_of(name: str) -> JsonObject:
    """The config.json of a tiny model of this architecture."""
    if name in TEXT:
        return {"model_type": name, "text_config": config_of(TEXT[name])} | ODD.get(name, {})
    module, _, arguments = name.partition(".")
    found = importlib.import_module(f"mlx_lm.models.{module}")
    fields = dataclasses.fields(getattr(found, arguments or "ModelArgs"))
    sizes = {field.name: _size(field) for field in fields}
    config = {**sizes, "model_type": module, **ODD.get(name, {})}
    return {key: value for key, value in config.items() if value is not None or key in NULL}


def _size(field: dataclasses.Field) -> object:
    """None where the architecture's own value is kept."""
    if field.name in BY_NAME:
        return BY_NAME[field.name]
    for ending, value in ENDINGS:
        if field.name.endswith(ending):
            return value
    given = field.default is not dataclasses.MISSING
    if given or field.default_factory is not dataclasses.MISSING or field.name == "model_type":
        return None
    return BY_TYPE.get(getattr(field.type, "__name__", ""))


def make(name: str, folder: Path) -> Path:
    """Write the model, its weights larger than at a start: flat distributions would hide faults."""
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_map
    from mlx_lm.utils import _get_classes

    config = config_of(name)
    model_class, args_class = _get_classes(config)
    mx.random.seed(SEED)
    model = model_class(args_class.from_dict(config))
    model.update(tree_map(_larger, model.parameters()))
    folder.mkdir(parents=True)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TOKENIZER / file, folder)
    return folder


def _larger(weight: Any) -> Any:
    """Nor would a start at zeros, which keep what they are multiplied with from its gradient."""
    import mlx.core as mx

    if not mx.issubdtype(weight.dtype, mx.floating):
        return weight
    if not mx.any(weight):
        return 0.2 * mx.random.normal(weight.shape, weight.dtype)
    return weight * 3 if weight.ndim > 1 else weight


def any_difference(completion_ids: list[list[int]], **_: object) -> list[float]:
    """A reward that differs between any two completions, however odd they are."""
    return [float(sum(n * i for n, i in enumerate(ids, 1)) % 101) for ids in completion_ids]
