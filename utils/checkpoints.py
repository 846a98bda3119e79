"""Checkpoint folders: written aside, flushed, renamed, with a manifest to tell damage by."""

import contextlib
import copy
import fcntl
import glob
import json
import math
import os
import random
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from . import planning, rewarding, runtime, settings, sources, tracking
from .console import say
from .errors import (
    DiskError,
    RunError,
    UserError,
    disk_errors_named,
    nearest_existing,
    readable,
)
from .lock import RunLock
from .text import shown

CONFIG, PROVENANCE, LOG = "config.resolved.json", "provenance.json", "training_log.jsonl"
RUN_FILES = (
    *(CONFIG, PROVENANCE, LOG, "traceback.txt"),
    *("metrics.csv", "metrics_eval.csv", "tensorboard", tracking.WANDB_ID),  # what trackers write
)
SINGLE = "model.safetensors"
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
                _flush(file)
            take_place(temporary, path)
            _flush(path.parent)
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


def _flush(path: Path) -> None:
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
        sums = pool.map(sources.of_file, files)
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
    paths = [folder / name for name in sums]
    with ThreadPoolExecutor() as pool:
        try:
            for name, checksum in zip(sums, pool.map(sources.of_file, paths), strict=True):
                if checksum != sums[name]:
                    yield f"{name} has changed since it was written"
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
    folder = newest_whole(output_dir) if resume == "auto" else named(resume)
    if folder is not None:
        check_log(folder)
    return folder


def refuse_no_checkpoint(resume: str) -> None:
    if not (Path(resume) / STATE).is_file():
        raise UserError(f"resume = {resume!r} is not a checkpoint folder (no {STATE} in it)")


def named(resume: str) -> Path:
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
        tracking.read_log(log, size)


def is_finished(output_dir: Path, config: Any) -> bool:
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


def check_output(output_dir: Path, command: str, config: Any) -> None:
    """Refuse an output folder that can't be written or holds another run. Writes nothing.

    Raises:
        UserError: with the commands that continue or replace the other run.
    """
    if output_dir.resolve().parent == output_dir.resolve():
        raise UserError(f"output_dir {output_dir} is the root of the file system: name a folder")
    old = remains_of_run(output_dir)
    for name in ("model_name", "adapter_path", "dataset") if config.overwrite else ():
        source = Path(getattr(config, name) or "/").resolve()
        if any(source.is_relative_to(path.resolve()) for path in old):
            raise UserError(f"overwrite would delete {name} = {source}: choose another output_dir")
    elsewhere = config.resume not in ("", "auto") and not in_folder(Path(config.resume), output_dir)
    if old and elsewhere and not config.overwrite:
        refuse_no_checkpoint(config.resume)
        raise UserError(
            f"output_dir {output_dir} holds another run than {config.resume}: choose another one"
        )
    if old and not (config.overwrite or config.resume):
        ways = f"Replace it:\n  {command} --set overwrite=true"
        if found(output_dir) and not reached_its_end(output_dir):
            ways = f"Continue it:\n  {command} --resume\nor r{ways[1:]}"
        raise UserError(f"output_dir {output_dir} already holds a run ({old[0].name}). {ways}")
    refuse_unwritable(output_dir, "output_dir")


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


def write_json(path: Path, value: Any) -> None:
    """In one piece: a kill leaves the old file or the new one."""
    temporary = path.with_name(f".{path.name}.partial")
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_state(folder: Path, counters: dict[str, Any], arrays: dict[str, Any]) -> None:
    """Counters (JSON) and arrays (flat name -> mx.array) of the trainer."""
    import mlx.core as mx

    mx.save_safetensors(str(folder / ARRAYS), arrays)
    write_json(folder / STATE, counters)


