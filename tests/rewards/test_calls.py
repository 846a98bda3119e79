"""TRL's interface for reward functions, and group advantages."""

import asyncio
import copy
import math

import numpy as np
import pytest
from helpers import completion, make_config, make_trainer, snapshot

from utils.base.errors import RunError, UserError
from utils.rewards import by_name, importing
from utils.rewards import calls as reward_calls

PERFECT = "<reasoning>\nthree\ntimes four\n</reasoning>\n<answer>\n12\n</answer>"


# TRL's interface, with functions as its documentation writes them.

TRL_STYLE = '''
from __future__ import annotations

import asyncio
import copy
import re
from dataclasses import dataclass


@dataclass
class Judge:
    pattern: str = r"<answer>(.*?)</answer>"

    def read(self, completion):
        match = re.search(self.pattern, completion[0]["content"], re.DOTALL)
        return match.group(1).strip() if match else ""


def many_tokens(completion_ids, **kwargs):
    """Reward function that assigns higher scores to longer completions (in tokens)."""
    return [float(len(ids)) for ids in completion_ids]


def has_format(completions, **kwargs):
    contents = [completion[0]["content"] for completion in completions]
    return [1.0 if re.match(r"^<reasoning>", content) else 0.0 for content in contents]


def accuracy(completions, ground_truth, **kwargs):
    contents = [Judge().read(completion) for completion in completions]
    return [1.0 if c == gt else 0.0 for c, gt in zip(contents, ground_truth)]


def everything(prompts, completions, completion_ids, ground_truth, task, question, **kwargs):
    assert prompts[0][-1]["role"] == "user" and prompts[0][-1]["content"] == question[0]
    assert completions[0][0]["role"] == "assistant"
    assert isinstance(completion_ids[0][0], int)
    assert "prompt" not in kwargs and "prompt_ids" not in kwargs
    return [0.5 for _ in zip(prompts, completions, completion_ids, ground_truth, task)]


def math_reward_func(prompts, completions, task, **kwargs):
    return [1.0 if t == "math" else None for t in task]


def coding_reward_func(prompts, completions, task, **kwargs):
    return [-1.0 if t == "code" else None for t in task]


def no_keywords(completions, ground_truth):
    return [0.25 for _ in ground_truth]


async def waits(prompts, completions, **kwargs):
    await asyncio.sleep(0.001)
    return [1.0 if completion else 0.0 for completion in completions]
'''

TASKS = ("math", "math", "code", "other")


@pytest.fixture
def trl(tmp_path):
    """Path of a file of reward functions."""
    path = tmp_path / "trl_style.py"
    path.write_text(TRL_STYLE)
    return path


def scored(trainer, *tasks):
    """compute_rewards for one completion of each task: (totals, per function)."""
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Q{n}"}],
            "prompt_ids": [1],
            "question": f"Q{n}",
            "ground_truth": "12",
            "task": task,
        }
        for n, task in enumerate(tasks)
    ]
    responses = [completion([5] * (n + 1), text=PERFECT) for n in range(len(tasks))]
    return trainer.compute_rewards(rows, responses)


def trainer_with(model_dir, data_dir, tmp_path, functions, **settings):
    return make_trainer(
        model_dir, data_dir, tmp_path / "o", None, reward_funcs=list(functions), **settings
    )


def test_functions_in_the_style_of_trls_documentation(grpo, model_dir, data_dir, tmp_path, trl):
    values = {
        "many_tokens": [1.0, 2.0, 3.0, 4.0],
        "has_format": [1.0] * 4,
        "accuracy": [1.0] * 4,
        "everything": [0.5] * 4,
        "math_reward_func": [1.0, 1.0, None, None],
        "coding_reward_func": [None, None, -1.0, None],
        "no_keywords": [0.25] * 4,
        "waits": [1.0] * 4,
    }
    names = {f"{trl}:{name}": expected for name, expected in values.items()}
    trainer = trainer_with(model_dir, data_dir, tmp_path, names)
    totals, per_function = scored(trainer, *TASKS)
    for name, expected in names.items():
        got = [None if math.isnan(x) else x for x in per_function[name].tolist()]
        assert got == expected, name
    assert totals.tolist() == [sum(filter(None, row)) for row in zip(*values.values(), strict=True)]


def test_weights_scale_each_function_and_none_is_left_out(grpo, model_dir, data_dir, tmp_path, trl):
    names = [f"{trl}:math_reward_func", f"{trl}:coding_reward_func", f"{trl}:many_tokens"]
    weights = [2.0, 3.0, 0.1]
    trainer = trainer_with(model_dir, data_dir, tmp_path, names, reward_weights=weights)
    totals, _ = scored(trainer, *TASKS)
    assert totals == pytest.approx([2.1, 2.2, -2.7, 0.4])


