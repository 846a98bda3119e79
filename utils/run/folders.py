"""The folder of a run: what is in it, what is whole, what may be replaced."""

import contextlib
import errno
import fcntl
import itertools
import json
import os
import re
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
from ..base.json_files import write_json
from ..base.say import say
from ..base.text import Json
from ..model import fingerprints
from ..settings.on_resume import changes, refuse_changes
from ..settings.run_settings import Settings
from . import ours, trackers
from .lock import RunLock
from .ours import ARRAYS, CONFIG, ENDED, LOG, MANIFEST, STATE

REPLACED = ".mlx-grpo-replaced"  # what an overwritten run left, until the new one has saved
REPLACING = ".mlx-grpo-replacing"  # the same, while it is moved there
HIDDEN = re.compile(r"\.(best|final|checkpoint-\d+)\.(mlx-grpo-)?(incomplete|pruned|old)(-\d+)?")
OTHER_DISK = (errno.EXDEV, errno.EBUSY)  # what is mounted cannot be renamed


def hidden(path: Path, state: str) -> Path:
    """A name beside `path` that nobody else gives: incomplete, old or pruned."""
    return path.with_name(f".{path.name}.mlx-grpo-{state}")


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends well.

    Where `path` is a link, the folder that it leads to is replaced, and the link stays.

    Raises:
        DiskError: it cannot be written; what stood at `path` still does.
    """
    target = Path(os.path.realpath(path))
    temporary = hidden(target, "incomplete")
    try:
        with disk_errors_named(path):  # which looks how much space is left, before it is cleared
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=not path.is_symlink())  # not where a disk is not mounted
            yield temporary
            for file in (*temporary.rglob("*"), temporary):
                flush(file)
            take_place(temporary, target)
            flush(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def take_place(new: Path, path: Path) -> None:
    """Rename the folder `new` to `path`; what stood there is deleted only after that.

    No system renames over a folder that is not empty, so there are two renames. What a kill between
    them leaves without its name gets it back by `put_back`.
    """
    retired = hidden(path, "old")
    restore(retired, path)
    if not os.path.lexists(path):
        new.rename(path)
        return None
    if retired.is_dir():
        discard(retired, path)
    try:
        path.rename(retired)
    except OSError as error:
        if error.errno not in OTHER_DISK:
            raise
        return refill(path, new)
    try:
        new.rename(path)
    except OSError:
        retired.rename(path)
        raise
    return discard(retired, path)


def refill(path: Path, new: Path) -> None:
    """Replace what is in a folder that cannot be renamed, as where a disk is mounted there."""
    incoming = path / hidden(path, "incomplete").name
    shutil.rmtree(incoming, ignore_errors=True)
    shutil.copytree(new, incoming)
    for file in (*incoming.rglob("*"), incoming):
        flush(file)
    added = {*ours.strangers(path)}
    for old in path.iterdir():
        if old != incoming and old.name not in added:
            remove(old)
    for file in incoming.iterdir():
        if os.path.lexists(path / file.name):
            (path / file.name).rename(free_name(path / file.name))
        file.rename(path / file.name)
    incoming.rmdir()


def discard(retired: Path, path: Path) -> None:
    """Delete what `path` has replaced, apart from what somebody added to it: that moves along."""
    try:
        added = ours.strangers(retired)
        for name in added:
            (retired / name).rename(free_name(path / name))
        if added:
            say(f"kept      {', '.join(added)} in {path}, where a new model is now")
        remove(retired)
    except OSError as error:  # the new one stands
        say(f"warning   {retired} cannot be deleted: {error.strerror or error}")


def free_name(path: Path) -> Path:
    """The path, or one beside it that is not taken."""
    names = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(p for p in itertools.chain([path], names) if not os.path.lexists(p))


def restore(retired: Path, path: Path) -> None:
    """Give a folder that a kill in `take_place` left under a hidden name its own again."""
    if retired.is_dir() and not os.path.lexists(path):
        retired.rename(path)
        say(f"restored  {path}, which a killed run was about to replace")


def put_back(folder: Path) -> None:
    """Give what a kill in `take_place` or in `set_aside` left elsewhere its own name again."""
    for path in sorted(folder.glob(".*")):
        match = HIDDEN.fullmatch(path.name)
        if match and match[3] == "old" and is_ours(path, match):
            restore(path, path.with_name(match[1]))
    for path in ours.of_runs(folder):
        if path.is_symlink() and not path.exists():
            target = Path(os.path.realpath(path))
            restore(hidden(target, "old"), target)
    for path in entries(folder / REPLACING):
        if not os.path.lexists(folder / path.name):
            move(path, folder / path.name)
    with contextlib.suppress(OSError):
        (folder / REPLACING).rmdir()


def is_ours(path: Path, match: re.Match[str]) -> bool:
    """Whether a run made a folder of a hidden name: earlier ones gave names that others may."""
    if match[2]:
        return True
    return ours.is_model(path) if match[1] in ("best", "final") else ours.is_checkpoint(path)


def entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def remove(path: Path) -> None:
    """Delete a file or a folder; of a link only the link, and what it leads to is named."""
    if path.is_symlink():
        leads_to = os.path.realpath(path)
        path.unlink()
        say(f"link      {path} is removed; what it led to stays: {leads_to}")
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def move(path: Path, to: Path) -> None:
    """Rename within the run's folder; a link leads to the same place from there."""
    if path.is_symlink():
        to.symlink_to(os.path.realpath(path))
        path.unlink()
    else:
        path.rename(to)


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
    write_json(folder / MANIFEST, ours.MADE_BY | {"files": entries})


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, by its manifest; None when it is whole."""
    if (folder / MANIFEST).exists() and not (folder / MANIFEST).is_file():
        return f"its {MANIFEST} is no ordinary file"
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
    What no run wrote, or what somebody added something to, is not counted and stays.
    """
    folders = [folder for folder in found(output_dir) if may_go(folder)]
    sizes = [sum(file.lstat().st_size for file in folder.iterdir()) for folder in folders]
    while len(folders) > 1 and (
        (limit and len(folders) > limit) or (max_gb and sum(sizes) > max_gb * 1e9)
    ):
        sizes.pop(0)
        delete(folders.pop(0))


