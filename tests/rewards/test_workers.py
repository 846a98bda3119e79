"""Rewards in other processes: same values, limits on time, processes that die, work ahead."""

import math
import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from fuzz import time_limit
from helpers import make_config, make_trainer, read_log, run_training

from utils.base.errors import RunError, UserError
from utils.device import cores
from utils.rewards import by_name
from utils.rewards import calls as reward_calls

OWN = """
import asyncio, os, pathlib, sys, time

def digest(completion_ids, log_metric, log_extra, trainer_state, factor=1, **kwargs):
    log_metric("step", trainer_state.global_step)
    log_extra("pid", [os.getpid()] * len(completion_ids))
    return [factor * (sum(n * i for n, i in enumerate(ids, 1)) % 101) for ids in completion_ids]

def place_in_group(prompts, completions):
    assert len({str(prompt) for prompt in prompts}) == 1
    return list(range(len(completions)))

def modules(completions):
    loaded = [name for name in ("mlx", "transformers", "mlx_grpo") if name in sys.modules]
    return [len(loaded)] * len(completions)

class Counter:
    def __init__(self, start):
        self.value = start

    def __call__(self, completions):
        self.value += 1
        return [self.value] * len(completions)

def hangs(completions):
    while "hang" in completions[0][0]["content"]:
        time.sleep(0.01)
    return [0.0] * len(completions)

def killed(completions):
    os.kill(os.getpid(), 9)

def dies(completions):
    os._exit(7)

def leaves(completions):
    sys.exit(3)

def raises(completions):
    raise LookupError("no such key")

def too_few(completions):
    return []

def meets(completions, folder="", count=1):
    pathlib.Path(folder, completions[0][0]["content"]).touch()
    while len(os.listdir(folder)) < count:
        time.sleep(0.01)
    return [1.0] * len(completions)

def odd(completions):
    from decimal import Decimal
    return [None if n % 2 else Decimal("0.5") for n in range(len(completions))]

def numbers(completions, folder=""):
    number = len(os.listdir(folder))
    pathlib.Path(folder, str(number)).touch()
    return [number] * len(completions)

async def later(completions):
    return [1.0] * len(completions)

def prints(completions):
    print("hello", os.read(0, 1))
    return [2.0] * len(completions)
"""


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


@pytest.fixture
def load(grpo, model_dir, data_dir, tmp_path, own):
    """Functions of own.py in workers: (functions, caller)."""

    def load(*names, workers=2, timeout=20.0, **parameters):
        specs = [f"{own}:{name}" for name in names]
        config = make_config(
            model_dir,
            data_dir,
            tmp_path / "o",
            reward_funcs=specs,
            reward_workers=workers,
            reward_timeout=timeout,
            reward_kwargs={spec: parameters for spec in specs} if parameters else {},
        )
        return by_name.load_rewards(config, grpo.REWARDS)

    return load


def columns(*prompts, group=2, texts=None):
    """`group` completions of each prompt."""
    prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    rows = [prompt for prompt in prompts for _ in range(group)]
    texts = texts or [f"text {n}" for n in range(len(rows))]
    completions = [[{"content": text}] for text in texts]
    ids = [list(range(n, n + 5)) for n in range(len(rows))]
    return {"prompts": rows, "completions": completions, "completion_ids": ids}


def call(functions, given, state=None):
    calls = reward_calls.RewardCalls(5)
    (values,) = calls(functions, given, state).values()
    return values.tolist(), calls


def test_values_are_those_of_this_process(load):
    given = columns("a", "b", "c")
    (in_workers,) = load("digest", factor=3).values()
    here = call({"here": in_workers.takes}, given)[0]
    state = reward_calls.TrainerState(global_step=4)
    for workers in (1, 3):
        values, calls = call(load("digest", workers=workers, factor=3), given, state)
        assert values == here
        assert calls.logged.metrics == {"step": [4] * 3}
        pids = calls.logged.columns["pid"]
        assert os.getpid() not in pids
        assert len({*pids}) <= workers


def test_none_and_numbers_of_other_kinds_come_back_from_a_worker(load):
    values = call(load("odd"), columns("a", "b"))[0]
    assert values[::2] == [0.5, 0.5]
    assert all(map(math.isnan, values[1::2]))


def test_a_call_gets_one_prompts_completions(load):
    assert call(load("place_in_group"), columns("a", "b", "a", group=3))[0] == [0, 1, 2] * 3


def test_workers_carry_neither_mlx_nor_the_script(load):
    assert call(load("modules"), columns("a"))[0] == [0, 0]


def test_a_class_is_made_once_in_each_worker(load):
    functions = load("Counter", workers=1, start=5)
    given, calls = columns("a", "b"), reward_calls.RewardCalls(5)
    assert [next(iter(calls(functions, given).values())).tolist() for _ in range(2)] == [
        [6, 6, 7, 7],
        [8, 8, 9, 9],
    ]


def test_a_function_can_neither_read_the_keyboard_nor_break_the_pipe(load, capfd):
    assert call(load("prints"), columns("a"))[0] == [2, 2]
    assert "hello b''" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("killed", "its process ended with exit code -9"),
        ("dies", r"tried to end the program with os._exit\(7\) \(.*own.py, line \d+\) for"),
        ("leaves", r"tried to end the program with sys.exit\(3\) \(.*own.py, line \d+\) for"),
        ("raises", r"raised LookupError: no such key \(.*own.py, line \d+\) for 2 completions:\n"),
        ("too_few", "returned 0 values for 2 completions:\n  'text [02]'\n  'text [13]'"),
    ],
)
def test_a_failure_is_named(load, name, complaint):
    with pytest.raises(RunError, match=rf"(?s)^reward \S*own.py:{name}:? {complaint}"):
        call(load(name), columns("a", "b"))


