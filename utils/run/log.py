"""The record of a run: training_log.jsonl, trackers, and the lines that a person reads."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol, TypeVar

import mlx.core as mx
import numpy as np

from ..base import intervals
from ..base.errors import disk_errors_named
from ..base.say import say
from ..base.text import Json, counted, json_line, redacted, shown
from ..data.completion import Completion
from ..data.files import Row
from ..device import ranks
from ..settings.run_settings import Settings
from . import trackers, warnings_of_learning
from .state import Record, State

T = TypeVar("T")

TABLE_ROWS = 64  # of the completions that trackers get


class RunLog:
    """Writes training and evaluation records; what it has to remember is in the run's state."""

    def __init__(
        self, args: Settings, state: State | None = None, folder: Path | None = None
    ) -> None:
        self.args, self.state = args, state or State()
        self.path = (folder or Path(args.output_dir)) / "training_log.jsonl"
        self.tracker: trackers.Tracker = trackers.NullTracker()
        self.warned_of_cut = self.warned_of_few = False
        self.scored: dict[str, Streak] = {}  # by split

    @property
    def history(self) -> list[Record]:
        """The evaluations on the test split."""
        return self.state.history

    def write(self, record: Record) -> None:
        """One JSON object a line (NaN and infinity, which JSON lacks, as null); the trackers."""
        record = redacted({name: finite(value) for name, value in record.items()})
        self.append(record)
        self.tracker.log(record)

    def append(self, record: Record) -> None:
        if self.args.log_jsonl:
            with disk_errors_named(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json_line(record) + "\n")

    def note_right(
        self, questions: Sequence[Row], rollout: "RolloutFigures", names: Iterable[str]
    ) -> None:
        """Which rewards for answers have ever been above 0, for the warnings."""
        expected = str(questions[rollout.prompts[0]].get("answer"))
        text = rollout.completions.flat[0].text
        self.state.watched = warnings_of_learning.noted(
            self.state.watched, rollout.values, [*names], expected, text
        )

    def watch(self, records: list[Record]) -> None:
        """Warn when learning has gone wrong (utils/run/warnings_of_learning.py)."""
        if not self.args.watchdog_window:
            return
        self.state.watched = warnings_of_learning.watched(
            self.state.watched, records, self.args.watchdog_window
        )
        if text := self.state.watched["warning"]:
            update = records[-1]["update"]
            text = f"over the last {self.args.watchdog_window} updates, {text}"
            say(f"warning   update {update}: {text}")
            self.state.notes.append(f"update {update}: {text}")

    def training(self, memory: dict[str, float]) -> None:
        """Write the means of the updates since the last record, with the counters of the newest."""
        state = self.state
        records, state.pending = state.pending, []
        record: Record = {"update": None, "batch_step": state.step, **records[-1]}
        for name in record.keys() - {"update", "batch_step", "lr"}:
            values = [r[name] for r in records if warnings_of_learning.is_known(r.get(name))]
            if values:
                record[name] = sum(values) / len(values)
        if state.notes:
            record["notes"], state.notes = state.notes, []
        record |= {"seconds": state.elapsed, **memory}
        self.write(record)

    def evaluation(self, record: Record) -> None:
        """Write and show an evaluation; warn once when over 5 % of the answers are cut off."""
        self.write(record)
        cut = record["truncation_rate"]
        note = f", {cut:.0%} cut off" if cut else ""
        share, questions = record["em"], record["em_subset"]
        wide, few = self.how_sure(share, questions)
        asked = counted(questions, "question")
        text = f"{self.score_text(share)} on {record['split']} ({asked}, greedy{note}{wide})"
        streak = Streak(text, self.value_text(share), record["update"], record["update"])
        self.show_score(record["split"], streak)
        if few and not (self.warned_of_few or self.args.from_preset):
            self.warned_of_few = True
            say(f"          {few}")
        if record["split"] == "test":
            self.state.history.append(record)
        own = self.args.from_preset and "eval_max_new_tokens" in self.args.inherited
        if cut > 0.05 and not (self.warned_of_cut or own):  # a preset of ours knows what it cuts
            self.warned_of_cut = True
            say(
                f"          {cut:.0%} of the answers hit eval_max_new_tokens = "
                f"{self.args.eval_max_new_tokens} and count as wrong: raise it"
            )

    def how_sure(self, share: float, questions: int) -> tuple[str, str]:
        """The interval of an exact match where it is wide, and a line where it says nothing."""
        if self.args.eval_metric != "em" or not questions or math.isnan(share):
            return "", ""
        return intervals.note(share, questions), intervals.too_few(share, questions)

    def show_score(self, split: str, new: "Streak") -> None:
        """If it differs from the split's last one: equal ones are shown together."""
        before = self.scored.get(split)
        if before and before.text == new.text:
            before.last, before.count = new.last, before.count + 1
            return
        self.scored[split] = new
        if not self.args.quiet:
            shown = new.text
            if before and before.value != new.value and NO_VALUE not in (before.value, new.value):
                shown = shown.replace(new.value, f"{before.value} -> {new.value}", 1)
            say(f"eval      update {new.first:>4}  {shown}")

    def say_what_stayed(self) -> None:
        """The scores that did not change any more, when the run ends."""
        for streak in self.scored.values():
            if streak.count > 1 and not self.args.quiet:
                shown = f"{streak.text.partition(' (')[0]}, as since update {streak.first}"
                say(f"eval      update {streak.last:>4}  {shown}")

    def score_text(self, score: float) -> str:
        if math.isnan(score):
            return f"{self.args.eval_metric} gave no value"
        name = "exact match" if self.args.eval_metric == "em" else self.args.eval_metric
        return f"{name} {self.value_text(score)}"

    def value_text(self, score: float) -> str:
        """Without its name."""
        if math.isnan(score):
            return NO_VALUE
        return f"{score:.1%}" if self.args.eval_metric == "em" else f"{score:.3f}"

    def summary(self, update: int) -> None:
        if len(self.history) > 1:
            before, after = self.history[0]["em"], self.history[-1]["em"]
            moved = f"{self.score_text(before)} -> {self.value_text(after)}"
            say(f"result    {moved} after {counted(update, 'update')}")

    def warn_of_no_value(
        self, questions: Sequence[Row], rollout: "RolloutFigures | None", names: Iterable[str]
    ) -> None:
        """At the first update: name a function that gave no completion a value."""
        if rollout is None:
            return
        answer = shown(questions[rollout.prompts[0]]["answer"])
        for name, values in zip(names, np.moveaxis(rollout.values, -1, 0), strict=True):
            if np.isnan(values).all():
                text = f"reward {name} gave no completion of the first update a value"
                say(f"warning   {text}; the first expected answer is {answer}")
                self.state.notes.append(text)

    def pictures(
        self, questions: Sequence[Row], rollout: "RolloutFigures", names: Iterable[str]
    ) -> None:
        """Distributions of an update, and its first completions as a table, for the trackers."""
        values = {"rewards": rollout.rewards, "lengths": rollout.lengths}
        each = dict(zip(names, np.moveaxis(rollout.values, -1, 0), strict=True))
        if len(each) > 1:
            values |= {f"rewards/{name}": own for name, own in each.items()}
        finite_values = {name: own[np.isfinite(own)] for name, own in values.items()}
        columns = [*("update", "question", "expected", "completion", "finish_reason", "length")]
        rows: list[list[Json]] = []
        for p, i in islice(np.ndindex(*rollout.rewards.shape), TABLE_ROWS):
            completion: Completion = rollout.completions.item(p, i)
            question = questions[int(rollout.prompts[p])]
            asked = str(question["question"]), str(question["answer"])
            said = completion.text, completion.finish_reason, completion.sampled
            earned = [finite(float(own[p, i])) for own in (rollout.rewards, *each.values())]
            rows.append(redacted([self.state.update_step, *asked, *said, *earned]))
        self.tracker.show(
            trackers.Pictures(
                self.state.update_step,
                {name: own for name, own in finite_values.items() if own.size},
                [*columns, "reward", *each],
                rows,
            )
        )

    def note(self, text: str) -> None:
        """A warning, on the terminal and in the next record."""
        say(f"warning   {text}")
        self.state.notes.append(text)

    def completions(
        self,
        questions: Sequence[Row],
        rollout: "RolloutFigures",
        names: Sequence[str],
        extras: dict[str, list],
    ) -> None:
        """Print sampled completions of as many prompts as possible, with each reward by name and
        what reward functions say of them."""
        group = rollout.completions.shape[1]
        for number in spread(len(rollout.prompts), group, self.args.log_completions):
            question = questions[rollout.prompts[number // group]]
            completion = rollout.completions.flat[number]
            values = zip(names, rollout.values.reshape(-1, len(names))[number], strict=True)
            each = ", ".join(f"{name} {figure(value, '.2f')}" for name, value in values)
            earned, end = figure(rollout.rewards.flat[number], ".2f"), completion.finish_reason
            say(f"--- reward {earned} ({each}), {end}: {question['question']}")
            say(f"{completion.text}\n    (expected {question['answer']})")
            for column, cells in extras.items():
                say(f"    {column}: {cells[number]}")


NO_VALUE = "no value"


@dataclass
class Streak:
    """Evaluations of a split, one after the other, with the same result."""

    text: str
    value: str
    first: int
    last: int
    count: int = 1


def spread(prompts: int, group: int, wanted: int) -> list[int]:
    """Numbers of completions, `group` of each prompt: over as many prompts as possible, from the
    first to the last, and as many of one as of another."""
    chosen = min(wanted, prompts)
    places = [round(i * (prompts - 1) / max(chosen - 1, 1)) for i in range(chosen)]
    each = [wanted // max(chosen, 1) + (i < wanted % max(chosen, 1)) for i in range(chosen)]
    return [
        place * group + n
        for place, count in zip(places, each, strict=True)
        for n in range(min(count, group))
    ]


def figure(value: float | None, form: str) -> str:
    """A number as a person reads it; "none" where there is none."""
    return format(value, form) if warnings_of_learning.is_known(value) else "none"


def finite(value: T) -> T | None:
    """As JSON has it, which knows no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


# Means over all tokens of the update; the other statistics are over those that had a gradient.
PER_UPDATE = ("policy_reward", "clip_low", "clip_high")
STATISTICS = (*PER_UPDATE, "importance_weight", "importance_capped", "sampler_mismatch")


class RolloutFigures(Protocol):
    """Of the script's Rollout: P prompts, G completions each, F reward functions."""

    prompts: np.ndarray  # (P,) indices of the training set
    completions: np.ndarray  # (P, G)
    rewards: np.ndarray  # (P, G)
    values: np.ndarray  # (P, G, F)

    @property
    def lengths(self) -> np.ndarray: ...  # (P, G) sampled tokens


class TokenSums:
    """Sums of the loss's statistics over the micro-batches of an update."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = dict.fromkeys(STATISTICS, 0.0)
        self.tokens = 0.0

    def add(self, sums: dict[str, mx.array], mask: mx.array) -> None:
        """`mask`: (B, T), 1 where a token has a gradient."""
        self.tokens += float(mask.sum())
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)

    def of_all(self, loss: float) -> float:
        """Become the sums over all ranks; returns that of their losses."""
        said = ranks.here().all_say([loss, self.tokens, self.sums])
        names = dict.fromkeys(name for _, _, sums in said for name in sums)
        self.sums = {n: sum(sums.get(n, 0.0) for _, _, sums in said) for n in names}
        self.tokens = sum(tokens for _, tokens, _ in said)
        return sum(loss for loss, _, _ in said)

    def means(self, tokens: float) -> dict[str, float | None]:
        """Per token; `tokens` are those of the whole update."""
        counts = {n: tokens if n in PER_UPDATE else self.tokens for n in self.sums}
        return {n: total / counts[n] if counts[n] else None for n, total in self.sums.items()}


def rollout_metrics(
    rollout: RolloutFigures, advantages: np.ndarray, names: Iterable[str]
) -> dict[str, float]:
    """What the log says of a rollout and the (P, G) advantages made of it."""
    rewards, lengths = rollout.rewards, rollout.lengths
    completions: list[Completion] = rollout.completions.reshape(-1).tolist()
    logprobs = [
        logprob
        for completion in completions
        for logprob, sampled in zip(completion.logprobs, completion.mask, strict=True)
        if sampled
    ]
    metrics = {
        "reward_mean": mean(rewards),
        "reward_std": mean(group_deviations(rewards)),
        "groups_without_signal": (advantages == 0).all(axis=1).mean(),
        "completion_length": lengths.mean(),
        "completion_length_max": lengths.max(),
        "truncation_rate": np.mean([c.finish_reason == "length" for c in completions]),
        "entropy": -mean(np.array(logprobs)),  # of the sampler, estimated from what it sampled
        "tokens": lengths.sum(),
    }
    metrics |= conversation_metrics(completions)
    metrics |= {f"reward/{name}": mean(rollout.values[..., n]) for n, name in enumerate(names)}
    return {name: float(value) for name, value in metrics.items()}


def conversation_metrics(completions: Sequence[Completion]) -> dict[str, float]:
    """What the log says of conversations; nothing where there are none."""
    talks = [completion.conversation for completion in completions if completion.conversation]
    if not talks:
        return {}
    return {
        "turns": float(np.mean([talk.turns for talk in talks])),
        "environment_failures": sum(bool(talk.problem) for talk in talks),
    }


def group_deviations(rewards: np.ndarray) -> np.ndarray:
    """(P, G) rewards -> (P,) sample standard deviations of those that are no NaN, at least two."""
    valid = ~np.isnan(rewards)
    count = valid.sum(axis=1)
    shifted = np.where(valid, rewards, 0.0)
    shifted = np.where(valid, rewards - (shifted.sum(axis=1) / np.maximum(count, 1))[:, None], 0.0)
    deviations = np.sqrt((shifted**2).sum(axis=1) / np.maximum(count - 1, 1))
    return np.where(count > 1, deviations, math.nan)


def mean(values: np.ndarray) -> float:
    """Mean of what is a number; NaN when nothing is."""
    valid = values[~np.isnan(values)]
    return float(valid.mean()) if valid.size else math.nan