def test_a_row_that_no_function_values_gets_no_advantage(grpo, model_dir, data_dir, tmp_path, trl):
    names = [f"{trl}:math_reward_func", f"{trl}:coding_reward_func"]
    trainer = trainer_with(model_dir, data_dir, tmp_path, names)
    totals, _ = scored(trainer, *TASKS)
    assert totals[:3].tolist() == [1.0, 1.0, -1.0]
    assert math.isnan(totals[3])
    advantages = grpo.group_advantages(totals[None])[0]
    std = np.std([1.0, 1.0, -1.0], ddof=1)
    expected = [(r - 1 / 3) / (std + 1e-4) for r in (1, 1, -1)]
    assert advantages == pytest.approx([*expected, 0.0])


def test_training_goes_on_when_some_rows_have_no_reward(grpo, model_dir, data_dir, tmp_path):
    def sometimes(completions, question, **_):
        return [None if "1 +" in q else float(n) for n, q in enumerate(question)]

    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", sometimes)
    (record,) = trainer.train_step([0, 1])
    assert math.isfinite(record["loss"])
    assert record["groups_without_signal"] == 0.5
    assert record["reward_mean"] == pytest.approx(1.5)
    assert record["reward_std"] == pytest.approx(np.std(range(4), ddof=1))


def test_rewards_are_found_by_module_and_by_name(grpo):
    by_module = importing.load_reward("helpers:vowels", grpo.REWARDS)
    assert by_module.__name__ == "vowels"
    assert importing.load_reward("xmlcount", grpo.REWARDS) is grpo.xmlcount_reward_func


def test_a_reward_file_does_not_replace_a_module_of_that_name(tmp_path, grpo):
    """A file json.py is not the json that everything else imports."""
    import json
    import sys

    (tmp_path / "json.py").write_text(TRL_STYLE)
    assert importing.load_reward(f"{tmp_path}/json.py:accuracy", {})
    assert sys.modules["json"] is json


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("corectness", "not built in"),
        ("missing.py:f", "missing.py does not exist"),
        ("no_such_module_anywhere:f", "no_such_module_anywhere"),
        ("helpers:vowel", "has no function 'vowel'"),
        ("helpers:QUIET", "has no function 'QUIET'"),
    ],
)
def test_an_unknown_reward_is_refused(grpo, spec, complaint):
    with pytest.raises(UserError, match=complaint):
        importing.load_reward(spec, grpo.REWARDS)


def call(function, texts=("first text", "second text"), timeout=5.0, **columns):
    """The values of one function, called as the trainer does."""
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    calls = reward_calls.RewardCalls(timeout)
    return calls({"judge": function}, {**columns, "completions": completions})["judge"].tolist()


def divides(completions, **_):
    return [1 / 0]


async def divides_later(completions, **_):
    return [1 / 0]


async def sleeps(completions, **_):
    await asyncio.sleep(60)


PASSED = "for 2 completions:\n  'first text'\n  'second text'"


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        (lambda **_: [1.0], f"returned 1 values {PASSED}"),
        (lambda **_: 1.0, f"not a list of one number a completion, {PASSED}"),
        (lambda **_: None, "not a list"),
        (lambda **_: "ab", "not a list"),
        (lambda **_: [1.0, math.nan], "returned nan.*second text"),
        (lambda **_: [math.inf, 0.0], "returned inf.*first text"),
        (lambda **_: [0.0, "1"], "returned '1'.*second text"),
        (lambda **_: [0.0, [1.0]], "second text"),
        (lambda **_: [0.0, 1j], "second text"),
        (divides, rf"raised ZeroDivisionError: division by zero .*test_calls.py.* {PASSED}"),
        (divides_later, rf"raised ZeroDivisionError: .*test_calls.py.* {PASSED}"),
        (lambda solutions, **_: [0.0, 0.0], f"TypeError.*solutions.* {PASSED}"),
        (sleeps, f"took longer than reward_timeout = 0.05 seconds {PASSED}"),
    ],
    ids=range(13),
)
def test_a_reward_that_fails_stops_the_run_with_its_name(function, complaint):
    with pytest.raises(RunError, match=rf"(?s)reward judge .*{complaint}"):
        call(function, timeout=0.05 if function is sleeps else 5.0)


def test_long_completions_are_shortened_in_messages():
    with pytest.raises(RunError) as caught:
        call(divides, ["x" * 9_000] * 64)
    assert "for 64 completions:\n  'xxx" in str(caught.value)
    assert str(caught.value).endswith("xxx...'\n  and 62 more")
    assert len(str(caught.value)) < 1_000


def test_what_counts_as_a_list_of_numbers():
    for values in ([1, 0], (1.0, 0.0), np.array([1.0, 0.0]), [True, False], np.array([1, 0])):
        assert call(lambda values=values, **_: values) == [1.0, 0.0]


def test_group_advantages_by_hand(grpo):
    """Mean 2, sample standard deviation sqrt((1 + 0 + 1 + 4) / 3) of (1, 2, 3, 4) is 1.29..."""
    rewards = np.array([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 1.0]])
    expected = [
        [-1.1618, -0.38727, 0.38727, 1.1618],
        [-0.4999, -0.4999, -0.4999, 1.4997],
    ]
    assert grpo.group_advantages(rewards) == pytest.approx(np.array(expected), abs=1e-4)
    exact = (4.0 - 2.5) / (math.sqrt(5 / 3) + 1e-4)
    assert grpo.group_advantages(rewards)[0, 3] == pytest.approx(exact, rel=1e-12)


