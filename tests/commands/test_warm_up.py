"""utils/pretrain.py --prompt-from: from rows to a model or adapters that GRPO starts from."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import load_script
from helpers import (
    flat,
    kill_pretraining,
    make_config,
    run_training,
    stop_pretraining,
    tree,
    write_toml,
)

from utils import pretrain
from utils.model import served_prompt

# isort: split
import mlx.core as mx
import mlx_lm

QUESTION = "How many apples are {n} + 2?"
SAID = "{n} + 2 = {sum}\n</reasoning>\n<answer>\n{sum}\n</answer>"


@pytest.fixture
def work(tmp_path, model_dir):
    """A folder with the trainer's data, grpo.toml and rows.jsonl."""
    data = [{"question": QUESTION.format(n=n), "answer": str(n + 2)} for n in range(20)]
    lines = [json.dumps(row) + "\n" for row in data]
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.jsonl").write_text("".join(lines[:16]))
    (tmp_path / "data/test.jsonl").write_text("".join(lines[16:]))
    rows = [{**row, "answer": SAID.format(n=n, sum=n + 2)} for n, row in enumerate(data[:16])]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    preset(tmp_path, model_dir)
    return tmp_path


def preset(work, model, **settings):
    values = {"model_name": str(model), "dataset": str(work / "data"), "max_new_tokens": 48}
    values |= {"system_prompt": "Think.", "eval_samples": 4, "max_prompt_length": 64}
    path = write_toml(work, values | settings)
    Path(path).rename(work / "grpo.toml")


def command(work, *more, out="warm", **flags):
    given = {"prompt-from": work / "grpo.toml", "data": work / "rows.jsonl"}
    given |= {"out-dir": work / out, "num-epochs": 2, "global-batch-size": 4, "lr": 1e-2}
    given |= {name.replace("_", "-"): value for name, value in flags.items()}
    return [str(word) for name, value in given.items() for word in (f"--{name}", value)] + [*more]


def weights_of(folder, name="model"):
    return dict(mx.load(str(folder / f"{name}.safetensors")))


def same(left, right):
    return left.keys() == right.keys() and all(mx.array_equal(left[k], right[k]) for k in left)


def test_a_warm_start_learns_and_its_folder_asks_as_grpo_will(work, model_dir, capsys):
    assert pretrain.main(command(work, num_epochs=8)) == 0
    rows = (work / "warm/metrics.csv").read_text().splitlines()
    losses = [float(row.split(",")[2]) for row in rows[1:]]
    assert losses[-1] < losses[0] / 2
    assert "16 rows of" in capsys.readouterr().out
    final = work / "warm/final"
    settings = served_prompt.settings_in(final)
    assert settings["system_prompt"] == "Think."
    assert settings["dataset"] == str(work / "data"), "on which it is to be evaluated"
    _, tokenizer = mlx_lm.load(str(final))
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Why?"}], add_generation_prompt=True, tokenize=False
    )
    assert "Think." in asked
    assert asked.endswith("<reasoning>\n")
    assert json.loads((final / "generation_config.json").read_text())["stop_strings"] == [
        "</answer>"
    ]
    assert not same(weights_of(final), weights_of(model_dir))
    assert (final / "pretrain.json").is_file()


def test_grpo_goes_on_from_the_model(work):
    assert pretrain.main(command(work)) == 0
    code, trainer = run_training(
        work / "warm/final", work / "data", work / "grpo", max_updates=1, system_prompt="Think."
    )
    assert code == 0
    assert trainer.train_dataset[0]["prompt"][0]["content"] == "Think."


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_on_a_4_bit_base_are_what_grpo_starts_from(work, quantized_dir, kind, capsys):
    preset(work, quantized_dir, train_type=kind, lora_rank=4)
    assert pretrain.main(command(work)) == 0
    final = work / "warm/final"
    adapters = weights_of(final / "adapters", "adapters")
    assert any("lora_b" in name and mx.abs(w).max().item() > 1e-3 for name, w in adapters.items())
    recorded = json.loads((final / "adapters/adapter_config.json").read_text())
    assert recorded["fine_tune_type"] == kind
    assert recorded["lora_parameters"]["rank"] == 4
    assert recorded["model"] == str(quantized_dir)
    model, _ = mlx_lm.load(str(quantized_dir), adapter_path=str(final / "adapters"))
    fused, _ = mlx_lm.load(str(final))
    ids = mx.array([[3, 9, 27, 81]])
    assert mx.allclose(model(ids), fused(ids), atol=2e-2)
    started = {"adapter_path": str(final / "adapters"), "max_updates": 1, "train_type": kind}
    begun = {}

    def look(trainer):
        begun.update(flat(trainer.model.trainable_parameters()))

    code, _ = run_training(quantized_dir, work / "data", work / "grpo", look, **started)
    assert code == 0
    assert same(begun, adapters), "GRPO starts where the warm start ended"


