"""Where measurements go: raw records, one JSON object a line, and the sections of RESULTS.md."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "RESULTS.md"


def append(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_section(name: str, rows: Sequence[str], path: Path = RESULTS) -> None:
    """Put the lines between the markers `<!-- name -->` of RESULTS.md, or of another file."""
    from docs.readme_tables import replaced

    text = path.read_text(encoding="utf-8")
    path.write_text(replaced(text, name, list(rows)), encoding="utf-8")
