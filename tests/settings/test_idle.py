"""Settings that another one leaves without effect are told, once each, to who typed them."""

import dataclasses
from pathlib import Path

import pytest
from conftest import ROOT

from utils.settings import idle, reading

TINY = str(ROOT / "configs/tiny_math.toml")
DATA = ROOT / "models/tiny-math"
CASES = {  # what is typed, what leaves it idle, and with what it acts (None: never under a preset)
    "save_total_limit": ("2", ["save_steps=0"], ["save_steps=10"]),
    "max_ckpt_gb": ("1", ["save_steps=0"], ["save_steps=10"]),
    "dataset_config": ("socratic", [f"dataset={DATA}"], ["dataset=openai/gsm8k"]),
    "train_split": ("validation", [f"dataset={DATA / 'train.jsonl'}"], [f"dataset={DATA}"]),
    "test_split": ("validation", [f"dataset={DATA / 'train.jsonl'}"], [f"dataset={DATA}"]),
    "eval_steps": ("7", ["eval_samples=0"], ["eval_samples=5"]),
    "eval_max_new_tokens": (
        "77",
        ["eval_samples=0", "eval_every_updates=0"],
        ["eval_samples=0", "eval_every_updates=5", "eval_subset_size=5"],
    ),
    "eval_metric": ("int", ["eval_samples=0", "eval_subset_size=0"], ["eval_samples=5"]),
    "eval_subset_size": ("7", ["eval_every_updates=0"], ["eval_every_updates=5"]),
    "eval_every_updates": ("7", ["eval_subset_size=0"], ["eval_subset_size=5"]),
    "chat_template_kwargs": ("{a = 1}", ["chat_template=plain"], ["chat_template="]),
    "wandb_project": ("mine", ['report_to=["csv"]'], ['report_to=["wandb"]']),
    "wandb_entity": ("mine", ["report_to=[]"], ['report_to=["wandb"]']),
    "plot_every": ("3", ['report_to=["csv"]'], ['report_to=["tensorboard"]']),
    "max_completions_gb": ("1", ["keep_completions=none"], ["keep_completions=sample:1"]),
    "log_completions": ("2", ["quiet=true"], ["quiet=false"]),
    "logging_steps": ("3", ["log_jsonl=false"], ["log_jsonl=false", "log_completions=1"]),
    **{
        name: (value, ["train_type=lora", f"adapter_path={DATA}"], ["train_type=lora"])
        for name, value in {
            "lora_rank": "4",
            "lora_scale": "1.5",
            "lora_layers": "1",
            "lora_keys": '["mlp.up_proj"]',
            "lora_dropout": "0.1",
        }.items()
    },
}


def lines(grpo, settings, config=TINY, train_type="full", platform="cpu"):
    config = reading.resolve(grpo.MLXGRPOConfig, Path(config), settings)
    return list(idle.lines(config, train_type, platform))


def test_every_setting_of_the_table_is_one_and_is_tried(grpo):
    names = {name for names, _, _ in idle.RULES for name in names.split()}
    assert names == set(CASES)
    assert names <= {f.name for f in dataclasses.fields(grpo.MLXGRPOConfig)}


@pytest.mark.parametrize("name", CASES)
def test_what_does_nothing_is_told_and_what_acts_is_not(grpo, name):
    value, without, with_effect = CASES[name]
    train_type = "lora" if "train_type=lora" in without else "full"
    said = lines(grpo, [f"{name}={value}", *without], train_type=train_type)
    (line,) = (line for line in said if line.startswith(f"{name} has no effect: "))
    cause = line.partition(": ")[2]
    assert any(setting.partition("=")[0] in cause for setting in without), "the reason is named"
    said = lines(grpo, [f"{name}={value}", *with_effect], train_type=train_type)
    assert not any(line.startswith(name) for line in said)


def test_only_what_somebody_typed_is_spoken_of(grpo, tmp_path):
    """Not what one of the project's presets says, nor a default."""
    assert lines(grpo, ["save_steps=0"]) == []
    default = grpo.MLXGRPOConfig.save_total_limit
    assert lines(grpo, ["save_steps=0", f"save_total_limit={default}"]) == []
    own = tmp_path / "own.toml"
    own.write_text('save_steps = 0\nsave_total_limit = 7\nmodel_name = "m"\n')
    said = "save_total_limit has no effect: save_steps = 0 writes one checkpoint, at the end"
    assert lines(grpo, [], str(own)) == [said]


def test_settings_with_one_reason_share_a_line(grpo):
    settings = ["save_steps=0", "save_total_limit=2", "max_ckpt_gb=1"]
    assert lines(grpo, settings) == [
        "save_total_limit and max_ckpt_gb have no effect: save_steps = 0 writes one checkpoint, at "
        "the end"
    ]


def test_a_wired_limit_is_for_metal(grpo):
    assert lines(grpo, ["wired_limit_gb=4"], platform="metal") == []
    for platform in ("cpu", "cuda"):
        (line,) = lines(grpo, ["wired_limit_gb=4"], platform=platform)
        assert line == "wired_limit_gb has no effect here: only Metal keeps memory resident"


@pytest.mark.parametrize("dry", [True, False])
def test_a_run_and_a_dry_run_say_it(typed, dry):
    words = ["--set", "save_total_limit=2", "--set", "eval_samples=0", *["--dry-run"] * dry]
    code, out, err, _ = typed(*words, save_steps=0, max_updates=1)
    assert code == 0, err
    assert out.count("save_total_limit has no effect: save_steps = 0") == 1
