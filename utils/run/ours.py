"""What a run wrote, and what is the user's: only the former may be renamed or removed.

A name alone says little: others write `checkpoint-500`, `final` or `metrics.csv` too. So each is
known by what is inside, and a folder by its manifest, which also tells what was added to it since.
"""

import fnmatch
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from ..base import json_files
from ..base.errors import UserError
from ..base.json_files import write_json
from ..base.text import Json
from . import trackers
from .trackers import SIGNED, TRACKIO_SENT, WANDB_ID, first_line

CONFIG, PROVENANCE, LOG = "config.resolved.json", "provenance.json", "training_log.jsonl"
METRICS = ("metrics.csv", "metrics_eval.csv")
TENSORBOARD, COMPLETIONS = "tensorboard", "completions"
PAGE = "report.html"
PAGE_OPENING = "<!doctype html><!-- made by mlx-grpo: utils/report.py -->"  # first line of a page
RUN_FILES = (
    *(CONFIG, PROVENANCE, LOG, *METRICS, PAGE),
    *(TENSORBOARD, COMPLETIONS, WANDB_ID, TRACKIO_SENT),
)
SPAN = re.compile(r"(groups|tokens)-\d{9}\.jsonl\.gz")
STATE, ARRAYS, MANIFEST = "trainer_state.json", "trainer_state.safetensors", "manifest.json"
ENDED = "run.json"  # in final/: how far the run had come
SCORE = "evaluation.json"  # in best/: its evaluation
PRETRAINED = "pretrain.json"  # in a model that utils/pretrain.py made
MADE_BY = {"made_by": "mlx-grpo"}
TRACEBACKS = "traceback*.txt"
OPENING = "mlx-grpo ended by an error that nobody foresaw"  # first line of a traceback's file
CHECKPOINT = re.compile(r"checkpoint-\d+(\.abandoned(-\d+)?)?")

# What belongs to a model folder, where no manifest says what was written.
OF_A_MODEL = (
    *("*.safetensors", "*.json", "*.jinja", "*.py", "*.model", "*.tiktoken", "merges.txt"),
    *("vocab.txt", "README.md", "adapters"),
)
# What systems and tools put into every folder.
OF_NOBODY = (
    *(".DS_Store", "._*", "Thumbs.db", "desktop.ini", "__pycache__", ".cache"),
    ".ipynb_checkpoints",
)


def read_object(path: Path) -> dict[str, Json]:
    """A JSON object; empty where there is none, or none that can be read."""
    try:
        return json_files.read_object(path)
    except UserError:
        return {}


def sign(folder: Path) -> None:
    """Write down what a run put into a model folder, so that it is known again."""
    names = sorted(path.name for path in folder.iterdir() if path.name != MANIFEST)
    write_json(folder / MANIFEST, MADE_BY | {"files": {name: {} for name in names}})


def listed(folder: Path) -> set[str]:
    """What its manifest says that was written into a folder; empty where it does not say."""
    manifest = read_object(folder / MANIFEST)
    files = manifest.get("files")
    if isinstance(files, dict) and (MADE_BY.items() <= manifest.items() or STATE in files):
        return {*files, MANIFEST}
    return set()


def strangers(folder: Path) -> list[str]:
    """What somebody added to a folder that a run (or a conversion) wrote."""
    if folder.name == COMPLETIONS:
        names = sorted(os.listdir(folder))
        return [n for n in names if not SPAN.fullmatch(n) and not matches(n, OF_NOBODY)]
    known = listed(folder)

    def own(name: str) -> bool:
        ours = name in known if known else matches(name, OF_A_MODEL)
        return ours and (name == "adapters" or not (folder / name).is_dir())

    return [n for n in sorted(os.listdir(folder)) if not own(n) and not matches(n, OF_NOBODY)]


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def is_checkpoint(folder: Path) -> bool:
    return (folder / ARRAYS).is_file() or STATE in listed(folder)


def is_model(folder: Path) -> bool:
    """A best/ or final/ of a run. Those of earlier versions have no manifest."""
    signs = {ENDED: {"updates", "of"}, SCORE: {"em", "update"}, PRETRAINED: {"settings"}}
    return bool(listed(folder)) or any(
        keys <= read_object(folder / name).keys() for name, keys in signs.items()
    )


def is_config(path: Path) -> bool:
    return {"model_name", "output_dir"} <= read_object(path).keys()


def is_provenance(path: Path) -> bool:
    return {"python", "mlx", "seed"} <= read_object(path).keys()


def is_log(path: Path) -> bool:
    return any(map(trackers.as_record, some_lines(path)))


def some_lines(path: Path) -> list[bytes]:
    """The first lines of a file: a damaged one is followed by others."""
    if not path.is_file():
        return []
    try:
        with path.open("rb") as file:
            return [file.readline(1_000_000) for _ in range(100)]
    except OSError:
        return []


def is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def is_tensorboard(folder: Path) -> bool:
    """Events and nothing else, which are signed, or beside a run that says it writes some."""
    names, reports = {*os.listdir(folder)}, read_object(folder.parent / CONFIG).get("report_to")
    said = isinstance(reports, list) and TENSORBOARD in reports
    events = all(name.startswith("events.out.tfevents") for name in names - {SIGNED, *OF_NOBODY})
    return events and (said or SIGNED in names)


