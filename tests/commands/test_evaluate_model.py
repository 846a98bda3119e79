"""utils/evaluate_model.py: its figures against known values, the trainer, and its own records."""

import gc
import itertools
import json
import re
import signal
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import ROOT
from helpers import make_trainer

from utils import evaluate_model
from utils.base.intervals import wilson
from utils.data import order
from utils.evaluate_model import Scores, comparison, pass_at_k, sign_test
from utils.settings import checks

TINY = ROOT / "models/tiny-math"
TOML = ROOT / "configs/tiny_math.toml"


@pytest.fixture
def evaluate(capsys, monkeypatch):
    """Type the command: (exit code, stdout, stderr)."""
    monkeypatch.chdir(ROOT)  # configs/tiny_math.toml names its model from there

    def typed(*words):
        code = evaluate_model.main([str(word) for word in words])
        return (code, *capsys.readouterr())

    return typed


def records_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("n", "right", "k", "expected"),
    [
        (10, 3, 1, 0.3),
        (4, 1, 2, 1 / 2),  # 1 - C(3,2) / C(4,2) = 1 - 3/6
        (10, 3, 5, 11 / 12),  # 1 - C(7,5) / C(10,5) = 1 - 21/252
        (16, 0, 16, 0.0),
        (16, 1, 16, 1.0),
        (5, 4, 2, 1.0),  # no two wrong ones
    ],
)
def test_pass_at_k_known_values(n, right, k, expected):
    assert pass_at_k(n, right, k) == pytest.approx(expected)


def test_pass_at_k_is_the_mean_over_all_draws():
    n = 6
    for right, k in itertools.product(range(n + 1), range(1, n + 1)):
        draws = list(itertools.combinations(range(n), k))
        expected = sum(min(draw) < right for draw in draws) / len(draws)  # 0 .. right-1 are right
        assert pass_at_k(n, right, k) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("right", "trials", "low", "high"),
    # Newcombe 1998 (Statistics in Medicine 17, 857-872), table I, method 3
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_against_published_intervals(right, trials, low, high):
    assert wilson(right / trials, trials) == pytest.approx((low, high), abs=5e-5)
    mirrored = wilson(1 - right / trials, trials)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


@pytest.mark.parametrize(
    ("better", "worse", "p"),
    [
        (0, 0, 1.0),
        (5, 5, 1.0),
        (5, 0, 0.0625),  # 2 / 2^5
        (10, 2, 158 / 4096),  # 2 * (1 + 12 + 66) / 2^12
        (2, 10, 158 / 4096),
        (1300, 0, 0.0),
    ],
)
def test_sign_test_known_values(better, worse, p):
    assert sign_test(better, worse) == pytest.approx(p)


@pytest.mark.parametrize(("given", "n", "used"), [(None, 1, 0.0), (None, 4, 0.7), (0.3, 4, 0.3)])
def test_several_samples_are_drawn_as_in_training(given, n, used):
    args, config = SimpleNamespace(temperature=given, n=n), SimpleNamespace(temperature=0.7)
    assert evaluate_model.temperature_of(args, config) == used


def test_comparison_pairs_by_question():
    """Question 3 was asked of one model only, and does not count."""
    base, other = Scores("a/b/base", {0: 1, 1: 0, 2: 0, 3: 1}), Scores("x", {0: 0, 1: 1, 2: 0})
    assert comparison(base, other) == (
        "x against b/base: better on 1, worse on 1, equal on 1 questions, p = 1.0000 "
        "(paired exact sign test)"
    )


