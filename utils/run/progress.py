"""What one sees while a run goes on: its figures, curves and stage at the bottom of a terminal, or
a line now and then where the output goes elsewhere or the window is narrow."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..base import screen
from ..base.say import say
from ..base.screen import Piece
from ..base.task_progress import NARROW, Progress, clock
from ..base.text import redact
from ..data.files import Row
from ..memory.meter import GB, Meter
from . import course
from .log import RolloutFigures, RunLog, figure
from .state import Record, State

READABLE = 1.0  # seconds that figures and samples stay
SHORT = 10  # rows below which there is one line
LABEL = 13
CURVE = 32  # columns


class Watched(Protocol):
    """Of the script's trainer: the last rollout, and what was asked."""

    train_dataset: list[Row]

    @property
    def rollout(self) -> RolloutFigures | None: ...


@dataclass
class Sample:
    """A completion of the last rollout, fit to be shown in a line."""

    reward: float
    expected: str
    text: str


class NoProgress:
    """Shows nothing, for a trainer that is used as a library."""

    def stage(self, name: str) -> None:
        pass

    def update(self, records: list[Record], updates: int, trainer: Watched) -> None:
        pass


class RunProgress(Progress):
    """Of so many updates. The count and the stage are always new; the rest is made anew at a pace
    that can be read."""

    def __init__(self, log: RunLog, meter: Meter, total: int, quiet: bool) -> None:
        state: State = log.state
        super().__init__(total, "update", done=state.update_step, quiet=quiet)
        self.log, self.state, self.meter = log, state, meter
        self.records: list[Record] = []  # since the last line
        self.last: Record | None = None
        self.trainer: Watched | None = None
        self.made: tuple[object, float, list[Sequence[Piece]]] = None, 0.0, []

    def update(self, records: list[Record], updates: int, trainer: Watched) -> None:
        """Some more are done; `trainer` has the completions they learnt from."""
        self.last, self.trainer = records[-1], trainer
        self.records += records
        self.step(updates)

    # Where nothing is drawn: the means since the last line.

    def line(self) -> str:
        records, self.records = self.records, []
        means = mean_of(records)
        parts = figures_of(means, self.log)
        if len(names_of(means)) > 1:
            parts[0] += f" ({rewards_text(means)})"
        parts += [f"{self.left()} left"] if self.done < self.total else []
        return f"update    {self.done:>6} of {self.total:,}  {', '.join(parts)}"

    # On a terminal.

    def lines(self, columns: int, rows: int) -> Sequence[Sequence[Piece]]:
        if columns < NARROW or rows < SHORT:
            brief = figures_of(self.last, self.log) if self.last else []
            return [self.head(columns, brief)]
        which, since, made = self.made
        if which != columns or time.monotonic() - since >= READABLE:
            made = [*self.curves(), *self.extremes(columns)]
            self.made = columns, time.monotonic(), made
        return [self.head(columns), *made]

    def curves(self) -> list[Sequence[Piece]]:
        assert self.block
        file, last, state = self.block.file, self.last, self.state
        lines: list[Sequence[Piece]] = []
        if last is not None:
            rewards = course.curve(state.course, "reward_mean")
            curve = screen.spark(rewards, CURVE, file)
            value = figure(last["reward_mean"], ".2f")
            lines.append(labelled("reward", value, curve))
            if len(names_of(last)) > 1:
                lines.append(labelled("", "", rewards_text(last)))
        if history := state.history[-CURVE * 2 :]:
            known = [score for r in history if not math.isnan(score := float(r["em"]))]
            whole = self.log.args.eval_metric == "em"
            curve = screen.spark(known, CURVE, file, whole)
            name, _, value = self.log.score_text(history[-1]["em"]).rpartition(" ")
            lines.append(
                labelled(name, value, f"{curve} at update {history[-1]['update']}".strip())
            )
        if last is not None:
            lines.append(labelled("", "", cost_text(last, self.meter, state.elapsed)))
        return lines

    def extremes(self, columns: int) -> list[Sequence[Piece]]:
        """The best and the worst completion of the last rollout, which end in their answer."""
        lines: list[Sequence[Piece]] = []
        samples = best_and_worst(self.trainer) if self.trainer else {}
        for name, sample in samples.items():
            style = screen.GREEN if name == "best" else screen.RED
            begin = f"{name:<{LABEL}}"
            value = f"{sample.reward:.2f} "
            asked = f"(expected {sample.expected}) "
            room = columns - 1 - screen.cells(begin + value + asked)
            text = screen.tail(sample.text, max(room, 0))
            lines.append([(begin, screen.PLAIN), (value, style), (asked + text, screen.PLAIN)])
        return lines


