"""The wheel: `import mlx_grpo` after an install, with presets and the embedded model inside."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
from pathlib import Path
import mlx_grpo

folder = Path(mlx_grpo.__file__).parent
assert (folder / "configs/default.toml").is_file()
assert (folder / "utils/run/page_assets/uPlot.iife.min.js").is_file()
model = str(folder / "models/tiny-math")
config = mlx_grpo.MLXGRPOConfig(
    model_name=model, dataset=model, system_prompt="", num_generations=2, max_new_tokens=8,
    gradient_accumulation_steps=1, use_compile=False, eval_samples=1, output_dir="out",
)
trainer = mlx_grpo.build_trainer(config, "")
print(len(trainer.train_dataset), trainer.train_step([0])[0]["update"])
print(mlx_grpo.TiktokenTokenizerWrapper.__name__, mlx_grpo.extract_xml_answer("<answer>1</answer>"))
"""


@pytest.mark.skipif(shutil.which("uv") is None, reason="builds the wheel with uv, which is missing")
def test_the_wheel_is_importable_from_anywhere(tmp_path):
    # A copy, so that building leaves nothing in the checkout.
    ignored = shutil.ignore_patterns(".*", "outputs", "__pycache__", "tests")
    shutil.copytree(ROOT, tmp_path / "source", ignore=ignored)
    build = ["uv", "build", "--quiet", "--wheel", "--out-dir", str(tmp_path), "source"]
    subprocess.run(build, cwd=tmp_path, check=True, timeout=300)
    wheel = next(tmp_path.glob("*.whl"))
    shutil.unpack_archive(wheel, tmp_path / "site", "zip")
    (tmp_path / "elsewhere").mkdir()
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path / "elsewhere",
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-2:] == ["4000 1", "TiktokenTokenizerWrapper 1"]
