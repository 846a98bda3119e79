"""Faster ways that only some machines have: which there are, and where they are switched on.

`cuda/` and `x86/` hold what only such a machine runs. Nothing else imports them, and each can be
deleted: what it replaces is then MLX's own. A way is compared with the plain one, on a few numbers,
before it is first used; one that does not agree stays off, and that is said.
"""

import functools
import importlib
from pathlib import Path
from types import ModuleType

import mlx.core as mx
import mlx.nn as nn

from ..base.say import say
from ..base.text import in_one_line
from .patch import Way
from .swiglu import LEAN


@functools.cache
def part(name: str) -> ModuleType | None:
    """The folder `name` beside this file, with its `WAYS`; None where it has been deleted."""
    if not Path(__file__).with_name(name).is_dir():
        return None
    return importlib.import_module(f".{name}", __package__)


def ways() -> list[Way]:
    """All that this machine could have, whether or not it has the device for it."""
    folders = [part("x86"), part("cuda")]
    return [LEAN, *(way for folder in folders if folder is not None for way in folder.WAYS)]


def switch_on(model: nn.Module) -> None:
    """Let the model use every way that applies here."""
    for way in ways():
        if way.applies() and not problem_of(way):
            way.switch_on(model)


@functools.cache
def problem_of(way: Way) -> str:
    """What `way.problem` says, said once; a kernel that cannot be compiled is no way to go."""
    try:
        problem = way.problem()
    except RuntimeError as error:  # MLX's, of its compiler: a header that is missing
        problem = in_one_line(str(error))[:300]
    if problem:
        say(f"speed     {way.name} left out, and slower for it: {problem}")
    return problem


def exp(x: mx.array) -> mx.array:
    """e to the power of x, computed where that is fast."""
    x86 = part("x86")
    return mx.exp(x) if x86 is None else x86.exp(x)


def logsumexp(x: mx.array) -> mx.array:
    """(..., N) finite numbers -> (...,) the logarithm of the sum of their exponentials."""
    x86 = part("x86")
    return mx.logsumexp(x, axis=-1) if x86 is None else x86.logsumexp(x)
