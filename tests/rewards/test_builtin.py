"""Rewards beyond the documents' five: formulas, parameters, mathematics, what functions log."""

import asyncio
import builtins
import threading

import pytest
from helpers import make_config

from utils.base.errors import RunError, UserError
from utils.rewards import builtin, by_name
from utils.rewards import calls as reward_calls


def loaded(grpo, model_dir, data_dir, tmp_path, name, **settings):
    """A built-in reward with its parameters, as the trainer has it."""
    settings = {"reward_funcs": [name], "max_new_tokens": 100, **settings}
    config = make_config(model_dir, data_dir, tmp_path / "o", **settings)
    return by_name.load_rewards(config, grpo.REWARDS)[name]


@pytest.fixture
def load(grpo, model_dir, data_dir, tmp_path):
    def load(name, **parameters):
        kwargs = {"reward_kwargs": {name: parameters}} if parameters else {}
        return loaded(grpo, model_dir, data_dir, tmp_path, name, **kwargs)

    return load


def tokens(*lengths):
    return [list(range(length)) for length in lengths]


def test_soft_overlong_is_equation_13_of_dapo(load):
    """The example of TRL's documentation, and both ends of the slope."""
    reward = load("soft_overlong", cache=20)
    assert reward(completion_ids=tokens(0, 80, 90, 100, 150)) == [0, 0, -0.5, -1, -1]
    assert load("soft_overlong")(completion_ids=tokens(85)) == [-0.25], "a fifth, as in the paper"
    short = load("soft_overlong", max_len=10, cache=10)
    assert short(completion_ids=tokens(0, 5, 10)) == [0, -0.5, -1]


def test_repetition_counts_ngrams_as_trl_does(load):
    """The example of TRL's documentation; fewer tokens than an n-gram are no repetition."""
    reward = load("repetition", ngram_size=2)
    assert reward(completion_ids=[[1, 2, 3, 4], [5] * 5, [1], []]) == [0, -0.75, 0, 0]
    doubled = load("repetition", ngram_size=1, max_penalty=-2.0)
    assert doubled(completion_ids=[[1, 1, 2, 2], [7, 8]]) == [-1.0, 0]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("17 + 25 = 42", "42"),
        ("The answer is 42.", "42"),
        ("so 12-5 leaves 7, of which 12-5", "5"),
        ("x = -5", "-5"),
        ("(3)-5", "5"),
        ("it costs $1,234.50.", "$1,234.50"),
        ("-$7", "-$7"),
        ("1,234,567 and 1,2345", "2345"),
        ("2, 3,4", "4"),
        ("half is .5", ".5"),
        ("minus half is -.5", "-.5"),
        ("5 - $-3 is 2, or 5-$3", "$3"),
        ("42%", "42"),
        ("**42**\n", "42"),
        ("\\boxed{42}", "42"),
        ("<answer>\n42\n</answer>", "42"),
        ("#### 42", "42"),
        ("٤٢ or forty-two", ""),
        ("", ""),
    ],
)
def test_the_last_number_of_a_text(text, number):
    assert builtin.last_number(text) == number


def test_last_number_asks_for_no_format(load):
    reward = load("last_number")
    texts = ["6*7 = 42", "42 and not 41", "I do not know", "42.00", "forty-two", "42"]
    expected = ["42", "42", "42", "42", "forty-two", "1,042"]
    completions = [[{"content": text}] for text in texts]
    assert reward(completions=completions, answer=expected) == [1, 0, 0, 1, None, 0]


def test_a_last_number_is_found_quickly_in_a_long_text():
    for unit in ("1,111,", "1", "-", "$1", "1.1.", "(1"):
        builtin.last_number(unit * 20_000)


def test_cosine_favours_short_right_and_long_wrong_answers(load):
    """TRL's formula at its ends and in the middle (its documentation: 0.75 and -0.75)."""
    reward = load("cosine")
    texts = ["<answer>12</answer>", "<answer>13</answer>"]
    lengths = (0, 50, 100, 250)
    completions = [[{"content": text}] for text in texts for _ in lengths]
    values = reward(completions=completions, completion_ids=tokens(*lengths) * 2, answer=["12"] * 8)
    assert values == pytest.approx([1.0, 0.75, 0.5, 0.5, -1.0, -0.75, -0.5, -0.5])
    other = load("cosine", max_len=20, max_value_correct=3.0, min_value_correct=1.0)
    assert other(
        completions=[[{"content": texts[0]}]], completion_ids=tokens(10), answer=["12"]
    ) == pytest.approx([2.0])


