"""Optional destinations of the records of `training_log.jsonl`: CSV, TensorBoard, Weights & Biases.

A record is a dict with "update" (the x axis) and numbers; evaluations carry "split" as well. The
trainer talks to one `Tracker`, which is a null object when nothing was asked for.
"""

import csv
import difflib
import importlib.util
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Protocol

from ..base.errors import UserError
from ..base.text import Json, shown

Record = dict[str, Json]
"""A line of training_log.jsonl."""

WANDB_ID = "wandb_run.txt"  # in output_dir
SIGNED = ".mlx-grpo"  # a file that says whose a folder of events is

# report_to value -> the package it needs; the extra of pyproject.toml has the same name.
PACKAGES: dict[str, str | None] = {"csv": None, "tensorboard": "tensorboardX", "wandb": "wandb"}


class Tracker(Protocol):
    """Takes each record once, in order, then one `close`."""

    def log(self, record: Record) -> None: ...

    def close(self) -> None: ...


class MissingExtra(UserError, ImportError):
    """An optional package that `report_to` needs is not installed."""


class NullTracker:
    """Keeps nothing: `report_to` is empty."""

    def log(self, record: Record) -> None:
        pass

    def close(self) -> None:
        pass


class FanOut:
    """Passes every record to several trackers."""

    def __init__(self, trackers: list[Tracker]) -> None:
        self.trackers = trackers

    def log(self, record: Record) -> None:
        for tracker in self.trackers:
            tracker.log(record)

    def close(self) -> None:
        with ExitStack() as stack:  # all are closed, even when one of them raises
            for tracker in self.trackers:
                stack.callback(tracker.close)


def _flatten(record: Record, prefix: str = "") -> Iterator[tuple[str, Json]]:
    for key, value in record.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


def _scalars(record: Record) -> dict[str, float]:
    """The numbers of a record under "train/" or "eval/SPLIT/", without "update", the axis."""
    prefix = f"eval/{record['split']}/" if "split" in record else "train/"
    return {
        prefix + name: float(value)
        for name, value in _flatten(record)
        if name != "update" and isinstance(value, int | float) and not isinstance(value, bool)
    }


class _CSVFile:
    """Appends rows; for a key that no row had before, the file is rewritten with a new column."""

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.realpath(path))  # a link stays one when the file is replaced
        self.columns: list[str] = []
        if path.exists() and path.stat().st_size:  # a resumed run continues its file
            with self.open() as file:
                self.columns = next(csv.reader(file), [])

    def open(self) -> IO[str]:
        """For reading: what a damaged disk made of it costs some cells, not the run."""
        csv.field_size_limit(2**31 - 1)
        return self.path.open(newline="", encoding="utf-8", errors="replace")

    def append(self, row: dict[str, Json]) -> None:
        if new := [key for key in row if key not in self.columns]:
            self._widen(new)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns, restval="").writerow(row)

    def _widen(self, new: list[str]) -> None:
        rows: list[dict[str, str]] = []
        if self.columns:
            with self.open() as file:
                rows = list(csv.DictReader(file))
        self.columns += new
        partial = self.path.with_suffix(".csv.partial")
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        partial.replace(self.path)


def is_ours(path: Path) -> bool:
    """Whether the first line is that of a file of ours; an empty file counts, too."""
    if not path.is_file():
        return False
    columns = first_line(path).strip().split(",")
    ours = columns[0] == "update" and not {"batch_step", "tokens", "split"}.isdisjoint(columns)
    return ours or not path.stat().st_size


def first_line(path: Path) -> str:
    """Of a file that can be read; what is no text in it is replaced."""
    try:
        with path.open("rb") as file:
            return file.readline(100_000).decode(errors="replace")
    except OSError:
        return ""


class CSVTracker:
    """`metrics.csv` for training records, `metrics_eval.csv` for evaluations.

    Two files, because the two kinds share hardly a column. None is an empty cell, a list is JSON.
    Every row is on disk when `log` returns.
    """

    def __init__(self, output_dir: Path) -> None:
        output_dir.mkdir(parents=True, exist_ok=True)
        self.training = _CSVFile(output_dir / "metrics.csv")
        self.evaluation = _CSVFile(output_dir / "metrics_eval.csv")

    def log(self, record: Record) -> None:
        row = {
            key: json.dumps(value) if isinstance(value, list | tuple) else value
            for key, value in _flatten(record)
        }
        (self.evaluation if "split" in record else self.training).append(row)

    def close(self) -> None:
        pass


def read_log(
    log: Path, size: int | None = None, last: float = math.inf
) -> tuple[list[Record], int]:
    """The records in the first `size` bytes of training_log.jsonl, up to the update `last`, and
    where they end. Behind them may be the part of a line that a crash left.

    Raises:
        UserError: another line is no record.
    """
    lines = log.read_bytes()[:size].split(b"\n")  # `splitlines` would also cut at others
    records, end, place = [], 0, 0
    for number, line in enumerate(lines, start=1):
        place += len(line)
        record = as_record(line)
        if record is not None and record["update"] > last:
            break
        if record is not None:
            records.append(record)
            end = place
        elif line.strip() and any(rest.strip() for rest in lines[number:]):
            text = shown(line.decode(errors="replace"))
            raise UserError(
                f"{log}, line {number} is no record of a run: {text}; put it right or delete it, "
                "and resume again"
            )
        place += 1  # the end of the line
    return records, end


