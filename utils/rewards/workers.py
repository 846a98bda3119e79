"""Call reward functions in other processes, so that several run at once and none can hang a run.

The worker is this file as a program: it imports functions by their names in reward_funcs, and
nothing of the trainer (no MLX, no GPU memory).
"""

import asyncio
import functools
import inspect
import math
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

if __name__ == "__main__" and not __package__:  # as a program: sys.path[0] is this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    __package__ = "utils.rewards"

from ..base.errors import RunError, UserError
from ..base.say import complain
from ..base.worker_pool import Ended, Pool, Task
from . import foreign
from .calls import Extras, Reward, TrainerState, Values, accepted, checked, failure, too_long
from .importing import load_reward

# Values, metrics and columns: of Python's own types, since an installed parent has other modules.
Answer = tuple[Values, dict[str, list[float]], dict[str, list]]


def new_pool(count: int, folder: str | None = None) -> Pool:
    """Processes for reward functions, which start in `folder`."""
    return Pool(__file__, count, folder)


class InWorkers:
    """A function of reward_funcs that is called in workers, once for each prompt's completions."""

    own_timeout = per_prompt = own_copies = True

    def __init__(
        self, name: str, function: Reward, parameters: dict, pool: Pool, timeout: float
    ) -> None:
        self.name, self.parameters, self.pool, self.timeout = name, parameters, pool, timeout
        self.takes = function

    async def __call__(
        self,
        completions: list,
        prompts: list,
        log_metric: Callable[[str, float], None],
        log_extra: Callable[[str, list], None],
        trainer_state: TrainerState,
        **others: list,
    ) -> list[float | None]:
        columns = {"completions": completions, "prompts": prompts, **others}
        wanted = accepted(self.takes, columns).keys() | {"completions"}
        run = functools.partial(asyncio.get_running_loop().run_in_executor, self.pool.threads)
        running = [
            run(self.answer, {name: columns[name][part] for name in wanted}, trainer_state)
            for part in groups(prompts)
        ]
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
        return [value for values, _, _ in answers for value in as_said(values)]

    def answer(self, columns: dict[str, list], state: TrainerState) -> Answer:
        """
        Raises:
            RunError: the function failed, took too long, or ended its process.
        """
        preparation: Task = {"load": self.name, "parameters": self.parameters}
        task: Task = {"call": self.name, "columns": columns, "state": vars(state)}
        try:
            answer: Answer | str = self.pool.ask(self.name, preparation, task, self.timeout)
        except TimeoutError:
            raise too_long(self.name, self.timeout, columns) from None
        except Ended as error:
            raise failure(self.name, RunError(str(error)), columns) from None
        if isinstance(answer, str):
            raise RunError(answer)
        return answer


def as_said(values: Values) -> list[float | None]:
    """With None again for the NaN that it was checked as."""
    return [None if math.isnan(value) else value for value in values]


def groups(prompts: list) -> list[slice]:
    """Where each run of the same prompt (the same object) stands."""
    starts = [n for n in range(len(prompts)) if n == 0 or prompts[n] is not prompts[n - 1]]
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(prompts)], strict=True)]


def serve(connection: Connection) -> None:
    """A worker's life: load and call until the parent is gone."""
    made: dict[str, Reward] = {}
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


def make(name: str, parameters: dict[str, object]) -> Reward:
    function: Any = load_reward(name, {})
    if inspect.isclass(function):
        made: Any = function(**parameters)
        return made
    return functools.partial(function, **parameters)


def call(name: str, function: Reward, task: Task) -> Answer | str:
    """Values and what was logged; a text when it failed."""
    extras, columns = Extras(), task["columns"]
    logs = {"log_metric": extras.log_metric, "log_extra": extras.log_extra}
    offered = {**columns, **logs, "trainer_state": TrainerState(**task["state"])}
    try:
        values = checked(name, attempted(name, function, offered), columns)
        return values, extras.metrics, extras.columns
    except RunError as error:
        return str(error)


def attempted(name: str, function: Reward, offered: dict[str, Any]) -> object:
    try:
        return foreign.called(lambda: function(**accepted(function, offered)))
    except Exception as error:  # someone else's code: whatever it raises, say whose it was
        raise failure(name, error, offered) from error


if __name__ == "__main__":
    try:
        serve(Connection(int(sys.argv[1])))
    except UserError as stop:
        complain(f"error: {stop}")
        sys.exit(1)
