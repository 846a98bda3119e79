"""docs/warm_start.md: its walk-through with the embedded model, typed as it stands there."""

import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT
from helpers import read_log

PAGE = (ROOT / "docs/warm_start.md").read_text(encoding="utf-8")


def walk_through():
    """The commands of the section on the embedded model."""
    section = PAGE.partition("## The embedded model")[2].partition("\n## ")[0]
    block = re.search(r"```bash\n(.*?)```", section, re.DOTALL)[1]
    lines = block.replace("\\\n", " ").strip().splitlines()
    return [shlex.split(line.removeprefix("uv run ").removeprefix("python ")) for line in lines]


def figure(pattern):
    return float(re.search(pattern, PAGE)[1])


def test_the_walk_through_goes_through_all_steps():
    names = [words[0] for words in walk_through()]
    evaluate = "utils/evaluate_model.py"
    assert names == [evaluate, "utils/pretrain.py", evaluate, "mlx-grpo.py"]


@pytest.mark.long
def test_the_walk_through_gives_what_the_page_says(tmp_path):
    """Figures of other machines may differ by rounding."""
    for name in ("configs", "utils", "models", "mlx-grpo.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    said = []
    for words in walk_through():
        command = [sys.executable, *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    right = int(re.search(r"([\d,]+) of 800 answers right", said[1])[1])
    assert right == pytest.approx(figure(r"(\d+) of 800 answers right"), abs=15)
    before, after = (float(x) for x in re.findall(r"([\d.]+)% \[", said[2])[:2])
    assert before == pytest.approx(figure(r"exact match ([\d.]+) % before"), abs=1)
    assert after == pytest.approx(figure(r"([\d.]+) % after the warm-up"), abs=5)
    ems = [r["em"] for r in read_log(tmp_path / "outputs/warm-grpo") if "em" in r]
    assert ems[0] == pytest.approx(after / 100, abs=0.001)
    assert ems[-1] > 0.97


def test_messages_of_the_table_are_those_of_the_code():
    """The parts that do not depend on the case."""
    source = "".join(p.read_text() for p in (ROOT / "utils").rglob("*.py"))
    for part in (
        "what is evaluated on must not be trained on: ",
        "has none of stop_strings = ",
        "would end this completion after ",
        "the question is one of the test split of ",
        "was trained on another base: on ",
        "are the same setting",
    ):
        assert part in source
        assert part.strip() in PAGE
