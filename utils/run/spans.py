"""Files of compressed lines to which a run adds piece by piece: readable at any moment.

A piece is a gzip member of its own, so that the whole is an ordinary .gz file. A kill, a full disk
or a power cut can at most tear the last piece, which readers leave out; a piece that was damaged
later costs itself, and none of those after it.
"""

import gzip
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

LEVEL = 4  # of 1 to 9: see benchmarks/completions_cost.py
HEADER = b"\x1f\x8b\x08\0\0\0\0\0"  # of a member without a name and a time
BLOCK = 2**16

Damaged = Callable[[Path, str], None]
"""Is told which file is damaged, and how."""


@dataclass
class Piece:
    start: int
    end: int
    lines: list[str]


def append(path: Path, lines: Iterable[str]) -> int:
    """Add a piece; returns its bytes. Where the disk refuses, the file stays as it was.

    Raises:
        OSError: as the system says it.
    """
    text = "".join(f"{line}\n" for line in lines)
    data = gzip.compress(text.encode(errors="replace"), LEVEL, mtime=0)
    start = path.stat().st_size if path.exists() else 0
    try:
        with path.open("ab") as file:
            file.write(data)
    except OSError:
        if path.is_file():
            os.truncate(path, start)
        raise
    return len(data)


def pieces(path: Path, damaged: Damaged) -> Iterator[Piece]:
    """The whole pieces of a file, in order. A file that is gone has none."""
    data = contents(path, damaged)
    place, lost = 0, -1  # where the first of some lost bytes is
    while place < len(data):
        found = unpacked(data, place)
        if found is None:
            lost = place if lost < 0 else lost
            place = data.find(HEADER, place + 1)
            if place < 0:
                break
            continue
        if lost >= 0:
            damaged(path, f"{place - lost:,} bytes from byte {lost:,} on cannot be read")
            lost = -1
        yield found
        place = found.end
    if lost >= 0 and not is_torn(data, lost):
        damaged(path, f"the last {len(data) - lost:,} bytes cannot be read")


def starts(data: bytes) -> Iterator[int]:
    """Where a piece seems to begin, without a look into what is before it."""
    place = data.find(HEADER)
    while place >= 0:
        yield place
        place = data.find(HEADER, place + 1)


def contents(path: Path, damaged: Damaged) -> bytes:
    """Nothing of a file that is gone, or can't be read."""
    if path.exists() and not path.is_file():  # to read a pipe would wait for ever
        damaged(path, "it is no ordinary file")
        return b""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        damaged(path, error.strerror or str(error))
        return b""


def unpacked(data: bytes, start: int) -> Piece | None:
    """The piece that begins here; None where none does, or not all of it is there."""
    unzip, parts, place = zlib.decompressobj(31), [], start
    try:
        while not unzip.eof and place < len(data):
            parts.append(unzip.decompress(data[place : place + BLOCK]))
            place += BLOCK
        if not unzip.eof:
            return None
        text = b"".join(parts).decode()
    except (zlib.error, UnicodeDecodeError):
        return None
    end = min(place, len(data)) - len(unzip.unused_data)
    return Piece(start, end, [line for line in text.split("\n") if line])


def is_torn(data: bytes, start: int) -> bool:
    """Whether what stands there is the beginning of a piece, as a kill or a writer at work leaves
    it."""
    unzip = zlib.decompressobj(31)
    try:
        unzip.decompress(data[start:])
    except zlib.error:
        return False
    return not unzip.eof


def cut(path: Path, begins_later: Callable[[str], bool], damaged: Damaged) -> None:
    """Drop the first piece whose first line `begins_later`, all after it, and what is torn."""
    end = 0
    for piece in pieces(path, damaged):
        if piece.lines and begins_later(piece.lines[0]):
            break
        end = piece.end
    else:
        if not path.is_file() or end == path.stat().st_size or not is_torn(path.read_bytes(), end):
            return
    os.truncate(path, end)
