"""Adapters as PEFT keeps them, in and out: LoRA and DoRA, nothing that these layers cannot compute.

PEFT names what it adapts by a rule in adapter_config.json; the names of the weights say the same
for certain, so these count. It writes matrices the other way round, and alpha instead of a scale.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..base.errors import UserError, reason
from ..base.json_files import read_object, write_json
from ..base.text import shown
from . import served_prompt
from . import shape as model_shape
from .shape import JsonObject

if TYPE_CHECKING:
    import mlx.core as mx

CONFIG, WEIGHTS, OURS = "adapter_config.json", "adapter_model.safetensors", "adapters.safetensors"
PREFIX = "base_model.model."
PARTS = {  # in a name of PEFT's, and in mlx-lm's
    "lora_A.weight": "lora_a",
    "lora_B.weight": "lora_b",
    "lora_magnitude_vector": "m",
    "lora_magnitude_vector.weight": "m",
}
# What may stand in PEFT's file and changes nothing here. Anything else that is set is refused.
READ = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora", "bias"),
    *("init_lora_weights", "base_model_name_or_path"),
}
HARMLESS = {
    *("task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "runtime_config"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("qalora_group_size", "megatron_core", "eva_config", "loftq_config", "_custom_modules"),
}
# The other ones (pissa, olora, corda, loftq, lora_ga) also change the base.
INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "eva")
ALONG = (  # with adapters: how the model is asked
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *(served_prompt.TEMPLATE, served_prompt.ORIGINAL, served_prompt.MARKER),
)


class Adapters(NamedTuple):
    """In mlx-lm's terms."""

    kind: str
    """lora or dora."""
    rank: int
    scale: float
    dropout: float
    base: str
    """The model that they were trained on, as their file says; empty where it does not."""
    weights: dict[str, mx.array]
    """Named by the module: model.layers.0.self_attn.q_proj.lora_a (inputs, rank), and so on."""

    @property
    def modules(self) -> list[str]:
        return sorted({name.rpartition(".")[0] for name in self.weights}, key=by_number)


def by_number(name: str) -> list[tuple[int, str]]:
    """Layer 10 comes after layer 9."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in name.split(".")]


def is_peft(folder: Path) -> bool:
    """By what the configuration says; a damaged one is no one's. Raises UserError where both."""
    try:
        config = read_object(folder / CONFIG)
    except UserError:
        return False
    ours = [name for name in ("fine_tune_type", "lora_parameters") if name in config]
    if "peft_type" not in config:
        return False
    if ours or ((folder / OURS).exists() and (folder / WEIGHTS).exists()):
        found = f"{CONFIG} has {ours[0]}" if ours else f"{OURS} lies beside {WEIGHTS}"
        raise UserError(
            f"{folder} holds adapters of PEFT and of mlx-lm ({found}): which are meant cannot be "
            "told. Leave one of them in the folder"
        )
    return True


def read(folder: Path) -> Adapters:
    """The adapters of a folder that PEFT wrote.

    Raises:
        UserError: damaged files, or something that these layers do not have.
    """
    config = read_object(folder / CONFIG)
    refuse_what_is_not_read(folder / CONFIG, config)
    rank = config.get("r")
    if type(rank) is not int or rank < 1:
        raise wrong(folder, "r", rank, "a positive whole number")
    alpha = number(folder, config, "lora_alpha", 8.0)
    dropout = number(folder, config, "lora_dropout", 0.0)
    if not 0 <= dropout < 1:
        raise wrong(folder, "lora_dropout", dropout, "at least 0 and below 1")
    base = config.get("base_model_name_or_path") or ""
    if not isinstance(base, str):
        raise wrong(folder, "base_model_name_or_path", base, "a name")
    kind = "dora" if config.get("use_dora") else "lora"
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    weights = in_our_terms(folder, read_weights(folder))
    check_complete(folder, weights, kind, rank)
    return Adapters(kind, rank, scale, dropout, base, weights)


def wrong(folder: Path, key: str, value: object, allowed: str) -> UserError:
    return UserError(f"{folder / CONFIG}: {key} = {shown(value)} should be {allowed}")


def number(folder: Path, config: JsonObject, key: str, otherwise: float) -> float:
    value = config.get(key, otherwise)
    if type(value) not in (int, float) or not math.isfinite(value):
        raise wrong(folder, key, value, "a number")
    return float(value)