def test_adapters_are_refused_on_another_base(work, quantized_dir, model_dir, grpo, capsys):
    preset(work, quantized_dir)
    assert pretrain.main(command(work)) == 0, "train_type = auto is lora on a quantized base"
    adapters = work / "warm/final/adapters"
    config = make_config(model_dir, work / "data", work / "x", adapter_path=str(adapters))
    with pytest.raises(pretrain.UserError, match="was trained on another base") as caught:
        grpo.load_model(config)
    for part in (str(quantized_dir), str(model_dir), "base_sha256", "take that base"):
        assert part in str(caught.value)
    assert pretrain.main(command(work, out="y", adapter_path=adapters, lora_rank=16)) == 0
    preset(work, model_dir)
    for more in ((), ("--dry-run",)):
        assert pretrain.main(command(work, *more, out="z", adapter_path=adapters)) == 2
        assert "was trained on another base" in capsys.readouterr().err


def test_adapters_without_a_preset(work, quantized_dir):
    (work / "text").mkdir()
    (work / "text/a.txt").write_text("How many apples? " * 300)
    given = ["--train-type", "lora", "--initial-checkpoint-dir", str(quantized_dir)]
    given += ["--train-data-path", str(work / "text"), "--out-dir", str(work / "out")]
    given += ["--max-updates", "2", "--global-batch-size", "2", "--micro-batch-size", "2"]
    given += ["--max-seq-length", "32", "--precision", "32-true", "--compile", "false"]
    assert pretrain.main(given) == 0
    assert weights_of(work / "out/final/adapters", "adapters")
    assert not (work / "out/final/grpo_prompt.json").exists()


# Settings


def resolved(work, *more, **flags):
    given = command(work, *more, **flags)
    _, overrides = pretrain.parse(given, pretrain.PretrainConfig)
    return pretrain.filled(pretrain.resolve(pretrain.config_file(given), overrides))


def test_what_is_left_open_is_as_in_the_preset(work, model_dir, quantized_dir):
    preset(work, model_dir, train_type="lora", lora_rank=4, lora_dropout=0.5)
    config = resolved(work)
    assert pretrain.config_file(command(work)) == pretrain.WARM_UP
    assert config.initial_checkpoint_dir == str(model_dir)
    assert (config.train_type, config.lora_rank, config.lora_dropout) == ("lora", 4, 0.5)
    assert config.max_seq_length == 64 + 48
    assert config.precision == ("32-true" if mx.default_device() == mx.cpu else "bf16-mixed")
    own = resolved(
        work, lora_rank=8, train_type="dora", model_name=quantized_dir, max_seq_length=99
    )
    assert (own.train_type, own.lora_rank, own.max_seq_length) == ("dora", 8, 99)
    assert own.initial_checkpoint_dir == str(quantized_dir)


def test_length_by_epochs_updates_and_warm_up(work):
    config = resolved(work, num_epochs=3, global_batch_size=5, lr=1.0)
    trainer = pretrain.Trainer(config, pretrain.prepare(config, smoke_test=False))
    assert trainer.steps == 10  # of 48 rows
    assert pretrain.learning_rate(1, 10, config) == 1.0  # warmup_ratio = 0.1
    slow = pretrain.replaced(config, warmup_ratio=0.5)
    assert [pretrain.learning_rate(n, 10, slow) for n in (1, 5)] == pytest.approx([0.2, 1.0])
    assert pretrain.update_count(pretrain.replaced(config, max_updates=4), trainer.rows) == 4
    assert pretrain.update_count(pretrain.replaced(config, max_updates=40), trainer.rows) == 10


def test_dry_run_says_what_it_takes_and_writes_nothing(work, quantized_dir, capsys):
    preset(work, quantized_dir)
    before = tree(work)
    assert pretrain.main(command(work, "--dry-run")) == 0
    out = capsys.readouterr().out
    assert tree(work) == before
    assert "train_type resolves to lora" in out
    assert "updates: 8 of 4 rows on 16 rows of 96 tokens: 3,072 tokens with padding" in out
    assert "micro_batch_size = 4" in out
    assert "fits: " in out
    assert pretrain.main(command(work, max_updates=1)) == 0
    assert "plan: micro_batch_size = 4" in capsys.readouterr().out


