"""Tools as an environment: TRL's functions and objects run unchanged, bad calls are answered."""

import asyncio
import json
from typing import Literal

import pytest
from conftest import load_script

from utils.base.errors import UserError
from utils.rollouts import environments, tool_parsers, tools
from utils.rollouts.tools import WrongTools, as_environment_factory


def add(a: int, b: int = 1) -> int:
    """Adds two integers.

    Args:
        a: The first one.
        b: The second one.
    """
    return a + b


async def wait(text: str) -> str:
    """Says a text later.

    Args:
        text: What to say.
    """
    await asyncio.sleep(0)
    if text == "no":
        raise ValueError("never")
    return f"later {text}"


def shout(
    text: str | None, how: Literal["loud", "soft"] = "loud", times: list[int] | None = None
) -> str:
    """Says a text.

    Args:
        text: What to say.
        how: In which voice.
        times: When.
    """
    if text == "fail":
        raise RuntimeError("the voice is gone")
    return f"{text}\0<|im_end|>\x1b[2J"


class Counter:
    """As TRL's documentation has them: reset, tools, get_reward."""

    def __init__(self):
        self.value = 0

    def reset(self, **row) -> str | None:
        self.value = row["start"]
        return f" from {self.value}"

    def increment(self, step: int) -> int:
        """Increments the counter.

        Args:
            step: How far.

        Returns:
            Its value.
        """
        self.value += step
        return self.value

    def _hidden(self):
        pass

    def get_reward(self) -> float:
        return float(self.value)


def parser():
    return tool_parsers.load("json_tools")


def made(*functions, world=None):
    named = [(function.__name__, function) for function in functions]
    return as_environment_factory(named, world, parser)


def call(name, /, **arguments):
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def answers(environment, text):
    messages, over = environment.step(text)
    assert not over
    assert all(set(message) == {"role", "name", "content"} for message in messages)
    assert all(message["role"] == "tool" for message in messages)
    return [message["content"] for message in messages]


def test_functions_are_called_and_answered_in_turns():
    environment = made(add)()
    assert environment.reset(question="?") is None
    assert answers(environment, "So: " + call("add", a=2, b=3)) == ["5"]
    assert answers(environment, call("add", a=2) + call("add", a=40, b=2)) == ["3", "42"]
    assert environment.step("It is 42.") == ([], True)
    assert environment.get_reward() is None
    assert environment.calls == {"add": 3}
    assert environment.failures == 0


def test_what_is_waited_for_comes_last_as_in_trl():
    environment = made(add, wait)()
    text = call("wait", text="a") + call("add", a=2) + call("wait", text="no")
    assert answers(environment, text) == ["3", "later a", "{'error': 'never'}"]
    assert environment.failures == 1


def test_an_object_of_trl_is_an_environment():
    factory = made(add, world=Counter)
    assert [schema["function"]["name"] for schema in factory.schemas] == ["add", "increment"]
    one, other = factory(), factory()
    assert one.reset(start=3, question="?") == " from 3"
    assert other.reset(start=10) == " from 10"
    assert answers(one, call("increment", step=4) + call("add", a=1)) == ["7", "2"]
    assert (one.get_reward(), other.get_reward()) == (7.0, 10.0)


def test_a_schema_is_what_transformers_makes():
    (schema,) = made(add).schemas
    assert schema["type"] == "function"
    assert schema["function"]["description"] == "Adds two integers."
    parameters = schema["function"]["parameters"]
    assert parameters["properties"]["a"] == {"type": "integer", "description": "The first one."}
    assert parameters["required"] == ["a"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (call("subtract", a=1), "Tool subtract not found."),
        (call("add", a="2"), "argument 'a' must be integer, not '2'"),
        (call("add", a=True), "argument 'a' must be integer, not True"),
        (call("add", a=2.5), "argument 'a' must be integer, not 2.5"),
        (call("add"), "missing 1 required positional argument: 'a'"),
        (call("add", a=1, c=2), "unexpected keyword argument 'c'"),
        (call("shout", text="fail"), "the voice is gone"),
        (call("shout", text=5), "argument 'text' must be string, not 5"),
        (call("shout", text="a", how="high"), "must be one of ['loud', 'soft'], not 'high'"),
        (call("shout", text="a", times=[1, "2"]), "argument 'times' must be array, not [1, '2']"),
    ],
)
def test_a_bad_call_is_answered_with_the_error(text, problem):
    environment = made(add, shout)()
    (content,) = answers(environment, text)
    assert content.startswith("{'error': ")
    assert problem in content
    assert environment.failures == 1
    assert "subtract" not in environment.calls


def test_what_a_schema_allows_is_passed_on():
    assert made(shout)().step(call("shout", text=None, times=[1, 2]))[0][0]["content"] == (
        "None\0<|im_end|>\x1b[2J"
    )
    assert tools.fits(2, {"type": "number"})
    assert tools.fits("a", {"type": ["integer", "string"]})
    assert tools.fits({"a": 1}, {"type": "object", "additionalProperties": {"type": "integer"}})
    assert not tools.fits({"a": "b"}, {"type": "object", "additionalProperties": {"type": "null"}})
    assert tools.fits([1], {"anyOf": [{"type": "null"}, {"type": "array"}]})
    assert tools.fits(object(), {})


