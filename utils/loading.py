"""Models from a folder or the hub, with what must be refused or added before training."""

import json
from pathlib import Path
from typing import Any

from .errors import UserError
from .tiktoken_wrapper import TiktokenTokenizerWrapper

HOW_TO_MAKE = {
    "utils/mlx_model": "uv run python utils/convert_model.py "
    "--hf-path Qwen/Qwen2.5-1.5B-Instruct --quantize",
    "models/nanochat": "uv run python utils/convert_nanochat.py --help",
    "models/tiny-math": "uv run python utils/pretrain.py --config configs/pretrain/tiny_math.toml",
}


def find_model(name: str) -> Path | None:
    """The folder of a local model; None for a hub name.

    Raises:
        UserError: a local folder that is not there (with the command that makes it), or no model.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"model_name = {name!r} is a folder without config.json")
        return path
    command = next((c for known, c in HOW_TO_MAKE.items() if name.startswith(known)), None)
    if command:
        raise UserError(f"model folder {name} is not there. Make it with:\n  {command}")
    if name.count("/") != 1 or name.startswith(("/", ".", "~")) or path.parent.is_dir():
        raise UserError(f"model_name = {name!r} is neither a folder nor a hub name (owner/model)")
    return None


def read_model(config: Any, local: Path | None) -> tuple[Any, Any, dict, Path]:
    import mlx_lm
    from mlx_lm.utils import hf_repo_to_path

    trust = config.trust_remote_code
    if local and (local / "tokenizer.tiktoken").is_file():
        model, model_config = mlx_lm.utils.load_model(local, trust_remote_code=trust)
        return model, TiktokenTokenizerWrapper.from_pretrained(local), model_config, local
    model, tokenizer, model_config = mlx_lm.load(
        str(local or config.model_name),
        tokenizer_config={"trust_remote_code": trust},
        trust_remote_code=trust,
        return_config=True,
    )
    return model, tokenizer, model_config, local or hf_repo_to_path(config.model_name)


def is_quantized(model: Any) -> bool:
    return any(hasattr(module, "bits") for _, module in model.named_modules())


def choose_train_type(config: Any, model: Any) -> str:
    """Resolve train_type "auto", and refuse what MLX would silently not train."""
    quantized = is_quantized(model)
    if quantized and config.train_type == "full":
        raise UserError(
            f"{config.model_name} is quantized: packed weights have no gradient, only norms and "
            "biases would train. Use train_type = lora, or a model that is not quantized"
        )
    bits = {module.bits for _, module in model.named_modules() if hasattr(module, "bits")}
    if config.train_type == "dora" and bits - {2, 4, 8}:
        raise UserError(f"train_type = dora does not work on {max(bits)}-bit weights; lora does")
    if config.train_type != "auto":
        return config.train_type
    return "lora" if quantized or config.adapter_path else "full"


def add_adapters(config: Any, loaded: Any) -> None:
    """Freeze the base and put LoRA or DoRA layers on it, new ones or those of `adapter_path`."""
    import mlx.core as mx
    from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters

    model = loaded.model
    model.freeze()
    mx.random.seed(config.seed)
    if config.adapter_path:
        loaded.adapter_config, loaded.train_type = read_adapter_config(config)
        try:
            load_adapters(model, config.adapter_path)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(f"adapter_path {config.adapter_path}: {error}") from error
        return
    parameters = {
        "rank": config.lora_rank,
        "scale": config.lora_scale,
        "dropout": config.lora_dropout,
    }
    if config.lora_keys:
        parameters["keys"] = check_lora_keys(model, config.lora_keys)
    linear_to_lora_layers(model, config.lora_layers, parameters, loaded.train_type == "dora")
    loaded.adapter_config = {
        "fine_tune_type": loaded.train_type,
        "num_layers": config.lora_layers,
        "lora_parameters": parameters,
        "model": config.model_name,
    }


def check_lora_keys(model: Any, keys: list[str]) -> list[str]:
    known = {name for name, m in model.layers[-1].named_modules() if hasattr(m, "weight")}
    missing = [key for key in keys if key not in known]
    if missing:
        raise UserError(
            f"lora_keys {missing} match nothing; a layer has {', '.join(sorted(known))}"
        )
    return keys


def read_adapter_config(config: Any) -> tuple[dict[str, Any], str]:
    path = Path(config.adapter_path) / "adapter_config.json"
    try:
        adapter_config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"adapter_path: {path} cannot be read: {error}") from None
    kind = adapter_config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora") or config.train_type not in ("auto", kind):
        raise UserError(f"{path} holds {kind} adapters, but train_type = {config.train_type}")
    return adapter_config, kind
