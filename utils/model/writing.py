"""Model folders that `mlx_lm.load` reads, and adapters in its format."""

import contextlib
import copy
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.json_files import write_json
from ..base.text import shown
from ..data.tokenizer import Tokenizer
from .shape import JsonObject, ModelConfig

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

    from .loading import LoadedModel

SINGLE = "model.safetensors"


def write_model(
    folder: Path,
    model: "nn.Module",
    tokenizer: Tokenizer,
    config: ModelConfig,
    source: Path,
    *,
    donate: bool = False,
) -> None:
    """A complete model folder that `mlx_lm.load` reads: weights, config, tokenizer, custom code.

    donate: the model is empty afterwards, and its files are small: of weights that were not
    computed yet, those of one file exist at once.
    """
    from mlx_lm.utils import save_config, save_model

    if donate:
        write_lazy_weights(folder, model)
    else:
        save_model(folder, model, donate_model=False)
    save_config(dict(config), config_path=folder / "config.json")
    tokenizer.save_pretrained(str(folder))
    for file in [*source.glob("*.py"), *source.glob("generation_config.json")]:
        if file.is_file():
            shutil.copy(file, folder)


def write_lazy_weights(folder: Path, model: "nn.Module") -> None:
    """model*.safetensors of 1 GB with their index; leaves the model without weights."""
    import mlx.core as mx
    from mlx.utils import tree_map
    from mlx_lm.utils import make_shards

    shards = make_shards(flat(model.parameters()), max_file_size_gb=1)
    model.update(tree_map(lambda _: mx.array([]), model.parameters()))
    files: dict[str, str] = {}
    total = sum(weight.nbytes for shard in shards for weight in shard.values())
    for number, count in enumerate([len(shards)] * len(shards), start=1):
        name = f"model-{number:05}-of-{count:05}.safetensors" if count > 1 else SINGLE
        shard = shards.pop(0)
        mx.save_safetensors(str(folder / name), shard, metadata={"format": "mlx"})
        files |= dict.fromkeys(shard, name)
        del shard
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def write_adapters(folder: Path, model: "nn.Module", adapter_config: JsonObject) -> None:
    """Adapters in mlx-lm's format: `mlx_lm.load(base, adapter_path=folder)`, `mlx_lm.fuse`."""
    import mlx.core as mx

    folder.mkdir(exist_ok=True)
    weights = flat(model.trainable_parameters())
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    write_json(folder / "adapter_config.json", adapter_config)


def write_stop_strings(folder: Path, stop_strings: list[str], eos_ids: Iterable[int]) -> None:
    """Stop strings into generation_config.json: EOS after the answer was not trained with them."""
    path = folder / "generation_config.json"
    settings = {"eos_token_id": sorted(eos_ids)}  # in a file without it, transformers has none
    with contextlib.suppress(FileNotFoundError, ValueError, RecursionError):  # mlx-lm reads on, too
        found = json.loads(path.read_text(encoding="utf-8"))
        settings = found if isinstance(found, dict) else settings
    settings.pop("stop_strings", None)  # transformers minds an empty list
    write_json(path, settings | ({"stop_strings": stop_strings} if stop_strings else {}))


def flat(tree: object) -> "dict[str, mx.array]":
    """Dotted name -> array."""
    from mlx.utils import tree_flatten

    return dict(tree_flatten(tree))


def load_weights(model: "nn.Module", weights: "dict[str, mx.array]") -> None:
    """MLX takes a matrix of another shape, and reads beyond it where ids are looked up in it."""
    known = flat(model.parameters())
    for name, value in weights.items():
        if name not in known or value.shape != known[name].shape:
            raise ValueError(f"{shown(name)} of shape {value.shape} is no part of the model")
    model.load_weights(list(weights.items()), strict=False)


def write_trained(
    folder: Path,
    loaded: "LoadedModel",
    model: "nn.Module",
    config: ModelConfig,
    stop_strings: list[str],
    *,
    donate: bool = False,
) -> None:
    """A model folder of what `loaded` has become; `donate` as in `write_model`."""
    tokenizer = loaded.tokenizer
    write_model(folder, model, tokenizer, config, loaded.folder, donate=donate)
    write_stop_strings(folder, stop_strings, tokenizer.eos_token_ids)


def write_fused(
    folder: Path, loaded: "LoadedModel", model: "nn.Module", stop_strings: list[str]
) -> None:
    """Write the model with its adapters merged, at full precision.

    Merged into 4-bit weights again, most of what was learnt would be rounded away.
    """
    from mlx.utils import tree_unflatten

    from .copies import dequantize

    fused = copy.deepcopy(model)
    merged = [(n, m.fuse(dequantize=True)) for n, m in fused.named_modules() if "lora_a" in m]
    fused.update_modules(tree_unflatten(merged))
    fused = dequantize(fused)
    config = dict(loaded.config)
    config.pop("quantization", None)
    config.pop("quantization_config", None)
    write_trained(folder, loaded, fused, config, stop_strings, donate=True)
