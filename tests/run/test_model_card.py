"""README.md of a trained model."""

import json
import re
import shlex
from types import SimpleNamespace

import pytest

from utils.model.served_prompt import ServedPrompt
from utils.run import model_card


@pytest.fixture
def card(grpo, tmp_path):
    """The card of a run, from its settings."""

    def written(history=(), early="", prompt=None, train_type="lora", **settings):
        state = SimpleNamespace(update_step=7)
        trainer = SimpleNamespace(
            args=grpo.MLXGRPOConfig(**settings),
            loaded=SimpleNamespace(train_type=train_type),
            run=SimpleNamespace(state=state, log=SimpleNamespace(history=list(history))),
            total_updates=9,
        )
        prompt = prompt or ServedPrompt({}, "served", "original", "")
        model_card.write(tmp_path, tmp_path / "a final", trainer, prompt, early)
        return (tmp_path / "README.md").read_text(encoding="utf-8")

    return written


def evaluation(em):
    return {"em": em, "em_subset": 600}


def test_it_says_how_the_model_was_made_and_what_it_scored(card):
    text = card([evaluation(0.242), evaluation(1.0)], run_name="sums", dataset="a.jsonl")
    assert (
        "# sums\n\nQwen/Qwen2.5-1.5B-Instruct, trained by GRPO on the questions of a.jsonl: "
        in text
    )
    assert "LoRA adapters, merged here and kept in adapters/, 7 updates.\n" in text
    assert "| | exact match |\n|---|---|\n| before | 24.2% |\n| after | 100.0% |\n" in text
    assert "On 600 test questions, greedy, with at most 128 tokens an answer." in text
    assert "7 updates of 9 (max_hours)." in card(early="max_hours")
    assert "|" not in card()


def test_the_request_is_one_that_a_shell_and_json_take(card, tmp_path):
    text = card(stop_strings=["it's over", "</answer>"], eval_max_new_tokens=99)
    command = re.search(r"^curl.*?\n```", text, re.MULTILINE | re.DOTALL)[0].removesuffix("```")
    words = shlex.split(command.replace("\\\n", ""))
    request = json.loads(words[words.index("-d") + 1])
    assert request["stop"] == ["it's over", "</answer>"]
    assert request["max_tokens"] == 99
    assert f"MODEL='{tmp_path / 'a final'}'\n" in text
    assert "Keep `stop` in the request" in text
    without = card(stop_strings=[])
    assert '"stop"' not in without
    assert "Keep `stop`" not in without


def test_it_shows_the_prompt(card):
    text = card(system_prompt="Use ``` fences.", reasoning_prefix="<think>\n")
    assert "````text\nUse ``` fences.\n````" in text
    assert r"`<think>\n`" in text
    plain = card(system_prompt="", reasoning_prefix="")
    assert "Questions were asked as they are" in plain


def test_it_says_when_the_template_cannot_ask_so(card):
    text = card(prompt=ServedPrompt({}, None, None, "no template"))
    assert "This folder's chat template does not: no template." in text
    assert "mlx_lm.server" not in text
    assert "utils/inference.py" in text


def test_adapters_alone_are_served_with_their_template(card):
    assert '--adapter-path "$MODEL/adapters"' in card()
    assert "--adapter-path" not in card(train_type="full")


def test_a_copy_is_named_by_its_own_place(card):
    text = model_card.moved(card(), "b c", "Converted.")
    assert text.count("MODEL='b c'\n") == 3
    assert "a final" not in text
    assert text.count("\nConverted.\n\n## How to ask it\n") == 1
    assert model_card.moved(card(), "b", "").count("Converted") == 0
