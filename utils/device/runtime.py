"""Platform set-up: a fast BLAS for MLX's CPU build, memory limits, what a run may use, provenance.

Nothing here imports MLX at module level: `preload_blas` has to come before `import mlx.core`, and
`--help` has to stay quick.
"""

import ctypes
import importlib.util
import os
import platform
import shutil
import site
import subprocess
import sys
from pathlib import Path

from ..base.errors import UserError
from ..base.say import complain

BLAS_CHOICES = ("auto", "mkl", "openblas", "none")
GB = 10**9

Facts = dict[str, str | bool | None]
"""What a run was made with, by name; None: not known, or not installed."""


def _linux_cpu_build() -> bool:
    """Whether the installed MLX is the Linux CPU wheel, by the folders next to the package.

    `importlib.metadata` would answer too, but costs more than the rest of `--help`.
    """
    if sys.platform != "linux" or (spec := importlib.util.find_spec("mlx")) is None:
        return False
    parents = [Path(place).parent for place in spec.submodule_search_locations or []]
    installed = {path.name for parent in parents for path in parent.glob("mlx_c*.dist-info")}
    cuda = any(name.startswith("mlx_cuda") for name in installed)
    return not cuda and any(name.startswith("mlx_cpu-") for name in installed)


def _find_mkl() -> Path | None:
    """`libmkl_rt.so*` of the `mkl` wheel, whose RECORD puts it two folders above site-packages."""
    packages = [Path(p) for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
    folders = [Path(sys.prefix) / "lib", Path(site.getuserbase()) / "lib"]
    folders += [package.parents[1] for package in packages if len(package.parents) > 1]
    return next((file for folder in folders for file in folder.glob("libmkl_rt.so*")), None)


def _load_global(library: str) -> bool:
    """Load a shared library into the global scope; False, with a warning, if it is broken."""
    try:
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        # The dynamic linker names the file it misses: an absent library is normal, one which is
        # there but lacks libgfortran, or is damaged, is worth a line.
        if not str(error).startswith(f"{library}: cannot open shared object file: No such file"):
            complain(f"warning: found {library}, but cannot load it: {error}")
        return False
    return True


def _load_mkl() -> bool:
    if (library := _find_mkl()) is None:
        return False
    # Sequential: MLX calls BLAS from one thread, and MKL's OpenMP run-time would be a second pool.
    os.environ.setdefault("MKL_THREADING_LAYER", "SEQUENTIAL")
    return _load_global(str(library))


def _load_openblas() -> bool:
    # Measured: two threads lose by far on the small matrices of a small model.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    return any(_load_global(name) for name in ("libopenblas.so.0", "libopenblasp.so.0"))


def _global_blas() -> str | None:
    """A BLAS that already is in the global scope (LD_PRELOAD, or an earlier call), by name."""
    scope = ctypes.CDLL(None)
    if not hasattr(scope, "cblas_sgemm"):
        return None
    if hasattr(scope, "MKL_Get_Version"):
        return "mkl"
    return "openblas" if hasattr(scope, "openblas_get_config") else "preloaded"


def preload_blas(*, as_command: bool = False) -> str | None:
    """Load a fast BLAS for MLX's Linux CPU build. Call it BEFORE the first `import mlx.core`.

    That build links the reference BLAS, 15 to 50 times slower than MKL or OpenBLAS; symbols in the
    global scope win over it. `MLX_GRPO_BLAS` = auto (default) | mkl | openblas | none.

    Returns: "mkl", "openblas", "preloaded" (an unknown one by LD_PRELOAD), or None: nothing to do
    (macOS, CUDA), nothing found, switched off, or MLX is imported already, which is too late.
    Raises UserError when MLX_GRPO_BLAS is unknown, or names a library that cannot be loaded; a
    command, which has caught nothing yet while it imports, says so and exits.
    """
    try:
        return _preload_blas()
    except UserError as error:
        if not as_command:
            raise
        complain(f"error: {error}")
        sys.exit(error.exit_code)


def _preload_blas() -> str | None:
    wanted = os.environ.get("MLX_GRPO_BLAS") or "auto"
    if wanted not in BLAS_CHOICES:
        raise UserError(f"MLX_GRPO_BLAS={wanted!r} is not one of {', '.join(BLAS_CHOICES)}")
    if not _linux_cpu_build():
        return None
    if (present := _global_blas()) is not None:
        return present
    if wanted == "none" or "mlx.core" in sys.modules:
        return None
    return _loaded(wanted)


def _loaded(wanted: str) -> str | None:
    """The first BLAS that can be loaded, of those that are wanted.

    Raises:
        UserError: one that is wanted by its name cannot.
    """
    for name, load in (("mkl", _load_mkl), ("openblas", _load_openblas)):
        if wanted in ("auto", name) and load():
            return name
    if wanted != "auto":
        raise UserError(f"MLX_GRPO_BLAS={wanted}, but this library is not installed or broken")
    return None


def blas_advice(loaded: str | None) -> str | None:
    """One line for the user of the Linux CPU build without a fast BLAS, otherwise None.

    loaded: what `preload_blas` returned.
    """
    switched_off = os.environ.get("MLX_GRPO_BLAS") == "none"
    if loaded is not None or switched_off or not _linux_cpu_build():
        return None
    if _find_mkl() is not None and "mlx.core" in sys.modules:
        return "MKL is installed, but MLX was imported first: matrix products stay 15-50x slower."
    install = "apt-get install libopenblas0-pthread"
    if platform.machine() == "x86_64":
        install = f"pip install mkl (or {install})"
    return f"No fast BLAS found: {install} makes matrix products on this CPU 15-50 times faster."


def keep_compiled_kernels() -> str | None:
    """Have MLX keep the CUDA kernels that it compiles; a line for the user if there are none yet.

    It keeps them in the folder of temporary files otherwise, which a restart empties. One H200, the
    first update of a 1.5B model: 90 s for bfloat16 weights, 150 s for 4-bit ones, then 2 s.
    """
    from importlib import metadata

    import mlx.core as mx

    if not mx.cuda.is_available():
        return None
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        # They are for one kind of GPU, and machines with others may share the home.
        kind = str(mx.device_info(mx.gpu)["architecture"])
        own = caches / "mlx" / metadata.version("mlx") / kind / "ptx"
        folder = Path(os.environ.get("MLX_PTX_CACHE_DIR") or own)
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or one that can't be written to: MLX's own will do
        return None
    os.environ["MLX_PTX_CACHE_DIR"] = str(folder)
    if any(folder.iterdir()):
        return None
    return "MLX compiles its CUDA kernels first, once on this machine: one to three minutes"


def set_memory_limits(
    wired_limit_gb: float, cache_limit_gb: float, memory_limit_gb: float = 0.0
) -> None:
    """Set MLX's wired, cache and memory limits, in GB of 10^9 bytes; 0 = the default.

    Above the memory limit MLX frees its cache, and waits for work that is under way before it
    starts more: it is kept where the arrays in use leave room for that.

    The default wired limit on Metal is the recommended working set, as in
    `mlx_lm.utils.maybe_set_recommended_wired_limit`; elsewhere a wired limit has no effect. A small
    cache limit is what stops memory from growing on Macs that swap.
    Raises UserError if Metal refuses the limit (above the recommended size).
    """
    import mlx.core as mx

    recommended = mx.device_info().get("max_recommended_working_set_size")
    if wired_limit_gb > 0:
        try:
            mx.set_wired_limit(int(wired_limit_gb * GB))
        except (ValueError, RuntimeError) as error:
            raise UserError(f"wired_limit_gb = {wired_limit_gb}: {error}") from None
    elif recommended is not None:
        mx.set_wired_limit(int(recommended))
    if cache_limit_gb > 0:
        mx.set_cache_limit(int(cache_limit_gb * GB))
    if memory_limit_gb > 0:
        mx.set_memory_limit(int(memory_limit_gb * GB))


def _cgroup_limit(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> int | None:
    """The lowest memory limit in bytes of this process' control groups (v1 and v2), if any.

    A container sees its own group at the root of the mount, a plain process at the path that
    /proc/self/cgroup gives; limits of the groups above it count as well.
    """
    files = [root / "memory.max", root / "memory" / "memory.limit_in_bytes"]
    for line in own.read_text().splitlines() if own.exists() else []:
        files += _limit_files(root, line)
    texts = [file.read_text().strip() for file in files if file.is_file()]
    return min((int(text) for text in texts if text != "max"), default=None)


def _limit_files(root: Path, line: str) -> list[Path]:
    """Where the group in a line of /proc/self/cgroup, and those above it, have their limits."""
    _, controllers, path = line.split(":", 2)
    if controllers not in ("", "memory"):
        return []
    base = root / controllers
    name = "memory.limit_in_bytes" if controllers else "memory.max"
    group = base / path.lstrip("/")
    return [g / name for g in (group, *group.parents) if g.is_relative_to(base)]


def _physical_memory() -> int:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _cgroup_limit() if sys.platform == "linux" else None
    return total if limit is None else min(total, limit)


def platform_name() -> str:
    """What MLX computes on: "cpu", "metal" or "cuda"."""
    import mlx.core as mx

    if mx.default_device() == mx.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def device_memory_bytes() -> int:
    """Bytes that a run may use on MLX's default device.

    Metal: the recommended working set. CUDA: the memory of the device. CPU: physical memory, or
    the control group's limit where that is lower.
    """
    import mlx.core as mx

    info = mx.device_info()
    for key in ("max_recommended_working_set_size", "total_memory", "memory_size"):
        if info.get(key):
            return int(info[key])
    return _physical_memory()


def _git(repo: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(repo), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _git_state(repo: Path) -> Facts:
    """Revision and whether tracked files differ from it; None for both outside a checkout."""
    nothing: Facts = {"git_revision": None, "git_dirty": None}
    if shutil.which("git") is None or not repo.is_dir():
        return nothing
    # An installed copy inside somebody else's checkout must not report that one's revision.
    top = _git(repo, "rev-parse", "--show-toplevel")
    revision = _git(repo, "rev-parse", "--verify", "HEAD")
    if not top or revision is None or Path(top).resolve() != repo.resolve():
        return nothing
    changes = _git(repo, "status", "--porcelain", "--untracked-files=no")
    return {"git_revision": revision, "git_dirty": bool(changes)}


def _version(distribution: str) -> str | None:
    from importlib import metadata  # half of this module's import time

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def provenance(repo: Path) -> Facts:
    """What a run was made with: versions (None = not installed), platform, device, git state.

    repo: the root of the checkout; `git_revision` and `git_dirty` are None when it is none.
    """
    import mlx.core as mx

    packages = ("mlx", "mlx-lm", "transformers", "datasets")
    info = mx.device_info()
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "platform": platform.platform(),
        "device": str(info.get("device_name", info.get("architecture", mx.default_device()))),
        **_git_state(repo),
    }
