"""Faults, done for real: whatever happens to a run, the resumed one ends as if it had not.

The table in docs/faults.md names these tests, and the last one here holds it to them.
"""

import contextlib
import errno
import functools
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
from conftest import ROOT, load_script
from helpers import (
    both,
    flat,
    improving,
    lose_the_right_to_write_everywhere,
    make_trainer,
    mostly_long,
    poison,
    read_log,
    run_training,
    snapshot,
    stop_after,
    timeless,
    write_toml,
)
from mlx.utils import tree_map

from utils.base.errors import DiskError, RunError, UserError
from utils.gradient import scorer
from utils.run import checkpoints, lock, warnings_of_learning
from utils.run import folders as folders_module

SCRIPT = ROOT / "mlx-grpo.py"
RUN = {
    **{"max_updates": 4, "save_steps": 2, "save_total_limit": 2, "max_new_tokens": 6},
    **{"eval_samples": 3, "eval_steps": 4, "eval_max_new_tokens": 4, "learning_rate": 0.01},
}


@pytest.fixture(scope="module")
def whole(model_dir, data_dir, tmp_path_factory):
    """A run that nothing happens to: its last state and its log."""
    output = tmp_path_factory.mktemp("whole") / "o"
    _, trainer = run_training(model_dir, data_dir, output, **RUN)
    return SimpleNamespace(weights=snapshot(trainer), log=timeless(output))


@pytest.fixture
def ends_well(model_dir, data_dir, tmp_path, whole):
    """Resumes the run in tmp_path / "o" and compares its end with that of the whole run."""

    def check(output=tmp_path / "o"):
        code, resumed = run_training(model_dir, data_dir, output, **RUN, resume="auto")
        assert code == 0
        assert snapshot(resumed) == whole.weights
        assert timeless(output) == whole.log
        assert not [p.name for p in output.iterdir() if p.name.startswith(".")]

    return check


def before(update, name, act):
    """`act()` just before trainer.name is called after so many updates, as a `prepare`."""
    *path, name = name.split(".")

    def prepare(trainer):
        owner = functools.reduce(getattr, path, trainer)
        inner = getattr(owner, name)

        def acting(*args, **options):
            if trainer.update_step == update:
                act()
            return inner(*args, **options)

        setattr(owner, name, acting)

    return prepare


def fail(error):
    raise error


# The process is killed, or asked to end.


@pytest.mark.long
def test_killed_at_random_moments():
    """The short version; `--kills 30` is the long one."""
    command = [sys.executable, str(ROOT / "tests" / "kill_resume.py"), "--kills", "6"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\d+ kills in \d+ runs, each resumed to the same", done.stdout, re.M)


KILLED_BETWEEN = """
import os, pathlib, signal
from helpers import run_training
from helpers import improving

rename = pathlib.Path.rename

def rename_and_die(path, target):
    renamed = rename(path, target)
    if path.name == {name!r}:
        os.kill(os.getpid(), signal.SIGKILL)
    return renamed

pathlib.Path.rename = rename_and_die
run_training(*{folders!r}, improving, **{settings!r})
"""


@pytest.mark.long
@pytest.mark.parametrize("name", ["best", "final"])
def test_a_kill_between_the_two_renames_of_a_folder(model_dir, data_dir, tmp_path, capsys, name):
    """What stood there is not lost under a hidden name; the resumed run replaces it after all."""
    settings = {**RUN, "eval_steps": 2, "save_best": True}
    output, whole = tmp_path / "o", tmp_path / "whole"
    run_training(model_dir, data_dir, whole, improving, **settings)

    def out_of_time(trainer):
        improving(trainer)
        before(1, "train_step", lambda: setattr(trainer.args, "max_hours", 1e-9))(trainer)

    run_training(model_dir, data_dir, output, out_of_time, **settings)
    stood = {path.name: path.read_bytes() for path in (output / name).iterdir()}
    settings["resume"] = "auto"
    folders = tuple(map(str, (model_dir, data_dir, output)))
    code = KILLED_BETWEEN.format(name=name, folders=folders, settings=settings)
    killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (output / name).exists()
    capsys.readouterr()
    folders_module.claim(output, overwrite=False)
    stood.pop("run.json", None)  # a run that goes on has not ended
    assert {path.name: path.read_bytes() for path in (output / name).iterdir()} == stood
    assert f"restored  {output / name}, which a killed run" in capsys.readouterr().out
    assert run_training(model_dir, data_dir, output, improving, **settings)[0] == 0
    for file in ("model.safetensors", "config.json"):
        assert (output / name / file).read_bytes() == (whole / name / file).read_bytes()
    assert not [p.name for p in output.iterdir() if p.name.startswith(".")]


PLACES = {
    "rollout": (2, "generate_responses"),
    "rewards": (2, "compute_rewards"),
    "gradient": (2, "update"),
    "evaluation": (2, "evaluate"),
    "log": (3, "run.after_update"),
    "save": (2, "save_checkpoint"),
}


STOPS = {"ctrl-c": (signal.SIGINT, 130, "Ctrl-C"), "sigterm": (signal.SIGTERM, 143, "SIGTERM")}


@pytest.mark.parametrize(
    ("stop", "place"),
    mostly_long(
        itertools.product(STOPS, PLACES), *(("ctrl-c", p) for p in PLACES), ("sigterm", "gradient")
    ),
)
def test_a_signal_saves_the_last_update(
    model_dir, data_dir, tmp_path, ends_well, capsys, stop, place
):
    number, code, name = STOPS[stop]
    act = before(*PLACES[place], lambda: os.kill(os.getpid(), number))
    got, stopped = run_training(model_dir, data_dir, tmp_path / "o", act, **RUN)
    assert got == code
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"reason    {name}"
    assert lines[-2].endswith("mlx-grpo.py --resume")
    newest = folders_module.found(tmp_path / "o")[-1]
    assert folders_module.damage(newest) is None
    assert newest.name == f"checkpoint-{2 * stopped.run.between.update_step}"
    ends_well()


@pytest.mark.parametrize("nohup", [False, True])
def test_a_closed_terminal_is_a_signal_too(model_dir, data_dir, tmp_path, ends_well, nohup):
    """Unless the run was started by `nohup`, which ignores it, and then so does the run."""
    earlier = signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
    try:
        act = before(2, "update", lambda: os.kill(os.getpid(), signal.SIGHUP))
        code, _ = run_training(model_dir, data_dir, tmp_path / "o", act, **RUN)
    finally:
        signal.signal(signal.SIGHUP, earlier)
    assert code == (0 if nohup else 129)
    if not nohup:
        ends_well()


HANGING = """
import pathlib, time

def hang(completions, **_):
    pathlib.Path("hangs").touch()
    time.sleep(100)
"""


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.long)],
)
def test_the_second_signal_leaves_at_once(model_dir, data_dir, tmp_path, number, code):
    """The first waits for the reward, which never returns."""
    (tmp_path / "mine.py").write_text(HANGING)
    process = started(model_dir, data_dir, tmp_path, reward_funcs=["mine.py:hang"])
    wait_for(tmp_path / "hangs", process)
    process.send_signal(number)
    lines = iter(process.stdout.readline, "")
    assert any("once more leaves at once" in line for line in lines), "two sent at once are one"
    assert process.poll() is None
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == code
    assert out.splitlines()[-1].endswith("left at once")


