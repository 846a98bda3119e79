"""Checkpoints: a complete model folder, or adapters, with everything that a run goes on with."""

import contextlib
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

import mlx.core as mx

from ..base.errors import DiskError, RunError, UserError, disk_errors_named
from ..base.json_files import write_json
from ..base.say import say
from ..device import ranks, runtime
from ..model import served_prompt
from ..model.writing import (
    flat,
    load_weights,
    write_adapters,
    write_fused,
    write_trained,
)
from ..rewards import importing
from ..settings import reading
from ..settings.on_resume import changes, refuse_changes
from ..settings.run_settings import Settings
from . import completions, consent, in_step, ours, trackers
from .folders import (
    claim,
    clear_leftovers,
    drop_replaced,
    flush,
    free_name,
    in_folder,
    refuse_full_disk,
    seal,
    written_aside,
)
from .lock import RunLock
from .ours import ARRAYS, CONFIG, LOG, PROVENANCE, STATE
from .run import Run, Trainer
from .state import FORMAT, Record, restore_random_states, seed_random_states

Counters = Record
"""What trainer_state.json holds."""
Arrays = dict[str, mx.array]


def write_state(folder: Path, counters: Counters, arrays: Arrays) -> None:
    """Counters (JSON) and arrays by flat name."""
    mx.save_safetensors(str(folder / ARRAYS), arrays)
    write_json(folder / STATE, counters)


def read_state(folder: Path) -> tuple[Counters, Arrays]:
    counters = json.loads((folder / STATE).read_text(encoding="utf-8"))
    arrays: Arrays = mx.load(str(folder / ARRAYS))  # type: ignore[assignment]
    return counters, arrays


def sources(trainer: Trainer) -> dict[str, object]:
    """Fingerprints: of the data, the model that training starts from, own reward functions."""
    return {
        "data_sha256": trainer.data_sha256,
        "model_sha256": trainer.loaded.fingerprint,
        "rewards_sha256": importing.code(trainer.args),
    }


def save(path: Path, trainer: Trainer) -> None:
    """Write the state between two updates as a checkpoint folder.

    Raises:
        RunError: the disk refuses, or the weights are broken; older checkpoints are untouched.
    """
    run, loaded = trainer.run, trainer.loaded
    assert run.between is not None, "`run.mark` comes first"
    if ranks.here().rank:  # rank 0 writes
        run.saved_at = run.between.update_step
        return
    arrays = state_arrays(trainer)
    weights = flat(trainer.model.parameters() if loaded.train_type == "full" else {})
    refuse_broken(flat(trainer.model.trainable_parameters()) | trainer.optimizer.arrays())
    needed = sum(x.nbytes for x in (*arrays.values(), *weights.values()))
    try:
        refuse_full_disk(path, needed)
    except DiskError:
        if not drop_replaced(run.folder):
            raise
        refuse_full_disk(path, needed)
    # What was halved in an update that was dropped need not be found out again.
    state = dataclasses.replace(run.between, halved=run.state.halved)
    made_with = {"format": FORMAT, "config": reading.recorded(trainer.args), **sources(trainer)}
    made_with["started_on"] = trainer.args.started_on
    with written_aside(path) as folder:
        write_learnt(folder, trainer)
        write_state(folder, vars(state) | made_with, arrays)
        seal(folder)
        if run.log.path.exists():
            flush(run.log.path)  # the log must not be behind a checkpoint that counts on it
        for file in run.completions.files():
            flush(file)
    drop_replaced(run.folder)
    run.saved_at = run.between.update_step


def save_now(path: Path, trainer: Trainer) -> None:
    """Write the state as it is.

    Raises:
        RunError: as `save`, or an update was stopped halfway, so that the weights are not those of
            the counters.
    """
    run = trainer.run
    if run.moved:
        raise RunError(f"{path} was not saved: an update was stopped halfway; load a checkpoint")
    run.mark()
    in_step.compare_weights(trainer)
    save(path, trainer)


def write_learnt(folder: Path, trainer: Trainer) -> None:
    """The whole model, or the adapters of one, with the prompt that it is trained with."""
    loaded = trainer.loaded
    if loaded.train_type == "full":
        write_trained(folder, loaded, trainer.model, loaded.config, trainer.args.stop_strings)
    else:
        write_adapters(folder, trainer.model, loaded.adapter_config)
    served_prompt.write(folder, prompt_of(trainer))


def prompt_of(trainer: Trainer) -> served_prompt.ServedPrompt:
    """Found once, since some prompts are rendered to see whether programs ask in the same way."""
    if trainer.run.prompt is None:
        tokenizer, rows = trainer.loaded.tokenizer, trainer.train_dataset
        trainer.run.prompt = served_prompt.of_run(tokenizer, trainer.args, rows)
    return trainer.run.prompt


