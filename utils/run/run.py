"""A run: what it keeps and shows, and what falls due after an update."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import mlx.nn as nn

from ..base.errors import RunError
from ..base.say import say
from ..data.completion import Completion
from ..data.files import Row
from ..device import ranks
from ..gradient.adamw import AdamW
from ..gradient.scorer import Scorer
from ..memory.memory import Memory
from ..memory.meter import Meter
from ..model.loading import LoadedModel
from ..model.served_prompt import ServedPrompt
from ..rewards.calls import Reward
from ..rewards.rewards import Rewards
from ..rollouts.sampler import Sampling
from ..settings.run_settings import Settings
from . import completions, course, folders, progress
from .log import RolloutFigures, RunLog
from .state import Record, State, random_states
from .warnings_of_learning import is_known

MOST_BAD_UPDATES = 5


def due(every: int, before: int, now: int) -> bool:
    """Whether an action of every so many steps falls due between two counts (0: never)."""
    return every > 0 and now // every > before // every


class Interrupted(Exception):
    """A signal asked the run to stop: the unfinished update is dropped."""


class Run:
    """The folder, the log, what is shown of the progress, and where the run is.

    `between` is the state as it was between two updates, from which a run that is stopped goes on;
    None before the first.
    """

    def __init__(self, args: Settings, command: str, meter: Meter) -> None:
        self.args, self.command, self.meter = args, command, meter
        self.folder = args.located(args.output_dir)
        self.state = State(kl_coeff=args.kl_coeff)
        self.between: State | None = None
        self.log = RunLog(args, self.state, self.folder)
        self.completions: completions.Store = completions.NoStore()
        self.progress: progress.RunProgress | progress.NoProgress = progress.NoProgress()
        self.activity = ""
        self.interrupted = False
        self.saved_at = 0
        self.without_reward = 0  # updates in a row in which no reward function applied
        self.apart = False  # ranks have been seen to differ in their weights
        self.moved = False  # weights have changed since `between`
        self.prompt: ServedPrompt | None = None  # what folders of models say of it
        self.rewards_say: dict[str, str] = {}  # what reward functions say of themselves, by name

    def pulse(self, phase: str) -> None:
        """Between blocks of work: show that it goes on, and stop if a signal asked for it, or what
        is done beside it has failed."""
        self.progress.stage(self.activity or phase)
        if self.interrupted:
            raise Interrupted
        self.completions.check()
        ranks.here().check()

    @contextmanager
    def doing(self, activity: str) -> Iterator[None]:
        """What the block samples or scores is no part of an update, and is shown by this name."""
        self.activity = activity
        self.progress.stage(activity)
        try:
            yield
        finally:
            self.activity = ""

    @contextmanager
    def showing(self, total: int) -> Iterator[None]:
        """Show how far the run is of so many updates, as long as the block lasts."""
        shown = progress.RunProgress(self.log, self.meter, total, self.args.quiet)
        with shown:
            self.progress = shown
            try:
                yield
            finally:
                self.progress = progress.NoProgress()

    def refuse_to_go_beyond(self, total: int) -> None:
        """Raises RunError after the last update, which a step by hand may try."""
        if self.state.update_step >= total:
            raise RunError(f"all {total:,} updates are done: set max_updates or num_epochs higher")

    def mark(self, unreported: tuple[tuple[int, int], list[Record]] | None = None) -> None:
        """Note that this is between two updates: a run that is stopped goes on from here."""
        path, self.state.unreported = self.log.path, unreported
        self.state.log_bytes = path.stat().st_size if path.exists() else 0
        self.state.random = random_states()
        self.between, self.moved = self.state.copied(), False

    def halved(self, text: str) -> None:
        """Memory ran out: for the log, and for the checkpoint of a run that stops here, even if
        there is one."""
        self.saved_at = -1
        self.state.notes.append(f"after update {self.state.update_step}: {text}")

    def after_update(
        self, trainer: "Trainer", before: tuple[int, int], records: list[Record]
    ) -> None:
        """Log, evaluate and save whatever falls due between (step, update) `before` and now.

        Raises:
            RunError: five updates in a row were not finite, or, if set, without any reward.
        """
        a, state, (step, update) = self.args, self.state, before
        if update == 0:
            progress.warn_of_kl(records[0]["kl"], trainer.loaded.train_type)
            self.log.warn_of_no_value(trainer.train_dataset, trainer.rollout, trainer.reward_funcs)
        self.show(trainer, records, state.update_step - update)
        self.write(trainer, before)
        if due(a.eval_every_updates, update, state.update_step):
            trainer.evaluate("train")
        last = state.update_step >= trainer.total_updates  # after it, an evaluation ends the run
        if due(a.eval_steps, step, state.step) and not last:
            trainer.evaluate("test")
        self.mark()
        if due(a.save_steps, step, state.step) and self.saved_at < state.update_step:
            with self.doing("saving"):
                trainer.save_checkpoint(self.checkpoint())
            self.prune()
        self.refuse_to_waste(records)

    def write(self, trainer: "Trainer", before: tuple[int, int]) -> None:
        """The record that falls due, and what trackers show beside it."""
        a, state, rollout, (step, update) = self.args, self.state, trainer.rollout, before
        names = [*trainer.reward_funcs]
        if due(a.logging_steps, step, state.step):
            self.log.training(self.meter.report())
            if rollout:
                shown = trainer.rewards.shown()
                self.log.completions(trainer.train_dataset, rollout, names, shown)
        if due(a.plot_every, update, state.update_step) and rollout:
            self.log.pictures(trainer.train_dataset, rollout, names)

    def refuse_to_waste(self, records: list[Record]) -> None:
        """Raises RunError after five updates in a row that taught nothing: see `after_update`."""
        known = is_known(records[-1].get("reward_mean"))
        self.without_reward = 0 if known else self.without_reward + len(records)
        if self.args.stop_without_reward and self.without_reward >= MOST_BAD_UPDATES:
            raise RunError(
                "no reward function gave any completion of the last five updates a value "
                "(stop_without_reward = true)"
            )
        if self.state.bad_updates >= MOST_BAD_UPDATES:
            raise RunError(
                "five updates in a row were not finite: lower the learning rate, or try "
                "dtype = float32"
            )

    def show(self, trainer: "Trainer", records: list[Record], updates: int) -> None:
        """As progress; the log gets its record when one is due."""
        self.state.pending += records
        self.state.course = course.extended(self.state.course, records)
        self.log.watch(records)
        self.progress.update(records, updates, trainer)

    def shown(self, path: Path) -> Path:
        """A path in the run's folder as the person wrote that."""
        return Path(self.args.output_dir) / path.relative_to(self.folder)

    def checkpoint(self) -> Path:
        """Where the state between two updates is saved."""
        return self.folder / f"checkpoint-{(self.between or self.state).step}"

    def prune(self) -> None:
        if not ranks.here().rank:
            folders.prune(self.folder, self.args.save_total_limit, self.args.max_ckpt_gb)

    def say_newest(self) -> None:
        found = folders.found(self.folder)
        if found:
            say(f"          {self.shown(found[-1])} is untouched. To continue from there:")
            say(f"          {self.command} --resume")


class Trainer(Protocol):
    """The script's trainer, as checkpoints, the introduction and the end of a run see it."""

    loaded: LoadedModel
    model: nn.Module
    model_old: nn.Module | None
    ref_model: nn.Module | None
    optimizer: AdamW
    scorer: Scorer
    memory: Memory
    run: Run
    train_dataset: list[Row]
    eval_dataset: list[Row]
    data_sha256: str
    total_updates: int
    quantizes: bool
    rewards: Rewards
    reward_funcs: dict[str, Reward]

    @property
    def args(self) -> Settings: ...
    @property
    def rollout(self) -> RolloutFigures | None: ...
    @property
    def sampling(self) -> Sampling: ...
    def how(self, temperature: float, max_tokens: int) -> Sampling: ...
    def answers(
        self, questions: list[Row], temperature: float = 0.0, model: nn.Module | None = None
    ) -> list[Completion]: ...
    def copy_policy(self) -> nn.Module: ...
    def evaluate(self, split: str = "test") -> float: ...
    def evaluate_em(self, dataset: list[Row], samples: int = 0, **how: Any) -> float: ...
    def save_checkpoint(self, path: Path) -> None: ...
