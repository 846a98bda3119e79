"""Models to pretrain: their sizes by name, new ones and those of a folder."""

import mlx.core as mx
import pytest
from conftest import ROOT
from helpers import flat

from utils import pretrain
from utils.base.errors import UserError
from utils.pretraining import litgpt, model

PRESET = ROOT / "configs/pretrain/moe_200m.toml"


def test_moe_200m_has_the_sizes_its_preset_states():
    config = litgpt.model_config(pretrain.resolve(PRESET, []).model)
    module, args = model.architecture(config)
    total, active = model.parameter_counts(module.Model(args), config)  # never evaluated
    assert (config["model_type"], total, active) == ("mixtral", 549_146_880, 209_408_256)
    assert "549 M parameters" in PRESET.read_text()


CONFIG = {"n_embd": 8, "n_layer": 1, "n_head": 2, "intermediate_size": 8, "padded_vocab_size": 16}


def test_a_seed_decides_the_weights():
    config = litgpt.model_config(CONFIG)
    one, same, other = (flat(model.new_model(config, seed).parameters()) for seed in (1, 1, 2))
    for name, value in one.items():
        assert mx.array_equal(value, same[name]), name
        assert value.ndim == 1 or not mx.array_equal(value, other[name]), name


def test_only_a_whole_folder_with_weights_to_train_is_loaded(model_dir, quantized_dir, tmp_path):
    loaded, config = model.load_folder(str(model_dir))
    assert not model.has_experts(loaded)
    total = sum(x.size for x in flat(loaded.parameters()).values())
    assert model.parameter_counts(loaded, config) == (total, total)
    with pytest.raises(UserError, match="is quantized: packed weights have no gradient"):
        model.load_folder(str(quantized_dir))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: Expecting"):
        model.load_folder(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="does not load: No safetensors found"):
        model.load_folder(str(tmp_path))
