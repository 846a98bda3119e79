"""The folder of a run: what is in it, what is whole, what may be replaced."""

import contextlib
import fcntl
import glob
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from ..base.errors import (
    DiskError,
    UserError,
    disk_errors_named,
    nearest_existing,
    readable,
)
from ..base.say import say
from ..model import fingerprints
from ..model.writing import write_json
from ..settings.on_resume import refuse_changes
from ..settings.run_settings import Settings
from . import trackers
from .lock import RunLock

CONFIG, PROVENANCE, LOG = "config.resolved.json", "provenance.json", "training_log.jsonl"
RUN_FILES = (
    *(CONFIG, PROVENANCE, LOG, "traceback.txt"),
    *("metrics.csv", "metrics_eval.csv", "tensorboard", trackers.WANDB_ID),  # what trackers write
)
STATE, ARRAYS, MANIFEST = "trainer_state.json", "trainer_state.safetensors", "manifest.json"
ENDED = "run.json"  # in final/: how far the run had come


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends well.

    Raises:
        DiskError: it cannot be written; what stood at `path` still does.
    """
    temporary = path.with_name(f".{path.name}.incomplete")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with disk_errors_named(path):  # which looks how much space is left, before it is cleared
            temporary.mkdir(parents=True)
            yield temporary
            for file in (*temporary.rglob("*"), temporary):
                flush(file)
            take_place(temporary, path)
            flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def take_place(new: Path, path: Path) -> None:
    """Rename the folder `new` to `path`; what stood there is deleted only after that.

    No system renames over a folder that is not empty, so there are two renames. What a kill between
    them leaves without its name gets it back by `put_back`.
    """
    put_back(path.parent, glob.escape(path.name))
    if not path.exists():
        new.rename(path)
        return
    retired = path.with_name(f".{path.name}.old-{os.getpid()}")
    path.rename(retired)
    try:
        new.rename(path)
    except OSError:
        retired.rename(path)
        raise
    shutil.rmtree(retired)


def put_back(folder: Path, pattern: str = "*") -> None:
    """Give the folders that a kill in `take_place` left under a hidden name their own again."""
    for retired in folder.glob(f".{pattern}.old-*"):
        path = retired.with_name(retired.name[1:].rpartition(".old-")[0])
        if not path.exists():
            retired.rename(path)
            say(f"restored  {path}, which a killed run was about to replace")


def flush(path: Path) -> None:
    """Onto the disk itself: on macOS, fsync leaves the data in the drive's cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if hasattr(fcntl, "F_FULLFSYNC"):
            with contextlib.suppress(OSError):  # network file systems do not know it
                fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    finally:
        os.close(descriptor)


def seal(folder: Path) -> None:
    """Write the manifest: size and SHA-256 of every file, as `sha256sum` prints it."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != MANIFEST)
    with ThreadPoolExecutor() as pool:  # hashing leaves Python's lock
        sums = pool.map(fingerprints.of_file, files)
        entries = {
            file.name: {"bytes": file.stat().st_size, "sha256": checksum}
            for file, checksum in zip(files, sums, strict=True)
        }
    write_json(folder / MANIFEST, {"files": entries})


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, by its manifest; None when it is whole."""
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        sizes = {name: int(entry["bytes"]) for name, entry in entries.items()}
        sums = {name: str(entry["sha256"]) for name, entry in entries.items()}
        return next(differences(folder, sizes, sums), None)
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except Exception as error:  # noqa: BLE001 - whatever is wrong with it, an older one may be whole
        return f"{MANIFEST} cannot be read ({type(error).__name__}: {str(error)[:200]})"


def differences(folder: Path, sizes: dict[str, int], sums: dict[str, str]) -> Iterator[str]:
    """How the files differ from a manifest, what is quick to find first."""
    for name in {STATE, ARRAYS} - sizes.keys():
        yield f"{MANIFEST} does not name {name}"
    for name, size in sizes.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            yield f"{name} is missing"
        elif path.stat().st_size != size:
            yield f"{name} has {path.stat().st_size} bytes instead of {size}"
    yield from changed_files(folder, sums)


