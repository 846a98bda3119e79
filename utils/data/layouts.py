"""Folders of data: a file by split, a clone of a hub's repository, what `save_to_disk` writes."""

from pathlib import Path
from typing import Any

from ..base.errors import UserError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def find(path: Path, config: str, split: str) -> list[Path]:
    """The files of a split in order; none where it is absent.

    `path` itself, or within it `split.*`; `split-00000-of-00002.*` there, in data/ or in the
    folder of the configuration, as on the hub; or a folder of Arrow files.
    """
    if path.is_file():
        return [path]
    if is_saved(path):
        return [path]
    if is_saved(path / split):
        return [path / split]
    for suffix in SUFFIXES:
        if (path / f"{split}{suffix}").is_file():
            return [path / f"{split}{suffix}"]
    for folder in (*([path / config] if config else []), path / "data", path):
        for suffix in SUFFIXES:
            if found := sorted(folder.glob(f"{split}-[0-9]*-of-[0-9]*{suffix}")):
                return found
    return []


def is_saved(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` of the package datasets wrote it."""
    return all((folder / name).is_file() for name in ("state.json", "dataset_info.json"))


def read_arrow(path: Path) -> list[dict[str, Any]]:
    """The rows that `save_to_disk` wrote.

    Raises:
        UserError: they can't be read.
    """
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
        return [dict(row) for row in saved]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"data folder {path} cannot be read: {error}") from None
