"""Platform set-up: BLAS preloading, memory limits, what a run may use, provenance."""

import ast
import os
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import mlx.core as mx
import pytest
from helpers import mostly_long

from utils.base.errors import UserError
from utils.device import runtime

ROOT = Path(__file__).resolve().parents[2]


def fake_mlx(monkeypatch, tmp_path, *distributions, system="linux"):
    """Pretend that MLX is installed in tmp_path, beside these *.dist-info folders."""
    for name in ("mlx", *distributions):
        (tmp_path / name).mkdir(exist_ok=True)
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path / "mlx")])
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(runtime.sys, "platform", system)


@pytest.fixture
def slow_cpu_build(monkeypatch):
    """A Linux CPU build before MLX is imported, with neither MKL nor OpenBLAS."""
    monkeypatch.delenv("MLX_GRPO_BLAS", raising=False)
    monkeypatch.setattr(runtime, "_linux_cpu_build", lambda: True)
    monkeypatch.setattr(runtime, "_global_blas", lambda: None)
    monkeypatch.setattr(runtime, "_find_mkl", lambda: None)
    monkeypatch.setattr(runtime, "_load_openblas", lambda: False)
    monkeypatch.delitem(sys.modules, "mlx.core")


def test_modules_import_without_the_slow_packages():
    code = (
        "import sys\n"
        "from utils import convert_model\n"
        "from utils.device import runtime\n"
        "from utils.memory import plan\n"
        "from utils.model import tiktoken_wrapper\n"
        "from utils.run import trackers\n"
        "slow = {'mlx', 'numpy', 'transformers', 'datasets', 'tqdm', 'huggingface_hub'}\n"
        "print(sorted(slow & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    ("distributions", "system", "expected"),
    [
        (["mlx_cpu-0.32.4.dist-info"], "linux", True),
        (["mlx_cpu-0.32.4.dist-info", "mlx_cuda_13-0.32.4.dist-info"], "linux", False),
        (["mlx_cuda_12-0.32.4.dist-info"], "linux", False),
        ([], "linux", False),
        (["mlx_cpu-0.32.4.dist-info"], "darwin", False),
    ],
)
def test_cpu_build_is_recognised_by_its_distribution(
    monkeypatch, tmp_path, distributions, system, expected
):
    fake_mlx(monkeypatch, tmp_path, *distributions, system=system)
    assert runtime._linux_cpu_build() is expected


def test_mkl_is_found_two_folders_above_any_site_packages(monkeypatch, tmp_path):
    packages = tmp_path / "lib" / "python3.12" / "site-packages"
    packages.mkdir(parents=True)
    library = tmp_path / "lib" / "libmkl_rt.so.3"
    library.touch()
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(sys, "path", [str(packages)])
    assert runtime._find_mkl() == library


def test_nothing_is_loaded_off_the_linux_cpu_build(monkeypatch):
    monkeypatch.setattr(runtime, "_linux_cpu_build", lambda: False)
    monkeypatch.setattr(runtime, "_load_global", lambda name: pytest.fail("loaded"))
    assert runtime.preload_blas() is None
    assert runtime.blas_advice(None) is None


def test_openblas_is_taken_when_there_is_no_mkl(slow_cpu_build, monkeypatch):
    monkeypatch.setattr(runtime, "_load_openblas", lambda: True)
    assert runtime.preload_blas() == "openblas"
    assert runtime.blas_advice("openblas") is None


def test_advice_says_what_to_install_and_what_it_brings(slow_cpu_build, monkeypatch):
    assert runtime.preload_blas() is None
    monkeypatch.setattr(runtime.platform, "machine", lambda: "x86_64")
    advice = runtime.blas_advice(None)
    assert "pip install mkl" in advice
    assert "15-50 times" in advice
    monkeypatch.setattr(runtime.platform, "machine", lambda: "aarch64")
    assert "mkl" not in runtime.blas_advice(None)
    assert "apt-get install libopenblas0-pthread" in runtime.blas_advice(None)


def test_environment_switches_off_or_forces(slow_cpu_build, monkeypatch):
    monkeypatch.setenv("MLX_GRPO_BLAS", "mkl")
    with pytest.raises(UserError, match="MLX_GRPO_BLAS=mkl"):
        runtime.preload_blas()
    monkeypatch.setenv("MLX_GRPO_BLAS", "fast")
    with pytest.raises(UserError, match="auto, mkl, openblas, none"):
        runtime.preload_blas()
    monkeypatch.setenv("MLX_GRPO_BLAS", "none")
    monkeypatch.setattr(runtime, "_load_openblas", lambda: pytest.fail("loaded"))
    assert runtime.preload_blas() is None
    assert runtime.blas_advice(None) is None