def test_exact_match_is_the_trainers(grpo, evaluate, tmp_path):
    trainer = make_trainer(
        TINY, TINY, tmp_path / "out", reward=None, eval_samples=60, eval_max_new_tokens=32
    )
    expected = trainer.evaluate_em(trainer.eval_dataset, 60)
    output = tmp_path / "completions.jsonl"
    words = (TINY, "--config", TOML, "--samples", 60, "--batch-size", 7)
    code, out, err = evaluate(*words, "--output", output)
    records = records_of(output)
    assert code == 0
    assert sum(r["correct"] for r in records) / 60 == pytest.approx(expected)
    rows = order.subset(trainer.eval_dataset, 60)
    completions = trainer.answers(rows)
    assert [r["question"] for r in records] == [row["question"] for row in rows]
    assert [r["completion"] for r in records] == [c.text for c in completions]
    assert f"exact match           {expected:.1%} [" in out
    assert "60 questions, greedy, at most 32 tokens" in out
    assert f"60 completions in {output}" in err


def test_records_say_what_the_trainers_functions_say(grpo, evaluate, tmp_path):
    output = tmp_path / "completions.jsonl"
    words = (TINY, "--config", TOML, "--samples", 12, "--k", "1,2,4", "--output", output)
    code, out, _ = evaluate(*words)
    records = records_of(output)
    assert code == 0
    assert len(records) == 48
    assert [r["sample"] for r in records] == [0, 1, 2, 3] * 12
    for record in records:
        extracted = grpo.extract_xml_answer(record["completion"])
        assert record["extracted_answer"] == extracted
        assert record["correct"] == grpo.same_answer(extracted, record["answer"])
        completion = [[{"content": record["completion"]}]]
        expected = {
            "correctness": grpo.correctness_reward_func(completion, [record["answer"]])[0],
            "xmlcount": grpo.xmlcount_reward_func(completion)[0],
            "soft_format": grpo.soft_format_reward_func(completion)[0],
            "int": grpo.int_reward_func(completion)[0],
        }
        assert record["rewards"] == expected
    right = [sum(r["correct"] for r in records[i : i + 4]) for i in range(0, 48, 4)]
    for k in (1, 2, 4):
        value = sum(pass_at_k(4, c, k) for c in right) / 12
        line = next(line for line in out.splitlines() if line.startswith(f"pass@{k}"))
        assert f" {value:.1%} [" in line
    assert "4 samples at temperature 1" in out
    assert len({r["completion"] for r in records[:4]}) > 1


def test_samples_do_not_depend_on_the_batch_size(evaluate, tmp_path):
    words = (TINY, "--config", TOML, "--samples", 6, "--k", "3")
    for size in (1, 5, 64):
        evaluate(*words, "--batch-size", size, "--output", tmp_path / f"{size}.jsonl")
    assert len(records_of(tmp_path / "1.jsonl")) == 18
    first = [r["completion"] for r in records_of(tmp_path / "1.jsonl")]
    for size in (5, 64):
        assert [r["completion"] for r in records_of(tmp_path / f"{size}.jsonl")] == first
    assert any(len({*first[n : n + 3]}) > 1 for n in range(0, 18, 3)), "samples of one question"


def test_side_by_side(evaluate, model_dir, tmp_path):
    output = tmp_path / "completions.jsonl"
    words = (TINY, model_dir, "--config", TOML, "--samples", 30, "--output", output)
    code, out, _ = evaluate(*words)
    base, other = (
        {r["index"]: r["correct"] for r in records_of(output) if r["model"] == str(name)}
        for name in (TINY, model_dir)
    )
    assert code == 0
    assert base.keys() == other.keys() == set(range(30))
    worse = sum(base[i] > other[i] for i in base)
    assert f"better on 0, worse on {worse}, equal on {30 - worse} questions" in out
    heads = next(line for line in out.splitlines() if "models/tiny-math  " in line).split()
    assert heads == ["models/tiny-math", "/".join(model_dir.parts[-2:])]
    assert "raise --max-tokens" in out  # the random model never ends


def test_a_given_file_is_evaluated_whole_a_run_keeps_its_split(evaluate, tmp_path, data_dir):
    file = data_dir / "train.jsonl"
    words = (TINY, "--config", TOML, "--max-tokens", 2)
    assert "24 questions" in evaluate(*words, "--data", file)[1]
    assert "2 questions" in evaluate(*words, "--set", f"dataset={file}")[1]
    assert "24 questions" in evaluate(*words, "--data", data_dir, "--split", "train")[1]


