"""What a run wrote, behind mlx_lm's server: an OpenAI client gets what the evaluator counted."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import openai
import pytest
from conftest import ROOT
from helpers import mostly_long, run_training
from servers import free_port, up

from utils import convert_model, evaluate_model
from utils.rewards.answers import extract_xml_answer, same_answer

TINY = ROOT / "models/tiny-math"
QUESTIONS, TOKENS = 100, 32
CASES = [
    ("full", "", False),
    ("lora", "Think, then answer.", False),
    ("full", "", True),
]
SETTINGS = {
    "batch_size": 4,
    "gradient_accumulation_steps": 1,
    "num_generations": 8,
    "max_new_tokens": TOKENS,
    "eval_max_new_tokens": TOKENS,
    "max_updates": 4,
    "learning_rate": 1e-5,
    "reward_funcs": ["correctness"],
}


@contextmanager
def served(*words):
    """The address of a server that is up."""
    port = free_port()
    command = [sys.executable, "-m", "mlx_lm", "server", "--port", str(port), *map(str, words)]
    with up(command, port):
        yield f"http://127.0.0.1:{port}/v1"


def right(url, rows, stop):
    """Which questions a client gets right that sends the question and nothing else."""
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)

    def ask(row):
        reply = client.chat.completions.create(
            model="default_model",
            messages=[{"role": "user", "content": row["question"]}],
            max_tokens=TOKENS,
            temperature=0.0,
            **({"stop": ["</answer>"]} if stop else {}),
        )
        text = reply.choices[0].message.content
        if stop and reply.choices[0].finish_reason == "stop" and "</answer>" not in text:
            text += "</answer>"  # a stop string is no part of a reply
        return same_answer(extract_xml_answer(text), row["answer"])

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(ask, rows))


def evaluated(folder, path):
    words = [str(folder), "--samples", str(QUESTIONS), "--output", str(path)]
    assert evaluate_model.main(words) == 0
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(("train_type", "system", "in_4_bits"), mostly_long(CASES, CASES[0]))
def test_a_client_gets_what_the_evaluator_counted(
    tmp_path, train_type, system, in_4_bits, monkeypatch, capsys
):
    rate = "lora_learning_rate" if train_type == "lora" else "learning_rate"
    settings = {name: value for name, value in SETTINGS.items() if name != "learning_rate"}
    settings[rate] = SETTINGS["learning_rate"]
    code, _ = run_training(
        TINY, TINY, tmp_path / "run", train_type=train_type, system_prompt=system, **settings
    )
    assert code == 0
    folder = tmp_path / "run/final"
    if in_4_bits:
        words = ["--hf-path", str(folder), "-q", "--output-dir", str(tmp_path / "4bit")]
        monkeypatch.setattr(sys, "argv", ["convert_model.py", *words])
        assert convert_model.main() == 0
        folder = tmp_path / "4bit"
    rows = evaluated(folder, tmp_path / "rows.jsonl")
    expected = [row["correct"] for row in rows]
    assert len(rows) == QUESTIONS
    assert 5 < sum(expected) < QUESTIONS, "or the test shows little"
    assert f"{sum(expected)}.0%" in capsys.readouterr().out
    with served("--model", folder) as url:
        for stop in (False, True):
            got = right(url, rows, stop)
            assert sum(got) == sum(expected)
            # Batches of other shapes round differently, which may turn an answer or two.
            assert sum(a != b for a, b in zip(got, expected, strict=True)) <= 2
    if train_type == "lora" and system:
        adapters = folder / "adapters"
        template = (adapters / "chat_template.jinja").read_text(encoding="utf-8")
        words = ("--adapter-path", adapters, "--chat-template", template)
        with served("--model", TINY, *words) as url:
            assert sum(right(url, rows, stop=True)) == sum(expected)


def test_without_the_prompt_it_would_score_less(tmp_path):
    """What the folder carries makes the difference: the original template asks otherwise."""
    code, _ = run_training(TINY, TINY, tmp_path / "run", system_prompt="", **SETTINGS)
    assert code == 0
    final = tmp_path / "run/final"
    rows = evaluated(final, tmp_path / "rows.jsonl")
    original = (final / "chat_template.original.jinja").read_text(encoding="utf-8")
    with served("--model", final, "--chat-template", original) as url:
        assert sum(right(url, rows, stop=True)) < 0.7 * sum(row["correct"] for row in rows)
