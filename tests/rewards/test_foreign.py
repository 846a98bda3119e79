"""Whatever a reward function does to the process, the run goes on as it was, or fails in words."""

import asyncio
import concurrent.futures
import contextlib
import gc
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT
from helpers import (
    make_trainer,
    mostly_long,
    read_log,
    run_training,
    snapshot,
    stop_after,
    write_toml,
)

from utils.base.errors import RunError, Signalled, UserError
from utils.rewards import by_name, event_loop, foreign, importing
from utils.rewards.calls import RewardCalls
from utils.run import folders, lock


def call(function, timeout=20.0, count=1):
    texts = [[{"role": "assistant", "content": f"text {n}"}] for n in range(count)]
    return RewardCalls(timeout)({"judge": function}, {"completions": texts})["judge"].tolist()


# What ends the program, or looks as if a person did.


def leaves(**_):
    sys.exit(0)


def leaves_with_words(**_):
    sys.exit("that is all")


def leaves_in_text(**_):
    exec("raise SystemExit")


def leaves_at_once(**_):
    os._exit(0)


def aborts(**_):
    os.abort()


def becomes_another_program(**_):
    os.execl("/bin/true", "true")


def interrupts(**_):
    raise KeyboardInterrupt


def cancels(**_):
    raise asyncio.CancelledError


def leaves_in_a_pool(**_):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return list(pool.map(sys.exit, [5]))


def in_a_thread(work):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def has_a_thread_that_leaves(**_):
    in_a_thread(lambda: sys.exit(0))
    return [1.0]


def has_a_thread_that_leaves_at_once(**_):
    in_a_thread(lambda: os._exit(0))
    return [1.0]


class Leaving(list):
    """Whose parts are computed when they are asked for."""

    def __iter__(self):
        sys.exit(9)


def returns_what_leaves(**_):
    return Leaving([1.0])


async def leaves_later(**_):
    await asyncio.sleep(0)
    sys.exit(0)


async def leaves_at_once_later(**_):
    os._exit(0)


async def interrupts_later(**_):
    raise KeyboardInterrupt


async def cancels_itself(**_):
    raise asyncio.CancelledError


async def part_leaves(**_):
    return await asyncio.gather(leaves_later())


async def forgotten_part_leaves(**_):
    parts = [asyncio.create_task(leaves_later())]
    while not parts[0].done():
        await asyncio.sleep(0)
    return [1.0]


async def callback_leaves(**_):
    asyncio.get_running_loop().call_soon(sys.exit, 0)
    await asyncio.sleep(0.01)
    return [1.0]


async def thread_leaves(**_):
    await asyncio.to_thread(sys.exit, 4)


async def raw_thread_leaves(**_):
    in_a_thread(lambda: sys.exit(0))
    return [1.0]


