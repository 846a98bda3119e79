"""What a run says of itself before it begins: how many positions its model is asked for."""

import json
import re

import mlx.nn as nn
import pytest
from conftest import ROOT, make_model
from helpers import assert_names, digest, make_trainer, mostly_long

from utils import evaluate_model
from utils.gradient import packing
from utils.run import introduction

POSITIONS = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_ctx": 40, "n_positions": 40}


POSITIONS |= {"layer_norm_epsilon": 1e-5, "model_type": "gpt2"}


def test_more_tokens_than_the_model_was_made_for(typed, refused, tmp_path):
    """Rotary positions go on, which is said; a table of positions ends, which nobody checks."""
    rotary = make_model(tmp_path / "rotary", max_position_embeddings=40)
    code, out, err, _ = typed(model_name=str(rotary), max_updates=1)
    said = re.search(rf"^context   (\d+) tokens are more than the 40 that {rotary} was", out, re.M)
    assert (code, err) == (0, "")
    assert int(said[1]) > 40
    again = ("--set", "overwrite=true")
    code, out, *_ = typed(*again, model_name=str(rotary), max_updates=1, max_new_tokens=2)
    assert (code, "context" in out) == (0, False)
    table = make_model(tmp_path / "table", **POSITIONS)
    message = refused(*again, model_name=str(table), max_updates=1)
    assert_names(
        message, f"{table} has 40 positions", f"take {int(said[1]) - 1}", "fewer new tokens"
    )


@pytest.fixture
def positions_read(monkeypatch):
    """Those that a model with a table of them looks up."""
    seen, look_up = [], nn.Embedding.__call__

    def call(table, ids):
        seen.extend(ids.reshape(-1).tolist() if len(table.weight) != 384 else [])
        return look_up(table, ids)

    monkeypatch.setattr(nn.Embedding, "__call__", call)
    return seen


@pytest.mark.parametrize("what", ["sampling", "evaluation", "training", "padded training"])
@pytest.mark.parametrize("new", mostly_long([30, 33], 33))
def test_which_positions_are_read(data_dir, tmp_path, positions_read, what, new):
    """Not that of the last token, but those of padding, whether prompts are shared or not."""
    settings = {"max_new_tokens": new, "eval_max_new_tokens": 2, "stop_strings": []}
    if what == "evaluation":
        settings |= {"max_new_tokens": 2, "eval_max_new_tokens": new, "eval_samples": 10}
    folder = make_model(tmp_path / "table", **POSITIONS | {"n_positions": 512})
    trainer = make_trainer(folder, data_dir, tmp_path / "o", digest, **settings)
    rows = sorted(range(24), key=lambda i: len(trainer.train_dataset[i]["prompt_ids"]))[-3:]
    trainer.scorer.shapes = packing.Shapes(bucketed="padded" in what)
    if what == "sampling":
        trainer.generate_responses(rows)
    elif what == "evaluation":
        trainer.evaluate()
    else:
        trainer.train_step(rows)
        trainer.scorer.shares = False
        trainer.train_step(rows)
    tokens, read = introduction.longest_sequence(trainer)
    assert max(positions_read) == read - 1
    assert read >= tokens if "padded" in what else read == tokens - 1


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_table_of_positions_is_used_to_its_end(
    typed, data_dir, tmp_path, capsys, positions_read, command
):
    def answer(size):
        folder = make_model(tmp_path / str(size), **POSITIONS | {"n_positions": size})
        if command == "train":
            again = ("--set", "overwrite=true")
            code, _, err, _ = typed(*again, model_name=str(folder), max_updates=1)
            return code, err
        words = [str(folder), "--data", str(data_dir), "--max-tokens", "9", "--set"]
        code = evaluate_model.main([*words, 'chat_template="plain"'])
        return code, capsys.readouterr().err

    code, message = answer(40)
    assert code == 2
    needed = int(re.search(r"40 positions, .* may take (\d+): set shorter", message)[1])
    assert answer(needed)[0] == 0
    assert command == "train" or max(positions_read) == needed - 1  # not all rows are trained
    code, message = answer(needed - 1)
    assert (code, f"take {needed}:" in message) == (2, True)


def test_the_forms_of_the_answers_are_said_in_one_line(typed, data_dir, tmp_path):
    code, out, _, _ = typed(max_updates=1)
    (line,) = re.findall(r"^          answers: (.*)\n(?!          )", out, re.M)
    rows = sum(1 for _ in (data_dir / "train.jsonl").open())
    assert (code, line) == (0, f"{rows} numbers")


def test_answers_that_no_reward_of_the_run_reads_are_said(typed, tmp_path):
    answers = ["7", "1/2", "12%", r"\sqrt{2}", r"x^2 + 1", "blue", "5 cm"]
    path = tmp_path / "mixed.jsonl"
    rows = [{"question": f"How many {i}?", "answer": answer} for i, answer in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 3))
    settings = {"dataset": str(path), "eval_samples": 0, "max_updates": 1}
    code, out, *_ = typed(**settings)
    assert code == 0
    assert "          answers: 3 numbers, 3 fractions, 3 percentages, 6 formulas, 6 texts\n" in out
    said = r"          correctness compares 9 answers only to the letter ('\\sqrt{2}'): add math to"
    assert said in out
    code, out, *_ = typed(**settings, reward_funcs=["math"], overwrite=True)
    assert code == 0
    assert "letter" not in out
    assert "math can't read" not in out


def test_shipped_presets_start_without_a_warning_of_their_own_making(grpo, tmp_path, capsys):
    more = ["--set", f"output_dir={tmp_path / 'out'}", "--set", "max_updates=1"]
    assert grpo.main(["--config", str(ROOT / "configs/smoke_test.toml"), *more]) == 0
    before = capsys.readouterr().out.partition("eval ")[0]
    assert [line for line in before.splitlines() if "cost speed" in line or "warning" in line] == []


def test_a_typed_learning_rate_of_adapters_has_a_line_of_its_own(typed):
    lora = {"train_type": "lora", "max_updates": 1}
    _, out, *_ = typed("--set", "learning_rate=5e-7", **lora)
    line = "learning_rate has no effect on adapters; lora_learning_rate = 2e-5 counts"
    assert f"settings  {line}\n" in out
