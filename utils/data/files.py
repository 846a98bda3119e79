"""Rows of questions from local files; a malformed one is named by file, line and column."""

import copy
import csv
import difflib
import hashlib
import json
import logging
import math
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, TypeVar

from ..base.errors import RunError, UserError
from ..base.script import ROOT
from ..base.text import is_unicode, shown
from ..settings.run_settings import Settings
from . import layouts

S = TypeVar("S", bound=Settings)
Row = dict[str, Any]
"""A question: the columns of its data set, and what the trainer adds."""
SHORT_FLOATS = {"float": "f4", "float32": "f4", "halffloat": "f2", "float16": "f2"}
"""By the names of pyarrow and of datasets, as NumPy has them."""
SUFFIXES = layouts.SUFFIXES
MESSAGE = ("role", "content")
MEDIA = ("image", "images", "video", "videos", "audio", "audios", "pixel_values")


def read_rows(path: Path) -> list[Row]:
    """All rows of a .jsonl, .json (a list), .csv or .parquet file.

    Raises:
        UserError: unknown kind, unreadable, malformed (with line and column) or empty.
    """
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    reader = layouts.read_arrow if path.is_dir() else readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"data file {path}: expected one of {', '.join(SUFFIXES)}")
    try:
        rows = reader(path)
    except UnicodeDecodeError:
        raise UserError(f"{path}, {_first_bad_byte(path)}: not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"data file {path} cannot be read: {error.strerror or error}") from None
    if not rows:
        raise UserError(f"data file {path} holds no rows")
    return rows


def _first_bad_byte(path: Path) -> str:
    data, start = path.read_bytes(), 0
    try:
        data.decode()
    except UnicodeDecodeError as error:
        start = error.start
    line_start = data.rfind(b"\n", 0, start) + 1
    line = data[:line_start].count(b"\n") + 1
    return f"line {line}, column {start - line_start + 1}"


def _jsonl(path: Path) -> list[Row]:
    rows = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                rows.append(_object(path, number, line))
    return rows


def _object(path: Path, number: int, line: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        column = getattr(error, "colno", 1)
        raise UserError(
            f"{path}, line {number}, column {column}: not JSON: {_reason(error)}"
        ) from None
    if not isinstance(row, dict):
        raise UserError(f"{path}, line {number}: expected an object, found {type(row).__name__}")
    return row


def _reason(error: Exception) -> str:
    """What json has against a text; without a line for digits beyond Python's limit."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return getattr(error, "msg", "a number of thousands of digits")


def _json(path: Path) -> list[Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and error.lineno > 1:  # an object a line, as `datasets` reads
            return _jsonl(path)
        where = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{path}, {where}: not JSON: {error.msg}") from None
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {_reason(error)}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: expected a list of objects")
    return rows


def _csv(path: Path) -> list[Row]:
    csv.field_size_limit(2**31 - 1)  # the default refuses answers of over 131,072 characters
    with path.open(encoding="utf-8-sig", newline="") as file:
        return _csv_rows(path, file)


def _csv_rows(path: Path, file: TextIO) -> list[Row]:
    reader = csv.reader(file, strict=True)
    rows = []
    try:
        names = next(reader, [])
        if len({*names}) != len(names):
            raise UserError(f"{path}, line 1: two columns have the same name: {names}")
        for row in reader:
            if row and len(row) != len(names):
                raise UserError(
                    f"{path}, line {reader.line_num}: expected {len(names)} columns "
                    f"({', '.join(names)}), found {len(row)}"
                )
            rows += [dict(zip(names, row, strict=True))] if row else []
    except csv.Error as error:
        raise UserError(f"{path}, line {max(reader.line_num, 1)}: {error}") from None
    return rows


def _parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"data file {path} is not a parquet file: {error}") from None
    return as_written(table.to_pylist(), {f.name: str(f.type) for f in table.schema})


def as_written(rows: list[Row], kinds: dict[str, str]) -> list[Row]:
    """Python has no 32-bit floats: the 0.1 of one would become 0.10000000149011612."""
    short = {n: SHORT_FLOATS[kind] for n, kind in kinds.items() if kind in SHORT_FLOATS}
    if not short:
        return rows
    import numpy as np  # here: commands that read no such column begin at once

    for row in rows:
        for name, kind in short.items():
            if row[name] is not None:
                row[name] = float(str(np.dtype(kind).type(row[name])))
    return rows


def sources(config: S, split: str) -> list[S]:
    """The settings to read each data set of a split by: those of `dataset_mix`, or `config`."""
    if split != "train" or not config.dataset_mix:
        return [config]
    parts = []
    for entry in config.dataset_mix:
        part = copy.copy(config)
        part.dataset_config = ""
        vars(part).update(entry)
        part.max_train_samples = entry.get("samples", 0)
        if part.dataset != config.dataset:  # nothing of it is for evaluation
            part.eval_samples = 0
        parts.append(part)
    return parts


def read_dataset(config: Settings, split: str) -> list[Row]:
    """The raw rows of "train" or "test", from a local path if there is one, else from the hub.

    Raises:
        UserError: missing or malformed, no row, or a row without question or answer, or without
            the number that the curriculum goes by.
        RunError: the hub is out of reach.
    """
    name = config.train_split if split == "train" else config.test_split
    rows, start = find_rows(config, split, name)
    if split == "train":
        rows = for_training(config, name, rows)
    check_columns(config, name, rows, start)
    return rows


def for_training(config: Settings, name: str, rows: list[Row]) -> list[Row]:
    """The rows with what a mix of data sets and the curriculum go by."""
    if config.dataset_mix:
        rows = rows[: config.max_train_samples or len(rows)]
        rows = [{**row, "data_source": config.dataset} for row in rows]
    if config.curriculum != "none":
        check_curriculum(config, name, rows)  # of a single file, these are its first rows
    return rows


def check_columns(config: Settings, name: str, rows: list[Row], start: int) -> None:
    """Refuse a row without question or answer; `start` is the number of the first one."""
    what = f"data set {config.dataset} ({name})"
    refuse_media(what, rows[0])
    for column in (config.question_column, config.answer_column):
        if not is_there(rows[0], column):
            raise UserError(
                f"{what} has no column {column!r}; it has "
                f"{', '.join(rows[0])}: set {columns_to_set(rows[0])}"
            )
        for number, row in enumerate(rows, start=start):
            complaint = wrong_cell(cell(row, column), column == config.answer_column)
            if complaint:
                raise UserError(
                    f"data set {config.dataset} ({name}), row {number}: {complaint} in column "
                    f"{column!r}: {shown(row)}"
                )


def cell(row: Row, column: str) -> Any:
    """What stands in a column; "reward_model.ground_truth" is within another one's table."""
    if column in row:
        return row[column]
    value: Any = row
    for name in column.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def is_there(row: Row, column: str) -> bool:
    return column in row or cell(row, column) is not None


def columns_to_set(row: Row) -> str:
    """Which settings name the columns; for verl's rows, with their values."""
    if is_there(row, "reward_model.ground_truth") and "prompt" in row:
        return "question_column=prompt and answer_column=reward_model.ground_truth"
    return "question_column and answer_column"


def refuse_media(what: str, row: Row) -> None:
    """Raises UserError for questions whose pictures, sounds or films would be left out."""
    found = [name for name in MEDIA if row.get(name) not in (None, [], "")]
    if found:
        raise UserError(
            f"{what} has the column {found[0]!r}, and only text is trained on: the questions would "
            "be asked without it. Remove the column if they make sense so"
        )


def is_conversation(value: object) -> bool:
    """TRL's and verl's prompts: messages with role and content, of which the user's is last."""
    if not isinstance(value, list | tuple) or not value:
        return False
    texts = [m.get(key) if isinstance(m, dict) else None for m in value for key in MESSAGE]
    return all(isinstance(text, str) for text in texts) and value[-1]["role"] == "user"


def check_curriculum(config: Settings, name: str, rows: list[Row]) -> None:
    """Make the column that the curriculum goes by numbers, in place."""
    column = config.curriculum_column
    least = 0 if config.curriculum == "weights" else -sys.float_info.max
    for number, row in enumerate(rows, start=1):
        where = f"data set {config.dataset} ({name}), row {number}"
        if column not in row:
            raise UserError(f"{where}: no column {column!r} for curriculum = {config.curriculum}")
        make_number(row, column)
        value = row[column]
        if not (isinstance(value, float) and least <= value < math.inf):
            kind = "at least 0" if least == 0 else "finite"
            raise UserError(f"{where}: {column} = {shown(value)} must be a number, {kind}")
    if not any(row[column] for row in rows) and config.curriculum == "weights":
        raise UserError(f"data set {config.dataset} ({name}): every {column} is 0")


def make_number(row: Row, column: str) -> None:
    """Turn a cell into the number that it says, if it does; an empty one into NaN."""
    try:
        row[column] = float(row[column])
    except (TypeError, ValueError, OverflowError):
        if row[column] is None:
            row[column] = math.nan


def wrong_cell(value: object, is_answer: bool) -> str:
    """What is wrong with a question or an answer; empty when nothing is.

    Numbers, dates and truth values count as what they print; a list or a table would train on
    Python's way of writing it.
    """
    if not is_answer and is_conversation(value):
        value = value[-1]["content"]  # type: ignore[index]
    if isinstance(value, list | tuple | dict | bytes):
        return f"{type(value).__name__} instead of a text"
    missing = value is None or value != value  # NaN is how pandas writes None
    text = "" if missing else str(value)
    if not is_unicode(text):
        return "half a surrogate pair"
    if is_answer:
        text = text.rpartition("####")[2]  # in GSM8K the answer is what follows
    return "" if text.strip() else "nothing"


def local_path(dataset: str, start: str = "") -> Path | None:
    """The file or folder of a local data set; None for a hub name. Paths count from `start`."""
    path = Path(start, os.path.expanduser(dataset))
    if path.exists():
        return path
    if path.is_symlink():
        raise UserError(f"dataset {dataset} is a link that leads nowhere")
    if path.suffix in SUFFIXES or dataset.startswith(("/", ".", "~")):
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, beside, n=1)
        hint = f"; did you mean {path.with_name(near[0])}?" if near else ""
        raise UserError(f"dataset {dataset} does not exist{hint}")
    refuse_mistyped_path("dataset", dataset)
    return None


def refuse_mistyped_path(key: str, name: str) -> None:
    """Raise UserError for what is no hub name, but a path: typed in another folder than the
    repository, or with an error behind a folder that exists."""
    if (ROOT / name).exists():
        raise UserError(
            f"{key} = {name!r} is not there: paths count from the current folder, so run it in "
            f"{ROOT}"
        )
    parent = Path(name).parent
    if name.count("/") != 1 or name.startswith(("/", ".", "~")) or not parent.is_dir():
        return
    folders = sorted(path.name for path in parent.iterdir() if path.is_dir())
    raise UserError(
        f"{key} = {name!r}: there is no such folder; {parent} has "
        f"{', '.join(folders) or 'no folder'}"
    )


def find_rows(config: Settings, split: str, name: str) -> tuple[list[Row], int]:
    """The rows of a split, and where in its file the first of them stands."""
    path = local_path(config.dataset, config.start)
    if path is None:
        return read_hub_dataset(config, name), 1
    found, shared = files_of(config, path, split, name)
    rows = [row for file in found for row in read_rows(file)]
    return share(rows, split, found[0]) if shared else (rows, 1)


def files_of(config: Settings, path: Path, split: str, name: str) -> tuple[list[Path], bool]:
    """The files of a split, and whether they are for training and evaluation both."""
    single = path.is_file() or layouts.is_saved(path)
    of_test = single or layouts.find(path, config.dataset_config, config.test_split)
    shared = bool(config.eval_samples) and (single or not of_test)
    source = config.train_split if shared and split == "test" else name
    found = layouts.find(path, config.dataset_config, source)
    if not found:
        raise UserError(f"dataset {path} has no file {name}.jsonl (or .json, .csv, .parquet)")
    return found, shared


def share(rows: list[Row], split: str, file: Path) -> tuple[list[Row], int]:
    """The last tenth is for evaluation; see `find_rows`."""
    if len(rows) < 2 and split == "train":
        return rows, 1
    if len(rows) < 2:
        raise UserError(
            f"data file {file} has one row, but evaluation needs another: add one, or set "
            "eval_samples = 0"
        )
    kept = len(rows) - max(1, len(rows) // 10)
    return (rows[:kept], 1) if split == "train" else (rows[kept:], kept + 1)


@contextmanager
def retries_in_one_line() -> Iterator[None]:
    """huggingface_hub tries five times, for half a minute, and logs two lines each time."""
    from ..base.say import say

    logger = logging.getLogger("huggingface_hub.utils._http")
    said: list[logging.LogRecord] = []

    def shortened(record: logging.LogRecord) -> bool:
        if not said:
            say("data      no answer from the hub yet, trying again for half a minute")
        said.append(record)
        return False

    logger.addFilter(shortened)
    try:
        yield
    finally:
        logger.removeFilter(shortened)


def read_hub_dataset(config: Settings, split: str) -> list[Row]:
    import datasets

    what = f"data set {config.dataset} ({config.dataset_config}, {split})"
    try:
        with retries_in_one_line():
            found = datasets.load_dataset(
                config.dataset, config.dataset_config or None, split=split
            )
            features = getattr(found, "features", None) or {}
            kinds = {name: str(getattr(f, "dtype", "")) for name, f in features.items()}
            rows = as_written(list(found), kinds)
    except (OSError, ValueError) as error:  # not found; unknown configuration, split; out of reach
        kind = UserError if isinstance(error, FileNotFoundError | ValueError) else RunError
        raise kind(
            f"{what} cannot be loaded from the hub: {str(error).splitlines()[0]}\n"
            "A local file works too: --set dataset=FILE"
        ) from error
    if not rows:
        raise UserError(f"{what} holds no rows")
    return rows


def usable_prompts(config: Settings, rows: list[Row], what: str, vocabulary: int) -> list[Row]:
    """The rows whose `prompt_ids` are at most max_prompt_length; says how many are left out.

    Raises:
        UserError: token ids that the model lacks, or no prompt is short enough.
    """
    from ..base.say import say  # here: a command that only reads data needs no progress bar

    check_prompts(config, rows, what, vocabulary)
    limit = config.max_prompt_length
    kept = [row for row in rows if 0 < len(row["prompt_ids"]) <= limit]
    if len(kept) < len(rows):
        say(f"data      {len(rows) - len(kept)} {what} prompts over {limit} tokens left out")
    return kept


def check_prompts(config: Settings, rows: list[Row], what: str, vocabulary: int) -> None:
    """Refuse token ids that the model lacks, and data in which no prompt is short enough."""
    check_ids(config.model_name, (i for row in rows for i in row["prompt_ids"]), vocabulary)
    lengths, limit = [len(row["prompt_ids"]) for row in rows], config.max_prompt_length
    if not any(0 < length <= limit for length in lengths):
        raise UserError(
            f"all {len(rows)} {what} prompts are empty or longer than max_prompt_length = {limit} "
            f"tokens: they have {min(lengths)} to {max(lengths)}"
        )


def check_ids(model: str, ids: Iterable[object], vocabulary: int) -> None:
    """Raise UserError for what is no id of a token that the model has: MLX does not check, and
    would read foreign memory."""
    given = list(ids)
    found = [i for i in given if type(i) is int]
    if len(found) < len(given):
        raise UserError(
            f"the chat template of {model} gives no token ids (chat_template_kwargs such as "
            "tokenize = false have that effect)"
        )
    worst = max(found, default=0) if min(found, default=0) >= 0 else min(found)
    if not 0 <= worst < vocabulary:
        raise UserError(
            f"the tokenizer of {model} gives token id {worst}, its model knows only "
            f"{vocabulary}: they do not belong together"
        )


def fingerprint(rows: list[Row]) -> str:
    """SHA-256 of the rows, to tell later which data a run saw."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()