def read_state(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    import mlx.core as mx

    counters = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return counters, dict(mx.load(str(folder / ARRAYS)))  # type: ignore[arg-type]


def rewind_log(path: Path, size: int) -> None:
    """Cut the log to what it was when the checkpoint was made: the run writes the rest again."""
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size < size:
            say(f"warning   {path} lacks records from before the checkpoint")
        else:
            os.truncate(path, size)


def without_torn_line(path: Path, last: int) -> list[dict[str, Any]]:
    """The records of the log up to the update `last`; it ends with a whole line from here on.

    Where a person deleted a line, the cut at a byte has left some that came later.
    """
    records, end = tracking.read_log(path, last=last)
    rest = path.read_bytes()[end:].strip()
    if rest and tracking.as_record(rest.partition(b"\n")[0]) is None:
        say(f"warning   the last line of {path} was cut off by a crash, and is dropped")
    os.truncate(path, end)
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" if records else "")
    return records


def write_model(
    folder: Path, model: Any, tokenizer: Any, config: dict, source: Path, *, donate: bool = False
) -> None:
    """A complete model folder that `mlx_lm.load` reads: weights, config, tokenizer, custom code.

    donate: the model is empty afterwards, and its files are small: of weights that were not
    computed yet, those of one file exist at once.
    """
    from mlx_lm.utils import save_config, save_model

    if donate:
        write_lazy_weights(folder, model)
    else:
        save_model(folder, model, donate_model=False)
    save_config(dict(config), config_path=folder / "config.json")
    tokenizer.save_pretrained(str(folder))
    for file in [*source.glob("*.py"), *source.glob("generation_config.json")]:
        shutil.copy(file, folder)


def write_lazy_weights(folder: Path, model: Any) -> None:
    """model*.safetensors of 1 GB with their index; leaves the model without weights."""
    import mlx.core as mx
    from mlx.utils import tree_map
    from mlx_lm.utils import make_shards

    shards = make_shards(flat(model.parameters()), max_file_size_gb=1)
    model.update(tree_map(lambda _: mx.array([]), model.parameters()))
    files: dict[str, str] = {}
    total = sum(weight.nbytes for shard in shards for weight in shard.values())
    for number, count in enumerate([len(shards)] * len(shards), start=1):
        name = f"model-{number:05}-of-{count:05}.safetensors" if count > 1 else SINGLE
        shard = shards.pop(0)
        mx.save_safetensors(str(folder / name), shard, metadata={"format": "mlx"})
        files |= dict.fromkeys(shard, name)
        del shard
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def write_adapters(folder: Path, model: Any, adapter_config: dict[str, Any]) -> None:
    """Adapters in mlx-lm's format: `mlx_lm.load(base, adapter_path=folder)`, `mlx_lm.fuse`."""
    import mlx.core as mx

    folder.mkdir(exist_ok=True)
    weights = flat(model.trainable_parameters())
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    write_json(folder / "adapter_config.json", adapter_config)


def write_stop_strings(folder: Path, stop_strings: list[str], eos_ids: Iterable[int]) -> None:
    """Stop strings into generation_config.json: EOS after the answer was not trained with them."""
    path = folder / "generation_config.json"
    settings = {"eos_token_id": sorted(eos_ids)}  # in a file without it, transformers has none
    if path.exists():
        settings = json.loads(path.read_text(encoding="utf-8"))
    settings.pop("stop_strings", None)  # transformers minds an empty list
    write_json(path, settings | ({"stop_strings": stop_strings} if stop_strings else {}))


# What a resumed run needs of the trainer beside weights and optimizer, and the settings that may
# change in between because no later update depends on them.
COUNTERS = (
    *("step", "update_step", "rollout", "last_sync", "bad_updates", "elapsed", "unreported"),
    *("drawn", "reward_moments", "kl_coeff", "measured_factor"),
)
MAY_CHANGE = {
    *("resume", "overwrite", "max_hours", "logging_steps", "log_jsonl", "log_completions"),
    *("report_to", "save_steps", "save_total_limit", "eval_steps", "eval_samples", "run_name"),
    *("eval_every_updates", "eval_subset_size", "eval_max_new_tokens", "output_dir"),
    *("closing_note", "rollout_batch_size", "micro_batch_tokens", "gradient_checkpointing"),
    *("wired_limit_gb", "cache_limit_gb", "memory_limit_gb", "use_compile"),
    *("max_ckpt_gb", "save_best", "early_stopping_patience", "watchdog_window"),
    *("remote_rm_url", "reward_timeout", "reward_workers"),
}


def position(trainer: Any) -> dict[str, Any]:
    """Where the run is between two updates, as JSON: all of its state that is not an array."""
    log = trainer.log
    return {
        **{name: getattr(trainer, name) for name in COUNTERS},
        **{"history": list(log.history), "pending": list(log.pending)},
        **{"watched": log.watched, "notes": list(log.notes)},
        "log_bytes": log.path.stat().st_size if log.path.exists() else 0,
        "random": random_states(),
    }


def random_states() -> dict[str, Any]:
    """Of Python, NumPy and MLX: sampling has its own keys, but reward functions may draw."""
    import mlx.core as mx

    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, keys.tolist(), *rest],  # type: ignore[union-attr]
        "mlx": np.array(mx.random.state[0]).tolist(),  # type: ignore[index]
    }


