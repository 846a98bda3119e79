"""Call reward functions as TRL does, several at a time where they can wait, checking each answer.

Functions get `prompts`, `completions`, `completion_ids`, every column of the data, and, if they
ask for them by name or take **kwargs, `trainer_state`, `log_metric(name, value)` and
`log_extra(column, values)`. One value per completion comes back, or None for "not applicable".
"""

import asyncio
import concurrent.futures
import importlib
import inspect
import math
import numbers
import threading
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, SupportsFloat, cast

import numpy as np

from ..base.errors import RunError, UserError
from ..base.text import shown

Values = list[float]
Completions = list[list[dict[str, str]]]
"""Conversations of one message each, as TRL gives them to reward functions."""
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
        self.metrics.setdefault(name, []).append(float(value))

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


class RewardCalls:
    """Calls functions; afterwards `logged` holds what they logged.

    Coroutines of `async` functions run together in a loop of another thread (a notebook's thread
    has a loop already), which lives as long as this object, while the other functions are called.
    """

    def __init__(self, timeout: float = 180.0) -> None:
        self.timeout = timeout
        self.loop: asyncio.AbstractEventLoop | None = None
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
            for name in sorted(functions, key=lambda name: not waits(functions[name])):
                self.begin(name, functions[name], columns, state)
            finish([part.values for parts in self.parts.values() for part in parts], pulse)
            parts = {name: self.parts[name] for name in functions}
        finally:
            self.reset()
        self.keep(parts, len(columns["completions"]))
        values = {name: joined(name, parts[name], columns) for name in functions}
        return {name: np.array(value) for name, value in values.items()}

    def reset(self) -> None:
        """Cancel what was begun."""
        for part in [part for parts in self.parts.values() for part in parts]:
            part.values.cancel()
        self.parts = {}

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
            parts.append(Part(count, values, extras))

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
            **columns,
            "trainer_state": state or TrainerState(),
            "log_metric": extras.log_metric,
            "log_extra": extras.log_extra,
        }
        done: Future = Future()
        try:
            result = function(**accepted(function, offered))
        except Exception as error:  # someone else's code: whatever it raises, say whose it was
            raise failure(name, error, columns) from error
        if inspect.isawaitable(result):
            limit = None if getattr(function, "own_timeout", False) else self.timeout
            waiting = self.limited(name, result, limit, columns)
            return asyncio.run_coroutine_threadsafe(waiting, self.running_loop())
        done.set_result(result)
        return done

    async def limited(
        self, name: str, result: Awaitable, limit: float | None, columns: Columns
    ) -> object:
        deadline = asyncio.timeout(limit)
        try:
            async with deadline:
                return await result
        except Exception as error:
            if deadline.expired():
                raise too_long(name, self.timeout, columns) from None
            raise failure(name, error, columns) from error

    def running_loop(self) -> asyncio.AbstractEventLoop:
        if self.loop is None:
            self.loop = asyncio.new_event_loop()
            threading.Thread(target=self.loop.run_forever, daemon=True, name="rewards").start()
        return self.loop

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


def finish(futures: list[Future], pulse: Callable[[], None]) -> None:
    """Wait for all, or for the first that fails."""
    waiting = set(futures)
    while waiting:
        when = concurrent.futures.FIRST_EXCEPTION
        done, waiting = concurrent.futures.wait(waiting, timeout=0.1, return_when=when)
        for future in done:
            future.result()  # raises what it raised
        pulse()


def accepted(function: Reward, offered: Mapping[str, object]) -> dict[str, object]:
    """Of the keywords, those that the function takes and that are not bound already."""
    bound = getattr(function, "keywords", {})
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return {name: value for name, value in offered.items() if name not in bound}
    names = [p.name for p in parameters if p.name not in bound]
    return {name: offered[name] for name in names if name in offered}


def failure(name: str, error: Exception, columns: Columns) -> RunError:
    if isinstance(error, RunError | UserError):  # ours: says all that there is to say
        return RunError(f"reward {name}: {error}")
    return RunError(f"reward {name} raised {described(error)}{given(columns)}")


def too_long(name: str, timeout: float, columns: Columns) -> RunError:
    return RunError(
        f"reward {name} took longer than reward_timeout = {timeout:g} seconds{given(columns)}"
    )


def given(columns: Columns) -> str:
    """What a function was called with, shortened."""
    texts = [completion[0]["content"] for completion in columns["completions"]]
    examples = [f"\n  {shortened(text, 200)}" for text in texts[:2]]
    more = f"\n  and {len(texts) - 2} more" if len(texts) > 2 else ""
    return f" for {len(texts)} completion{'s' * (len(texts) != 1)}:{''.join(examples)}{more}"


def shortened(text: str, length: int) -> str:
    """One line of at most so many characters, as a Python literal shows it."""
    return repr(text if len(text) <= length else f"{text[:length]}...")


def described(error: Exception) -> str:
    """The error with the line of the user's file it came from (a syntax error names its own)."""
    ours = Path(__file__).parent, Path(importlib.__file__).parent
    trace = traceback.extract_tb(error.__traceback__)
    frames = [f for f in trace if Path(f.filename).parent not in ours]
    own = frames and not isinstance(error, SyntaxError) and Path(frames[-1].filename).is_file()
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {error}{place}"


def checked(name: str, values: object, columns: Columns) -> Values:
    """One finite number per completion; NaN for None.

    Raises:
        RunError: anything else, with the completion it was for.
    """
    texts = [completion[0]["content"] for completion in columns["completions"]]
    values = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise RunError(
            f"reward {name} returned {shown(values)}, not a list of one number a "
            f"completion,{given(columns)}"
        )
    if len(values) != len(texts):
        raise RunError(f"reward {name} returned {len(values)} values{given(columns)}")
    for value, text in zip(values, texts, strict=True):
        if not is_value(value):
            raise RunError(
                f"reward {name} returned {shown(value)}, not a finite number or "
                f"None, for the completion:\n{text[:2000]}"
            )
    return [math.nan if value is None else as_float(value) for value in values]


def is_value(value: object) -> bool:
    return value is None or math.isfinite(as_float(value))


def as_float(value: object) -> float:
    """A number of Python, numpy or an array library (an array without dimensions); else NaN."""
    if not isinstance(value, numbers.Real | np.bool_) and getattr(value, "ndim", 1) != 0:
        return math.nan
    try:
        return float(cast(SupportsFloat, value))
    except (TypeError, ValueError, OverflowError):  # no single number, or beyond any float
        return math.nan


def joined(name: str, parts: list[Part], columns: Columns) -> Values:
    """The checked values of all parts."""
    if len(parts) == 1:
        return checked(name, parts[0].values.result(), columns)
    return checked(name, [v for part in parts for v in part.values.result()], columns)
