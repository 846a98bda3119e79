"""JSON files: written in one piece, and read with care."""

import json
import os
from pathlib import Path
from typing import Any

from .errors import UserError


def write_json(path: Path, value: object) -> None:
    """In one piece: a kill leaves the old file or the new one."""
    path = Path(os.path.realpath(path))  # a link stays one
    temporary = path.with_name(f".{path.name}.partial")
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty when there is no such file.

    Raises:
        UserError: it can't be read, or holds something else.
    """
    try:
        if not path.is_file():  # to read a pipe would wait for ever
            return {}
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object")
    return value