def changed_files(folder: Path, sums: dict[str, str]) -> Iterator[str]:
    paths = [folder / name for name in sums]
    with ThreadPoolExecutor() as pool:
        try:
            pairs = zip(sums, pool.map(fingerprints.of_file, paths), strict=True)
            changed = (name for name, checksum in pairs if checksum != sums[name])
            yield from (f"{name} has changed since it was written" for name in changed)
        except OSError as error:
            yield f"it cannot be read: {error.strerror or error}"


def found(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, whole or not."""
    folders = [p for p in output_dir.glob("checkpoint-*") if p.name[11:].isdecimal()]
    return sorted((p for p in folders if p.is_dir()), key=lambda p: int(p.name[11:]))


def prune(output_dir: Path, limit: int, max_gb: float = 0.0) -> None:
    """Delete the oldest checkpoints beyond `limit` or `max_gb` (0 keeps all), never the newest.

    To be called when the newest stands. A kill halfway leaves a folder that nobody takes for one.
    """
    folders = found(output_dir)
    sizes = [sum(file.stat().st_size for file in folder.iterdir()) for folder in folders]
    while len(folders) > 1 and (
        (limit and len(folders) > limit) or (max_gb and sum(sizes) > max_gb * 1e9)
    ):
        oldest = folders.pop(0)
        sizes.pop(0)
        with disk_errors_named(oldest):
            shutil.rmtree(oldest.rename(oldest.with_name(f".{oldest.name}.old")))


def to_resume(output_dir: Path, resume: str) -> Path | None:
    """The checkpoint that `resume` names: "auto" is the newest whole one (None: there is none yet).

    Raises:
        UserError: a named folder is not a checkpoint, or damaged; none of several is whole; its log
            cannot be gone on with.
    """
    with disk_errors_named(output_dir):
        put_back(output_dir)
    folder = newest_whole(output_dir) if resume == "auto" else named_checkpoint(resume)
    if folder is not None:
        check_log(folder)
    return folder


def refuse_no_checkpoint(resume: str) -> None:
    if not (Path(resume) / STATE).is_file():
        raise UserError(f"resume = {resume!r} is not a checkpoint folder (no {STATE} in it)")


def named_checkpoint(resume: str) -> Path:
    refuse_no_checkpoint(resume)
    if complaint := damage(Path(resume)):
        raise UserError(
            f"resume: checkpoint {resume} is damaged: {complaint}; resume = auto takes the "
            "newest that is whole"
        )
    return Path(resume)


def newest_whole(output_dir: Path) -> Path | None:
    folders = found(output_dir)
    for folder in reversed(folders):
        complaint = damage(folder)
        if complaint is None:
            return folder
        say(f"warning   checkpoint {folder} is left out, {complaint}")
    if folders:
        raise UserError(
            f"resume: no checkpoint in {output_dir} is whole; overwrite=true without resume starts "
            "the run over"
        )
    return None


def check_log(folder: Path) -> None:
    """Before anything is loaded: is what the run wrote up to this checkpoint a log of records?"""
    log = folder.parent / LOG
    try:
        size = json.loads((folder / STATE).read_text(encoding="utf-8"))["log_bytes"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return  # `load` says what is wrong with it
    if log.exists() and isinstance(size, int):
        trackers.read_log(log, size)


def is_finished(output_dir: Path, config: Settings) -> bool:
    """Whether the run there has come to the end of its schedule.

    Raises:
        UserError: it has, with settings that lead elsewhere.
    """
    if not reached_its_end(output_dir):
        return False
    refuse_changes(json.loads((output_dir / CONFIG).read_text(encoding="utf-8")), config)
    return True


def reached_its_end(output_dir: Path) -> bool:
    try:
        ended = json.loads((output_dir / "final" / ENDED).read_text(encoding="utf-8"))
        return bool(ended["updates"] == ended["of"])
    except (OSError, ValueError, LookupError, TypeError):
        return False


def remains_of_run(output_dir: Path) -> list[Path]:
    """What an earlier run left in the folder."""
    names = [output_dir / name for name in (*RUN_FILES, "final", "best")]
    return [path for path in [*names, *output_dir.glob("checkpoint-[0-9]*")] if path.exists()]


def clear_leftovers(output_dir: Path, resume_from: Path | None, step: int) -> None:
    """Delete what a kill left half written or half deleted; set aside what is not gone on from.

    A checkpoint after the one that is resumed is damaged, or was gone back from on purpose: it
    must be neither resumed later nor counted as one of those to keep.
    """
    for pattern in (".*.incomplete", ".*.old", ".*.old-*"):
        for folder in output_dir.glob(pattern):
            shutil.rmtree(folder)
    if resume_from is None:
        return
    with contextlib.suppress(FileNotFoundError):
        (output_dir / "final" / ENDED).unlink()
    for folder in found(output_dir) if in_folder(resume_from, output_dir) else []:
        if int(folder.name[11:]) > step:  # the other may have been renamed
            aside = folder.with_name(f"{folder.name}.abandoned")
            shutil.rmtree(aside, ignore_errors=True)
            say(f"resume    {folder.rename(aside)} is set aside")


def in_folder(path: Path, folder: Path) -> bool:
    return path.resolve().parent == folder.resolve()


def check_output(output_dir: Path, command: str, config: Settings) -> None:
    """Refuse an output folder that can't be written or holds another run. Writes nothing.

    Raises:
        UserError: with the commands that continue or replace the other run.
    """
    if output_dir.resolve().parent == output_dir.resolve():
        raise UserError(f"output_dir {output_dir} is the root of the file system: name a folder")
    old = remains_of_run(output_dir)
    if config.overwrite:
        refuse_to_delete_sources(old, config)
    elif old and not config.resume:
        ways = f"Replace it:\n  {command} --set overwrite=true"
        if found(output_dir) and not reached_its_end(output_dir):
            ways = f"Continue it:\n  {command} --resume\nor r{ways[1:]}"
        raise UserError(f"output_dir {output_dir} already holds a run ({old[0].name}). {ways}")
    elif old and config.resume != "auto":
        refuse_other_run(output_dir, config.resume)
    refuse_unwritable(output_dir, "output_dir")


def refuse_to_delete_sources(old: list[Path], config: Settings) -> None:
    for name in ("model_name", "adapter_path", "dataset"):
        source = Path(getattr(config, name) or "/").resolve()
        if any(source.is_relative_to(path.resolve()) for path in old):
            raise UserError(f"overwrite would delete {name} = {source}: choose another output_dir")


def refuse_other_run(output_dir: Path, resume: str) -> None:
    """Raises UserError where the checkpoint is none of the run in this folder."""
    if not in_folder(Path(resume), output_dir):
        refuse_no_checkpoint(resume)
        raise UserError(
            f"output_dir {output_dir} holds another run than {resume}: choose another one"
        )


def refuse_unwritable(folder: Path, key: str) -> None:
    """Raises UserError, naming the setting, where the folder can't be made or written to."""
    existing = nearest_existing(folder)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{key} {folder} is not writable ({existing})")


def claim(
    output_dir: Path, *, overwrite: bool, lock: RunLock | None = None, key: str = "output_dir"
) -> None:
    """Make and lock the folder, and with `overwrite` delete what an earlier run left in it.

    An error names the setting by its `key`.

    Raises:
        UserError: the file system refuses, or another run holds the folder.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        if lock is not None:
            lock.claim()
        put_back(output_dir)
        old = remains_of_run(output_dir) if overwrite else []
        for path in old:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if old:
            say(f"replaced  the earlier run in {output_dir} (overwrite = true)")
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{key} {output_dir} is not writable: {reason}") from None


def refuse_full_disk(path: Path, needed: int) -> None:
    """Before a byte is written: a full disk would hit everything else that writes, too."""
    with disk_errors_named(path):
        free = shutil.disk_usage(nearest_existing(path.parent)).free
    if free < needed:
        raise DiskError(path, f"it needs {readable(needed)}, and {readable(free)} are free")
