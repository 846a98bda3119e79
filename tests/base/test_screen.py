"""Lines at the bottom of a terminal: drawn in place, without leftovers, and never obeyed."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT
from terminals import Program, Terminal

from utils.base import say, screen

COUNTS = """
import sys
from utils.base import screen
from utils.base import task_progress as progress
from utils.base.say import say
screen.LEAST, screen.TICK = 0.0, 0.05
shown = progress.Progress(5, "update")
with shown:
    shown.stage("sampling")
    for line in sys.stdin:
        if line.strip():
            say(line.strip())
        else:
            shown.step(figures="reward 1.25, exact match 60.0%, length 20")
say("finished")
"""


def test_a_window_that_changes_its_size_keeps_no_leftovers():
    with Program(COUNTS) as program:
        program.tell("one line\n")
        for number, columns in enumerate((80, 60, 40, 24, 100), start=1):
            program.resize(columns)
            program.tell()
            shown = [f"update {number}/5 |", f"{number}/5 |"][columns < 60]
            lines = program.until(lambda all_, s=shown: all_[-1].startswith(s))
            assert lines[0] == "one line"
            assert [line for line in lines[:-1] if "|" in line] == []
            assert len(lines[-1]) < columns
            assert lines[-1].count("|") == 2, "the bar stays"
            cursor = program.seen.screen.cursor
            assert (cursor.y, cursor.x) == (len(lines) - 1, 0), "nothing of it lies above"
        lines = program.finish()
    assert (lines[0], lines[-1]) == ("one line", "finished")
    assert not any("|" in line for line in lines)
    assert program.process.returncode == 0


@pytest.mark.parametrize("columns", [80, 60, 40])
def test_the_bar_has_room_at_every_width(columns):
    with Program(COUNTS, columns) as program:
        program.tell("\n\n\n")
        line = program.until(lambda lines: "3/5" in lines[-1])[-1]
        line = program.until(lambda lines: " left" in lines[-1])[-1]
    assert "reward 1.25" in line
    assert line.count("|") == 2
    assert ("exact match 60.0%" in line) == (columns >= 80)


def test_it_is_redrawn_when_only_the_window_changes():
    """While the program waits for something else."""
    with Program(COUNTS) as program:
        program.tell()
        program.until(lambda lines: lines[-1].startswith("update 1/5"))
        program.resize(40)
        program.until(lambda lines: lines[-1].startswith("1/5 |"))


def test_what_goes_into_a_pipe_has_no_bar():
    with Program(
        "import subprocess, sys\n"
        f"done = subprocess.run([sys.executable, '-c', {COUNTS!r}], stdout=subprocess.PIPE)\n"
        "sys.stdout.buffer.write(b'got ' + done.stdout)"
    ) as program:
        program.tell("\n" * 5)
        lines = program.finish()
    assert lines[0].startswith("got update 1 of 5: reward 1.25")
    assert lines[-1] == "finished"
    assert "\x1b" not in program.seen.written


def test_a_file_gets_lines_and_the_terminal_the_bar(tmp_path):
    with Program(
        "import subprocess, sys\n"
        f"with open({str(tmp_path / 'log')!r}, 'w') as file:\n"
        f"    subprocess.run([sys.executable, '-c', {COUNTS!r}], stdout=file)\n"
    ) as program:
        program.tell("hello\n\n")
        program.until(lambda lines: lines[-1].startswith("update 1/5"))
        program.finish()
    assert (tmp_path / "log").read_text() == "hello\nfinished\n"


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"TERM": "dumb", "COLUMNS": "80"}])
def test_a_terminal_that_obeys_nothing_gets_lines(environment):
    with Program(COUNTS, **environment) as program:
        program.tell("\n" * 5)
        program.finish()
    assert "\x1b" not in program.seen.written
    assert "update 5 of 5" in program.seen.written


EVIL = "\x1b]52;c;ZXZpbA==\x07\x1b[2J\x9b31m‮\r\x08\n\t\0"


def test_what_is_drawn_is_shown_and_not_obeyed():
    file = Terminal()
    line = screen.painted([(EVIL, screen.RED), ("\U0001f600" * 99, screen.PLAIN)], 60, file)
    told = r"\x1b]52;c;ZXZpbA==\x07\x1b[2J\x9b31m\u202e\r\x08  \x00"
    assert line.startswith(f"\x1b[31m{told}\x1b[0m\U0001f600")
    assert screen.cells(line) - len("\x1b[31m\x1b[0m") <= 60
    assert set(line.replace("\x1b[31m", "").replace("\x1b[0m", "")) == {*told, "\U0001f600"}


def test_styles_are_left_out_where_nobody_wants_them(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert screen.painted([("a", screen.RED)], 9, Terminal()) == "a"


def test_an_encoding_without_blocks_gets_letters():
    file = Terminal()
    file.encoding = "ascii"
    assert screen.bar(0.5, 12, file) == "|#####     |"
    assert screen.spark([1, 2, 3], 12, file) == ""
    assert screen.painted([("caf\u00e9", "")], 9, file) == "caf?"


def test_columns_are_counted_as_a_terminal_counts_them():
    assert screen.cells("a\u65e5\u0301\u200d") == 3
    assert screen.cut("\u65e5\u65e5\u65e5", 5) == "\u65e5\u65e5"
    assert screen.tail("one two three", 8) == "...three"
    assert screen.tail("three", 8) == "three"
    assert screen.cut("abc", 0) == screen.cut("\u65e5", 1) == ""


def test_curves_are_of_the_columns_that_there_are():
    file = Terminal()
    assert screen.spark([0.0, 1.0, 2.0, 7.0], 9, file) == "▁▂▃█"
    assert screen.spark([0.5, 0.5], 9, file, whole=True) == "▅▅"
    assert screen.spark([3.0, 3.0], 9, file) == "▁▁"
    assert screen.spark(range(100), 10, file) == "▁▂▃▃▄▅▆▆▇█"
    assert screen.spark([1.0], 9, file) == ""


def test_bars_fill_up():
    file = Terminal()
    assert [screen.bar(part, 6, file) for part in (0, 0.25, 1, 2)] == [
        "|    |",
        "|█   |",
        "|████|",
        "|████|",
    ]
    assert screen.bar(0.5, 4, file) == ""


def put_in_place(monkeypatch):
    file = Terminal()
    monkeypatch.setattr(sys, "stdout", file)
    monkeypatch.setattr(sys, "stderr", file)
    return file


def test_every_way_to_the_terminal_passes_above_it(monkeypatch):
    drawn = put_in_place(monkeypatch)
    with screen.Block(lambda columns, rows: [[("below", "")]], drawn):
        say.say("said")
        say.complain("complained")
        say.put("put\n", drawn)
        assert drawn.lines() == ["said", "complained", "put", "below"]
    assert drawn.lines() == ["said", "complained", "put"]
    assert say.below is None


def test_it_is_never_higher_than_the_screen(monkeypatch):
    drawn = put_in_place(monkeypatch)
    monkeypatch.setattr(screen, "MEASURED", (80, 24))
    with screen.Block(lambda columns, rows: [[(f"{n}", "")] for n in range(99)], drawn):
        say.say("said")
        assert drawn.lines() == ["said", *(str(n) for n in range(23))]


def test_it_is_drawn_a_few_times_a_second(monkeypatch):
    now, composed = [100.0], []
    monkeypatch.setattr(screen.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(screen, "TICK", 999)
    with screen.Block(lambda *_: composed.append(now[0]) or [], Terminal()) as block:
        for _ in range(1000):
            now[0] += 0.01
            block.draw()
    assert 10 <= len(composed) <= 100  # in ten seconds


def test_a_child_of_the_program_draws_nothing(monkeypatch):
    drawn = put_in_place(monkeypatch)
    with screen.Block(lambda *_: [[("below", "")]], drawn) as block:
        block.process = os.getpid() + 1
        before = drawn.written
        block.draw()
        say.say("from the child")
        assert drawn.written == f"{before}from the child\n"


def test_a_terminal_that_went_away_ends_nothing(monkeypatch):
    class Gone(Terminal):
        def write(self, text):
            raise OSError(5, "Input/output error")

    with screen.Block(lambda *_: [[("below", "")]], Gone()) as block:
        block.draw()
    assert block.over.is_set()


def test_libraries_may_show_bars_beside_it():
    """Those of tqdm, before and after."""
    code = "import tqdm\nlist(tqdm.tqdm(range(3)))\n" + COUNTS
    with Program(code) as program:
        program.tell("said\n\n")
        lines = program.until(lambda lines: lines[-1].startswith("update 1/5"))
        assert lines[1:-1] == ["said"]
        assert program.finish()[1:] == ["said", "finished"]


def test_without_a_terminal_there_is_none():
    code = "from utils.base import screen; print(screen.terminal())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "None\n"
