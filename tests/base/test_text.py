"""Passwords and tokens reach no output, no log, no tracker and no file of a run."""

import base64
import html
import importlib.util
import json
import re
import urllib.parse
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


@pytest.fixture(autouse=True)
def own_secrets(monkeypatch):
    """What one test has for a secret is none for the next."""
    monkeypatch.setattr(text, "_secrets", set())


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


def test_the_environment_is_looked_at_once_for_a_whole_value(monkeypatch):
    looked = []

    class Environment(dict):
        def items(self):
            looked.append(1)
            return super().items()

    monkeypatch.setattr(text.os, "environ", Environment(HF_TOKEN=TOKEN))
    value = {"a": [f"with {TOKEN}", {TOKEN: 1}], "b": ("x", TOKEN)}
    assert text.redacted(value) == {"a": ["with ***", {"***": 1}], "b": ["x", "***"]}
    assert len(looked) == 1


AWKWARD = "k/e y+'\"é\\n1=23&x"
FORMS = {
    "plain": str,
    "repr": repr,
    "repr-of-repr": lambda text: repr(repr(text)),
    "bytes": lambda text: repr(text.encode()),
    "json": json.dumps,
    "json-of-json": lambda text: json.dumps(json.dumps(text)),
    "unicode-json": lambda text: json.dumps(text, ensure_ascii=False),
    "path": urllib.parse.quote,
    "parameter": lambda text: urllib.parse.quote(text, safe=""),
    "form": urllib.parse.quote_plus,
    "lower-case": lambda text: urllib.parse.quote(text, safe="").replace("%2F", "%2f"),
    "twice": lambda text: urllib.parse.quote(urllib.parse.quote(text, safe="")),
    "html": html.escape,
    "hex": lambda text: text.encode().hex(),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_secret_is_hidden_however_it_is_written(form):
    written = FORMS[form](AWKWARD)
    told = text.redact(f"no answer from http://host/a/{written}/b", [AWKWARD])
    assert AWKWARD[:3] not in told
    assert "23" not in told
    assert told.startswith("no answer from http://host/a/")
    assert told.endswith("/b")
    assert "***" in told


@pytest.mark.parametrize("before", ["", "a", "ab", "anna:", "anna1:"])
@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode])
def test_a_secret_is_hidden_in_base64(before, encode):
    """Of basic authentication: whatever stands before it and behind it."""
    secret = "pa?ss~wo>rd"
    for after in ("", "x", "yz"):
        encoded = encode((before + secret + after).encode()).decode()
        told = text.redact(f"header {encoded} sent", [secret])
        left = told.removeprefix("header ").removesuffix(" sent").split("***")
        assert len(left) == 2
        assert all(len(part) <= len(before) * 4 / 3 + 6 for part in left)
    assert text.redact("Authorization: Basic YTpi") == "Authorization: Basic ***"
    assert text.redact("{'Authorization': 'Basic YTpi'}") == "{'Authorization': 'Basic ***'}"


def test_of_secrets_that_begin_alike_none_shows(monkeypatch):
    secrets = ["abcdefgh", "abcdefgh-and-more", "abcdefgh-and-more/still"]
    for order in (secrets, secrets[::-1]):
        assert text.redact(" ".join(secrets), order) == "*** *** ***"
    for name, value in zip(("A_KEY", "B_KEY", "C_TOKEN"), secrets, strict=True):
        monkeypatch.setenv(name, value)
    assert text.redact(f"x{secrets[2]}y {urllib.parse.quote(secrets[2], safe='')}") == "x***y ***"


def test_short_secrets_are_hidden_as_words_and_an_empty_one_nowhere():
    text.keep_secrets(["", "q7Z"])
    assert text.redact("/q7Z/get?k=q7Z&x=%2Fq7Z, not aq7Zb") == "/***/get?k=***&x=%2F***, not aq7Zb"
    assert text.redact("ordinary text", [""]) == "ordinary text"