def started(model_dir, data_dir, folder, preexec=None, **settings):
    values = {"model_name": str(model_dir), "dataset": str(data_dir), "output_dir": "o"}
    values |= {"system_prompt": "", "use_compile": False, "quantize_for_rollouts": False}
    values |= {"num_generations": 4, "gradient_accumulation_steps": 2, "eval_subset_size": 0}
    values |= {**RUN, "eval_samples": 0, **settings}
    command = [sys.executable, str(SCRIPT), "--config", write_toml(folder, values)]
    return subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=preexec,
    )


def wait_for(path, process):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


# The disk.


@contextlib.contextmanager
def small_disk(folder, size):
    """A file system of its own; skips where this machine lets nobody mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount; the tests with a failing writer stand for it")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder, options):
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def fill(folder):
    with (folder / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass


@pytest.mark.parametrize("foreseen", [True, False], ids=["foreseen", "while-writing"])
def test_a_disk_that_is_full_at_a_save(
    model_dir, data_dir, tmp_path, ends_well, monkeypatch, capsys, foreseen
):
    if not foreseen:
        monkeypatch.setattr(checkpoints, "refuse_full_disk", lambda path, needed: None)
    with small_disk(tmp_path / "disk", "3m") as disk:
        output = disk / "o"
        reason = r"it needs .* MB are free" if foreseen else r"the disk is full \(0\.\d\d MB free"
        with pytest.raises(DiskError, match=rf"checkpoint-6 cannot be written: {reason}"):
            run_training(model_dir, data_dir, output, **RUN)
        kept = folders_module.found(output)
        assert [p.name for p in kept] == ["checkpoint-2", "checkpoint-4"]
        assert not any(map(folders_module.damage, kept))
        assert not list(output.glob(".*incomplete*")), "what was written in vain is gone"
        out = capsys.readouterr().out
        assert "stopped   after update 3, which could not be saved\n" in out
        assert "cannot be written" not in out, "that is the last line's to say"
        assert "checkpoint-4 is untouched" in out
        remount(disk, "size=50m")
        ends_well(output)


def test_a_disk_that_is_full_at_a_log_line(model_dir, data_dir, tmp_path, ends_well):
    with small_disk(tmp_path / "disk", "12m") as disk:
        output = disk / "o"

        def prepare(trainer):
            def act():
                fill(disk)
                trainer.run.state.notes.append("a line that is longer than its last page" * 200)

            before(3, "run.after_update", act)(trainer)

        with pytest.raises(
            DiskError, match=r"training_log\.jsonl cannot be written: No space left"
        ):
            run_training(model_dir, data_dir, output, prepare, **RUN)
        assert folders_module.damage(folders_module.found(output)[-1]) is None
        (disk / "filler").unlink()
        ends_well(output)


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux" and os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_turns_read_only(model_dir, data_dir, tmp_path):
    drop = lose_the_right_to_write_everywhere if os.geteuid() == 0 else None
    process = started(model_dir, data_dir, tmp_path, drop, max_updates=500, num_epochs=50)
    wait_for(tmp_path / "o" / "checkpoint-4", process)
    (tmp_path / "o").chmod(0o555)
    out, _ = process.communicate(timeout=60)
    (tmp_path / "o").chmod(0o755)
    assert process.returncode == 1
    assert re.match(
        r"error: .*checkpoint-\d+ cannot be written: Permission den", out.splitlines()[-1]
    )
    assert not any(map(folders_module.damage, folders_module.found(tmp_path / "o")))


@pytest.mark.parametrize("what", ["weights", "log"])
def test_a_writer_that_fails(model_dir, data_dir, tmp_path, ends_well, monkeypatch, what):
    """For machines without mounts: the same at the boundary to the file system."""

    def start_failing():
        if what == "weights":
            error = RuntimeError("[write] Unable to write 4096 bytes to file.")
            patch.setattr(mx, "save_safetensors", lambda *_, **__: fail(error))
        else:
            full = OSError(errno.ENOSPC, "No space left on device")
            opened = Path.open
            patch.setattr(
                Path,
                "open",
                lambda p, *a, **k: fail(full) if p.suffix == ".jsonl" else opened(p, *a, **k),
            )

    with monkeypatch.context() as patch:
        act = before(2, "run.after_update", start_failing)
        with pytest.raises(DiskError, match="cannot be written"):
            run_training(model_dir, data_dir, tmp_path / "o", act, **RUN)
    assert folders_module.damage(folders_module.found(tmp_path / "o")[-1]) is None
    ends_well()


@pytest.mark.long
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_output_onto_a_full_disk_stops_nothing(model_dir, data_dir, tmp_path):
    process = started(model_dir, data_dir, tmp_path, max_updates=1)
    command = process.args
    process.kill()
    process.communicate()
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*command, "--set", "overwrite=true"], cwd=tmp_path, stdout=full)
    assert done.returncode == 0
    assert (tmp_path / "o" / "final").is_dir()


# Damaged checkpoints.


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


HARM = {"truncated": truncate, "flipped": flip, "missing": Path.unlink}


@pytest.fixture(scope="module")
def killed(model_dir, data_dir, tmp_path_factory):
    """A folder as a kill leaves it: two checkpoints, and no final model."""
    output = tmp_path_factory.mktemp("killed") / "o"
    run_training(model_dir, data_dir, output, stop_after(3), **RUN)
    assert [p.name for p in folders_module.found(output)] == ["checkpoint-4", "checkpoint-6"]
    return output


def test_a_checkpoint_that_a_kill_left_without_its_name_is_gone_on_from(killed, tmp_path, capsys):
    """Between the two renames that replace it, as when memory ran out just after it was saved."""
    shutil.copytree(killed, tmp_path / "o")
    newest = tmp_path / "o" / "checkpoint-6"
    newest.rename(newest.with_name(".checkpoint-6.old-1"))
    assert folders_module.to_resume(tmp_path / "o", "auto") == newest
    assert f"restored  {newest}, which a killed run" in capsys.readouterr().out


@pytest.mark.parametrize("harm", HARM)
def test_every_file_of_a_checkpoint_is_watched(killed, tmp_path, capsys, harm):
    files = sorted(path.name for path in (killed / "checkpoint-6").iterdir())
    assert {"manifest.json", "model.safetensors", "trainer_state.safetensors"} <= {*files}
    for name in files:
        output = tmp_path / name
        shutil.copytree(killed, output)
        HARM[harm](output / "checkpoint-6" / name)
        assert folders_module.to_resume(output, "auto") == output / "checkpoint-4", name
        assert "checkpoint-6 is left out" in capsys.readouterr().out


def test_a_manifest_names_the_state_and_what_is_beside_it(killed, tmp_path):
    folder = shutil.copytree(killed, tmp_path / "o") / "checkpoint-6"
    manifest = folder / "manifest.json"
    files = json.loads(manifest.read_text())["files"]
    for name in ("trainer_state.json", "trainer_state.safetensors"):
        rest = {other: entry for other, entry in files.items() if other != name}
        manifest.write_text(json.dumps({"files": rest}))
        assert folders_module.damage(folder) == f"manifest.json does not name {name}"
    elsewhere = {"../checkpoint-6/config.json": files["config.json"]}
    manifest.write_text(json.dumps({"files": files | elsewhere}))
    assert folders_module.damage(folder) == "../checkpoint-6/config.json is missing"


@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    killed, tmp_path, ends_well, capsys, harm
):
    shutil.copytree(killed, tmp_path / "o")
    HARM[harm](tmp_path / "o" / "checkpoint-6" / "trainer_state.safetensors")
    ends_well()
    out = capsys.readouterr().out
    assert "warning   checkpoint" in out
    assert "checkpoint-6.abandoned is set aside" in out


def test_without_a_whole_checkpoint_nothing_is_overwritten(killed, tmp_path):
    output = tmp_path / "o"
    shutil.copytree(killed, output)
    for folder in folders_module.found(output):
        (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole; overwrite=true"):
        folders_module.to_resume(output, "auto")


def test_a_good_checkpoint_is_not_pruned_for_a_damaged_newer_one(
    model_dir, data_dir, killed, tmp_path
):
    output = tmp_path / "o"
    shutil.copytree(killed, output)
    flip(output / "checkpoint-6" / "model.safetensors")
    settings = {**RUN, "save_total_limit": 1, "resume": "auto"}
    run_training(model_dir, data_dir, output, stop_after(3), **settings)
    (kept,) = folders_module.found(output)
    assert folders_module.damage(kept) is None


# Rewards, numbers, memory, and what nobody foresaw.


def leaking(completions, **_):
    """A reward that has eaten all memory."""
    raise MemoryError


REWARDS = {
    "raises": (lambda **_: fail(KeyError("no such column")), "raised KeyError"),
    "nan": (lambda completions, **_: [float("nan")] * len(completions), "returned nan"),
    "leaks": (leaking, "raised MemoryError"),
}


@pytest.mark.parametrize("kind", REWARDS)
def test_a_reward_that_fails(model_dir, data_dir, tmp_path, ends_well, capsys, kind):
    function, message = REWARDS[kind]

    def prepare(trainer):
        inner = trainer.reward_funcs["helpers:digest"]

        def reward(**columns):
            return (function if trainer.update_step == 3 else inner)(**columns)

        trainer.reward_funcs = {"helpers:digest": reward}

    with pytest.raises(RunError, match=message):
        run_training(model_dir, data_dir, tmp_path / "o", prepare, **RUN)
    assert "stopped   after update 3, saved in" in capsys.readouterr().out
    ends_well()


@pytest.mark.long
def test_a_reward_that_hangs(model_dir, data_dir, tmp_path):
    """In a process of its own it is ended; what was learnt before is saved."""
    (tmp_path / "mine.py").write_text(HANGING + SOMETIMES)
    settings = {"reward_funcs": ["mine.py:sometimes"], "reward_workers": 1, "reward_timeout": 2}
    process = started(model_dir, data_dir, tmp_path, **settings)
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 1
    assert "took longer than reward_timeout = 2" in out.splitlines()[-1] or "error" in out
    newest = folders_module.found(tmp_path / "o")[-1]
    assert (newest.name, folders_module.damage(newest)) == ("checkpoint-4", None)


SOMETIMES = """
def sometimes(completions, trainer_state, **_):
    if trainer_state.global_step == 2:
        hang(completions)
    return [len(c[0]["content"]) for c in completions]
