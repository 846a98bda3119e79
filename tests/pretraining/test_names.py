"""The trainer's names for the settings of utils/pretrain.py."""

import dataclasses

import pytest
from conftest import load_script

from utils import pretrain
from utils.base.errors import UserError
from utils.pretraining import names


def test_aliases_are_names_of_the_trainer_for_settings_here():
    trainers = {field.name for field in dataclasses.fields(load_script().MLXGRPOConfig)}
    own = {field.name for field in dataclasses.fields(pretrain.PretrainConfig)}
    assert names.ALIASES.keys() - trainers == {"data", "adam_eps"}
    assert {*names.ALIASES.values()} <= own
    assert not own & names.ALIASES.keys()


def resolve(tmp_path, text, *overrides):
    (tmp_path / "x.toml").write_text(text)
    return pretrain.resolve(tmp_path / "x.toml", [*overrides])


def test_aliases_work_in_a_file_in_set_and_as_options(tmp_path):
    config = resolve(tmp_path, 'output_dir = "a"\n', "learning_rate=0.5", "dataset=x.jsonl")
    assert (config.out_dir, config.lr, config.train_data_path) == ("a", 0.5, "x.jsonl")
    assert config.explicit == {"out_dir", "lr", "train_data_path"}
    assert config.inherited == {"out_dir"}
    typed = ["--data", "y.jsonl", "--learning-rate", "0.25", "--output-dir", "b"]
    _, overrides = pretrain.parse(typed, pretrain.PretrainConfig)
    config = resolve(tmp_path, "lr = 1e-3\n", *overrides)
    assert (config.out_dir, config.lr, config.train_data_path) == ("b", 0.25, "y.jsonl")


@pytest.mark.parametrize(
    ("text", "overrides", "complaint"),
    [
        ("", ["lr=1", "learning_rate=1"], "learning_rate and lr are the same setting: leave one"),
        ("lr = 1.0\nlearning_rate = 1.0\n", [], "are the same setting"),
        ("", ["max_tokens=1", "num_epochs=1"], "max_tokens and num_epochs say the same in two"),
        ("lr_warmup_steps = 1\nwarmup_ratio = 0.1\n", [], "say the same in two ways"),
        ("", ["data=a", "dataset=b", "train_data_path=c"], "train_data_path are the same setting"),
        ("", ["learning_rat=1"], "unknown key 'learning_rat'"),
        ("learning_rat = 1", [], "did you mean 'learning_rate'?"),
        ("", ["learning_rate=fast"], "learning_rate = 'fast' must be a number"),
    ],
)
def test_two_names_for_one_setting_are_refused(tmp_path, text, overrides, complaint):
    with pytest.raises(UserError, match=complaint.replace("?", r"\?")):
        resolve(tmp_path, text, *overrides)


@pytest.mark.parametrize(
    ("text", "typed", "expected"),
    [
        ("num_epochs = 3\n", "max_tokens=64", (64, 0)),
        ("max_tokens = 64\n", "num_epochs=3", (64, 3)),
        ("num_epochs = 3\n", "lr=1", (320_000, 3)),
    ],
)
def test_what_was_typed_counts_instead_of_the_file(tmp_path, text, typed, expected):
    config = resolve(tmp_path, text, typed)
    assert (config.max_tokens, config.num_epochs) == expected


def test_a_rate_of_adapters_gives_way_to_a_typed_one(tmp_path):
    both = "lr = 0.5\nlora_lr = 0.25\n"
    assert resolve(tmp_path, both).lora_lr == 0.25
    assert resolve(tmp_path, both, "learning_rate=1.0").lora_lr == 0
    assert resolve(tmp_path, both, "lora_learning_rate=1.0").lora_lr == 1.0


def test_names_of_the_same_setting():
    assert names.own_name("learning_rate") == "lr"
    assert names.own_name("anything") == "anything"
    assert names.settled({"num_epochs": 3}, ["max_tokens"]) == {"num_epochs": 0}
    assert names.settled({"num_epochs": 0}, ["max_tokens"]) == {}
