"""Programs that serve: started at a free port, and ended."""

import socket
import subprocess
import tempfile
import time
import urllib.request
from contextlib import contextmanager


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def up(command, port, **how):
    """While mlx_lm's server, started by `command`, answers at `port`."""
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, stdout=log, stderr=log, **how) as server,
    ):
        try:
            while not answers(port):
                log.seek(0)
                assert server.poll() is None, log.read().decode()
                time.sleep(0.1)
            yield
        finally:
            server.terminate()


def answers(port):
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
    except OSError:
        return False
    return True