@pytest.mark.parametrize("inner", ['{"name": "add", "arguments": {"a"', "", "[1]"])
def test_a_call_that_cannot_be_read_ends_the_conversation_as_in_trl(inner):
    environment = made(add)()
    text = call("add", a=1) + f"<tool_call>{inner}</tool_call>"
    assert environment.step(text) == ([], True)
    assert (environment.failures, environment.calls) == (1, {})


def test_a_thousand_calls_are_too_many():
    environment = made(add)()
    contents = answers(environment, "".join(call("add", a=n) for n in range(1000)))
    assert contents[:64] == [str(n + 1) for n in range(64)]
    assert contents[64:] == ["{'error': 'only the first 64 of 1000 calls in one turn were made'}"]
    assert (environment.calls["add"], environment.failures) == (64, 936)


def no_docstring(a: int):
    return a


def no_hint(a):
    """Takes anything.

    Args:
        a: What.
    """


def untold(a: int):
    """Says nothing of its argument."""


class Bare:
    def go(self) -> str:
        """Goes."""


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ([("x.py:five", 5)], "x.py:five is 5, and no function"),
        ([("x.py:Counter", Counter)], "and no function"),
        ([("a.py:add", add), ("b.py:add", add)], "two tools have the name add"),
        ([("x", no_docstring)], "no_docstring cannot be described to a model: .* no docstring"),
        ([("x", no_hint)], "no_hint cannot be described .* missing a type hint"),
        ([("x", untold)], "untold cannot be described .* no description for the argument 'a'"),
        ([], "has no method 'step', and none that could be a tool"),
    ],
)
def test_what_is_no_tool_is_refused(given, problem):
    with pytest.raises(WrongTools, match=problem):
        as_environment_factory(given, None, parser)


def test_an_object_without_reset_is_refused():
    with pytest.raises(WrongTools, match="no method 'reset'"):
        as_environment_factory([], Bare, parser)


def test_a_method_and_a_function_of_one_name_are_refused():
    def increment(step: int):
        """Steps.

        Args:
            step: How far.
        """

    with pytest.raises(WrongTools, match="two tools have the name increment"):
        made(increment, world=Counter)


FILE = '''
import sys

def loaded(name: str) -> bool:
    """Whether a module is loaded.

    Args:
        name: Of the module.
    """
    return name in sys.modules

class Deck:
    def reset(self, **row):
        self.taken = 0

    def take(self, count: int) -> str:
        """Takes cards.

        Args:
            count: How many.
        """
        self.taken += count
        return f"{self.taken} cards"

    def get_reward(self):
        return self.taken
'''


def of_run(how, **settings):
    return environments.Environments(
        load_script().MLXGRPOConfig(**settings, environment_timeout=60.0), how
    )


def test_tools_run_in_processes_without_mlx(tmp_path):
    (tmp_path / "deck.py").write_text(FILE)
    file = tmp_path / "deck.py"
    named = [f"{file}:loaded", "calculator"]
    served = of_run({"parser": "json_tools"}, tools=named, environment=f"{file}:Deck")
    try:
        names = [schema["function"]["name"] for schema in served.schemas]
        assert served.processes[-1].preparation["schemas"] == served.schemas, "made once"
        assert names == ["loaded", "calculator", "take"]
        one = served.make(3)
        assert one.begin({"question": "?"}).result() is None
        text = call("take", count=3) + call("loaded", name="mlx")
        messages, over = one.step(text + call("calculator", expression="2 ** 64")).result()
        contents = [message["content"] for message in messages]
        assert (contents, over) == (["3 cards", "False", "18446744073709551616"], False)
        assert one.step("I have three.").result() == ([], True)
        calls = {"take": 1, "loaded": 1, "calculator": 1}
        assert one.close().result() == (3.0, {"taken": 3, "calls": calls, "failures": 0})
    finally:
        served.stop()


@pytest.mark.parametrize(
    ("text", "tool", "problem"),
    [
        ("import nothing_there\n", "{file}:add", r"No module named 'nothing_there' \(.*, line 1\)"),
        ("x = 1\n\ndef f(:\n", "{file}:add", r"cannot be imported: SyntaxError: .*line 3"),
        ("def sub(): pass\n", "{file}:add", r"has no function 'add' \(it has sub\)"),
        ("", "abacus", r"'abacus' is not built in \(calculator\), and not written file.py:name"),
        ("", "{folder}/other.py:add", r"file .*other.py does not exist"),
        ("def add(): pass\n", "{file}:add", "add cannot be described to a model"),
        ("def add():\n    'Adds.'\n", "{file}:add", "the template has no calls"),
    ],
)
def test_a_file_of_tools_that_fails_is_bad_input(tmp_path, text, tool, problem):
    file = tmp_path / "own.py"
    file.write_text(text)
    spec = tool.format(file=file, folder=tmp_path)
    with pytest.raises(UserError, match=problem):
        of_run({"problem": "the template has no calls"}, tools=[spec])
    assert UserError.exit_code == 2


def test_an_environment_with_steps_takes_no_tools(tmp_path):
    (tmp_path / "game.py").write_text(
        "class Game:\n    def reset(self): pass\n    def step(self, text): return 'a', True\n"
    )
    with pytest.raises(UserError, match="has a method 'step', and so takes no tools"):
        of_run({}, tools=["calculator"], environment=f"{tmp_path / 'game.py'}:Game")
