"""The command line as it is typed: imports, precedence, presets, --dry-run, records, Ctrl-C."""

import dataclasses
import json
import os
import signal
import struct
import subprocess
import sys
import time
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from conftest import ROOT
from helpers import SLOW, imports_of, mostly_long, read_log, tree, typed_in_a_shell, write_toml

SCRIPT = ROOT / "mlx-grpo.py"
TINY = ROOT / "models/tiny-math"
VOWELS = """
def vowels(completions, **_):
    return [sum(c[0]["content"].count(v) for v in "aeiou0123456789") for c in completions]
"""


AT_ONCE = {
    "help": (["--help"], 0),
    "unknown key": (["--set", "learnin_rate=1"], 2),
    "value": (["--set", "num_generations=1"], 2),
    "no config": (["--config", "configs/none.toml"], 2),
    "no model": (["--set", "model_name=utils/none", "--set", "output_dir=out"], 2),
    "no reward": (["--set", "reward_funcs=corectness", "--set", f"model_name={TINY}"], 2),
    "dry run": (["--config", "configs/smoke_test.toml", "--dry-run"], 0),
}


@pytest.mark.parametrize("what", mostly_long(AT_ONCE, "help", "no reward", "dry run"))
def test_slow_imports_wait_until_the_settings_are_checked(what):
    """So that help and complaints come at once."""
    words, code = AT_ONCE[what]
    done, packages = imports_of(SCRIPT, *words, folder=ROOT)
    assert done.returncode == code
    assert {"mlx", "numpy"} <= packages
    assert not SLOW & packages


def test_the_environment_names_the_configuration(typed, grpo, capsys, monkeypatch, tmp_path):
    assert typed("--dry-run", seed=7)[0] == 0  # writes settings.toml
    settings = (tmp_path / "settings.toml").rename(tmp_path / "seven.toml").read_text()
    (tmp_path / "eight.toml").write_text(settings.replace("seed = 7", "seed = 8"))
    monkeypatch.setenv("MLX_GRPO_CONFIG", "seven.toml")
    for words, seed in (([], 7), (["--set", "seed=9"], 9), (["--config", "eight.toml"], 8)):
        assert grpo.main(["--dry-run", *words]) == 0
        assert f"seed = {seed}" in capsys.readouterr().out.splitlines()


def test_ready_commands_start_as_the_person_started(monkeypatch):
    from utils.run.command_line import command_line

    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("UV", raising=False)
    words = ("a.toml", ["run_name=two words"])
    assert command_line(str(SCRIPT), *words) == (
        "python mlx-grpo.py --config a.toml --set 'run_name=two words'"
    )
    monkeypatch.setenv("UV", "/usr/bin/uv")  # `uv run` does that
    monkeypatch.chdir(ROOT / "configs")
    assert command_line(str(SCRIPT), None, []) == "uv run ../mlx-grpo.py"


