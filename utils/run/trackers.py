"""Optional destinations of the records of `training_log.jsonl`: CSV, TensorBoard, Weights & Biases,
trackio.

A record is a dict with "update" (the x axis) and numbers; evaluations carry "split" as well. The
trainer talks to one `Tracker`, which is a null object when nothing was asked for. One that fails
says so once, and stops no run.
"""

import csv
import difflib
import importlib.util
import json
import math
import os
import shlex
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol

from ..base.errors import UserError, reason
from ..base.say import say
from ..base.text import Json, shown

if TYPE_CHECKING:
    import numpy as np

Record = dict[str, Json]
"""A line of training_log.jsonl."""

WANDB_ID = "wandb_run.txt"  # in output_dir
TRACKIO_SENT = "trackio_run.txt"  # in output_dir: how far what was sent goes
PROJECT = "mlx-grpo"
SHOWN = 8  # completions that TensorBoard shows as text
SIGNED = ".mlx-grpo"  # a file that says whose a folder of events is

# report_to value -> the package it needs; the extra of pyproject.toml has the same name.
PACKAGES: dict[str, str | None] = {
    "csv": None,
    "tensorboard": "tensorboardX",
    "wandb": "wandb",
    "trackio": "trackio",
}


@dataclass
class Pictures:
    """What an update sampled: distributions, and completions as rows of a table."""

    update: int
    values: "dict[str, np.ndarray]"  # of finite numbers
    columns: list[str]
    rows: list[list[Json]]


class Tracker(Protocol):
    """Takes each record once, in order, then one `close`."""

    def log(self, record: Record) -> None: ...

    def show(self, pictures: Pictures) -> None:
        """After the training record of their update, if it has one, and before its evaluations."""

    def close(self) -> None: ...


class MissingExtra(UserError, ImportError):
    """An optional package that `report_to` needs is not installed."""


class NullTracker:
    """Keeps nothing: `report_to` is empty."""

    def log(self, record: Record) -> None:
        pass

    def show(self, pictures: Pictures) -> None:
        pass

    def close(self) -> None:
        pass


class Guarded(NullTracker):
    """A tracker that stops no run: its first failure is said, and it is asked again next time.

    Where it cannot even be made, it keeps nothing.
    """

    def __init__(self, name: str, make: Callable[[], Tracker], note: Callable[[str], None]) -> None:
        self.name, self.note, self.failed = name, note, False
        self.tracker: Tracker = NullTracker()
        with self.said():
            self.tracker = make()

    @contextmanager
    def said(self) -> Iterator[None]:
        try:
            yield
        except SystemExit as error:
            self.say_once(f"it called sys.exit({error.code!r})")
        except Exception as error:  # noqa: BLE001 - of whatever package it is
            self.say_once(f"{type(error).__name__}: {shown(reason(error))}")

    def say_once(self, what: str) -> None:
        if not self.failed:
            self.failed = True
            self.note(f"report_to = {self.name!r} failed: {what}; the run goes on. Said once")

    def log(self, record: Record) -> None:
        with self.said():
            self.tracker.log(record)

    def show(self, pictures: Pictures) -> None:
        with self.said():
            self.tracker.show(pictures)

    def close(self) -> None:
        with self.said():
            self.tracker.close()


class FanOut:
    """Passes every record to several trackers."""

    def __init__(self, trackers: list[Tracker]) -> None:
        self.trackers = trackers

    def log(self, record: Record) -> None:
        for tracker in self.trackers:
            tracker.log(record)

    def show(self, pictures: Pictures) -> None:
        for tracker in self.trackers:
            tracker.show(pictures)

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
        size = self.path.stat().st_size
        try:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.columns, restval="").writerow(row)
        except OSError:
            os.truncate(self.path, size)  # or the next row would go on in this one
            raise

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

    def show(self, pictures: Pictures) -> None:
        """Cells have no room for them; completions/ has them all."""

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

    def show(self, pictures: Pictures) -> None:
        for name, values in pictures.values.items():
            self.writer.add_histogram(f"train/{name}", values, global_step=pictures.update)
        texts = (
            "\n".join(f"{name}: {value}" for name, value in zip(pictures.columns, row, strict=True))
            for row in pictures.rows[:SHOWN]
        )
        # It renders Markdown, of which an indented block is shown as it stands.
        text = "\n\n---\n\n".join(textwrap.indent(text, "    ", lambda _: True) for text in texts)
        self.writer.add_text("train/completions", text, global_step=pictures.update)

    def close(self) -> None:
        self.writer.close()


def place_of(record: Record) -> int:
    """Where a record stands in a run: an update's records come in this order, and W&B's own step
    must not fall."""
    return 3 * int(record["update"]) + {"": 0, "train": 1}.get(record.get("split", ""), 2)


