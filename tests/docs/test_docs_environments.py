"""docs/environments.md is executed."""

import json
import re
import tomllib

import pytest
from conftest import ROOT
from helpers import read_log

from utils.run import completions

TEXT = (ROOT / "docs/environments.md").read_text()


def block(language, number=0):
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)[number]


def test_the_environment_is_short():
    assert len(block("python").splitlines()) <= 20


def test_its_settings_train_with_it(typed, tmp_path):
    (tmp_path / "game.py").write_text(block("python"))
    rows = [{"question": f"Number {n}?", "answer": str(n), "number": n} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = tomllib.loads(block("toml"))
    code, out, err, _ = typed(
        **settings,
        dataset="rows.jsonl",
        max_updates=1,
        max_new_tokens=40,
        stop_strings=[*"0123456789abcdefghi"],
        reasoning_prefix="",
        eval_samples=2,
    )
    assert (code, err) == (0, "")
    assert "environment" in out
    record, evaluation = (
        next(r for r in read_log(tmp_path / "out") if test(r))
        for test in (lambda r: "loss" in r, lambda r: "em" in r)
    )
    assert record["turns"] > 1
    assert record["environment_failures"] == evaluation["environment_failures"] == 0
    groups = [g for g in completions.read(tmp_path / "out") if g["kind"] == "train"]
    for kept in (kept for group in groups for kept in group["completions"]):
        roles = [message["role"] for message in kept["messages"]]
        assert roles[:2] == ["user", "assistant"]
        said = [m["content"] for m in kept["messages"] if m["role"] == "user"][1:]
        assert {*said} <= {"higher", "lower", "right"}
        found = said[-1:] == ["right"]
        assert kept["rewards"]["environment"] == (1 - len(said) / 10 if found else 0)
        assert 0 in kept["mask"] or len(said) <= 1


CALLING = (
    "{% for t in tools or [] %}{{ t.function.name }}: {{ t.function.description }}\n{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{# <tool_call> tool_call.name #}"
)


def test_its_tool_answers(typed, tmp_path):
    assert len(block("python", 1).splitlines()) <= 10
    (tmp_path / "words.py").write_text(block("python", 1))
    (tmp_path / "calling.jinja").write_text(CALLING)
    call = '<tool_call>{"name": "length", "arguments": {"word": "eleven"}}</tool_call>'
    settings = tomllib.loads(block("toml", 1))
    code, _, err, _ = typed(
        **settings,
        chat_template="calling.jinja",
        reasoning_prefix=call,
        stop_strings=[*"bfjkqxyz0123456789"],
        max_updates=1,
        max_new_tokens=40,
        max_turns=3,
        eval_samples=0,
        eval_every_updates=0,
    )
    assert (code, err) == (0, "")
    (group, *_) = completions.read(tmp_path / "out")
    said = [m for kept in group["completions"] for m in kept["messages"]]
    answers = [m for m in said if m["role"] == "tool"]
    assert answers
    assert all(m["content"] == "6" for m in answers)


@pytest.mark.parametrize("name", re.findall(r"`((?:max|environment|on)_\w+|environment)`", TEXT))
def test_the_settings_that_it_names_are_there(grpo, name):
    known = {*vars(grpo.MLXGRPOConfig()), *grpo.REWARDS, "environment_failures"}
    known |= {"environment_factory"}  # TRL's
    assert name in known
