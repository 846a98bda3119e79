"""Checkpoints and models that were moved to another disk and linked, and disks that refuse."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from helpers import assert_names, run_training, snapshot, stop_after

from utils.run import folders

RUN = {"max_updates": 4, "save_steps": 2, "save_total_limit": 2, "max_new_tokens": 2}
KNOWN = ("--set", "overwrite=true")


def move_and_link(path, disk, relative=False):
    """As a person does whose disk is full; the file system is another one where there is one."""
    disk.mkdir(exist_ok=True)
    target = disk / path.name
    shutil.move(path, target)
    path.symlink_to(os.path.relpath(target, path.parent) if relative else target)
    return target


def listing(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.fixture
def disk(tmp_path):
    """A folder on another file system, if this machine has one that may be written to."""
    shared = Path("/dev/shm")
    if shared.is_dir() and os.access(shared, os.W_OK):
        folder = shared / f"mlx-grpo-test-{os.getpid()}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        yield folder
        shutil.rmtree(folder)
    else:
        yield tmp_path / "disk"


@pytest.mark.parametrize("relative", [False, True])
def test_linked_checkpoints_are_pruned_and_resumed(
    model_dir, data_dir, tmp_path, disk, capsys, relative
):
    """Of what is pruned only the link goes, and where the weights are is said."""
    _, whole = run_training(model_dir, data_dir, tmp_path / "whole", **RUN)
    out = tmp_path / "o"
    run_training(model_dir, data_dir, out, stop_after(2), **RUN)
    targets = [move_and_link(out / f"checkpoint-{n}", disk, relative) for n in (2, 4)]
    before = [listing(target) for target in targets]
    code, resumed = run_training(model_dir, data_dir, out, resume="auto", **RUN)
    assert code == 0
    assert snapshot(resumed) == snapshot(whole)
    assert sorted(p.name for p in out.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]
    assert [listing(target) for target in targets] == before
    said = capsys.readouterr().out
    for target in targets:
        assert f"what it led to stays: {target}" in said


@pytest.mark.parametrize("by", ["auto", "checkpoint-4", "its target"])
def test_a_linked_checkpoint_belongs_to_the_run_also_with_overwrite(
    typed, tmp_path, disk, by, model_dir, data_dir
):
    """`overwrite = true` of a preset must not delete the run that is resumed."""
    run = RUN | {"overwrite": True, "reward_funcs": ["helpers:digest"], "run_name": by}
    run_training(model_dir, data_dir, tmp_path / "out", stop_after(2), **run)
    target = move_and_link(tmp_path / "out" / "checkpoint-4", disk)
    (tmp_path / "out" / "checkpoint-2" / "notes.txt").write_text("mine")
    if by == "its target":
        message = typed("--resume", str(target), **run)[2]
        assert_names(message, f"overwrite would delete resume = {target}")
        return
    code, out, err, _ = typed("--resume", *([] if by == "auto" else [by]), **run)
    assert (code, err) == (0, "")
    assert "resume    out/checkpoint-4 at update 2" in out
    assert (tmp_path / "out" / "checkpoint-2" / "notes.txt").exists()


@pytest.mark.parametrize("name", ["final", "best"])
def test_a_linked_model_is_replaced_where_it_lies(model_dir, data_dir, tmp_path, disk, name):
    """A run that had stopped goes on: the link stays, its disk gets the new model."""
    out = tmp_path / "o"
    run_training(model_dir, data_dir, out, stop_after(2), **RUN)
    run_training(model_dir, data_dir, tmp_path / "old", **RUN | {"max_updates": 1})
    shutil.copytree(tmp_path / "old" / "final", out / name)
    (out / name / "run.json").write_text('{"updates": 2, "of": 4}')
    target = move_and_link(out / name, disk)
    before = listing(target)
    if name == "best":
        with folders.written_aside(out / name) as folder:
            (folder / "model.safetensors").write_text("new")
    else:
        assert run_training(model_dir, data_dir, out, resume="auto", **RUN)[0] == 0
    assert (out / name).is_symlink()
    assert listing(target)["model.safetensors"] != before["model.safetensors"]
    assert [p.name for p in disk.iterdir()] == [name]


def test_overwriting_a_run_with_links_leaves_what_they_lead_to(typed, tmp_path, disk):
    assert typed(**RUN)[0] == 0
    out = tmp_path / "out"
    names = ("final", "checkpoint-6", "training_log.jsonl", "config.resolved.json")
    targets = {name: move_and_link(out / name, disk, relative=True) for name in names}
    before = {n: listing(t) if t.is_dir() else t.read_bytes() for n, t in targets.items()}
    code, _, err, _ = typed(*KNOWN, **RUN)
    assert (code, err) == (0, "")
    for name, target in targets.items():
        assert before[name] == (listing(target) if target.is_dir() else target.read_bytes())
        assert not (out / name).is_symlink()
    assert not (out / ".mlx-grpo-replaced").exists()


def test_linked_files_stay_links_when_a_run_goes_on(model_dir, data_dir, tmp_path, disk):
    out, run = tmp_path / "o", RUN | {"report_to": ["csv"], "eval_samples": 2}
    run_training(model_dir, data_dir, out, stop_after(2), **run)
    names = ("training_log.jsonl", "config.resolved.json", "provenance.json", "metrics.csv")
    for name in names:
        move_and_link(out / name, disk)
    assert run_training(model_dir, data_dir, out, resume="auto", **run)[0] == 0
    assert all((out / name).is_symlink() for name in names)
    assert len((disk / "training_log.jsonl").read_text().splitlines()) >= 4
    assert json.loads((disk / "provenance.json").read_text())["resumed"]


def test_a_linked_output_folder(typed, tmp_path, disk):
    (disk / "runs").mkdir()
    (tmp_path / "out").symlink_to(disk / "runs")
    for words in ([], KNOWN):
        assert typed(*words, **RUN)[0] == 0
    (disk / "runs" / "final" / "run.json").unlink()
    assert typed("--resume", **RUN)[0] == 0
    assert (tmp_path / "out").is_symlink()
    assert (disk / "runs" / "final" / "model.safetensors").is_file()


@pytest.mark.parametrize("words", [[], KNOWN, ["--resume"]], ids=str)
@pytest.mark.parametrize(
    "name", ["out", "out/final", "out/checkpoint-4", "out/training_log.jsonl", "out/.lock"]
)
def test_a_link_that_leads_nowhere_is_refused(typed, refused, tmp_path, name, words):
    """Such as to a disk that is not mounted: nothing is written in its place."""
    assert typed(**RUN)[0] == 0
    path = tmp_path / name
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)
    path.symlink_to("/not/mounted/x")
    message = refused(*words, **RUN)
    assert_names(message, path.name, "no ordinary file" if path.name == ".lock" else "nowhere")


def test_a_model_on_a_mounted_disk_is_replaced_file_by_file(tmp_path, monkeypatch, capsys):
    """No system renames a mount point, and none renames onto another disk."""
    final = tmp_path / "final"
    final.mkdir()
    for name in ("model.safetensors", "model-00002-of-00002.safetensors", "notes.txt", "a.json"):
        (final / name).write_text("old")
    inode, rename = final.stat().st_ino, Path.rename

    def refuses(path, target):
        if final in (path, Path(target)):
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuses)
    with folders.written_aside(final) as folder:
        (folder / "model.safetensors").write_text("new")
        (folder / "adapters").mkdir()
        (folder / "adapters" / "a.safetensors").write_text("new")
    assert final.stat().st_ino == inode
    found = {str(p.relative_to(final)): p.read_text() for p in final.rglob("*") if p.is_file()}
    assert found == {
        **{"model.safetensors": "new", "adapters/a.safetensors": "new", "notes.txt": "old"}
    }
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EXDEV, errno.EACCES])
def test_a_checkpoint_that_cannot_be_deleted_ends_no_run(
    model_dir, data_dir, tmp_path, monkeypatch, capsys, number
):
    rename = Path.rename

    def refuses(path, target):
        if path.name == "checkpoint-2":
            raise OSError(number, os.strerror(number))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuses)
    assert run_training(model_dir, data_dir, tmp_path / "o", **RUN)[0] == 0
    assert "checkpoint-2 cannot be deleted: " in capsys.readouterr().out
    assert folders.damage(tmp_path / "o" / "checkpoint-2") is None


def test_a_run_that_cannot_be_set_aside_stays_whole(typed, refused, tmp_path, monkeypatch):
    assert typed(**RUN)[0] == 0
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    rename = Path.rename

    def refuses(path, target):
        if path.name == "training_log.jsonl":
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuses)
    code, _, err, _ = typed(*KNOWN, **RUN)
    assert (code, "Device or resource busy" in err) == (2, True)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names


WANDERS = """
import os
os.chdir({at_import!r})

