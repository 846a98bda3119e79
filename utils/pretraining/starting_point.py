"""A model that the trainer trains next: loaded, adapted and written as the trainer does it."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from ..data.files import Row
from ..model import loading, served_prompt, writing
from ..settings.run_settings import Settings

TRAINED = ("train_type", "adapter_path", "lora_rank", "lora_scale", "lora_layers", "lora_keys")
FROM_PRESET = (*TRAINED, "lora_dropout")
"""Settings of the trainer that `utils/pretrain.py` has too."""


def settings_of(preset: Settings, model: str, seed: int, **changes: object) -> Settings:
    """The preset's, for this model; the changes are not the user's, so that nothing is refused
    as without effect."""
    settings = copy.copy(preset)
    vars(settings).update(model_name=model, seed=seed, **changes)
    return settings


@dataclass
class StartingPoint:
    """What is trained, with all that writing it takes."""

    settings: Settings
    loaded: loading.LoadedModel
    rows: Sequence[Row] = ()
    """The first examples, with `prompt` and `prompt_ids`; none without prompt_from."""
    preset: Settings | None = None
    """How GRPO will ask, with its own data set and model; None without prompt_from."""
    prompt: served_prompt.ServedPrompt | None = None
    """Found once, when it is first written."""

    @property
    def has_adapters(self) -> bool:
        return self.loaded.train_type != "full"

    @property
    def stop_strings(self) -> list[str]:
        return self.preset.stop_strings if self.preset else []

    def write(self, folder: Path, model: nn.Module) -> None:
        """The whole model, or its adapters, and how to ask it."""
        if self.has_adapters:
            writing.write_adapters(folder, model, self.loaded.adapter_config)
        else:
            loaded = self.loaded
            writing.write_trained(folder, loaded, model, loaded.config, self.stop_strings)
        self.write_prompt(folder)

    def write_final(self, folder: Path, model: nn.Module) -> None:
        """The model that a person wants: adapters merged, and kept beside it."""
        if not self.has_adapters:
            self.write(folder, model)
            return
        writing.write_fused(folder, self.loaded, model, self.stop_strings)
        self.write(folder / "adapters", model)
        self.write_prompt(folder)

    def write_prompt(self, folder: Path) -> None:
        if self.preset is None:
            return
        if self.prompt is None:
            tokenizer = self.loaded.tokenizer
            self.prompt = served_prompt.of_run(tokenizer, self.preset, self.rows)
        served_prompt.write(folder, self.prompt)


def dtype_of(precision: str, train_type: str) -> str:
    """In which the model is loaded: full fine-tuning keeps float32 weights unless bf16-true; under
    adapters, the base is of the type that is computed in."""
    whole = precision == "32-true" or (precision == "bf16-mixed" and train_type == "full")
    return "float32" if whole else "bfloat16"


def trainable_size(model: nn.Module) -> int:
    """How many weights train."""
    weights: dict[str, mx.array] = writing.flat(model.trainable_parameters())
    return sum(weight.size for weight in weights.values())
