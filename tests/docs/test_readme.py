"""README.md and QUICK_START.md say what is there: commands, settings, paths, generated parts."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from utils.rewards import importing

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ("README.md", "QUICK_START.md")


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def commands(name):
    """The `uv run ...` lines of the bash blocks, continuation lines joined, comments dropped."""
    blocks = re.findall(r"```bash\n(.*?)```", text_of(name), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("uv run")]


ALL_COMMANDS = [(name, words) for name in DOCUMENTS for words in commands(name)]


def test_both_documents_have_commands():
    assert len(ALL_COMMANDS) > 10


@pytest.mark.parametrize(("name", "words"), ALL_COMMANDS, ids=lambda x: " ".join(x))
def test_command_names_what_exists(grpo, name, words):
    files = [w for w in words if w.endswith((".py", ".toml")) and "=" not in w]
    assert all((ROOT / file).is_file() for file in files), files
    settings = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    settings = [s for s in settings if not s.startswith(("dataset=", "reward_"))]
    if "mlx-grpo.py" in words:
        config = words[words.index("--config") + 1] if "--config" in words else None
        grpo.read_config(str(ROOT / (config or "configs/default.toml")), settings)


def test_the_quoted_reward_is_valid_and_used(grpo, tmp_path):
    code = re.search(r"```python\n(# rewards.py.*?)```", text_of("QUICK_START.md"), re.DOTALL)[1]
    (tmp_path / "rewards.py").write_text(code)
    words = next(w for _, w in ALL_COMMANDS if any("rewards.py:short" in x for x in w))
    spec = next(x for x in words if x.startswith("reward_funcs="))
    local = spec.replace("rewards.py", str(tmp_path / "rewards.py"))
    weights = next(x for x in words if x.startswith("reward_weights="))
    config = grpo.read_config(str(ROOT / "configs/default.toml"), [local, weights])
    assert config.reward_funcs[:2] == ["correctness", "soft_format"]
    reward = importing.load_reward(config.reward_funcs[2], grpo.REWARDS)
    short, long = [{"content": "x" * 200}], [{"content": "x" * 201}]
    assert reward(completions=[short, long]) == [0.5, 0.0]


def test_the_quoted_python_trains(grpo, tmp_path, monkeypatch, capsys):
    code = re.search(r"```python\n(import mlx_grpo.*?)```", text_of("QUICK_START.md"), re.DOTALL)[1]
    monkeypatch.chdir(ROOT)
    exec(code.replace("outputs/", f"{tmp_path}/"))
    *steps, last = [list(map(float, line.split())) for line in capsys.readouterr().out.splitlines()]
    assert len(steps) == 2
    assert len(last) == 2
    assert last[1] > 0
    assert (tmp_path / "from-python" / "model.safetensors").is_file()


LINKING = [*DOCUMENTS, "docs/rewards.md", "models/tiny-math/README.md", "utils/README.md"]


@pytest.mark.parametrize(
    "name", [*LINKING, "docs/smollm2.md", "docs/nanochat.md", "docs/litgpt.md"]
)
def test_linked_files_exist(name):
    links = re.findall(r"\]\(([^)]+)\)", text_of(name))
    local = [link.partition("#")[0] for link in links if "://" not in link]
    assert [link for link in local if not ((ROOT / name).parent / link).exists()] == []


def test_the_tree_in_the_readme_exists():
    block = re.search(r"## The tree\n\n```text\n(.*?)```", text_of("README.md"), re.DOTALL)[1]
    names = [line.split()[0] for line in block.splitlines()]
    assert len(names) > 5
    assert all((ROOT / name).exists() for name in names)


def test_generated_parts_are_current():
    command = [sys.executable, str(ROOT / "docs/readme_tables.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_presets_in_the_readme_are_those_in_configs():
    block = text_of("README.md").partition("| preset | for |")[2].partition("\n\n")[0]
    named = set(re.findall(r"`(\w+)`", block.replace("convert_model.py --quantize", "")))
    presets = {path.stem for path in (ROOT / "configs").glob("*.toml")}
    assert presets <= named
    assert named - presets <= {"utils"}


def test_no_placeholder_was_left():
    for name in DOCUMENTS:
        assert not re.search(r"@[A-Z]+@", text_of(name))


def test_the_lines_of_the_script_are_counted():
    stated = re.search(r"lines that hold GRPO \| ([\d,]+), one script", text_of("README.md"))[1]
    counted = len(text_of("mlx-grpo.py").splitlines())
    assert abs(int(stated.replace(",", "")) - counted) <= 0.05 * counted


def test_the_speed_beside_peers_is_that_of_the_results():
    """Every figure is of a row of RESULTS.md: the update's seconds, then its peak in GB."""
    block = text_of("README.md").partition("<!-- speed -->")[2].partition("<!-- /speed -->")[0]
    figures = re.findall(r"([\d.]+) s(?:, ([\d.]+) GB)?", block)
    assert len(figures) > 8
    rows = text_of("benchmarks/RESULTS.md").splitlines()
    for seconds, peak in figures:
        cells = [[cell.strip() for cell in row.split("|")] for row in rows]
        assert any(seconds in row and peak in ["", *row] for row in cells), (seconds, peak)
