"""Reward functions from files and modules."""

import difflib
import functools
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType

from ..base.errors import UserError
from ..base.text import shown
from ..model import fingerprints
from ..settings.run_settings import Settings
from . import foreign
from .calls import Reward, described

Rewards = dict[str, Reward]
CODE: dict[str, str] = {}
"""SHA-256 of each file that own functions are from, as it was when it was imported."""


def load_reward(spec: str, builtin: Rewards, start: str = "") -> Reward:
    """A built-in name, `module:function` or `file.py:function`; files count from `start`.

    Raises:
        UserError: no such name, module, file or function.
    """
    if spec in builtin:
        return builtin[spec]
    if len(spec) > 1000:
        raise UserError(f"reward {shown(spec)} is too long for the name of a function")
    source, _, name = spec.rpartition(":")
    if not (source and name):
        near = difflib.get_close_matches(spec, builtin, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(
            f"reward {spec!r}: not built in ({', '.join(builtin)}); own functions are written "
            f"module:function or file.py:function{hint}"
        )
    module = import_reward_module(spec, source, start)
    if not callable(getattr(module, name, None)):
        known = [n for n, f in vars(module).items() if inspect.isfunction(f)]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"reward {spec!r}: {source} has no function {name!r}{hint}")
    return getattr(module, name)


def import_reward_module(spec: str, source: str, start: str) -> ModuleType:
    file = Path(start, source)
    if source.endswith(".py") and not file.is_file():
        raise UserError(f"reward {spec!r}: file {source} does not exist")
    name = f"reward_file:{file.resolve()}"  # a name that hides no other module
    try:
        if not source.endswith(".py"):
            load_named = functools.partial(importlib.import_module, source)
            module = foreign.called(load_named, importing=True)
            if module.__file__:
                CODE.setdefault(source, fingerprints.of_file(Path(module.__file__)))
            return module
        if name in sys.modules:
            return sys.modules[name]
        module_spec = importlib.util.spec_from_file_location(name, file.absolute())
        assert module_spec is not None
        assert module_spec.loader is not None
        module = importlib.util.module_from_spec(module_spec)
        sys.modules[name] = module  # before its code runs: dataclasses look there
        CODE[source] = fingerprints.of_file(file)
        load = functools.partial(module_spec.loader.exec_module, module)
        foreign.called(load, importing=True)
    except Exception as error:  # someone else's code: whatever it raises, say which reward it was
        sys.modules.pop(name, None)
        raise UserError(f"reward {spec!r} cannot be imported: {described(error)}") from error
    return module


def code(config: Settings) -> dict[str, str]:
    """What own functions of `reward_funcs` are from, with its SHA-256."""
    named = (spec.rpartition(":")[0] for spec in config.reward_funcs)
    return {source: CODE[source] for source in named if source in CODE}
