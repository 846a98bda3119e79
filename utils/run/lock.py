"""One run per folder: a lock that the kernel drops when its process dies, however it dies.

The file stays behind after `kill -9`; since nobody holds it, the next run takes it over. POSIX
locks belong to the process, so a worker that outlives a killed run does not keep it locked.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, TypedDict, cast

from ..base.errors import UserError
from ..base.say import say

_own: set[Path] = set()  # a POSIX lock does not keep its own process out


class Holder(TypedDict, total=False):
    """Who holds or held a folder; empty when the file does not say."""

    pid: int
    host: str
    began: str | None
    started: str


class RunLock:
    """Held from `claim` (or from the start, where an earlier run left the file) to the end."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, Path(os.path.realpath(folder)) / ".lock"
        self.file: IO[str] | None = None
        self.process = os.getpid()

    def __enter__(self) -> "RunLock":
        """Nothing is written: a mistyped setting may still end this run before it begins.

        Raises:
            UserError: another process holds the folder.
        """
        if os.path.lexists(self.path):
            self._take()
        return self

    def claim(self) -> None:
        """Take the lock, if that is not done yet, and write down who holds it.

        Raises:
            UserError: another process holds the folder.
        """
        if self.file is None:
            self._take()
        assert self.file is not None
        killed = holder(self.file)
        if killed:
            say(f"lock      taken over from {described(killed)}, which was killed")
        me = {"pid": os.getpid(), "host": socket.gethostname(), "began": began(os.getpid())}
        self.file.seek(0)
        self.file.truncate()
        self.file.write(json.dumps({**me, "started": time.strftime("%Y-%m-%d %H:%M:%S")}) + "\n")
        self.file.flush()

    def __exit__(self, *_: object) -> None:
        if self.file is not None and os.getpid() == self.process:  # not in a child of the run
            _own.discard(self.path)
            with contextlib.suppress(OSError):  # in a folder that turned read-only: looks killed
                self.path.unlink()
            self.file.close()
            self.file = None

    def _take(self) -> None:
        if self.path in _own:
            raise UserError(f"output_dir {self.folder}: this process is already training there")
        while True:
            file = self._open()
            with contextlib.ExitStack() as stack:
                stack.callback(file.close)
                self._lock(file)
                if not holder(file) and foreign(file):
                    raise self._refused("it is no lock of a run")
                # The holder before us deletes the file; a lock on a deleted file locks nothing.
                if self.path.exists() and os.path.samestat(
                    self.path.stat(), os.fstat(file.fileno())
                ):
                    stack.pop_all()
                    break
        self.file = file
        _own.add(self.path)

    def _open(self) -> IO[str]:
        try:
            found = self.path.lstat().st_mode if os.path.lexists(self.path) else stat.S_IFREG
            if stat.S_ISLNK(found) or stat.S_ISFIFO(found):  # these would lead elsewhere, or wait
                raise self._refused("it is no ordinary file")
            return self.path.open("a+", encoding="utf-8")
        except OSError as error:
            raise self._refused(error.strerror or str(error)) from None

    def _refused(self, why: str) -> UserError:
        return UserError(
            f"{self.path} cannot be opened ({why}): it says which run uses the folder; delete it "
            "if none does, or choose another output_dir"
        )

    def _lock(self, file: IO[str]) -> None:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            found = holder(file)
            if error.errno not in (errno.EACCES, errno.EAGAIN) and not (found and alive(found)):
                return  # this file system has no locks: what the file says has to do
            who = described(found) if found and alive(found) else "another process"
            raise UserError(
                f"output_dir {self.folder} is in use by {who}: let it finish, stop it, or choose "
                "another output_dir"
            ) from None


def holder(file: IO[str]) -> Holder:
    """What the file says.

    Not by its path: to close any descriptor of a file drops the locks that its process has on it.
    """
    file.seek(0)
    try:
        found = json.loads(file.read())
    except (ValueError, RecursionError):
        return {}
    names_one = isinstance(found, dict) and isinstance(found.get("pid"), int)
    return cast(Holder, found) if names_one else {}


def foreign(file: IO[str]) -> bool:
    """Whether the file holds something else than what is left of a run's note."""
    file.seek(0)
    try:
        text = file.read(1000).strip("\0 \n")
    except ValueError:
        return True
    return not '{"pid"'.startswith(text[:6])


def described(found: Holder) -> str:
    return f"process {found['pid']} on {found.get('host')} (started {found.get('started')})"


def alive(found: Holder) -> bool:
    """Whether that process still runs; one on another machine counts as alive.

    A process number is used again after a while: the time at which the process began tells.
    """
    if found.get("host") != socket.gethostname():
        return True
    return began(found["pid"]) == found.get("began")


def began(pid: int) -> str | None:
    """When a process began, in the words of its system; None when there is no such process."""
    if sys.platform == "linux":
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        except OSError:
            return None
    command = ["ps", "-o", "lstart=", "-p", str(pid)]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return found or None