TRIED = "tried to end the program with "
HERE = rf" \({re.escape(__file__)}, line \d+\) for 1 completion:\n  'text 0'$"


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        (leaves, rf"{TRIED}sys.exit\(0\){HERE}"),
        (leaves_with_words, rf"{TRIED}sys.exit\('that is all'\){HERE}"),
        (leaves_in_text, rf"{TRIED}sys.exit\(\){HERE}"),
        (leaves_at_once, rf"{TRIED}os._exit\(0\){HERE}"),
        (aborts, rf"{TRIED}os.abort\(\){HERE}"),
        (becomes_another_program, rf"{TRIED}os.execv\('/bin/true', \('true',\)\){HERE}"),
        (interrupts, rf"raised KeyboardInterrupt, as Ctrl-C does{HERE}"),
        (cancels, rf"raised CancelledError: {HERE}"),
        (leaves_in_a_pool, rf"{TRIED}sys.exit\(5\){HERE}"),
        (has_a_thread_that_leaves, rf"had a thread that {TRIED}sys.exit\(0\){HERE}"),
        (has_a_thread_that_leaves_at_once, rf"had a thread that {TRIED}os._exit\(0\){HERE}"),
        (returns_what_leaves, rf"{TRIED}sys.exit\(9\){HERE}"),
        (leaves_later, rf"{TRIED}sys.exit\(0\){HERE}"),
        (leaves_at_once_later, rf"{TRIED}os._exit\(0\){HERE}"),
        (interrupts_later, rf"raised KeyboardInterrupt, as Ctrl-C does{HERE}"),
        (cancels_itself, rf"raised CancelledError: {HERE}"),
        (part_leaves, rf"{TRIED}sys.exit\(0\){HERE}"),
        (forgotten_part_leaves, rf"had a task that {TRIED}sys.exit\(0\){HERE}"),
        (callback_leaves, rf"had a task that {TRIED}sys.exit\(0\)"),
        (thread_leaves, rf"{TRIED}sys.exit\(4\){HERE}"),
        (raw_thread_leaves, rf"had a thread that {TRIED}sys.exit\(0\){HERE}"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_function_that_ends_the_program_fails(function, complaint):
    with pytest.raises(RunError, match=f"^reward judge {complaint}"):
        call(function)
    assert call(lambda **_: [1.0]) == [1.0], "and the next one is called as ever"


def test_the_async_function_that_did_it_is_named():
    async def waits(**_):
        await asyncio.sleep(60)

    for bad, did in ((part_leaves, "tried to end"), (blocks_later, "took longer.* it blocks in")):
        with pytest.raises(RunError, match=f"^reward bad {did}"):
            RewardCalls(0.2)({"good": waits, "bad": bad}, {"completions": []})


def test_tasks_belong_to_the_function_that_made_them():
    loop = event_loop.Loop()

    async def made():
        return [loop.owners[await asyncio.create_task(current())] for _ in range(2)]

    async def current():
        return asyncio.current_task()

    assert loop.begin("mine", made()).result(10) == ["mine"] * 2


@pytest.mark.parametrize("what", ["import sys; sys.exit(0)", "import os; os._exit(0)"])
@pytest.mark.parametrize("place", ["in the file", "in the class"])
def test_code_that_leaves_while_it_is_loaded_is_refused(tmp_path, grpo, what, place):
    path = tmp_path / "mine.py"
    text = f"{what}\ndef Mine(): pass\n"
    if place == "in the class":
        text = f"class Mine:\n    def __init__(self):\n        {what}\n"
    path.write_text(text)
    config = grpo.MLXGRPOConfig(reward_funcs=[f"{path}:Mine"])
    with pytest.raises(UserError, match=rf"mine.py:Mine.*it {TRIED}.*\(.*mine.py, line [13]\)"):
        by_name.load_rewards(config, {})


def test_a_module_that_raises_what_ctrl_c_raises_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a_module_of_mine.py").write_text("raise KeyboardInterrupt\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="cannot be imported: it raised KeyboardInterrupt"):
        importing.load_reward("a_module_of_mine:f", {})


def hides_it(error):
    """Catches a signal, as a careful function does, and makes something of it."""
    try:
        signal.raise_signal(signal.SIGINT)
    except BaseException as caught:
        raise error from caught


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(0), ValueError("no")], ids=repr)
def test_a_real_ctrl_c_stays_one(error):
    with pytest.raises(Signalled):
        call(lambda **_: hides_it(error))