def delete(folder: Path) -> None:
    """A checkpoint; that it cannot be deleted is no reason to end a run."""
    try:
        remove(folder if folder.is_symlink() else folder.rename(hidden(folder, "pruned")))
    except OSError as error:
        say(f"warning   {folder} cannot be deleted: {error.strerror or error}")


def may_go(folder: Path) -> bool:
    """Whether a checkpoint may be deleted. Says once where something else lies in it."""
    if not ours.is_checkpoint(folder):
        return False
    if (added := ours.strangers(folder)) and folder not in _kept:
        _kept.add(folder)
        say(f"kept      {folder} is not deleted, since {', '.join(added)} was added to it")
    return not added


_kept: set[Path] = set()  # for one line, not one at every checkpoint


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
    if before := settings_of(output_dir):
        refuse_to_extend(output_dir, before, config)
        refuse_changes(before, config)
    else:
        say(
            f"warning   {output_dir / CONFIG} is missing or damaged: whether the run had these "
            "settings cannot be told"
        )
    return True


def refuse_to_extend(output_dir: Path, before: dict[str, Json], config: Settings) -> None:
    """Raises UserError where the end of a finished run is moved, with what to type instead."""
    found = changes(before, config)
    moved = [name for name in ("max_updates", "num_epochs") if name in found]
    if moved:
        was, now = found[moved[0]]
        raise UserError(
            f"the run in {output_dir} has finished, and {moved[0]} (was {was}, is {now}) would "
            "change the learning rate of all its updates. To train what it made further, start "
            f"from it in another output_dir, without --resume: --set model_name="
            f"{output_dir / 'final'} --set output_dir=FOLDER"
        )


def settings_of(output_dir: Path) -> dict[str, Json]:
    """What the run in a folder was told, by its record or its newest checkpoint; empty where
    neither says."""
    if ours.is_config(output_dir / CONFIG):
        return ours.read_object(output_dir / CONFIG)
    told = (ours.read_object(p / STATE).get("config") for p in reversed(found(output_dir)))
    return next((settings for settings in told if isinstance(settings, dict)), {})


def reached_its_end(output_dir: Path) -> bool:
    ended = ours.read_object(output_dir / "final" / ENDED)
    return "updates" in ended and ended["updates"] == ended.get("of")


