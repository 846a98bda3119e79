"""What a run wrote is told from what is the user's; only the former is ever renamed or removed."""

import json
import os
import shutil

import pytest
from helpers import assert_names, mostly_long, tree

from utils.run import ours

RUN = {"max_updates": 3, "save_steps": 2, "save_total_limit": 1, "max_new_tokens": 2}

# What others have under such names, as path -> text.
OF_OTHERS = {
    "an environment": {".venv.old/bin/python": "x", ".venv.old/lib/a.py": "x"},
    "notes": {".notes.incomplete/notes.txt": "x"},
    "a cache": {".cache.old-2024/blob": "x", ".profile.old-1": "x"},
    "years": {".final.old-2024/essay.txt": "x", ".best.old-1/a": "x", ".checkpoint-4.old-3/b": "x"},
    "drafts": {".final.incomplete/essay.txt": "x", ".checkpoint-4.old/c": "x", ".best.old/d": "x"},
    "partial": {".x.partial": "x", ".final.partial-12/x": "x", ".partial": "x"},
    "named": {"checkpoint-2.mine/x": "x", "checkpoint-two/x": "x", "finals/x": "x"},
    "saved by hand": {"checkpoint-2-good/model.safetensors": "x", "best-of-all/x": "x"},
    "files": {"metrics.csv": "epoch,loss\n1,2\n", "traceback.txt": "Traceback (most recent call"},
    "events": {"tensorboard/events.out.tfevents.1.host": "x"},
    "tracker": {"wandb_run.txt": "my runs: one, two\n", "wandb/run-1/x": "x"},
}


def put(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def kept(before, folder):
    after = tree(folder)
    return {name: after.get(name) for name in before} == before


@pytest.mark.parametrize("ways", mostly_long(["once", "all ways"], "once"))
@pytest.mark.parametrize("what", [*OF_OTHERS, "everything"])
def test_what_is_not_a_runs_is_left_as_it_is(typed, tmp_path, what, ways):
    """A first run, one that overwrites, one that is stopped and resumed."""
    if (ways == "once") != (what == "everything"):
        pytest.skip("the quick way has all at once")
    files = OF_OTHERS.values() if what == "everything" else [OF_OTHERS[what]]
    for own in files:
        put(tmp_path / "out", own)
    before = tree(tmp_path / "out")
    for words in ([], ["--set", "overwrite=true"], ["--set", "overwrite=true"]):
        code, out, err, _ = typed(*words, **RUN)
        assert (code, err) == (0, "")
        assert kept(before, tmp_path / "out"), words
    (tmp_path / "out" / "final" / "run.json").unlink()
    assert typed("--resume", **RUN)[0] == 0
    assert kept(before, tmp_path / "out")
    assert "restored" not in out


def test_the_current_folder_as_output_folder(typed, tmp_path):
    """Where all that a person has lies."""
    for files in OF_OTHERS.values():
        put(tmp_path, files)
    before = tree(tmp_path)
    for words in ([], ["--set", "overwrite=true"]):
        assert typed(*words, **RUN | {"output_dir": "."})[0] == 0
    assert kept(before, tmp_path)


# Names that a run writes: name -> how others may have something there.
TAKEN = {
    "final": {"final/essay.txt": "x", "final/config.json": "{}"},
    "best": {"best/photo.png": "x", "best/evaluation.json": '{"accuracy": 1}'},
    "checkpoint": {"checkpoint-500/trainer_state.json": '{"epoch": 1}', "checkpoint-500/o.pt": "x"},
    "config": {"config.resolved.json": '{"port": 80}'},
    "provenance": {"provenance.json": '{"author": "me"}'},
    "log": {"training_log.jsonl": '{"epoch": 1}\n'},
    "metrics": {"metrics.csv": "epoch,loss\n1,2\n"},
    "wandb": {"wandb_run.txt": "my runs: one, two\n"},
    "tensorboard": {"tensorboard/events.out.tfevents.1.host": "x"},
    "lock": {".lock": "poetry.lock is elsewhere\n"},
}


@pytest.mark.parametrize("words", [[], ["--set", "overwrite=true"], ["--resume"]], ids=str)
@pytest.mark.parametrize("what", TAKEN)
def test_a_name_that_is_taken_is_said_before_anything_is_done(
    refused, tmp_path, monkeypatch, what, words
):
    monkeypatch.setattr("utils.run.trackers._installed", lambda name: True)
    put(tmp_path / "out", TAKEN[what])
    reports = {"report_to": ["csv", "tensorboard", "wandb"]}
    message = refused(*words, **RUN, **reports, save_best=True, eval_samples=2)
    name = next(iter(TAKEN[what])).partition("/")[0]
    assert_names(message, name, "choose another output_dir")


@pytest.mark.parametrize(
    ("place", "name"),
    [("final", "notes.txt"), ("final", "gguf"), ("checkpoint-6", "eval.jsonl"), ("best", "x.gguf")],
)
def test_what_was_added_to_a_run_is_not_overwritten(typed, refused, tmp_path, place, name):
    best = {"save_best": True, "eval_samples": 3, "eval_metric": "int", "reward_funcs": ["int"]}
    assert typed(**RUN, **best)[0] == 0
    if place == "best":  # as after an evaluation that was better
        shutil.copytree(tmp_path / "out" / "final", tmp_path / "out" / "best")
    path = tmp_path / "out" / place / name
    path.parent.mkdir(exist_ok=True)
    path.mkdir() if "." not in name else path.write_text("mine")
    (path.parent / ".DS_Store").write_text("the system's")
    message = refused("--set", "overwrite=true", **RUN, **best)
    assert_names(message, f"overwrite would delete out/{place}/{name}", "was added to the run")
    path.rename(tmp_path / "moved")
    assert typed("--set", "overwrite=true", **RUN, **best)[0] == 0, "as advised"


def test_what_was_added_to_a_final_moves_into_the_new_one(typed, tmp_path):
    """The run had stopped early, and goes on."""
    assert typed(**RUN, max_hours=1e-9)[0] == 0
    final = tmp_path / "out" / "final"
    (final / "notes.txt").write_text("mine")
    (final / "gguf").mkdir()
    (final / "gguf" / "model.gguf").write_text("mine too")
    code, out, *_ = typed("--resume", **RUN)
    assert code == 0
    assert "kept      gguf, notes.txt in " in out
    assert (final / "notes.txt").read_text() == "mine"
    assert (final / "gguf" / "model.gguf").read_text() == "mine too"
    assert json.loads((final / "run.json").read_text())["updates"] == 3
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.name.startswith(".")) == []


