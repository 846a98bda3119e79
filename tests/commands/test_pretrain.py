"""utils/pretrain.py: accumulation, exact resume, flags, smoke test, refusals."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, make_tokenizer
from helpers import kill_pretraining, stop_pretraining

from utils import pretrain
from utils.model import embeddings
from utils.pretraining import data as pretrain_data
from utils.settings import reading

# isort: split
import mlx.core as mx
import mlx_lm
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import activations

PRESET = ROOT / "configs/pretrain/moe_200m.toml"
TEXT = "How many apples? <answer> 1 + 2 = 3 </answer> {} apples, how many?\n"
CONFIG = """
precision = "32-true"
compile = false
[train]
global_batch_size = 4
micro_batch_size = 2
max_tokens = 640
max_seq_length = 16
save_interval = 0
[optimizer.init_args]
lr = 1e-2
[model]
mlp_class_name = "LLaMAMLP"
n_embd = 32
n_layer = 2
n_head = 2
n_query_groups = 1
intermediate_size = 64
padded_vocab_size = 384
block_size = 64
"""


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with tokenizer/, text/ (train), val/, pairs.jsonl and tiny.toml."""
    # Models that earlier tests loaded may have put another in place (utils/device/x86), which a
    # process that only pretrains has not.
    for name in [name for name in sys.modules if name.startswith("mlx_lm.models.")]:
        if hasattr(sys.modules[name], "swiglu"):
            monkeypatch.setattr(sys.modules[name], "swiglu", activations.swiglu)
    for name in ("tokenizer", "text", "val"):
        (tmp_path / name).mkdir()
    make_tokenizer(tmp_path / "tokenizer")
    for index in range(4):
        (tmp_path / "text" / f"{index}.txt").write_text(TEXT.format(index) * 20)
    (tmp_path / "val" / "0.txt").write_text(TEXT.format(9) * 10)
    pairs = [{"prompt": "How many?" * n, "completion": f"{n} apples" * n} for n in range(1, 5)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (tmp_path / "tiny.toml").write_text(CONFIG)
    return tmp_path


def flags(work, *more):
    paths = {"out-dir": "out", "tokenizer-dir": "tokenizer", "train-data-path": "text"}
    paths["val-data-path"] = "val"
    named = [part for key, name in paths.items() for part in (f"--{key}", str(work / name))]
    return ["--config", str(work / "tiny.toml"), *named, *map(str, more)]


def jsonl(work, *more):
    data = ("--data-class-path", "litgpt.data.JSON", "--train-data-path", work / "pairs.jsonl")
    return flags(work, *data, "--max-seq-length", 64, *more)


def trainer_of(arguments):
    _, overrides = pretrain.parse(arguments, pretrain.PretrainConfig)
    config = pretrain.resolve(Path(arguments[1]), overrides)
    return pretrain.Trainer(config, pretrain.prepare(config, smoke_test=False))


def weights_of(folder):
    return dict(mx.load(str(folder / "model.safetensors")))


def updates_of(log):
    """What two equal runs log: the rest depends on the clock."""
    return [row.split(",")[:5] for row in log.splitlines()]


def same(left, right):
    return left.keys() == right.keys() and all(mx.array_equal(left[k], right[k]) for k in left)


# Training


@pytest.mark.parametrize("data", [flags, jsonl])
def test_accumulation_gives_the_gradient_of_the_whole_batch(work, data):
    whole = trainer_of(data(work))
    tokens, mask = whole.batch(whole.rows, np.arange(4))

    def mean_loss(params):
        whole.model.update(params)
        return pretrain.total_loss(whole.model, tokens, mask) / mask.sum()

    expected, wanted = mx.value_and_grad(mean_loss)(whole.params)
    wanted = dict(tree_flatten(wanted))
    for micro in (1, 2, 4):
        trainer = trainer_of(data(work, "--micro-batch-size", micro))
        loss, grads = trainer.gradients(np.arange(4))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        for name, grad in tree_flatten(grads):
            assert mx.allclose(grad, wanted[name], rtol=1e-5, atol=1e-7), name


def test_each_update_takes_the_next_rows(work):
    trainer, seen = trainer_of(flags(work)), []
    gradients = trainer.gradients
    trainer.gradients = lambda index: (seen.append(list(index)), gradients(index))[1]
    for _ in range(3):
        trainer.train_step()
    total = len(trainer.rows)
    assert seen == [list(pretrain_data.batch_rows(total, 4, step, 42)) for step in range(3)]
    assert len({row for rows in seen for row in rows}) == 12


@pytest.mark.parametrize("option", ["--gradient-checkpointing", "--compile"])
def test_a_cheaper_step_is_the_same_step(work, option):
    steps = [trainer_of(flags(work, *more)) for more in ((), (option,))]
    for _ in range(2):
        plain, other = (trainer.train_step() for trainer in steps)
        assert other == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize(
    ("precision", "learns_in", "computes_in"),
    [
        ("bf16-mixed", mx.float32, mx.bfloat16),
        ("bf16-true", mx.bfloat16, mx.bfloat16),
        ("32-true", mx.float32, mx.float32),
    ],
)
def test_precisions(work, precision, learns_in, computes_in):
    trainer = trainer_of(flags(work, "--precision", precision))
    layer, seen = trainer.model.layers[0], []
    layer.mlp = _Spy(layer.mlp, seen)
    trainer.params = trainer.cast(trainer.model.trainable_parameters(), learns_in)
    trainer.optimizer.init(trainer.cast(trainer.params, mx.float32))
    trainer.train_step()
    assert {x.dtype for _, x in tree_flatten(trainer.params)} == {learns_in}
    assert {x.dtype for _, x in tree_flatten(trainer.optimizer.state["model"])} == {mx.float32}
    assert set(seen) == {computes_in}


def test_frequent_tokens_keep_their_gradient_in_bfloat16(work):
    """MLX sums an embedding's in the type of the weights: tests/model/test_embeddings.py."""
    trainer = trainer_of(flags(work, "--precision", "bf16-mixed"))
    assert trainer.model.training
    tables = [m for _, m in trainer.model.named_modules() if isinstance(m, pretrain.nn.Embedding)]
    assert {type(table) for table in tables} == {embeddings.Embedding}


class _Spy(pretrain.nn.Module):
    def __init__(self, inner, seen):
        super().__init__()
        self.inner, self._seen = inner, seen

    def __call__(self, x):
        self._seen.append(x.dtype)
        return self.inner(x)


def test_learning_rate_warms_up_and_falls_to_its_minimum():
    config = pretrain.PretrainConfig(lr=1.0, min_lr=0.1, lr_warmup_steps=4)
    rates = [pretrain.learning_rate(step, 24, config) for step in (1, 4, 14, 24)]
    assert rates == pytest.approx([0.25, 1.0, 0.55, 0.1])


PLAIN = {}  # weights that were trained without any option


@pytest.mark.parametrize(
    "option",
    [
        *("--lr 0.02", "--weight-decay 0.5", "--betas 0.8,0.999", "--betas 0.9,0.9", "--eps 1e-3"),
        *("--min-lr 1e-3", "--lr-warmup-steps 2", "--max-norm 0.1", "--seed 1"),
        *("--global-batch-size 8", "--max-tokens 512", "--max-seq-length 32"),
    ],
)
def test_an_option_that_changes_training_does(work, option):
    def trained(*more):
        trainer = trainer_of(flags(work, *more))
        while trainer.step < trainer.steps:
            trainer.train_step()
        return dict(tree_flatten(trainer.params))

    if not PLAIN:
        PLAIN.update(trained())
    assert not same(PLAIN, trained(*option.split()))


def test_gradients_are_clipped_to_the_global_norm(work):
    trainer = trainer_of(flags(work, "--max-norm", 0.01))
    assert trainer.train_step()["grad_norm"] > 0.1  # as it was before
    state = tree_flatten(trainer.optimizer.state)
    first = [x for name, x in state if name.endswith(".m")]
    norm = sum(mx.square(x).sum().item() for x in first) ** 0.5
    assert norm == pytest.approx(0.1 * 0.01, rel=1e-3)  # (1 - beta1) x the clipped gradient


def test_a_run_learns_validates_and_its_model_loads(work):
    more = (
        "--max-tokens",
        3200,
        "--eval-interval",
        20,
        "--final-validation",
        "--save-interval",
        20,
    )
    assert pretrain.main(flags(work, *more, "--save-total-limit", 1)) == 0
    record = json.loads((work / "out/final/pretrain.json").read_text())
    assert record["updates"] == 50
    assert record["val_loss"] < record["val_unigram_entropy"] < 5
    rows = (work / "out/metrics.csv").read_text().splitlines()
    assert rows[0].startswith("update,tokens,loss,lr,grad_norm")
    assert len(rows) == 51
    assert len((work / "out/metrics_eval.csv").read_text().splitlines()) == 4
    assert [p.name for p in (work / "out").glob("checkpoint-*")] == ["checkpoint-40"]
    model, tokenizer = mlx_lm.load(str(work / "out/final"))
    assert mlx_lm.generate(model, tokenizer, "How many", max_tokens=3, verbose=False)


def test_warm_up_from_a_checkpoint_trains_completions_only(work):
    assert pretrain.main(flags(work)) == 0
    start = ("--initial-checkpoint-dir", work / "out/final", "--tokenizer-dir", "")
    more = ("--out-dir", work / "warm", "--lr", "1e-3", "--max-tokens", 128)
    assert pretrain.main(jsonl(work, *start, *more, "--use-chat-template")) == 0
    before, after = weights_of(work / "out/final"), weights_of(work / "warm/final")
    assert before.keys() == after.keys()
    assert not same(before, after)
    moved = max(mx.abs(before[k] - after[k]).max().item() for k in before)
    assert moved < 2e-3  # one update of AdamW: it started from those weights


def test_tokenizer_is_trained_where_there_is_none(work):
    more = ("--tokenizer-dir", work / "made", "--tokenizer-vocab-size", 300)
    assert pretrain.main(flags(work, *more, "--max-tokens", 64)) == 0
    made = pretrain_data.load_tokenizer(str(work / "made"))
    assert 257 <= len(made) <= 300
    assert made.decode(made.encode("Grüße 12\n")) == "Grüße 12\n"
    _, loaded = mlx_lm.load(str(work / "out/final"))
    assert loaded.encode("How many apples?") == made.encode("How many apples?")


# Resume


def test_a_stopped_run_continues_to_the_same_weights(work, monkeypatch):
    more = ("--max-tokens", 64 * 40, "--save-interval", 4, "--precision", "32-true")
    assert pretrain.main(flags(work, *more)) == 0
    arguments = flags(work, *more, "--out-dir", work / "parts")
    with monkeypatch.context() as patch:
        stop_pretraining(patch, 6)
        assert pretrain.main(arguments) == 130
    assert [p.name for p in (work / "parts").glob("checkpoint-*")] == ["checkpoint-4"]
    assert pretrain.main(arguments) == 0
    assert same(weights_of(work / "parts/final"), weights_of(work / "out/final"))
    log, again = ((work / f"{name}/metrics.csv").read_text() for name in ("out", "parts"))
    assert updates_of(again) == updates_of(log)


@pytest.mark.long
def test_a_killed_run_continues_to_the_same_weights(work):
    more = ("--max-tokens", 64 * 300, "--save-interval", 20, "--precision", "32-true")
    assert pretrain.main(flags(work, *more)) == 0
    whole = weights_of(work / "out/final")
    log = (work / "out/metrics.csv").read_text()
    arguments = flags(work, *more, "--out-dir", work / "killed")
    kill_pretraining(arguments, work / "killed/checkpoint-20")
    assert not (work / "killed/final").exists()
    assert pretrain.main(arguments) == 0
    assert same(weights_of(work / "killed/final"), whole)
    assert updates_of((work / "killed/metrics.csv").read_text()) == updates_of(log)


@pytest.mark.long
def test_a_run_whose_lines_nobody_reads_goes_on(work):
    """As with `| head -1`, which leaves after the first."""
    arguments = flags(work, "--out-dir", work / "piped")
    command = [sys.executable, str(ROOT / "utils/pretrain.py"), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": os.environ}
    with subprocess.Popen(command, **pipes) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
    assert (work / "piped/final/model.safetensors").is_file()


def test_resume_refuses_other_settings_and_other_data(work, capsys):
    more = ("--save-interval", 5)
    assert pretrain.main(flags(work, *more)) == 0
    assert pretrain.main(flags(work, *more, "--lr", 0.5)) == 2
    assert "lr (was 0.01, is 0.5)" in capsys.readouterr().err
    (work / "text/0.txt").write_text("something else " * 300)
    assert pretrain.main(flags(work, *more)) == 2
    assert "the training data" in capsys.readouterr().err
    assert pretrain.main(flags(work, *more, "--resume", "none")) == 2
    assert "--overwrite replaces it" in capsys.readouterr().err
    assert pretrain.main(flags(work, *more, "--overwrite")) == 0


def test_a_finished_run_without_checkpoints_is_not_overwritten(work, capsys):
    assert pretrain.main(flags(work)) == 0
    assert pretrain.main(flags(work)) == 2
    assert "finished run" in capsys.readouterr().err


# Settings


def test_every_setting_has_a_flag_and_flags_win(work):
    text = pretrain.make_parser(pretrain.PretrainConfig).format_help()
    for field in dataclasses.fields(pretrain.PretrainConfig):
        assert f"--{field.name.replace('_', '-')}" in text
    arguments = "--micro-batch-size 1 --global-batch-size 64 --compile false --interval 7"
    arguments += " --gradient-checkpointing --betas 0.9,0.95 --set lr=0.5"
    _, overrides = pretrain.parse(flags(work, *arguments.split()), pretrain.PretrainConfig)
    config = pretrain.resolve(work / "tiny.toml", overrides)
    assert (config.micro_batch_size, config.global_batch_size) == (1, 64)
    assert (config.compile, config.gradient_checkpointing) == (False, True)
    assert (config.eval_interval, config.betas, config.lr) == (7, [0.9, 0.95], 0.5)


def test_the_warm_up_preset_loads():
    config = pretrain.filled(pretrain.resolve(ROOT / "configs/pretrain/warm_up.toml", []))
    assert config.data_class == "JSON"
    assert not config.validates
    assert config.initial_checkpoint_dir == "Qwen/Qwen2.5-1.5B-Instruct"
    assert (config.train_type, config.max_seq_length) == ("lora", 512 + 128)


def test_smoke_test_takes_one_step_and_saves_no_weights(work, capfd):
    missing = ("--train-data-path", work / "nowhere", "--tokenizer-dir", work / "no_tokenizer")
    assert pretrain.main(flags(work, *missing, "--padded", "--smoke-test")) == 2
    capfd.readouterr()
    text = CONFIG.replace("384", "512").replace('"32-true"', '"bf16-mixed"')
    (work / "tiny.toml").write_text(text)
    assert pretrain.main(flags(work, *missing, "--smoke-test", "--final-validation")) == 0
    out = capfd.readouterr().out
    assert "one step, no weights saved" in out
    assert "\n\n" not in out, "no empty lines from the training of a tokenizer"
    rows = (work / "out/smoke_test/metrics.csv").read_text().splitlines()
    assert len(rows) == 2
    assert rows[1].startswith("1,64,")
    assert not [*work.rglob("*.safetensors"), *work.glob("no_tokenizer")]
    smoke = pretrain.smoke_config(pretrain.PretrainConfig())
    wanted = {"micro_batch_size": 1, "global_batch_size": 1, "max_tokens": 64, "logger_name": "csv"}
    wanted |= {"max_seq_length": 64, "precision": "32-true"}
    assert {key: getattr(smoke, key) for key in wanted} == wanted


def test_a_mixture_of_experts_trains_on_the_cpu_in_float32_only(work, capsys):
    more = "n_expert = 4\nn_expert_per_token = 2\nmoe_intermediate_size = 32\n"
    text = CONFIG.replace("LLaMAMLP", "LLaMAMoE").replace("intermediate_size = 64\n", more)
    (work / "tiny.toml").write_text(text)
    assert pretrain.main(flags(work, "--max-tokens", 128)) == 0
    if mx.default_device() == mx.cpu:
        assert pretrain.main(flags(work, "--overwrite", "--precision", "bf16-mixed")) == 2
        assert "--precision 32-true" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--micro-batch-sise 2", "did you mean --micro-batch-size?"),
        ("--set micro_batch_sise=2", "did you mean 'micro_batch_size'?"),
        ("--micro-batch-size two", "must be a whole number"),
        ("--micro-batch-size 3", "must be a multiple of micro_batch_size = 3"),
        ("--max-tokens 0", "more than 0"),
        ("--precision bf16", "did you mean 'bf16-true'?"),
        ("--compile maybe", "must be true or false"),
        ("--compile-mode fast", "must be one of default"),
        ("--logger-name cvs", "did you mean 'csv'?"),
        ("--optimizer-class-path torch.optim.SGD", "only torch.optim.AdamW"),
        ("--data-class-path litgpt.data.Alpaca", "TextFiles or litgpt.data.JSON"),
        ("--data-class-path litgpt.data.JSON", "wants a .jsonl file"),
        ("--train-data-path nowhere", "does not exist"),
        ("--text-suffixes .rst", "no file ending in .rst"),
        ("--tokenizer-dir nowhere", "set tokenizer_vocab_size"),
        ("--tokenizer-dir .", "holds no tokenizer"),
        ("--initial-checkpoint-dir nowhere", "no config.json"),
        ("--max-seq-length 65", "more than the model's block_size = 64"),
        ("--betas 0.9", "two numbers"),
        ("--min-lr 1", "must not be above lr"),
        ("--resume nowhere", "is not a checkpoint folder"),
        ("--data-only", "only the recipe tiny_math"),
        ("--set model={}", "[model] is missing"),
        ("--set model={n_embd='32'}", "n_layer is missing"),
        ("--set model={n_embd='32',n_layer=1,n_head=1}", "must be a number"),
        ("--set model={n_embd=32,n_layer=1,n_head=3}", "must be a multiple of n_head"),
        ("--set model={n_embd=32,bias=true}", "mlx-lm's llama has False"),
        ("--set model={n_embd=32,n_hed=2}", "n_hed: unknown"),
        ("--set model={n_embd=32,mlp_class_name='GptNeoxMLP'}", "known are LLaMAMoE, LLaMAMLP"),
        ("--set model={model_type='lama'}", "no such model type"),
        ("--config nowhere.toml", "does not exist"),
    ],
)
def test_bad_input_ends_with_exit_code_2_and_writes_nothing(work, arguments, complaint, capsys):
    assert pretrain.main(flags(work, *arguments.split())) == 2
    assert complaint in capsys.readouterr().err
    assert not (work / "out").exists()