def test_a_run_whose_reward_leaves_can_be_gone_on_with(grpo, model_dir, data_dir, tmp_path, capfd):
    """Exit code 1 with the reason, the last finished update saved; the same run then ends."""
    path = tmp_path / "mine.py"
    path.write_text(
        "import sys\n\ndef mine(completion_ids, trainer_state, **_):\n"
        "    trainer_state.global_step < 2 or sys.exit(0)\n"
        "    return [sum(ids) for ids in completion_ids]\n"
    )
    settings = {"model_name": str(model_dir), "dataset": str(data_dir), "num_generations": 4}
    settings |= {"output_dir": str(tmp_path / "o"), "reward_funcs": [f"{path}:mine"]}
    settings |= {"max_updates": 3, "eval_samples": 0, "eval_subset_size": 0, "max_new_tokens": 4}
    config = write_toml(tmp_path, settings | {"system_prompt": ""})
    assert grpo.main(["--config", config]) == 1
    out, err = capfd.readouterr()
    assert "stopped   after update 2, saved in" in out
    assert err.startswith(f"error: reward {path}:mine {TRIED}sys.exit(0) ({path}, line 4) for ")
    path.write_text(path.read_text().replace("< 2", "< 9"))
    importing.CODE.clear()
    sys.modules.pop(f"reward_file:{path}")
    assert grpo.main(["--config", config, "--resume"]) == 0
    assert [record["update"] for record in read_log(tmp_path / "o")] == [1, 2, 3]


# Time.


def blocks(**_):
    time.sleep(600)


def blocks_and_tries_again(**_):
    while True:
        with contextlib.suppress(Exception):
            time.sleep(600)


def waits_for_a_server(**_):
    ours, _theirs = socket.socketpair()
    return ours.recv(1)


def waits_for_a_program(**_):
    subprocess.run(["sleep", "600"], check=True)


def waits_for_a_lock(**_):
    threading.Event().wait()


def computes(**_):
    while True:
        pass


def matches(**_):
    """A pattern that takes ages, in C code that keeps Python's lock."""
    return re.match(r"(a+)+$", "a" * 40 + "b")


def catches_it(completions, **_):
    try:
        time.sleep(600)
    except BaseException:  # noqa: BLE001 - as others write it
        return [0.0] * len(completions)


def sets_alarms_of_its_own(**_):
    signal.alarm(5)
    signal.alarm(0)
    time.sleep(600)


def catches_everything(**_):
    while True:
        try:
            while True:
                try:  # noqa: SIM105
                    time.sleep(600)
                except BaseException:  # noqa: BLE001, S110
                    pass
        except BaseException:  # noqa: BLE001, S112
            continue


async def blocks_later(**_):
    time.sleep(5)


async def a_part_blocks(**_):
    await asyncio.gather(blocks_later())


async def cannot_be_cancelled(**_):
    while True:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(600)


OF_TIME = [
    *(blocks, blocks_and_tries_again, waits_for_a_server, waits_for_a_program, waits_for_a_lock),
    *(computes, matches, catches_it, sets_alarms_of_its_own, catches_everything),
    *(blocks_later, a_part_blocks, cannot_be_cancelled),
]


@pytest.mark.parametrize(
    "function", mostly_long(OF_TIME, *OF_TIME[:-4], blocks_later), ids=lambda f: f.__name__
)
def test_a_function_that_blocks_is_over_in_time(function):
    before = signal.getsignal(signal.SIGALRM), signal.getsignal(foreign.ALARM)
    with pytest.raises(RunError, match=r"^reward judge took longer than reward_timeout = 0.1 sec"):
        call(function, timeout=0.1)
    assert (signal.getsignal(signal.SIGALRM), signal.getsignal(foreign.ALARM)) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_the_line_where_it_blocks_is_named():
    line = blocks.__code__.co_firstlineno + 1
    with pytest.raises(RunError, match=rf"seconds \({re.escape(__file__)}, line {line}\) for"):
        call(blocks, timeout=0.3)
    line = blocks_later.__code__.co_firstlineno + 1
    with pytest.raises(RunError, match=rf"it blocks in {re.escape(__file__)}, line {line}, inst"):
        call(blocks_later, timeout=0.3)


def test_what_is_built_in_is_not_bound(grpo, model_dir, data_dir, tmp_path):
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", None)
    calls = RewardCalls(1.0)
    assert [calls.limit(function) for function in trainer.reward_funcs.values()] == [None] * 4
    assert calls.limit(blocks) == 1.0


# Other processes.


