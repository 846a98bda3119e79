"""Environments in a process of their own, so that none can hang a run, or end it.

The worker is this file as a program: it imports the environment, and nothing of the trainer (no
MLX, no GPU memory). It loads the environment once, begins one for each completion, which gets the
texts of its turns, and at the end says what that has made of them.
"""

import copy
import functools
import importlib
import importlib.util
import inspect
import random
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import ModuleType
from typing import Protocol, cast

if __name__ == "__main__" and not __package__:  # as a program: sys.path[0] is this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    __package__ = "utils.rollouts"

from ..base.text import shown
from ..base.worker_pool import Task
from . import tool_parsers, tools
from .tools import accepted

ROLES = ("user", "tool", "system")
Said = dict[str, object]
"""A message of an environment."""


class Environment(Protocol):
    """A world that a model talks to; one is made for each completion."""

    def reset(self, **row: object) -> str | None:
        """The conversation about a row of the data begins. Returns what to add to the prompt."""

    def step(self, text: str) -> tuple[object, bool]:
        """The model has said that. Returns the answer, and whether the conversation is over."""


class Wrong(Exception):
    """What an environment did wrong, in words."""


def load(task: Task) -> Callable[[], Environment]:
    """What makes environments: a class or function in `module` or `file.py`, alone or as tools.

    Raises:
        Wrong: there is none.
    """
    spec, folder, names = task["load"], task["folder"], task.get("tools", [])
    made = of_file(spec, folder, "class") if spec else None
    if made is not None and has_step(spec, made):
        if names:
            raise Wrong(f"{spec!r} has a method 'step', and so takes no tools")
        return cast(Callable[[], Environment], made)
    return as_tools(spec, made, task)


def has_step(spec: str, made: Callable[[], object]) -> bool:
    """Whether it answers texts by itself."""
    look = made if inspect.isclass(made) else attempted(f"{spec!r} cannot be made:", made)
    if callable(getattr(look, "step", None)) and not callable(getattr(look, "reset", None)):
        raise Wrong(f"{spec!r} has no method 'reset': see docs/environments.md")
    return callable(getattr(look, "step", None))


def as_tools(spec: str, made: Callable[[], object] | None, task: Task) -> Callable[[], Environment]:
    """Functions, and methods of an object, that the model may call. Raises Wrong."""
    names = task.get("tools", [])
    functions = [
        (name, tools.BUILT_IN.get(name) or of_file(name, task["folder"], "function"))
        for name in names
    ]
    what = f"{spec!r}" if spec else f"tools = {names}"
    make_world = cast("Callable[[], tools.World] | None", made)

    def parser() -> tool_parsers.Parser:
        if not task.get("parser"):
            raise Wrong(task.get("problem") or "no parser for calls of tools is known")
        return tool_parsers.load(task["parser"])

    given = functions, make_world, parser, task.get("schemas")
    work = functools.partial(tools.as_environment_factory, *given)
    return cast(Callable[[], Environment], attempted(f"{what}:", work))


def of_file(spec: str, folder: str, kind: str) -> Callable[..., object]:
    """The class or function of this name. Raises Wrong."""
    source, _, name = spec.rpartition(":")
    if not (source and name):
        known = ", ".join(tools.BUILT_IN)
        raise Wrong(f"{spec!r} is not built in ({known}), and not written file.py:name")
    module = attempted(f"{spec!r} cannot be imported:", lambda: module_of(source, folder))
    made = getattr(module, name, None)
    if not callable(made):
        test = inspect.isclass if kind == "class" else inspect.isfunction
        known = ", ".join(n for n, v in vars(module).items() if test(v) and not n.startswith("_"))
        has = f" (it has {known})" if known else ""
        raise Wrong(f"{spec!r}: {source} has no {kind} {name!r}{has}")
    return cast(Callable[..., object], made)


def module_of(source: str, folder: str) -> ModuleType:
    if not source.endswith(".py"):
        return importlib.import_module(source)
    file = Path(folder, source)
    if not file.is_file():
        raise Wrong(f"file {source} does not exist")
    name = f"environment_file:{file.resolve()}"  # a name that hides no other module
    spec = importlib.util.spec_from_file_location(name, file.absolute())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before its code runs: dataclasses look there
    spec.loader.exec_module(module)
    return module


