"""Call reward functions as TRL does, several at a time where they can wait, checking each answer.

Functions get `prompts`, `completions`, `completion_ids`, every column of the data, and, if they
ask for them by name or take **kwargs, `trainer_state`, `log_metric(name, value)` and
`log_extra(column, values)`. One value per completion comes back, or None for "not applicable".
What they get is theirs: each has copies, which it may change.
"""

import asyncio
import concurrent.futures
import copy
import inspect
import math
import os
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..base.errors import RunError, UserError
from ..base.text import shown
from . import foreign, returned
from .answers import last_text
from .event_loop import Loop

Values = list[float]
Completions = list[list[dict[str, str]]]
"""As TRL gives them to reward functions: the messages after the prompt, which is one of the model
unless tools or an environment answer it."""
Reward = Callable[..., Any]
"""A reward function with TRL's interface, as the module says: whatever its author wrote."""
Columns = dict[str, list]
"""What functions get by name: one value per completion."""


@dataclass(frozen=True)
class TrainerState:
    """How far training is, by transformers' names."""

    global_step: int = 0
    max_steps: int = 0
    epoch: float = 0.0
    num_train_epochs: int = 1


@dataclass
class Extras:
    """What a function logs beside its values."""

    metrics: dict[str, list[float]] = field(default_factory=dict)
    columns: Columns = field(default_factory=dict)

    def log_metric(self, name: str, value: float) -> None:
        """A number for the training record, where calls of an update are averaged."""
        self.metrics.setdefault(name, []).append(returned.number(value))

    def log_extra(self, column: str, values: list) -> None:
        """One value per completion, shown with the completion."""
        self.columns.setdefault(column, []).extend(values)

    def add(self, other: "Extras") -> None:
        for name, values in other.metrics.items():
            self.metrics.setdefault(name, []).extend(values)
        for column, values in other.columns.items():
            self.columns.setdefault(column, []).extend(values)


@dataclass
class Part:
    """Some consecutive rows of a call, with the values to come."""

    count: int
    values: Future
    extras: Extras
    deadline: float = math.inf
    """When an async function must have answered, by time.monotonic."""


LATE = 1.0  # seconds after which a function that asyncio could not stop in time has failed