# The values of the presets: key -> one per column.
COLUMNS = (
    *("smoke_test", "ultra_light", "medium", "prod"),
    *("nanochat_test", "nanochat_grpo", "nanochat_d32_test", "nanochat_d32"),
)
MLX_MODEL, NANOCHAT, D32 = "utils/mlx_model", "models/nanochat-mlx", "models/nanochat-d32-mlx"
TABLE = {
    "output_dir": (
        *("outputs/smoke-test", "outputs/ultra-light", "outputs/medium-run"),
        *("outputs/production-run", "outputs/nanochat-grpo-test", "outputs/nanochat-grpo"),
        *("outputs/nanochat-d32-test", "outputs/nanochat-d32-grpo"),
    ),
    "run_name": (
        *("smoke-test-run", "ultra-light-test", "qwen-1.5b-medium", "qwen-1.5b-production"),
        *("nanochat-grpo-test", "nanochat-grpo-v1", "nanochat-d32-test", "nanochat-d32-v1"),
    ),
    "model_name": ("models/tiny-math", *(MLX_MODEL,) * 3, *(NANOCHAT,) * 2, *(D32,) * 2),
    "learning_rate": (1e-6, 1e-6, 1e-6, 1e-6, 1e-5, 5e-6, 3e-6, 3e-6),
    "num_epochs": (1, 1, 1, 1, 1, 3, 1, 2),
    "gradient_accumulation_steps": (1, 1, 1, 4, 1, 4, 1, 4),
    "max_train_samples": (50, 50, 200, 2000, 10, 500, 20, 500),
    "warmup_ratio": (0.1, 0.1, 0.1, 0.1, 0.1, 0.05, 0.1, 0.05),
    "max_grad_norm": (0.1, 0.1, 0.1, 0.1, 0.1, 1.0, 1.0, 1.0),
    "num_generations": (2, 2, 2, 16, 2, 4, 2, 4),
    "max_new_tokens": (32, 32, 32, 256, 32, 64, 64, 128),
    "temperature": (0.7, 0.7, 0.7, 0.7, 0.7, 0.8, 0.7, 0.8),
    "kl_coeff": (0.0, 0.0, 0.0, 0.0, 0.0, 0.01, 0.01, 0.02),
    "eval_steps": (5, 5, 25, 50, 5, 25, 5, 25),
    "eval_samples": (10, 10, 10, 200, 5, 20, 5, 20),
    "eval_every_updates": (5, 5, 25, 25, 5, 25, 5, 25),
    "eval_subset_size": (10, 10, 10, 100, 5, 20, 5, 20),
    "eval_max_new_tokens": (32, 32, 32, 256, 32, 64, 64, 128),
    "save_steps": (25, 25, 50, 100, 10, 50, 10, 50),
    "seed": (42, 42, 42, 0, 42, 42, 42, 42),
    "use_compile": (False, False, False, True, False, False, False, False),
    "quantize_for_rollouts": (True, True, True, True, True, True, False, False),
    "batch_size": (1,) * 8,
    "logging_steps": (1,) * 8,
    "log_jsonl": (True,) * 8,
    "clip_eps": (0.2,) * 8,
}
# smoke_test runs on the model in the repository, offline and as often as one likes.
ADDITIONS = {
    "smoke_test": {"dataset", "system_prompt", "overwrite", "closing_note", "report"},
    "prod": {"max_prompt_length", "max_completion_length"},
}


@pytest.mark.parametrize("column", range(len(COLUMNS)), ids=COLUMNS)
def test_a_preset_has_its_values(grpo, column):
    path = ROOT / "configs" / f"{COLUMNS[column]}.toml"
    config = grpo.read_config(str(path), [])
    wrong = {k: getattr(config, k) for k, v in TABLE.items() if getattr(config, k) != v[column]}
    assert not wrong
    named = set(tomllib.loads(path.read_text()))
    assert named == set(TABLE) | ADDITIONS.get(COLUMNS[column], set())


def test_the_other_presets(grpo):
    def read(name):
        return grpo.read_config(str(ROOT / "configs" / f"{name}.toml"), [])

    smoke, prod, default, tiny = map(read, ("smoke_test", "prod", "default", "tiny_math"))
    assert (smoke.dataset, smoke.overwrite) == ("models/tiny-math", True)
    assert "installation" in smoke.closing_note
    assert (prod.max_prompt_length, prod.max_completion_length) == (512, 1024)
    expected = {"train_type": "lora", "num_generations": 8, "max_new_tokens": 128}
    assert default == grpo.MLXGRPOConfig(**expected)
    assert (tiny.model_name, tiny.dataset) == ("models/tiny-math", "models/tiny-math")
    assert (tiny.train_type, tiny.quantize_for_rollouts, tiny.use_compile) == ("full", False, False)
    assert tiny.overwrite
    files = {path.stem for path in (ROOT / "configs").glob("*.toml")}
    assert files == {*COLUMNS, "default", "tiny_math", "smollm2"}, "every preset is checked here"


def test_smollm2_learns_from_the_last_number_alone(grpo):
    config = grpo.read_config(str(ROOT / "configs/smollm2.toml"), [])
    assert (config.reward_funcs, config.eval_metric) == (["last_number"], "last_number")
    assert (config.system_prompt, config.reasoning_prefix, config.stop_strings) == ("", "", [])
    assert (config.train_type, config.quantize_for_rollouts, config.dtype) == (
        "full",
        False,
        "auto",
    )
    assert (config.batch_size, config.num_generations, config.temperature) == (32, 16, 0.7)
    assert (config.learning_rate, config.warmup_ratio, config.max_grad_norm) == (2e-5, 0.05, 1)
    assert config.max_new_tokens == config.eval_max_new_tokens == 128
    assert config.eval_samples == 600  # all test questions


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.stem)
def test_a_preset_says_what_it_is_for(path):
    lines = path.read_text().splitlines()
    for title in ("# Purpose:", "# Hardware:", "# Needs:", "# Run:"):
        assert any(line.startswith(title) for line in lines), title
    command = next(line for line in lines if line.startswith("# Run:")).split()[2:]
    argument = [] if path.stem == "default" else ["--config", f"configs/{path.name}"]
    assert command == ["uv", "run", "mlx-grpo.py", *argument]


