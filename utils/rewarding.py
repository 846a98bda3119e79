"""Find reward functions by name and call them as TRL does, checking every answer."""

import asyncio
import difflib
import importlib
import importlib.util
import inspect
import math
import numbers
import sys
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from .errors import RunError, UserError


def load_reward(spec: str, builtin: dict[str, Callable[..., list]]) -> Callable[..., list]:
    """A built-in name, `module:function` or `file.py:function`.

    Raises:
        UserError: no such name, module, file or function.
    """
    if spec in builtin:
        return builtin[spec]
    source, _, name = spec.rpartition(":")
    if not (source and name):
        near = difflib.get_close_matches(spec, builtin, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(
            f"reward {spec!r}: not built in ({', '.join(builtin)}); own functions are written "
            f"module:function or file.py:function{hint}"
        )
    module = import_reward_module(spec, source)
    if not callable(getattr(module, name, None)):
        known = [n for n, f in vars(module).items() if inspect.isfunction(f)]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"reward {spec!r}: {source} has no function {name!r}{hint}")
    return getattr(module, name)


def import_reward_module(spec: str, source: str) -> Any:
    if source.endswith(".py") and not Path(source).is_file():
        raise UserError(f"reward {spec!r}: file {source} does not exist")
    name = f"reward_file:{Path(source).resolve()}"  # a name that hides no other module
    try:
        if not source.endswith(".py"):
            return importlib.import_module(source)
        if name in sys.modules:
            return sys.modules[name]
        module_spec = importlib.util.spec_from_file_location(name, source)
        assert module_spec is not None
        assert module_spec.loader is not None
        module = importlib.util.module_from_spec(module_spec)
        sys.modules[name] = module  # before its code runs: dataclasses look there
        module_spec.loader.exec_module(module)
    except Exception as error:  # someone else's code: whatever it raises, say which reward it was
        sys.modules.pop(name, None)
        raise UserError(f"reward {spec!r} cannot be imported: {described(error)}") from error
    return module


def described(error: Exception) -> str:
    """The error with the line of the user's file it came from (a syntax error names its own)."""
    ours = (__file__, importlib.__file__)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename not in ours]
    own = frames and not isinstance(error, SyntaxError) and Path(frames[-1].filename).is_file()
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {error}{place}"


def call_reward(
    name: str, function: Callable[..., list], texts: list[str], columns: dict[str, list]
) -> list[float]:
    """One value per completion; NaN where the function says None (not applicable).

    Raises:
        RunError: it raised, or returned the wrong number of values, NaN, inf or no number.
    """
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    arguments = {**columns, "completions": messages}
    accepted = inspect.signature(function).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in accepted):
        arguments = {p.name: arguments[p.name] for p in accepted if p.name in arguments}
    try:
        values: Any = function(**arguments)
        if inspect.iscoroutine(values):  # in a thread of its own: a notebook's has a loop already
            with ThreadPoolExecutor(1) as pool:
                values = pool.submit(asyncio.run, values).result()
    except Exception as error:  # someone else's code: whatever it raises, say which function it was
        raise RunError(f"reward {name} raised {described(error)}") from error
    values = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise RunError(f"reward {name} returned {values!r}, not a list of one number a completion")
    if len(values) != len(texts):
        raise RunError(f"reward {name} returned {len(values)} values for {len(texts)} completions")
    for value, text in zip(values, texts, strict=True):
        if value is not None and not (is_real(value) and math.isfinite(value)):
            raise RunError(
                f"reward {name} returned {value!r}, not a finite number or None, for the "
                f"completion:\n{text}"
            )
    return [math.nan if value is None else float(value) for value in values]


def is_real(value: Any) -> bool:
    """A number of Python, numpy or an array library (an array without dimensions)."""
    return isinstance(value, numbers.Real | np.bool_) or getattr(value, "ndim", 1) == 0
