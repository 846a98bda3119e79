"""How far a piece of work is: lines now and then, time left, and what fits into a line."""

import pytest
from terminals import Terminal

from utils.base import screen
from utils.base import task_progress as progress


@pytest.fixture
def now(monkeypatch):
    """A clock that stands still."""
    held = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: held[0])
    return held


def test_there_is_a_line_after_every_twentieth(now):
    lines = []
    shown = progress.Progress(200, "row", tell=lines.append)
    for _ in range(200):
        now[0] += 1
        shown.step(figures="loss 2.5")
    assert len(lines) == 20
    assert lines[0] == "row 10 of 200: loss 2.5, 3:10 left"
    assert lines[-1] == "row 200 of 200: loss 2.5"


def test_there_is_a_line_after_every_minute(now):
    lines = []
    shown = progress.Progress(10_000, "row", tell=lines.append)
    for _ in range(12):
        now[0] += 30
        shown.step()
    assert [line.partition(":")[0] for line in lines] == [
        f"row {n} of 10,000" for n in range(2, 13, 2)
    ]


def test_what_is_short_needs_no_lines(now):
    lines = []
    shown = progress.Progress(10, "row", tell=lines.append, calm=True)
    for _ in range(10):
        now[0] += 7
        shown.step()
    assert lines == ["row 9 of 10: 0:07 left"]
    shown.figures = ""
    assert shown.line() == "row 10 of 10"


def test_quiet_is_quiet(now, monkeypatch):
    monkeypatch.setattr(screen, "terminal", Terminal)
    lines = []
    with progress.Progress(3, "row", tell=lines.append, quiet=True) as shown:
        shown.stage("reading")
        shown.step(3)
    assert (lines, shown.block) == ([], None)


def test_the_time_left_is_that_of_what_was_done_last(now):
    shown = progress.Progress(20, "row", done=10)
    assert shown.left() == ""
    for seconds in (100, 100, 10, 10):  # the first ones were slow
        now[0] += seconds
        shown.step()
    assert shown.left() == "1:00"
    now[0] += 4
    assert shown.left() == "0:56"
    now[0] += 999
    assert shown.left() == "0:50", "five more, however long this one takes"


def test_nothing_to_do_is_done(monkeypatch):
    monkeypatch.setattr(screen, "terminal", Terminal)
    assert progress.Progress(0, "row").part() == 1.0


def test_a_stage_says_for_how_long_it_has_been_going(now):
    shown = progress.Progress(2, "row")
    assert shown.doing() == ""
    shown.stage("gradient")
    assert shown.doing() == "gradient"
    now[0] += 12
    shown.stage("gradient")
    assert shown.doing() == "gradient 12 s"
    now[0] += 160
    assert shown.doing() == "gradient 2:52"
    shown.stage("sampling")
    assert shown.doing() == "sampling"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (36_000, "10:00:00")]
)
def test_a_clock(seconds, text):
    assert progress.clock(seconds) == text


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (24, ""),
        (40, "9:40:03 left, gradient"),
        (50, "9:40:03 left, reward 1.38"),
        (60, "9:40:03 left, reward 1.38"),
        (80, "9:40:03 left, reward 1.38, exact match 100.0%"),
        (120, "9:40:03 left, reward 1.38, exact match 100.0%, length 20, gradient"),
    ],
)
def test_what_matters_most_fits_first(columns, words, now, monkeypatch):
    """Of a long run: ten hours are left."""
    monkeypatch.setattr(screen, "terminal", Terminal)
    shown = progress.Progress(1869, "update", done=949)
    now[0] += 37.87
    shown.step()
    shown.stage("gradient")
    figures = ["reward 1.38", "exact match 100.0%", "length 20"]
    line = "".join(text for text, _ in shown.head(columns, figures))
    count, bar, after = line.split("|")
    assert count.split()[-1] == "950/1,869"
    assert after.strip() == words
    assert 3 < len(bar) <= 30
    assert len(line) < columns
