"""A vision model is called what it is, with what of it trains and what to type instead."""

import json
import shutil

import mlx.core as mx
import mlx_lm
import pytest
from conftest import ROOT
from helpers import run_training

from utils.base.errors import UserError
from utils.model import loading, vision

TINY = ROOT / "models/tiny-math"


@pytest.fixture
def make(tmp_path):
    """models/tiny-math as the language part of a vision model."""

    def make(kind, of="llama", prefix="language_model."):
        folder = tmp_path / kind
        shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.jsonl", "*.md", "*.txt"))
        text = json.loads((TINY / "config.json").read_text()) | {"model_type": of}
        text["_name_or_path"] = "owner/language-model"
        config = {**text, "model_type": kind, "text_config": text, "vision_config": {"depth": 1}}
        (folder / "config.json").write_text(json.dumps(config))
        weights = mx.load(str(TINY / "model.safetensors"))
        named = {prefix + name: value for name, value in weights.items()}
        tower = {"vision_tower.patch.weight": mx.zeros((4, 4))}
        metadata = {"format": "mlx"}
        mx.save_safetensors(str(folder / "model.safetensors"), named | tower, metadata)
        return folder

    return make


def test_the_language_part_trains_and_the_run_says_so(make, tmp_path, capsys):
    out = tmp_path / "out"
    run_training(make("mistral3"), TINY, out, max_updates=1, system_prompt="")
    assert vision.WHAT_TRAINS in capsys.readouterr().out
    assert mlx_lm.load(str(out / "final"))


@pytest.mark.parametrize(
    ("kind", "of", "prefix", "why"),
    [
        ("qwen2_vl", "qwen2", "language_model.", "Missing 9 parameters"),
        ("mistral3", "llama", "text_model.", "not in model"),
    ],
)
def test_parts_that_mlx_lm_misses_are_no_riddle(grpo, make, kind, of, prefix, why):
    folder = make(kind, of, prefix)
    with pytest.raises(UserError) as caught:
        loading.load_model(grpo.MLXGRPOConfig(model_name=str(folder)))
    said = str(caught.value)
    assert said.startswith(f"model {folder} is a vision model (model_type {kind!r}). Only language")
    assert why in said
    assert "--set model_name=owner/language-model, from which its language part" in said
    assert max(map(len, said.splitlines())) < 500


def test_a_type_that_mlx_lm_lacks_is_refused_before_anything_is_read(grpo, make, capsys):
    folder = make("idefics3")
    for more in (["--dry-run"], []):
        assert grpo.main(["--set", f"model_name={folder}", "--set", f"dataset={TINY}", *more]) == 2
        err = capsys.readouterr().err
        assert "is a vision model (model_type 'idefics3')" in err
        assert "not supported" in err


def test_a_language_model_is_none():
    config = vision.config_of(TINY)
    assert config
    assert not vision.has_vision(config)
    assert vision.config_of(TINY / "nowhere") == {}