def test_a_secret_whose_variable_is_gone_stays_hidden(monkeypatch):
    monkeypatch.setenv("OLD_TOKEN", "value-of-old-token")
    text.redact("anything")
    monkeypatch.delenv("OLD_TOKEN")
    assert text.redact("was value-of-old-token") == "was ***"


def test_names_and_headers_that_say_it():
    assert text.redact("{'x-api-key': 'abc', 'n': 'abc'}") == "{'x-api-key': '***', 'n': 'abc'}"
    assert (
        text.redact("Client(api_key='abc', max_tokens=5)") == "Client(api_key='***', max_tokens=5)"
    )
    value = {"headers": {"Authorization": "abc", "Cookie": ["a"]}, "password": 12345, "auth": True}
    assert text.redacted(value) == {
        **{"headers": {"Authorization": "***", "Cookie": ["***"]}, "password": "***"},
        "auth": True,
    }
    assert text.redacted({URL: {"x": 1}}) == {text.redact(URL): {"x": 1}}


# What a terminal obeys.

OBEYED = {
    "clipboard": "\x1b]52;c;ZXZpbA==\x07",
    "title": "\x1b]0;evil\x1b\\",
    "clear": "\x1b[2J\x1b[H",
    "c1": "\x9b2J\x9d0;x\x9c\x90q\x85",
    "line": "real\rfake",
    "backspace": "bad\x08\x08\x08",
    "bell": "\a\x0e\x0f\x0b\x0c\x7f\0",
    "bidi": "\u202eabc\u202c\u2066x\u2069\u202d",
}
COMMANDING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@pytest.mark.parametrize("kind", OBEYED)
def test_what_a_terminal_obeys_is_shown(kind):
    given = OBEYED[kind]
    told = text.visible(f"a\n\tb {given} c")
    assert not COMMANDING.search(told)
    assert told.startswith("a\n\tb ")
    assert "\\" in told
    line = text.json_line({"text": given})
    assert not COMMANDING.search(line)
    assert json.loads(line) == {"text": given}, "the data are the same"


def test_ordinary_text_stays_as_it_is():
    for given in ("a\n\n\tb", "naïve 数学 \u05d0\u05d1 ✓ 👍🏽 \u200e", "\\x1b[2J as text"):
        assert text.visible(given) == given
    assert text.visible("of Windows\r\nlines\r\n") == "of Windows\nlines\n"


EVIL_REWARD = """
def tells(completion_ids, question, log_extra, **_):
    log_extra("a \\x1b[2J column", [{question[0]: "\\x9b"}] * len(question))
    return [float(sum(ids) % 101) for ids in completion_ids]

def fails(completions, question, **_):
    raise ValueError("it was " + question[0])
"""


def test_a_run_shows_what_a_terminal_would_obey(run, tmp_path):
    """Of questions, answers, columns, file names, settings and errors; files hold it as it is."""
    every = "".join(OBEYED.values())
    (tmp_path / "mine.py").write_text(EVIL_REWARD)
    rows = [{"question": f"Q {every} {n}?", "answer": f"{every}{n}"} for n in range(8)]
    for split in ("train", "test"):
        path = tmp_path / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    evil = every.replace("\0", "")
    shown, _ = run(reward_funcs=["mine.py:tells"], run_name=evil, closing_note=evil)
    assert shown.returncode == 0
    assert r"a \x1b[2J column: {'Q \x1b]52" in shown.stdout
    planned, _ = run("--dry-run", closing_note=evil)
    failed, _ = run("--debug", reward_funcs=["mine.py:fails"], overwrite=True)
    assert "it was Q " in failed.stderr
    refused, _ = run(dataset=f"no{evil}where.jsonl")
    unknown, _ = run(**{"reward_funcs": [f"mine.py:{evil}"]})
    for done, code in ((planned, 0), (failed, 1), (refused, 2), (unknown, 2)):
        assert done.returncode == code, done.stderr
    for done in (shown, planned, failed, refused, unknown):
        assert not COMMANDING.search(done.stdout + done.stderr)
