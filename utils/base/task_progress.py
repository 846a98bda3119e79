"""How far a piece of work is: at the bottom of a terminal, or as lines now and then elsewhere."""

import time
from collections.abc import Callable, Sequence
from typing import Self

from . import screen
from .say import say
from .screen import Piece

PORTION = 20  # lines of a whole piece of work, where it is not shown in place
PAUSE = 60.0  # seconds after which there is a line all the same
NARROW = 60  # columns below which little fits
FEWEST, MOST = 12, 32  # columns of the bar


class Progress:
    """Of `total` units, of which some were done before.

    Args:
        unit: What is counted, such as "update".
        label: What stands before the count.
        tell: Takes a line where nothing can be drawn.
        quiet: Nothing is shown.
        calm: Lines come after a minute only: what is short needs none.
    """

    def __init__(
        self,
        total: int,
        unit: str,
        done: int = 0,
        label: str = "",
        tell: Callable[[str], None] = say,
        quiet: bool = False,
        calm: bool = False,
    ) -> None:
        self.total, self.unit, self.done, self.label, self.tell = total, unit, done, label, tell
        self.quiet, self.calm = quiet, calm
        self.figures = ""
        self.stage_name, self.stage_start = "", time.monotonic()
        self.ends = [time.monotonic()]  # of the units done so far, after the start
        self.before = done
        self.told, self.told_at = done, time.monotonic()
        file = None if quiet else screen.terminal()
        self.block = screen.Block(self.lines, file) if file else None

    def __enter__(self) -> Self:
        if self.block:
            self.block.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self.block:
            self.block.__exit__(*error)

    def stage(self, name: str) -> None:
        """What is going on."""
        if name != self.stage_name:
            self.stage_name, self.stage_start = name, time.monotonic()
        if self.block:
            self.block.draw()

    def step(self, units: int = 1, figures: str = "") -> None:
        """So many more are done; `figures` are what is known now."""
        self.done += units
        self.figures = figures or self.figures
        self.ends += [time.monotonic()] * units
        if self.block:
            self.block.draw()
        if (self.block is None or self.block.columns() < NARROW) and self.is_due():
            self.tell(self.line())

    def is_due(self) -> bool:
        """Whether it is time for a line: after a twentieth of the whole, or a minute."""
        if self.quiet:
            return False
        late = time.monotonic() - self.told_at >= PAUSE
        far = self.done - self.told >= -(-self.total // PORTION) or self.done >= self.total
        if not late and (self.calm or not far):
            return False
        self.told, self.told_at = self.done, time.monotonic()
        return True

    def line(self) -> str:
        left = f"{self.left()} left" if self.done < self.total else ""
        more = ", ".join(filter(None, [self.figures, left]))
        count = f"{self.label}{self.unit} {self.done:,} of {self.total:,}"
        return f"{count}: {more}" if more else count

    def left(self) -> str:
        """Time for the rest, by the last half of what was done; empty as long as nothing was."""
        known = len(self.ends) - 1
        if not known:
            return ""
        middle = known // 2
        each = (self.ends[-1] - self.ends[middle]) / (known - middle)
        passed = min(each, time.monotonic() - self.ends[-1])
        return clock(max(0.0, each * (self.total - self.done) - passed))

    # On a terminal.

    def lines(self, columns: int, rows: int) -> Sequence[Sequence[Piece]]:
        """All that is drawn: a single line."""
        return [self.head(columns, self.figures.split(", "))]

    def head(self, columns: int, figures: Sequence[str] = ()) -> list[Piece]:
        """Count, bar, time left, and as much more as fits; in a narrow window a shorter bar."""
        assert self.block
        narrow = columns < NARROW
        count = f"{self.label}{'' if narrow else self.unit + ' '}{self.done:,}/{self.total:,} "
        least = FEWEST // 2 if narrow else FEWEST
        room = columns - 1 - screen.cells(count)
        words = ""
        for more in (f"{self.left()} left" if self.left() else "", *figures, self.doing()):
            longer = f"{words}, {more}" if words else f" {more}"
            if more and screen.cells(longer) <= room - least:
                words = longer
        bar = screen.bar(self.part(), min(MOST, room - screen.cells(words)), self.block.file)
        return [(count, screen.PLAIN), (bar, screen.BOLD), (words, screen.PLAIN)]

    def part(self) -> float:
        return self.done / self.total if self.total else 1.0

    def doing(self) -> str:
        """The stage, and how long it has been going."""
        seconds = time.monotonic() - self.stage_start
        since = (
            "" if seconds < 1 else f" {seconds:.0f} s" if seconds < 100 else f" {clock(seconds)}"
        )
        return self.stage_name and self.stage_name + since


def clock(seconds: float) -> str:
    """`1:05`, `2:00:00`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