@pytest.mark.parametrize("script", ["mlx-grpo.py", "utils/pretrain.py", "utils/inference.py"])
def test_a_wrong_choice_of_blas_is_one_line_on_the_command_line(script):
    words = ["--model", "models/tiny-math", "hi"] if script == "utils/inference.py" else ["--help"]
    environment = {**os.environ, "MLX_GRPO_BLAS": "fast"}
    done = subprocess.run(
        [sys.executable, script, *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: MLX_GRPO_BLAS='fast' is not one of auto, mkl, openblas, none\n"


COMMANDS = [
    "mlx-grpo.py",
    *(
        f"utils/{name}.py"
        for name in ("convert_model", "convert_nanochat", "evaluate_model", "inference", "pretrain")
    ),
]
CTRL_C = """
import os, signal, sys

class Finder:
    def find_spec(name, *_):
        if name == "utils.base.errors":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder)
"""


@pytest.mark.parametrize(
    ("handler", "code", "script"),
    mostly_long(
        [
            *((signal.SIG_DFL, 130, script) for script in COMMANDS),
            *((signal.SIG_IGN, 0, script) for script in COMMANDS),
        ],
        *((signal.SIG_DFL, 130, script) for script in COMMANDS),
        (signal.SIG_IGN, 0, "mlx-grpo.py"),
    ),
)
def test_ctrl_c_while_modules_are_imported_is_quiet(tmp_path, script, handler, code):
    """And does nothing where a shell ignores it, for what it starts in the background."""
    (tmp_path / "sitecustomize.py").write_text(CTRL_C)
    done = subprocess.run(
        [sys.executable, str(ROOT / script), "--help"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, handler),
    )
    assert (done.returncode, done.stderr) == (code, "")
    assert bool(done.stdout) == (code == 0)


def test_ctrl_c_in_a_script_of_the_users_own_is_pythons(tmp_path):
    """One beside mlx-grpo.py, too, which need not have a function main."""
    (tmp_path / "utils").mkdir()
    shutil.copy(ROOT / "utils" / "__init__.py", tmp_path / "utils")
    (tmp_path / "mine.py").write_text(
        "import os, signal, utils\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n"
        "except KeyboardInterrupt:\n    print('saved')\n"
    )
    done = subprocess.run([sys.executable, "mine.py"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "saved\n", "")


@pytest.mark.parametrize("script", COMMANDS)
def test_an_interpreter_without_the_packages_is_named(tmp_path, script):
    """As where somebody types `python3` for `uv run`; -S leaves out what is installed."""
    command = [sys.executable, "-S", str(ROOT / script), "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    hint = f"type `uv run {script}`, or see QUICK_START.md"
    assert done.stderr == f"error: {sys.executable} has no package mlx-lm: {hint}\n"


@pytest.mark.parametrize("script", COMMANDS)
def test_a_python_that_is_too_old_is_named(tmp_path, script):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.version_info = (3, 9, 6)")
    done = subprocess.run(
        [sys.executable, str(ROOT / script), "--help"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: this is Python 3.9.6, 3.11 is needed: type `uv run ")
    for path in (ROOT / script, ROOT / "utils/__init__.py"):  # it has to get as far as that
        ast.parse(path.read_text(), feature_version=(3, 9))


def test_a_blas_that_is_loaded_already_is_left_alone(slow_cpu_build, monkeypatch):
    monkeypatch.setattr(runtime, "_global_blas", lambda: "openblas")
    monkeypatch.setattr(runtime, "_load_openblas", lambda: pytest.fail("loaded"))
    assert runtime.preload_blas() == "openblas"


def test_advice_when_mlx_was_imported_first(slow_cpu_build, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx.core", mx)
    monkeypatch.setattr(runtime, "_find_mkl", lambda: Path("libmkl_rt.so.3"))
    monkeypatch.setattr(runtime, "_load_global", lambda name: pytest.fail("loaded too late"))
    assert runtime.preload_blas() is None
    assert "imported first" in runtime.blas_advice(None)


@pytest.mark.skipif(sys.platform != "linux", reason="the warning quotes Linux' dynamic linker")
def test_a_damaged_library_is_reported_and_an_absent_one_is_not(tmp_path, capsys):
    damaged = tmp_path / "libmkl_rt.so.3"
    damaged.write_bytes(b"not a library")
    assert runtime._load_global(str(damaged)) is False
    assert str(damaged) in capsys.readouterr().err
    assert runtime._load_global("libno_such_blas.so.0") is False
    assert capsys.readouterr().err == ""


def matrix_product(choice):
    """(what was loaded, whether MKL's kernels are there before and after a product) in a fresh
    process: MKL loads them when it is first called."""
    code = (
        "from pathlib import Path\n"
        "from utils.device import runtime\n"
        "kernels = lambda: 'libmkl_core' in Path('/proc/self/maps').read_text()\n"
        "loaded = runtime.preload_blas()\n"
        "import mlx.core as mx\n"
        "a = mx.random.normal((384, 384)); mx.eval(a)\n"
        "before = kernels()\n"
        "mx.eval(a @ a)\n"
        "print(loaded, before, kernels())"
    )
    environment = {**os.environ, "MLX_GRPO_BLAS": choice}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


@pytest.mark.skipif(
    not runtime._linux_cpu_build() or runtime._find_mkl() is None, reason="needs mlx-cpu and mkl"
)
def test_mlx_multiplies_matrices_with_mkl():
    assert matrix_product("auto") == ["mkl", "False", "True"]
    assert matrix_product("none") == ["None", "False", "False"]


def limits_set(monkeypatch, info, wired, cache):
    calls = {}
    monkeypatch.setattr(mx, "device_info", lambda: info)
    monkeypatch.setattr(mx, "set_wired_limit", lambda n: calls.update(wired=n))
    monkeypatch.setattr(mx, "set_cache_limit", lambda n: calls.update(cache=n))
    runtime.set_memory_limits(wired, cache)
    return calls


def test_compiled_kernels_are_kept_and_waiting_for_them_is_announced(monkeypatch, tmp_path):
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert (runtime.keep_compiled_kernels() is None) == (not mx.cuda.is_available())
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda _: {"architecture": "sm_90"})
    assert "one to three minutes" in runtime.keep_compiled_kernels()
    folder = tmp_path / "mlx" / mx.__version__ / "sm_90" / "ptx"
    assert os.environ["MLX_PTX_CACHE_DIR"] == str(folder)
    (folder / "kernel.ptx").write_text("")
    assert runtime.keep_compiled_kernels() is None
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", str(tmp_path / "theirs"))
    assert "one to three minutes" in runtime.keep_compiled_kernels(), "the user's own choice stays"
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", str(folder / "kernel.ptx" / "x"))
    assert runtime.keep_compiled_kernels() is None, "not a folder that can be made"
    for name in ("MLX_PTX_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # a user without an entry
    assert runtime.keep_compiled_kernels() is None, "no home"


def test_memory_limits(monkeypatch):
    metal = {"max_recommended_working_set_size": 12_000_000_000}
    assert limits_set(monkeypatch, metal, 0, 0) == {"wired": 12_000_000_000}
    assert limits_set(monkeypatch, metal, 9.5, 2) == {"wired": 9_500_000_000, "cache": 2 * 10**9}
    assert limits_set(monkeypatch, {}, 0, 0) == {}


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({"max_recommended_working_set_size": 12, "memory_size": 16}, 12),
        ({"memory_size": 16}, 16),
        ({"total_memory": 80, "free_memory": 3}, 80),
    ],
)
def test_device_memory_of_gpus(monkeypatch, info, expected):
    monkeypatch.setattr(mx, "device_info", lambda: info)
    assert runtime.device_memory_bytes() == expected


def test_device_memory_of_a_cpu_respects_the_control_group(monkeypatch):
    monkeypatch.setattr(mx, "device_info", dict)
    monkeypatch.setattr(runtime.sys, "platform", "linux")
    monkeypatch.setattr(runtime, "_cgroup_limit", lambda: 1_000_000)
    assert runtime.device_memory_bytes() == 1_000_000
    monkeypatch.setattr(runtime, "_cgroup_limit", lambda: None)
    assert runtime.device_memory_bytes() > 100_000_000


def test_control_group_limits_of_both_versions(tmp_path):
    own = tmp_path / "cgroup"
    own.write_text("4:memory:/jobs/one\n0::/user/slice\n")
    assert runtime._cgroup_limit(tmp_path, own) is None
    version2 = tmp_path / "user"
    (version2 / "slice").mkdir(parents=True)
    (version2 / "slice" / "memory.max").write_text("max\n")
    assert runtime._cgroup_limit(tmp_path, own) is None
    (version2 / "memory.max").write_text("7000\n")  # the parent limits its children
    assert runtime._cgroup_limit(tmp_path, own) == 7000
    version1 = tmp_path / "memory" / "jobs" / "one"
    version1.mkdir(parents=True)
    (version1 / "memory.limit_in_bytes").write_text("5000\n")
    assert runtime._cgroup_limit(tmp_path, own) == 5000


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
    command = ["git", *identity, "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_provenance_of_a_checkout(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    record = runtime.provenance(tmp_path)
    assert record["git_revision"] is None
    assert record["git_dirty"] is None
    assert record["python"] == ".".join(map(str, sys.version_info[:3]))
    assert record["mlx"] == mx.__version__
    assert record["device"]
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-q", "-m", "first")
    (tmp_path / "outputs").write_text("untracked files do not count")
    record = runtime.provenance(tmp_path)
    assert record["git_revision"] == git(tmp_path, "rev-parse", "HEAD")
    assert record["git_dirty"] is False
    (tmp_path / "file").write_text("two")
    assert runtime.provenance(tmp_path)["git_dirty"] is True
    assert runtime.provenance(inside)["git_revision"] is None
