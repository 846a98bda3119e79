"""A line for the person at the terminal: it never ends a run, whatever becomes of it."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from utils.base.say import say

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
