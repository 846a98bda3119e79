"""LoRA and DoRA layers: put on (mlx-lm's or PEFT's), made narrower, and left out."""

import copy
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..base.errors import UserError, reason
from ..base.json_files import read_object
from ..base.say import complain
from ..settings.run_settings import Settings
from . import fingerprints, peft_adapters
from .mending import adaptable
from .peft_adapters import Adapters
from .shape import JsonObject

BASE = "base_sha256"  # in adapter_config.json: the fingerprint of the model they were trained on


def add_adapters(
    config: Settings, model: nn.Module, train_type: str, fingerprint: str
) -> tuple[JsonObject, str]:
    """Freeze the base and put LoRA or DoRA layers on it, new ones or those of `adapter_path`.

    fingerprint: of the base's files, which its adapters record.

    Returns their adapter_config.json, and which of both they are.
    """
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model.freeze()
    mx.random.seed(config.seed)
    if config.adapter_path:
        folder = config.located(config.adapter_path)
        check_kind(config, folder)
        check_base(folder, config.adapter_path, config.model_name, fingerprint)
        adapter_config, kind = put_on(model, folder, config.adapter_path, config.model_name)
        return adapter_config | {BASE: fingerprint}, kind
    parameters: JsonObject = {
        "rank": config.lora_rank,
        "scale": config.lora_scale,
        "dropout": config.lora_dropout,
    }
    if config.lora_keys:
        parameters["keys"] = check_lora_keys(model, config.lora_keys)
    elif keys := adaptable(model):
        parameters["keys"] = keys
    linear_to_lora_layers(model, config.lora_layers, parameters, train_type == "dora")
    adapter_config = {
        "fine_tune_type": train_type,
        "num_layers": config.lora_layers,
        "lora_parameters": parameters,
        "model": config.model_name,
        BASE: fingerprint,
    }
    return adapter_config, train_type


def check_folder(config: Settings, base: Path) -> None:
    """Of `adapter_path`, without reading weights.

    Raises:
        UserError: no adapters are there, or those of another kind or base.
    """
    folder = config.located(config.adapter_path)
    if not peft_adapters.is_peft(folder):
        read_adapter_config(folder)
    check_kind(config, folder)
    check_base(folder, config.adapter_path, config.model_name, fingerprints.of_model(base))


def check_base(folder: Path, said: str, base: str, fingerprint: str) -> None:
    """Raises UserError for adapters that say that they were trained on other weights."""
    found = read_object(folder / peft_adapters.CONFIG)
    before = found.get(BASE, fingerprint)
    if before != fingerprint:
        raise UserError(
            f"adapter_path {said} was trained on another base: on {found.get('model')} with "
            f"{BASE} = {str(before)[:12]}..., and {base} has {fingerprint[:12]}...: take that "
            f"base, or delete {BASE} from {folder / peft_adapters.CONFIG} if the adapters "
            "are meant for this one"
        )


def check_kind(config: Settings, folder: Path) -> None:
    """Raises UserError where train_type says another kind than the adapters are of."""
    found = read_object(folder / peft_adapters.CONFIG)
    kind = found.get("fine_tune_type", "dora" if found.get("use_dora") else "lora")
    if kind in ("lora", "dora") and config.train_type not in ("auto", kind):
        raise UserError(
            f"adapter_path {config.adapter_path} holds {kind} adapters, but train_type = "
            f"{config.train_type}"
        )


def put_on(model: nn.Module, folder: Path, said: str, base: str) -> tuple[JsonObject, str]:
    """Put the adapters of a folder on the model, mlx-lm's or PEFT's: what mlx-lm would say of them.

    said: the folder as the user gave it; base: what the model is called.

    Raises:
        UserError: damaged adapters, or those of another model.
    """
    from mlx_lm.tuner.utils import load_adapters

    if not peft_adapters.is_peft(folder):
        adapter_config, kind = read_adapter_config(folder)
        check_dora(model, kind, base)
        try:
            load_adapters(model, str(folder))
        except Exception as error:  # mlx-lm on untrusted files: it raises anything
            raise UserError(f"adapter_path {said}: {reason(error)}") from error
        return adapter_config, kind
    adapters = peft_adapters.read(folder)
    trained_on = adapters.base or "another model"
    check_dora(model, adapters.kind, base)
    check_fits(model, adapters, f"adapter_path {said}", f"(trained on {trained_on}, put on {base})")
    if adapters.base and Path(adapters.base).name.lower() != Path(base).name.lower():
        complain(f"note: the adapters of {said} were trained on {adapters.base}; this is {base}")
    return put_on_by_name(model, adapters, base), adapters.kind


def check_dora(model: nn.Module, kind: str, base: str) -> None:
    """Raises UserError where mlx-lm's DoRA layer would compute with a wrong width."""
    bits = {module.bits for _, module in model.named_modules() if hasattr(module, "bits")}
    if kind == "dora" and bits - {2, 4, 8}:
        raise UserError(
            f"dora adapters do not work on {max(bits)}-bit weights, which {base} has; lora does"
        )


