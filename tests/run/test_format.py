"""Checkpoints of other versions: an older one is gone on with, a newer one is refused."""

import json
import shutil

import mlx.core as mx
import pytest
from conftest import ROOT

from utils.run import folders

FIXTURE = ROOT / "tests" / "fixtures" / "checkpoint_format_1"


@pytest.fixture
def earlier(tmp_path, monkeypatch):
    """A run of the version before checkpoints had a format (git revision 3862b3f), after update 4
    of 10: KL with a target, two updates a rollout, its own reward function.

    `final.safetensors` is what that version itself went on to with one line changed: its cosine
    reached 0 in the last update, ours does one update later.
    """
    shutil.copytree(FIXTURE, tmp_path / "run_of_old")
    monkeypatch.chdir(tmp_path / "run_of_old")
    return tmp_path / "run_of_old"


def test_a_checkpoint_without_a_format_leads_to_the_same_end(grpo, earlier):
    assert grpo.main(["--config", "settings.toml", "--resume"]) == 0
    expected = mx.load(str(earlier / "final.safetensors"))
    got = mx.load(str(earlier / "run" / "final" / "model.safetensors"))
    assert got.keys() == expected.keys()
    assert max(mx.abs(got[n] - expected[n]).max().item() for n in got) < 1e-5
    moved = mx.load(str(earlier / "run" / "checkpoint-2" / "model.safetensors"))
    assert max(mx.abs(moved[n] - expected[n]).max().item() for n in got) > 1e-3
    lines = (earlier / "run" / "training_log.jsonl").read_text().splitlines()
    coefficients = [r["kl_coeff"] for r in map(json.loads, lines) if "kl_coeff" in r]
    assert coefficients == pytest.approx([0.05, 0.0508, 0.0516128, 0.052438605, 0.053277622])


def test_a_checkpoint_of_a_newer_format_is_refused_by_one_line(grpo, earlier, capsys):
    checkpoint = earlier / "run" / "checkpoint-2"
    state = checkpoint / folders.STATE
    state.write_text(json.dumps(json.loads(state.read_text()) | {"format": 99}))
    folders.seal(checkpoint)
    before = sorted(path.name for path in (earlier / "run").iterdir())
    assert grpo.main(["--config", "settings.toml", "--resume"]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert "format = 99" in error
    assert "newer version" in error
    assert sorted(path.name for path in (earlier / "run").iterdir()) == before
