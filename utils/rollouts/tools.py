"""Tools that a model may call, as an environment: TRL's `tools` and `environment_factory` objects.

What the model says is searched for calls; each is answered by a message of the role tool, and a
turn without one ends the conversation. As in TRL, a result is what `str` makes of it, and a tool
that raises is answered with the error. Imported where tools run, in processes without MLX.
"""

import asyncio
import inspect
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

from ..base.text import shown
from .calculator import calculator
from .tool_parsers import Call, NoCall, Parser

BUILT_IN: dict[str, Callable[..., object]] = {"calculator": calculator}
MOST_CALLS = 64
"""In one turn; the others are answered with one message that says so."""
OF_ENVIRONMENTS = ("reset", "get_reward")  # public methods that are no tools
Tools = dict[str, Callable[..., object]]
Said = dict[str, object]
"""A message of a tool."""


class WrongTools(Exception):
    """What cannot be a tool, in words."""


class World(Protocol):
    """One of TRL's environments: its other public methods are tools."""

    def reset(self, **row: object) -> str | None: ...


@dataclass
class ToolEnvironment:
    """The tools of one conversation, and the object that they belong to, if there is one."""

    tools: Tools
    schemas: Sequence[dict]
    parser: Parser
    loop: asyncio.AbstractEventLoop
    world: World | None = None
    calls: Counter[str] = field(default_factory=Counter)
    """How often each tool was called, whatever came of it."""
    failures: int = 0
    """Calls that were answered with an error, and turns with a call that could not be read."""

    def reset(self, **row: object) -> str | None:
        """The conversation about a row of the data begins. Returns what to add to the prompt."""
        return None if self.world is None else self.world.reset(**accepted(self.world.reset, row))

    def step(self, text: str) -> tuple[list[Said], bool]:
        """The results of the calls in what the model said; over without one."""
        try:
            calls = self.parser.calls(text, self.schemas)
        except NoCall:
            self.failures += 1
            return [], True
        # As in TRL: those that are waited for come last.
        order = sorted(calls[:MOST_CALLS], key=lambda call: self.is_waited_for(call.name))
        said = self.answers(order)
        if calls[MOST_CALLS:]:
            self.failures += len(calls) - MOST_CALLS
            problem = f"only the first {MOST_CALLS} of {len(calls)} calls in one turn were made"
            said.append(message(calls[MOST_CALLS].name, error(problem)))
        return said, not said

    def answers(self, calls: Sequence[Call]) -> list[Said]:
        """A message for each call."""
        results = [(call.name, self.result(call)) for call in calls]
        waiting = [result for _, result in results if inspect.isawaitable(result)]
        settled = iter(self.loop.run_until_complete(all_of(waiting)) if waiting else ())
        said: list[Said] = []
        for name, result in results:
            if inspect.isawaitable(result):
                result = next(settled)
                if isinstance(result, BaseException):
                    result = self.failed(result)
            said.append(message(name, result))
        return said

    def result(self, call: Call) -> object:
        """What a tool returns, or what is said in its place."""
        tool = self.tools.get(call.name)
        if tool is None:
            return self.failed(ValueError(f"Tool {call.name} not found."))
        self.calls[call.name] += 1
        if problem := wrong_argument(call, self.schemas):
            return self.failed(TypeError(problem))
        try:
            return tool(**call.arguments)
        except Exception as raised:  # noqa: BLE001 - someone else's code: the model is told
            return self.failed(raised)

    def failed(self, raised: BaseException) -> dict[str, str]:
        self.failures += 1
        return error(str(raised))

    def is_waited_for(self, name: str) -> bool:
        return inspect.iscoroutinefunction(self.tools.get(name))

    def get_reward(self) -> float | None:
        """By the object that the tools belong to; None where it has no opinion."""
        score = getattr(self.world, "get_reward", None)
        value = score() if score else None
        if inspect.isawaitable(value):
            value = self.loop.run_until_complete(all_of([value]))[0]
            if isinstance(value, BaseException):
                raise value
        return cast("float | None", value)


async def all_of(waiting: Sequence[object]) -> list[object]:
    """The results of what is waited for, or what it raised."""
    return await asyncio.gather(*waiting, return_exceptions=True)  # type: ignore[call-overload]


def message(name: str, result: object) -> Said:
    return {"role": "tool", "name": name, "content": str(result)}


def error(problem: str) -> dict[str, str]:
    """As TRL says it."""
    return {"error": problem}


