"""Bad input: one readable message, the right exit code, no traceback, and nothing written."""

import json
import logging
import math
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import ROOT, make_model
from helpers import (
    digest,
    lose_the_right_to_write_everywhere,
    make_trainer,
    read_log,
    tree,
    typed_in_a_shell,
    write_toml,
)

from utils import evaluate_model
from utils.base.errors import UserError
from utils.data import chat_template, files
from utils.gradient import packing
from utils.model import loading
from utils.run import introduction

SCRIPT = ROOT / "mlx-grpo.py"


def the_message(code, out, err, expected_code=2):
    """The one message on stderr, after the checks that hold for every refusal."""
    assert code == expected_code, err
    assert err.startswith("error: "), err
    assert err.count("error: ") == 1
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 6, err
    return err


@pytest.fixture
def refused(typed):
    """Type a command that must be refused with nothing written; returns the message."""

    def run(*words, **settings):
        code, out, err, changed = typed(*words, **settings)
        assert not changed
        return the_message(code, out, err)

    return run


def assert_names(message, *parts):
    missing = [part for part in parts if part not in message]
    assert not missing, f"{missing} not in: {message}"


SETTINGS = [
    # unknown and mistyped keys
    ("learnin_rate=1e-5", "unknown key 'learnin_rate' in --set; did you mean 'learning_rate'?"),
    ("num-generations=4", "did you mean 'num_generations'?"),
    ("flurb=1", "unknown key 'flurb' in --set; `--help` lists the keys"),
    ("num_generations", "--set 'num_generations': write --set key=value"),
    # wrong types
    ("num_generations=many", "num_generations = 'many' must be a whole number"),
    ("num_generations=", "num_generations = '' must be a whole number"),
    ("num_generations=4.5", "num_generations = 4.5 must be a whole number"),
    ("num_generations=true", "num_generations = True must be a whole number"),
    ("learning_rate=fast", "learning_rate = 'fast' must be a number"),
    ("use_compile=yes", "use_compile = 'yes' must be true or false"),
    ("reward_weights=1,x", "reward_weights = 'x' must be a number"),
    ("chat_template_kwargs=x", "chat_template_kwargs = 'x' must be a table such as {key = value}"),
    ("seed=" + "9" * 5000, "seed = '99999999"),
    ("seed=0x" + "f" * 5000, "seed = a number of thousands of digits holds something else than"),
    ("run_name=" + "x" * 5000 + "\0", "xxx... holds something else than text without NUL"),
    ("chat_template_kwargs={day = 2020-01-01}", "holds something else than text without NUL"),
    ("max_new_tokens=2147483648", "max_new_tokens = 2147483648 must be below 2 ** 31"),
    ("seed=1\nrun_name=2", "seed = '1\\nrun_name=2' must be a whole number"),
    ("a" * 5000 + "=1", "unknown key 'aaa"),
    # out of range
    ("num_generations=1", "num_generations = 1 must be at least 2"),
    ("temperature=0", "temperature = 0.0 must be above 0"),
    ("learning_rate=nan", "learning_rate = nan must be above 0 and finite"),
    ("learning_rate=-1e-6", "learning_rate = -1e-06 must be above 0"),
    ("kl_coeff=inf", "kl_coeff = inf must be at least 0 and finite"),
    ("warmup_ratio=10", "warmup_ratio = 10.0 must be between 0 and 1"),
    ("top_p=0", "top_p = 0.0 must be above 0, at most 1"),
    ("adam_beta2=1", "adam_beta2 = 1.0 must be at least 0, below 1"),
    ("lora_layers=0", "lora_layers = 0 must be -1 (all) or at least 1"),
    ("clip_eps=1.5", "clip_eps = 1.5 must be above 0, below 1"),
    ("seed=18446744073709551616", "seed = 18446744073709551616 must be at least 0, below 2 ** 64"),
    ("max_train_samples=-1", "max_train_samples = -1 must be at least 0"),
    ("output_dir=", "output_dir = '' must be text that is not empty"),
    ("loss_type=ppo", "loss_type = 'ppo', allowed: grpo, bnpo, dapo, dr_grpo, gspo, gmpo"),
    ("train_type=qlora", "train_type = 'qlora', allowed: auto, full, lora, dora"),
    ("temperature=true", "temperature = True must be a number"),
    # contradictions
    ("reward_funcs=[]", "reward_funcs is empty: nothing would be learned"),
    ("reward_funcs=int,int", "reward_funcs names a function twice"),
    ("reward_weights=1,2", "reward_weights has 2 values for 4 reward_funcs: give each"),
    ("reward_weights=1", "reward_weights has 1 value for 4 reward_funcs"),
    ("eval_metric=accuracy", "eval_metric = 'accuracy' is neither em nor one of reward_funcs"),
    ("stop_strings=['']", "stop_strings holds an empty string"),
    ("stop_strings=<reasoning>", "stop string '<reasoning>' is part of reasoning_prefix"),
    (
        "report_to=wandbb",
        "report_to: 'wandbb' is unknown, allowed are csv, tensorboard, wandb",
    ),
    ("chat_template=no.jinja", "chat_template = 'no.jinja' is neither a file nor plain"),
    ("resume=checkpoint-7", "resume = 'checkpoint-7' is not a checkpoint folder"),
]