def clear_leftovers(output_dir: Path, resume_from: Path | None, step: int) -> None:
    """Delete what a kill left half written or half deleted; set aside what is not gone on from.

    A checkpoint after the one that is resumed is damaged, or was gone back from on purpose: it
    must be neither resumed later nor counted as one of those to keep.
    """
    for path in sorted(output_dir.glob(".*")):
        match = HIDDEN.fullmatch(path.name)
        if match and path.is_dir() and is_ours(path, match):
            if match[3] == "old":
                discard(path, path.with_name(match[1]))
            else:
                remove(path)
    if resume_from is not None:
        ended = output_dir / "final" / ENDED
        if ended.is_file():
            ended.unlink()
        abandon(found(output_dir) if in_folder(resume_from, output_dir) else [], step)


def abandon(checkpoints: list[Path], step: int) -> None:
    """Those after `step`, from which the run goes on."""
    for folder in checkpoints:
        if int(folder.name[11:]) > step:  # the one gone on from may have been renamed
            aside = free_name(folder.with_name(f"{folder.name}.abandoned"))
            move(folder, aside)
            say(f"resume    {aside} is set aside")


def in_folder(path: Path, folder: Path) -> bool:
    """Whether it stands there, also as a link to elsewhere, or is a link to what does."""
    place, home = Path(os.path.abspath(path)), os.path.realpath(folder)
    return home in (os.path.realpath(place.parent), os.path.dirname(os.path.realpath(place)))


def check_output(output_dir: Path, command: str, config: Settings) -> None:
    """Refuse an output folder that can't be written or holds another run. Writes nothing, but
    gives what a kill left under a hidden name its own.

    Raises:
        UserError: with the commands that continue or replace the other run.
    """
    refuse_unwritable(output_dir, "output_dir")
    if os.path.realpath(output_dir) == os.path.dirname(os.path.realpath(output_dir)):
        raise UserError(f"output_dir {output_dir} is the root of the file system: name a folder")
    refuse_obstacles(output_dir, "output_dir", to_be_written(config))
    old = ours.remains(output_dir)
    if config.overwrite and not goes_on(output_dir, config.resume):
        refuse_to_delete(old, config)
    elif old and not config.resume:
        ways = f"Replace it:\n  {command} --set overwrite=true"
        if found(output_dir) and not reached_its_end(output_dir):
            ways = f"Continue it:\n  {command} --resume\nor r{ways[1:]}"
        raise UserError(f"output_dir {output_dir} already holds a run ({first_of(old)}). {ways}")
    elif old and config.resume != "auto":
        refuse_other_run(output_dir, config.resume)


def goes_on(output_dir: Path, resume: str) -> bool:
    """Whether the run in the folder is continued, so that `overwrite` has nothing to say."""
    if resume == "auto":
        return bool(found(output_dir))
    return bool(resume) and in_folder(Path(resume), output_dir)


def first_of(old: list[Path]) -> str:
    """A name by which a person knows a run."""
    names = [path.name for path in old]
    return next((name for name in ours.RUN_FILES if name in names), names[0])


def to_be_written(config: Settings) -> set[str]:
    """The names that a run will use in its folder, apart from checkpoints."""
    names = {CONFIG, ours.PROVENANCE, "final", *(["best"] if config.save_best else [])}
    names |= {LOG} if config.log_jsonl else set()
    names |= {ours.COMPLETIONS} if config.keep_completions != "none" else set()
    return names | files_of_trackers(config.report_to)


def files_of_trackers(report_to: list[str]) -> set[str]:
    written = {
        "csv": {*ours.METRICS},
        "tensorboard": {ours.TENSORBOARD},
        "wandb": {trackers.WANDB_ID},
        "trackio": {trackers.TRACKIO_SENT},
    }
    return set().union(*(written[name] for name in report_to))


def refuse_obstacles(folder: Path, key: str, names: set[str]) -> None:
    """Raises UserError where something that no run wrote stands at a name that this run uses."""
    with as_user_error(folder, key):
        for path, why in ours.obstacles(folder, names):
            target = Path(os.path.realpath(path))
            if hidden(target, "old").is_dir() and not target.exists():
                continue  # a kill left it so: `put_back`
            raise UserError(
                f"{key} {folder} holds {path.name}, which {why}: move it away, or choose another "
                f"{key}"
            )


@contextmanager
def as_user_error(folder: Path, key: str) -> Iterator[None]:
    """A file system that refuses before anything was begun."""
    try:
        yield
    except OSError as error:
        reason, where = error.strerror or str(error), error.filename or folder
        raise UserError(f"{key} {folder} is not writable: {reason} ({where})") from None


