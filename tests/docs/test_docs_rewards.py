"""docs/rewards.md is executed: its settings, its functions, its server."""

import inspect
import re
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT

from utils.data.completion import Completion
from utils.rewards import by_name, importing, servers
from utils.rewards import calls as reward_calls
from utils.rewards.answers import same_answer
from utils.rewards.mathematics import equivalent
from utils.rewards.rewards import Rewards

TEXT = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the files that the page shows, as the current one."""
    monkeypatch.chdir(tmp_path)
    for block in blocks("python"):
        name = block.splitlines()[0].removeprefix("# ")
        (tmp_path / name).write_text(block)
    assert {path.name for path in tmp_path.iterdir()} == {"rewards.py", "reward_server.py"}
    return tmp_path


@pytest.mark.parametrize("block", blocks("toml"), ids=range(len(blocks("toml"))))
def test_settings_are_valid(grpo, folder, block):
    (folder / "settings.toml").write_text(block)
    config = grpo.read_config("settings.toml", [])
    assert config.explicit
    if "reward_model" not in config.reward_funcs:  # that one would be loaded
        assert list(by_name.load_rewards(config, grpo.REWARDS)) == config.reward_funcs


def test_there_is_an_example_of_each_part():
    assert len(blocks("toml")) == 8


def test_the_functions_do_what_is_said(grpo, folder):
    texts = ["please, 12", "13", "x" * 500]
    completions = [Completion([], [], [], "stop", text) for text in texts]
    sources = ("sums.jsonl", "sums.jsonl", "other")
    question = {"prompt": [], "prompt_ids": [], "answer": "12"}
    questions = [{**question, "data_source": source} for source in sources]
    names = ("polite", "arithmetic_only", "annealed", "looked_up", "Novelty")
    functions = {name: importing.load_reward(f"rewards.py:{name}", {}) for name in names}
    functions["Novelty"] = functions["Novelty"]()
    state = reward_calls.TrainerState(global_step=1, max_steps=2)
    tokenizer = SimpleNamespace(decode=str)
    rewards = Rewards(lambda: functions, grpo.MLXGRPOConfig(), tokenizer, 0, lambda: state)
    values = {n: v.tolist() for n, v in rewards(questions, completions).items()}
    assert values["polite"] == [0, 0, 0]
    assert values["arithmetic_only"][:2] == [1, 0]
    assert str(values["arithmetic_only"][2]) == "nan"
    assert values["annealed"] == [0, 0, -1]
    assert (values["looked_up"], values["Novelty"]) == ([1] * 3, [1] * 3)
    assert rewards.metrics() == {"metric/limit": 250}
    assert rewards.shown() == {"characters": [10, 2, 500]}
    assert rewards(questions, completions)["Novelty"].tolist() == [0] * 3


def test_the_server_serves(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = (folder / "reward_server.py").read_text().replace("5000", str(port))
    server = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}/get_reward"
        reward = servers.RemoteReward([url], 5.0, retries=50, backoff=0.1)
        columns = {
            "completions": [[{"content": "<answer>7</answer>"}]] * 2,
            "prompt_texts": ["Q"] * 2,
            "answer": ["7", "8"],
        }
        values = reward_calls.RewardCalls()({"remote_rm": reward}, columns)
        assert values["remote_rm"].tolist() == [1, 0]
    finally:
        server.kill()
        server.wait()


def test_the_table_has_every_reward_with_its_parameters(grpo):
    rows = re.findall(r"^\| `(\w+)` \| .* \| ([^|]*)\|$", TEXT, re.MULTILINE)
    listed = {name: re.findall(r"`(\w+)`", parameters) for name, parameters in rows}
    actual = {}
    for name, function in grpo.REWARDS.items():
        parameters = inspect.signature(function).parameters.values()
        settable = [p.name for p in parameters if p.default is not p.empty]
        actual[name] = [p for p in settable if p not in by_name.ONLY_SETTINGS]
    assert listed == actual


def test_linked_sections_exist():
    anchors = re.findall(r"\]\(#([\w-]+)\)", TEXT)
    titles = [t.lower().replace(" ", "-") for t in re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)]
    assert {*anchors} <= {*titles}


def test_what_counts_as_equal():
    """Every line of the table: each way to write an answer against the last one of its group."""
    rows = re.findall(r"^\| (.*`.*) \| (equal|not) \| (equal|not) \|$", TEXT, re.M)
    assert len(rows) > 12
    for groups, exact, mathematics in rows:
        for group in groups.split("; "):
            *ways, last = re.findall(r"`([^`]+)`", group)
            assert ways, group
            for way in ways:
                assert same_answer(way, last) is (exact == "equal"), (way, last)
                assert equivalent(way, last) is (mathematics == "equal"), (way, last)