@pytest.mark.parametrize(
    ("override", "complaint"), SETTINGS, ids=[case[0][:40] for case in SETTINGS]
)
def test_a_bad_override(refused, override, complaint):
    assert_names(refused("--set", override), complaint)


TOML = [
    ("learnin_rate = 1e-5", "unknown key 'learnin_rate' in bad.toml; did you mean 'learning_rate'"),
    ("num_generations = '32'", "num_generations = '32' must be a whole number"),
    ("model_name = 3", "model_name = 3 must be text in quotes"),
    ("stop_strings = '</a>'", "stop_strings = '</a>' must be a list"),
    ("seed = = 1", "bad.toml cannot be read as TOML: Invalid value (at line 1, column 8)"),
    ("run_name = x", "(at line 1, column 12); text stands in quotes"),
    ("[mlx-grpo]\nseed = 2", "unknown key 'mlx-grpo' in bad.toml; did you mean 'mlx_grpo'?"),
    ("seed = 1\nseed = 2", "bad.toml cannot be read as TOML"),
    ("seed = " + "9" * 5000, "bad.toml cannot be read as TOML: Exceeds the limit (4300 digits)"),
    ("stop_strings = " + "[" * 9000, "bad.toml cannot be read as TOML: nested too deeply"),
    ("learning_rate = 0x" + "f" * 5000, "learning_rate = a number of thousands of digits holds"),
    ('output_dir = "a\\u0000b"', "output_dir = 'a\\x00b' holds something else than text without"),
    ("run_name = '\xff'", "bad.toml cannot be read as TOML: byte 13 is not UTF-8"),
    ("seed = 1\n[mlx_grpo]\nseed = 2", "mixes [mlx_grpo] with other top-level keys: seed"),
    ("[train]\nseed = 2", "unknown key 'train' in bad.toml"),
    ("mlx_grpo = 3", "mlx_grpo = 3 must be a table, [mlx_grpo]"),
    ("adapter_path = 'x'\ntrain_type = 'full'", "adapter_path needs train_type lora or dora"),
    ("train_type = 'full'\nlora_rank = 3", "lora_rank has no effect with train_type = full"),
]


@pytest.mark.parametrize(("text", "complaint"), TOML, ids=[case[0][:40] for case in TOML])
def test_a_bad_toml_file(grpo, tmp_path, monkeypatch, capsys, text, complaint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.toml").write_text(text, encoding="latin-1")
    code = grpo.main(["--config", "bad.toml"])
    assert_names(the_message(code, *capsys.readouterr()), complaint)
    assert [*tree(tmp_path)] == ["bad.toml"]


def test_a_missing_config_file_names_its_neighbours(grpo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smoke.toml").touch()
    code = grpo.main(["--config", "smok.toml"])
    assert_names(
        the_message(code, *capsys.readouterr()),
        "config file smok.toml does not exist",
        "smoke.toml",
    )


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ("tiny_math", "tiny_math does not exist (did you mean configs/tiny_math.toml?)"),
        ("configs/tinymath.toml", "(did you mean configs/tiny_math.toml?)"),
        ("zzz.toml", "config file zzz.toml does not exist (beside it: pyproject.toml)"),
        ("configs", "config file configs is a folder (beside it: configs/default.toml, "),
    ],
)
def test_a_mistyped_preset_is_named(grpo, monkeypatch, capsys, given, answer):
    monkeypatch.chdir(ROOT)
    assert_names(the_message(grpo.main(["--config", given]), *capsys.readouterr()), answer)


MODELS = [
    ("utils/mlx_model", "utils/convert_model.py --hf-path Qwen/Qwen2.5-1.5B-Instruct --quantize"),
    ("./utils/mlx_model", "utils/convert_model.py --hf-path Qwen/Qwen2.5-1.5B-Instruct --quantize"),
    ("models/nanochat-mlx", "convert_nanochat.py"),
    ("models/nanochat-d32-mlx", "convert_nanochat.py"),
    ("qwen", "model_name = 'qwen' is neither a folder nor a hub name (owner/model)"),
    ("../qwen", "model_name = '../qwen' is neither a folder nor a hub name"),
    (".", "model_name = '.' is a folder without config.json"),
]


def test_a_mistyped_folder_is_not_looked_for_on_the_hub(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=r"no such folder; models has .*tiny-math"):
        loading.find_model("models/tiny-mth")


@pytest.mark.parametrize("name", ["README.md", "models/tiny-math/model.safetensors"])
def test_a_file_is_no_model(monkeypatch, name):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match="is a file: give the folder that holds config"):
        loading.find_model(name)


def test_a_path_of_the_repository_typed_elsewhere_says_where_to_run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="paths count from the current folder, so run it in"):
        loading.find_model("models/tiny-math")
    with pytest.raises(UserError, match="dataset = 'models/tiny-math' is not there: paths count"):
        files.local_path("models/tiny-math")