def as_record(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("update"), int) else None


def rewind(output_dir: Path, records: list[Record] | None, last: int) -> None:
    """Drop the rows of the CSV files that a resumed run writes again: those not among the `records`
    of its log or, where it keeps none, those after the update `last`."""
    left = Counter((str(record["update"]), record.get("split", "")) for record in records or [])

    def stays(update: str, split: str) -> bool:
        if records is None:
            return update.isdecimal() and int(update) <= last
        left[update, split] -= 1
        return left[update, split] >= 0

    for path in (output_dir / "metrics.csv", output_dir / "metrics_eval.csv"):
        if path.is_file() and first_line(path).startswith("update,"):
            keep_rows(Path(os.path.realpath(path)), stays)  # a link stays one


def keep_rows(path: Path, stays: Callable[[str, str], bool]) -> None:
    """Rewrite a file with the rows whose update and split stay."""
    with _CSVFile(path).open() as file:
        reader = csv.DictReader(file)
        rows, columns = list(reader), reader.fieldnames or []
    kept = [r for r in rows if stays(r.get("update") or "", r.get("split") or "")]
    partial = path.with_suffix(".csv.partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(kept)
    partial.replace(path)


class TensorBoardTracker:
    """Event files in `output_dir/tensorboard`, by tensorboardX, which needs no torch.

    Of what an earlier process wrote there, TensorBoard is told to forget all from update `since`
    on; the `records` of that update that the log still has are written again.
    """

    def __init__(self, output_dir: Path, since: int, records: list[Record]) -> None:
        from tensorboardX import SummaryWriter

        folder = output_dir / "tensorboard"
        again = {"purge_step": since, "filename_suffix": f".{since}"} if folder.exists() else {}
        self.writer = SummaryWriter(logdir=str(folder), **again)
        folder.mkdir(exist_ok=True)
        (folder / SIGNED).touch()
        for record in records if again else []:
            if record["update"] >= since:
                self.log(record)

    def log(self, record: Record) -> None:
        for name, value in _scalars(record).items():
            self.writer.add_scalar(name, value, global_step=record["update"])

    def close(self) -> None:
        self.writer.close()


class WandbTracker:
    """A run of the Weights & Biases project "mlx-grpo"; log in with `wandb login` beforehand.

    A resumed run goes on with the same run there. Each record has a step of its own, so that those
    that are there already are known: to take back steps (`resume_from`) is a private preview.
    """

    def __init__(self, output_dir: Path, run_name: str, config: dict[str, Json]) -> None:
        import wandb

        output_dir.mkdir(parents=True, exist_ok=True)
        known = output_dir / WANDB_ID
        again: dict[str, str] = {}
        if known.exists():
            again = {"id": known.read_text(encoding="utf-8").strip(), "resume": "allow"}
        self.run = wandb.init(
            project="mlx-grpo", name=run_name, config=config, dir=str(output_dir), **again
        )
        known.write_text(self.run.id + "\n", encoding="utf-8")
        self.first = self.run.starting_step  # what comes before it, W&B has
        self.run.define_metric("update")
        self.run.define_metric("*", step_metric="update")

    def log(self, record: Record) -> None:
        # An update's records come in this order, and W&B's own step must grow with every call.
        place = {"": 0, "train": 1}.get(record.get("split", ""), 2)
        step = 3 * record["update"] + place
        if step >= self.first:
            self.run.log({"update": record["update"], **_scalars(record)}, step=step)

    def close(self) -> None:
        self.run.finish()


def _installed(package: str) -> bool:
    # Without an origin it is a bare folder of that name, such as the `wandb/` of an earlier run.
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def check_available(report_to: list[str]) -> None:
    """Check `report_to` without importing anything.

    Raises UserError for an unknown name, MissingExtra (also one) for a missing package.
    """
    for name in report_to:
        if name not in PACKAGES:
            near = difflib.get_close_matches(name, PACKAGES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            allowed = ", ".join(PACKAGES)
            raise UserError(f"report_to: {name!r} is unknown, allowed are {allowed}{hint}")
        package = PACKAGES[name]
        if package is not None and not _installed(package):
            raise MissingExtra(
                f"report_to = {name!r} needs the package {package}: "
                f"uv sync --extra {name}, or pip install '.[{name}]'"
            )


def make_tracker(
    report_to: list[str],
    output_dir: Path,
    run_name: str,
    config: dict[str, Json],
    since: int = 0,
    records: list[Record] | None = None,
) -> Tracker:
    """The tracker for `report_to`: any of "csv", "tensorboard", "wandb".

    since: the update from which on the run writes again what is not among the `records` of its log.

    Raises what `check_available` raises.
    """
    check_available(report_to)
    trackers: list[Tracker] = []
    for name in dict.fromkeys(report_to):
        if name == "csv":
            trackers.append(CSVTracker(output_dir))
        elif name == "tensorboard":
            trackers.append(TensorBoardTracker(output_dir, since, records or []))
        else:
            trackers.append(WandbTracker(output_dir, run_name, config))
    if not trackers:
        return NullTracker()
    return trackers[0] if len(trackers) == 1 else FanOut(trackers)
