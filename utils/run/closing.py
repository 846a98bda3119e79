"""What is said when a run ends: how its figures moved, what it took, where it is, what is next."""

import math
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from ..base.intervals import percent
from ..base.script import ROOT
from ..base.task_progress import clock
from ..base.text import counted
from ..memory.meter import GB, Meter
from . import course
from .log import RunLog, figure
from .state import State

INDENT = " " * 10
NAMES = {
    "reward_mean": ("reward", ".2f"),
    "completion_length": ("length", ".1f"),
    "truncation_rate": ("cut off", ".0%"),
}


def table(log: RunLog, meter: Meter) -> Iterator[str]:
    """Each figure at both ends of the run; time and memory."""
    yield from (INDENT + line for line in (*moved(log.state), *scores(log)))
    peak = f", at most {meter.most / GB:.2f} GB for arrays" if meter.most else ""
    yield f"{INDENT}{clock(log.state.elapsed)} in all{peak}"


def moved(state: State) -> Iterator[str]:
    """Rewards and lengths, which are means: single updates differ too much to be compared."""
    update = state.update_step
    if not state.course or update < 2:
        return
    to, since = course.ends(state.course, update)
    first = "update 1" if to == 1 else f"updates 1-{to}"
    last = f"update {update}" if since == update else f"{since}-{update}"
    rows = [("", first, last), *figures_of(state)]
    width = max(len(row[0]) for row in rows)
    for name, left, right in rows:
        yield f"{name:<{width}}  {left:>{len(first)}}  {right:>{max(len(last), 6)}}"


def figures_of(state: State) -> Iterator[tuple[str, str, str]]:
    """Name, first and last value; nothing of what was never cut off."""
    for name, (before, after) in course.at_the_ends(state.course, state.update_step).items():
        shown, form = NAMES.get(name, (name.removeprefix("reward/"), ".2f"))
        if name != "truncation_rate" or before or after:
            yield shown, figure(before, form), figure(after, form)


def scores(log: RunLog) -> Iterator[str]:
    """Of the first and the last evaluation on the test split, with what chance leaves open."""
    if log.args.eval_metric != "em" or not log.history or math.isnan(log.history[-1]["em"]):
        return
    ends = log.history if len(log.history) == 1 else (log.history[0], log.history[-1])
    shares = (percent(r["em"], r["em_subset"]) for r in ends)
    yield f"exact match on test {' -> '.join(shares)}"
    yield f"in brackets, 95 % intervals of {counted(ends[-1]['em_subset'], 'question')}"


def next_step(folder: Path) -> Iterator[str]:
    """What to type to ask the model that was trained."""
    yield "next      ask it:"
    words = ["uv", "run", "python"] if "UV" in os.environ else ["python"]  # `uv run` sets it
    words += [os.path.relpath(ROOT / "utils/inference.py"), "--model", str(folder / "final")]
    yield f"{INDENT}{shlex.join([*words, '--grpo-prompt', 'your question'])}"
