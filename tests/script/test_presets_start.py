"""Presets of this project start without advice against what they themselves say."""

import re

import pytest
from conftest import ROOT
from helpers import mostly_long

PRESETS = sorted(path.stem for path in ROOT.glob("configs/*.toml"))
SMALL = {  # so that an update takes a second
    "model_name": "models/tiny-math",
    "dataset": "models/tiny-math",
    "chat_template": "",
    "num_generations": 2,
    "batch_size": 1,
    "gradient_accumulation_steps": 1,
    "max_updates": 1,
    "max_new_tokens": 8,
    "eval_samples": 6,
    "report": "false",
}
KNOWN = re.compile(
    r"model +\S+: (full|lora), [\d,]+ parameters train, on CPU"
    r"| +learning rate \S+ \(lora_learning_rate\)"
    r"|data +\S+: [\d,]+ questions, \d+ for evaluation"
    r"| +answers: [\d,]+ numbers"
    r"|plan +1 update of 1 prompt x 2 completions, about .*"
    r"|eval +update +0  .* on (test|train) .*"
    r"|speed     .*"  # about a BLAS that this machine lacks
)


@pytest.mark.parametrize("name", mostly_long(PRESETS, "default", "smollm2", "nanochat_d32_test"))
def test_a_preset_starts_without_advice(grpo, tmp_path, monkeypatch, capsys, name):
    """Whatever is not one of the lines that every run has would be one."""
    monkeypatch.chdir(ROOT)
    words = [f"{key}={value}" for key, value in SMALL.items()]
    words += [f"output_dir={tmp_path / 'out'}"]
    sets = [word for each in words for word in ("--set", each)]
    assert grpo.main(["--config", f"configs/{name}.toml", *sets]) == 0
    start = capsys.readouterr().out.partition("\nupdate ")[0].splitlines()
    assert [line for line in start if not KNOWN.fullmatch(line)] == []
    assert len(start) >= 5


def test_the_same_settings_in_a_file_of_ones_own_are_spoken_of(grpo, tmp_path, monkeypatch, capsys):
    """So there is something that the test above would find."""
    monkeypatch.chdir(ROOT)
    own = tmp_path / "own.toml"
    own.write_text((ROOT / "configs/nanochat_d32_test.toml").read_text())
    sets = [w for key, value in SMALL.items() for w in ("--set", f"{key}={value}")]
    sets += ["--set", f"output_dir={tmp_path / 'out'}"]
    assert grpo.main(["--config", str(own), *sets]) == 0
    start = capsys.readouterr().out.partition("\nupdate ")[0].splitlines()
    assert [line for line in start if not KNOWN.fullmatch(line)]