def test_too_long_prompts_are_left_out_and_counted(evaluate, data_dir, tmp_path):
    output = tmp_path / "completions.jsonl"
    words = (TINY, "--config", TOML, "--data", data_dir, "--max-tokens", 2, "--output", output)
    code, out, _ = evaluate(*words, "--set", "max_prompt_length=23")  # they have 16, 20 or 24
    assert code == 0
    assert "3 evaluation prompts over 23 tokens left out" in out
    assert "\nquestions             7\n" in out
    assert [r["index"] for r in records_of(output)] == [0, 1, 3, 4, 6, 7, 9]  # as in the file


def test_another_seed_draws_other_samples(evaluate, tmp_path):
    words = (TINY, "--config", TOML, "--samples", 6, "--k", "2")
    drawn = []
    for number, seed in enumerate((1, 1, 2)):
        evaluate(*words, "--seed", seed, "--output", tmp_path / f"{number}.jsonl")
        drawn.append([r["completion"] for r in records_of(tmp_path / f"{number}.jsonl")])
    assert drawn[0] == drawn[1] != drawn[2]


def test_gsm8k_means_the_hub_data_set_whatever_the_run_had():
    args = evaluate_model.build_parser().parse_args(
        ["m", "--data", "gsm8k", "--set", "dataset_config=x", "--set", "question_column=q"]
    )
    config, _ = evaluate_model.resolve(args)
    assert (config.dataset, config.dataset_config) == ("openai/gsm8k", "main")
    assert (config.question_column, config.answer_column) == ("question", "answer")


def test_so_many_tokens_follow_the_prefix():
    """Also where that is more than the run's max_completion_length."""
    words = ["m", "--max-tokens", "5000", "--set", "temperature=0.5"]
    config, _ = evaluate_model.resolve(evaluate_model.build_parser().parse_args(words))
    assert config.explicit == {"temperature"}, "what the command adds nobody set on purpose"
    assert config.reasoning_prefix
    prefix = len(config.reasoning_prefix)  # a character a token, at most
    assert checks.room_for_sampling(config, prefix) >= config.eval_max_new_tokens == 5000


def sometimes(completions, **_):
    return [None] * len(completions)


def nothing_but_nan(completions, **_):
    return [float("nan")] * len(completions)


def test_a_reward_that_does_not_apply(evaluate, tmp_path):
    output = tmp_path / "completions.jsonl"
    own = 'reward_funcs=["correctness", "test_evaluate_model:sometimes"]'
    words = (TINY, "--config", TOML, "--samples", 2, "--set", own, "--output", output)
    code, out, _ = evaluate(*words)
    assert code == 0
    assert "reward test_evaluate_model:sometimes  -\n" in out
    assert [r["rewards"]["test_evaluate_model:sometimes"] for r in records_of(output)] == [None] * 2


def test_a_metric_of_the_settings_says_what_is_right(evaluate, tmp_path):
    output = tmp_path / "completions.jsonl"
    metric = ("--set", "eval_metric=last_number", "--set", 'reward_funcs=["last_number"]')
    code, out, _ = evaluate(TINY, "--config", TOML, "--samples", 8, *metric, "--output", output)
    assert code == 0
    records = records_of(output)
    assert [r["correct"] for r in records] == [r["rewards"]["last_number"] == 1 for r in records]
    assert any(r["correct"] and r["extracted_answer"] != r["answer"] for r in records)
    share = sum(r["correct"] for r in records) / 8
    assert re.search(rf"^last_number +{share:.1%} \[", out, re.M)
    assert "exact match" not in out