def seed_random_states(seed: int) -> None:
    import mlx.core as mx

    random.seed(seed)
    np.random.seed(np.random.SeedSequence(seed).generate_state(8))
    mx.random.seed(seed)


def restore_random_states(states: dict[str, Any]) -> None:
    import mlx.core as mx

    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(states["numpy"]))
    high, low = states["mlx"]
    mx.random.seed(high << 32 | low)


def save(path: Path, trainer: Any) -> None:
    """Write the trainer as a checkpoint folder: model or adapters, and its state.

    Raises:
        RunError: the disk refuses, or the weights are broken; older checkpoints are untouched.
    """
    refuse_broken(trainer)
    arrays = state_arrays(trainer)
    weights = flat(trainer.model.parameters() if trainer.loaded.train_type == "full" else {})
    refuse_full_disk(path, sum(x.nbytes for x in (*arrays.values(), *weights.values())))
    with written_aside(path) as folder:
        if trainer.loaded.train_type == "full":
            write_trained_model(folder, trainer, trainer.model, trainer.loaded.config)
        else:
            write_adapters(folder, trainer.model, trainer.loaded.adapter_config)
        made_with = {"config": settings.recorded(trainer.args), **fingerprints(trainer)}
        made_with["halved"] = planning.halved_sizes(trainer)  # also in an update that was dropped
        write_state(folder, trainer.position | made_with, arrays)
        seal(folder)
        if trainer.log.path.exists():
            _flush(trainer.log.path)  # the log must not be behind a checkpoint that counts on it


def fingerprints(trainer: Any) -> dict[str, Any]:
    """Of the data, the model that training starts from, and the files of own reward functions."""
    return {
        "data_sha256": trainer.data_sha256,
        "model_sha256": trainer.loaded.fingerprint,
        "rewards_sha256": rewarding.code(trainer.args),
    }


def refuse_broken(trainer: Any) -> None:
    """A checkpoint of weights that are not numbers would push out one that can be gone on from."""
    import mlx.core as mx

    arrays = flat(trainer.model.trainable_parameters()) | trainer.optimizer.arrays()
    broken = [n for n, x in arrays.items() if not mx.isfinite(x).all().item()]
    if broken:
        raise RunError(f"the weights are no longer finite numbers ({broken[0]}): not saved")


def refuse_full_disk(path: Path, needed: int) -> None:
    """Before a byte is written: a full disk would hit everything else that writes, too."""
    with disk_errors_named(path):
        free = shutil.disk_usage(nearest_existing(path.parent)).free
    if free < needed:
        raise DiskError(path, f"it needs {readable(needed)}, and {readable(free)} are free")


def flat(tree: Any) -> dict[str, Any]:
    """Dotted name -> array."""
    from mlx.utils import tree_flatten

    return dict(tree_flatten(tree))


def state_arrays(trainer: Any) -> dict[str, Any]:
    """The optimizer's state, and a sampling policy that is stale."""
    arrays = {f"optimizer.{name}": x for name, x in trainer.optimizer.arrays().items()}
    weights = flat(trainer.model.trainable_parameters())
    if trainer.model_old is not None and trainer.args.sync_every_updates > 1:
        for name, value in flat(trainer.model_old.parameters()).items():
            if trainer.loaded.train_type == "full" or name in weights:
                arrays[f"old.{name}"] = value
    if trainer.args.ref_sync_updates:  # a reference that moves
        for name, value in flat(trainer.ref_model.parameters()).items():
            if name in weights:
                arrays[f"reference.{name}"] = value
    return arrays


def load(folder: Path, trainer: Any) -> None:
    """Bring a fresh trainer to where the checkpoint was written.

    Raises:
        UserError: a setting that would change the rest of the run differs; a checkpoint that its
            manifest calls whole, but that this trainer can't have written.
    """
    try:
        restore(folder, trainer)
    except UserError:
        raise
    except Exception as error:  # a manifest is no signature: anybody can write a checkpoint
        detail = f"{type(error).__name__}: {str(error)[:500]}"
        raise UserError(f"resume: checkpoint {folder} cannot be read: {detail}") from error