def wandb_place(config: dict[str, Json]) -> dict[str, str]:
    """Project and entity: by the settings, else by W&B's own variables; says which counts."""
    place, told = {}, []
    for name, default in (("project", PROJECT), ("entity", "")):
        variable, setting = f"WANDB_{name.upper()}", f"wandb_{name}"
        given, known = config.get(setting), os.environ.get(variable)
        value = given or known or default
        why = setting if given else variable if known else "the default"
        why += f"; {variable} does not count" if given and known and known != given else ""
        if value:
            place[name] = value
            told.append(f"{name} {value} ({why})")
    say(f"wandb     {', '.join(told)}")
    return place


class WandbTracker:
    """A run of a Weights & Biases project; log in with `wandb login` beforehand.

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
        place = wandb_place(config)
        self.run = wandb.init(**place, name=run_name, config=config, dir=str(output_dir), **again)
        known.write_text(self.run.id + "\n", encoding="utf-8")
        self.first = self.run.starting_step  # what comes before it, W&B has
        self.run.define_metric("update")
        self.run.define_metric("*", step_metric="update")

    def log(self, record: Record) -> None:
        self.send(place_of(record), {"update": record["update"], **_scalars(record)})

    def show(self, pictures: Pictures) -> None:
        import wandb

        shown: dict[str, object] = {
            f"train/{name}": wandb.Histogram(values) for name, values in pictures.values.items()
        }
        shown["train/completions"] = wandb.Table(columns=pictures.columns, data=pictures.rows)
        self.send(place_of({"update": pictures.update}), shown | {"update": pictures.update})

    def send(self, step: int, values: Mapping[str, object]) -> None:
        if step >= self.first:
            self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


class TrackioTracker:
    """A run of the project "mlx-grpo" on this machine (`trackio show`), or where the variables
    TRACKIO_SPACE_ID and TRACKIO_SERVER_URL say.

    A resumed run goes on with the newest one of its name; what was sent already is noted in
    output_dir, since trackio draws a point that comes twice twice.
    """

    def __init__(
        self, output_dir: Path, run_name: str, config: dict[str, Json], goes_on: bool
    ) -> None:
        import trackio

        output_dir.mkdir(parents=True, exist_ok=True)
        self.sent, self.last = output_dir / TRACKIO_SENT, -1
        if goes_on and self.sent.exists():
            self.last = int(self.sent.read_text(encoding="utf-8"))
        how = {"resume": "allow" if self.last >= 0 else "never", "embed": False}
        quiet = {"auto_log_gpu": False, "auto_log_cpu": False}
        self.run = trackio.init(project=PROJECT, name=run_name, config=config, **how, **quiet)

    def log(self, record: Record) -> None:
        self.send(2 * place_of(record), record["update"], _scalars(record))

    def show(self, pictures: Pictures) -> None:
        import trackio

        shown: dict[str, object] = {
            f"train/{name}": trackio.Histogram(values) for name, values in pictures.values.items()
        }
        shown["train/completions"] = trackio.Table(columns=pictures.columns, data=pictures.rows)
        self.send(2 * place_of({"update": pictures.update}) + 1, pictures.update, shown)

    def send(self, place: int, update: int, values: Mapping[str, object]) -> None:
        if place > self.last:
            self.run.log(dict(values), step=update)
            self.last = place
            self.sent.write_text(f"{place}\n", encoding="utf-8")

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


def warn(text: str) -> None:
    say(f"warning   {text}")


def make_tracker(
    report_to: list[str],
    output_dir: Path,
    run_name: str,
    config: dict[str, Json],
    since: int = 0,
    records: list[Record] | None = None,
    note: Callable[[str], None] = warn,
) -> Tracker:
    """The tracker for `report_to`: any of "csv", "tensorboard", "wandb", "trackio".

    since: the update from which on the run writes again what is not among the `records` of its log.
    note: takes what a tracker that fails says.

    Raises what `check_available` raises.
    """
    check_available(report_to)
    ways: dict[str, Callable[[], Tracker]] = {
        "csv": lambda: CSVTracker(output_dir),
        "tensorboard": lambda: TensorBoardTracker(output_dir, since, records or []),
        "wandb": lambda: WandbTracker(output_dir, run_name, config),
        "trackio": lambda: TrackioTracker(output_dir, run_name, config, since > 0),
    }
    trackers: list[Tracker] = [Guarded(name, ways[name], note) for name in dict.fromkeys(report_to)]
    if "tensorboard" in report_to:
        say(f"view      uvx tensorboard --logdir {shlex.quote(str(output_dir / 'tensorboard'))}")
    if not trackers:
        return NullTracker()
    return trackers[0] if len(trackers) == 1 else FanOut(trackers)