class RewardCalls:
    """Calls functions; afterwards `logged` holds what they logged.

    Coroutines of `async` functions run together in a loop of another thread (a notebook's thread
    has a loop already), which lives as long as this object, while the other functions are called.
    """

    def __init__(self, timeout: float = 180.0) -> None:
        self.timeout = timeout
        self.loop: Loop | None = None
        self.logged = Extras()
        self.parts: dict[str, list[Part]] = {}  # what was begun, by function

    def __call__(
        self,
        functions: dict[str, Reward],
        columns: Columns,
        state: TrainerState | None = None,
        pulse: Callable[[], None] = lambda: None,
    ) -> dict[str, np.ndarray]:
        """(B,) values by name of the function; NaN where one says None.

        What `ahead` began is not begun again: the columns must start with those it was given.

        Raises:
            RunError: a function raised, took too long, or returned the wrong number of values,
                NaN, inf or no number. `pulse`, called while waiting, may raise too.
        """
        try:
            # Those that wait for others come first, and wait while the rest is computed.
            with foreign.kept(), foreign.threads_watched() as ended:
                for name in sorted(functions, key=lambda name: not waits(functions[name])):
                    self.begin(name, functions[name], columns, state)
                self.finish(columns, pulse)
            if ended:
                raise of_a_thread([n for n in functions if waits(functions[n])], ended[0], columns)
            parts = {name: self.parts[name] for name in functions}
        finally:
            self.reset()
        self.keep(parts, len(columns["completions"]))
        return {name: np.array(self.read(name, parts[name], columns)) for name in functions}

    def read(self, name: str, parts: list[Part], columns: Columns) -> Values:
        """The checked values of all parts, which may be objects of other people's classes."""
        try:
            return foreign.called(lambda: joined(name, parts, columns))
        except RunError:
            raise
        except Exception as error:  # someone else's code
            raise failure(name, error, columns) from error

    def finish(self, columns: Columns, pulse: Callable[[], None]) -> None:
        """Wait for all that was begun, or for the first that fails or does not end in time."""
        waiting = {part.values for parts in self.parts.values() for part in parts}
        while waiting:
            when = concurrent.futures.FIRST_EXCEPTION
            done, waiting = concurrent.futures.wait(waiting, timeout=0.1, return_when=when)
            for future in done:
                future.result()  # raises what it raised
            if late := self.late(waiting):
                raise self.given_up(late[0], columns)
            pulse()
        if self.loop and self.loop.failed:
            name, error = self.loop.failed
            raise of_a_task(name or next(iter(self.parts)), error, columns)

    def late(self, waiting: set[Future]) -> list[str]:
        """The functions that should have answered by now."""
        now = time.monotonic()
        return [
            name
            for name, parts in self.parts.items()
            if any(part.values in waiting and part.deadline < now for part in parts)
        ]

    def given_up(self, name: str, columns: Columns) -> RunError:
        """A coroutine is over its time and still there: it blocks, or catches the cancellation."""
        culprit, where = self.loop.blocked_by() if self.loop else ("", "")
        self.loop = None  # what runs there can't be ended: the next calls get another thread
        blocks = f": it blocks{where} instead of waiting"
        why = blocks if culprit else " and can't be cancelled"
        return too_long(culprit or name, self.timeout, columns, why)

    def reset(self) -> None:
        """Cancel what was begun."""
        for part in [part for parts in self.parts.values() for part in parts]:
            part.values.cancel()
        self.parts = {}
        if self.loop:
            self.loop.failed = None

    def ahead(self, functions: dict[str, Reward], columns: Columns, state: TrainerState) -> None:
        """Begin on the first rows of the next call, with those functions that take any rows."""
        for name, function in takes_parts(functions).items():
            self.begin(name, function, columns, state)

    def begin(
        self, name: str, function: Reward, columns: Columns, state: TrainerState | None
    ) -> None:
        """Call a function on the rows that it has not got yet."""
        parts = self.parts.setdefault(name, [])
        start = sum(part.count for part in parts)
        columns = {column: rows[start:] for column, rows in columns.items()}
        count, extras = len(columns["completions"]), Extras()
        if count or not parts:
            values = self.answer(name, function, columns, state, extras)
            late = math.inf if values.done() else self.limit(function) or math.inf
            parts.append(Part(count, values, extras, time.monotonic() + late + LATE))

    def limit(self, function: Reward) -> float | None:
        """Seconds that a call may take; None where the function sees to that."""
        return None if getattr(function, "own_timeout", False) else self.timeout

    def answer(
        self,
        name: str,
        function: Reward,
        columns: Columns,
        state: TrainerState | None,
        extras: Extras,
    ) -> Future:
        """What the function says, now or later."""
        offered = {
            **(columns if getattr(function, "own_copies", False) else copies(columns)),
            "trainer_state": state or TrainerState(),
            "log_metric": extras.log_metric,
            "log_extra": extras.log_extra,
        }
        done: Future = Future()
        limit = self.limit(function)
        try:
            result = foreign.called(lambda: function(**accepted(function, offered)), limit)
        except foreign.TooLong as late:
            where = next(filter(None, map(at, foreign.chain(late))), "")
            raise too_long(name, self.timeout, columns, where) from late
        except Exception as error:  # someone else's code: whatever it raises, say whose it was
            raise failure(name, error, columns) from error
        if inspect.isawaitable(result):
            self.loop = self.loop or Loop()
            return self.loop.begin(name, self.limited(name, result, limit, columns))
        done.set_result(result)
        return done

    async def limited(
        self, name: str, result: Awaitable, limit: float | None, columns: Columns
    ) -> object:
        deadline, process = asyncio.timeout(limit), os.getpid()
        try:
            with foreign.no_way_out():
                async with deadline:
                    value = await result
        except BaseException as error:
            foreign.end_child(process, error)
            if deadline.expired() and isinstance(error, TimeoutError):
                raise too_long(name, self.timeout, columns) from None
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task and task.cancelling():
                raise
            raise failure(name, error, columns) from error
        foreign.end_child(process)
        return value

    def keep(self, parts: dict[str, list[Part]], count: int) -> None:
        together = Extras()
        for name in parts:
            own = Extras()
            for part in parts[name]:
                own.add(part.extras)
            for column, values in own.columns.items():
                if len(values) != count:
                    raise RunError(
                        f"reward {name}: log_extra({column!r}) got {len(values)} values for "
                        f"{count} completions"
                    )
            together.add(Extras(own.metrics))
            together.columns |= own.columns
        self.logged = together


def takes_parts(functions: dict[str, Reward]) -> dict[str, Reward]:
    """Those that answer later, and the same whether they get all completions or one prompt's."""
    return {n: f for n, f in functions.items() if getattr(f, "per_prompt", False)}


