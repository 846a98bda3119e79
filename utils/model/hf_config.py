"""Read what transformers 5 writes into config.json the way mlx-lm understands it."""

import inspect
from typing import Any

from ..base.errors import UserError


def translate_config(config: dict[str, Any]) -> dict[str, Any]:
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
    layers = config.get("layer_types") or []
    if "rope_local_base_freq" in added and "full_attention" in layers:
        # gemma3: every so many layers one attends to everything.
        added["sliding_window_pattern"] = layers.index("full_attention") + 1
    unknown = "rope_local_base_freq" in added and "rope_local_base_freq" not in known
    if unknown and added["rope_local_base_freq"] != added["rope_theta"]:
        raise UserError(f"mlx-lm's {config['model_type']} has no rope_parameters per kind of layer")
    return {k: v for k, v in added.items() if k in known and config.get(k) is None}


def flatten_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters`, of all layers or by kind of layer, under the names of transformers 4."""
    whole = rope.get("full_attention", rope)
    flat = {k: v for k, v in whole.items() if k in ("rope_theta", "partial_rotary_factor")}
    if whole.get("rope_type", "default") != "default":
        flat["rope_scaling"] = whole
    if "sliding_attention" in rope:
        flat["rope_local_base_freq"] = rope["sliding_attention"].get("rope_theta")
    return flat
