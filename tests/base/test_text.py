"""Passwords and tokens reach no output, no log, no tracker and no file of a run."""

import importlib.util
import json
from types import SimpleNamespace

import pytest
from helpers import QUIET, write_toml

from utils.base import text

TOKEN, KEY = "hf_Zq8RtVw3XyPl0KmNb7GdSa2", "cafe0123-not-for-you"
ADDRESS, PARAMETER = "hunter2hunter2", "p4rameter"
SECRETS = (TOKEN, KEY, ADDRESS, PARAMETER)
URL = f"https://ann:{ADDRESS}@host.example/reward?name=x&api_key={PARAMETER}"
TRACKERS = ["csv", *(["tensorboard"] if importlib.util.find_spec("tensorboardX") else [])]
ENVIRONMENT = {"HF_TOKEN": TOKEN, "WANDB_API_KEY": KEY, "MLX_GRPO_CONFIG": ""}
REWARD = """
import os

def digest(completion_ids, **_):
    print("started with", len(os.environ["HF_TOKEN"]), "characters")
    return [float(sum(ids) % 101) for ids in completion_ids]

def leaks(completions, **_):
    raise ValueError("no answer from {url} with " + os.environ["WANDB_API_KEY"])
"""


@pytest.fixture
def run(grpo, tmp_path, model_dir, monkeypatch, capfd):
    """Type the command with secrets wherever a person may put them: (result, all that it wrote)."""
    (tmp_path / "mine.py").write_text(REWARD.replace("{url}", URL))
    rows = [{"question": f"Is {TOKEN} the token {n}?", "answer": str(n)} for n in range(8)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        **QUIET,
        **{"model_name": str(model_dir), "dataset": str(tmp_path), "output_dir": "out"},
        **{"max_updates": 2, "save_steps": 2, "log_completions": 2, "eval_samples": 2},
        **{"report_to": TRACKERS, "run_name": f"with {URL}", "closing_note": URL},
        "chat_template_kwargs": {"api_key": KEY, "endpoint": URL},
    }

    monkeypatch.chdir(tmp_path)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)

    def typed(*words, **changes):
        config = write_toml(tmp_path, settings | changes)
        capfd.readouterr()
        code = grpo.main(["--config", config, *words])
        out, err = capfd.readouterr()
        done = SimpleNamespace(returncode=code, stdout=out, stderr=err)
        files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
        return done, {str(path): path.read_bytes() for path in files}

    return typed


def assert_none_leaked(done, files):
    for secret in SECRETS:
        assert secret not in done.stdout, done.stdout
        assert secret not in done.stderr, done.stderr
        leaking = [name for name, data in files.items() if secret.encode() in data]
        assert not leaking, secret


def test_a_run_keeps_secrets_to_itself(run):
    done, files = run(reward_funcs=["mine.py:digest"])
    assert done.returncode == 0, done.stderr
    names = {name.rpartition("/")[2] for name in files}
    assert {"config.resolved.json", "provenance.json", "training_log.jsonl"} <= names
    assert {"trainer_state.json", "metrics.csv"} <= names
    assert "tensorboard" not in TRACKERS or any(name.startswith("events.out") for name in names)
    assert "Is *** the token" in done.stdout, "completions are shown, with their questions"
    assert_none_leaked(done, files)
    resolved = next(data for name, data in files.items() if name.endswith("config.resolved.json"))
    assert json.loads(resolved)["closing_note"] == (
        "https://***@host.example/reward?name=x&api_key=***"
    )

    done, files = run(f"--set=closing_note=again {URL}", reward_funcs=["mine.py:digest"])
    assert done.returncode == 2, "another run is there; the command that replaces it is shown"
    assert "overwrite=true" in done.stderr
    assert_none_leaked(done, files)

    more = {"max_updates": 2, "resume": "auto", "reward_funcs": ["mine.py:digest"]}
    assert_none_leaked(*run(**more))


@pytest.mark.parametrize("words", [[], ["--debug"]], ids=["plain", "debug"])
def test_an_error_that_tells_a_secret_is_shown_without_it(run, words):
    done, files = run(*words, reward_funcs=["mine.py:leaks"])
    assert done.returncode == 1
    assert "no answer from https://***@host.example/reward?name=x&api_key=*** with ***" in (
        done.stderr
    )
    assert_none_leaked(done, files)


def test_a_setting_that_is_refused_or_planned_is_shown_without_secrets(run):
    done, files = run("--dry-run")
    assert done.returncode == 0, done.stderr
    assert not files
    assert_none_leaked(done, files)
    done, files = run(dataset=f"{URL}&file=a.jsonl")
    assert done.returncode == 2
    assert_none_leaked(done, files)


SHOWN = [
    ("https://ann:pass@host/x", "https://***@host/x"),
    ("https://ann:p@ss@host/x", "https://***@host/x"),
    ("redis://:pass@host", "redis://***@host"),
    ("https://h/x?token=abc&max_tokens=5#top", "https://h/x?token=***&max_tokens=5#top"),
    ("https://h/x?X-Amz-Signature=abc;sig=d", "https://h/x?X-Amz-Signature=***;sig=***"),
    ("Authorization: Bearer abcdefghijklmnop12", "Authorization: Bearer ***"),
    (f"login with {TOKEN}", "login with ***"),
    ("max_new_tokens = 512, eos_token = '</s>'", None),
    ("mail ann@host.example, see https://host.example/a?b=c", None),
    ("a bearer of good news; basic arithmetic; task-oriented sk-learn", None),
]


@pytest.mark.parametrize(("given", "expected"), SHOWN)
def test_what_is_hidden_and_what_is_not(given, expected):
    assert text.redact(given) == (given if expected is None else expected)


def test_secrets_of_the_environment_by_their_names(monkeypatch):
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "DB_PASSWORD", "AWS_SECRET_ACCESS_KEY", "GH_PAT"):
        monkeypatch.setenv(name, f"value-of-{name}")
        assert text.redact(f"it is value-of-{name}!") == "it is ***!"
    for name in ("HF_TOKEN_PATH", "SSH_AUTH_SOCK", "TOKENIZERS_PARALLELISM", "KEYBOARD", "PATTERN"):
        monkeypatch.setenv(name, f"harmless {name}")
        assert text.redact(f"it is harmless {name}!") == f"it is harmless {name}!"
    monkeypatch.setenv("MY_TOKEN", "short")
    assert text.redact("a short word") == "a short word", "it would blot out ordinary text"


def test_values_with_secret_names_are_hidden_but_names_of_variables_are_not():
    value = {"api_key": "abc", "api_key_env": "OPENAI_API_KEY", "max_tokens": 5, "list": [URL]}
    assert text.redacted(value) == {
        **{"api_key": "***", "api_key_env": "OPENAI_API_KEY", "max_tokens": 5},
        "list": ["https://***@host.example/reward?name=x&api_key=***"],
    }
