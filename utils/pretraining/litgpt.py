"""LitGPT's configuration files in this repository's terms: nested tables, and its model names.

LitGPT nests its training options (train, eval, optimization, optimizer.init_args, ...) and has its
own names for the sizes of a model. `docs/litgpt.md` goes through every one of them.
"""

from typing import Any

from ..base.errors import UserError
from ..model.shape import ModelConfig

Table = dict[str, Any]
"""Options by name, as they stand in a file; a table may hold others."""
# Table of the file -> the options whose flat name here differs from their name in the table.
TABLES: dict[str, dict[str, str]] = {
    "data": {"class_path": "data_class_path"},
    "data.init_args": {},
    "train": {},
    "eval": {"interval": "eval_interval", "max_iters": "eval_max_iters"},
    "optimization": {},
    "optimizer": {"class_path": "optimizer_class_path"},
    "optimizer.init_args": {},
}

MODEL_NAMES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_query_groups": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "rope_base": "rope_theta",
    "padded_vocab_size": "vocab_size",
    "block_size": "max_position_embeddings",
    "intermediate_size": "intermediate_size",
    "moe_intermediate_size": "intermediate_size",
    "n_expert": "num_local_experts",
    "n_expert_per_token": "num_experts_per_tok",
}
ONLY = {"bias": False, "parallel_residual": False, "norm_class_name": "RMSNorm"}
TYPES = {
    "LLaMAMoE": ("mixtral", "MixtralForCausalLM"),
    "LLaMAMLP": ("llama", "LlamaForCausalLM"),
}


def flatten(data: Table, prefix: str = "") -> Table:
    """The options of nested tables under their flat names; other keys stay as they are.

    Raises:
        UserError: an option stands twice.
    """
    flat: Table = {}
    renamed = TABLES.get(prefix.rstrip("."), {})
    for key, value in data.items():
        if prefix + key in TABLES and isinstance(value, dict):
            inner = flatten(value, f"{prefix}{key}.")
        else:
            inner = {renamed.get(key, key): value}
        if twice := sorted(set(inner) & set(flat)):
            raise UserError(f"{twice[0]} is set twice in the file")
        flat |= inner
    return flat


def model_config(table: Table) -> ModelConfig:
    """config.json for mlx-lm from LitGPT's model options; another table is returned as it is.

    Raises:
        UserError: an option that the architecture cannot follow, or one that nobody knows.
    """
    if "model_type" in table or "n_embd" not in table:
        return dict(table)
    table = dict(table)
    name = table.pop("name", None)
    kind = table.pop("mlp_class_name", "LLaMAMLP")
    if kind not in TYPES:
        raise UserError(f"[model] mlp_class_name = {kind!r}: known are {', '.join(TYPES)}")
    model_type, architecture = TYPES[kind]
    _check_names(table, model_type)
    _check_sizes(table)
    _pad_vocabulary(table)
    table.setdefault("n_query_groups", table["n_head"])  # LitGPT's default; mlx-lm's differs
    config: ModelConfig = {"model_type": model_type, "architectures": [architecture]}
    config |= {MODEL_NAMES[key]: value for key, value in table.items()}
    config = {"rms_norm_eps": 1e-5, "rope_theta": 10000} | config  # LitGPT's defaults
    config.setdefault("tie_word_embeddings", False)  # as LitGPT's GPT: a head of its own
    return config | ({"name": name} if name else {})


def _check_names(table: Table, model_type: str) -> None:
    """Take out what the architecture has anyway; refuse what it has not, and unknown names."""
    for key, value in ONLY.items():
        if (found := table.pop(key, value)) != value:
            raise UserError(f"[model] {key} = {found!r}: mlx-lm's {model_type} has {value!r}")
    if unknown := sorted(set(table) - {*MODEL_NAMES, "vocab_size"}):
        raise UserError(f"[model] {unknown[0]}: unknown; known: {sorted(MODEL_NAMES)}")


def _pad_vocabulary(table: Table) -> None:
    """Only the padded size goes on: it is that of the embedding."""
    vocab_size = table.pop("vocab_size", 0)
    if vocab_size:
        table.setdefault("padded_vocab_size", vocab_size)
    if table.get("padded_vocab_size", 0) < vocab_size:
        raise UserError("[model] padded_vocab_size is smaller than vocab_size")


def _check_sizes(table: Table) -> None:
    for key in ("n_embd", "n_layer", "n_head"):
        if key not in table:
            raise UserError(f"[model] {key} is missing")
    for key, value in table.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
            raise UserError(f"[model] {key} = {value!r}: must be a number from 0 up")
    for key, part in (("n_embd", "n_head"), ("n_head", "n_query_groups")):
        if table[key] % table.get(part, 1):
            raise UserError(f"[model] {key} = {table[key]}: must be a multiple of {part}")
    if table.get("n_expert_per_token", 0) > table.get("n_expert", 8):
        raise UserError("[model] n_expert_per_token: must not be above n_expert")