OBJECTIVES = [
    (
        "advantage_estimator=gspo loss_type=dapo",
        "advantage_estimator = 'gspo' stands for loss_type = 'gspo' with group_norm, but",
    ),
    ("loss_type=sapo delta=3", "delta = 3.0 bounds PPO's clipped ratio, which loss_type = sapo"),
    ("delta=1.1", "delta = 1.1 must be above 1 + clip_eps_high = 1.2"),
    ("delta=1.2", "delta = 1.2 must be above 1 + clip_eps_high = 1.2"),
    ("loss_type=dapo delta=1.25", "delta = 1.25 must be above 1 + clip_eps_high = 1.28"),
    (
        "loss_type=gmpo importance_sampling_level=sequence",
        "has no meaning for loss_type = gmpo, which averages token ratios itself",
    ),
    (
        "loss_type=cpgd importance_sampling_level=sequence",
        "has no meaning for loss_type = cpgd, which has a gradient per token",
    ),
    ("loss_type=gspo top_entropy_quantile=0.2", "the gradient of a ratio per sequence goes to all"),
    ("loss_type=gmpo top_entropy_quantile=0.2", "the gradient of a ratio per sequence goes to all"),
    ("kl_coeff=0.1 kl_estimator=k1", "kl_estimator = k1 in the loss has a gradient of mean zero"),
    (
        "kl_coeff=0.1 kl_placement=reward kl_bias_correction=true",
        "kl_bias_correction is about a gradient, which a penalty in the reward has not",
    ),
    ("importance_floor=3", "importance_floor = 3.0 is above importance_cap = 2.0"),
    ("reward_running_norm_minus_mean=true", "needs reward_running_norm"),
    (
        "early_stopping_patience=2 eval_samples=5 eval_steps=0",
        "early_stopping_patience counts evaluations on the test split, which need eval_samples",
    ),
    (
        "reward_running_norm=true advantage_estimator=rloo reward_running_norm_minus_mean=true",
        "reward_running_norm_minus_mean needs reward_clip",
    ),
    (
        "reward_running_norm=true",
        "advantage_estimator = group_norm divides by a standard deviation itself",
    ),
    (
        "advantages_norm=true advantage_estimator=reinforce",
        "advantage_estimator = reinforce does that already",
    ),
    ("advantage_estimator=gdpo reward_clip=1", "reward_clip acts on the total reward"),
    (
        "advantage_estimator=gdpo kl_coeff=0.1 kl_placement=reward",
        "kl_placement = reward acts on the total reward",
    ),
    ("advantage_estimator=gdpo reward_funcs=int", "gdpo needs at least two reward_funcs"),
    ("kl_estimator=k2 kl_target=0.1", "kl_estimator, kl_target has no effect with kl_coeff = 0"),
    ("kl_coeff=0.1 kl_horizon=5", "kl_horizon has no effect with kl_target = 0"),
    ("kl_coeff=0.1 ref_sync_alpha=0.5", "ref_sync_alpha has no effect with ref_sync_updates = 0"),
    ("loss_type=cispo clip_eps=0.1", "clip_eps has no effect with a loss_type without a lower"),
    (
        "clip_eps=0.1 delta=3",
        "clip_eps, delta has no effect with num_iterations = 1, where the ratio",
    ),
    ("loss_type=gspo clip_eps_high=0.3", "clip_eps_high has no effect with num_iterations = 1"),
    ("loss_type=sapo clip_eps_high=1", "clip_eps_high has no effect with a loss_type without a"),
    (
        "advantage_estimator=rloo advantage_eps=1e-6",
        "advantage_eps has no effect with an advantage_estimator without a group's standard",
    ),
    (
        "kl_coeff=0.1 ref_sync_updates=4 train_type=full",
        "rounded away in the 4-bit reference of full fine-tuning; set quantize_for_rollouts",
    ),
]


@pytest.mark.parametrize(("overrides", "complaint"), OBJECTIVES, ids=[o[0] for o in OBJECTIVES])
def test_an_objective_that_makes_no_sense(refused, overrides, complaint):
    words = [word for override in overrides.split() for word in ("--set", override)]
    assert_names(refused(*words, quantize_for_rollouts=True), complaint)


@pytest.mark.parametrize("words", [[], ["--dry-run"]], ids=["run", "dry-run"])
@pytest.mark.parametrize(("name", "advice"), MODELS, ids=[case[0] for case in MODELS])
def test_a_missing_model(refused, name, advice, words):
    assert_names(refused(*words, model_name=name), name, advice)


def test_the_command_that_makes_mlx_model_is_one_that_convert_model_understands():
    from utils import convert_model

    command = shlex.split(loading.HOW_TO_MAKE["utils/mlx_model"])
    assert command[:4] == ["uv", "run", "python", "utils/convert_model.py"]
    arguments = convert_model.build_parser().parse_args(command[4:])
    assert arguments.hf_path == "Qwen/Qwen2.5-1.5B-Instruct"
    assert str(arguments.output_dir) == "utils/mlx_model"


@pytest.fixture
def own_model(model_dir, tmp_path):
    """A copy of the random model to break."""
    return shutil.copytree(model_dir, tmp_path / "model")


def cut_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def change_json(folder, name="config.json", **changes):
    values = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def move_tensor(folder, start, **changes):
    """Change the safetensors header: the embedding begins `start` bytes after it."""
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    entry = header["model.embed_tokens.weight"]
    if start is not None:
        begin, end = entry["data_offsets"]
        if begin == start:  # it is there already: let its neighbour overlap it
            entry = next(e for n, e in header.items() if e is not entry and n != "__metadata__")
            begin, end = entry["data_offsets"]
        entry["data_offsets"] = [start, start + end - begin]
    entry |= changes
    text = json.dumps(header).encode()
    weights.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def fill_weights(folder, value):
    weights = mx.load(str(folder / "model.safetensors"))
    filled = {name: mx.full(array.shape, value) for name, array in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), filled)