def attempted(what: str, work: Callable[[], object]) -> object:
    """What someone else's code returns.

    Raises:
        Wrong: whatever it raises, with the line that it came from.
    """
    try:
        return work()
    except (Wrong, tools.WrongTools) as error:
        raise Wrong(f"{what} {error}") from None
    except BaseException as error:  # also sys.exit: nothing may end this process but its parent
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if f.filename != __file__ and not f.filename.startswith("<")]
        where = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
        told = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise Wrong(f"{what} {told}{where}") from error


def added(value: object) -> str | None:
    """What `reset` returned, checked. Raises Wrong."""
    if value is None or isinstance(value, str):
        return value
    raise Wrong(f"reset returned {shown(value)}, which is neither a text nor None")


def answer(value: object) -> tuple[list[Said], bool]:
    """What `step` returned, as messages, and whether the conversation is over. Raises Wrong."""
    if not isinstance(value, tuple) or len(value) != 2:
        raise Wrong(f"step returned {shown(value)}, not (a text or messages, whether it is over)")
    said, over = value
    if type(over).__name__ not in ("bool", "bool_"):  # NumPy's has no part in this process
        raise Wrong(f"step returned {shown(over)} for whether it is over, not true or false")
    messages = as_messages(said)
    if messages is None or not (messages or over):
        raise Wrong(f"step returned {shown(said)}, which is neither a text nor messages")
    return messages, bool(over)


def as_messages(said: object) -> list[Said] | None:
    """A text is one of a user; None where it is no answer."""
    if said is None:
        return []
    if isinstance(said, str):
        return [{"role": "user", "content": said}]
    if isinstance(said, Sequence) and all(map(is_message, said)):
        return [dict(message) for message in said]
    return None


def is_message(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and value.get("role") in ROLES
        and isinstance(value.get("content"), str)
    )


def reward(value: object) -> float | None:
    """What `get_reward` returned, checked. Raises Wrong."""
    try:
        number = None if value is None else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if number is not None and not abs(number) < float("inf"):
        raise Wrong(f"get_reward returned {shown(value)}, which is no finite number")
    return number


SENT = ("builtins", "collections", "datetime", "numpy", "decimal")  # modules of types


def attributes(environment: Environment) -> dict[str, object]:
    """Of those that it holds, the ones that can be sent."""
    found: dict[str, object] = {}
    if isinstance(environment, tools.ToolEnvironment):
        found = {"calls": dict(environment.calls), "failures": environment.failures}
        environment = cast(Environment, environment.world)
    for name, value in vars(environment).items() if hasattr(environment, "__dict__") else ():
        if type(value).__module__ not in SENT:
            continue
        try:
            ForkingPickler.dumps(value)
        except Exception:  # noqa: BLE001, S112 - a socket, a lock: rewards get the others
            continue
        found[name] = value
    return found


class Served:
    """The environments of this process, by number."""

    def __init__(self) -> None:
        self.make: Callable[[], Environment] | None = None
        self.problem = "nothing is loaded"
        self.open: dict[int, Environment] = {}

    def do(self, task: Task) -> object:
        """The answer to a task. Raises Wrong."""
        if "load" in task:
            try:
                self.make = load(task)
            except Wrong as error:
                self.problem = str(error)
            return None
        if self.make is None:
            raise Wrong(self.problem)
        if "check" in task:
            return getattr(self.make, "schemas", [])
        # The same in a run that goes on, whatever was played before in this process.
        random.seed(task["seed"])
        if numpy := sys.modules.get("numpy"):
            numpy.random.seed(task["seed"] % 2**32)
        number = task["number"]
        if "row" in task:
            return self.begin(number, task["row"])
        if "text" in task:
            environment = self.open[number]
            return answer(attempted("step raised", lambda: environment.step(task["text"])))
        return self.close(self.open.pop(number))

    def begin(self, number: int, row: dict[str, object]) -> str | None:
        assert self.make is not None
        made = cast(Environment, attempted("could not be made:", self.make))
        self.open[number] = made
        row = copy.deepcopy(row)
        return added(attempted("reset raised", lambda: made.reset(**accepted(made.reset, row))))

    def close(self, environment: Environment) -> tuple[float | None, dict[str, object]]:
        """Its reward, and what it holds."""
        score = getattr(environment, "get_reward", None)
        value = reward(attempted("get_reward raised", score)) if score else None
        return value, attributes(environment)


def serve(connection: Connection) -> None:
    """A worker's life, until the parent is gone: answers are (whether it went well, what)."""
    served = Served()
    while True:
        try:
            task = connection.recv()
        except (EOFError, OSError):
            return
        try:
            told = True, served.do(task)
        except Wrong as error:
            told = False, str(error)
        connection.send(told)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
