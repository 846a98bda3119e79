"""The record of a run: training_log.jsonl, trackers, and the lines that a person reads."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.errors import disk_errors_named
from ..base.say import say
from ..base.text import counted, redacted
from ..memory.meter import Meter
from . import trackers, warnings_of_learning

if TYPE_CHECKING:  # the tools' `--help` answers without it
    import numpy as np


class RunLog:
    """Writes training and evaluation records; `history` holds the evaluations on the test split."""

    def __init__(self, args: Any) -> None:
        self.args = args
        self.path = Path(args.output_dir) / "training_log.jsonl"
        self.tracker: trackers.Tracker = trackers.NullTracker()
        self.history: list[dict[str, Any]] = []
        self.pending: list[dict[str, Any]] = []
        self.watched: dict[str, Any] = {}
        self.notes: list[str] = []  # what a person should know of later; in the next record
        self.warned_of_cut = False
        self.meter = Meter()

    def write(self, record: dict[str, Any]) -> None:
        """One JSON object a line (NaN and infinity, which JSON lacks, as null); the trackers."""
        record = redacted({name: finite(value) for name, value in record.items()})
        self.append(record)
        with disk_errors_named(self.path):
            self.tracker.log(record)

    def append(self, record: dict[str, Any]) -> None:
        if self.args.log_jsonl:
            with disk_errors_named(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def watch(self, records: list[dict[str, Any]]) -> None:
        """Warn when learning has gone wrong (utils/run/warnings_of_learning.py)."""
        if not self.args.watchdog_window:
            return
        self.watched = warnings_of_learning.watched(
            self.watched, records, self.args.watchdog_window
        )
        if text := self.watched["warning"]:
            update = records[-1]["update"]
            text = f"over the last {self.args.watchdog_window} updates, {text}"
            say(f"warning   update {update}: {text}")
            self.notes.append(f"update {update}: {text}")

    def training(self, batch_step: int, seconds: float) -> None:
        """Write the means of the updates since the last record, with the counters of the newest."""
        records, self.pending = self.pending, []
        record = {"update": None, "batch_step": batch_step, **records[-1]}
        for name in record.keys() - {"update", "batch_step", "lr"}:
            values = [r[name] for r in records if r.get(name) is not None]
            if values:
                record[name] = sum(values) / len(values)
        if self.notes:
            record["notes"], self.notes = self.notes, []
        record |= {"seconds": seconds, **self.meter.report()}
        self.write(record)

    def evaluation(self, record: dict[str, Any]) -> None:
        """Write and show an evaluation; warn once when over 5 % of the answers are cut off."""
        self.write(record)
        cut = record["truncation_rate"]
        note = f", {cut:.0%} cut off" if cut else ""
        asked = counted(record["em_subset"], "question")
        say(
            f"eval      update {record['update']:>4}  {self.score_text(record['em'])} on "
            f"{record['split']} ({asked}, greedy{note})"
        )
        if record["split"] == "test":
            self.history.append(record)
        if cut > 0.05 and not self.warned_of_cut:
            self.warned_of_cut = True
            say(
                f"          {cut:.0%} of the answers hit eval_max_new_tokens = "
                f"{self.args.eval_max_new_tokens} and count as wrong: raise it"
            )

    def score_text(self, score: float) -> str:
        if self.args.eval_metric == "em":
            return f"exact match {score:.1%}"
        return f"{self.args.eval_metric} {score:.3f}"

    def summary(self, update: int) -> None:
        if len(self.history) > 1:
            before, after = self.history[0]["em"], self.history[-1]["em"]
            then = self.score_text(after).rpartition(" ")[2]
            say(f"result    {self.score_text(before)} -> {then} after {counted(update, 'update')}")

    def completions(
        self, shown: list[tuple[dict[str, Any], Any, float]], extras: dict[str, list]
    ) -> None:
        """Print sampled completions with their rewards and what reward functions say of them."""
        for number, (row, response, reward) in enumerate(shown):
            say(f"--- reward {reward:.2f}, {response.finish_reason}: {row['question']}")
            say(f"{response.text}\n    (expected {row['answer']})")
            for column, values in extras.items():
                say(f"    {column}: {values[number]}")


def finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


# Means over all tokens of the update; the other statistics are over those that had a gradient.
PER_UPDATE = ("policy_reward", "clip_low", "clip_high")
STATISTICS = (*PER_UPDATE, "importance_weight", "importance_capped", "sampler_mismatch")


class TokenSums:
    """Sums of the loss's statistics over the micro-batches of an update."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = dict.fromkeys(STATISTICS, 0.0)
        self.tokens = 0.0

    def add(self, sums: dict[str, Any], mask: Any) -> None:
        """`mask`: (B, T), 1 where a token has a gradient."""
        self.tokens += float(mask.sum())
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)

    def means(self, tokens: float) -> dict[str, float | None]:
        """Per token; `tokens` are those of the whole update."""
        counts = {n: tokens if n in PER_UPDATE else self.tokens for n in self.sums}
        return {n: total / counts[n] if counts[n] else None for n, total in self.sums.items()}


def rollout_metrics(scores: Any, advantages: np.ndarray, names: Iterable[str]) -> dict[str, Any]:
    """What the log says of a rollout: `scores`, and the (P, G) `advantages` made of them."""
    import numpy as np

    rewards, lengths = scores.rewards, scores.lengths
    responses = scores.responses.reshape(-1).tolist()
    logprobs = [logprob for response in responses for logprob in response.logprobs]
    metrics = {
        "reward_mean": mean(rewards),
        "reward_std": mean(rewards.std(axis=1, ddof=1)),
        "groups_without_signal": (advantages == 0).all(axis=1).mean(),
        "completion_length": lengths.mean(),
        "completion_length_max": lengths.max(),
        "truncation_rate": np.mean([r.finish_reason == "length" for r in responses]),
        "entropy": -mean(np.array(logprobs)),  # of the sampler, estimated from what it sampled
        "tokens": lengths.sum(),
    }
    metrics |= {f"reward/{name}": mean(scores.values[..., n]) for n, name in enumerate(names)}
    return {name: float(value) for name, value in metrics.items()}


def mean(values: np.ndarray) -> float:
    """Mean of what is a number; NaN when nothing is."""
    import numpy as np

    valid = values[~np.isnan(values)]
    return float(valid.mean()) if valid.size else math.nan