def put_on_by_name(model: nn.Module, adapters: Adapters, base: str) -> JsonObject:
    from mlx_lm.tuner.utils import linear_to_lora_layers

    layers = next(name for name, m in model.named_modules() if m is model.layers[0])
    adapter_config = peft_adapters.as_mlx_lm(
        adapters, layers.rpartition(".")[0], len(model.layers), base
    )
    number, how = adapter_config["num_layers"], adapter_config["lora_parameters"]
    linear_to_lora_layers(model, number, how, adapters.kind == "dora")
    model.load_weights(list(adapters.weights.items()), strict=False)
    return adapter_config


def check_fits(model: nn.Module, adapters: Adapters, said: str, both: str) -> None:
    """Raises UserError, which names both models, for adapters that do not fit into this one."""
    modules = dict(model.named_modules())
    tables = nn.Embedding | nn.QuantizedEmbedding
    for name in adapters.modules:
        module = modules.get(name)
        if isinstance(module, tables):
            raise UserError(
                f"{said} adapts the embeddings ({name}), which PEFT and mlx-lm do differently. "
                "Merge them into their base with PEFT (merge_and_unload)"
            )
        if not isinstance(module, nn.Linear | nn.QuantizedLinear):
            found = "that is no linear layer" if module else "there is no such layer"
            raise UserError(f"{said} does not fit: it adapts {name}, and {found} {both}")
        outputs, inputs = module.weight.shape
        if isinstance(module, nn.QuantizedLinear):
            inputs = inputs * 32 // module.bits
        wanted = {"lora_a": (inputs, adapters.rank), "lora_b": (adapters.rank, outputs)}
        for part, shape in (wanted | {"m": (outputs,)}).items():
            weight = adapters.weights.get(f"{name}.{part}")
            if weight is not None and weight.shape != shape:
                raise UserError(
                    f"{said} does not fit: {name} takes {inputs:,} numbers and gives {outputs:,}, "
                    f"but its {part} has the shape {weight.shape} {both}"
                )


def check_lora_keys(model: nn.Module, keys: list[str]) -> list[str]:
    modules = model.layers[-1].named_modules()
    known = {name for name, m in modules if hasattr(m, "weight") and m.weight.ndim > 1}
    missing = [key for key in keys if key not in known]
    if missing:
        raise UserError(
            f"lora_keys {missing} match nothing; a layer has {', '.join(sorted(known))}"
        )
    return keys


def read_adapter_config(folder: Path) -> tuple[JsonObject, str]:
    path = folder / peft_adapters.CONFIG
    if not path.is_file():
        raise UserError(f"adapter_path: {path} cannot be read: No such file")
    adapter_config = read_object(path)
    kind = adapter_config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise UserError(f"{path}: fine_tune_type = {kind!r} is not lora or dora")
    missing = [key for key in ("num_layers", "lora_parameters") if key not in adapter_config]
    if missing:
        raise UserError(
            f"{path} lacks {missing[0]}: it describes neither adapters of mlx-lm nor of PEFT "
            "(which has peft_type)"
        )
    return adapter_config, kind


def without_adapters(model: nn.Module) -> nn.Module:
    """A view of the model with each adapter replaced by the layer it wraps; shares all arrays."""
    base = copy.deepcopy(model)
    wrapped = [
        (name, module.linear if "linear" in module else module.embedding)
        for name, module in base.named_modules()
        if "lora_a" in module
    ]
    base.update_modules(tree_unflatten(wrapped))
    return base


def narrow_adapters(model: nn.Module) -> None:
    """Let LoRA layers compute in the type of their base; their weights and gradients stay float32.

    mlx-lm's cast their input and write their output in float32: more than what the base does. One
    H200, 1.5B bf16, blocks on 16 x 406 tokens: 191 ms compiled, where full fine-tuning takes 135.
    In float16, whose range gradients leave, only the input is not kept in float32.
    """
    from mlx_lm.tuner.lora import LoRALinear

    class Narrow(LoRALinear):
        def __call__(self, x: mx.array) -> mx.array:
            if x.dtype == mx.bfloat16:
                low = self.dropout(x) @ (self.scale * self.lora_a).astype(x.dtype)
                return mx.addmm(self.linear(x), low, self.lora_b.astype(x.dtype))
            if x.dtype == mx.float16 and self.training:
                low = mx.checkpoint(mx.matmul)(self.dropout(x), self.lora_a)
                return self.linear(x) + (self.scale * (low @ self.lora_b)).astype(x.dtype)
            return super().__call__(x)

    for _, module in model.named_modules():
        if type(module) is LoRALinear:
            object.__setattr__(module, "__class__", Narrow)
