"""A line for the person at the terminal."""

import os
import sys

from tqdm import tqdm

from .text import redact


def say(text: str) -> None:
    """A line on standard output that does not tear the progress bar, and never ends a run.

    What the terminal can't show is replaced; when the output has nowhere to go (`| head`, a closed
    terminal, a full disk), it is dropped.
    """
    encoding = sys.stdout.encoding or "utf-8"
    try:
        tqdm.write(redact(text).encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