@pytest.mark.parametrize(("limit", "joined"), [("0", True), ("0.005", False)])
def test_layers_are_joined_where_there_is_room_and_take_none_that_stays(
    evaluate, monkeypatch, limit, joined
):
    found, make = [], evaluate_model.Asker.__init__

    def spied(asker, *rest):
        make(asker, *rest)
        gc.collect()
        layers = [layer.self_attn.q_proj for layer in asker.loaded.model.layers]
        found.append(({type(layer) for layer in layers}, mx.get_active_memory()))

    monkeypatch.setattr(evaluate_model.Asker, "__init__", spied)
    gc.collect()
    before = mx.get_active_memory()
    words = ("--config", TOML, "--samples", 2, "--set", f"memory_limit_gb={limit}")
    assert evaluate(TINY, *words)[0] == 0
    ((kinds, after),) = found
    assert kinds == {partial if joined else nn.Linear}
    assert after - before < 1.1 * (TINY / "model.safetensors").stat().st_size


def test_a_reward_that_fails_is_named_and_exit_1(evaluate, tmp_path):
    output = tmp_path / "completions.jsonl"
    own = 'reward_funcs=["test_evaluate_model:nothing_but_nan"]'
    words = (TINY, "--config", TOML, "--samples", 2, "--set", own, "--output", output)
    code, _, err = evaluate(*words)
    assert code == 1
    assert "error: reward test_evaluate_model:nothing_but_nan returned nan" in err


BAD = [
    (["nope"], "model 'nope' is neither a folder nor a hub name"),
    (["TINY", "TINY"], "is named twice"),
    (["TINY", "--k", "4", "--n", "2"], "--k 4 needs at least as many samples"),
    (["TINY", "--k", "4", "--temperature", "0"], "would draw the same sample 4 times"),
    (["TINY", "--samples", "601"], "holds only 600 questions"),
    (["TINY", "--data", "nope.jsonl"], "dataset nope.jsonl does not exist"),
    (["TINY", "--data", "README.md"], "expected one of .jsonl"),
    (["TINY", "--output", "README.md"], "README.md exists already"),
    (["TINY", "--output", "no/where"], "no folder that can be written to"),
    (["TINY", "--set", "loss=1"], "did you mean 'loss_type'"),
    (["TINY", "--set", "question_column=q"], "has no column 'q'"),
    (["TINY", "--set", "reward_funcs=corectness"], "did you mean 'correctness'"),
    (["TINY", "--set", "max_prompt_length=3"], "longer than max_prompt_length = 3"),
    (["TINY", "utils"], "utils is a folder without config.json"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=lambda x: str(x))
def test_bad_input_is_one_line_and_exit_2(evaluate, words, message):
    words = [str(TINY) if word == "TINY" else word for word in words]
    code, _, err = evaluate(*words, "--config", TOML)
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")


@pytest.mark.parametrize("k", ["0", "1,a", "", "2,-1"])
def test_ks_out_of_range(capsys, k):
    with pytest.raises(SystemExit) as ended:
        evaluate_model.main(["m", f"--k={k}"])
    assert ended.value.code == 2
    assert "must be whole numbers from 1 up" in capsys.readouterr().err


def test_ctrl_c_keeps_what_was_asked(tmp_path):
    output = tmp_path / "completions.jsonl"
    script = str(ROOT / "utils/evaluate_model.py")
    words = [TINY, "--config", TOML, "--k", "64", "--output", output]
    process = subprocess.Popen(
        [sys.executable, script, *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not (output.exists() and output.stat().st_size):
        time.sleep(0.05)
    for _ in range(4):  # as a person would: C code that clears errors may lose one, once in a while
        process.send_signal(signal.SIGINT)
        try:
            _, err = process.communicate(timeout=8)
            break
        except subprocess.TimeoutExpired:
            continue
    else:
        process.kill()
    assert process.returncode == 130
    assert err.endswith(f"completions in {output}\n\nstopped\n")
    assert all("completion" in record for record in records_of(output))


def test_a_question_in_a_conversation_is_saved_with_it():
    asked = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
    assert evaluate_model.with_conversation({"index": 0}, asked) == {"index": 0}
    more = [*asked, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert evaluate_model.with_conversation({"index": 0}, more) == {"index": 0, "prompt": more}
