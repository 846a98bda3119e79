"""Models for `utils/pretrain.py`: fresh ones of any type that mlx-lm knows, or from a folder."""

import dataclasses
import importlib
import json
from pathlib import Path
from types import ModuleType

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.utils import load_model

from ..base.errors import UserError
from ..model import vision
from ..model.shape import ModelConfig
from ..model.vision import EXAMPLE

# Keys of config.json that transformers or this repository read, and mlx-lm does not.
EXTRA = {"architectures", "torch_dtype", "max_position_embeddings", "name"}


def architecture(config: ModelConfig) -> tuple[ModuleType, object]:
    """mlx-lm's module of the model type, and its arguments.

    Raises:
        UserError: [model] names no model type of mlx-lm, or not the settings of that type.
    """
    kind = config.get("model_type")
    try:
        module = importlib.import_module(f"mlx_lm.models.{kind}")
    except ModuleNotFoundError:
        raise UserError(f"[model] model_type = {kind!r}: mlx-lm has no such model type") from None
    known = {field.name for field in dataclasses.fields(module.ModelArgs)} | EXTRA
    if unknown := sorted(set(config) - known):
        raise UserError(f"[model] {unknown[0]}: unknown for {kind!r}; known: {sorted(known)}")
    try:
        return module, module.ModelArgs.from_dict(config)
    except TypeError as error:
        raise UserError(f"[model] is incomplete for {kind!r}: {error}") from None


def new_model(config: ModelConfig, seed: int) -> nn.Module:
    """A model with fresh float32 weights; raises what `architecture` raises."""
    module, args = architecture(config)
    mx.random.seed(seed)
    model = module.Model(args)
    mx.eval(model.parameters())
    return model


OPTION = "initial_checkpoint_dir"
CONVERT = "uv run python utils/convert_model.py --hf-path"


def check_folder(folder: str) -> ModelConfig:
    """config.json of the model to start from.

    Raises:
        UserError: there is no such folder, or it holds no model that can be trained.
    """
    path = Path(folder)
    if not path.is_dir():
        missing = f"{OPTION} = {folder!r} is no model folder (no config.json)"
        raise UserError(f"{missing}: {what_is_there(path)}")
    if not (path / "config.json").is_file():
        raise UserError(f"{OPTION} = {folder!r} is no model folder (no config.json)")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{OPTION}: {path}/config.json: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{OPTION}: {path}/config.json is no JSON object")
    if "quantization" in config:
        raise UserError(
            f"{OPTION} = {folder!r} is quantized: packed weights have no gradient. Train adapters "
            f"(--train-type lora), or convert the model without --quantize:\n  {CONVERT} MODEL "
            "--output-dir FOLDER"
        )
    return config


def what_is_there(path: Path) -> str:
    """Instead of a folder, with the command that makes one."""
    if path.exists():
        return "that is a file; give the folder that holds config.json"
    name = str(path)
    if name.count("/") == 1 and not name.startswith((".", "~", "utils/", "models/", "outputs/")):
        to = f"models/{path.name}"
        how = f"A model of the hub has to be converted first, to {to}:"
        return f"there is no such folder. {how}\n  {CONVERT} {name} --output-dir {to}"
    return f"there is no such folder. Make it with:\n  {CONVERT} {EXAMPLE} --output-dir {name}"


def load_folder(folder: str) -> tuple[nn.Module, ModelConfig]:
    """Model and config.json of a folder.

    Raises:
        UserError: it is no model folder, or a quantized model.
    """
    config = check_folder(folder)
    try:
        return load_model(Path(folder))[:2]
    except (OSError, ValueError) as error:
        name = f"{OPTION} = {folder!r}"
        if vision.has_vision(config):
            option = "--initial-checkpoint-dir "
            raise UserError(vision.cannot_be_read(name, config, str(error), option)) from None
        raise UserError(f"{name} does not load: {error}") from None


def has_experts(model: nn.Module) -> bool:
    return any(isinstance(module, SwitchLinear) for module in model.modules())


def parameter_counts(model: nn.Module, config: ModelConfig) -> tuple[int, int]:
    """All parameters, and those that take part in one token (experts not chosen do not)."""
    idle = 0
    chosen = config.get("num_experts_per_tok", 1) / config.get("num_local_experts", 1)
    total = sum(weight.size for weight in dict(tree_flatten(model.parameters())).values())
    for module in model.modules():
        if isinstance(module, SwitchLinear):
            idle += round(module.weight.size * (1 - chosen))
    return total, total - idle
