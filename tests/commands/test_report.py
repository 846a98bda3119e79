"""utils/report.py as it is typed: what it says, and its exit codes."""

import re
import signal
import subprocess
import sys
import urllib.request

import page_runs
import pytest
from conftest import ROOT

from utils import report
from utils.run import page


@pytest.fixture
def typed(capsys, monkeypatch, tmp_path):
    """Type the command: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def type_(*words):
        code = report.main([str(word) for word in words])
        return (code, *capsys.readouterr())

    return type_


@pytest.fixture
def run(tmp_path):
    folder = page_runs.make_run(tmp_path / "run")
    page_runs.keep(folder, page_runs.groups(20))
    return folder


def test_the_page_lies_in_the_run(run, typed):
    code, out, err = typed("run")
    assert (code, err) == (0, "")
    assert re.fullmatch(r"run/report.html: 0\.\d\d MB, 1 run\n", out)
    assert (run / "report.html").is_file()


def test_of_several_runs_it_lies_here(run, typed, tmp_path):
    page_runs.make_run(tmp_path / "other")
    code, out, _ = typed("run", "other")
    assert code == 0
    assert out.splitlines()[0] == (
        "other holds no completions: curves and evaluations alone are shown"
    )
    assert (tmp_path / "report.html").is_file()
    assert typed("run", "other", "-o", "mine.html")[0] == 0
    assert (tmp_path / "mine.html").is_file()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["none"], "none is not there: name the output_dir of a run"),
        (["file"], "file is no folder"),
        (["empty"], "empty is no run's folder: it holds neither training_log.jsonl nor"),
        (["run", "./run"], "is named twice"),
        (["run", "-o", "file"], "file exists and is no page of this command"),
        (["run", "-o", "no/where.html"], "there is no folder no"),
        (["run", "-o", "empty"], "empty is a folder"),
        (["run", "--serve", "-o", "a.html"], "--serve writes no file"),
        (["run", "--port", "80"], "--port belongs to --serve"),
    ],
)
def test_bad_input(run, typed, tmp_path, words, error):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    code, out, err = typed(*words)
    assert (code, out) == (2, "")
    assert error in err
    assert len(err.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("words", [[], ["run", "--port", "x"], ["run", "--port", "65536"]])
def test_words_that_argparse_refuses(words, capsys):
    with pytest.raises(SystemExit) as stop:
        report.main(words)
    assert stop.value.code == 2


def test_damage_is_said_and_the_rest_is_shown(run, typed):
    path = run / "training_log.jsonl"
    path.write_bytes(b"\x1b[2J{\n" + path.read_bytes())
    code, _, err = typed("run")
    assert code == 0
    assert err == ("warning: run: line 1 of training_log.jsonl cannot be read; the rest is shown\n")


def test_what_does_not_fit_is_said(run, typed, monkeypatch):
    monkeypatch.setattr(page, "LIMIT", 240_000)
    code, out, _ = typed("run")
    assert code == 0
    assert re.match(r"run: (texts of \d+% of 220 groups fit|what is known of each token)", out)


def test_a_page_that_cannot_be_written_is_a_failed_run(run, typed, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page.os, "replace", full)
    code, _, err = typed("run")
    assert code == 1
    assert err == "error: run/report.html cannot be written: No space left on device\n"


def test_it_serves_until_ctrl_c(run):
    words = [sys.executable, ROOT / "utils/report.py", run, "--serve", "--port", "0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as it:
        address = it.stdout.readline().split()[0]
        with urllib.request.urlopen(address, timeout=30) as answer:
            assert b"made by mlx-grpo" in answer.read()
        it.send_signal(signal.SIGINT)
        out, err = it.communicate(timeout=30)
    assert (it.returncode, out, err) == (0, "ended\n", "")