def test_a_checkpoint_to_which_something_was_added_is_not_pruned(typed, tmp_path):
    assert typed(**RUN | {"save_total_limit": 0})[0] == 0
    old = tmp_path / "out" / "checkpoint-2"
    (old / "notes.txt").write_text("mine")
    for name in ("checkpoint-6", "final"):
        shutil.rmtree(tmp_path / "out" / name)
    code, out, *_ = typed("--resume", **RUN)
    assert code == 0
    assert out.count("is not deleted, since notes.txt was added to it") == 1
    assert (old / "notes.txt").read_text() == "mine"
    names = sorted(p.name for p in (tmp_path / "out").glob("checkpoint-*"))
    assert names == ["checkpoint-2", "checkpoint-6"], "itself, and the limit of one"


def test_what_was_set_aside_is_not_deleted_by_what_is_set_aside_later(typed, tmp_path):
    run = RUN | {"save_total_limit": 0}
    assert typed(**run)[0] == 0
    back = ("--resume", "checkpoint-2")
    for _ in range(2):
        assert typed(*back, **run)[0] == 0
    names = sorted(p.name for p in (tmp_path / "out").glob("checkpoint-4*"))
    assert names == ["checkpoint-4", "checkpoint-4.abandoned", "checkpoint-4.abandoned-2"]


def test_every_kind_of_what_a_run_writes_is_known_again(typed, tmp_path):
    """Otherwise the next run would be refused, or what is replaced would stay for ever."""
    best = {"save_best": True, "eval_samples": 3, "report_to": ["csv"]}
    assert typed(**RUN, **best)[0] == 0
    found = ours.of_runs(tmp_path / "out")
    assert ours.remains(tmp_path / "out") == found
    names = {path.name for path in found}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names
    assert {"final", "checkpoint-6", *ours.METRICS, ours.CONFIG, ours.LOG} < names
    for folder in ("final", "checkpoint-6"):
        listed = ours.listed(tmp_path / "out" / folder)
        assert listed == {*os.listdir(tmp_path / "out" / folder)}
        assert ours.strangers(tmp_path / "out" / folder) == []


@pytest.mark.parametrize("gone", ["manifest.json", "trainer_state.safetensors"])
def test_a_checkpoint_without_one_of_its_files_is_still_a_runs(tmp_path, gone):
    folder = tmp_path / "checkpoint-7"
    folder.mkdir()
    files = {"files": {"trainer_state.json": {}}}
    put(folder, {"manifest.json": json.dumps(files), "trainer_state.safetensors": "x"})
    assert ours.known(folder)
    (folder / gone).unlink()
    assert ours.known(folder)
    shutil.rmtree(folder)
    assert not ours.known(folder)


def test_a_traceback_of_others_is_not_written_over(tmp_path):
    from utils.run import ending

    (tmp_path / "traceback.txt").write_text("Traceback (most recent call last): of another program")
    for _ in range(2):
        ending.unexpected(ValueError("x"), tmp_path)
    assert (tmp_path / "traceback.txt").read_text().endswith("another program")
    assert "ValueError: x" in (tmp_path / "traceback-2.txt").read_text()