def accepted(function: Callable[..., object], row: Mapping[str, object]) -> Mapping[str, object]:
    """Of a row's columns, those that the function takes."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return row
    return {name: row[name] for name in parameters if name in row}


KINDS: dict[str, tuple[type, ...]] = {
    "integer": (int,),
    "number": (int, float),
    "string": (str,),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


def wrong_argument(call: Call, schemas: Sequence[dict]) -> str:
    """What is wrong with the type of one; empty if all are as the schema says. What is missing or
    too much, Python says itself when the tool is called."""
    functions = [schema["function"] for schema in schemas]
    of_tool: dict = next((f for f in functions if f["name"] == call.name), {})
    known = of_tool.get("parameters", {}).get("properties", {})
    for name, value in call.arguments.items():
        if name in known and not fits(value, known[name]):
            return f"argument {name!r} must be {described(known[name])}, not {shown(value)}"
    return ""


def described(schema: Mapping[str, object]) -> str:
    """What a schema allows, for a model."""
    if "enum" in schema:
        return f"one of {schema['enum']}"
    kinds = schema.get("type", "something else")
    return " or ".join(kinds) if isinstance(kinds, list) else str(kinds)


def fits(value: object, schema: Mapping) -> bool:
    """Whether a value is as a schema made from type hints says."""
    if value is None and schema.get("nullable"):
        return True
    if "anyOf" in schema:
        return any(fits(value, one) for one in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    if "type" not in schema:
        return True
    return is_kind(value, schema["type"]) and parts_fit(value, schema)


def is_kind(value: object, kinds: str | list[str]) -> bool:
    names = [kinds] if isinstance(kinds, str) else kinds
    if isinstance(value, bool):  # which Python takes for an integer
        return "boolean" in names
    return any(isinstance(value, KINDS.get(name, (object,))) for name in names)


def parts_fit(value: object, schema: Mapping) -> bool:
    """Those of a list or an object."""
    if isinstance(value, list):
        items = schema.get("items", {})
        return all(fits(part, items) for part in value)
    if isinstance(value, dict):
        values = schema.get("additionalProperties", {})
        return all(fits(part, values) for part in value.values())
    return True


def tools_of(world: World) -> Tools:
    """The public methods of one of TRL's environments that are tools."""
    methods = inspect.getmembers(world, predicate=inspect.ismethod)
    own = [name for name, _ in methods if name not in OF_ENVIRONMENTS and name[0] != "_"]
    return {name: getattr(world, name) for name in own}


def by_name(tools: Sequence[tuple[str, object]]) -> Tools:
    """Functions by the names that the model calls them by, from (where it is from, function).

    Raises:
        WrongTools: no function, or two of one name.
    """
    found: Tools = {}
    for source, tool in tools:
        if not (inspect.isfunction(tool) or inspect.ismethod(tool)):
            raise WrongTools(f"{source} is {shown(tool)}, and no function")
        if tool.__name__ in found:
            raise WrongTools(f"two tools have the name {tool.__name__}: a model cannot tell them")
        found[tool.__name__] = tool
    return found


def schema_of(name: str, tool: Callable[..., object]) -> dict:
    """What a model is told of a tool.

    Raises:
        WrongTools: no docstring, or one that leaves an argument out; no type hints.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers.utils import chat_template_utils  # takes seconds: late

    try:
        return chat_template_utils.get_json_schema(tool)
    except Exception as problem:  # also of hints that name what is not there
        raise WrongTools(
            f"the tool {name} cannot be described to a model: {problem} (it needs a docstring with "
            "a line for each argument, and type hints: see docs/environments.md)"
        ) from problem


@dataclass(frozen=True)
class Factory:
    """Makes the environment of a conversation."""

    tools: Tools
    make_world: Callable[[], World] | None
    schemas: list[dict]
    parser: Parser
    loop: asyncio.AbstractEventLoop

    def __call__(self) -> ToolEnvironment:
        world = self.make_world() if self.make_world else None
        own = tools_of(world) if world else {}
        return ToolEnvironment(self.tools | own, self.schemas, self.parser, self.loop, world)


def as_environment_factory(
    tools: Sequence[tuple[str, object]],
    make_world: Callable[[], World] | None,
    parser: Callable[[], Parser],
    schemas: list[dict] | None = None,
) -> Factory:
    """What makes environments of tools.

    Args:
        tools: (where it is from, function).
        make_world: One of TRL's `environment_factory`, whose public methods are tools as well.
        parser: Finds that of the calls, once all else is in order.
        schemas: Of the same tools, where they were made before.

    Raises:
        WrongTools: what cannot be a tool, or an object without `reset`.
    """
    own = tools_of(probed(make_world)) if make_world else {}
    functions = by_name([*tools, *((f"the method {n}", method) for n, method in own.items())])
    if not functions:
        raise WrongTools(
            "has no method 'step', and none that could be a tool: see docs/environments.md"
        )
    if schemas is None:
        schemas = [schema_of(name, tool) for name, tool in functions.items()]
    given = {name: tool for name, tool in functions.items() if name not in own}
    return Factory(given, make_world, schemas, parser(), asyncio.new_event_loop())


def probed(make_world: Callable[[], World]) -> World:
    """One that is made to be looked at."""
    world = make_world()
    if not callable(getattr(world, "reset", None)):
        raise WrongTools("has no method 'reset': see docs/environments.md")
    return world