def change_tokenizer(folder, **changes):
    values = json.loads((folder / "tokenizer.json").read_text())
    values["model"] |= changes
    (folder / "tokenizer.json").write_text(json.dumps(values))


BROKEN_MODELS = {
    "config.json is no JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        "config.json: not JSON",
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "no model*.safetensors in this folder",
    ),
    "weights cut short": (cut_weights, "truncated, 1,000 bytes of weights are missing"),
    "unknown model type": (
        lambda folder: change_json(folder, model_type="strange"),
        "Model type strange not supported",
    ),
    "no chat template": (
        lambda folder: change_json(folder, "tokenizer_config.json", chat_template=None),
        'has no chat template: set chat_template to a Jinja file, or chat_template = "plain"',
    ),
    "a type that is no model": (
        lambda folder: change_json(folder, model_type="cache"),
        "model model cannot be loaded",
    ),
    "absurd layers": (
        lambda folder: change_json(folder, num_hidden_layers=10**9),
        "config.json: over 10,000 layers or experts are not believable",
    ),
    "absurd vocabulary": (
        lambda folder: change_json(folder, vocab_size=10**12),
        "config.json: vocab_size must be a positive integer, got 1000000000000",
    ),
    "negative layers": (
        lambda folder: change_json(folder, num_hidden_layers=-2),
        "config.json: num_hidden_layers must be a positive integer, got -2",
    ),
    "nested too deeply": (
        lambda folder: (folder / "config.json").write_text('{"a":' * 100_000),
        "config.json: not JSON (nested too deeply)",
    ),
    "tensors that overlap": (
        lambda folder: move_tensor(folder, 0),
        "tensors overlap, so the file is damaged",
    ),
    "a tensor beyond the file": (
        lambda folder: move_tensor(folder, 10**9),
        "bytes of weights are missing",
    ),
    "a shape without its bytes": (
        lambda folder: move_tensor(folder, None, shape=[384, 64, 1000]),
        "bad header entry for tensor 'model.embed_tokens.weight'",
    ),
    "weights that are not finite": (
        lambda folder: fill_weights(folder, math.nan),
        "its weights give no finite numbers",
    ),
    "a damaged tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text('{"model": {}}'),
        "model model cannot be loaded",
    ),
    "a tokenizer that panics": (
        lambda folder: change_tokenizer(
            folder, merges=[["a", "b"]], continuing_subword_prefix="long"
        ),
        "model model cannot be loaded: its tokenizer panics",
    ),
    "template without end": (
        lambda folder: change_json(
            folder,
            "tokenizer_config.json",
            chat_template="{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3,
        ),
        "chat template (model) took over 0.2 seconds for one prompt",
    ),
    "template that divides by zero": (
        lambda folder: change_json(folder, "tokenizer_config.json", chat_template="{{ 1 / 0 }}"),
        "chat template (model) refuses the prompt: division by zero",
    ),
    "template that fails": (
        lambda folder: change_json(folder, "tokenizer_config.json", chat_template="{{ a.b.c }}"),
        "refuses the prompt: 'a' is undefined",
    ),
}


@pytest.mark.parametrize("what", BROKEN_MODELS)
def test_a_broken_model(refused, own_model, what, monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 0.2)
    damage, complaint = BROKEN_MODELS[what]
    damage(own_model)
    assert_names(refused(model_name="model"), "model", complaint)


def test_a_template_that_refuses_the_system_message(refused, typed, own_model):
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template = refuses + "{{ messages[-1].content }}"
    change_json(own_model, "tokenizer_config.json", chat_template=template)
    message = refused(model_name="model", system_prompt="Think.")
    assert_names(message, "chat template (model) refuses", "no system", 'system_prompt = ""')
    assert typed(model_name="model", system_prompt="", max_updates=1)[0] == 0, "as advised"


@pytest.mark.parametrize("template", ["{% if %}", "{{ messages[0].content + 1 }}"])
def test_an_own_template_that_fails_is_named(refused, tmp_path, template):
    (tmp_path / "own.jinja").write_text(template)
    assert_names(refused(chat_template="own.jinja"), "chat template (own.jinja) refuses the prompt")


def test_a_token_id_beyond_the_vocabulary(refused, tmp_path):
    make_model(tmp_path / "model", vocab=100)
    message = refused(model_name="model")
    assert_names(message, "tokenizer of model gives token id", "100: they do not belong together")


def test_full_fine_tuning_of_a_quantized_model(refused, own_model):
    from mlx_lm.utils import load, quantize_model, save_model

    model, _, config = load(str(own_model), return_config=True)
    quantized, config = quantize_model(model, config, 64, 4)[:2]
    (own_model / "model.safetensors").unlink()
    save_model(own_model, quantized)
    (own_model / "config.json").write_text(json.dumps(config))
    message = refused(model_name="model", train_type="full")
    assert_names(message, "model is quantized", "no gradient", "train_type = lora")


def test_lora_settings(refused):
    message = refused(train_type="lora", lora_keys=["q_proj"])
    assert_names(
        message, "lora_keys ['q_proj'] match nothing", "self_attn.q_proj, self_attn.v_proj"
    )
    assert "norm" not in message, "what can't be adapted is no advice"
    # "auto" means full fine-tuning of this model, so the rank would do nothing.
    assert_names(refused(lora_rank=4), "lora_rank has no effect with train_type = full")