def test_a_group_without_spread_says_nothing(grpo):
    rewards = np.array([[0.1 + 0.2, 0.3, 0.3], [1.0, 1.0, 1.0 + 2e-8], [5.0, 5.0, 5.0]])
    advantages = grpo.group_advantages(rewards)
    assert (advantages[[0, 2]] == 0).all()
    assert advantages[1, 2] > 0, "a span above 1e-8 is a difference"


def test_rows_without_a_reward_count_nowhere(grpo):
    nan = math.nan
    rewards = np.array([[1.0, nan, 3.0], [nan, nan, nan], [nan, 2.0, nan]])
    advantages = grpo.group_advantages(rewards)
    assert advantages[0] == pytest.approx([-1 / (2**0.5 + 1e-4), 0.0, 1 / (2**0.5 + 1e-4)])
    assert (advantages[1:] == 0).all()


def test_the_default_set_and_the_names_of_the_settings(grpo, model_dir, data_dir, tmp_path):
    config = make_config(model_dir, data_dir, tmp_path / "o")
    assert config.reward_funcs == ["correctness", "xmlcount", "soft_format", "int"]
    trainer = grpo.build_trainer(config, "test")
    rows = [{**trainer.train_dataset[7]}]
    right = PERFECT.replace("12", rows[0]["answer"])
    totals, values = trainer.compute_rewards(rows, [completion([5], text=right)])
    assert totals.tolist() == [3.5]
    assert list(values) == config.reward_funcs


def spoils(**columns):
    """Changes all that it gets, as deep as it goes."""

    def spoil(value):
        for part in value.values() if isinstance(value, dict) else value:
            if isinstance(part, list | dict):
                spoil(part)
        value.clear()

    count = len(columns["completions"])
    for value in columns.values():
        if isinstance(value, list):
            spoil(value)
    return [float(n) for n in range(count)]


async def spoils_later(**columns):
    return spoils(**columns)


@pytest.mark.parametrize("spoiler", [spoils, spoils_later])
def test_what_a_function_changes_is_its_own(model_dir, data_dir, tmp_path, spoiler):
    """Neither trained on, nor seen by the next function, the next update or the log."""
    seen = []

    def sees(**columns):
        seen.append(copy.deepcopy({n: v for n, v in columns.items() if isinstance(v, list)}))
        return [0.0] * len(columns["completions"])

    trainer = make_trainer(model_dir, data_dir, tmp_path / "o")
    for row in trainer.train_dataset:
        row["tests"] = [{"in": [1, 2], "out": {"is": ["3"]}}]
    completions = trainer.generate_responses([0, 1])
    rows = [trainer.train_dataset[n] for n in (0, 1) for _ in range(4)]
    before = copy.deepcopy((rows, completions))
    for functions in ({"sees": sees}, {"spoils": spoiler, "sees": sees}):
        trainer.reward_funcs = functions
        trainer.compute_rewards(rows, completions)
    assert (rows, completions) == before
    assert seen[0] == seen[1]
    assert seen[0]["completion_ids"] == [c.sampled_ids for c in completions]
    assert seen[0]["tests"][7] == [{"in": [1, 2], "out": {"is": ["3"]}}]


def test_training_is_on_the_tokens_that_were_sampled(model_dir, data_dir, tmp_path):
    def reverses(completion_ids, completions, prompts, **_):
        values = [float(sum(n * i for n, i in enumerate(ids)) % 101) for ids in completion_ids]
        for ids in completion_ids:
            ids.reverse()
        completions.reverse()
        prompts.clear()
        return values

    def leaves_alone(completion_ids, **_):
        return [float(sum(n * i for n, i in enumerate(ids)) % 101) for ids in completion_ids]

    trained = []
    for number, function in enumerate((reverses, leaves_alone)):
        trainer = make_trainer(model_dir, data_dir, tmp_path / f"o{number}", function)
        trainer.train_step([0, 1])
        trainer.train_step([2, 3])
        trained.append(snapshot(trainer))
    assert trained[0] == trained[1]


def test_parameters_that_a_function_changes_are_not_those_of_the_run(tmp_path, grpo):
    """They stand in the checkpoint: a run whose settings differ is not gone on with."""
    path = tmp_path / "mine.py"
    path.write_text("def f(completions, words=(), **_):\n    words.append(1)\n    return [0.0]\n")
    config = grpo.MLXGRPOConfig(reward_funcs=["int", f"{path}:f"])
    config.reward_kwargs = {f"{path}:f": {"words": ["a"]}}
    path.write_text(path.read_text().replace("words=()", "words=[]"))
    function = by_name.load_rewards(config, grpo.REWARDS)[f"{path}:f"]
    call(function, ["x"])
    assert config.reward_kwargs == {f"{path}:f": {"words": ["a"]}}
