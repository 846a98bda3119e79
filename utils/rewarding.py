"""Find reward functions by name and call them as TRL does, checking every answer."""

import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Sequence
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
    source, colon, name = spec.rpartition(":")
    if not colon:
        raise UserError(
            f"reward {spec!r}: not built in ({', '.join(builtin)}); own functions are written "
            "module:function or file.py:function"
        )
    module = import_reward_module(spec, source)
    if not callable(getattr(module, name, None)):
        raise UserError(f"reward {spec!r}: {source} has no function {name!r}")
    return getattr(module, name)


def import_reward_module(spec: str, source: str) -> Any:
    if not source.endswith(".py"):
        try:
            return importlib.import_module(source)
        except ModuleNotFoundError as error:
            raise UserError(f"reward {spec!r}: {error}") from None
    if not Path(source).is_file():
        raise UserError(f"reward {spec!r}: file {source} does not exist")
    module_spec = importlib.util.spec_from_file_location(Path(source).stem, source)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


def call_reward(
    name: str, function: Callable[..., list], texts: list[str], columns: dict[str, list]
) -> list[float]:
    """One value per completion; NaN where the function says None (not applicable).

    Raises:
        RunError: it raised, or returned the wrong number of values, NaN, inf or no number.
    """
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    arguments = {"completions": messages, **columns}
    accepted = inspect.signature(function).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in accepted):
        arguments = {p.name: arguments[p.name] for p in accepted if p.name in arguments}
    try:
        values = function(**arguments)
    except Exception as error:  # someone else's code: whatever it raises, say which function it was
        raise RunError(f"reward {name} raised {type(error).__name__}: {error}") from error
    if not isinstance(values, Sequence | np.ndarray) or len(values) != len(texts):
        count = len(values) if hasattr(values, "__len__") else type(values).__name__
        raise RunError(f"reward {name} returned {count} values for {len(texts)} completions")
    for value, text in zip(values, texts, strict=True):
        if value is not None and not (np.isreal(value) and np.isfinite(float(value))):
            raise RunError(f"reward {name} returned {value!r} for the completion:\n{text}")
    return [math.nan if value is None else float(value) for value in values]
