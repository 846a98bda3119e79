"""An exact match on few questions is shown with how far it may be off."""

import pytest
from conftest import ROOT

from utils.base import intervals


def test_a_share_with_its_interval():
    assert intervals.percent(0.0, 4) == "0.0% [0.0%, 49.0%]"
    assert intervals.percent(0.242, 600) == "24.2% [20.9%, 27.8%]"


def test_four_questions_are_too_few_and_say_so():
    assert intervals.note(0.0, 4) == ", 95% interval 0% to 49%"
    few = "4 questions are too few to see learning: 0% may be anything from 0% to 49%"
    assert intervals.too_few(0.0, 4) == few
    assert intervals.too_few(1.0, 1).startswith("1 question is too few")


@pytest.mark.parametrize(("share", "count", "wide"), [(0.5, 600, 0), (0.0, 40, 0), (0.5, 40, 1)])
def test_only_a_wide_interval_is_shown(share, count, wide):
    assert bool(intervals.note(share, count)) == bool(wide)
    assert intervals.too_few(share, count) == ""


def test_a_run_shows_it_and_says_once_that_they_are_too_few(typed):
    _, out, *_ = typed(eval_samples=4, max_updates=1)
    lines = [line for line in out.splitlines() if line.startswith("eval ")]
    assert len(lines) == 2
    assert ", 95% interval 0% to 49%)" in lines[0]
    assert "as since update 0" in lines[1]
    assert out.count("4 questions are too few to see learning") == 1


def test_a_shipped_preset_says_only_how_wide_it_is(grpo, tmp_path, capsys):
    more = ["--set", f"output_dir={tmp_path / 'out'}", "--set", "max_updates=1"]
    assert grpo.main(["--config", str(ROOT / "configs/smoke_test.toml"), *more]) == 0
    out = capsys.readouterr().out
    assert "95% interval" in out
    assert "too few" not in out
