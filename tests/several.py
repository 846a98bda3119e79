"""Start a training run as several ranks, as mlx.launch does, without its waiting for each of them.

As a program: run each of the argument lists in a file, one after the other, as a rank.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, load_script


def free_ports(count):
    """One to meet at, and one for each rank behind it."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as server:
            base = server.getsockname()[1]
        try:
            for n in range(count + 1):
                socket.create_server(("127.0.0.1", base + n)).close()
        except (OSError, OverflowError):
            continue
        return [base + n + 1 for n in range(count)]


def start(size, folder, *command, ranks=None, **environment):
    """Processes of the ranks (all of them, or some) of a ring on loopback; each writes its output
    into a file of the folder."""
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(size)]))
    started = []
    for rank in range(size) if ranks is None else ranks:
        own = {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts), **environment}
        with (folder / f"rank-{rank}.txt").open("w") as output:
            started.append(
                subprocess.Popen(
                    [sys.executable, *map(str, command)],
                    env={**os.environ, "PYTHONUNBUFFERED": "1", **own},
                    cwd=ROOT,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                )
            )
    return started


def ended(started, seconds=300):
    """Their exit codes; whatever has not come to its end by then is killed, and has none."""
    codes = []
    for process in started:
        try:
            codes.append(process.wait(seconds))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            codes.append(None)
    return codes


if __name__ == "__main__":
    main = load_script().main
    for arguments in json.loads(Path(sys.argv[1]).read_text()):
        if code := main(arguments):
            sys.exit(code)
