"""Calls of tools in what models say, by mlx-lm's parsers, which no process of tools imports."""

import mlx_lm
import pytest
from mlx_lm.tool_parsers import glm47

from utils.base.errors import UserError
from utils.rollouts import tool_parsers
from utils.rollouts.tool_parsers import Call, NoCall

ADD = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "string"}},
            },
        },
    }
]
TWO = {"a": 2, "b": "x"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "json_tools",
            '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": "x"}}\n</tool_call>',
        ),
        (
            "qwen3_coder",
            "<tool_call>\n<function=add>\n<parameter=a>\n2\n</parameter>\n<parameter=b>\nx\n"
            "</parameter>\n</function>\n</tool_call>",
        ),
        ("pythonic", '<|tool_call_start|>[add(a=2, b="x")]<|tool_call_end|>'),
        ("mistral", '[TOOL_CALLS]add[ARGS]{"a": 2, "b": "x"}'),
        ("gemma4", '<|tool_call>call:add{a:2,b:<|"|>x<|"|>}<tool_call|>'),
        (
            "glm47",
            "<tool_call>add<arg_key>a</arg_key><arg_value>2</arg_value><arg_key>b</arg_key>"
            "<arg_value>x</arg_value></tool_call>",
        ),
        ("llama3_json", '<|python_tag|>{"name": "add", "parameters": {"a": 2, "b": "x"}}'),
    ],
)
def test_a_call_of_each_family(name, text):
    parser = tool_parsers.load(name)
    before = "" if name == "llama3_json" else "I add them."
    assert parser.calls(before + text, ADD) == [Call("add", TWO)]
    assert parser.calls("There is nothing to add.", ADD) == []


def test_all_of_mlx_lm_can_be_read():
    names = tool_parsers.known()
    assert {"json_tools", "qwen3_coder", "pythonic", "laguna", "minicpm5"} <= {*names}
    assert all(callable(tool_parsers.load(name).parse) for name in names)


def test_several_calls_come_in_order():
    call = '<tool_call>{"name": "add", "arguments": {"a": %d}}</tool_call>'
    calls = tool_parsers.load("json_tools").calls(call % 1 + "\nand " + call % 2, ADD)
    assert [one.arguments["a"] for one in calls] == [1, 2]
    llama = '{"name": "add", "parameters": {"a": 1}}; {"name": "add", "parameters": {"a": 2}}'
    calls = tool_parsers.load("llama3_json").calls(llama, ADD)
    assert [one.arguments["a"] for one in calls] == [1, 2]


@pytest.mark.parametrize(
    "inner",
    [
        '{"name": "add", "arguments": {"a": 2',
        '{"name": "add", "arguments": 5}',
        '{"name": "add", "arguments": "{"}',
        '{"arguments": {}}',
        '{"name": 5, "arguments": {}}',
        "[" * 100_000,
        "17",
        "",
    ],
)
def test_what_is_no_call_is_told(inner):
    with pytest.raises(NoCall):
        tool_parsers.load("json_tools").calls(f"<tool_call>{inner}</tool_call>", ADD)


def test_a_call_that_does_not_end_is_a_text():
    assert tool_parsers.load("json_tools").calls('<tool_call>{"name": "add"', ADD) == []


def test_arguments_may_be_left_out_or_written_as_a_text():
    parse = tool_parsers.load("json_tools").calls
    assert parse('<tool_call>{"name": "now"}</tool_call>', ADD) == [Call("now", {})]
    text = r'<tool_call>{"name": "add", "arguments": "{\"a\": 2}"}</tool_call>'
    assert parse(text, ADD) == [Call("add", {"a": 2})]


def test_llamas_calls_are_json_and_nothing_else():
    parser = tool_parsers.load("llama3_json")
    assert parser.calls('{"answer": 5}', ADD) == []
    for text in (
        "{so}",
        '{"name": "add", "parameters": {"a": 2}',
        '{"name": "add"} is what I call',
    ):
        with pytest.raises(NoCall):
            parser.calls(text, ADD)


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("<tool_call>{{ tool_call.name }}</tool_call>", "json_tools"),
        ("<tool_call>\n<function={{ tool_call.name }}>", "qwen3_coder"),
        ("[TOOL_CALLS]", "mistral"),
        ("{{ '<|start_header_id|>ipython<|end_header_id|>' }}", "llama3_json"),
    ],
)
def test_the_template_says_which(model_dir, template, name):
    tokenizer = mlx_lm.load(str(model_dir))[1]
    assert tool_parsers.named(tokenizer, {"chat_template": template}) == name


def test_the_parser_that_mlx_lm_has_found_is_taken(model_dir):
    tokenizer = mlx_lm.load(str(model_dir))[1]
    tokenizer._tool_parser = glm47.parse_tool_call
    assert tool_parsers.named(tokenizer, {}) == "glm47"


def test_a_template_without_calls_is_refused(model_dir):
    tokenizer = mlx_lm.load(str(model_dir))[1]
    with pytest.raises(UserError, match=r"no way to call tools .*json_tools.*llama3_json"):
        tool_parsers.named(tokenizer, {})