def write_final(folder: Path, trainer: Trainer) -> None:
    """The model that a person wants: adapters merged, and kept beside it."""
    if trainer.loaded.train_type == "full":
        write_learnt(folder, trainer)
        return
    write_fused(folder, trainer.loaded, trainer.model, trainer.args.stop_strings)
    write_learnt(folder / "adapters", trainer)
    served_prompt.write(folder, prompt_of(trainer))


def refuse_broken(arrays: Arrays) -> None:
    """A checkpoint of weights that are not numbers would push out one that can be gone on from."""
    broken = [n for n, x in arrays.items() if not mx.isfinite(x).all().item()]
    if broken:
        raise RunError(f"the weights are no longer finite numbers ({broken[0]}): not saved")


def state_arrays(trainer: Trainer) -> Arrays:
    """The optimizer's state, and weights of policies that are not as the learner's are."""
    a = trainer.args
    arrays = {f"optimizer.{name}": x for name, x in trainer.optimizer.arrays().items()}
    weights = flat(trainer.model.trainable_parameters())
    if trainer.model_old is not None and a.sync_every_updates > 1:
        old = flat(trainer.model_old.parameters())
        names = old if trainer.loaded.train_type == "full" else old.keys() & weights
        arrays |= {f"old.{name}": old[name] for name in names}
    if trainer.ref_model is not None and a.ref_sync_updates:  # a reference that moves
        reference = flat(trainer.ref_model.parameters())
        arrays |= {f"reference.{name}": reference[name] for name in reference.keys() & weights}
    return arrays


def keep_date(folder: Path, config: Settings) -> None:
    """The run that goes on from a checkpoint began when that one's did: see `chat_ids`."""
    with contextlib.suppress(ValueError, TypeError):  # none in it, or none that is one
        began = ours.read_object(folder / STATE).get("started_on")
        vars(config)["started_on"] = datetime.fromisoformat(began).isoformat()  # type: ignore[arg-type]


def load(folder: Path, trainer: Trainer) -> None:
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


def restore(folder: Path, trainer: Trainer) -> None:
    us = ranks.here()
    counters, arrays = ({}, {}) if us.rank else read_state(folder)
    counters, arrays = us.all_say(counters)[0], us.of_first(arrays)
    run, config = trainer.run, trainer.args
    run.state.take(counters)
    refuse_changes(counters["config"], config)
    refuse_other_sources(counters, trainer, folder)
    trainer.memory.go_on(counters["config"], reading.recorded(config))
    run.between, run.saved_at = run.state.copied(), run.state.update_step
    restore_random_states(run.state.random)
    restore_weights(folder, trainer, arrays)


def restore_weights(folder: Path, trainer: Trainer, arrays: Arrays) -> None:
    kind = "model" if trainer.loaded.train_type == "full" else "adapters"
    for file in sorted(folder.glob(f"{kind}*.safetensors")):  # rank 0's go to all: see opening
        weights: Arrays = mx.load(str(file))  # type: ignore[assignment]
        load_weights(trainer.model, weights)
    parts: dict[str, Arrays] = {"optimizer": {}, "old": {}, "reference": {}}
    for name, value in arrays.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = value
    trainer.optimizer.load(parts["optimizer"])
    if parts["reference"] and trainer.ref_model is not None:
        load_weights(trainer.ref_model, parts["reference"])
    if parts["old"]:
        trainer.model_old = trainer.copy_policy()
        load_weights(trainer.model_old, parts["old"])


def refuse_other_sources(before: Counters, trainer: Trainer, folder: Path) -> None:
    """Data, and a base or reference, that the checkpoint does not belong to.

    Own reward functions may change, since one that failed has to be mended (`resumptions` says so).
    """
    now = sources(trainer)
    if not isinstance(before.get("rewards_sha256", {}), dict):
        raise ValueError("rewards_sha256 is no table")
    if before["data_sha256"] != now["data_sha256"]:
        raise UserError(
            f"resume: {trainer.args.dataset} has changed since {folder} was written: put the old "
            "training data back, or start anew in another output_dir"
        )
    part = "reference" if trainer.loaded.train_type == "full" else "base of the adapters"
    used = part != "reference" or trainer.ref_model is not None  # or all weights are in the folder
    if before.get("model_sha256", now["model_sha256"]) != now["model_sha256"] and used:
        raise UserError(
            f"resume: {trainer.args.model_name}, the {part}, has changed since {folder} was "
            "written: put the old model back, or start anew in another output_dir"
        )


def rewind_log(path: Path, size: int) -> None:
    """Cut the log to what it was when the checkpoint was made: the run writes the rest again."""
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size < size:
            say(f"warning   {path} lacks records from before the checkpoint")
        else:
            os.truncate(path, size)


