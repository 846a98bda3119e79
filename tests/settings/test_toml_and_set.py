"""Settings from TOML and --set: precedence, types, names; what may be shown of them."""

import dataclasses
import json
from pathlib import Path

import pytest
from conftest import ROOT
from helpers import assert_names, the_message, tree, write_toml
from hypothesis import given
from hypothesis import strategies as st

from utils.settings import reading


def test_help_names_every_setting_with_default_and_meaning(grpo, capsys):
    with pytest.raises(SystemExit) as stop:
        grpo.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(grpo.MLXGRPOConfig):
        value = getattr(grpo.MLXGRPOConfig(), field.name)
        entry = text.partition(f"\n  {field.name} = {value!r}\n")[2]
        assert len(entry.splitlines()[0].strip()) > 10, f"{field.name} is not explained"


def test_precedence_is_defaults_then_toml_then_set(grpo, tmp_path):
    flat = write_toml(tmp_path, {"seed": 1, "learning_rate": 3e-5})
    config = grpo.read_config(flat, ["seed=2", "batch_size=3", "seed=4"])
    assert (config.seed, config.learning_rate, config.batch_size) == (4, 3e-5, 3)
    assert config.num_generations == grpo.MLXGRPOConfig().num_generations
    table = tmp_path / "table.toml"
    table.write_text("[mlx_grpo]\n" + Path(flat).read_text())
    assert grpo.read_config(str(table), []) == grpo.read_config(flat, [])
    assert grpo.read_config(flat, []).seed == 1


OVERRIDES = [
    ('num_generations="32"', "num_generations", 32),
    ("num_generations='32'", "num_generations", 32),
    (" num_generations = 32 ", "num_generations", 32),
    ("model_name=owner/foo", "model_name", "owner/foo"),
    ('model_name="owner/foo"', "model_name", "owner/foo"),
    ("run_name=7", "run_name", "7"),
    ("run_name=a=b # c", "run_name", "a=b # c"),
    ("system_prompt=", "system_prompt", ""),
    (r'system_prompt="two\nlines"', "system_prompt", "two\nlines"),
    ("learning_rate=1e-5", "learning_rate", 1e-5),
    ("learning_rate=1", "learning_rate", 1.0),
    ("use_compile=false", "use_compile", False),
    ('use_compile="false"', "use_compile", False),
    ("max_train_samples=7_473", "max_train_samples", 7473),
    ("reward_funcs=correctness,int", "reward_funcs", ["correctness", "int"]),
    ("reward_funcs=[correctness, int]", "reward_funcs", ["correctness", "int"]),
    ("reward_funcs=['correctness', \"int\"]", "reward_funcs", ["correctness", "int"]),
    ("reward_funcs=int", "reward_funcs", ["int"]),
    ("reward_weights=1,0.5,2,0", "reward_weights", [1.0, 0.5, 2.0, 0.0]),
    ("stop_strings=[]", "stop_strings", []),
    ("stop_strings=['a, b']", "stop_strings", ["a, b"]),
    (
        "chat_template_kwargs={enable_thinking=false}",
        "chat_template_kwargs",
        {"enable_thinking": False},
    ),
    ("output_dir=~/runs", "output_dir", str(Path("~/runs").expanduser())),
]


@pytest.mark.parametrize(("text", "key", "value"), OVERRIDES, ids=[case[0] for case in OVERRIDES])
def test_values_of_set(grpo, tmp_path, text, key, value):
    config = grpo.read_config(write_toml(tmp_path, {}), [text])
    assert getattr(config, key) == value
    assert type(getattr(config, key)) is type(value)
    others = {f.name for f in dataclasses.fields(config)} - {key}
    assert all(getattr(config, name) == getattr(grpo.MLXGRPOConfig(), name) for name in others)


def test_without_any_configuration_the_default_preset_is_read(grpo, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert grpo.read_config(None, []) == grpo.read_config("configs/default.toml", [])


WRONG = [
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
]


@pytest.mark.parametrize(("override", "complaint"), WRONG, ids=[case[0][:40] for case in WRONG])
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


def test_only_what_may_be_secret_is_left_out():
    kept = "see https://example.org/a/b#c and mailto:me@x.y, 3 > 2?"
    assert reading.without_secrets(kept) == kept
    assert reading.without_secrets(["http://u:p@h:1/a?k=v#f"]) == ["http://***@h:1/a?***#f"]
    assert reading.without_secrets({"a": {"b": "https://key@h/"}, "c": 3}) == {
        "a": {"b": "https://***@h/"},
        "c": 3,
    }
    assert reading.shown_override("remote_rm_url=http://h:1/a") == "remote_rm_url=http://h:1/a"
    assert reading.shown_override("system_prompt=http://h?a=b") == "system_prompt=http://h?a=b"


TOKEN = st.text("ab@:'\"[],{}=&;!*$~", min_size=3).filter(lambda t: t.strip(":@"))


@given(TOKEN, TOKEN)
def test_no_password_and_no_query_survives(password, query):
    """Whatever they hold, short of what ends them in a URL."""
    url = f"http://user:X{password}X@host:1/rm?key=Y{query}Y"
    for text in (
        str(reading.without_secrets([url, {"url": url}])),
        reading.shown_override(f"remote_rm_url={url}"),
        reading.shown_override(f"remote_rm_url={json.dumps([url, url])}"),
    ):
        assert "X" not in text
        assert "Y" not in text
