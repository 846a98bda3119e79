"""Models that see: what of one is trained here, and what to say where mlx-lm cannot read it."""

import json
from pathlib import Path
from typing import cast

from ..base.errors import UserError
from .shape import JsonObject, ModelConfig

# What their config.json holds, in the words of transformers and of models with their own code.
KEYS = (
    *("vision_config", "vision_tower", "mm_vision_tower", "vision_cfg", "visual"),
    *("vision_model", "vision_encoder", "vit_config", "img_processor"),
)
EXAMPLE = "Qwen/Qwen2.5-1.5B-Instruct"
WHAT_TRAINS = "a vision model: only its language part trains, on text; final/ will not see"


def has_vision(config: ModelConfig) -> bool:
    """Whether a config.json is of a model that also sees."""
    return any(config.get(key) for key in KEYS)


def cannot_be_read(
    name: str, config: ModelConfig, why: str, option: str = "--set model_name="
) -> str:
    """What to say of a vision model whose language part mlx-lm did not get out of its folder."""
    why = " ".join(why.split())
    why = why if len(why) <= 150 else f"{why[:150]}..."  # it may list every parameter
    text = config.get("text_config")
    made_from = cast(JsonObject, text).get("_name_or_path") if isinstance(text, dict) else ""
    known = isinstance(made_from, str) and made_from.count("/") == 1
    of_it = ", from which its language part was made" if known else ", or another language model"
    return (
        f"model {name} is a vision model (model_type {config.get('model_type')!r}). Only language "
        f"is trained here, and mlx-lm cannot read the language part of this one: {why}\n"
        f"Train a language model: {option}{made_from if known else EXAMPLE}{of_it}"
    )


def refuse_unknown(name: str, folder: Path) -> None:
    """Before gigabytes are read. Raises UserError: a vision model of a type that mlx-lm lacks."""
    config = config_of(folder)
    if not has_vision(config) or "model_file" in config:
        return
    from mlx_lm.utils import _get_classes

    try:
        _get_classes(config)
    except (ValueError, KeyError) as error:
        raise UserError(cannot_be_read(name, config, str(error))) from None


def config_of(folder: Path) -> ModelConfig:
    """Of a folder whose config.json is read and judged elsewhere; empty where that is none."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return cast(ModelConfig, config) if isinstance(config, dict) else {}