def ends(pid, code):
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == code
    return [1.0]


def forks(child, code):
    pid = os.fork()
    if not pid:
        return child()
    return ends(pid, code)


def fails():
    raise ValueError("in the child")


def in_a_child(queue):
    queue.put(3)
    sys.exit(4)


def forks_by_multiprocessing():
    how = multiprocessing.get_context("fork")
    queue = how.Queue()
    child = how.Process(target=in_a_child, args=[queue])
    child.start()
    assert queue.get() == 3
    child.join()
    assert child.exitcode == 4
    return [1.0]


async def forks_later(**_):
    return forks(lambda: sys.exit(7), 7)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(
    "function",
    [
        lambda **_: forks(lambda: [2.0], 0),
        lambda **_: forks(lambda: sys.exit(7), 7),
        lambda **_: forks(sys.exit, 0),
        lambda **_: forks(lambda: sys.exit("so"), 1),
        lambda **_: forks(lambda: os._exit(8), 8),
        lambda **_: forks(lambda: os.execl("/bin/sh", "sh", "-c", "exit 9"), 9),
        lambda **_: forks(fails, 1),
        lambda **_: forks_by_multiprocessing(),
        forks_later,
    ],
    ids=[
        "returns",
        "exits",
        "exits-well",
        "exits-in-words",
        "_exits",
        "execs",
        "fails",
        "mp",
        "async",
    ],
)
def test_a_child_ends_where_it_leaves_the_function(function):
    """With the code that its parent waits for, and without a step of what follows here."""
    assert call(function) == [1.0]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_takes_nothing_of_the_run(model_dir, data_dir, tmp_path, capfd):
    lock, seen = tmp_path / "o" / ".lock", []

    def reward(completion_ids, **_):
        forks(lambda: sys.exit(0), 0)
        forks(lambda: [0.0] * len(completion_ids), 0)
        seen.append(lock.exists())
        return [float(sum(ids) % 101) for ids in completion_ids]

    def prepare(trainer):
        trainer.reward_funcs = {"forks": reward}

    code, _ = run_training(model_dir, data_dir, tmp_path / "o", prepare, max_updates=2)
    assert code == 0
    assert seen == [True] * 2
    assert not lock.exists()
    assert [record["update"] for record in read_log(tmp_path / "o")] == [1, 2]
    out, err = capfd.readouterr()
    assert out.count("finished  all 2 updates") == 1
    assert not err


# The surroundings.


PRINTS = """
import io, os, sys
from utils.base.say import say
from utils.rewards.calls import RewardCalls

def closes(**_):
    sys.stdout.close()
    return [1.0]

def closes_descriptors(**_):
    os.close(1)
    os.close(2)
    return [1.0]

def replaces(**_):
    sys.stdout = sys.stderr = io.StringIO()
    return [1.0]

async def closes_later(**_):
    sys.stderr.close()
    return [1.0]

for function in (closes, closes_descriptors, replaces, closes_later):
    RewardCalls(5.0)({"own": function}, {"completions": [[{"content": ""}]]})
    say("after " + function.__name__)
    print("also", file=sys.stderr, flush=True)
"""


