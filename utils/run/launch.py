"""`--ranks` and `--hostfile`: start the ranks of a run by `mlx.launch`, and tell how they ended.

`mlx.launch` ends with 0 whatever became of the ranks, and waits for ever for one that is stopped.
So each rank says on a line of its own when it begins and how it ends, which is not shown; the run
has failed unless all did well.
"""

import argparse
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from ..base.errors import RunError, UserError, reason
from ..base.say import complain, put
from ..base.text import Json

MARK = "MLX_GRPO_MARK"
"""Word that begins the lines of ranks to the process that started them."""
TYPED = "MLX_GRPO_TYPED"
"""What of the command line started the ranks."""
START = "from mlx._distributed_utils.launch import main; main()"
LINGER = 15.0  # seconds for the others, once a rank has ended badly
MOST = 1024


def mark(words: str) -> None:
    """A line to the process that started the ranks, if there is one."""
    if word := os.environ.get(MARK):
        put(f"{word} {os.environ['MLX_RANK']} {words}\n", sys.stdout)


def told(work: Callable[[], int]) -> int:
    """The exit code of `work`, which that process hears of."""
    mark(f"begins {os.getpid()} {socket.gethostname()}")
    code = work()
    mark(f"ends {code}")
    return code


def is_to_start(given: argparse.Namespace) -> bool:
    """Whether this process starts ranks, and is none itself."""
    asked = given.ranks is not None or given.hostfile
    return bool(asked) and not given.dry_run and "MLX_RANK" not in os.environ


def ranks(given: argparse.Namespace, script: str) -> int:
    """Start them, and return the exit code of the run: 0 if every rank did well.

    Raises:
        UserError: there is no such hostfile, or so many ranks make no sense.
    """
    size, where, typed = place_of(given.ranks, given.hostfile)
    word = f"mlx-grpo-{secrets.token_hex(8)}"
    command = [sys.executable, "-c", START, *where, "--python", sys.executable]
    for pair in (f"{MARK}={word}", f"{TYPED}={typed}", "PYTHONUNBUFFERED=1"):
        command += ["--env", pair]
    return Launch([*command, "--", os.path.abspath(script), *arguments(given)], word, size).wait()


def place_of(count: int | None, hostfile: str | None) -> tuple[int, list[str], str]:
    """How many ranks, the arguments of mlx.launch for where they are, and what was typed."""
    if hostfile and count is not None:
        raise UserError("--ranks starts ranks on this machine, --hostfile one on each: choose one")
    if hostfile:
        return len(hosts_of(Path(hostfile))), ["--hostfile", hostfile], f"--hostfile {hostfile}"
    if count is None or not 1 <= count <= MOST:
        raise UserError(f"--ranks {count}: must be from 1 to {MOST}")
    return count, of_this_machine(count), f"--ranks {count}"


def hosts_of(path: Path) -> list[Json]:
    """Raises UserError where it is not what mlx.distributed_config writes."""
    if not path.is_file():
        raise UserError(
            f"--hostfile {path}: no such file; mlx.distributed_config writes one "
            "(docs/distributed.md)"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        hosts = content["hosts"] if isinstance(content, dict) else content
        if not hosts or not all(host["ips"] and host["ssh"] for host in hosts):
            raise ValueError("a host without ssh or ips")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(
            f'--hostfile {path}: {reason(error)}; it holds [{{"ssh": "mac1.local", "ips": '
            '["10.0.0.1"]}, ...] (docs/distributed.md)'
        ) from error
    return list(hosts)


def arguments(given: argparse.Namespace) -> list[str]:
    """What was typed, without what starts ranks."""
    typed = ["--config", given.config] if given.config else []
    typed += [word for text in given.overrides for word in ("--set", text)]
    return typed + ["--debug"] * given.debug


def of_this_machine(count: int) -> list[str]:
    """Ports that are free, one to meet and one for each rank."""
    for base in range(20000 + os.getpid() % 10000, 40000, count + 1):
        if all(is_free(base + n) for n in range(count + 1)):
            port = str(base + 1)
            return ["-n", str(count), "--starting-port", port, "--nccl-port", port]
    raise RunError(f"there are no {count + 1} free ports in a row above 20000")


def is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


class Launch:
    """`mlx.launch` and what its ranks say, shown as it comes."""

    def __init__(self, command: list[str], word: str, size: int) -> None:
        self.word, self.size = word, size
        self.begun: dict[int, tuple[int, str]] = {}  # rank -> its process and host
        self.ended: dict[int, int] = {}  # rank -> exit code
        self.deadline = float("inf")
        # In a session of its own, so that Ctrl-C reaches one rank, which tells the others, and that
        # what hangs can be ended. Its standard input stays open: mlx.launch spins at its end.
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self.reader = threading.Thread(target=self.show, daemon=True)

    def show(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            before, word, rest = line.partition(self.word)
            if word:
                self.note(rest.split())
                line = before
            if line:
                put(line, sys.stdout)

    def note(self, words: list[str]) -> None:
        rank, what, *rest = words
        if what == "begins":
            self.begun[int(rank)] = int(rest[0]), rest[1]
        else:
            self.ended[int(rank)] = int(rest[0])
            if int(rest[0]):
                self.deadline = min(self.deadline, time.monotonic() + LINGER)

    def on_signal(self, number: int, _: object) -> None:
        """To rank 0, if it is here: ranks agree among themselves."""
        process, host = self.begun.get(0, (0, ""))
        if process and host == socket.gethostname():
            os.kill(process, number)
        else:
            os.killpg(self.process.pid, signal.SIGTERM)

    def wait(self) -> int:
        before = {n: signal.signal(n, self.on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
        self.reader.start()
        try:
            while self.process.poll() is None and time.monotonic() < self.deadline:
                time.sleep(0.1)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.end_group()
        self.reader.join(5.0)
        return self.exit_code()

    def end_group(self) -> None:
        """Whatever is left of it on this machine."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        finally:
            self.process.wait()

    def exit_code(self) -> int:
        """Rank 0's, if all have ended as they should."""
        if not self.begun:
            complain("error: no rank began: see what mlx.launch says above")
            return 1
        missing = [rank for rank in range(self.size) if rank not in self.ended]
        if missing:
            complain(f"error: rank {', '.join(map(str, missing))} did not come to its end")
            return 1
        return self.ended[0] or next(filter(None, self.ended.values()), 0)
