"""Call reward functions in other processes, so that several run at once and none can hang a run.

A worker is this file as a program, at the other end of a pipe: it imports functions by their names
in reward_funcs, and nothing of the trainer (no MLX, no GPU memory). It ends with its parent.
"""

import asyncio
import functools
import inspect
import os
import queue
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

if __name__ == "__main__" and not __package__:  # as a program: sys.path[0] is utils/ itself
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    __package__ = "utils"

from .errors import RunError, UserError
from .reward_calls import Extras, TrainerState, Values, accepted, checked, failure, too_long
from .rewarding import load_reward

# Values, metrics and columns: of Python's own types, since an installed parent has other modules.
Answer = tuple[Values, dict[str, list[float]], dict[str, list]]
LOADING = 300.0  # seconds to import a function: reward_timeout is for calls


class Worker:
    """One process, which has one task at a time."""

    def __init__(self) -> None:
        here, there = Pipe()
        path = [folder or os.getcwd() for folder in sys.path]
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(there.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=[there.fileno()],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
            start_new_session=True,  # Ctrl-C is for the trainer
        )
        there.close()
        self.connection = here
        self.loaded: set[str] = set()

    def ask(self, task: dict[str, Any], timeout: float) -> Any:
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
        self.process.kill()
        self.process.wait()
        self.connection.close()


class Pool:
    """Workers that are started when there is work for them."""

    def __init__(self, count: int) -> None:
        self.threads = ThreadPoolExecutor(count, thread_name_prefix="reward-worker")
        self.idle: queue.LifoQueue[Worker] = queue.LifoQueue()
        self.all: set[Worker] = set()

    def run(self, name: str, task: dict[str, Any], timeout: float) -> Answer:
        """What a worker makes of a task; waits for it, so it is called in a thread of `threads`.

        Raises:
            RunError: the function failed, took too long, or ended its process.
        """
        columns = task["columns"]
        worker = self.worker()
        try:
            if name not in worker.loaded:
                worker.ask({"load": name, "parameters": task["parameters"]}, LOADING)
                worker.loaded.add(name)
            answer = worker.ask({"call": name, **task}, timeout)
        except TimeoutError:
            self.drop(worker)
            raise too_long(name, timeout, columns) from None
        except (EOFError, OSError):
            code = worker.process.wait()
            self.drop(worker)
            error = RunError(f"its process ended with exit code {code}")
            raise failure(name, error, columns) from None
        self.idle.put(worker)
        if isinstance(answer, str):
            raise RunError(answer)
        return answer

    def worker(self) -> Worker:
        """An idle worker that lives, or a new one."""
        while True:
            try:
                worker = self.idle.get_nowait()
            except queue.Empty:
                worker = Worker()
                self.all.add(worker)
            if worker.process.poll() is None:
                return worker

    def drop(self, worker: Worker) -> None:
        self.all.discard(worker)
        worker.kill()

    def stop(self) -> None:
        """End all processes, whatever they are at; new work starts new ones."""
        for worker in list(self.all):
            worker.process.kill()
        self.all.clear()
        self.idle = queue.LifoQueue()


class InWorkers:
    """A function of reward_funcs that is called in workers, once for each prompt's completions."""

    own_timeout = per_prompt = True

    def __init__(
        self, name: str, function: Callable, parameters: dict, pool: Pool, timeout: float
    ) -> None:
        self.name, self.parameters, self.pool, self.timeout = name, parameters, pool, timeout
        self.takes = function

    async def __call__(
        self,
        completions: list,
        prompts: list,
        log_metric: Callable,
        log_extra: Callable,
        trainer_state: TrainerState,
        **others: list,
    ) -> Values:
        columns = {"completions": completions, "prompts": prompts, **others}
        wanted = accepted(self.takes, columns).keys() | {"completions"}
        run = functools.partial(asyncio.get_running_loop().run_in_executor, self.pool.threads)
        running = []
        for part in groups(prompts):
            task: dict[str, Any] = {"parameters": self.parameters, "state": vars(trainer_state)}
            task["columns"] = {name: columns[name][part] for name in wanted}
            running.append(run(self.pool.run, self.name, task, self.timeout))
        try:
            answers = await asyncio.gather(*running)
        except BaseException:  # also when the run is stopped: nobody waits for the others
            self.pool.stop()
            raise
        for _, metrics, extras in answers:
            for name, numbers in metrics.items():
                for number in numbers:
                    log_metric(name, number)
            for column, values in extras.items():
                log_extra(column, values)
        return [value for values, _, _ in answers for value in values]


def groups(prompts: list) -> list[slice]:
    """Where each run of the same prompt (the same object) stands."""
    starts = [n for n in range(len(prompts)) if n == 0 or prompts[n] is not prompts[n - 1]]
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(prompts)], strict=True)]


def serve(connection: Connection) -> None:
    """A worker's life: load and call until the parent is gone."""
    made: dict[str, Callable] = {}
    while True:
        try:
            task = connection.recv()
        except (EOFError, OSError):
            return
        if "load" in task:
            made[task["load"]] = make(task["load"], task["parameters"])
            connection.send(None)
        else:
            connection.send(call(task["call"], made[task["call"]], task))


def make(name: str, parameters: dict[str, Any]) -> Callable:
    function: Any = load_reward(name, {})
    if inspect.isclass(function):
        made: Any = function(**parameters)
        return made
    return functools.partial(function, **parameters)


def call(name: str, function: Callable, task: dict[str, Any]) -> Answer | str:
    """Values and what was logged; a text when it failed."""
    extras, columns = Extras(), task["columns"]
    logs = {"log_metric": extras.log_metric, "log_extra": extras.log_extra}
    offered = {**columns, **logs, "trainer_state": TrainerState(**task["state"])}
    try:
        values = checked(name, attempted(name, function, offered), columns)
        return values, extras.metrics, extras.columns
    except RunError as error:
        return str(error)


def attempted(name: str, function: Callable, offered: dict[str, Any]) -> Any:
    try:
        return function(**accepted(function, offered))
    except Exception as error:  # someone else's code: whatever it raises, say whose it was
        raise failure(name, error, offered) from error


if __name__ == "__main__":
    try:
        serve(Connection(int(sys.argv[1])))
    except UserError as stop:
        sys.exit(f"error: {stop}")
