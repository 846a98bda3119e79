"""Terminals for tests: a stream that says it is one, and one that a program runs in."""

import fcntl
import io
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios

import pytest
from conftest import ROOT


class Terminal(io.StringIO):
    """A stream that was told to be a terminal, with a screen to look at."""

    encoding = "utf-8"

    def __init__(self, columns=80, rows=24):
        super().__init__()
        pyte = pytest.importorskip("pyte", reason="a terminal to look at: uv sync installs it")
        self.screen = pyte.HistoryScreen(columns, rows, history=1000)
        self.stream = pyte.Stream(self.screen)
        self.written = ""

    def isatty(self):
        return True

    def write(self, text):
        self.written += text
        self.stream.feed(text.replace("\r\n", "\n").replace("\n", "\r\n"))  # as a pty does
        return len(text)

    def lines(self):
        """What stands on the screen."""
        return [line.rstrip() for line in "\n".join(self.screen.display).rstrip().split("\n")]


def resize(descriptor, columns, rows):
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


class Program:
    """Python code in a terminal of its own; its standard input is a pipe."""

    def __init__(self, code, columns=80, rows=24, **environment):
        self.master, slave = pty.openpty()
        resize(slave, columns, rows)
        self.seen = Terminal(columns, rows)
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "TERM": "xterm-256color", **environment},
            stdin=subprocess.PIPE,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        os.close(self.master)

    def tell(self, text="\n"):
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    def resize(self, columns, rows=24):
        """As a window that cuts what does not fit any more (pyte does not wrap it anew)."""
        self.seen.screen.resize(rows, columns)
        resize(self.master, columns, rows)
        self.process.send_signal(signal.SIGWINCH)

    def read(self):
        """What came; False at the end."""
        if not select.select([self.master], [], [], 60)[0]:
            raise TimeoutError(self.seen.lines())
        try:
            data = os.read(self.master, 65536)
        except OSError:  # the program has ended
            return False
        self.seen.write(data.decode())
        return bool(data)

    def until(self, holds):
        """Read until that holds for the lines of the screen; returns them."""
        while not holds(self.seen.lines()):
            assert self.read(), self.seen.lines()
        return self.seen.lines()

    def finish(self):
        self.process.stdin.close()
        while self.read():
            pass
        self.process.wait()
        return self.seen.lines()