def test_dry_run_of_a_fresh_model_writes_no_tokenizer(work, capsys):
    (work / "text").mkdir()
    (work / "text/a.txt").write_text("How many apples? " * 300)
    before = tree(work)
    given = ["--dry-run", "--train-data-path", str(work / "text"), "--out-dir", str(work / "o")]
    given += ["--tokenizer-dir", str(work / "none")]
    assert pretrain.main(given) == 0
    assert tree(work) == before
    assert "DOES NOT FIT" in (out := capsys.readouterr().out) or "fits: " in out
    assert "549,146,880 parameters" in out


@pytest.mark.parametrize(("kind", "rate"), [("full", 1e-5), ("lora", 1e-4)])
def test_adapters_have_a_rate_of_their_own(work, model_dir, kind, rate):
    preset(work, model_dir, train_type=kind)
    given = command(work, max_updates=1)
    place = given.index("--lr")
    assert pretrain.main([*given[:place], *given[place + 2 :]]) == 0
    log = (work / "warm/metrics.csv").read_text().splitlines()
    assert float(log[1].split(",")[log[0].split(",").index("lr")]) == pytest.approx(rate)


# Resume


@pytest.mark.parametrize("kind", ["full", "lora", "dropout"])
def test_a_stopped_warm_start_goes_on_to_the_same_weights(work, model_dir, kind, monkeypatch):
    adapters = {} if kind == "full" else {"train_type": "lora", "lora_rank": 4}
    adapters |= {"lora_dropout": 0.3} if kind == "dropout" else {}
    preset(work, model_dir, **adapters)
    name = "model" if kind == "full" else "adapters"
    assert pretrain.main(command(work, save_interval=3, out="whole")) == 0
    with monkeypatch.context() as patch:
        stop_pretraining(patch, 5)
        assert pretrain.main(command(work, save_interval=3, out="parts")) == 130
    assert (work / f"parts/checkpoint-3/{name}.safetensors").is_file()
    assert pretrain.main(command(work, save_interval=3, out="parts")) == 0
    where = "final" if kind == "full" else "final/adapters"
    parts, whole = (weights_of(work / run / where, name) for run in ("parts", "whole"))
    assert same(parts, whole)


@pytest.mark.long
def test_a_killed_warm_start_goes_on_to_the_same_weights(work, quantized_dir):
    preset(work, quantized_dir)
    more = {"save_interval": 5, "num_epochs": 16}
    assert pretrain.main(command(work, **more)) == 0
    killed = command(work, **more, out="killed")
    kill_pretraining(killed, work / "killed/checkpoint-5")
    assert not (work / "killed/final").exists()
    assert pretrain.main(killed) == 0
    runs = (work / run / "final/adapters" for run in ("warm", "killed"))
    assert same(*(weights_of(folder, "adapters") for folder in runs))


def test_a_changed_base_is_refused_when_adapters_go_on(work, quantized_dir, tmp_path, capsys):
    base = tmp_path / "base"
    base.mkdir()
    for file in Path(quantized_dir).iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    preset(work, base)
    assert pretrain.main(command(work, save_interval=2)) == 0
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert pretrain.main(command(work, save_interval=2)) == 2
    assert "the base of its adapters has changed" in capsys.readouterr().err


def test_one_run_per_folder(work, capsys):
    assert pretrain.main(command(work, max_updates=1)) == 0
    lock = work / "warm/.lock"
    code = f"import fcntl,sys; f = open({str(lock)!r}, 'a+'); fcntl.lockf(f, fcntl.LOCK_EX); "
    code += "print('held', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as other:
        assert other.stdout.readline() == "held\n"
        assert pretrain.main(command(work, "--overwrite")) == 2
        other.stdin.close()
    assert "is in use by another process" in capsys.readouterr().err
    assert pretrain.main(command(work, "--overwrite", max_updates=1)) == 0
    assert not lock.exists()


# Answers of the model itself


def test_right_answers_of_evaluate_model_are_rows(work, model_dir, monkeypatch, capsys):
    """One command collects them, the next one learns the right ones; those of test questions
    are refused."""
    from utils import evaluate_model

    script = load_script()
    right = f"<reasoning>\n{SAID.format(n=0, sum=2)}"

    def always_right(completions, **_):
        return [1.0] * len(completions)

    monkeypatch.setitem(script.REWARDS, "correctness", always_right)
    config = ["--config", str(work / "grpo.toml"), "--set", "eval_metric=correctness"]
    config += ["--set", "stop_strings=[]", "--max-tokens", "4"]
    for split in ("train", "test"):
        out = work / f"{split}.jsonl"
        given = [str(model_dir), *config, "--split", split, "--n", "2", "--output", str(out)]
        assert evaluate_model.main(given) == 0
        records = [json.loads(line) for line in out.read_text().splitlines()]
        assert {record["split"] for record in records} == {split}
        assert all(record["correct"] for record in records)
        for record in records:  # an untrained model says nothing right, and comes to no end
            record |= {"completion": right, "finish_reason": "stop"}
        out.write_text("".join(json.dumps(record) + "\n" for record in records))
    capsys.readouterr()
    assert pretrain.main(command(work, data=work / "train.jsonl", max_updates=1)) == 0
    out = capsys.readouterr().out
    assert "32 of 32 answers right" in out
    assert "16 of 32 rows repeat others: left out" in out
    assert "16 rows of" in out
    assert pretrain.main(command(work, "--overwrite", data=work / "test.jsonl")) == 2
    assert "must not be trained on" in capsys.readouterr().err