def hollow_weights(model_dir, folder):
    """A model folder whose weights are a header and then a hole of the right size."""
    folder.mkdir()
    (folder / "config.json").write_text((model_dir / "config.json").read_text())
    data = (model_dir / "model.safetensors").read_bytes()
    header = 8 + struct.unpack("<Q", data[:8])[0]
    with (folder / "model.safetensors").open("wb") as file:
        file.write(data[:header])
        file.truncate(len(data))
    return folder


def test_a_dry_run_needs_neither_weights_nor_mlx_lm(model_dir, data_dir, tmp_path):
    model = hollow_weights(model_dir, tmp_path / "hollow")
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name in ("mlx_lm", "transformers", "datasets", "huggingface_hub", "pyarrow"):
        (stubs / f"{name}.py").write_text(f"raise ImportError('{name} must not be imported')\n")
    config = write_toml(tmp_path, {"model_name": str(model), "dataset": str(data_dir)})
    before = tree(tmp_path)
    line = f"python {SCRIPT} --config {config} --dry-run --all"
    done = typed_in_a_shell(line, tmp_path, PYTHONPATH=str(stubs), PYTHONDONTWRITEBYTECODE="1")
    assert (done.returncode, done.stderr) == (0, "")
    assert tree(tmp_path) == before
    for part in (
        "num_generations = 64",
        "weights",
        "disk: one checkpoint",
        "updates: 6 on at most",
    ):
        assert part in done.stdout


def planned_length(text):
    words = text.partition("\nupdates: ")[2].partition("\n")[0].replace(",", "").split()
    return int(words[0]), int(words[-3])  # "updates: 6 on at most ..., at most 192 sampled tokens"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 5, "num_epochs": 2},
        {"batch_size": 7, "gradient_accumulation_steps": 1, "max_train_samples": 15},
        {"num_iterations": 3, "max_train_samples": 7},
        {"num_iterations": 3, "max_updates": 5},
        {"dataset": "one.jsonl", "eval_samples": 1, "eval_max_new_tokens": 1},
    ],
    ids=["plain", "epochs", "batches", "iterations", "stopped early", "held out"],
)
def test_a_dry_run_names_the_updates_that_the_run_makes(typed, data_dir, tmp_path, settings):
    rows = (data_dir / "train.jsonl").read_text().splitlines(keepends=True)[:13]
    (tmp_path / "one.jsonl").write_text("".join(rows))
    settings = {"max_new_tokens": 2, **settings}
    code, out, err, changed = typed("--dry-run", **settings)
    assert (code, err, changed) == (0, "", set())
    planned, most_tokens = planned_length(out)
    code, out, _, _ = typed(**settings)
    assert code == 0
    records = [record for record in read_log(tmp_path / "out") if "split" not in record]
    assert records[-1]["update"] == planned
    sampled = sum(record["tokens"] for record in records)
    assert 0.8 * most_tokens < sampled <= most_tokens, "some completions end early"
    assert f"plan      {planned} updates of" in out


@pytest.mark.parametrize(("rounds", "times"), [(0, 1), (2, 3), (99, 12)])
def test_a_dry_run_counts_what_dynamic_sampling_may_sample(typed, rounds, times):
    """Every round could replace both prompts; none of the 24 comes twice in an update."""
    _, out, _, _ = typed("--dry-run", dynamic_sampling=rounds, max_new_tokens=5)
    assert planned_length(out) == (12, 12 * 2 * 4 * 5 * times)


def test_the_records_of_a_run(typed, grpo, model_dir, data_dir, tmp_path):
    words = ("--set", "learning_rate=0.002")
    assert typed(*words, max_updates=1, seed=5)[0] == 0
    config = grpo.read_config("settings.toml", words[1:])
    resolved = json.loads((tmp_path / "out" / "config.resolved.json").read_text())
    assert resolved == dataclasses.asdict(config)
    assert resolved["learning_rate"] == 0.002

    provenance = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert provenance["seed"] == 5
    assert provenance["python"] == sys.version.split()[0]
    for package in ("mlx", "mlx-lm", "transformers", "datasets"):
        assert provenance[package] == metadata.version(package)
    assert {"platform", "device", "git_revision", "git_dirty"} <= provenance.keys()

    def data_hash(**settings):
        assert typed(*words, max_updates=1, overwrite=True, **settings)[0] == 0
        return json.loads((tmp_path / "out" / "provenance.json").read_text())["data_sha256"]

    assert data_hash(seed=6) == provenance["data_sha256"]
    assert data_hash(max_train_samples=23) != provenance["data_sha256"]