def labelled(name: str, value: str, rest: str) -> Sequence[Piece]:
    space = " " if value else ""
    return [
        (f"{name:<{LABEL}}", screen.PLAIN),
        (value, screen.BOLD),
        (f"{space}{rest}", screen.PLAIN),
    ]


def best_and_worst(trainer: Watched) -> dict[str, Sample]:
    """Of the last rollout, where rewards differ; the first of equal ones."""
    rollout = trainer.rollout
    if rollout is None or np.isnan(rollout.rewards).all():
        return {}
    rewards, group = rollout.rewards.reshape(-1), rollout.completions.shape[1]
    found = {"best": int(np.nanargmax(rewards)), "worst": int(np.nanargmin(rewards))}
    if found["best"] == found["worst"]:
        del found["worst"]
    texts = []
    for place in found.values():
        question = trainer.train_dataset[rollout.prompts[place // group]]
        texts += [question.get("answer"), rollout.completions.flat[place].text]
    lines = in_lines(texts)
    return {
        name: Sample(float(rewards[place]), lines[2 * n], lines[2 * n + 1])
        for n, (name, place) in enumerate(found.items())
    }


LONGEST = 500  # characters of a completion that can be seen, on the widest screen


def in_lines(texts: Sequence[object]) -> list[str]:
    """The end of each text in a line, all without secrets."""
    return redact("\n".join(" ".join(str(t)[-LONGEST:].split()) for t in texts)).split("\n")


def mean_of(records: Sequence[Record]) -> Record:
    """The mean of each figure over the records that have it."""
    known: dict[str, list[float]] = {}
    for record in records:
        for name, value in record.items():
            if isinstance(value, int | float) and not math.isnan(value):
                known.setdefault(name, []).append(value)
    empty: Record = {"reward_mean": None, "completion_length": None, "kl": None}
    return empty | {name: sum(values) / len(values) for name, values in known.items()}


def names_of(record: Mapping[str, object]) -> list[str]:
    """Of reward functions."""
    return [name.removeprefix("reward/") for name in record if name.startswith("reward/")]


def rewards_text(record: Record) -> str:
    """Each reward by name."""
    values = {name: record[f"reward/{name}"] for name in names_of(record)}
    return ", ".join(f"{name} {figure(value, '.2f')}" for name, value in values.items())


def figures_of(record: Record, log: RunLog) -> list[str]:
    """The figures that a person watches, the most important first."""
    parts = [f"reward {figure(record['reward_mean'], '.2f')}"]
    parts += [log.score_text(log.history[-1]["em"])] if log.history else []
    return parts + rest_of(record)


def rest_of(record: Record) -> list[str]:
    """What is of less importance."""
    cut = record.get("truncation_rate") or 0.0
    parts = [f"length {figure(record['completion_length'], '.0f')}"]
    parts += [f"{cut:.0%} cut off"] if cut else []
    parts += [] if record["kl"] is None else [f"kl {record['kl']:.3f}"]
    known = "tokens_per_second" in record
    return parts + ([f"{record['tokens_per_second']:,.0f} tokens/s"] if known else [])


def cost_text(record: Record, meter: Meter, elapsed: float) -> str:
    parts = [*rest_of(record), f"{meter.most / GB:.2f} GB", f"{clock(elapsed)} so far"]
    return ", ".join(parts)


def warn_of_kl(kl: float | None, train_type: str) -> None:
    """KL of the first update: the policy has not moved, so this is how far off the 4-bit copy is
    that full fine-tuning has as its reference."""
    if train_type == "full" and kl is not None and kl > 0.01:
        say(
            f"kl        {kl:.3f} before anything was learnt: the error of the 4-bit reference, to "
            "which kl_coeff pulls the policy; quantize_for_rollouts = false avoids it"
        )