"""


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite(model_dir, data_dir, tmp_path, ends_well, what):
    """Five in a row stop the run; its last whole state is one that it can go on from."""

    def prepare(trainer):
        before(2, "train_step", lambda: poison(trainer, **{what: True}))(trainer)

    settings = RUN | {"max_updates": 9}
    with pytest.raises(RunError, match="five updates in a row were not finite"):
        run_training(model_dir, data_dir, tmp_path / "o", prepare, **settings)
    records = [r for r in read_log(tmp_path / "o") if "loss" in r]
    assert [r["skipped"] for r in records] == [0, 0, 1, 1, 1, 1, 1]
    newest = folders_module.found(tmp_path / "o")[-1]
    assert folders_module.damage(newest) is None
    weights = mx.load(str(newest / "model.safetensors"))
    assert all(mx.isfinite(x).all().item() for x in weights.values())


def test_weights_that_are_not_finite(model_dir, data_dir, tmp_path, ends_well, capsys):
    """They stop the run, and do not push out the checkpoint before them."""

    def prepare(trainer):
        def ruin():
            broken = tree_map(lambda w: w * float("nan"), trainer.model.parameters())
            trainer.model.update(broken)

        before(3, "train_step", ruin)(trainer)

    with pytest.raises(RunError, match="probabilities are not finite"):
        run_training(model_dir, data_dir, tmp_path / "o", prepare, **RUN)
    newest = folders_module.found(tmp_path / "o")[-1]
    assert (newest.name, folders_module.damage(newest)) == ("checkpoint-6", None)
    ends_well()
    trainer = run_training(model_dir, data_dir, tmp_path / "p", **RUN)[1]
    prepare(trainer)
    moments = trainer.optimizer.state["model.norm.weight"][0]
    moments["v"] = moments["v"] * float("nan")
    with pytest.raises(RunError, match=r"no longer finite numbers \(model\.norm\.weight\.0\.v"):
        trainer.save_checkpoint(tmp_path / "p" / "checkpoint-99")
    trainer.model.update(tree_map(lambda w: w * float("nan"), trainer.model.parameters()))
    with pytest.raises(RunError, match="no longer finite numbers"):
        trainer.save_checkpoint(tmp_path / "p" / "checkpoint-99")
    assert not (tmp_path / "p" / "checkpoint-99").exists()


OUT_OF_MEMORY = (
    "[metal::malloc] Attempting to allocate 9663676416 bytes which is greater than the maximum "
    "allowed buffer size of 8589934592 bytes."
)


def starved(function, rows, most):
    """The function, for which memory runs out where `rows` of its arguments are too many."""

    def limited(*args, **options):
        if rows(*args) > most:
            raise RuntimeError(OUT_OF_MEMORY)
        return function(*args, **options)

    return limited


def starve(monkeypatch, stage, most):
    """Memory runs out for more than so many rows at once, as a `prepare`."""
    if stage == "scoring":
        trainer_class = load_script().MLXGRPOTrainer
        rescored = starved(trainer_class.rescored, lambda _, __, batch, *rest: batch.count, most)
        monkeypatch.setattr(trainer_class, "rescored", rescored)
        return lambda trainer: None

    def sampling(trainer):
        sample = trainer.sampler.sample_batch
        trainer.sampler.sample_batch = starved(sample, lambda *given: given[-1].places, most)

    def gradient(trainer):
        trainer.loss_and_grad = starved(trainer.loss_and_grad, lambda batch: batch.count, most)

    return sampling if stage == "rollout" else gradient


@pytest.mark.parametrize("stage", ["rollout", "gradient"])
def test_out_of_memory_halves_and_goes_on(
    model_dir, data_dir, tmp_path, whole, monkeypatch, capsys, stage
):
    """8 rows at once do not fit, 4 do: the same samples, the same training."""
    prepare = starve(monkeypatch, stage, 5)
    code, trainer = run_training(model_dir, data_dir, tmp_path / "o", prepare, **RUN)
    assert code == 0
    log = timeless(tmp_path / "o")
    notes = [note for record in log for note in record.pop("notes", [])]
    size = "rollout_batch_size" if stage == "rollout" else "micro_batch_tokens"
    assert len(notes) == 1, "once: what follows is cut to size at once"
    assert f"out of memory, then {size} = " in notes[0]
    assert "memory    ran out ([metal::malloc]" in capsys.readouterr().out
    for record, expected in zip(log, whole.log, strict=True):
        for name in {"reward_mean", "completion_length", "loss", "grad_norm", "em"} & {*record}:
            assert record[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5)
    assert trainer.update_step == 4


def test_out_of_memory_in_an_evaluation_goes_back_to_rollouts_size(
    model_dir, data_dir, tmp_path, monkeypatch, capsys
):
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", **RUN)
    questions = trainer.train_dataset
    planned = trainer.memory.plan.rollout_batch_size
    expected = [response.ids for response in trainer.answers(questions)]
    assert trainer.memory.plan.rows_at_once(30) > planned < len(questions)
    starve(monkeypatch, "rollout", planned)(trainer)
    assert [response.ids for response in trainer.answers(questions)] == expected
    assert f"once more with rollout_batch_size = {planned}" in capsys.readouterr().out
    assert trainer.memory.plan.rows_at_once(30) == planned


SCORED = {
    "kl-in-reward": {"kl_coeff": 0.1, "kl_placement": "reward"},
    "kl-in-loss": {"kl_coeff": 0.1},
    "entropies": {"top_entropy_quantile": 0.5},
}


@pytest.mark.parametrize("what", SCORED)
def test_out_of_memory_before_the_gradient(model_dir, data_dir, tmp_path, monkeypatch, what):
    """What is scored without a gradient is cut smaller as well, and once is enough."""
    settings = RUN | SCORED[what]
    run_training(model_dir, data_dir, tmp_path / "whole", **settings)
    starve(monkeypatch, "scoring", 5)
    assert run_training(model_dir, data_dir, tmp_path / "o", **settings)[0] == 0
    log, expected = timeless(tmp_path / "o"), timeless(tmp_path / "whole")
    notes = [note for record in log for note in record.pop("notes", [])]
    assert len(notes) == 1
    assert "out of memory, then micro_batch_tokens = " in notes[0]
    for record, before in zip(log, expected, strict=True):
        for name in {"loss", "grad_norm", "em", *(["kl"] if "kl_coeff" in settings else [])} & {
            *record
        }:
            assert record[name] == pytest.approx(before[name], rel=1e-3, abs=1e-5)


def test_after_the_gradient_ran_out_entropies_are_again_without_dropout(
    model_dir, data_dir, tmp_path, monkeypatch
):
    grpo, modes = load_script(), []
    rescored = grpo.MLXGRPOTrainer.rescored

    def spy(self, model, *rest):
        modes.append(model.training)
        return rescored(self, model, *rest)

    monkeypatch.setattr(grpo.MLXGRPOTrainer, "rescored", spy)
    settings = RUN | {"train_type": "lora", "lora_dropout": 0.5, "top_entropy_quantile": 0.5}
    settings["lora_learning_rate"] = settings["learning_rate"]
    prepare = starve(monkeypatch, "gradient", 5)
    _, trainer = run_training(model_dir, data_dir, tmp_path / "o", prepare, **settings)
    assert trainer.memory.plan.halved == ("micro_batch_tokens",)
    assert modes
    assert not any(modes)


@pytest.mark.parametrize("once", [True, False], ids=["plain-way", "shared-prompts"])
def test_out_of_memory_in_the_check_before_the_first_update(
    model_dir, data_dir, tmp_path, monkeypatch, capsys, once
):
    """What could not be compared is left out; what cannot be left out is tried once more."""
    if once:
        check, errors = scorer.splitting_problem, [RuntimeError(OUT_OF_MEMORY)]
        monkeypatch.setattr(
            scorer,
            "splitting_problem",
            lambda *words: fail(errors.pop()) if errors else check(*words),
        )
    else:
        out = RuntimeError(OUT_OF_MEMORY)
        monkeypatch.setattr(scorer, "gradient_of_first", lambda *_: fail(out))
    code, trainer = run_training(model_dir, data_dir, tmp_path / "o", **RUN)
    assert (code, trainer.scorer.splits, trainer.scorer.shares) == (0, True, once)
    said = capsys.readouterr().out
    assert ("every completion reads its own prompt: memory ran out in" in said) == (not once)


@pytest.mark.parametrize("stage", ["rollout", "gradient", "scoring"])
def test_out_of_memory_again_stops_with_advice(
    model_dir, data_dir, tmp_path, monkeypatch, capsys, stage
):
    """The resumed run, with more memory or not, begins with the size that was last tried."""
    settings = RUN | (SCORED["kl-in-loss"] if stage == "scoring" else {})
    _, unharmed = run_training(model_dir, data_dir, tmp_path / "whole", **settings)
    size = "rollout_batch_size" if stage == "rollout" else "micro_batch_tokens"
    with monkeypatch.context() as patch:
        act = before(3, "train_step", lambda: starve(patch, stage, 1)(trainers[0]))
        trainers = []

        def prepare(trainer):
            trainers.append(trainer)
            act(trainer)

        with pytest.raises(RunError, match=f"out of memory, also with .*: set {size} lower still"):
            run_training(model_dir, data_dir, tmp_path / "o", prepare, **settings)
    tried = getattr(trainers[0].memory.plan, size)
    capsys.readouterr()
    settings["resume"] = "auto"
    code, resumed = run_training(model_dir, data_dir, tmp_path / "o", **settings)
    assert (code, getattr(resumed.memory.plan, size), resumed.memory.plan.halved) == (
        0,
        tried,
        (size,),
    )
    assert f"plan      {size} = {tried}, since memory ran out" in capsys.readouterr().out
    for name, weights in flat(resumed.model.parameters()).items():
        expected = flat(unharmed.model.parameters())[name]
        assert mx.allclose(weights, expected, atol=1e-4), name


def test_a_size_that_is_set_on_resuming_counts(model_dir, data_dir, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        prepare = starve(patch, "rollout", 5)
        run_training(model_dir, data_dir, tmp_path / "o", both(prepare, stop_after(2)), **RUN)
    for given, expected in ((0, 4), (6, 6)):
        settings = RUN | {"resume": "auto", "rollout_batch_size": given}
        folder = tmp_path / str(given)
        shutil.copytree(tmp_path / "o", folder)
        _, resumed = run_training(model_dir, data_dir, folder, **settings)
        assert resumed.memory.plan.rollout_batch_size == expected


def test_an_error_that_nobody_foresaw(model_dir, data_dir, tmp_path, ends_well, capsys):
    act = before(3, "micro_batches", lambda: fail(ZeroDivisionError("a bug")))
    with pytest.raises(RunError, match=r"unexpected ZeroDivisionError: a bug \(traceback in"):
        run_training(model_dir, data_dir, tmp_path / "o", act, **RUN)
    assert "ZeroDivisionError: a bug" in (tmp_path / "o" / "traceback.txt").read_text()
    assert "stopped   after update 3, saved in" in capsys.readouterr().out
    ends_well()


def test_an_error_between_two_updates_on_one_rollout(model_dir, data_dir, tmp_path, capsys):
    """The weights have moved, so that nothing can be saved: the last checkpoint stands."""
    settings = RUN | {"num_iterations": 2, "max_updates": 6}
    _, unharmed = run_training(model_dir, data_dir, tmp_path / "whole", **settings)

    def prepare(trainer):
        def update(batches, number, *rest, call=trainer.update):
            return fail(ZeroDivisionError("a bug")) if number == 4 else call(batches, number, *rest)

        trainer.update = update

    with pytest.raises(RunError, match="unexpected ZeroDivisionError"):
        run_training(model_dir, data_dir, tmp_path / "o", prepare, **settings)
    assert "checkpoint-2 is untouched" in capsys.readouterr().out or folders_module.found(
        tmp_path / "o"
    )
    _, resumed = run_training(model_dir, data_dir, tmp_path / "o", resume="auto", **settings)
    assert snapshot(resumed) == snapshot(unharmed)
    assert timeless(tmp_path / "o") == timeless(tmp_path / "whole")


# Clocks.


@pytest.mark.parametrize(("step", "lines"), [(-3600.0, 0), (3600.0, 1)], ids=["back", "slept"])
def test_a_clock_that_jumps(model_dir, data_dir, tmp_path, whole, monkeypatch, capsys, step, lines):
    """Durations come from a clock that nobody sets; a machine that slept is noticed once."""
    real, jumps = time.time, [0.0]

    def jump():
        jumps[0] += step

    monkeypatch.setattr(time, "time", lambda: real() + jumps[0])

    def prepare(trainer):
        for update in (1, 2):
            before(update, "train_step", jump)(trainer)

    settings, begin = RUN | {"max_hours": 0.5}, time.perf_counter()
    code, trainer = run_training(model_dir, data_dir, tmp_path / "o", prepare, **settings)
    assert (code, trainer.update_step) == (0, 4), "max_hours counts time awake"
    assert timeless(tmp_path / "o") == whole.log
    seconds = [r["seconds"] for r in read_log(tmp_path / "o") if "loss" in r]
    assert seconds == sorted(seconds)
    assert 0 < seconds[0] <= seconds[-1] < time.perf_counter() - begin
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("clock ")]
    assert len(said) == lines
    assert all("60 minutes ahead of the run: the machine slept" in line for line in said)


@pytest.mark.long
def test_a_process_that_is_suspended_goes_on(model_dir, data_dir, tmp_path, whole):
    process = started(model_dir, data_dir, tmp_path, max_updates=2)
    wait_for(tmp_path / "o" / "training_log.jsonl", process)
    process.send_signal(signal.SIGSTOP)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGCONT)
    process.communicate(timeout=60)
    assert process.returncode == 0


# Two runs in one folder.

HOLDER = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from utils.run.lock import RunLock
with RunLock(Path("o")) as held:
    held.claim()
    Path("held").touch()
    time.sleep(100)
"""


