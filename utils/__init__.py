"""Tools around the trainer: where, how fast, with what and how it looks, never what it computes.

The first that a command imports: it says what is missing, and what Ctrl-C does meanwhile.
"""

from __future__ import annotations  # so that Python 3.9, which macOS has, can read this

import importlib.util
import os
import signal
import sys
from pathlib import Path
from types import FrameType

_HERE = Path(__file__).resolve().parent


def _refuse_interpreter() -> None:
    """End a command that was typed with a Python that is too old, or has not its packages."""
    with_uv = f"type `uv run {os.path.relpath(sys.argv[0])}`, or see QUICK_START.md"
    if sys.version_info < (3, 11):  # noqa: UP036
        number = ".".join(map(str, sys.version_info[:3]))
        print(f"error: this is Python {number}, 3.11 is needed: {with_uv}", file=sys.stderr)
        sys.exit(2)
    if importlib.util.find_spec("mlx_lm") is None:
        print(f"error: {sys.executable} has no package mlx-lm: {with_uv}", file=sys.stderr)
        sys.exit(2)


def _leave(number: int, frame: FrameType | None) -> None:
    """Ctrl-C: quietly while a command imports its modules, as Python does from then on."""
    if hasattr(sys.modules["__main__"], "main"):  # the last thing that a command defines
        signal.default_int_handler(number, frame)
    os._exit(128 + number)


_program = Path(getattr(sys.modules["__main__"], "__file__", None) or "-").resolve()
if _program.parent == _HERE or _program == _HERE.with_name("mlx-grpo.py"):
    # Not where a shell ignores Ctrl-C, for what it runs in the background.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    _refuse_interpreter()