def test_nothing_but_plain_lines_when_nobody_watches(model_dir, data_dir, tmp_path):
    settings = {
        "model_name": str(model_dir),
        "dataset": str(data_dir),
        "output_dir": "out",
        "max_updates": 3,
        "num_generations": 2,
        "max_new_tokens": 4,
        "eval_samples": 2,
        "eval_max_new_tokens": 4,
    }
    done = typed_in_a_shell(f"python {SCRIPT} --config {write_toml(tmp_path, settings)}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert not {"\r", "\x1b", "\b"} & {*done.stdout}
    words = [line.split()[0] for line in done.stdout.splitlines() if line[0] != " "]
    assert [w for w in words if w != "speed"] == [
        *("model", "data", "plan", "eval", "update", "update", "update"),
        *("eval", "result", "kept", "saved", "next", "finished"),
    ]


@pytest.mark.long
def test_output_that_nobody_reads_or_that_cannot_be_shown_stops_nothing(model_dir, tmp_path):
    (tmp_path / "cafe.jsonl").write_text('{"question": "How many caf\\u00e9s?", "answer": "1"}\n')
    settings = {
        "model_name": str(model_dir),
        "dataset": "cafe.jsonl",
        "output_dir": "out",
        "max_updates": 1,
        "num_generations": 2,
        "max_new_tokens": 2,
        "eval_samples": 0,
        "eval_subset_size": 0,
        "log_completions": 2,
        "overwrite": True,
    }
    run = f"python {SCRIPT} --config {write_toml(tmp_path, settings)}"
    for command in (f"{run} --dry-run", run):  # `true` is gone before the first line is written
        done = typed_in_a_shell(f"({command}; echo exit code $? >&2) | true", tmp_path)
        assert done.stderr == "exit code 0\n"
    assert (tmp_path / "out" / "final").is_dir()
    done = typed_in_a_shell(run, tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "How many caf?s?" in done.stdout


def wait_for_update(number, process, log):
    """Wait until the log of a running process has so many lines."""
    deadline = time.monotonic() + 60
    while not (log.exists() and len(log.read_text().splitlines()) >= number):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.long
@pytest.mark.parametrize("overwrite", [False, True])
def test_ctrl_c_saves_and_the_printed_command_goes_on(model_dir, data_dir, tmp_path, overwrite):
    (tmp_path / "mine.py").write_text(VOWELS)
    settings = {
        "model_name": str(model_dir),
        "dataset": str(data_dir),
        "output_dir": "out",
        "reward_funcs": ["mine.py:vowels"],
        "num_epochs": 10,
        "num_generations": 4,
        "max_new_tokens": 8,
        "quantize_for_rollouts": False,
        "use_compile": False,
        "eval_samples": 0,
        "eval_subset_size": 0,
        "system_prompt": "",
        "overwrite": overwrite,
    }
    config = write_toml(tmp_path, settings)
    command = [sys.executable, str(SCRIPT), "--config", Path(config).name, "--set", "save_steps=0"]
    environment = {k: v for k, v in os.environ.items() if k not in ("UV", "MLX_GRPO_CONFIG")}
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_update(3, process, tmp_path / "out" / "training_log.jsonl")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")

    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    update = read_log(tmp_path / "out")[-1]["update"]
    assert 3 <= update < 60
    assert f"stopped   after update {update}, saved in out/{checkpoint.name}" in out
    assert not list(tmp_path.rglob("*incomplete*"))
    from mlx_lm import generate, load

    model, tokenizer = load(str(checkpoint))
    assert generate(model, tokenizer, "How many?", max_tokens=2)

    (again,) = [line.strip() for line in out.splitlines() if line.endswith("--resume")]
    done = typed_in_a_shell(again, tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"resume    out/{checkpoint.name} at update {update}" in done.stdout
    assert [record["update"] for record in read_log(tmp_path / "out")] == [*range(1, 61)]
    assert (tmp_path / "out" / "final" / "model.safetensors").is_file()


def test_an_interrupted_start_leaves_nothing(typed, grpo, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(grpo, "load_model", interrupted)
    code, out, err, changed = typed()
    assert (code, err, changed) == (130, "", set())
    assert out == "reason    Ctrl-C: left at once\n"
