"""Settings by LitGPT's names: in tables, with its defaults."""

import tomllib

import pytest
from conftest import ROOT

from utils import pretrain
from utils.base.errors import UserError
from utils.pretraining import litgpt

PRESET = ROOT / "configs/pretrain/moe_200m.toml"


def test_litgpts_production_settings_are_accepted():
    wanted = "[train]\nglobal_batch_size = 256\ngradient_checkpointing = true\n"
    wanted += "max_tokens = 300000000\n[optimization]\nflash_attention_force = true\n"
    wanted += 'disable_math_fallback = true\ncompile_mode = "max-autotune"\n'
    config = pretrain.PretrainConfig(**litgpt.flatten(tomllib.loads(wanted)))
    assert (config.global_batch_size, config.max_tokens) == (256, 300_000_000)


def test_defaults_are_those_of_litgpts_default_configuration():
    table = tomllib.loads(PRESET.read_text())
    preset, plain = pretrain.resolve(PRESET, []), pretrain.PretrainConfig()
    ours = {"max_tokens", "eval_interval", "final_validation", "tokenizer_vocab_size", "model"}
    for key in litgpt.flatten(table):
        if key not in ours:
            assert getattr(preset, key) == getattr(plain, key), key
    assert plain.max_tokens == 320_000
    assert (plain.eval_interval, plain.final_validation) == (0, False)
    updates = -(-plain.max_tokens // (plain.global_batch_size * plain.max_seq_length))
    assert updates == 5


def test_an_option_set_twice_is_refused():
    with pytest.raises(UserError, match="max_tokens is set twice"):
        litgpt.flatten({"max_tokens": 1, "train": {"max_tokens": 2}})


def test_model_sizes_left_out_are_litgpts_own():
    config = litgpt.model_config({"n_embd": 8, "n_layer": 1, "n_head": 2, "intermediate_size": 8})
    assert config["num_key_value_heads"] == 2
    assert (config["rms_norm_eps"], config["rope_theta"]) == (1e-5, 10000)
    assert "vocab_size" not in config  # the tokenizer's then
