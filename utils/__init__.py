"""Tools around the trainer: where, how fast, with what and how it looks, never what it computes."""

import os
import signal
import sys
from pathlib import Path
from types import FrameType

_HERE = Path(__file__).resolve().parent


def _leave(number: int, frame: FrameType | None) -> None:
    """Ctrl-C: quietly while a command imports its modules, as Python does from then on."""
    if hasattr(sys.modules["__main__"], "main"):  # the last thing that a command defines
        signal.default_int_handler(number, frame)
    os._exit(128 + number)


# For the commands alone, and not where a shell that runs them in the background ignores Ctrl-C.
_program = Path(getattr(sys.modules["__main__"], "__file__", None) or "-").resolve()
if _program.parent in (_HERE, _HERE.parent) and (
    signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, _leave)