def hold(folder):
    (folder / "o").mkdir()
    process = subprocess.Popen([sys.executable, "-c", HOLDER.format(root=str(ROOT))], cwd=folder)
    wait_for(folder / "held", process)
    return process


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "without-kernel-locks"])
def test_a_second_run_is_refused_and_a_killed_one_is_not(
    model_dir, data_dir, tmp_path, ends_well, monkeypatch, capsys, kernel
):
    if not kernel:  # some network file systems have none: the file has to do
        locked = OSError(errno.ENOLCK, "No locks available")
        monkeypatch.setattr(lock.fcntl, "lockf", lambda *_: fail(locked))
    process = hold(tmp_path)
    before_ = sorted((tmp_path / "o").iterdir())
    try:
        with pytest.raises(UserError, match=f"in use by process {process.pid} on .*started 20"):
            run_training(model_dir, data_dir, tmp_path / "o", **RUN)
        assert sorted((tmp_path / "o").iterdir()) == before_, "nothing was written"
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / "o" / ".lock").exists(), "as a kill leaves it"
    ends_well()
    assert f"taken over from process {process.pid}" in capsys.readouterr().out


def test_a_second_run_in_one_process_is_refused(tmp_path):
    with lock.RunLock(tmp_path) as first:
        first.claim()
        with pytest.raises(UserError, match="this process is already training there"):
            lock.RunLock(tmp_path).claim()
    assert not (tmp_path / ".lock").exists()