def test_what_is_printed_later_is_seen():
    """In a program of its own: this one's output is pytest's."""
    command = [sys.executable, "-c", PRINTS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    names = ["closes", "closes_descriptors", "replaces", "closes_later"]
    assert done.stdout == "".join(f"after {name}\n" for name in names)
    assert done.stderr == "also\n" * 4


def changes_settings(**_):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    signal.alarm(1000)
    gc.disable()
    sys.setrecursionlimit(sys.getrecursionlimit() // 2)
    warnings.simplefilter("error")
    np.seterr(all="raise")
    mx.set_default_device(mx.cpu)
    return [1.0]


def test_what_a_run_relies_on_is_put_back():
    def now():
        handlers = [signal.getsignal(number) for number in foreign.HANDLED]
        blocked, collects = signal.pthread_sigmask(signal.SIG_BLOCK, []), gc.isenabled()
        depth, timer = sys.getrecursionlimit(), signal.getitimer(signal.ITIMER_REAL)
        return (
            handlers,
            blocked,
            collects,
            depth,
            timer,
            warnings.filters[:],
            np.geterr(),
            mx.default_device(),
        )

    before = now()
    assert call(changes_settings) == [1.0]
    assert now() == before


def test_random_numbers_that_a_function_draws_or_seeds_change_nothing(
    model_dir, data_dir, tmp_path
):
    """Neither of the training, with dropout and adapters, nor of what a resumed run does."""

    def seeds(completion_ids, **_):
        random.seed(1)
        np.random.seed(2)
        mx.random.seed(3)
        return [float(sum(ids) % 101) for ids in completion_ids]

    def draws(completion_ids, **_):
        random.random()
        np.random.rand(7)
        mx.eval(mx.random.normal((3,)))
        return [float(sum(ids) % 101) for ids in completion_ids]

    def prepared(function, *more):
        def prepare(trainer):
            trainer.reward_funcs = {"mine": function}
            for change in more:
                change(trainer)

        return prepare

    settings = {"train_type": "lora", "lora_dropout": 0.5, "lora_learning_rate": 0.01}
    settings |= {"max_updates": 2, "max_new_tokens": 4}
    where = model_dir, data_dir
    _, whole = run_training(*where, tmp_path / "o", prepared(seeds), **settings)
    other = tmp_path / "other"
    run_training(*where, other, prepared(draws, stop_after(1)), **settings)
    _, resumed = run_training(*where, other, prepared(seeds), **settings, resume="auto")
    assert snapshot(resumed) == snapshot(whole)


def test_a_child_that_leaves_the_lock_behind_does_not_delete_it(tmp_path):
    """Whatever else forks: the lock is its process's."""
    with lock.RunLock(tmp_path) as held:
        held.claim()
        pid = os.fork()
        if not pid:
            held.__exit__()
            foreign.leave_process(0)
        ends(pid, 0)
        assert held.path.exists()
    assert not held.path.exists()


def test_threads_that_never_end_do_not_keep_the_program(tmp_path):
    program = (
        f"import sys; sys.path[:0] = {[str(ROOT)]!r}\nimport threading\n"
        "from utils.run import ending\nending.LINGER = 0.1\n"
        "threading.Thread(target=threading.Event().wait, name='busy').start()\nending.leave(3)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 3
    assert done.stderr == "warning: left although threads still run: busy\n"


WAYS = """
import os, threading
from utils.rewards import foreign
from utils.rewards.calls import RewardCalls
call = lambda f: RewardCalls(5.0)({"own": f}, {"completions": [[{"content": ""}]]})
call(lambda **_: [1.0])
if FOR_GOOD:
    foreign.stay_for_good()
try:
    os._exit(5)
except foreign.Left:
    print("stays", flush=True)
"""


@pytest.mark.parametrize(("for_good", "code"), [(False, 5), (True, 0)])
def test_between_calls_the_process_of_somebody_else_can_be_left(for_good, code):
    """A notebook's kernel ends itself so; a thread that a reward left behind ends no command."""
    program = WAYS.replace("FOR_GOOD", str(for_good))
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "" if code else "stays\n"), done.stderr


def test_a_library_that_ends_the_program_is_told(model_dir, data_dir, tmp_path, capsys):
    def prepare(trainer):
        after_update = trainer.run.after_update

        def and_leave(*args):
            after_update(*args)
            sys.exit(0)

        trainer.run.after_update = and_leave

    with pytest.raises(RunError, match=r"something called sys.exit\(0\)"):
        run_training(model_dir, data_dir, tmp_path / "o", prepare, max_updates=2)
    assert "stopped   after update 1, saved in" in capsys.readouterr().out
    assert folders.damage(folders.found(tmp_path / "o")[-1]) is None
