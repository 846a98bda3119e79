"""Processes that answer one question at a time, so that several work at once and none can hang us.

A worker is a program at the other end of a pipe: it gets dicts and sends answers, and ends when the
pipe does.
"""

import os
import queue
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Pipe
from typing import Any

Pickled = Any
"""What goes through a pipe."""
Task = dict[str, Pickled]
PREPARING = 300.0  # seconds for what a worker does once: limits are for what it is asked then


class Ended(Exception):
    """A worker's process ended instead of answering."""

    def __init__(self, code: int) -> None:
        super().__init__(f"its process ended with exit code {code}")


class Worker:
    """One process, which has one task at a time."""

    def __init__(self, program: str, folder: str | None = None) -> None:
        here, there = Pipe()
        path = [place or folder or os.getcwd() for place in sys.path]
        self.process = subprocess.Popen(
            [sys.executable, program, str(there.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=[there.fileno()],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
            start_new_session=True,  # Ctrl-C is for us
        )
        there.close()
        self.connection = here
        self.prepared: set[str] = set()

    def ask(self, task: Task, timeout: float) -> Pickled:
        """
        Raises:
            TimeoutError: no answer in time.
            EOFError, OSError: the process ended.
        """
        self.connection.send(task)
        if not self.connection.poll(timeout):
            raise TimeoutError
        return self.connection.recv()

    def kill(self) -> None:
        self.end()
        self.process.wait()
        self.connection.close()

    def end(self) -> None:
        """With all processes that it started and that stayed in its session."""
        if self.process.poll() is None:  # else its number may be another one's by now
            os.killpg(self.process.pid, signal.SIGKILL)


class Pool:
    """Up to `count` workers, which are started in `folder` when there is work for them."""

    def __init__(self, program: str, count: int, folder: str | None = None) -> None:
        self.program, self.folder = program, folder
        self.threads = ThreadPoolExecutor(count, thread_name_prefix="worker")
        self.idle: queue.LifoQueue[Worker] = queue.LifoQueue()
        self.all: set[Worker] = set()

    def ask(self, name: str, preparation: Task, task: Task, timeout: float) -> Pickled:
        """A worker's answer to a task; waits for it, so it is called in one of `threads`.

        A worker is asked the `preparation` of this name first, once.

        Raises:
            TimeoutError: no answer in `timeout` seconds; the process is killed.
            Ended: its process ended.
        """
        worker = self.worker()
        try:
            if name not in worker.prepared:
                worker.ask(preparation, PREPARING)
                worker.prepared.add(name)
            answer = worker.ask(task, timeout)
        except TimeoutError:
            self.drop(worker)
            raise
        except (EOFError, OSError):
            code = worker.process.wait()
            self.drop(worker)
            raise Ended(code) from None
        self.idle.put(worker)
        return answer

    def worker(self) -> Worker:
        """An idle worker that lives, or a new one."""
        while True:
            try:
                worker = self.idle.get_nowait()
            except queue.Empty:
                worker = Worker(self.program, self.folder)
                self.all.add(worker)
            if worker.process.poll() is None:
                return worker

    def drop(self, worker: Worker) -> None:
        self.all.discard(worker)
        worker.kill()

    def stop(self) -> None:
        """End all processes, whatever they are at; new work starts new ones."""
        for worker in list(self.all):
            worker.end()
        self.all.clear()
        self.idle = queue.LifoQueue()