def restore(folder: Path, trainer: Any) -> None:
    import mlx.core as mx

    counters, arrays = read_state(folder)
    check_position(counters, trainer)
    before = counters.pop("config")
    refuse_changes(before, trainer.args)
    refuse_other_sources(counters, trainer, folder)
    trainer.position = counters
    trainer.log.history, trainer.log.pending = [*counters["history"]], [*counters["pending"]]
    trainer.log.watched, trainer.log.notes = counters["watched"], [*counters["notes"]]
    for name in COUNTERS:
        setattr(trainer, name, counters[name])
    trainer.saved_at = trainer.update_step
    if trainer.measured_factor != 1:
        planning.apply_factor(trainer)
    planning.keep_halved(trainer, before, counters.pop("halved", {}))
    restore_random_states(counters["random"])
    kind = "model" if trainer.loaded.train_type == "full" else "adapters"
    for file in sorted(folder.glob(f"{kind}*.safetensors")):
        load_weights(trainer.model, dict(mx.load(str(file))))  # type: ignore[arg-type]
    parts: dict[str, dict] = {"optimizer": {}, "old": {}, "reference": {}}
    for name, value in arrays.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = value
    trainer.optimizer.load(parts["optimizer"])
    if parts["reference"]:
        load_weights(trainer.ref_model, parts["reference"])
    if parts["old"]:
        trainer.model_old = trainer.copy_policy()
        load_weights(trainer.model_old, parts["old"])


def refuse_other_sources(before: dict[str, Any], trainer: Any, folder: Path) -> None:
    """Data, and a base or reference, that the checkpoint does not belong to.

    Own reward functions may change, since one that failed has to be mended (`resumptions` says so).
    """
    now = fingerprints(trainer)
    if not isinstance(before.pop("rewards_sha256", {}), dict):
        raise ValueError("rewards_sha256 is no table")
    if before.pop("data_sha256") != now["data_sha256"]:
        raise UserError(
            f"resume: {trainer.args.dataset} has changed since {folder} was written: put the old "
            "training data back, or start anew in another output_dir"
        )
    part = "reference" if trainer.loaded.train_type == "full" else "base of the adapters"
    used = part != "reference" or trainer.ref_model is not None  # or all weights are in the folder
    if before.pop("model_sha256", now["model_sha256"]) != now["model_sha256"] and used:
        raise UserError(
            f"resume: {trainer.args.model_name}, the {part}, has changed since {folder} was "
            "written: put the old model back, or start anew in another output_dir"
        )


def check_position(counters: dict[str, Any], trainer: Any) -> None:
    """Raise ValueError where a counter is not of the kind that the trainer keeps, or impossible."""
    for name in COUNTERS:
        value, kind = counters[name], type(getattr(trainer, name))
        right = type(value) is int if kind is int else isinstance(value, int | float)
        if kind in (int, float) and not (right and 0 <= value < 2**31):
            raise ValueError(f"{name} = {shown(value)}")
    if type(counters["log_bytes"]) is not int or counters["log_bytes"] < 0:
        raise ValueError(f"log_bytes = {shown(counters['log_bytes'])}")
    for name in ("history", "pending"):
        if not all(isinstance(record, dict) for record in [*counters[name]]):
            raise ValueError(f"{name} = {shown(counters[name])}")


def load_weights(model: Any, weights: dict[str, Any]) -> None:
    """MLX takes a matrix of another shape, and reads beyond it where ids are looked up in it."""
    known = flat(model.parameters())
    for name, value in weights.items():
        if name not in known or value.shape != known[name].shape:
            raise ValueError(f"{shown(name)} of shape {value.shape} is no part of the model")
    model.load_weights(list(weights.items()), strict=False)


def changes(before: dict[str, Any], config: Any) -> dict[str, tuple[Any, Any]]:
    """Setting -> (before, now) where they differ; one that was not known yet had its default."""
    before = settings.recorded(type(config)()) | before
    now = settings.recorded(config)
    return {name: (before[name], now[name]) for name in now if before[name] != now[name]}


def refuse_changes(before: dict[str, Any], config: Any) -> None:
    changed = [
        f"{name} (was {old!r}, is {new!r})"
        for name, (old, new) in changes(before, config).items()
        if name not in MAY_CHANGE
    ]
    if changed:
        raise UserError(
            f"resume: these settings differ from the run's: {', '.join(changed)}; set them back, "
            "or start anew in another output_dir"
        )