def reward(completions, **_):
    os.chdir({at_call!r})
    return [float(len(c[0]["content"]) % 7) for c in completions]
"""


def test_a_reward_that_leaves_the_current_folder(typed, data_dir, model_dir, tmp_path):
    """Everything that settings name by a relative path is found, and lands, where it belongs."""
    for name in ("import", "call"):
        (tmp_path / name).mkdir()
    shutil.copytree(data_dir, tmp_path / "data")
    shutil.copytree(model_dir, tmp_path / "model")
    (tmp_path / "t.jinja").write_text("{{ messages[0].content }}")
    places = {"at_import": str(tmp_path / "import"), "at_call": str(tmp_path / "call")}
    (tmp_path / "wanders.py").write_text(WANDERS.format(**places))
    (tmp_path / "second.py").write_text(WANDERS.format(**places))
    run = RUN | {"model_name": "model", "dataset": "data", "chat_template": "t.jinja"}
    run |= {"report_to": ["csv"], "eval_samples": 2, "train_type": "lora", "save_best": True}
    run |= {"reward_funcs": ["int", "wanders.py:reward", "second.py:reward"], "eval_steps": 2}
    here = os.getcwd()
    code, out, err, _ = typed(**run)
    os.chdir(here)
    assert (code, err) == (0, "")
    assert "saved     out/final" in out
    assert not [*(tmp_path / "import").iterdir(), *(tmp_path / "call").iterdir()]
    adapted = {**run, "adapter_path": "out/final/adapters", "output_dir": "next"}
    code, _, err, _ = typed(**adapted)
    os.chdir(here)
    assert (code, err) == (0, "")
    (tmp_path / "out" / "final" / "run.json").unlink()
    code, said, err, _ = typed("--resume", "checkpoint-6", **run)
    os.chdir(here)
    assert (code, err) == (0, "")
    assert "resume    out/checkpoint-6 at update 3" in said
    names = {"config.resolved.json", "training_log.jsonl", "metrics.csv", "final", "checkpoint-8"}
    assert names <= {p.name for p in (tmp_path / "out").iterdir()}
    assert not [*(tmp_path / "import").iterdir(), *(tmp_path / "call").iterdir()]


@pytest.mark.long
def test_workers_start_where_the_command_was_started(typed, tmp_path):
    (tmp_path / "call").mkdir()
    place = {"at_import": str(tmp_path / "call"), "at_call": str(tmp_path / "call")}
    (tmp_path / "wanders.py").write_text(WANDERS.format(**place))
    here = os.getcwd()
    code, _, err, _ = typed(**RUN, reward_funcs=["wanders.py:reward"], reward_workers=1)
    os.chdir(here)
    assert (code, err) == (0, "")
    assert (tmp_path / "out" / "final").is_dir()
