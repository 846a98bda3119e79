"""What a first run needs: the default install, no network, no other process."""

import subprocess
import sys
import tomllib

from conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DEFAULT = {"mlx", "mlx-lm", "datasets", "transformers", "numpy", "tqdm", "httpx2"}
OPTIONAL = {
    *("tensorboardX", "wandb", "tiktoken", "torch", "math_verify", "mlx_vlm", "gguf", "matplotlib"),
    *("pytest", "hypothesis", "datasets"),
}
"""Modules; `datasets` is installed, but local files need it no more than the hub."""
CODE = f"""
import runpy, sys
from pathlib import Path

evidence, script, *words = sys.argv[1:]
STARTS = ("subprocess.Popen", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.system")
NET = ("socket.connect", "socket.getaddrinfo", "socket.bind", "urllib.Request")

def watch(event, arguments):
    if event in STARTS or event in NET:
        with open(evidence, "a") as file:
            print(event, arguments, file=file)

sys.addaudithook(watch)
sys.argv = [script, *words]
sys.path[0] = str(Path(script).parent)
try:
    runpy.run_path(script, run_name="__main__")
finally:
    loaded = sorted({{name.partition(".")[0] for name in sys.modules}} & {{*{sorted(OPTIONAL)}}})
    with open(evidence, "a") as file:
        for name in loaded:
            print("import", name, file=file)
"""


def test_it_loads_no_optional_package_opens_no_connection_and_starts_no_process(tmp_path):
    evidence, out = tmp_path / "evidence", tmp_path / "out"
    words = ["--config", "configs/smoke_test.toml", "--set", f"output_dir={out}"]
    command = [sys.executable, "-c", CODE, str(evidence), str(ROOT / "mlx-grpo.py"), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (out / "final" / "model.safetensors").is_file()
    # provenance.json says what the run was made with: the platform, and git's revision if any.
    asked = ("subprocess.Popen ('uname', ['uname', '-p']", "subprocess.Popen ('git', ['git', '-C'")
    assert [x for x in evidence.read_text().splitlines() if not x.startswith(asked)] == []


def test_the_watch_sees_what_it_watches(tmp_path):
    evidence, script = tmp_path / "evidence", tmp_path / "script.py"
    script.write_text(
        "import hypothesis, subprocess, socket\n"
        "subprocess.run(['true'])\n"
        "socket.socket().connect_ex(('127.0.0.1', 9))\n"
    )
    command = [sys.executable, "-c", CODE, str(evidence), str(script)]
    subprocess.run(command, check=True)
    seen = [line.split()[:2] for line in evidence.read_text().splitlines()]
    assert {words[0] for words in seen} == {"subprocess.Popen", "socket.connect", "import"}


def test_the_default_install_has_not_grown():
    names = {
        word.partition(">")[0].partition("[")[0] for word in PROJECT["project"]["dependencies"]
    }
    assert names == DEFAULT
    backend = {
        word.partition(">")[0].partition("[")[0] for word in PROJECT["dependency-groups"]["cpu"]
    }
    assert backend == {"mlx", "mkl"}


def test_the_embedded_models_are_small():
    tracked = subprocess.run(
        ["git", "ls-files", "models"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.splitlines()
    files = [ROOT / name for name in tracked] or [
        p for p in (ROOT / "models").rglob("*") if p.is_file()
    ]
    assert len(files) > 3
    assert sum(path.stat().st_size for path in files) <= 12_000_000