# Bad input

ROW = json.dumps({"question": "Why?", "answer": SAID.format(n=1, sum=3)})


@pytest.mark.parametrize(
    ("flags", "line", "complaint"),
    [
        ({"prompt_from": "nowhere.toml"}, ROW, "prompt_from = 'nowhere.toml': config file nowhere"),
        ({"data": "nowhere.jsonl"}, ROW, "train_data_path = 'nowhere.jsonl': dataset nowhere.json"),
        (
            {"train_type": "qlora"},
            ROW,
            "train_type = 'qlora': must be one of auto, full, lora",
        ),
        ({"model_name": "nowhere/at/all"}, ROW, "model_name = 'nowhere/at/all' is neither a fold"),
        ({"max_seq_length": 8}, ROW, "every row is longer than max_seq_length = 8 tokens"),
        ({"max_seq_length": 4096}, ROW, "max_seq_length = 4096: more than the model's block_size"),
        ({"lora_rank": 4}, ROW, "lora_rank has no effect with train_type = full: leave it out"),
        (
            {"adapter_path": "x", "train_type": "full"},
            ROW,
            "adapter_path has no effect with train_type = full",
        ),
        ({"lora_learning_rate": 1e-3}, ROW, "lora_lr has no effect with train_type = full"),
        ({"adapter_path": "x"}, ROW, "x/adapter_config.json cannot be read: No such file"),
        (
            {"train_type": "lora", "lora_dropout": 0.5, "gradient_checkpointing": "true"},
            ROW,
            "a layer computed again would draw another mask",
        ),
        ({"lora_layers": 0}, ROW, "lora_layers = 0: must be -1 (all) or at least 1"),
        ({"warmup_ratio": 1}, ROW, "warmup_ratio = 1.0: must be below 1"),
        ({"num_epochs": -1}, ROW, "num_epochs = -1: must be 0 or more"),
        ({"micro_batch_size": 3}, ROW, "must be a multiple of micro_batch_size = 3"),
        ({}, "{", "line 1, column 2: not JSON"),
        ({}, "", "holds no rows"),
        ({}, '{"text": "a"}', "row 1: has text, but needs question and answer (question_column"),
        ({}, '{"question": "a", "answer": "b"}', "has none of stop_strings"),
        ({}, '{"question": "a", "answer": ""}', "row 1: nothing as completion"),
        ({}, json.dumps({"question": "1" * 99, "answer": SAID}), "longer than max_prompt_length"),
        (
            {},
            json.dumps({"question": QUESTION.format(n=17), "answer": SAID}),
            "the question is one of the test split",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("dry", [False, True])
def test_bad_input_ends_with_exit_code_2_and_writes_nothing(
    work, flags, line, complaint, dry, capsys
):
    (work / "rows.jsonl").write_text(line)
    assert pretrain.main(command(work, *(["--dry-run"] if dry else []), **flags)) == 2
    assert complaint in capsys.readouterr().err
    assert not (work / "warm").exists()


def test_without_a_chat_template_the_error_says_what_to_set(work, model_dir, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in Path(model_dir).iterdir():
        (bare / file.name).write_bytes(file.read_bytes())
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    preset(work, bare)
    assert pretrain.main(command(work)) == 2
    assert (
        'set chat_template to a Jinja file, or chat_template = "plain"' in capsys.readouterr().err
    )
    preset(work, bare, chat_template="plain")
    assert pretrain.main(command(work, max_updates=1)) == 0


def test_full_training_of_packed_weights_is_refused(work, quantized_dir, capsys):
    preset(work, quantized_dir, train_type="full")
    for more in ((), ("--dry-run",)):
        assert pretrain.main(command(work, *more)) == 2
        assert "Use train_type = lora" in capsys.readouterr().err


def test_a_smoke_test_is_none_of_a_warm_start(work, capsys):
    assert pretrain.main(command(work, "--smoke-test")) == 2
    assert "--smoke-test: not for a warm start" in capsys.readouterr().err
