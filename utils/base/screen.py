"""Lines at the bottom of a terminal that are drawn anew in place, below what is said.

The cursor waits at the first cell of the first line, so that whatever a new size of the window has
made of the lines lies below it and is erased: they leave nothing behind.
"""

import functools
import itertools
import os
import stat
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Self, TextIO

from . import say

Piece = tuple[str, str]
"""Text, and how a terminal is to show it: one of the styles below."""
PLAIN, BOLD, RED, GREEN = "", "1", "31", "32"  # legible on light and dark

LEAST = 0.2  # seconds between two drawings
TICK = 1.0  # seconds after which a clock is out of date
MEASURED = 80, 24  # columns and rows of a terminal that does not know them
BARS = " ▏▎▍▌▋▊▉█"
SPARKS = "▁▂▃▄▅▆▇█"


def terminal() -> TextIO | None:
    """The stream on which lines can be drawn, if there is one.

    With the output in a pipe there is none, even if errors go to a terminal: what stands behind the
    pipe may show the same there (`| tee log.txt`).
    """
    if os.environ.get("TERM") == "dumb" or goes_into_a_pipe():
        return None
    return next((file for file in (sys.stdout, sys.stderr) if file.isatty()), None)


def goes_into_a_pipe() -> bool:
    try:
        mode = os.fstat(1).st_mode
    except OSError:  # it was closed
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


class Block:
    """The lines that `compose` makes for so many columns and rows, as long as the block lasts.

    Every drawing is one text that begins and ends with the cursor at the first cell, so that a
    signal or a thread in between tears nothing.
    """

    def __init__(
        self, compose: Callable[[int, int], Sequence[Sequence[Piece]]], file: TextIO
    ) -> None:
        self.compose, self.file = compose, file
        self.process, self.lock = os.getpid(), threading.RLock()
        self.drawn, self.hidden = 0.0, 0
        self.over = threading.Event()

    def __enter__(self) -> Self:
        self.around, say.below = say.below, self
        self.draw()
        threading.Thread(target=self.tick, daemon=True, name="progress").start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        with self.lock:
            say.below = self.around
            self.write(ERASE)

    def tick(self) -> None:
        """Let clocks go on, and follow the window's size, while the work is busy elsewhere."""
        while not self.over.wait(TICK):
            self.draw()

    def draw(self) -> None:
        """Unless that was done a moment ago, or something else has the place."""
        now = time.monotonic()
        if now - self.drawn < LEAST or os.getpid() != self.process:
            return
        with self.lock:
            if not (self.over.is_set() or self.hidden):
                self.drawn = now
                self.write(self.text())

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Room for something else."""
        if os.getpid() != self.process:
            yield
            return
        with self.lock:
            self.write(ERASE)
            self.hidden += 1
            try:
                yield
            finally:
                self.hidden -= 1
                self.drawn = 0.0
                self.draw()

    def columns(self) -> int:
        return size_of(self.file)[0]

    def text(self) -> str:
        columns, rows = size_of(self.file)
        lines = [painted(line, columns - 1, self.file) for line in self.compose(columns, rows)]
        lines = lines[: max(1, rows - 1)]
        up = f"\x1b[{len(lines) - 1}A" if len(lines) > 1 else ""
        body = "\x1b[K\r\n".join(lines)
        # Without wrapping: a character may be wider here than Unicode says.
        return f"\r\x1b[?7l{body}\x1b[K\x1b[J\x1b[?7h{up}\r"

    def write(self, text: str) -> None:
        try:
            self.file.write(text)
            self.file.flush()
        except (OSError, ValueError):  # the terminal is gone
            self.over.set()


ERASE = "\r\x1b[J"


def size_of(file: TextIO) -> tuple[int, int]:
    """Columns and rows."""
    try:
        columns, rows = os.get_terminal_size(file.fileno())
    except (OSError, ValueError):
        return MEASURED
    return columns or MEASURED[0], rows or MEASURED[1]


def painted(line: Sequence[Piece], columns: int, file: TextIO) -> str:
    """A line for a terminal: nothing in it that it obeys but our own styles, and no longer."""
    return _painted(tuple(line), columns, file.encoding or "utf-8", "NO_COLOR" not in os.environ)


@functools.lru_cache(maxsize=64)  # most lines are the same in many drawings
def _painted(line: tuple[Piece, ...], columns: int, encoding: str, styled: bool) -> str:
    parts = []
    for text, style in line:
        lines = say.in_encoding(text.replace("\t", " "), encoding).splitlines()
        shown = cut(" ".join(lines), columns)
        columns -= cells(shown)
        parts.append(f"\x1b[{style}m{shown}\x1b[0m" if style and styled else shown)
    return "".join(parts)


def cells(text: str) -> int:
    """Columns that a text takes."""
    return sum(map(width, text)) if not text.isascii() else len(text)


def width(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):  # on top of the one before
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def cut(text: str, columns: int) -> str:
    """The beginning that fits."""
    if len(text) <= columns and text.isascii():
        return text
    used = 0
    for place, character in enumerate(text):
        used += width(character)
        if used > columns:
            return text[:place]
    return text


def tail(text: str, columns: int, mark: str = "...") -> str:
    """The end that fits, marked where something is left out."""
    if cells(text) <= columns:
        return text
    return mark + cut(text[::-1], max(0, columns - len(mark)))[::-1]


def can_show(text: str, file: TextIO) -> bool:
    """Whether the terminal's encoding has it."""
    try:
        text.encode(file.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def bar(part: float, columns: int, file: TextIO) -> str:
    """So many columns, a part of them filled; nothing where there is hardly room."""
    columns -= 2
    if columns < 3:
        return ""
    if not can_show(BARS, file):
        return f"|{'#' * round(min(1.0, part) * columns):<{columns}}|"
    eighths = int(min(1.0, part) * columns * 8)
    full, rest = divmod(eighths, 8)
    return f"|{BARS[8] * full + (BARS[rest] if rest else ''):<{columns}}|"


def spark(values: Sequence[float], columns: int, file: TextIO, whole: bool = False) -> str:
    """A curve of one line, from the lowest to the highest value (`whole`: from 0 to 1)."""
    if len(values) < 2 or columns < 2 or not can_show(SPARKS, file):
        return ""
    if len(values) > columns:
        edges = [len(values) * i // columns for i in range(columns + 1)]
        pairs = itertools.pairwise(edges)
        values = [sum(values[a:b]) / (b - a) for a, b in pairs]
    low, high = (0.0, 1.0) if whole else (min(values), max(values))
    scale = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARKS[min(7, max(0, round((value - low) * scale)))] for value in values)
