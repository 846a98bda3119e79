"""The page that a run leaves: made in two seconds, and never why a run fails.

These are seconds of a processor, so that a machine that is busy leaves out nothing; on one whose
disk is slow it is twice as many by the clock.
"""

import gc
import time
from collections.abc import Callable
from pathlib import Path

from ..base.errors import reason
from ..base.say import say
from . import ours, page
from .page_source import Source
from .run import Run

SECONDS = 2.0


class Unwanted(Exception):
    """Ctrl-C came."""


def last_words(run: Run) -> str:
    """What the run's last line says of the page, which is written now; "" where there is none."""
    if not run.args.report:
        return ""
    path = run.folder / ours.PAGE
    try:
        write(path, lambda: run.interrupted)
    except (Unwanted, KeyboardInterrupt):
        say("note      the page was not written, to stop at once")
        return ""
    except Exception as error:  # noqa: BLE001 - the run has ended well, whatever a page lacks
        say(f"warning   the page of the run was not written: {reason(error)}")
        return ""
    return f"; look at {run.shown(path)}"


def write(path: Path, interrupted: Callable[[], bool]) -> None:
    """Raises Unwanted when a signal asks for the end."""
    start, clock = time.thread_time(), time.perf_counter()

    def is_over(share: float) -> bool:
        if interrupted():
            raise Unwanted
        spent = max(time.thread_time() - start, (time.perf_counter() - clock) / 2)
        return spent > share * SECONDS

    collects = gc.isenabled()
    gc.disable()  # there is no garbage to look for, and a trainer has much that would be looked at
    try:
        page.write(path, [Source.at(path.parent)], page.Room(limited=True, is_over=is_over))
    finally:
        if collects:
            gc.enable()