ADAPTERS = {
    "missing": (None, "adapter_config.json cannot be read: No such file"),
    "no JSON": ("{", "adapter_config.json cannot be read"),
    "a list": ("[]", "holds no JSON object"),
    "not adapters": ('{"fine_tune_type": "full"}', "fine_tune_type = 'full' is not lora or dora"),
    "another kind": ('{"fine_tune_type": "dora"}', "holds dora adapters, but train_type = lora"),
    "incomplete": ('{"fine_tune_type": "lora"}', "no attribute 'num_layers'"),
    "no weights": (
        '{"num_layers": 2, "lora_parameters": {"rank": 2, "scale": 1.0, "dropout": 0.0}}',
        "adapters.safetensors",
    ),
}


@pytest.mark.parametrize("what", ADAPTERS)
def test_wrong_adapters(refused, tmp_path, what):
    text, complaint = ADAPTERS[what]
    (tmp_path / "adapters").mkdir()
    if text is not None:
        (tmp_path / "adapters" / "adapter_config.json").write_text(text)
    message = refused(adapter_path="adapters", train_type="lora")
    assert_names(message, "adapter", complaint)


DATA = {
    "empty.jsonl": (b"\n", "empty.jsonl holds no rows"),
    "a.jsonl": (
        b'{"question": "a", "answer": 1}\n{"question": "a" "answer": 1}\n',
        "a.jsonl, line 2, column 18: not JSON: Expecting ',' delimiter",
    ),
    "list.jsonl": (b"[1]\n", "list.jsonl, line 1: expected an object, found list"),
    "deep.jsonl": (b"[" * 100_000, "deep.jsonl, line 1, column 1: not JSON: nested too deeply"),
    "latin.jsonl": (b'{}\n{"question": "\xff"}', "latin.jsonl, line 2, column 15: not UTF-8 text"),
    "empty.json": (b"", "empty.json, line 1, column 1: not JSON"),
    "a.json": (b'[{"question": "a"},\n {"question" 2}]', "a.json, line 2, column 14: not JSON"),
    "object.json": (b'{"question": "a"}', "object.json: expected a list of objects"),
    "deep.json": (b"[" * 100_000, "deep.json: not JSON: nested too deeply"),
    "head.csv": (b"question,answer\n", "head.csv holds no rows"),
    "more.csv": (
        b"question,answer\nwhat,1\nwhy,2,3\n",
        "more.csv, line 3: expected 2 columns (question, answer), found 3",
    ),
    "less.csv": (b"question,answer\nwhat\n", "less.csv, line 2: expected 2 columns"),
    "open.csv": (b'question,answer\n"what,1\n', "open.csv, line 2: unexpected end of data"),
    "twice.csv": (b"question,answer,answer\na,1,2\n", "line 1: two columns have the same name"),
    "latin.csv": (b"question,answer\na,\xff\n", "latin.csv, line 2, column 3: not UTF-8 text"),
    "semicolon.csv": (
        b"question;answer\na;1\n",
        "has no column 'question'; it has question;answer",
    ),
    "empty.parquet": (b"", "empty.parquet is not a parquet file"),
    "cut.parquet": (b"PAR1 cut", "cut.parquet is not a parquet file"),
    "notes.txt": (b"hello", "notes.txt: expected one of .jsonl, .json, .csv, .parquet"),
    "digits.jsonl": (
        b'{"question": "a", "answer": ' + b"1" * 5000 + b"}\n",
        "digits.jsonl, line 1, column 1: not JSON: a number of thousands of digits",
    ),
    "digits.json": (b"[" + b"1" * 5000 + b"]", "digits.json: not JSON: a number of thousands"),
    "half.jsonl": (
        b'{"question": "a\\ud800", "answer": "1"}\n',
        "row 1: half a surrogate pair in column 'question'",
    ),
    "list.json": (
        b'[{"question": ["a", "b"], "answer": "1"}]',
        "row 1: list instead of a text in column 'question'",
    ),
    "nan.jsonl": (b'{"question": "why", "answer": NaN}\n', "row 1: nothing in column 'answer'"),
    "blank.jsonl": (
        b'{"question": "a", "answer": "1"}\n{"question": "why", "answer": " "}\n',
        "row 2: nothing in column 'answer': {'question': 'why'",
    ),
    "none.jsonl": (b'{"question": "why", "answer": null}\n', "row 1: nothing in column 'answer'"),
    "hash.jsonl": (b'{"question": "why", "answer": "so ####"}\n', "nothing in column 'answer'"),
    "lacks.jsonl": (
        b'{"question": "a", "answer": "1"}\n{"answer": "2"}\n',
        "row 2: nothing in column 'question': {'answer': '2'}",
    ),
}


@pytest.mark.parametrize("name", DATA)
def test_a_bad_data_file(refused, tmp_path, name):
    content, complaint = DATA[name]
    (tmp_path / name).write_bytes(content)
    assert_names(refused(dataset=name), name, complaint)


