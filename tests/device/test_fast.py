"""What only some machines run: compared before it is used, deleted without a trace."""

import re
import shutil
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import ROOT

from utils.device import fast, patch


@pytest.mark.long
@pytest.mark.parametrize("folder", ["cuda", "x86"])
def test_a_copy_without_the_folder_trains(tmp_path, folder):
    for name in ("utils", "configs", "models/tiny-math"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "mlx-grpo.py", tmp_path)
    shutil.rmtree(tmp_path / "utils" / "device" / folder)
    words = ["--config", "configs/smoke_test.toml", "--set", "max_updates=2"]
    done = subprocess.run(
        [sys.executable, "mlx-grpo.py", *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "all 2 updates" in done.stdout


def test_only_the_switch_names_the_folders():
    """So that deleting one needs no other change."""
    for path in [*(ROOT / "utils").rglob("*.py"), ROOT / "mlx-grpo.py"]:
        if path.parent.name in ("cuda", "x86"):
            continue
        for line in path.read_text(encoding="utf-8").splitlines():
            words = re.split(r"[\s.]+", line.strip())
            if words[0] in ("from", "import"):
                assert not {"cuda", "x86"} & {*words}, f"{path}: {line}"


def test_a_way_that_does_not_agree_stays_off(monkeypatch, capsys):
    used = []
    wrong = patch.Way("a wrong way", lambda: True, lambda: "it differs by 2", used.append)
    right = patch.Way("a right way", lambda: True, lambda: "", used.append)
    elsewhere = patch.Way("a way of others", lambda: False, lambda: "never asked", used.append)
    monkeypatch.setattr(fast, "ways", lambda: [wrong, right, elsewhere])
    model = nn.Module()
    for _ in range(2):
        fast.switch_on(model)
    assert used == [model, model]
    out = capsys.readouterr().out
    assert out == "speed     a wrong way left out, and slower for it: it differs by 2\n"


@pytest.mark.parametrize("way", fast.ways(), ids=lambda way: way.name)
def test_every_way_agrees_with_the_plain_one(way):
    if not way.applies() and mx.default_device() == mx.cpu:
        pytest.skip("compared where it is used")
    assert way.problem() == ""


def test_a_difference_is_told():
    x = mx.array([1.0, -4.0])
    assert patch.difference(x, x + 1e-6, 1e-5) == ""
    assert patch.difference(x, x + 0.4, 0.05) == "it differs by 0.1"
    assert "nan" in patch.difference(x, x * mx.array(float("nan")), 0.05)
