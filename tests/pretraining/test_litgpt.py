"""Settings by LitGPT's names: in tables, with its defaults."""

import dataclasses
import json
import tomllib

import pytest
from conftest import ROOT

from utils import pretrain
from utils.base.errors import UserError
from utils.pretraining import litgpt

PRESET = ROOT / "configs/pretrain/moe_200m.toml"
LONG = ROOT / "configs/pretrain/moe_200m_long.toml"


def test_litgpts_production_settings_are_accepted():
    wanted = "[train]\nglobal_batch_size = 256\ngradient_checkpointing = true\n"
    wanted += "max_tokens = 300000000\n[optimization]\nflash_attention_force = true\n"
    wanted += 'disable_math_fallback = true\ncompile_mode = "max-autotune"\n'
    config = pretrain.PretrainConfig(**litgpt.flatten(tomllib.loads(wanted)))
    assert (config.global_batch_size, config.max_tokens) == (256, 300_000_000)


# LitGPT's train_config.yaml and model_config.yaml, in their order.
LITGPT = """
out_dir = "./checkpoints"
precision = "bf16-mixed"
tokenizer_dir = "./data/tokenizer"
resume = "auto"
logger_name = "csv"
[data]
class_path = "litgpt.data.TextFiles"
[data.init_args]
train_data_path = "./data/custom_text/train"
val_data_path = "./data/custom_text/val"
num_workers = 2
[train]
global_batch_size = 128
log_interval = 1
max_tokens = 320000
lr_warmup_steps = 5
micro_batch_size = 4
save_interval = 500
gradient_checkpointing = false
max_norm = 1.0
max_seq_length = 512
[eval]
interval = 0
final_validation = false
[optimization]
compile = true
compile_mode = "reduce-overhead"
compile_dynamic = true
compile_fullgraph = false
flash_attention = true
flash_attention_force = false
disable_math_fallback = false
[optimizer]
class_path = "torch.optim.AdamW"
init_args = {lr = 0.0003, weight_decay = 0.01}
[model]
name = "MoE-200M"
bias = false
block_size = 2048
mlp_class_name = "LLaMAMoE"
moe_intermediate_size = 2048
n_embd = 768
n_expert = 8
n_expert_per_token = 2
n_head = 12
n_layer = 12
n_query_groups = 4
norm_class_name = "RMSNorm"
norm_eps = 0.00001
padded_vocab_size = 50257
parallel_residual = false
rope_base = 10000
vocab_size = 50257
"""
OURS = {"tokenizer_vocab_size": 50257}


def test_the_default_configuration_is_litgpts_value_for_value():
    preset = litgpt.flatten(tomllib.loads(PRESET.read_text()))
    assert preset == litgpt.flatten(tomllib.loads(LITGPT)) | OURS
    plain = pretrain.PretrainConfig(**preset)
    assert dataclasses.asdict(plain) == dataclasses.asdict(
        pretrain.PretrainConfig(model=preset["model"], **OURS)
    )
    assert -(-plain.max_tokens // (plain.global_batch_size * plain.max_seq_length)) == 5


def test_the_run_that_learns_differs_only_in_how_long_it_is_and_what_it_validates():
    long, short = (pretrain.resolve(path, []) for path in (LONG, PRESET))
    changed = {name: value for name, value in vars(long).items() if vars(short)[name] != value}
    assert changed == {"max_tokens": 400 * 128 * 512, "eval_interval": 25, "final_validation": True}
    record = json.loads((ROOT / "benchmarks/records/moe_200m.jsonl").read_text().splitlines()[0])
    assert {name: record["settings"][name] for name in changed} == changed


def test_an_option_set_twice_is_refused():
    with pytest.raises(UserError, match="max_tokens is set twice"):
        litgpt.flatten({"max_tokens": 1, "train": {"max_tokens": 2}})


def test_model_sizes_left_out_are_litgpts_own():
    config = litgpt.model_config({"n_embd": 8, "n_layer": 1, "n_head": 2, "intermediate_size": 8})
    assert config["num_key_value_heads"] == 2
    assert (config["rms_norm_eps"], config["rope_theta"]) == (1e-5, 10000)
    assert "vocab_size" not in config  # the tokenizer's then