def test_data_that_is_not_there(refused, tmp_path):
    assert_names(refused(dataset="none.jsonl"), "dataset none.jsonl does not exist")
    (tmp_path / "questions.jsonl").touch()
    message = refused(dataset=str(tmp_path / "question.jsonl"))
    assert_names(message, f"does not exist; did you mean {tmp_path / 'questions.jsonl'}?")
    assert_names(refused("--dry-run", dataset="~/none"), "/none does not exist")
    (tmp_path / "folder").mkdir()
    message = refused(dataset="folder")
    assert_names(message, "dataset folder has no file train.jsonl (or .json, .csv, .parquet)")
    message = refused(question_column="prompt_text")
    assert_names(message, "no column 'prompt_text'; it has question, answer", "set question_column")


def test_links_that_lead_nowhere(refused, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to("nowhere")
    for name in ("loop", "gone"):
        assert_names(refused(dataset=name), f"dataset {name} is a link that leads nowhere")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").symlink_to("train.jsonl")
    assert_names(refused(dataset="folder"), "dataset folder has no file train.jsonl")
    (tmp_path / "around").mkdir()
    (tmp_path / "around" / "again").symlink_to("..")
    assert_names(refused(dataset="around/again/around"), "has no file train.jsonl")


def test_names_that_no_file_system_takes(refused):
    for key in ("model_name", "dataset", "output_dir", "chat_template", "resume"):
        for path in ("x" * 300, "x/" * 2000):
            assert_names(refused(**{key: path}), f"{key} = 'x", "is too long for a file name")


def test_a_run_name_is_no_path_and_a_null_in_a_question_is_a_character(typed, tmp_path):
    row = json.dumps({"question": "How many is 3\0 and 4?", "answer": "7"})
    (tmp_path / "null.jsonl").write_text(f"{row}\n" * 4)
    code, _, err, changed = typed(
        dataset="null.jsonl", run_name="../../a/b", max_updates=1, report_to=["csv"]
    )
    assert code == 0, err
    assert all(name == "out" or name.startswith("out/") for name in changed - {"settings.toml"})


def test_one_row_is_too_few_to_hold_some_out(refused, tmp_path):
    (tmp_path / "one.jsonl").write_text('{"question": "a", "answer": "1"}\n')
    message = refused(dataset="one.jsonl", eval_samples=1)
    assert_names(message, "one.jsonl has one row, but evaluation needs another", "eval_samples = 0")


def test_a_row_that_is_held_out_is_named_by_its_place_in_the_file(refused, tmp_path):
    rows = [{"question": "a", "answer": str(n)} for n in range(20)]
    rows[18]["answer"] = ""  # the last two are for evaluation
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    message = refused(dataset="mine.jsonl", eval_samples=1)
    assert_names(message, "mine.jsonl (test), row 19: nothing in column 'answer'")


def test_prompts_that_are_all_too_long(refused):
    message = refused(max_prompt_length=3)
    assert_names(message, "all 24 training prompts", "max_prompt_length = 3 tokens", "they have 29")
    message = refused(max_completion_length=2)
    assert_names(message, "max_completion_length = 2 leaves no room after reasoning_prefix")


def offline(tmp_path, **settings):
    """The command in a process that has no hub, with nothing cached."""
    config = write_toml(tmp_path, {"output_dir": "out", **settings})
    before = tree(tmp_path)
    home = tmp_path.with_name(f"{tmp_path.name}-home")
    line = f"python {SCRIPT} --config {config}"
    done = typed_in_a_shell(line, tmp_path, HF_HUB_OFFLINE="1", HF_HOME=str(home))
    assert tree(tmp_path) == before
    return done.returncode, done.stdout, done.stderr


def test_a_model_from_a_hub_out_of_reach(tmp_path, data_dir):
    code, out, err = offline(tmp_path, model_name="owner/model", dataset=str(data_dir))
    message = the_message(code, out, err, expected_code=1)
    assert_names(message, "model owner/model cannot be loaded from the hub", "HF_HUB_OFFLINE=0")
    assert err.endswith("\nA folder works too: --set model_name=FOLDER\n")


def test_a_data_set_from_a_hub_out_of_reach(tmp_path, model_dir):
    code, out, err = offline(tmp_path, model_name=str(model_dir), dataset="owner/questions")
    message = the_message(code, out, err, expected_code=1)
    assert_names(
        message,
        "data set owner/questions (main, train) cannot be loaded from the hub: Couldn't reach",
        "A local file works too: --set dataset=FILE",
    )


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConnectionError("Couldn't reach the hub"), 1),
        (ValueError("Unknown split 'train'. Should be one of ['validation']."), 2),
        (FileNotFoundError("Dataset 'owner/questions' doesn't exist on the Hub"), 2),
    ],
    ids=["out of reach", "unknown split", "unknown name"],
)
def test_what_the_hub_answers_decides_the_exit_code(typed, monkeypatch, error, code):
    def load_dataset(*_, **__):
        raise error

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    got, out, err, changed = typed(dataset="owner/questions")
    assert_names(the_message(got, out, err, code), str(error))
    assert not changed


def test_retries_of_the_hub_are_said_once(typed, monkeypatch):
    def load_dataset(*_, **__):
        for retry in range(5):
            logger.warning("'[Errno -2]' thrown while requesting HEAD; retry %d", retry)
        raise ConnectionError("Couldn't reach the hub")

    logger = logging.getLogger("huggingface_hub.utils._http")
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    code, out, err, _ = typed(dataset="owner/questions")
    assert (code, out.count("no answer from the hub yet")) == (1, 1)
    assert "requesting" not in out + err
    assert not logger.filters