def refuse_what_is_not_read(file: Path, config: JsonObject) -> None:
    """Raises UserError by name for all that PEFT computes and these layers do not."""
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"{file}: peft_type = {shown(config.get('peft_type'))}; what can be read is LORA, also "
            "with use_dora"
        )
    if config.get("bias", "none") != "none":
        raise UserError(f"{file}: bias = {shown(config['bias'])}; biases are not trained here")
    start = config.get("init_lora_weights", True)
    if start not in INITIALISATIONS:
        raise UserError(
            f"{file}: init_lora_weights = {shown(start)} changes the base as well. Let PEFT turn "
            "the adapters into plain LoRA: save_pretrained(..., path_initial_model_for_weight_"
            "conversion=...)"
        )
    for key, value in config.items():
        if key not in READ | HARMLESS and value not in (None, False, "", [], {}):
            raise UserError(
                f"{file}: {key} = {shown(value)} has no counterpart here: only plain LoRA and DoRA "
                "of one rank and one alpha can be read. Merge such adapters into their base with "
                "PEFT (merge_and_unload), and use the result as model"
            )


def read_weights(folder: Path) -> dict[str, mx.array]:
    import mlx.core as mx

    old = folder / "adapter_model.bin"
    if old.is_file() and not (folder / WEIGHTS).is_file():
        raise UserError(
            f"{folder} has no {WEIGHTS}, only {old.name}: save it anew with a PEFT that writes "
            "safetensors"
        )
    loaded = load(folder / WEIGHTS)
    return {name: weight.astype(mx.float32) for name, weight in loaded.items()}


def load(path: Path) -> dict[str, mx.array]:
    """The arrays of a safetensors file. Raises UserError for a missing or damaged one."""
    import mlx.core as mx

    if not path.is_file():
        raise UserError(f"{path.parent} has no {path.name}")
    try:
        model_shape.read_header(path)
        loaded = mx.load(str(path))
    except (ValueError, RuntimeError, OSError) as error:
        why = reason(error).removeprefix(f"{path}: ")
        raise UserError(f"{path} is damaged: {why}") from error
    assert isinstance(loaded, dict)
    return loaded


def in_our_terms(folder: Path, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    found: dict[str, mx.array] = {}
    for name, weight in weights.items():
        module, part = module_and_part(name)
        if not part:
            raise UserError(
                f"{folder / WEIGHTS} has {shown(name)}, which is no LoRA matrix of a linear layer"
            )
        if weight.ndim != (1 if part == "m" else 2):
            raise UserError(f"{folder / WEIGHTS}: {shown(name)} has the shape {weight.shape}")
        found[f"{module}.{part}"] = weight if part == "m" else weight.T
    if not found:
        raise UserError(f"{folder / WEIGHTS} holds no weights")
    return found


def module_and_part(name: str) -> tuple[str, str]:
    """The module that a weight belongs to and mlx-lm's name for it; empty where it is another."""
    match = re.fullmatch(rf"{re.escape(PREFIX)}(.+?)\.({'|'.join(map(re.escape, PARTS))})", name)
    return (match[1], PARTS[match[2]]) if match else ("", "")


def check_complete(folder: Path, weights: dict[str, mx.array], kind: str, rank: int) -> None:
    """Every adapted module has all of its matrices, of the rank that the file says."""
    names = {"lora_a": "lora_A", "lora_b": "lora_B", "m": "lora_magnitude_vector"}
    parts = ("lora_a", "lora_b", "m") if kind == "dora" else ("lora_a", "lora_b")
    for module in {name.rpartition(".")[0] for name in weights}:
        missing = [part for part in parts if f"{module}.{part}" not in weights]
        if missing:
            raise UserError(f"{folder / WEIGHTS} lacks {names[missing[0]]} of {shown(module)}")
        if kind == "lora" and f"{module}.m" in weights:
            raise UserError(
                f"{folder / WEIGHTS} has a magnitude vector (of DoRA) for {shown(module)}, but "
                f"{CONFIG} says use_dora = false"
            )
        ranks = {weights[f"{module}.lora_a"].shape[1], weights[f"{module}.lora_b"].shape[0]}
        if ranks != {rank}:
            raise UserError(
                f"{folder / WEIGHTS}: the matrices of {shown(module)} have the rank "
                f"{' and '.join(map(str, sorted(ranks)))}, but {CONFIG} says r = {rank}"
            )


def as_mlx_lm(adapters: Adapters, layers: str, count: int, base: str) -> JsonObject:
    """adapter_config.json in mlx-lm's format.

    layers: the name of the list of layers, of which the model has `count`. mlx-lm adapts the same
    modules in the last so many layers; any other choice is written as full names of modules.
    """
    inside, others = by_layer(adapters.modules, layers)
    first = count - len(inside)
    same = len({tuple(names) for names in inside.values()}) == 1
    if inside and same and min(inside) == first:
        number, keys = (-1 if first == 0 else len(inside)), [*inside[first], *others]
    else:
        number, keys = -1, adapters.modules
    return {
        "fine_tune_type": adapters.kind,
        "num_layers": number,
        "lora_parameters": {
            "rank": adapters.rank,
            "scale": adapters.scale,
            "dropout": adapters.dropout,
            "keys": keys,
        },
        "model": base,
    }


def by_layer(modules: Iterable[str], layers: str) -> tuple[dict[int, list[str]], list[str]]:
    """Names inside of each layer, and those of modules outside of the layers."""
    inside: dict[int, list[str]] = {}
    others: list[str] = []
    for name in modules:
        match = re.fullmatch(rf"{re.escape(layers)}\.(\d+)\.(.+)", name)
        if match:
            inside.setdefault(int(match[1]), []).append(match[2])
        else:
            others.append(name)
    return inside, others


def write(folder: Path, out: Path, base: str = "") -> str:
    """Write mlx-lm's adapters of `folder` as PEFT reads them to a new folder; what they are.

    base: the model that PEFT is to load; empty: the one that the adapters name.

    Raises:
        UserError: damaged adapters, or such as PEFT does not have.
    """
    import mlx.core as mx

    adapters = read_ours(folder)
    base = base or adapters.base
    if not base:
        raise UserError(f"{folder / CONFIG} names no base model: add --base MODEL")
    back = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}
    weights: dict[str, mx.array] = {}
    for name, weight in adapters.weights.items():
        module, _, part = name.rpartition(".")
        weights[f"{PREFIX}{module}.{back[part]}"] = (
            weight if part == "m" else mx.contiguous(weight.T)
        )
    out.mkdir(parents=True)
    mx.save_safetensors(str(out / WEIGHTS), weights, {"format": "pt"})
    write_json(out / CONFIG, as_peft(adapters, base))
    for name in ALONG:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    check_same(adapters, read(out))
    return f"{adapters.kind} of rank {adapters.rank} on {len(adapters.modules)} matrices of {base}"