def test_a_lock_that_cannot_be_opened_is_said(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(UserError, match=r"\.lock cannot be opened \(Is a directory\)"):
        lock.RunLock(tmp_path).__enter__()


def test_a_process_number_that_was_used_again_is_not_the_holder():
    me = {"pid": os.getpid(), "host": lock.socket.gethostname(), "began": lock.began(os.getpid())}
    assert lock.alive(me)
    assert not lock.alive({**me, "began": "another time"})
    assert lock.alive({**me, "host": "elsewhere", "began": None}), "nobody can tell from here"


# Learning that goes wrong.


def records(count, **figures):
    base = {"reward_mean": 1.0, "entropy": 1.0, "kl": 0.01}
    base |= {"groups_without_signal": 0.2, "truncation_rate": 0.1}
    return [
        base | {n: f(i) if callable(f) else f for n, f in figures.items()} for i in range(count)
    ]


SYMPTOMS = {
    "truncated": ({"truncation_rate": 1.0, "groups_without_signal": 1.0}, "every completion was"),
    "variance": ({"groups_without_signal": 1.0}, "no group had any variance"),
    "kl": ({"kl": lambda i: 0.01 if i < 10 else 3.0}, "far from its reference"),
    "reward": (
        {"reward_mean": lambda i: 1.0 if i < 10 else 0.2},
        "the reward has collapsed, from 1 at its best",
    ),
    "entropy": ({"entropy": lambda i: 1.0 if i < 10 else 0.02}, "entropy has collapsed"),
}


def warnings(found, window=10):
    """(number of the update, text) of the warnings, given one by one, the state as JSON."""
    state, said = {}, []
    for number, record in enumerate(found, 1):
        state = json.loads(json.dumps(warnings_of_learning.watched(state, [record], window)))
        said += [(number, state["warning"])] if state["warning"] else []
    return said


@pytest.mark.parametrize("name", SYMPTOMS)
def test_the_watchdog_names_what_went_wrong(name):
    figures, text = SYMPTOMS[name]
    said = warnings(records(40, **figures))
    assert said, "it is noticed"
    assert all(text in warning for _, warning in said)
    gaps = [b - a for (a, _), (b, _) in itertools.pairwise(said)]
    assert all(gap >= 10 for gap in gaps), "once a window"


@pytest.mark.parametrize(
    "figures",
    [
        {},
        {"reward_mean": lambda i: 0.1 * i, "entropy": lambda i: max(1.0 - 0.1 * i, 0.01)},
        {"reward_mean": lambda i: 1.0 + 0.4 * (-1) ** i},
        {"reward_mean": lambda i: -1.0 + 0.05 * (i % 3), "kl": None},
        {"reward_mean": lambda i: 0.4 * (i % 2) if i < 10 else 0.05},
        {"kl": lambda i: 0.3, "truncation_rate": lambda i: 0.5},
        {"kl": lambda i: 0.5 if i < 10 else 2.0},
        {"reward_mean": float("nan"), "entropy": float("nan"), "kl": None},
    ],
    ids=["steady", "learns", "noisy", "negative", "by-chance", "far", "4-bit", "unknown"],
)
def test_the_watchdog_is_quiet_when_nothing_is_wrong(figures):
    assert warnings(records(40, **figures)) == []


def fading(trainer):
    """A reward that is worth less and less, whatever the policy does."""

    def reward(completion_ids, **_):
        factor = 1.0 if trainer.update_step < 3 else 0.05
        return [factor * (10 + len(set(ids))) for ids in completion_ids]

    trainer.reward_funcs = {"helpers:digest": reward}


def constant(trainer):
    trainer.reward_funcs = {"helpers:digest": lambda completions, **_: [1.0] * len(completions)}


REAL = {
    "reward": (fading, {}, "the reward has collapsed"),
    "variance": (constant, {}, "no group had any variance"),
    "truncated": (lambda trainer: None, {"max_new_tokens": 1}, "every completion was cut off"),
    "kl": (lambda trainer: None, {"kl_coeff": 1e-6, "learning_rate": 0.01}, "from its reference"),
}


@pytest.mark.parametrize("name", REAL)
def test_the_watchdog_warns_in_a_run(model_dir, data_dir, tmp_path, capsys, name):
    prepare, settings, text = REAL[name]
    base = {
        "max_updates": 6,
        "max_new_tokens": 24,
        "watchdog_window": 2,
        "stop_strings": ["t", "0"],
    }
    run_training(model_dir, data_dir, tmp_path / "o", prepare, **base | settings)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning ")]
    assert any(text in line for line in said), said
    notes = [note for record in read_log(tmp_path / "o") for note in record.get("notes", [])]
    assert len(notes) == len(said) <= 3


# The table.


def test_the_table_of_faults_names_tests_that_exist():
    text = (ROOT / "docs" / "faults.md").read_text()
    text = text.partition("## Faults")[2].partition("\n## ")[0]
    rows = [line for line in text.splitlines() if re.match(r"\| [^-|]", line)]
    named = re.findall(r"`(test_\w+)::(test_\w+)`", text)
    assert len(rows) - 1 == len(named), "a test for every row"
    for file, name in named:
        source = next(ROOT.glob(f"tests/*/{file}.py")).read_text()
        assert f"def {name}(" in source, f"{file}::{name}"
    mine = {name for file, name in named if file == "test_faults"}
    written = set(re.findall(r"^def (test_\w+)\(", Path(__file__).read_text(), re.M))
    assert written - mine == {"test_the_table_of_faults_names_tests_that_exist"}