def is_completions(folder: Path) -> bool:
    return any(map(SPAN.fullmatch, os.listdir(folder)))


def is_wandb_id(path: Path) -> bool:
    return re.fullmatch(r"[\w-]{1,128}\n?", first_line(path)) is not None


def is_trackio(path: Path) -> bool:
    return re.fullmatch(r"\d{1,12}\n?", first_line(path)) is not None


def is_page(path: Path) -> bool:
    return first_line(path).startswith(PAGE_OPENING)


def is_traceback(path: Path) -> bool:
    return first_line(path).startswith(OPENING)


FILES: dict[str, Callable[[Path], bool]] = {
    **{CONFIG: is_config, PROVENANCE: is_provenance, LOG: is_log, WANDB_ID: is_wandb_id},
    TRACKIO_SENT: is_trackio,
    PAGE: is_page,
    **dict.fromkeys(METRICS, lambda path: trackers.is_ours(path) and not empty(path)),
}

FOLDERS = {TENSORBOARD: is_tensorboard, COMPLETIONS: is_completions}


def is_saved(name: str) -> bool:
    """Whether it is the name of something learnt: a checkpoint, best/ or final/."""
    return is_folder(name) and name not in (TENSORBOARD, COMPLETIONS)


def is_folder(name: str) -> bool:
    """Whether a run makes a folder of this name, not a file."""
    return name in ("best", "final", TENSORBOARD, COMPLETIONS) or bool(CHECKPOINT.fullmatch(name))


def known(path: Path) -> bool:
    """Whether what is inside says that a run wrote it."""
    name = path.name
    if is_folder(name):
        tell = FOLDERS.get(name, is_checkpoint if name.startswith("checkpoint-") else is_model)
        return path.is_dir() and tell(path)
    return path.is_file() and FILES.get(name, is_traceback)(path)


def empty(path: Path) -> bool:
    """Whether there is nothing in it that could be lost."""
    if path.is_dir():
        return not os.listdir(path)
    return path.is_file() and not path.stat().st_size


def damaged(path: Path) -> bool:
    """Whether it may have been a run's before a disk or a hand damaged it.

    It is a file that nothing can be made of, or a folder whose own note is that.
    """
    if is_folder(path.name):
        notes = [path / name for name in (ENDED, SCORE, PRETRAINED, MANIFEST)]
        return any(note.is_file() and not read_object(note) for note in notes)
    if not path.is_file():
        return False
    if path.name == LOG:
        return not any(map(is_json, some_lines(path)))
    return path.suffix == ".json" and not read_object(path)


def of_runs(output_dir: Path) -> list[Path]:
    """What is in the folder under a name that a run uses, weights first."""
    try:
        names = sorted(os.listdir(output_dir))
    except (FileNotFoundError, NotADirectoryError):
        return []
    heavy = [n for n in names if CHECKPOINT.fullmatch(n) or n in ("final", "best")]
    light = [n for n in RUN_FILES if n in names]
    light += [n for n in names if matches(n, (TRACEBACKS,))]
    return [output_dir / name for name in (*heavy, *light)]


def remains(output_dir: Path) -> list[Path]:
    """What earlier runs left in the folder.

    A damaged model counts where the folder has something else by which a run is known. A damaged
    file could be anybody's: it is renamed where a run would write (`checkpoints.keep_damaged`).
    """
    found = of_runs(output_dir)
    ours = {path for path in found if known(path)}
    return [path for path in found if path in ours or (ours and is_left_over(path))]


def is_left_over(path: Path) -> bool:
    """Whether something unknown is a run's, where there is one."""
    return empty(path) or (is_folder(path.name) and damaged(path))


def obstacles(output_dir: Path, names: set[str]) -> Iterator[tuple[Path, str]]:
    """What stands where a run would write these `names`, and why it cannot."""
    ours = {*remains(output_dir)}
    for path in of_runs(output_dir):
        used = path.name in names or path.name.startswith("checkpoint-")
        may_be = path in ours or (bool(ours) and damaged(path))
        if used and (why := obstacle(path, may_be)):
            yield path, why


def obstacle(path: Path, ours: bool) -> str:
    """Why a run cannot write at a place, empty where it can."""
    if path.is_symlink() and not path.exists():
        return f"is a link that leads nowhere ({os.path.realpath(path)})"
    rights = os.R_OK | os.W_OK | (os.X_OK if path.is_dir() else 0)
    if why := wrong_kind(path):
        return why
    if not os.access(path, rights):
        return "cannot be read and written (its permissions)"
    return "" if ours or empty(path) else "is not what a run writes there"


def wrong_kind(path: Path) -> str:
    if is_folder(path.name):
        return "" if path.is_dir() else "is not a folder, which a run makes of that name"
    if path.is_file():
        return ""
    kind = "a folder" if path.is_dir() else "no ordinary file"
    return f"is {kind}, and a run writes a file of that name"
