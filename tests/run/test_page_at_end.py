"""The page that a run leaves when it ends, and that it never changes how the run ends."""

import signal

import pytest
from helpers import run_training
from test_page import data_of

from utils.run import ours, page, page_at_end

FEW = {"max_updates": 2, "eval_samples": 2, "num_generations": 2, "max_new_tokens": 4}


@pytest.fixture
def train(model_dir, data_dir, tmp_path, capsys):
    """Train a little: (exit code, folder, lines of output)."""

    def train_(**settings):
        code, _ = run_training(model_dir, data_dir, tmp_path / "run", **FEW, **settings)
        return code, tmp_path / "run", capsys.readouterr().out.splitlines()

    return train_


def test_a_run_leaves_a_page(train):
    code, folder, lines = train()
    assert code == 0
    assert lines[-1] == f"finished  all 2 updates; look at {folder / 'report.html'}"
    (told,) = data_of((folder / "report.html").read_text())["runs"]
    assert len(told["records"]) == 2
    assert told["finished"] is True
    assert len(told["completions"]["groups"]["update"]) > 4
    assert told["kept"] == {"text": 1.0, "tokens": 1.0, "whole": True}


def test_it_can_be_left_out(train):
    code, folder, lines = train(report=False)
    assert (code, lines[-1]) == (0, "finished  all 2 updates")
    assert not (folder / "report.html").exists()


def test_a_page_that_fails_changes_nothing(train, monkeypatch):
    def fails(*_):
        raise ZeroDivisionError("of the page")

    monkeypatch.setattr(page_at_end.page, "write", fails)
    code, folder, lines = train()
    assert (code, lines[-1]) == (0, "finished  all 2 updates")
    assert "warning   the page of the run was not written: ZeroDivisionError: of the page" in lines
    assert (folder / "final").is_dir()


def test_what_stands_in_its_place_is_left(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "report.html").write_text("my own")
    code, folder, lines = train()
    assert (code, lines[-1]) == (0, "finished  all 2 updates")
    assert (folder / "report.html").read_text() == "my own"
    assert any("exists and is no page" in line for line in lines)


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_leaves_the_page_out_and_the_exit_code_alone(train, monkeypatch, times):
    write = page.write

    def interrupted(*words):
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)
        write(*words)

    monkeypatch.setattr(page_at_end.page, "write", interrupted)
    code, folder, lines = train()
    assert (code, lines[-1]) == (0, "finished  all 2 updates")
    assert "note      the page was not written, to stop at once" in lines
    assert not (folder / "report.html").exists()
    assert (folder / "final").is_dir()


def test_a_page_belongs_to_the_run_that_is_overwritten(train):
    folder = train()[1]
    assert folder / "report.html" in ours.remains(folder)
    code, folder, lines = train(overwrite=True, report=False)
    assert code == 0, lines
    assert not (folder / "report.html").exists(), "it showed the run that is gone"