def test_length_goes_down_from_its_target(load):
    assert load("length")(completion_ids=tokens(0, 50, 100, 200)) == [0, -0.5, -1, -1]
    reward = load("length", target=60, penalty=-2.0)
    assert reward(completion_ids=tokens(60, 80, 100)) == [0, -1, -2]


BAD_PARAMETERS = {
    "unknown": ("cosine", {"max_length": 5}, "no parameter 'max_length'.*did you mean 'max_len'"),
    "of the data": ("length", {"completion_ids": []}, "no parameter 'completion_ids'"),
    "text": ("length", {"target": "3"}, "target of length must be like its default 0, not '3'"),
    "bool": ("cosine", {"max_len": True}, "max_len of cosine must be like its default"),
    "positive": ("repetition", {"max_penalty": 1.0}, "max_penalty = 1.0 at most 0"),
    "no n-gram": ("repetition", {"ngram_size": 0}, "ngram_size = 0 must be at least 1"),
    "far target": ("length", {"target": 100}, "target = 100 must be at least 0 and below max_len"),
    "large cache": ("soft_overlong", {"cache": 101}, "cache = 101 must be above 0 and at most"),
    "a setting": ("remote_rm", {"timeout": 3.0}, "remote_rm has no parameter 'timeout'"),
    "none at all": ("correctness", {"value": 1.0}, "it has none with a default"),
}


@pytest.mark.parametrize("case", BAD_PARAMETERS)
def test_a_parameter_that_can_not_be_is_refused(load, case):
    name, parameters, complaint = BAD_PARAMETERS[case]
    with pytest.raises(UserError, match=complaint):
        load(name, **parameters)


def test_parameters_are_for_rewards_that_are_used(load, grpo, model_dir, data_dir, tmp_path):
    for kwargs, complaint in (
        ({"length": {"target": 3}}, "names 'length', which is not among reward_funcs: int"),
        ({"int": 3}, "reward_kwargs.int = 3 must be a table"),
    ):
        with pytest.raises(UserError, match=complaint):
            make_config(
                model_dir, data_dir, tmp_path / "o", reward_funcs=["int"], reward_kwargs=kwargs
            )


OWN = """
calls = []

def capped(completions, limit=10, **kwargs):
    return [min(len(c[0]["content"]), limit) for c in completions]

class Counter:
    def __init__(self, start=0, step=1):
        calls.append((start, step))
        self.next, self.step = start, step

    def __call__(self, completions):
        self.next += self.step
        return [self.next] * len(completions)

class Broken:
    def __init__(self):
        raise LookupError("no licence")
"""


