"""The folder of a run: found, locked, gone on with or made new."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..base.say import say
from ..base.script import ROOT
from ..device import ranks, runtime
from ..rewards.about import about
from ..settings import reading
from ..settings.run_settings import Settings
from . import checkpoints, completions, consent, folders, in_step, introduction, trackers
from .lock import RunLock
from .run import Trainer


@dataclass
class Place:
    """A folder that no other run holds, and the checkpoint to go on from."""

    lock: RunLock | None
    """None: rank 0 of several holds it."""
    resume_from: Path | None
    finished: bool = False
    """The run there had come to its end: there is nothing to do."""


@contextmanager
def locked(config: Settings, command: str) -> Iterator[Place]:
    """The run's folder, as long as the block lasts. Nothing is written yet.

    Raises:
        UserError: another run holds it, or it can't be written or gone on with.
    """
    folder, us = Path(config.output_dir), ranks.here()
    if us.rank:  # rank 0 looks after the folder
        (resume_from, finished, vars(config)["started_on"]), *_ = us.all_say(None)
        yield Place(None, Path(resume_from) if resume_from else None, finished)
        return
    with RunLock(folder) as lock:
        with folders.as_user_error(folder, "output_dir"):
            place = find_place(config, folder, command, lock)
        if not place.finished and (note := runtime.keep_compiled_kernels()):
            say(f"speed     {note}")
        resume_from = str(place.resume_from) if place.resume_from else None
        us.all_say([resume_from, place.finished, config.started_on])
        yield place


def find_place(config: Settings, folder: Path, command: str, lock: RunLock) -> Place:
    """Where the run begins, in a folder that nobody else holds."""
    folders.check_output(folder, command, config)
    if config.resume == "auto" and folders.is_finished(folder, config):
        say(f"finished  the run in {folder} was complete: see {folder / 'final'}")
        return Place(lock, None, finished=True)
    resume_from = folders.to_resume(folder, config.resume) if config.resume else None
    if resume_from is None:
        consent.refuse_without(command, config, {})
    else:
        checkpoints.keep_date(resume_from, config)
    if config.resume and resume_from is None:
        say(f"resume    there is no checkpoint in {folder} to go on from: the run starts anew")
    return Place(lock, resume_from)


@contextmanager
def opened(trainer: Trainer, place: Place, blas: str | None) -> Iterator[None]:
    """The trainer is introduced, brought to where its run was, and recorded while the block lasts.

    Raises:
        UserError: the checkpoint does not belong to the run, or the folder can't be written.
    """
    config, run = trainer.args, trainer.run
    in_step.refuse_others(trainer)
    introduction.introduce(trainer, blas)
    resume_from = config.located(place.resume_from) if place.resume_from else None
    if resume_from:
        checkpoints.load(resume_from, trainer)
    in_step.take_weights(trainer)
    if place.lock is None:
        in_step.keep_nothing(trainer, resumed=resume_from is not None)
        yield
        return
    made_of = checkpoints.sources(trainer)
    run.rewards_say = about(trainer.reward_funcs)
    records = checkpoints.open_run(run, made_of, place.lock, resume_from, ROOT)
    if config.keep_completions != "none":
        run.completions = completions.Completions(
            config,
            run.state,
            run.folder,
            trainer.loaded.tokenizer,
            trainer.rewards.prompt_texts,
            {"train": trainer.train_dataset, "test": trainer.eval_dataset},
            lambda: trainer.reward_funcs,
        )
    run.log.tracker = trackers.make_tracker(
        config.report_to,
        run.folder,
        config.run_name,
        reading.recorded(config),
        since=run.state.update_step if records else checkpoints.reported(run) + 1,
        records=records,
        note=run.log.note,
    )
    try:
        yield
    finally:
        run.log.tracker.close()
        run.completions.close()
