"""Imports point down: a room of utils/ imports its own files and the rooms below it, nothing else.

Types that a lower room needs from a higher one are Protocols in the lower room. The tests of a room
lie in the room of that name.
"""

import ast
import functools
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
UTILS = ROOT / "utils"
FLOORS = [
    "base",
    "settings device",
    "data",
    "model",
    "memory",
    "gradient",
    "rollouts rewards pretraining",
    "run",
]
FLOOR = {room: n for n, rooms in enumerate(FLOORS) for room in rooms.split()}
COMMANDS = {
    *("__init__.py", "convert_model.py", "convert_nanochat.py", "evaluate_model.py"),
    *("inference.py", "pretrain.py", "report.py"),
}
FILES = sorted(path for path in UTILS.rglob("*.py") if path.parent != UTILS)
SOURCES = {path: path.read_text(encoding="utf-8") for path in FILES}


def imported(path, source):
    """(parts of a module below utils/, name) of every import from there, in whatever form, also
    inside functions and under TYPE_CHECKING."""
    package = path.relative_to(UTILS).parent.parts  # ("device", "cuda")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            tops = [alias.name.split(".")[0] for alias in node.names]
            assert not {"utils", "mlx_grpo"} & {*tops}, "rooms import by relative names"
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            top = (node.module or "").split(".")[0]
            assert top not in ("utils", "mlx_grpo"), "rooms import by relative names"
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1]
            below = [*base, *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                yield below, alias.name


def upward(path, source):
    """The rooms above its own, or beside it, that a file imports from."""
    own = path.relative_to(UTILS).parts[0]
    rooms = [[*below, name][0] for below, name in imported(path, source)]
    return [room for room in rooms if room != own and FLOOR.get(room, 99) >= FLOOR[own]]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(UTILS)))
def test_imports_point_down(path):
    assert not upward(path, SOURCES[path])


@pytest.mark.parametrize(
    "line",
    [
        "from ..run import log",
        "from ..run.log import RunLog",
        "def late():\n    from ..rewards import calls",
        "if TYPE_CHECKING:\n    from ..gradient.scorer import Scorer",
        "from .. import inference",
        "from ..pretraining.data import Rows",
    ],
)
def test_an_import_that_points_up_is_found(line):
    path = UTILS / "memory" / "plan.py"
    assert len(upward(path, f"{SOURCES[path]}\n{line}\n")) == 1


@pytest.mark.parametrize("line", ["from utils.base import text", "import utils", "import mlx_grpo"])
def test_an_import_by_an_absolute_name_is_found(line):
    path = UTILS / "memory" / "plan.py"
    with pytest.raises(AssertionError, match="relative names"):
        upward(path, line)


def test_no_files_import_each_other_in_a_circle():
    names = {".".join(p.relative_to(UTILS).with_suffix("").parts): p for p in FILES}
    arrows = {
        name: {
            target
            for below, imported_name in imported(path, SOURCES[path])
            for target in (".".join([*below, imported_name]), ".".join(below))
            if target in names
        }
        for name, path in names.items()
    }
    while ends := [name for name, targets in arrows.items() if not targets & arrows.keys()]:
        for name in ends:
            del arrows[name]
    assert not arrows


def test_only_commands_stand_at_the_door():
    assert {path.name for path in UTILS.glob("*.py")} <= COMMANDS


def test_only_commands_load_the_script():
    callers = [path.name for path, source in SOURCES.items() if "load_script(" in source]
    assert callers == ["script.py"]


def test_no_room_hides_a_module():
    """`python utils/x.py` puts utils/ on the path."""
    taken = {*sys.stdlib_module_names, "mlx", "mlx_lm", "mlx_vlm", "numpy", "transformers"}
    taken |= {"datasets", "tqdm", "torch", "gguf", "trl", "peft", "wandb", "trackio", "jinja2"}
    assert not FLOOR.keys() & taken
    assert {path.name for path in UTILS.iterdir() if (path / "__init__.py").exists()} == {*FLOOR}


@functools.cache
def names(path):
    """Dotted names of all that a test file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}", *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


MODULES = [path for path in FILES if path.name != "__init__.py"]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(UTILS)))
def test_every_module_is_tested_in_the_room_of_that_name(path):
    """By a file of its own, or by one that imports it."""
    files = [*(ROOT / "tests" / path.relative_to(UTILS).parts[0]).rglob("test_*.py")]
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    assert any(file.stem == f"test_{path.stem}" or module in names(file) for file in files)