def test_the_nearest_preset_is_one_for_pretraining(capsys):
    assert pretrain.main(["--config", "tiny_math.toml"]) == 2
    assert "configs/pretrain/tiny_math.toml?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "line 1: not JSON"),
        ("", "no line"),
        ("[1]", "line 1: [1] is no object"),
        ('{"prompt": "a"}', 'needs the texts "prompt" and "completion"; it has "prompt"'),
        ('{"question": "a", "answer": "b"}', 'it has "question", "answer"'),
        ('{"prompt": "a", "completion": ""}', '"completion" is empty, so there is nothing to'),
        ('{"prompt": "a", "completion": 3}', '"completion" must be a text, not 3'),
        ('{"prompt": [{"role": "user"}], "completion": "a"}', '"prompt" must be a text, not [{'),
        ('{"prompt": null, "completion": "a"}', '"prompt" must be a text, not None'),
    ],
)
def test_bad_jsonl_is_named(work, line, complaint, capsys):
    (work / "pairs.jsonl").write_text(line)
    assert pretrain.main(jsonl(work)) == 2
    assert complaint in capsys.readouterr().err


def test_a_text_may_hold_what_unicode_calls_a_line_break(tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "", "completion": "a\u2028b\x85c"}\r\n')
    assert pretrain_data.read_pairs(str(tmp_path / "pairs.jsonl"), "x") == [("", "a\u2028b\x85c")]


