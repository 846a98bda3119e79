"""The five rewards, TRL's interface for other ones, and group advantages."""

import asyncio
import math
import time

import numpy as np
import pytest
from helpers import make_config, make_trainer

from utils.base.errors import RunError, UserError
from utils.rewards import calls as reward_calls
from utils.rewards import importing

PERFECT = "<reasoning>\nthree\ntimes four\n</reasoning>\n<answer>\n12\n</answer>"


def reward(grpo, name, text, answer="12"):
    (value,) = grpo.REWARDS[name](completions=[[{"content": text}]], answer=[answer], prompts=[])
    return value


OF_THE_DOCUMENTS = ["correctness", "int", "strict_format", "soft_format", "xmlcount"]


def all_rewards(grpo, text, answer="12"):
    return [reward(grpo, name, text, answer) for name in OF_THE_DOCUMENTS]


def test_a_perfect_answer_that_stopped_earns_every_maximum(grpo):
    """Sampling stops right after </answer>: no line break follows, and none is asked for."""
    assert list(grpo.REWARDS)[:5] == OF_THE_DOCUMENTS
    assert all_rewards(grpo, PERFECT) == [2.0, 0.5, 0.5, 0.5, 0.5]
    assert all_rewards(grpo, f"\n \t{PERFECT}\n\n ") == [2.0, 0.5, 0.5, 0.5, 0.5]


def test_the_empty_answer_earns_nothing(grpo):
    for text in ("", "   \n", "12", "<reasoning>", "</answer>", "</answer>12<answer>"):
        assert all_rewards(grpo, text) == [0.0] * 5


@pytest.mark.parametrize(
    ("given", "expected", "equal"),
    [
        ("1234", "1,234.00", True),
        ("$1234", "1,234", True),
        ("-$5", "-5.0", True),
        ("+3", "3", True),
        ("12.", "12", True),
        (".5", "0.50", True),
        ("0", "-0", True),
        ("10000000000000001", "10000000000000000", False),  # equal as floats
        ("12", "1,2", False),
        ("12 apples", "12", False),
        ("blue", " blue\n", True),
        ("Blue", "blue", False),
        ("", "12", False),
        ("1e3", "1000", False),
        ("१२", "12", False),  # digits, but not the ones asked for
        ("nan", "nan", True),
    ],
)
def test_correctness_compares_numbers_as_numbers(grpo, given, expected, equal):
    text = f"<answer>{given}</answer>"
    assert reward(grpo, "correctness", text, expected) == (2.0 if equal else 0.0)


def test_the_last_complete_answer_counts(grpo):
    assert grpo.extract_xml_answer("<answer>1</answer> no <answer>2</answer> <answer>3") == "2"
    assert grpo.extract_xml_answer("<answer>1 <answer>\n2\n</answer>") == "2"
    assert grpo.extract_xml_answer("answer</answer>") == ""
    assert grpo.extract_hash_answer("#### 1\nso\n#### 1,234 ") == "1,234"
    assert grpo.extract_hash_answer("1,234") is None


@pytest.mark.parametrize("number", ["-3", "1,234", "0", "007", "-12,345,678"])
def test_integers(grpo, number):
    assert reward(grpo, "int", f"<answer>{number}</answer>") == 0.5


@pytest.mark.parametrize(
    "text", ["3.0", "1,23", "12,3456", "--3", "+3", "- 3", "three", "3\n4", "٣", ""]
)
def test_not_integers(grpo, text):
    assert reward(grpo, "int", f"<answer>{text}</answer>") == 0.0


def test_soft_format_takes_any_spacing_and_strict_format_own_lines(grpo):
    spaced = {
        "<reasoning>a</reasoning><answer>b</answer>": (0.0, 0.5),
        "<reasoning>a\nb</reasoning>\n\n <answer>c\nd</answer>": (0.0, 0.5),
        "<reasoning>\na\nb\n</reasoning>\n<answer>\nc\nd\n</answer>\n": (0.5, 0.5),
        "<reasoning>\n</reasoning>\n<answer>\n</answer>": (0.5, 0.5),
        "<reasoning>\na\n</reasoning>\n\n<answer>\nb\n</answer>": (0.0, 0.5),
        "<reasoning>\na</reasoning>\n<answer>\nb\n</answer>": (0.0, 0.5),
        "<reasoning>\na\n</reasoning>\n<answer>\nb</answer>": (0.0, 0.5),
        "<reasoning>\na\n</reasoning>\n<answer>b\n</answer>": (0.0, 0.5),
    }
    for text, values in spaced.items():
        got = reward(grpo, "strict_format", text), reward(grpo, "soft_format", text)
        assert got == values, text


