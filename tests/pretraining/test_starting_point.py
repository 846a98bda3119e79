"""Models that the trainer trains next: how they are loaded, and what is written of them."""

import json

import mlx_lm
import pytest
from helpers import make_config

from utils.model import loading, served_prompt
from utils.pretraining import starting_point
from utils.pretraining.starting_point import StartingPoint


@pytest.mark.parametrize("kind", ["full", "lora", "dora"])
def test_the_type_that_a_model_is_loaded_in(kind):
    types = [starting_point.dtype_of(p, kind) for p in ("32-true", "bf16-mixed", "bf16-true")]
    mixed = "float32" if kind == "full" else "bfloat16"
    assert types == ["float32", mixed, "bfloat16"]


def test_settings_for_another_model_leave_the_preset_alone(model_dir, data_dir, tmp_path):
    preset = make_config(model_dir, data_dir, tmp_path / "out", lora_rank=4, train_type="lora")
    own = starting_point.settings_of(preset, "owner/model", 7, lora_rank=8)
    assert (own.model_name, own.seed, own.lora_rank) == ("owner/model", 7, 8)
    assert (preset.model_name, preset.seed, preset.lora_rank) == (str(model_dir), 0, 4)
    assert preset.explicit == own.explicit, "nothing of it is the user's"


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_what_is_written(model_dir, data_dir, tmp_path, kind):
    adapters = {"train_type": "lora"} if kind == "lora" else {}
    settings = make_config(model_dir, data_dir, tmp_path / "out", **adapters)
    loaded = loading.load_model(settings)
    trained = starting_point.trainable_size(loaded.model)
    start = StartingPoint(settings, loaded, preset=settings)
    assert start.has_adapters == (kind == "lora")
    assert (trained < 98_000) == start.has_adapters
    for name, write in (("checkpoint", start.write), ("final", start.write_final)):
        (tmp_path / name).mkdir()
        write(tmp_path / name, loaded.model)
        assert served_prompt.settings_in(tmp_path / name)["system_prompt"] == ""
    assert (tmp_path / "checkpoint/adapter_config.json").is_file() == start.has_adapters
    assert (tmp_path / "final/adapters").is_dir() == start.has_adapters
    mlx_lm.load(str(tmp_path / "final"))
    kept = json.loads((tmp_path / "final/generation_config.json").read_text())
    assert kept["stop_strings"] == ["</answer>"]


def test_without_a_preset_nothing_is_said_of_a_prompt(model_dir, data_dir, tmp_path):
    settings = make_config(model_dir, data_dir, tmp_path / "out")
    start = StartingPoint(settings, loading.load_model(settings))
    (tmp_path / "final").mkdir()
    start.write_final(tmp_path / "final", start.loaded.model)
    assert not (tmp_path / "final" / served_prompt.MARKER).exists()
    assert start.stop_strings == []