def test_a_function_that_hangs_is_ended(load):
    """Its process too; the same functions can be called again."""
    functions = load("hangs", timeout=60.0)
    ok = columns("a", "b", "c")
    assert call(functions, ok)[0] == [0] * 6
    (hangs,) = functions.values()
    hangs.timeout = 0.5
    stuck = columns("a", "b", "c", texts=["x", "x", "hang", "hang", "x", "x"])
    with pytest.raises(
        RunError,
        match=r"took longer than reward_timeout = 0.5 seconds for 2 completions:\n  'hang'",
    ):
        call(functions, stuck)
    assert not any(worker.process.poll() is None for worker in hangs.pool.all)
    hangs.timeout = 60.0
    assert call(functions, ok)[0] == [0] * 6


def test_stopping_ends_the_workers(load):
    functions = load("hangs", timeout=60)
    pulses = iter(range(5))

    def pulse():
        if next(pulses) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reward_calls.RewardCalls(5)(functions, columns("a", texts=["hang"] * 2), pulse=pulse)
    pool = next(iter(functions.values())).pool
    with time_limit(60):
        while pool.all:
            time.sleep(0.01)


def test_calls_run_at_the_same_time(load, tmp_path):
    """Each of four calls ends only once all have begun."""
    (tmp_path / "met").mkdir()
    functions = load("meets", workers=4, timeout=60, folder=str(tmp_path / "met"), count=4)
    assert call(functions, columns("a", "b", "c", "d", group=1))[0] == [1] * 4


def test_async_functions_stay_here(load):
    functions = load("later", "numbers")
    assert [type(f).__name__ for f in functions.values()] == ["function", "InWorkers"]


def test_workers_without_work_are_refused(grpo, model_dir, data_dir, tmp_path):
    config = make_config(model_dir, data_dir, tmp_path / "o", reward_workers=2)
    with pytest.raises(UserError, match="reward_workers has no effect"):
        by_name.load_rewards(config, grpo.REWARDS)


def test_training_is_the_same_with_workers(model_dir, data_dir, tmp_path, own):
    """To the last bit, though rewards begin before the last of several batches is sampled."""
    settings = {"reward_funcs": [f"{own}:digest"], "max_updates": 2, "rollout_batch_size": 4}
    logs = []
    for workers in (0, 2):
        folder = tmp_path / f"o{workers}"
        code, trainer = run_training(
            model_dir, data_dir, folder, **settings, reward_workers=workers
        )
        assert code == 0
        records = read_log(folder)
        logs.append([[r["loss"], r["grad_norm"], r["reward_mean"]] for r in records])
        assert not trainer.rewards.calls.parts
    assert logs[0] == logs[1]


def test_rewards_begin_while_the_rest_is_sampled(model_dir, data_dir, tmp_path, own, monkeypatch):
    """Sampling goes on only once the first group was scored; no group is scored twice."""
    monkeypatch.setattr(cores, "EVERY", 0)
    scored, function = tmp_path / "scored", f"{own}:numbers"
    scored.mkdir()
    settings = {"reward_funcs": [function], "reward_workers": 1, "rollout_batch_size": 4}
    settings["reward_kwargs"] = {function: {"folder": str(scored)}}
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", None, **settings)
    pulse, waited = trainer.sampler.pulse, []

    def once_scored(phase):
        if phase == "sampling" and trainer.rewards.calls.parts:
            with time_limit(60):
                while not (scored / "0").exists():
                    time.sleep(0.01)
            waited.append(phase)
        pulse(phase)

    trainer.sampler.pulse = once_scored
    responses = trainer.generate_responses([0, 1, 2])
    assert waited
    rows = [trainer.train_dataset[n] for n in (0, 1, 2) for _ in range(4)]
    assert trainer.compute_rewards(rows, responses)[0].tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_what_began_before_a_second_try_is_dropped(model_dir, data_dir, tmp_path, own, monkeypatch):
    """A rollout that did not fit is sampled again, from its first batch on."""
    monkeypatch.setattr(cores, "EVERY", 0)
    settings = {"reward_funcs": [f"{own}:digest"], "reward_workers": 1, "rollout_batch_size": 4}
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", None, **settings)
    responses = trainer.generate_responses([5, 6])
    assert trainer.rewards.calls.parts
    expected = trainer.generate_responses([0, 1])
    rows = [trainer.train_dataset[n] for n in (0, 1) for _ in range(4)]
    got = trainer.compute_rewards(rows, expected)[0]
    assert (got == trainer.compute_rewards(rows, expected)[0]).all()
    assert (got != trainer.compute_rewards(rows, responses)[0]).any()


def test_workers_end_with_their_parent(tmp_path, own):
    """Also when it is killed."""
    program = (
        "import sys, os; sys.path.insert(0, sys.argv[1])\n"
        "from utils.rewards.workers import new_pool\n"
        "pool = new_pool(1); worker = pool.worker()\n"
        f"worker.ask({{'load': '{own}:hangs', 'parameters': {{}}}}, 20)\n"
        "print(worker.process.pid, flush=True); os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(ROOT)], capture_output=True, text=True, cwd=tmp_path
    )
    pid = int(done.stdout)
    with time_limit(60):
        while alive(pid):
            time.sleep(0.05)
    assert math.copysign(1, done.returncode) == -1


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return not state.stdout.startswith("Z")