def without_torn_line(path: Path, last: int) -> list[Record]:
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


def open_run(
    run: Run, made_of: Mapping[str, object], lock: RunLock, resume_from: Path | None, repo: Path
) -> list[Record]:
    """Make the folder this run's: claim it, rewind its log, record settings and versions.

    Returns the records of the log that the run goes on with. `made_of`: see `sources`.
    """
    config, folder, log = run.args, run.folder, run.log.path
    stays = resume_from is not None and in_folder(resume_from, folder)
    take_over(run, made_of, lock, resume_from if stays else None)
    provenance = {**runtime.provenance(repo), "seed": config.seed, **made_of}
    provenance["rewards"] = run.rewards_say
    if resume_from is not None:
        provenance["resumed"] = resumptions(run, resume_from)
        bring_log(resume_from.parent / LOG, log)
        with disk_errors_named(folder / completions.FOLDER):
            completions.bring(resume_from.parent, folder)
    else:
        seed_random_states(config.seed)
    groups, log_bytes = (run.state.groups_kept, run.state.log_bytes) if run.between else (0, 0)
    completions.rewind(folder, groups)
    rewind_log(log, log_bytes)
    records = without_torn_line(log, run.state.update_step) if log.exists() else None
    if stays or config.resume:  # also where a run was killed before its first checkpoint
        trackers.rewind(folder, records, reported(run))
    for name, value in ((CONFIG, reading.recorded(config)), (PROVENANCE, provenance)):
        keep_damaged(folder / name)
        write_json(folder / name, value)
    return records or []


def bring_log(theirs: Path, log: Path) -> None:
    """Of a checkpoint in another output_dir."""
    if theirs.exists() and not log.exists():
        shutil.copy(theirs, log)


def take_over(run: Run, made_of: Mapping[str, object], lock: RunLock, goes_on: Path | None) -> None:
    """Claim the folder, in which a run is gone on with (from a checkpoint there) or replaced."""
    config, folder = run.args, run.folder
    if goes_on is None:
        consent.refuse_without(run.command, config, made_of)
    shown = Path(config.output_dir)
    claim(folder, overwrite=config.overwrite and goes_on is None, lock=lock, shown=shown)
    clear_leftovers(folder, goes_on, run.state.step)
    if goes_on is not None:
        drop_replaced(folder)
    else:
        keep_damaged(run.log.path)


def keep_damaged(path: Path) -> None:
    """Leave what can't be read under another name, where a new file is about to be."""
    if path.is_file() and not ours.known(path) and not ours.empty(path):
        kept = free_name(path.with_name(f"{path.name}.damaged"))
        path.rename(kept)
        say(f"warning   {path} could not be read; it is {kept.name} now")


def reported(run: Run) -> int:
    """The last update whose records were written before the state that the run goes on from."""
    if run.between is None:
        return -1
    return run.state.unreported[0][1] if run.state.unreported else run.state.update_step


def resumptions(run: Run, resume_from: Path) -> list[Record]:
    """For the record: where this run and those before it went on, and with what changed."""
    before = json.loads((resume_from / STATE).read_text(encoding="utf-8"))
    changed = {n: v for n, v in changes(before["config"], run.args).items() if n != "resume"}
    update = run.state.update_step
    inside = resume_from.is_relative_to(run.folder)
    say(f"resume    {run.shown(resume_from) if inside else resume_from} at update {update}")
    for name, (old, new) in changed.items():
        say(f"          {name} was {old!r}, is {new!r}")
    rewards = before.get("rewards_sha256", {})
    for name, new in importing.code(run.args).items():
        if (old := rewards.get(name, new)) != new:
            changed[name] = old, new
            text = f"the rewards of {name} have changed since {resume_from.name} was written"
            say(f"warning   {text}")
            run.state.notes.append(f"update {update}: {text}")
    earlier = ours.read_object(run.folder / PROVENANCE).get("resumed", [])
    earlier = earlier if isinstance(earlier, list) else []
    return [*earlier, {"from": resume_from.name, "update": update, "changed": changed}]


def keep_best(trainer: Trainer) -> None:
    """Write `best/` if the newest evaluation beats all before it, the one before training too."""
    run = trainer.run
    if ranks.here().rank:
        return
    *earlier, newest = run.log.history
    known = [record["em"] for record in earlier if not math.isnan(record["em"])]
    if not earlier or not newest["em"] > max(known, default=-math.inf):
        return
    with written_aside(run.folder / "best") as folder:
        write_learnt(folder, trainer)
        write_json(folder / ours.SCORE, newest)
        ours.sign(folder)
    score, shown = run.log.score_text(newest["em"]), run.shown(run.folder / "best")
    say(f"best      {score} at update {newest['update']}, kept in {shown}")
