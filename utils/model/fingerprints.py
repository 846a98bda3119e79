"""Fingerprints of files: of checkpoints, and of what a run is made of beside settings and data."""

import hashlib
import json
from pathlib import Path

PIECES, PIECE = 16, 2**16


def of_model(folder: Path) -> str:
    """SHA-256 of config.json and, for each weight file, of its name, size, header and 16 pieces.

    Of each file the start is read (the header's own), the end, and what lies evenly between, 64 kB
    each: milliseconds for gigabytes. Weights that were trained further differ in all of them.
    """
    digest = hashlib.sha256()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    digest.update(json.dumps(config, sort_keys=True).encode())
    for path in sorted(folder.glob("model*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            header = 8 + int.from_bytes(file.read(8), "little")
            for start, count in ((0, header), *pieces(header, size)):
                file.seek(start)
                digest.update(file.read(count))
    return digest.hexdigest()


def pieces(start: int, end: int) -> list[tuple[int, int]]:
    """(place, length) of what is read between two places: all of it where that is little."""
    room = end - start
    if room <= PIECES * PIECE:
        return [(start, room)]
    step = (room - PIECE) / (PIECES - 1)
    return [(start + round(n * step), PIECE) for n in range(PIECES)]


def of_file(path: Path) -> str:
    """SHA-256 of all of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
