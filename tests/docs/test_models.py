"""docs/models.md is current, and what it says of some models is tried again."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT
from helpers import mostly_long, read_log, run_training
from hf_layout import convert

sys.path.append(str(ROOT / "docs"))
import tiny_models

import models

RECORD = json.loads((ROOT / "docs/models.json").read_text(encoding="utf-8"))["models"]
CANNOT = {"bitnet", "muse_spark", "olmo", "prism_hadamard_qwen35"}
CANNOT_IN_4_BITS = {"afm7", "seed_oss"}
WERE_REFUSED = ("mamba", "mamba2", "rwkv7", "recurrent_gemma")
MENDED = ("afm7", "deepseek_v3", "deepseek_v41", "gemma3n", "llama4", "kimi_vl", "phi3small")
CASES = [
    *((name, "full") for name in (*WERE_REFUSED, *MENDED)),
    *((name, "lora") for name in (*WERE_REFUSED, *MENDED)),
]
KEPT = [
    ("kimi_vl", "full"),
    ("mamba", "full"),
    ("mamba2", "lora"),
    ("rwkv7", "lora"),
    ("recurrent_gemma", "full"),
]


def test_the_page_is_made_of_the_record():
    command = [sys.executable, "docs/models.py", "--check"]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def test_every_architecture_of_mlx_lm_is_in_the_record():
    """Those of a newer mlx-lm: `uv run python docs/models.py --try NAME ...`."""
    missing = set(tiny_models.architectures()) - RECORD.keys()
    assert not missing


def test_all_but_a_few_train():
    for name, found in RECORD.items():
        if name in CANNOT:
            assert found["made"] or found["full"]
            continue
        assert not found["made"]
        assert not found["full"], name
        assert not found["lora"], name
        assert not found["4 bits"] or name in CANNOT_IN_4_BITS
        assert found["mismatch"] < 1e-4 or name in models.REMARKS


@pytest.mark.parametrize(("name", "train_type"), mostly_long(CASES, *KEPT))
def test_models_that_were_refused_are_converted_and_trained(name, train_type, data_dir, tmp_path):
    folder = tiny_models.make(name, tmp_path / "source")
    code, out, err = convert("--hf-path", folder, "--output-dir", tmp_path / "mlx")
    assert code == 0, err
    assert "Train it with" in out
    code, _ = run_training(
        tmp_path / "mlx", data_dir, tmp_path / "out", max_updates=2, train_type=train_type
    )
    assert code == 0
    updates = [record for record in read_log(tmp_path / "out") if "grad_norm" in record]
    assert [record["skipped"] for record in updates] == [0, 0]
    assert all(record["grad_norm"] > 0 for record in updates)
    if name not in models.REMARKS:
        assert all(record["sampler_mismatch"] < 1e-4 for record in updates)


def test_the_converter_says_first_what_can_not_be_trained(tmp_path):
    folder = tiny_models.make("llama", tmp_path / "source")
    config = json.loads((folder / "config.json").read_text())
    code = {"model_type": "odd", "model_file": "odd.py"}
    names = {"num_attention_heads": "pieces"}
    odd = {names.get(key, key): value for key, value in config.items()} | code
    (folder / "config.json").write_text(json.dumps(odd))
    (folder / "odd.py").write_text(
        "from dataclasses import dataclass\n"
        "from mlx_lm.models import llama\n"
        "class ModelArgs(llama.ModelArgs):\n"
        "    @classmethod\n"
        "    def from_dict(cls, params):\n"
        "        return llama.ModelArgs.from_dict(\n"
        "            {**params, 'model_type': 'llama', 'num_attention_heads': params['pieces']})\n"
        "Model = llama.Model\n"
    )
    words = ("--hf-path", folder, "--output-dir", tmp_path / "mlx", "--trust-remote-code")
    code, out, err = convert(*words)
    assert code == 0, err
    problem = "can't be trained here: its config.json: num_attention_heads must be a positive"
    assert problem in err
    assert err.index(problem) < err.index("converting")
    assert "Train it with" not in out
    assert "Ask it with: mlx_lm.generate --model" in out
