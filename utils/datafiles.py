"""Rows of questions from local files; a malformed one is named by file, line and column."""

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

from .errors import RunError, UserError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def find_split(path: Path, split: str) -> Path | None:
    """The file of a split: `path` itself, or `split.*` in the folder `path`; None when absent."""
    if path.is_file():
        return path
    found = [path / f"{split}{suffix}" for suffix in SUFFIXES]
    return next((file for file in found if file.is_file()), None)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a .jsonl, .json (a list), .csv or .parquet file.

    Raises:
        UserError: unknown kind, unreadable, malformed (with line and column) or empty.
    """
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"data file {path}: expected one of {', '.join(SUFFIXES)}")
    try:
        rows = reader(path)
    except UnicodeDecodeError as error:
        raise UserError(f"data file {path} is not UTF-8 text: {error}") from None
    except OSError as error:
        raise UserError(f"data file {path} cannot be read: {error.strerror or error}") from None
    if not rows:
        raise UserError(f"data file {path} holds no rows")
    return rows


def _jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                rows.append(_object(path, number, line))
    return rows


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        column = getattr(error, "colno", 1)
        reason = getattr(error, "msg", "nested too deeply")
        raise UserError(f"{path}, line {number}, column {column}: not JSON: {reason}") from None
    if not isinstance(row, dict):
        raise UserError(f"{path}, line {number}: expected an object, found {type(row).__name__}")
    return row


def _json(path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{path}, {where}: not JSON: {error.msg}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: expected a list of objects")
    return rows


def _csv(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        rows = []
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise UserError(
                        f"{path}, line {reader.line_num}: expected "
                        f"{len(reader.fieldnames or [])} columns"
                    )
                rows.append(row)
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: {error}") from None
    return rows


def _parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"data file {path} is not a parquet file: {error}") from None


def read_dataset(config: Any, split: str, name: str) -> list[dict[str, Any]]:
    """The raw rows of a split, from a local path if there is one, else from the hub."""
    path = Path(config.dataset)
    if not path.exists():
        if path.suffix in SUFFIXES or config.dataset.startswith(("/", ".", "~")):
            raise UserError(f"dataset {config.dataset} does not exist")
        return read_hub_dataset(config, name)
    file = find_split(path, name)
    if file is None:
        raise UserError(f"dataset {path} has no file {name}.jsonl (or .json, .csv, .parquet)")
    rows = read_rows(file)
    if file != path or not config.eval_samples:
        return rows
    if len(rows) < 2:
        raise UserError(f"data file {file} has one row, but evaluation needs another")
    held_out = max(1, len(rows) // 10)  # one file: its last tenth is for evaluation
    return rows[:-held_out] if split == "train" else rows[-held_out:]


def read_hub_dataset(config: Any, split: str) -> list[dict[str, Any]]:
    import datasets

    try:
        return list(datasets.load_dataset(config.dataset, config.dataset_config, split=split))
    except (OSError, ValueError) as error:  # not found, out of reach; unknown configuration, split
        raise RunError(
            f"data set {config.dataset} ({config.dataset_config}, {split}) cannot be loaded from "
            f"the hub: {str(error).splitlines()[0]}\nA local file works too: --set dataset=FILE"
        ) from error


def fingerprint(rows: list[dict[str, Any]]) -> str:
    """SHA-256 of the rows, to tell later which data a run saw."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()
