"""Environments in processes of their own: what they may answer, and what ends them."""

import pytest
from conftest import load_script

from utils.base.errors import UserError
from utils.rollouts import asking, environment_worker
from utils.rollouts.environment_worker import Wrong
from utils.rollouts.environments import Environments, Failed
from utils.rollouts.partner import Partner

COUNTS = """
import os, threading, time, random

class Count:
    def __init__(self):
        self.steps, self.lock, self.pid = [], threading.Lock(), os.getpid()

    def reset(self, question):
        self.question = question
        return f" {random.random()}"

    def step(self, text):
        self.steps.append(text)
        if text == "hang":
            while True:
                time.sleep(1)
        return f"{len(self.steps)} {random.random()}", text == "over"

    def get_reward(self):
        return len(self.steps)
"""


@pytest.fixture
def environments(tmp_path):
    (tmp_path / "counts.py").write_text(COUNTS)
    spec = f"{tmp_path / 'counts.py'}:Count"
    made = Environments(load_script().MLXGRPOConfig(environment=spec, environment_timeout=1.0))
    made.processes = made.processes[:1]  # that all are in
    yield made
    made.stop()


ROW = {"question": "Why?", "answer": "so", "prompt_ids": [1, 2]}


def test_an_environment_is_begun_asked_and_closed(environments):
    one = environments.make(5)
    assert one.begin(ROW).result().startswith(" 0.")
    assert [over for _, over in (one.step(text).result() for text in ("a", "over"))] == [
        False,
        True,
    ]
    reward, held = one.close().result()
    assert (reward, held["question"], held["steps"]) == (2.0, "Why?", ["a", "over"])
    assert "lock" not in held, "it cannot be sent"


def test_those_that_lose_their_process_to_another_one_go_on(environments):
    """A second one says the same after the same, whatever happened in between."""
    quiet, other = environments.make(5), environments.make(5)
    for one in (quiet, other):
        one.begin(ROW).result()
    said = [quiet.step(text).result() for text in ("a", "b", "c")]
    first = other.step("a").result()
    wild = environments.make(9)
    wild.begin(ROW).result()
    early = environments.make(7)
    early.begin(ROW).result()
    old = early.close().result()[1]["pid"]
    with pytest.raises(Failed, match="took longer than environment_timeout = 1 s"):
        wild.step("hang").result()
    assert [first, other.step("b").result(), other.step("c").result()] == said
    pids = [one.close().result()[1]["pid"] for one in (quiet, other)]
    assert pids[0] == pids[1] != 0, "both are in the new process"
    assert pids[0] != old, "the one that hung was ended"


@pytest.mark.parametrize(
    ("value", "messages"),
    [
        (("go on", False), [{"role": "user", "content": "go on"}]),
        ((None, True), []),
        (([{"role": "tool", "content": "5", "name": "add"}], False), None),
    ],
)
def test_what_a_step_may_return(value, messages):
    said, over = environment_worker.answer(value)
    assert said == (messages if messages is not None else value[0])
    assert over is value[1]


@pytest.mark.parametrize(
    "value",
    [
        *("text", None, (1, False), ("text", 1), ("text", "yes"), (None, False), ([], False)),
        *(([{"role": "assistant", "content": "I"}], False), ([{"role": "user"}], False)),
        ("a", True, 3),
    ],
)
def test_anything_else_is_wrong(value):
    with pytest.raises(Wrong, match=r"^step returned "):
        environment_worker.answer(value)


@pytest.mark.parametrize("value", ["much", float("nan"), float("inf"), [1], 10**400])
def test_a_reward_is_a_number_or_none(value):
    assert environment_worker.reward(None) is None
    assert environment_worker.reward(True) == 1.0
    with pytest.raises(Wrong, match=r"get_reward returned .* no finite number"):
        environment_worker.reward(value)


def test_a_class_without_the_methods_is_refused(tmp_path):
    (tmp_path / "half.py").write_text("class Half:\n    def reset(self, **row):\n        pass\n")
    config = load_script().MLXGRPOConfig(environment=f"{tmp_path / 'half.py'}:Half")
    with pytest.raises(
        UserError, match=r"Half': has no method 'step', and none that could be a tool"
    ):
        Environments(config)


def test_without_an_environment_the_sampler_is_the_plain_one():
    plain, config = object(), load_script().MLXGRPOConfig()
    assert asking.with_turns(plain, config, None, asking.environments_of(config, None)) is plain


def test_a_partner_says_what_went_wrong(tmp_path):
    (tmp_path / "counts.py").write_text(COUNTS)
    spec = f"{tmp_path / 'counts.py'}:Count"
    config = load_script().MLXGRPOConfig(environment=spec, environment_timeout=1.0, max_turns=2)
    said = []
    partner = Partner(config, Environments(config), 5, said.append)
    first = partner.begin([{"role": "user", "content": "Why?"}])
    assert first[0]["content"].startswith("Why? 0.")
    assert partner.answer("a")[0]["content"].startswith("1 0.")
    assert partner.answer("b") == []
    assert said[0].startswith("[user] 2 0.")
    assert said[1:] == ["(over, its reward is 2)"]
    partner.begin([{"role": "user", "content": "Why?"}])
    assert partner.answer("hang") == []
    assert said[2].endswith(":Count took longer than environment_timeout = 1 s")
    partner.environments.stop()