def refuse_to_delete(old: list[Path], config: Settings) -> None:
    """Raises UserError where overwriting would delete what no run wrote, or what this run reads."""
    for name, source in paths_in(config):
        if any(source.is_relative_to(os.path.realpath(path)) for path in old):
            raise UserError(f"overwrite would delete {name} = {source}: choose another output_dir")
    refuse_to_delete_additions(old, "output_dir")


def refuse_to_delete_additions(old: list[Path], key: str) -> None:
    for path in old:
        own = ours.is_saved(path.name) or path.name == ours.COMPLETIONS
        own = own and path.is_dir() and not path.is_symlink()
        if own and (added := ours.strangers(path)):
            raise UserError(
                f"overwrite would delete {path / added[0]}, which was added to the run: move it "
                f"away, or choose another {key}"
            )


def paths_in(config: Settings) -> Iterator[tuple[str, Path]]:
    """(setting, path) of all that a run may read from files."""
    for name in ("model_name", "adapter_path", "dataset", "chat_template", "reward_model"):
        yield name, source_of(config, getattr(config, name))
    if config.resume not in ("", "auto"):
        yield "resume", source_of(config, config.resume)
    for part in config.dataset_mix:
        yield "dataset_mix", source_of(config, str(part["dataset"]))
    for spec in config.reward_funcs:
        yield "reward_funcs", source_of(config, spec.rpartition(":")[0])


def source_of(config: Settings, name: str) -> Path:
    return Path(os.path.realpath(config.located(name or "/")))


def refuse_other_run(output_dir: Path, resume: str) -> None:
    """Raises UserError where the checkpoint is none of the run in this folder."""
    if not in_folder(Path(resume), output_dir):
        refuse_no_checkpoint(resume)
        raise UserError(
            f"output_dir {output_dir} holds another run than {resume}: choose another one"
        )


def refuse_unwritable(folder: Path, key: str) -> None:
    """Raises UserError, naming the setting, where the folder can't be made or written to."""
    for path in (folder, *folder.parents):
        if os.path.islink(path) and not os.path.exists(path):
            raise UserError(
                f"{key} {folder}: {path} is a link that leads nowhere ({os.readlink(path)})"
            )
    with as_user_error(folder, key):
        existing = nearest_existing(folder)
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK | os.R_OK):
            raise UserError(f"{key} {folder} is not writable ({existing})")


def claim(
    output_dir: Path,
    *,
    overwrite: bool,
    lock: RunLock | None = None,
    key: str = "output_dir",
    shown: Path | None = None,
) -> None:
    """Make and lock the folder, and with `overwrite` set aside what an earlier run left in it.

    An error names the setting by its `key`; `shown` is the folder as it was typed.

    Raises:
        UserError: the file system refuses, or another run holds the folder.
    """
    with as_user_error(output_dir, key):
        output_dir.mkdir(parents=True, exist_ok=True)
        if lock is not None:
            lock.claim()
        put_back(output_dir)
        if overwrite:
            set_aside(output_dir, shown or output_dir)


def set_aside(output_dir: Path, shown: Path) -> None:
    """Move what an earlier run left to a folder beside it, where it is until this one has saved.

    What never saved anything does not replace there what did.
    """
    old, aside = ours.remains(output_dir), output_dir / REPLACED
    if not old:
        return
    if any(ours.is_saved(path.name) for path in old):
        drop_replaced(output_dir)
    if aside.is_dir():
        for path in old:
            remove(path)
        say(f"replaced  a run in {shown} that had saved nothing (overwrite = true)")
        return
    moving = output_dir / REPLACING
    moving.mkdir()
    try:
        for path in old:
            move(path, moving / path.name)
        moving.rename(aside)
    except OSError:
        put_back(output_dir)
        raise
    say(
        f"replaced  the earlier run in {shown} (overwrite = true); it is in {shown / REPLACED} "
        "until this one has saved something"
    )


def drop_replaced(output_dir: Path) -> bool:
    """Delete the run that this one has replaced, if there is one."""
    aside = output_dir / REPLACED
    if not aside.is_dir():
        return False
    try:
        shutil.rmtree(aside)
    except OSError as error:
        say(f"warning   {aside} cannot be deleted: {error.strerror or error}")
    return True


def refuse_full_disk(path: Path, needed: int) -> None:
    """Before a byte is written: a full disk would hit everything else that writes, too."""
    with disk_errors_named(path):
        free = shutil.disk_usage(nearest_existing(path.parent)).free
    if free < needed:
        raise DiskError(path, f"it needs {readable(needed)}, and {readable(free)} are free")
