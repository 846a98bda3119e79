"""The one door to the terminal: lines, errors, streamed text, and what argparse has to say.

Whatever stands in them (questions, completions, file names, replies of servers) is shown and never
obeyed, secrets are hidden, and an output that has nowhere to go ends no run.
"""

import argparse
import contextlib
import os
import sys
import threading
import traceback
import warnings
from types import TracebackType
from typing import NoReturn, Protocol, TextIO

from .text import redact, visible


class Below(Protocol):
    """Lines at the bottom of the terminal, which are drawn anew below what is said."""

    def lifted(self) -> contextlib.AbstractContextManager[None]:
        """They are out of the way as long as the block lasts."""


below: Below | None = None  # screen.py sets it


def out_of_the_way(file: TextIO) -> contextlib.AbstractContextManager[None]:
    """Room on the terminal for what is written to `file`, if it goes there."""
    if below is None or not file.isatty():
        return contextlib.nullcontext()
    return below.lifted()


silent_as = ""  # the name of a process whose lines another one says as well


def as_one_of_many(name: str) -> None:
    """From here on this process says nothing, and complains under its name."""
    global silent_as
    silent_as = name


def say(text: str) -> None:
    """A line on standard output that does not tear the progress bar, and never ends a run.

    What the terminal can't show is replaced; when the output has nowhere to go (`| head`, a closed
    terminal, a full disk), it is dropped.
    """
    if silent_as:
        return
    try:
        line = fit(redact(text), sys.stdout)
        bars = sys.modules.get("tqdm")  # libraries show bars of their own
        with out_of_the_way(sys.stdout):
            if bars is None:
                sys.stdout.write(line + "\n")
            else:
                bars.tqdm.write(line)
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except ValueError:  # it was closed
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process


def complain(text: str, end: str = "\n") -> None:
    """A line on standard error: an error, or what is no result."""
    text = f"{silent_as}: {text}" if silent_as else text
    try:
        with out_of_the_way(sys.stderr):
            sys.stderr.write(fit(redact(text), sys.stderr) + end)
            sys.stderr.flush()
    except (OSError, ValueError):  # it has nowhere to go: the exit code says it as well
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def put(text: str, file: TextIO) -> None:
    """Part of a result, at once: what a model says, while it says it. Nothing of it is hidden."""
    with out_of_the_way(file):
        file.write(fit(text, file))
        file.flush()


def fit(text: str, file: TextIO) -> str:
    """For a terminal: nothing that it obeys, and only what its encoding has."""
    return in_encoding(text, file.encoding or "utf-8")


def in_encoding(text: str, encoding: str) -> str:
    return visible(text).encode(encoding, "replace").decode(encoding)


as_python_does = warnings.formatwarning


class Parser(argparse.ArgumentParser):
    """Whose errors may repeat what was typed."""

    def error(self, message: str) -> NoReturn:
        super().error(visible(redact(message)))


def tell_everything() -> None:
    """Let Python's own words for bugs, threads that fail and warnings leave by this door too."""

    def of_program(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        complain("".join(traceback.format_exception(kind, error, trace)), end="")

    def of_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
            complain(f"in thread {args.thread.name if args.thread else '?'}:")
            of_program(args.exc_type, args.exc_value, args.exc_traceback)

    def of_warning(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        line: str | None = None,
    ) -> str:
        return visible(redact(as_python_does(message, category, filename, lineno, line)))

    sys.excepthook, threading.excepthook = of_program, of_thread
    warnings.formatwarning = of_warning