def test_an_output_folder_that_cannot_be(refused, tmp_path):
    (tmp_path / "file").touch()
    for place in ("file", "file/deeper/out"):
        assert_names(refused(output_dir=place), f"output_dir {place} is not writable", "(file)")


def test_the_root_is_no_output_folder(refused):
    for place in ("/", "/usr/.."):
        assert_names(refused(output_dir=place), "is the root of the file system: name a folder")


@pytest.mark.skipif(sys.platform != "linux" and os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_output_folder(tmp_path, model_dir, data_dir):
    (tmp_path / "locked").mkdir()
    values = {"model_name": str(model_dir), "dataset": str(data_dir), "output_dir": "locked/out"}
    config = write_toml(tmp_path, values)
    (tmp_path / "locked").chmod(0o555)
    drop = lose_the_right_to_write_everywhere if os.geteuid() == 0 else None
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--config", config],
        cwd=tmp_path,
        preexec_fn=drop,
        capture_output=True,
        text=True,
    )
    message = the_message(done.returncode, done.stdout, done.stderr)
    assert_names(message, "output_dir locked/out is not writable (locked)")
    assert tree(tmp_path).keys() == {"settings.toml", "locked"}


def ready_commands(text):
    return [line.strip() for line in text.splitlines() if " --set " in line]