def from_model(work, folder, *more):
    return [*jsonl(work), "--tokenizer-dir", "", "--initial-checkpoint-dir", str(folder), *more]


@pytest.mark.parametrize(
    ("folder", "complaint"),
    [
        (
            "utils/mlx_model",
            "there is no such folder. Make it with:\n  uv run python utils/convert_",
        ),
        ("owner/some-model", "--hf-path owner/some-model --output-dir models/some-model"),
        ("pairs.jsonl", "that is a file; give the folder that holds config.json"),
        ("tiny", "(no config.json)"),
    ],
)
def test_a_model_to_start_from_that_is_not_there_is_what_is_named(
    work, folder, complaint, capsys, monkeypatch
):
    monkeypatch.chdir(work)
    (work / "tiny").mkdir()
    arguments = from_model(work, folder)
    (work / "pairs.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    assert pretrain.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: initial_checkpoint_dir = {folder!r}")
    assert complaint in err
    assert "tokenizer" not in err
    assert "--quantize" not in err  # which could not be trained


def test_no_tokenizer_is_made_for_a_model_that_has_its_own(work, model_dir, capsys):
    (work / "pairs.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    missing = ["--tokenizer-dir", str(work / "none"), "--tokenizer-vocab-size", "300"]
    assert pretrain.main([*from_model(work, model_dir), *missing]) == 2
    assert "which --tokenizer-dir '' takes" in capsys.readouterr().err
    assert not (work / "none").exists()


def test_a_token_beyond_the_vocabulary_is_refused(work, capsys):
    (work / "tiny.toml").write_text(CONFIG.replace("384", "64"))
    assert pretrain.main(flags(work)) == 2
    assert "vocab_size = 64: the text has token" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_with_exit_code_1(work, capsys):
    assert pretrain.main(flags(work, "--lr", "1e30", "--max-norm", "1e30")) == 1
    assert "not finite" in capsys.readouterr().err
    assert not (work / "out/final").exists()


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_read(work, capsys):
    assert pretrain.main([*flags(work), "--out-dir", str(work / "tiny.toml/out")]) == 2
    out, err = capsys.readouterr()
    assert f"out_dir {work}/tiny.toml/out is not writable ({work}/tiny.toml)" in err
    assert not out


def test_a_misspelt_table_is_named(work, capsys):
    (work / "tiny.toml").write_text(CONFIG.replace("[train]", "[trian]"))
    assert pretrain.main(flags(work)) == 2
    assert "unknown key 'trian'" in capsys.readouterr().err
    assert pretrain.main(["--config", str(work / "nowhere.toml")]) == 2


def test_documentation_has_a_row_for_every_setting():
    page = (ROOT / "docs/litgpt.md").read_text()
    for name in reading.field_docs(pretrain.PretrainConfig):
        assert f"`{name}`" in page, name


# Nothing of the user's is touched


def test_a_folder_with_other_things_is_left_as_it_is(work, capsys):
    """Also by a second run that overwrites the first."""
    out = work / "out"
    theirs = (".venv.old/x", ".notes.incomplete/x", ".cache.old-2024/x", "best/x", "traceback.txt")
    for name in (*theirs, "config.resolved.json", "checkpoint-4.mine/x"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
    for more in ((), ("--overwrite",)):
        assert pretrain.main(flags(work, "--save-interval", 5, *more)) == 0
        for name in (*theirs, "config.resolved.json", "checkpoint-4.mine/x"):
            assert (out / name).read_text() == "mine"
    assert not (out / ".mlx-grpo-replaced").exists()


@pytest.mark.parametrize("name", ["final/essay.txt", "checkpoint-5/optimizer.pt", "metrics.csv"])
@pytest.mark.parametrize("more", [(), ("--overwrite",), ("--resume", "none")], ids=str)
def test_a_name_that_is_taken_is_refused(work, capsys, name, more):
    path = work / "out" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("epoch,loss\n")
    assert pretrain.main(flags(work, *more)) == 2
    assert "is not what a run writes there" in capsys.readouterr().err
    assert path.read_text() == "epoch,loss\n"


def test_overwrite_in_a_file_replaces_no_run_on_other_data(work, capsys):
    (work / "tiny.toml").write_text(f"overwrite = true\n{CONFIG}")
    assert pretrain.main(flags(work)) == 0
    assert pretrain.main(flags(work)) == 0, "the same again"
    (work / "text").rename(work / "other")
    other = ("--train-data-path", work / "other")
    assert pretrain.main(flags(work, *other)) == 2
    assert "made of something else (train_data_path)" in capsys.readouterr().err
    assert pretrain.main(flags(work, *other, "--overwrite")) == 0
    (work / "out/final/notes.txt").write_text("mine")
    assert pretrain.main(flags(work, *other, "--overwrite")) == 2
    assert "notes.txt, which was added to the run" in capsys.readouterr().err


def interrupted(patch, arguments, step):
    """Ctrl-C after so many updates; returns the last line."""
    stop_pretraining(patch, step)
    assert pretrain.main(arguments) == 130


@pytest.mark.parametrize(
    ("step", "more", "said"),
    [
        (3, (), "no checkpoint was saved yet: the same command starts anew"),
        (6, (), "the same command continues from {out}/checkpoint-4"),
        (6, ("--overwrite",), "--resume auto without --overwrite continues from {out}/checkp"),
        (6, ("--resume", "none"), "--resume auto without --overwrite continues from {out}/chec"),
    ],
)
def test_ctrl_c_says_what_continues(work, monkeypatch, capsys, step, more, said):
    interrupted(monkeypatch, flags(work, "--save-interval", 4, *more), step)
    assert f"interrupted; {said.format(out=work / 'out')}" in capsys.readouterr().out


def with_a_run(work):
    """A folder as Ctrl-C leaves it, with one checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        interrupted(patch, flags(work, "--save-interval", 4), 6)
    return work / "out"


DAMAGE = {
    "empty": lambda p: p.write_bytes(b""),
    "cut": lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
    "binary": lambda p: p.write_bytes(bytes(range(256)) * 8),
    "zeros": lambda p: p.write_bytes(bytes(p.stat().st_size)),
    "a list": lambda p: p.write_text("[1, 2]"),
    "a folder": lambda p: (p.unlink(), p.mkdir(), (p / "x").write_text("mine")),
    "a link": lambda p: (p.unlink(), p.symlink_to("nowhere/at/all")),
    "gone": lambda p: p.unlink(),
}
FILES = [
    *("metrics.csv", "checkpoint-4/manifest.json", "checkpoint-4/trainer_state.json"),
    *("checkpoint-4/trainer_state.safetensors", "checkpoint-4/model.safetensors"),
]


@pytest.mark.parametrize("harm", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_or_made_anew(work, capsys, name, harm):
    out = with_a_run(work)
    DAMAGE[harm](out / name)
    capsys.readouterr()
    code = pretrain.main(flags(work, "--save-interval", 4))
    err = capsys.readouterr().err
    assert code in (0, 2)
    assert "Traceback" not in err
    if code == 2:
        assert err.startswith("error: ")
        assert "out" in err
        assert (out / "checkpoint-4").is_dir()


def test_a_state_that_somebody_changed_with_its_manifest(work, capsys):
    out = with_a_run(work)
    path = out / "checkpoint-4" / "trainer_state.json"
    state = json.loads(path.read_text())
    for changed in ({"step": "4"}, {"step": -1}, {"config": []}, {"config": None}, {"data": 3}):
        path.write_text(json.dumps(state | changed))
        pretrain.folders.seal(path.parent)
        assert pretrain.main(flags(work)) == 2
        assert "error: resume: " in capsys.readouterr().err


# The recipe tiny_math

RECIPE = [
    *("--config", str(ROOT / "configs/pretrain/tiny_math.toml"), "--train-size", "20"),
    *("--test-size", "10", "--pool-size", "32", "--finish-steps", "0", "--max-steps", "2"),
    *("--lr-warmup-steps", "1", "--global-batch-size", "16", "--tokenizer-samples", "400"),
    *("--compile", "false", "--eval-samples", "1", "--max-new-tokens", "4", "--log-interval", "1"),
    *("--set", "model={model_type='llama',hidden_size=64,num_hidden_layers=1,"),
]
RECIPE[-1] += "num_attention_heads=1,intermediate_size=64,rms_norm_eps=1e-5}"


def everything(folder):
    return {str(p): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def test_the_recipe_replaces_no_finished_model_unasked(tmp_path, capsys):
    out = tmp_path / "out"
    assert pretrain.main([*RECIPE, "--out-dir", str(out)]) == 0
    said = capsys.readouterr().out
    for line in ("drawing demonstrations", "tokenizing 32", "stage 1: step 1 of 2", "evaluating:"):
        assert line in said, "no wait without a word"
    (out / "README.md").write_text("mine")
    before = everything(out)
    assert pretrain.main([*RECIPE, "--out-dir", str(out)]) == 2
    assert "already holds a model (model.safetensors)" in capsys.readouterr().err
    assert pretrain.main([*RECIPE, "--out-dir", str(out), "--data-only"]) == 0
    assert pretrain.main([*RECIPE, "--out-dir", str(out), "--data-only", "--seed", "1"]) == 2
    assert "already holds another test.jsonl" in capsys.readouterr().err
    assert everything(out) == before
    assert pretrain.main([*RECIPE, "--out-dir", str(out), "--seed", "1", "--overwrite"]) == 0
    after = everything(out)
    assert after.keys() == before.keys()
    assert {Path(n).name for n in before if before[n] == after[n]} >= {"README.md"}
    assert before[str(out / "model.safetensors")] != after[str(out / "model.safetensors")]


def test_a_stopped_recipe_leaves_the_model_that_was_there(tmp_path, monkeypatch, capsys):
    from utils.pretraining import tiny_math_model

    out = tmp_path / "out"
    assert pretrain.main([*RECIPE, "--out-dir", str(out)]) == 0
    before = everything(out)

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny_math_model, "final_figures", stop)
    assert pretrain.main([*RECIPE, "--out-dir", str(out), "--overwrite"]) == 130
    assert "the recipe saves only at its end: the same command starts anew" in (
        capsys.readouterr().out
    )
    assert everything(out) == before


def test_the_recipe_overwrites_only_what_it_made(tmp_path, capsys):
    (tmp_path / "model.safetensors").write_text("mine")
    assert pretrain.main([*RECIPE, "--out-dir", str(tmp_path), "--overwrite"]) == 2
    assert "which this recipe did not make" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_the_model_in_the_repository_is_safe(capsys):
    before = everything(ROOT / "models/tiny-math")
    preset = str(ROOT / "configs/pretrain/tiny_math.toml")
    code = pretrain.main(["--config", preset, "--out-dir", str(ROOT / "models/tiny-math")])
    assert (code, everything(ROOT / "models/tiny-math")) == (2, before)
