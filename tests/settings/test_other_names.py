"""Names of other trainers lead to ours."""

import dataclasses
import json
import subprocess
import sys

import pytest
from conftest import ROOT

from utils.base.errors import UserError
from utils.settings import other_names, reading

PAGE = ROOT / "docs/coming_from.md"


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("beta=0.1", "unknown key 'beta' in --set: it is 'kl_coeff' here"),
        ("max_steps=9", "unknown key 'max_steps' in --set: it is 'max_updates' here"),
        ("lr=1e-5", "it is 'learning_rate' here (of adapters: lora_learning_rate)"),
        (
            "num_gpus=2",
            "num_gpus is not a setting here: --ranks and --hostfile train on several devices",
        ),
        (
            "environment_factory=x",
            "environment_factory is not a setting here: environment names the class here, "
            "see docs/environments.md",
        ),
        (
            "tensor_parallel=2",
            "tensor_parallel is not a setting here: every device holds the whole model",
        ),
        ("num-generations-eval=1", "one greedy answer of each question"),
        ("warmup_steps=5", "it is 'warmup_ratio' here (a share of all updates)"),
        ("learning_rat=1", "did you mean 'learning_rate'?"),
        ("quite_unknown=1", "`--help` lists the keys"),
    ],
)
def test_a_name_of_another_trainer_is_answered_with_ours(grpo, typed, expected):
    with pytest.raises(UserError) as raised:
        reading.resolve(grpo.MLXGRPOConfig, None, [typed])
    assert expected in str(raised.value)


def test_in_a_file_too(grpo, tmp_path):
    (tmp_path / "a.toml").write_text("epsilon_high = 0.28\n")
    with pytest.raises(UserError, match=r"'epsilon_high' in .*a.toml: it is 'clip_eps_high' here"):
        reading.resolve(grpo.MLXGRPOConfig, tmp_path / "a.toml")


def test_settings_named_as_ours_exist_and_none_is_hidden(grpo):
    ours = {field.name for field in dataclasses.fields(grpo.MLXGRPOConfig)}
    for name, (settings, remark) in other_names.HERE.items():
        assert set(settings.split()) <= ours, name
        assert settings or remark, name
    assert not ours & (other_names.HERE.keys() | other_names.REASONS.keys())
    assert not other_names.HERE.keys() & other_names.REASONS.keys()
    assert other_names.SAME.keys() <= ours


def test_the_page_is_current_and_maps_every_option():
    """A new option of theirs, read by `docs/coming_from.py --read`, has to be mapped."""
    command = [sys.executable, "docs/coming_from.py", "--check"]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0
    text = PAGE.read_text(encoding="utf-8")
    assert "not mapped" not in text
    peers = json.loads((ROOT / "docs/coming_from.json").read_text(encoding="utf-8"))
    assert {"trl", "transformers", "mlx_lm_lora"} == peers.keys()
    for peer in peers.values():
        assert len(peer["names"]) > 60
        assert all(f"\n| `{name}` |" in text for name in peer["names"])


def test_an_option_that_is_new_to_us_stands_out(tmp_path):
    """The page says so, from a wheel with one more field."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import coming_from
    finally:
        sys.path.pop(0)
    source = "class GRPOConfig:\n    beta: float = 0.0\n    brand_new: int = 1\n"
    names = coming_from.names_in(source, "GRPOConfig")
    assert names == ["beta", "brand_new"]
    rows = coming_from.table(names, {"kl_coeff"})
    assert "| `beta` | `kl_coeff` |" in rows
    assert "| `brand_new` | none | not mapped yet |" in rows