def test_a_folder_with_another_run_and_both_ways_out(typed, tmp_path):
    run = {"max_updates": 4, "save_steps": 6}
    words = ["--set", "run_name=two words, $HOME and 'quotes'"]
    assert typed(*words, **run)[0] == 0
    (tmp_path / "out" / "notes.txt").write_text("mine")
    shutil.rmtree(tmp_path / "out" / "final")  # as if it had been killed just before its end

    code, out, err, changed = typed(*words, **run)
    message = the_message(code, out, err)
    assert not changed
    assert_names(message, "output_dir out already holds a run (config.resolved.json)")
    go_on, replace = ready_commands(message)

    done = typed_in_a_shell(go_on, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "out/checkpoint-6 at update 3" in done.stdout
    assert [record["update"] for record in read_log(tmp_path / "out")] == [1, 2, 3, 4]
    done = typed_in_a_shell(replace, tmp_path)
    assert done.returncode == 0, done.stderr
    assert [record["update"] for record in read_log(tmp_path / "out")] == [1, 2, 3, 4]
    resolved = json.loads((tmp_path / "out" / "config.resolved.json").read_text())
    assert resolved["run_name"] == "two words, $HOME and 'quotes'"
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine", "only the run is replaced"


@pytest.mark.parametrize("save_steps", [0, 2])
def test_a_finished_run_can_only_be_replaced(typed, refused, save_steps):
    """To continue it is no error, so that a loop of restarts comes to an end, and does nothing."""
    run = {"max_updates": 1, "save_steps": save_steps}
    assert typed(**run)[0] == 0
    assert [command.split()[-1] for command in ready_commands(refused(**run))] == ["overwrite=true"]
    code, out, err, changed = typed("--resume", **run)
    assert (code, err, changed) == (0, "", set())
    assert out == "finished  the run in out was complete: see out/final\n"
    message = refused("--resume", **run | {"max_updates": 2})
    assert_names(message, "max_updates (was 1, is 2)", "another output_dir")


def test_a_model_that_overwriting_would_delete(typed, refused, tmp_path):
    assert typed(max_updates=1)[0] == 0
    message = refused(model_name="out/final", overwrite=True)
    assert_names(message, "overwrite would delete model_name = ", "choose another output_dir")
    data = tmp_path / "out" / "final" / "train.jsonl"
    data.write_text('{"question": "1 + 1?", "answer": "2"}\n')
    message = refused(dataset=str(data), overwrite=True)
    assert_names(message, "overwrite would delete dataset = ", "choose another output_dir")
    data.unlink()
    settings = {"model_name": "out/final", "output_dir": "second", "max_updates": 1}
    assert typed(**settings, overwrite=True)[0] == 0, "as advised"


def test_a_wired_limit_that_metal_refuses(refused, monkeypatch):
    def refuse(_):
        raise ValueError("[metal] above the recommended size")

    monkeypatch.setattr("mlx.core.set_wired_limit", refuse)
    assert_names(refused(wired_limit_gb=9.5), "wired_limit_gb = 9.5: [metal] above the recommended")


def test_resuming_with_another_setting_or_a_damaged_checkpoint(typed, refused, tmp_path):
    run = {"max_updates": 2, "save_steps": 2, "learning_rate": 1e-3}
    assert typed(**run)[0] == 0
    shutil.rmtree(tmp_path / "out" / "final")
    message = refused(**run | {"learning_rate": 2e-3}, resume="auto")
    assert_names(message, "learning_rate (was 0.001, is 0.002)", "set them back", "output_dir")
    assert "seed" not in message, "only what differs is named"
    (tmp_path / "out" / "checkpoint-4" / "trainer_state.safetensors").write_bytes(b"cut")
    message = refused(**run, resume="out/checkpoint-4")
    assert_names(message, "out/checkpoint-4 is damaged: trainer_state.safetensors has 3 bytes")
    assert refused(**run, resume="checkpoint-4") == message, "its name in output_dir will do"


POSITIONS = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_ctx": 40, "n_positions": 40}
POSITIONS |= {"layer_norm_epsilon": 1e-5, "model_type": "gpt2"}


def test_more_tokens_than_the_model_was_made_for(typed, refused, tmp_path):
    """Rotary positions go on, which is said; a table of positions ends, which nobody checks."""
    rotary = make_model(tmp_path / "rotary", max_position_embeddings=40)
    code, out, err, _ = typed(model_name=str(rotary), max_updates=1)
    said = re.search(rf"^context   (\d+) tokens are more than the 40 that {rotary} was", out, re.M)
    assert (code, err) == (0, "")
    assert int(said[1]) > 40
    code, out, *_ = typed(model_name=str(rotary), max_updates=1, max_new_tokens=2, overwrite=True)
    assert (code, "context" in out) == (0, False)
    table = make_model(tmp_path / "table", **POSITIONS)
    message = refused(model_name=str(table), max_updates=1, overwrite=True)
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
@pytest.mark.parametrize("new", [30, 33])
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
            code, _, err, _ = typed(model_name=str(folder), max_updates=1, overwrite=True)
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


REWARDS = """
import math

def scores(completions, **_):
    return [1.0] * len(completions)

def raises(completions, **_):
    raise KeyError("points")

def short(completions, **_):
    return [1.0]

def nan(completions, **_):
    return [math.nan] * len(completions)

def inf(completions, **_):
    return [0.0, -math.inf] * (len(completions) // 2)

def text(completions, **_):
    return "1" * len(completions)

def texts(completions, **_):
    return ["1.0"] * len(completions)

def nothing(completions, **_):
    pass
"""
FAILING = {
    "raises": ("raised KeyError: 'points' (", "mine.py, line 8)"),
    "short": ("returned 1 values for 8 completions",),
    "nan": ("returned nan, not a finite number or None, for the completion:\n<reasoning>",),
    "inf": ("returned -inf, not a finite number or None",),
    "text": ("returned '11111111', not a list of one number a completion",),
    "texts": ("returned '1.0', not a finite number or None",),
    "nothing": ("returned None, not a list of one number a completion",),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_reward_that_fails_ends_the_run(typed, tmp_path, name):
    (tmp_path / "mine.py").write_text(REWARDS)
    code, out, err, _ = typed(reward_funcs=[f"mine.py:{name}"], max_updates=1)
    assert code == 1
    assert err.startswith(f"error: reward mine.py:{name} ")
    assert "Traceback" not in err
    assert_names(err, *FAILING[name])
    assert "stopped   " in out
    assert not (tmp_path / "out" / "final").exists()


REWARD_NAMES = [
    ("corectness", "not built in (correctness, int, ", "did you mean 'correctness'?"),
    ("mine.py", "own functions are written module:function or file.py:function"),
    (":scores", "own functions are written module:function"),
    ("mine.py:score", "mine.py has no function 'score'; did you mean 'scores'?"),
    ("mine.py:REWARD", "mine.py has no function 'REWARD'"),
    ("none.py:scores", "file none.py does not exist"),
    ("no_such_module:scores", "cannot be imported: ModuleNotFoundError: No module named"),
    ("os.path:scores", "os.path has no function 'scores'"),
    ("broken.py:scores", "cannot be imported: SyntaxError: ", "(broken.py, line 2)"),
    ("needs.py:scores", "No module named 'no_such_module'", "needs.py, line 1)"),
]


@pytest.mark.parametrize("case", REWARD_NAMES, ids=[case[0] for case in REWARD_NAMES])
def test_a_reward_that_is_not_there(refused, tmp_path, case):
    (tmp_path / "mine.py").write_text(REWARDS + "REWARD = 3\n")
    (tmp_path / "broken.py").write_text("\ndef scores(:\n")
    (tmp_path / "needs.py").write_text("import no_such_module\n")
    spec, *parts = case
    assert_names(refused(reward_funcs=[spec]), f"reward {spec!r}", *parts)


def test_debug_adds_the_traceback_and_keeps_message_and_code(typed):
    code, _, err, changed = typed("--debug", dataset="none.jsonl")
    assert code == 2
    assert "Traceback (most recent call last)" in err
    assert err.endswith("error: dataset none.jsonl does not exist\n")
    assert not changed


def test_an_unknown_option_is_a_usage_error(grpo, capsys):
    with pytest.raises(SystemExit) as stop:
        grpo.main(["--confg", "x.toml"])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.endswith("error: unrecognized arguments: --confg x.toml\n")


def test_a_settings_file_without_its_option_is_told_where_it_goes(grpo, capsys):
    with pytest.raises(SystemExit) as stop:
        grpo.main(["configs/tiny_math.toml"])
    assert stop.value.code == 2
    assert "a settings file goes behind --config: --config configs/tiny_" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [["--learning_rate", "1e-5"], ["--learning-rate=1e-5", "--seed"], ["learning_rate=1e-5"]],
)
def test_a_setting_without_its_option_is_told_where_it_goes(grpo, capsys, words):
    """As other trainers have it, and as it stands in a TOML file."""
    with pytest.raises(SystemExit):
        grpo.main(words)
    assert capsys.readouterr().err.endswith("go behind --set: --set learning_rate=1e-5\n")
