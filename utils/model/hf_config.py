"""Read what transformers 5 writes into config.json the way mlx-lm understands it."""

import inspect

from ..base.errors import UserError
from .shape import JsonObject, ModelConfig


def translate_config(config: ModelConfig) -> ModelConfig:
    """Settings to add, so that mlx-lm reads a config.json of transformers 5 rightly.

    That version nests rope_theta and the like in `rope_parameters`. Architectures of mlx-lm that
    do not know this key (llama, qwen2, mixtral, gemma3_text, ...) would silently take defaults.
    """
    from mlx_lm.utils import _get_classes

    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or "model_file" in config:
        return {}
    known = inspect.signature(_get_classes(config)[1]).parameters
    if "rope_parameters" in known:
        return {}
    added = flatten_rope(rope)
    if "rope_local_base_freq" in added:
        added |= sliding_pattern(config)
        if "rope_local_base_freq" not in known:
            refuse_two_ropes(config, added)
    return {k: v for k, v in added.items() if k in known and config.get(k) is None}


def refuse_two_ropes(config: ModelConfig, added: ModelConfig) -> None:
    """Raise UserError where the architecture knows only one and the layers have two."""
    if added["rope_local_base_freq"] != added["rope_theta"]:
        raise UserError(f"mlx-lm's {config['model_type']} has no rope_parameters per kind of layer")


def sliding_pattern(config: ModelConfig) -> ModelConfig:
    """gemma3: every so many layers one attends to everything."""
    layers = config.get("layer_types") or []
    if "full_attention" not in layers:
        return {}
    return {"sliding_window_pattern": layers.index("full_attention") + 1}


def flatten_rope(rope: JsonObject) -> ModelConfig:
    """`rope_parameters`, of all layers or by kind of layer, under the names of transformers 4."""
    whole = rope.get("full_attention", rope)
    flat = {k: v for k, v in whole.items() if k in ("rope_theta", "partial_rotary_factor")}
    if whole.get("rope_type", "default") != "default":
        flat["rope_scaling"] = whole
    if "sliding_attention" in rope:
        flat["rope_local_base_freq"] = rope["sliding_attention"].get("rope_theta")
    return flat