def open_run(
    trainer: Any, lock: RunLock, resume_from: Path | None, repo: Path
) -> list[dict[str, Any]]:
    """Make the folder this run's: claim it, rewind its log, record settings and versions.

    Returns the records of the log that the run goes on with.
    """
    config, folder = trainer.args, trainer.output_dir
    stays = resume_from is not None and in_folder(resume_from, folder)
    claim(folder, overwrite=config.overwrite and not stays, lock=lock)
    clear_leftovers(folder, resume_from, trainer.step)
    provenance: dict[str, Any] = {
        **runtime.provenance(repo),
        "seed": config.seed,
        **fingerprints(trainer),
    }
    if resume_from is not None:
        provenance["resumed"] = resumptions(trainer, resume_from, folder)
        if not trainer.log.path.exists() and (resume_from.parent / LOG).exists():
            shutil.copy(resume_from.parent / LOG, trainer.log.path)  # from another output_dir
    else:
        seed_random_states(config.seed)
    rewind_log(trainer.log.path, trainer.position.get("log_bytes", 0))
    records: list[dict[str, Any]] | None = None
    if trainer.log.path.exists():
        records = without_torn_line(trainer.log.path, trainer.update_step)
    tracking.rewind(folder, records, reported(trainer))
    write_json(folder / CONFIG, settings.recorded(config))
    write_json(folder / PROVENANCE, provenance)
    return records or []


def reported(trainer: Any) -> int:
    """The last update whose records were written before the position that the run goes on from."""
    if not trainer.position:
        return -1
    return int(trainer.unreported[0][1] if trainer.unreported else trainer.update_step)


def resumptions(trainer: Any, resume_from: Path, folder: Path) -> list[dict[str, Any]]:
    """For the record: where this run and those before it went on, and with what changed."""
    before = json.loads((resume_from / STATE).read_text(encoding="utf-8"))
    changed = {n: v for n, v in changes(before["config"], trainer.args).items() if n != "resume"}
    say(f"resume    {resume_from} at update {trainer.update_step}")
    for name, (old, new) in changed.items():
        say(f"          {name} was {old!r}, is {new!r}")
    rewards = before.get("rewards_sha256", {})
    for name, new in rewarding.code(trainer.args).items():
        if (old := rewards.get(name, new)) != new:
            changed[name] = old, new
            text = f"the rewards of {name} have changed since {resume_from.name} was written"
            say(f"warning   {text}")
            trainer.log.notes.append(f"update {trainer.update_step}: {text}")
    earlier: list[dict[str, Any]] = []
    with contextlib.suppress(OSError, ValueError, LookupError):
        earlier = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))["resumed"]
    now = {"from": resume_from.name, "update": trainer.update_step, "changed": changed}
    return [*earlier, now]


def keep_best(trainer: Any) -> None:
    """Write `best/` if the newest evaluation beats all before it, the one before training too."""
    *earlier, newest = trainer.log.history
    known = [record["em"] for record in earlier if not math.isnan(record["em"])]
    if not earlier or not newest["em"] > max(known, default=-math.inf):
        return
    with written_aside(trainer.output_dir / "best") as folder:
        if trainer.loaded.train_type == "full":
            write_trained_model(folder, trainer, trainer.model, trainer.loaded.config)
        else:
            write_adapters(folder, trainer.model, trainer.loaded.adapter_config)
        write_json(folder / "evaluation.json", newest)
    score = trainer.log.score_text(newest["em"])
    say(f"best      {score} at update {newest['update']}, kept in {trainer.output_dir / 'best'}")


def write_trained_model(
    folder: Path, trainer: Any, model: Any, config: dict[str, Any], *, donate: bool = False
) -> None:
    write_model(folder, model, trainer.tokenizer, config, trainer.loaded.folder, donate=donate)
    write_stop_strings(folder, trainer.args.stop_strings, trainer.tokenizer.eos_token_ids)


def write_fused(folder: Path, trainer: Any) -> None:
    """Write the model with its adapters merged, at full precision.

    Merged into 4-bit weights again, most of what was learnt would be rounded away.
    """
    from mlx.utils import tree_unflatten
    from mlx_lm.utils import dequantize_model

    fused = copy.deepcopy(trainer.model)
    merged = [(n, m.fuse(dequantize=True)) for n, m in fused.named_modules() if "lora_a" in m]
    fused.update_modules(tree_unflatten(merged))
    fused = dequantize_model(fused)
    config = dict(trainer.loaded.config)
    config.pop("quantization", None)
    config.pop("quantization_config", None)
    write_trained_model(folder, trainer, fused, config, donate=True)
    write_adapters(folder / "adapters", trainer.model, trainer.loaded.adapter_config)