@pytest.mark.parametrize(
    "text",
    [
        PERFECT + PERFECT,
        PERFECT + "<answer>\n12\n</answer>",
        PERFECT.replace("three", "<answer>\n1\n</answer>"),
        PERFECT.replace("three", "<reasoning>"),
        PERFECT.replace("12", "<reasoning>\n12\n</reasoning>"),
        PERFECT.replace("</answer>", ""),
        PERFECT.replace("</reasoning>", ""),
        PERFECT.replace("<answer>", ""),
        PERFECT.replace("<reasoning>", ""),
        PERFECT.replace("</reasoning>\n<answer>", "</reasoning>\nso\n<answer>"),
        "so\n" + PERFECT,
        PERFECT + "\nso",
        "<answer>\n12\n</answer>\n<reasoning>\nx\n</reasoning>",
        "<reasoning>\n<answer>\nx\n</reasoning>\n12\n</answer>",
    ],
    ids=range(14),
)
def test_nested_duplicate_unclosed_and_surrounded_tags_have_no_format(grpo, text):
    assert reward(grpo, "strict_format", text) == 0.0
    assert reward(grpo, "soft_format", text) == 0.0


def test_xmlcount_pays_a_quarter_per_pair_and_charges_what_follows(grpo):
    scores = {
        "<reasoning>a</reasoning>": 0.25,
        "<answer>a</answer>": 0.25,
        "</reasoning>a<reasoning><answer>b</answer>": 0.25,
        "<reasoning>a</reasoning><answer>b": 0.25,
        "<reasoning>a</reasoning><reasoning>b</reasoning><answer>c</answer>": 0.25,
        "<answer>1</answer><answer>2</answer>": 0.0,
        PERFECT + "\n" + "x" * 100: 0.4,
        PERFECT + "x": 0.499,
        PERFECT + "x" * 10_000: 0.0,
    }
    for text, value in scores.items():
        assert reward(grpo, "xmlcount", text) == pytest.approx(value, abs=1e-12), text[:80]


HOSTILE = {
    "plain": "a",
    "spaces": " ",
    "openings": "<reasoning>",
    "answers": "<answer>",
    "pairs": "<answer>1</answer>",
    "closings": "</answer>",
    "digits": "1",
    "groups": "1,000",
    "almost": "<reasoning>\n</reasoning>\n<answer>\n",
}


@pytest.mark.parametrize("unit", HOSTILE.values(), ids=HOSTILE)
def test_rewards_are_linear_in_the_length(grpo, unit):
    """100,000 characters of the worst kind take milliseconds, bare and inside the tags."""
    filling = unit * (100_000 // len(unit))
    start = time.perf_counter()
    for text in (filling, PERFECT.replace("three", filling), PERFECT.replace("12", filling)):
        all_rewards(grpo, text, answer=filling)
    assert time.perf_counter() - start < 0.5


# TRL's interface, with functions as its documentation writes them.

TRL_STYLE = '''
from __future__ import annotations

import asyncio
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


def scored(grpo, trainer, *tasks):
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
    responses = [grpo.Completion([5] * (n + 1), text=PERFECT) for n in range(len(tasks))]
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
    totals, per_function = scored(grpo, trainer, *TASKS)
    for name, expected in names.items():
        got = [None if math.isnan(x) else x for x in per_function[name].tolist()]
        assert got == expected, name
    assert totals.tolist() == [sum(filter(None, row)) for row in zip(*values.values(), strict=True)]


def test_weights_scale_each_function_and_none_is_left_out(grpo, model_dir, data_dir, tmp_path, trl):
    names = [f"{trl}:math_reward_func", f"{trl}:coding_reward_func", f"{trl}:many_tokens"]
    weights = [2.0, 3.0, 0.1]
    trainer = trainer_with(model_dir, data_dir, tmp_path, names, reward_weights=weights)
    totals, _ = scored(grpo, trainer, *TASKS)
    assert totals == pytest.approx([2.1, 2.2, -2.7, 0.4])


def test_a_row_that_no_function_values_gets_no_advantage(grpo, model_dir, data_dir, tmp_path, trl):
    names = [f"{trl}:math_reward_func", f"{trl}:coding_reward_func"]
    trainer = trainer_with(model_dir, data_dir, tmp_path, names)
    totals, _ = scored(grpo, trainer, *TASKS)
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
    totals, values = trainer.compute_rewards(rows, [grpo.Completion([5], text=right)])
    assert totals.tolist() == [3.5]
    assert list(values) == config.reward_funcs
