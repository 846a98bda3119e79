"""The environments of a run, in processes that can be ended: one is made for each completion.

What is asked of an environment is asked once more in a new process when its own has ended because
of another one: the answers are the same, since random numbers are seeded before each.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import cast

from ..base.errors import UserError
from ..base.worker_pool import Ended, Pool, Task
from ..data.files import Row
from ..device import cores
from ..settings.run_settings import Settings
from . import environment_worker

HIDDEN = ("prompt_ids",)  # columns that are none of the data


class Failed(Exception):
    """What an environment did wrong."""


class Process:
    """One process, in which many environments are, asked one after the other."""

    def __init__(self, preparation: Task, folder: str, timeout: float) -> None:
        self.pool = Pool(environment_worker.__file__, 1, folder)
        self.preparation, self.timeout = preparation, timeout
        self.lives = 0  # that it has lost

    def ask(self, task: Task) -> object:
        """The answer; called in the pool's thread.

        Raises:
            Failed: the environment did something wrong, or not in time.
        """
        try:
            well, what = self.pool.ask("environment", self.preparation, task, self.timeout)
        except TimeoutError:
            self.lives += 1
            raise Failed(f"took longer than environment_timeout = {self.timeout:g} s") from None
        except Ended as error:
            self.lives += 1
            raise Failed(str(error)) from None
        if not well:
            raise Failed(what)
        return what


@dataclass
class Instance:
    """The environment of a completion: what it is asked is answered later, in order."""

    process: Process
    number: int
    seed: int
    life: int = -1
    """Of the process, in which it was made."""
    asked: list[Task] = field(default_factory=list)

    def begin(self, row: Row) -> Future:
        """What to add to the prompt, or None."""
        return self.later({"row": {k: v for k, v in row.items() if k not in HIDDEN}})

    def step(self, text: str) -> Future:
        """(messages, whether it is over)."""
        return self.later({"text": text})

    def close(self) -> Future:
        """(reward, attributes)."""
        return self.later({})

    def later(self, task: Task) -> Future:
        seed = self.seed + len(self.asked)
        self.asked.append({"number": self.number, "seed": seed, **task})
        return self.process.pool.threads.submit(self.ask, len(self.asked))

    def ask(self, count: int) -> object:
        """The answer to the last of the first `count` tasks."""
        first = 0 if self.life != self.process.lives else count - 1
        self.life = self.process.lives
        return [self.process.ask(task) for task in self.asked[first:count]][-1]


class Environments:
    """Of a run, or of a command that asks as a run does.

    Args:
        a: Of these, `environment`, `tools` and `environment_timeout`.
        calls: By which `parser` calls of tools are found, or the `problem` if there is none.

    Raises:
        UserError: there is no such environment or tool, or it cannot be imported.
    """

    def __init__(self, a: Settings, calls: Task | None = None) -> None:
        preparation: Task = {
            "load": a.environment,
            "tools": a.tools,
            "folder": a.started_in,
            **(calls or {}),
        }
        self.processes = [
            Process(preparation, a.started_in, a.environment_timeout) for _ in range(cores.cores())
        ]
        self.begun = 0
        try:
            self.schemas = cast("list[dict]", self.processes[0].ask({"check": a.environment}))
        except Failed as error:
            what = "environment = " if a.environment else ""
            raise UserError(f"{what}{error}") from None
        preparation["schemas"] = self.schemas  # of the tools, which take seconds to make

    def make(self, seed: int) -> Instance:
        """One for a completion; what it draws at random comes from the seed."""
        self.begun += 1
        return Instance(self.processes[self.begun % len(self.processes)], self.begun, seed)

    def stop(self) -> None:
        """End all processes, whatever they are at."""
        for process in self.processes:
            process.pool.stop()


def whose(a: Settings) -> str:
    """Failures are, for a message."""
    return f"environment {a.environment}" if a.environment else "a tool"


def settled(futures: Iterable[Future], pulse: Callable[[], None]) -> None:
    """Wait for answers, or errors; `pulse`, called meanwhile, may raise."""
    waiting = {*futures}
    while waiting:
        waiting = wait(waiting, timeout=0.1).not_done
        pulse()
