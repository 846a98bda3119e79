"""A line for the person at the terminal: it never ends a run, whatever becomes of it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from utils.base.say import Parser, complain, put, say

PROGRAM = """
import sys
from utils.base.say import say
for _ in range(3):
    say("one caf\\u00e9")
print("went on", file=sys.stderr)
"""


def spoken(**how):
    command = [sys.executable, "-c", PROGRAM]
    return subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, **how)


def test_output_that_nobody_reads_is_dropped():
    with subprocess.Popen(["true"], stdin=subprocess.PIPE) as gone:
        gone.wait()
        assert spoken(stdout=gone.stdin).stderr == "went on\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_output_onto_a_full_disk_is_dropped():
    with Path("/dev/full").open("w") as full:
        assert spoken(stdout=full).stderr == "went on\n"


def test_what_cannot_be_shown_is_replaced():
    done = spoken(stdout=subprocess.PIPE, env={"PYTHONIOENCODING": "ascii"})
    assert done.stdout.splitlines() == ["one caf?"] * 3


def test_secrets_are_not_said(capsys):
    say("see https://ann:hunter2@host/")
    assert capsys.readouterr().out == "see https://***@host/\n"


# One door.

DOOR = ROOT / "utils" / "base" / "say.py"
BEFORE_IT = ROOT / "utils" / "__init__.py"  # says that packages are missing, in its own words
SOURCES = [ROOT / "mlx-grpo.py", *sorted((ROOT / "utils").rglob("*.py"))]
OTHER_WAYS = {
    *("print", "tqdm.write", "sys.stdout.write", "sys.stderr.write", "argparse.ArgumentParser"),
    *("sys.stdout.buffer.write", "sys.stderr.buffer.write", "traceback.print_exc", "pprint"),
    *("traceback.print_exception", "traceback.print_stack", "os.write", "logging.basicConfig"),
    *("logging.error", "logging.warning", "logging.info", "warnings.warn", "faulthandler.enable"),
}


def other_ways(source):
    """Calls that print without passing the door."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name in OTHER_WAYS:
            yield name
        if name in ("sys.exit", "SystemExit") and isinstance(
            next(iter(node.args), None), ast.JoinedStr
        ):
            yield name  # it prints what it is given
        if name.endswith((".write", ".writelines")) and "std" in name:
            yield name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_printed_by_another_door(path):
    found = [*other_ways(path.read_text(encoding="utf-8"))]
    assert path == DOOR or found == (["print"] * 2 if path == BEFORE_IT else [])


@pytest.mark.parametrize(
    "line",
    ["print(x)", "tqdm.write(x)", "sys.stderr.write(x)", "sys.exit(f'{x}')", "warnings.warn(x)"],
)
def test_another_door_is_found(line):
    assert [*other_ways(f"def f(x):\n    {line}\n")]


EVIL = "\x1b]52;c;ZXZpbA==\x07\x1b[2J\x9b31m\u202e\r\x08"


def test_what_is_said_is_shown_and_not_obeyed(capsys):
    say(f"one {EVIL}\n\ttwo")
    complain(f"error: {EVIL}")
    put(f"{EVIL}", sys.stdout)
    with pytest.raises(SystemExit):
        Parser(prog="x").parse_args([f"--{EVIL}"])
    out, err = capsys.readouterr()
    told = r"\x1b]52;c;ZXZpbA==\x07\x1b[2J\x9b31m\u202e\r\x08"
    assert out == f"one {told}\n\ttwo\n{told}"
    assert err.splitlines()[0] == f"error: {told}"
    assert err.endswith(f"unrecognized arguments: --{told}\n")


HOOKS = """
import sys, threading, warnings
from utils.base.say import tell_everything
tell_everything()
evil = "\\x1b[2J https://ann:hunter2@host/ \\x9b"
warnings.warn(evil, UserWarning, stacklevel=1)
def fails():
    raise ValueError(evil)
thread = threading.Thread(target=fails)
thread.start()
thread.join()
fails()
"""


def test_bugs_threads_and_warnings_leave_by_it_too():
    done = subprocess.run([sys.executable, "-c", HOOKS], cwd=ROOT, capture_output=True, text=True)
    told = r"\x1b[2J https://***@host/ \x9b"
    assert f"UserWarning: {told}" in done.stderr
    assert done.stderr.count(f"ValueError: {told}") == 2
    assert "\x1b" not in done.stderr
    assert "hunter2" not in done.stderr
    assert done.returncode == 1


def test_output_that_was_closed_ends_nothing():
    program = PROGRAM.replace("for _", "sys.stdout.close()\nfor _")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "went on\n")
