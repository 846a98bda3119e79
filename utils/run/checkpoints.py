"""Checkpoint folders: written aside, flushed, renamed, with a manifest to tell damage by."""

import contextlib
import copy
import json
import math
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from ..base.errors import (
    RunError,
    UserError,
)
from ..base.say import say
from ..base.text import shown
from ..device import runtime
from ..memory import this_machine
from ..model.writing import (
    flat,
    load_weights,
    write_adapters,
    write_json,
    write_model,
    write_stop_strings,
)
from ..rewards import importing
from ..settings import reading
from ..settings.on_resume import changes, refuse_changes
from . import trackers
from .folders import (
    ARRAYS,
    CONFIG,
    LOG,
    PROVENANCE,
    STATE,
    _flush,
    claim,
    clear_leftovers,
    in_folder,
    refuse_full_disk,
    seal,
    written_aside,
)
from .lock import RunLock


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
    records, end = trackers.read_log(path, last=last)
    rest = path.read_bytes()[end:].strip()
    if rest and trackers.as_record(rest.partition(b"\n")[0]) is None:
        say(f"warning   the last line of {path} was cut off by a crash, and is dropped")
    os.truncate(path, end)
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" if records else "")
    return records


# What a resumed run needs of the trainer beside weights and optimizer, and the settings that may
# change in between because no later update depends on them.
COUNTERS = (
    *("step", "update_step", "rollout", "last_sync", "bad_updates", "elapsed", "unreported"),
    *("drawn", "reward_moments", "kl_coeff", "measured_factor"),
)


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
        made_with = {"config": reading.recorded(trainer.args), **sources(trainer)}
        # Also in an update that was dropped:
        made_with["halved"] = this_machine.halved_sizes(trainer)
        write_state(folder, trainer.position | made_with, arrays)
        seal(folder)
        if trainer.log.path.exists():
            _flush(trainer.log.path)  # the log must not be behind a checkpoint that counts on it


def sources(trainer: Any) -> dict[str, Any]:
    """Of the data, the model that training starts from, and the files of own reward functions."""
    return {
        "data_sha256": trainer.data_sha256,
        "model_sha256": trainer.loaded.fingerprint,
        "rewards_sha256": importing.code(trainer.args),
    }


def refuse_broken(trainer: Any) -> None:
    """A checkpoint of weights that are not numbers would push out one that can be gone on from."""
    import mlx.core as mx

    arrays = flat(trainer.model.trainable_parameters()) | trainer.optimizer.arrays()
    broken = [n for n, x in arrays.items() if not mx.isfinite(x).all().item()]
    if broken:
        raise RunError(f"the weights are no longer finite numbers ({broken[0]}): not saved")


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
        this_machine.apply_factor(trainer)
    this_machine.keep_halved(trainer, before, counters.pop("halved", {}))
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
    now = sources(trainer)
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
        **sources(trainer),
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
    trackers.rewind(folder, records, reported(trainer))
    write_json(folder / CONFIG, reading.recorded(config))
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
    for name, new in importing.code(trainer.args).items():
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