def test_own_functions_and_classes_take_parameters(grpo, model_dir, data_dir, tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    names = [f"{path}:capped", f"{path}:Counter"]
    settings = {"reward_funcs": names, "reward_kwargs": {names[0]: {"limit": 3}}}
    settings["reward_kwargs"][names[1]] = {"start": 5, "step": 2}
    config = make_config(model_dir, data_dir, tmp_path / "o", **settings)
    rewards = by_name.load_rewards(config, grpo.REWARDS)
    calls = reward_calls.RewardCalls()
    completions = [[{"content": "abcdef"}], [{"content": "a"}]]
    first = calls(rewards, {"completions": completions})
    assert [value.tolist() for value in first.values()] == [[3, 1], [7, 7]]
    second = calls(rewards, {"completions": completions, "limit": [1, 1]})
    assert [value.tolist() for value in second.values()] == [[3, 1], [9, 9]], "made once"
    for kwargs, complaint in (
        ({names[0]: {"limt": 3}}, "no parameter 'limt'.*did you mean 'limit'"),
        ({names[0]: {"completions": 3}}, "no parameter 'completions'"),
    ):
        config = make_config(
            model_dir, data_dir, tmp_path / "o", **{**settings, "reward_kwargs": kwargs}
        )
        with pytest.raises(UserError, match=complaint):
            by_name.load_rewards(config, grpo.REWARDS)
    broken = make_config(model_dir, data_dir, tmp_path / "o", reward_funcs=[f"{path}:Broken"])
    with pytest.raises(UserError, match=r"Broken: LookupError: no licence \(.*own.py, line 18\)"):
        by_name.load_rewards(broken, grpo.REWARDS)


EQUIVALENT = [
    ("1/2", "0.5", 1.0),
    (r"\frac{1}{2}", "1/2", 1.0),
    (r"\boxed{\frac12}", "0.5", 1.0),
    ("1,234.00", "1234", 1.0),
    (r"x^2 + 2x + 1", "(x+1)^2", 1.0),
    (r"\sqrt{8}", r"2\sqrt{2}", 1.0),
    (r"\{2, 1\}", r"\{1, 2\}", 1.0),
    ("3", "4", 0.0),
    ("", "4", 0.0),
    ("Blue", "blue", 1.0),
    ("lube", "blue", 0.0),  # as a product of letters they are equal
    ("New York", "new york", 1.0),
    ("York New", "New York", 0.0),
    ("7", "#!", None),
]


@pytest.mark.parametrize(("given", "expected", "value"), EQUIVALENT)
def test_math_compares_what_the_answers_mean(grpo, given, expected, value):
    for text in (f"<reasoning>\n9\n</reasoning>\n<answer>\n{given}\n</answer>", given):
        assert grpo.REWARDS["math"](completions=[[{"content": text}]], answer=[expected]) == [value]


def test_math_reads_a_whole_text_without_tags(grpo):
    text = r"First 3 + 4 = 7, so we get \boxed{\frac{7}{2}}."
    assert grpo.REWARDS["math"](completions=[[{"content": text}]], answer=["3.5"]) == [1.0]
    late = [[{"content": "We go on. " * 200 + text}]]
    assert grpo.REWARDS["math"](completions=late, answer=["3.5"]) == [1.0], "it is at the end"
    assert grpo.REWARDS["math"](completions=late, answer=["1+" * 600 + "1"]) == [None], "too long"


def test_math_works_in_a_thread(grpo):
    """Where math-verify can't set its alarms."""
    values = []
    arguments = {"completions": [[{"content": "<answer>1/2</answer>"}]], "answer": ["0.5"]}
    thread = threading.Thread(target=lambda: values.extend(grpo.REWARDS["math"](**arguments)))
    thread.start()
    thread.join()
    assert values == [1.0]


def test_math_without_its_package_names_the_extra(load, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "math_verify":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="needs the package math-verify: uv sync --extra math"):
        load("math")


def completions(*texts):
    return {"completions": [[{"content": text}] for text in texts]}


def test_async_functions_wait_together():
    """Each can only end when both have begun: one after the other they would never."""
    begun = {"a": None, "b": None}

    async def meet(mine, other):
        begun[mine] = begun[mine] or asyncio.Event()
        begun[mine].set()
        while not begun[other]:
            await asyncio.sleep(0.005)
        return [1.0]

    async def a(completions):
        return await meet("a", "b")

    async def b(completions):
        return await meet("b", "a")

    def c(completions):
        return [2.0]

    values = reward_calls.RewardCalls(60)({"a": a, "c": c, "b": b}, completions("x"))
    assert {name: value.tolist() for name, value in values.items()} == {
        "a": [1],
        "c": [2],
        "b": [1],
    }


def test_one_loop_serves_all_calls():
    """So a session that a function keeps open stays usable."""
    loops = set()

    async def reward(completions):
        loops.add(asyncio.get_running_loop())
        return [0.0]

    calls = reward_calls.RewardCalls(5)
    for _ in range(3):
        calls({"a": reward, "b": reward}, completions("x"))
    assert len(loops) == 1


def test_a_failure_cancels_what_still_waits():
    cancelled = threading.Event()

    async def waits(completions):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async def fails(completions):
        raise LookupError("gone")

    with pytest.raises(RunError, match="reward fails raised LookupError: gone"):
        reward_calls.RewardCalls(60)({"waits": waits, "fails": fails}, completions("x"))
    assert cancelled.wait(60)


def test_waiting_lets_the_caller_stop():
    """Ctrl-C asks the trainer to stop; it looks between its blocks of work."""

    async def waits(completions):
        await asyncio.sleep(60)

    def pulse():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reward_calls.RewardCalls(60)({"waits": waits}, completions("x"), pulse=pulse)


def test_extras_have_a_value_for_each_completion():
    def wrong(completions, log_extra):
        log_extra("seen", [1])
        return [0.0, 0.0]

    with pytest.raises(RunError, match=r"reward wrong: log_extra\('seen'\) got 1 values for 2"):
        reward_calls.RewardCalls()({"wrong": wrong}, completions("x", "y"))


def test_a_column_is_not_taken_for_a_parameter_of_its_name(load):
    columns = completions("x", "y") | {"completion_ids": tokens(50, 100)}
    columns |= {"target": ["a", "b"], "penalty": [9.0, 9.0]}
    values = reward_calls.RewardCalls()({"length": load("length")}, columns)["length"]
    assert values.tolist() == [-0.5, -1]


def test_a_timeout_that_nothing_heeds_is_refused(grpo, model_dir, data_dir, tmp_path):
    config = make_config(model_dir, data_dir, tmp_path / "o", reward_timeout=3.0)
    with pytest.raises(UserError, match="reward_timeout has no effect"):
        by_name.load_rewards(config, grpo.REWARDS)