def waits(function: Reward) -> bool:
    """Whether a call gives control back at once and its answer later."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - an object whose method is async
    )


def copies(columns: Columns) -> Columns:
    """Lists of their own for a function, down to the last dict: no other one sees what it does."""
    ids = columns.get("completion_ids", [])
    return {
        name: [list(row) for row in ids] if name == "completion_ids" else copied(rows)
        for name, rows in columns.items()
    }


def copied(value: Any) -> Any:
    """As copy.deepcopy, but fast for what data sets hold, and each place gets an object."""
    kind = type(value)
    if kind in (str, int, float, bool, type(None)):
        return value
    if kind is list:
        return [copied(part) for part in value]
    if kind is dict:
        return {key: copied(part) for key, part in value.items()}
    return copy.deepcopy(value)


def accepted(function: Reward, offered: Mapping[str, object]) -> dict[str, object]:
    """Of the keywords, those that the function takes and that are not bound already."""
    bound = getattr(function, "keywords", {})
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return {name: value for name, value in offered.items() if name not in bound}
    names = [p.name for p in parameters if p.name not in bound]
    return {name: offered[name] for name in names if name in offered}


def failure(name: str, error: BaseException, columns: Columns) -> RunError:
    if isinstance(error, RunError | UserError):  # ours: says all that there is to say
        told = str(error).startswith((f"reward {name} ", f"reward {name}:"))
        return RunError(str(error) if told else f"reward {name}: {error}")
    if isinstance(error, foreign.Misbehaved):
        return RunError(f"reward {name} {error}{at(error.__cause__)}{given(columns)}")
    if not isinstance(error, Exception):
        return RunError(f"reward {name} {foreign.did(error)}{at(error)}{given(columns)}")
    return RunError(f"reward {name} raised {described(error)}{given(columns)}")


def of_a_task(name: str, error: BaseException, columns: Columns) -> RunError:
    """What a task did that the async function does not wait for."""
    did = f"had a task that {foreign.did(error)}"
    return RunError(f"reward {name} {did}{at(error)}{given(columns)}")


def of_a_thread(names: list[str], error: BaseException, columns: Columns) -> RunError:
    """What a thread did while these async functions ran."""
    did = f"had a thread that {foreign.did(error)}"
    return RunError(f"reward {' or '.join(names)} {did}{at(error)}{given(columns)}")


def too_long(name: str, timeout: float, columns: Columns, why: str = "") -> RunError:
    limit = f"reward_timeout = {timeout:g} seconds"
    return RunError(f"reward {name} took longer than {limit}{why}{given(columns)}")


def given(columns: Columns) -> str:
    """What a function was called with, shortened."""
    texts = [last_text(completion) for completion in columns["completions"]]
    examples = [f"\n  {shortened(text, 200)}" for text in texts[:2]]
    more = f"\n  and {len(texts) - 2} more" if len(texts) > 2 else ""
    return f" for {len(texts)} completion{'s' * (len(texts) != 1)}:{''.join(examples)}{more}"


def shortened(text: str, length: int) -> str:
    """One line of at most so many characters, as a Python literal shows it."""
    return repr(text if len(text) <= length else f"{text[:length]}...")


def described(error: BaseException) -> str:
    """The error with the line of the user's file it came from (a syntax error names its own)."""
    if isinstance(error, foreign.Misbehaved):
        return f"it {error}{at(error.__cause__)}"
    where = "" if isinstance(error, SyntaxError) else at(error)
    return f"{type(error).__name__}: {error}{where}"


def at(error: BaseException | None) -> str:
    """The line of a file that an error came from: of other people's code, or where that left it."""
    frames = traceback.extract_tb(error.__traceback__ if error else None)
    found = foreign.innermost([(frame.filename, frame.lineno or 0) for frame in frames])
    return f" ({found[0]}, line {found[1]})" if found else ""


def checked(name: str, values: object, columns: Columns) -> Values:
    """One finite number per completion; NaN for None.

    Raises:
        RunError: anything else, with the completion it was for.
    """
    texts = [last_text(completion) for completion in columns["completions"]]
    answers = returned.listed(values)
    if answers is None:
        raise RunError(
            f"reward {name} returned {shown(values)}, not a list of one number a "
            f"completion,{given(columns)}"
        )
    if len(answers) != len(texts):
        raise RunError(f"reward {name} returned {len(answers)} values{given(columns)}")
    for value, text in zip(answers, texts, strict=True):
        if not is_value(value):
            raise RunError(
                f"reward {name} returned {shown(value)}, not a finite number or "
                f"None, for the completion:\n{text[:2000]}"
            )
    return [math.nan if value is None else returned.as_float(value) for value in answers]


def is_value(value: object) -> bool:
    return value is None or math.isfinite(returned.as_float(value))


def joined(name: str, parts: list[Part], columns: Columns) -> Values:
    """The checked values of all parts."""
    if len(parts) == 1:
        return checked(name, parts[0].values.result(), columns)
    return checked(name, [v for part in parts for v in part.values.result()], columns)