def read_ours(folder: Path) -> Adapters:
    """Adapters in mlx-lm's format. Raises UserError for damaged ones, and what PEFT lacks."""
    config = read_object(folder / CONFIG)
    kind, how = config.get("fine_tune_type", "lora"), config.get("lora_parameters")
    if kind not in ("lora", "dora") or not isinstance(how, dict):
        raise UserError(f"{folder / CONFIG} does not describe LoRA or DoRA adapters of mlx-lm")
    try:
        rank, scale = int(how["rank"]), float(how["scale"])
        dropout = float(how.get("dropout", 0.0))
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"{folder / CONFIG}: lora_parameters: {reason(error)}") from error
    weights = load(folder / OURS)
    check_known(folder / OURS, weights)
    base = config.get("model")
    check_complete(folder, weights, kind, rank)
    return Adapters(kind, rank, scale, dropout, base if isinstance(base, str) else "", weights)


def check_known(path: Path, weights: dict[str, mx.array]) -> None:
    """Raises UserError for adapters of layers that PEFT does not have."""
    for name, weight in weights.items():
        module, _, part = name.rpartition(".")
        if part not in ("lora_a", "lora_b", "m") or weight.ndim != (1 if part == "m" else 2):
            raise UserError(f"{path} has {shown(name)} of shape {weight.shape}, which PEFT lacks")
        if "embed" in module.rpartition(".")[2]:
            raise UserError(f"{path} adapts {module}; embeddings are not written for PEFT")


def as_peft(adapters: Adapters, base: str) -> JsonObject:
    """PEFT's adapter_config.json."""
    alpha = adapters.scale * adapters.rank
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": adapters.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": adapters.dropout,
        "use_dora": adapters.kind == "dora",
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        **what_is_adapted(adapters.modules),
    }


def what_is_adapted(modules: list[str]) -> JsonObject:
    """The same names in some layers, or every module by its full name."""
    layers = next((m[1] for n in modules if (m := re.match(r"(.+?)\.\d+\.", n))), "")
    inside, others = by_layer(modules, layers)
    if others or len({tuple(names) for names in inside.values()}) != 1:
        return {"target_modules": modules, "layers_to_transform": None, "layers_pattern": None}
    return {
        "target_modules": next(iter(inside.values())),
        "layers_to_transform": sorted(inside),
        "layers_pattern": layers.rpartition(".")[2],
    }


def check_same(wanted: Adapters, found: Adapters) -> None:
    """What was written says what was to be written: else it is a fault of this file."""
    import mlx.core as mx

    same = wanted.weights.keys() == found.weights.keys() and all(
        mx.array_equal(value.astype(mx.float32), found.weights[name]).item()
        for name, value in wanted.weights.items()
    )
    if not same or abs(found.scale - wanted.scale) > 1e-6 * abs(wanted.scale):
        raise AssertionError("the adapters for PEFT differ from their source")
