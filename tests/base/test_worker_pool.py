"""Processes that answer one question at a time: prepared once, ended when they hang, made anew."""

import subprocess
import time

import pytest
from fuzz import time_limit

from utils.base.worker_pool import Ended, Pool

PROGRAM = """
import os, sys, time
from multiprocessing.connection import Connection
connection = Connection(int(sys.argv[1]))
seen = []
while True:
    task = connection.recv()
    seen.append(task)
    if task.get("child"):
        import subprocess
        child = subprocess.Popen(["sleep", "600"])
        open(task["child"], "w").write(str(child.pid))
    if task.get("hang"):
        time.sleep(100)
    if task.get("exit"):
        sys.exit(7)
    connection.send((os.getpid(), len(seen)))
"""


@pytest.fixture
def pool(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    made = Pool(str(program), 2)
    yield made
    made.stop()


def ask(pool, timeout=60.0, **task):
    return pool.ask("name", {"prepare": True}, task, timeout)


def test_a_worker_is_prepared_once_and_goes_on(pool):
    first, again = ask(pool), ask(pool)
    assert (first[1], again) == (2, (first[0], 3))
    other = pool.ask("other name", {"prepare": True}, {}, 60.0)
    assert other == (first[0], 5)


def test_one_that_hangs_or_ends_is_replaced(pool):
    first = ask(pool)
    with pytest.raises(TimeoutError):
        ask(pool, timeout=0.1, hang=True)
    assert not pool.all, "its process was ended"
    second = ask(pool)
    assert second[0] != first[0]
    with pytest.raises(Ended, match="its process ended with exit code 7"):
        ask(pool, exit=True)
    assert ask(pool)[1] == 2, "a new one, prepared again"


def test_work_after_a_stop_starts_new_processes(pool):
    first = ask(pool)
    pool.stop()
    assert ask(pool)[0] != first[0]


@pytest.mark.parametrize("how", ["in-time", "all"])
def test_what_a_worker_started_ends_with_it(pool, tmp_path, how):
    path = tmp_path / "pid"
    if how == "in-time":
        with pytest.raises(TimeoutError):
            ask(pool, timeout=1.0, child=str(path), hang=True)
    else:
        ask(pool, child=str(path))
        pool.stop()
    pid = int(path.read_text())
    with time_limit(60):
        while is_running(pid):
            time.sleep(0.01)


def is_running(pid):
    """Not as a zombie, which is left where nobody asks for its exit code."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return state.stdout.strip()[:1] not in ("", "Z")
