"""Every file that a run reads or writes, damaged in every way: one clear line, or it goes on.

Nothing is lost either way: a refusal changes nothing, and what no run could have written is kept.
"""

import os
import shutil

import pytest
from helpers import mostly_long, run_training, stop_after

from utils.run import ours

RUN = {
    **{"max_updates": 2, "save_steps": 2, "max_new_tokens": 2, "report_to": ["csv"]},
    **{"eval_samples": 2, "reward_funcs": ["helpers:digest"], "learning_rate": 1e-3},
}
CHECKPOINT = ("manifest.json", "trainer_state.json", "trainer_state.safetensors")
CHECKPOINT += ("model.safetensors", "config.json", "tokenizer.json")
NAMES = [
    *("config.resolved.json", "provenance.json", "training_log.jsonl", "metrics.csv"),
    *("metrics_eval.csv", "traceback.txt", ".lock", "final", "checkpoint-2", "best"),
    *(f"checkpoint-2/{name}" for name in CHECKPOINT),
    *("final/run.json", "final/manifest.json", "final/config.json"),
]


def replaced_by(make):
    def harm(path):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        make(path)

    return harm


def a_folder(path):
    path.mkdir()
    (path / "mine.txt").write_text("mine")


def cut(path):
    data = path.read_bytes() if path.is_file() else b"{}"
    replaced_by(lambda p: p.write_bytes(data[: len(data) // 2]))(path)


HARM = {
    "missing": replaced_by(lambda path: None),
    "empty": replaced_by(lambda path: path.touch()),
    "an empty folder": replaced_by(lambda path: path.mkdir()),
    "a folder": replaced_by(a_folder),
    "half written": cut,
    "binary": replaced_by(lambda path: path.write_bytes(bytes(range(256)) * 20)),
    "zeros": replaced_by(lambda path: path.write_bytes(bytes(4096))),
    "a list": replaced_by(lambda path: path.write_text('[1, "a"]\n')),
    "a number": replaced_by(lambda path: path.write_text("7\n")),
    "another object": replaced_by(lambda path: path.write_text('{"name": "mine"}\n')),
    "nested": replaced_by(lambda path: path.write_text("[" * 100_000)),
    "a pipe": replaced_by(os.mkfifo),
    "a link to nowhere": replaced_by(lambda path: path.symlink_to("/nowhere/at/all")),
    "a link to itself": replaced_by(lambda path: path.symlink_to(path.name)),
}
QUICK = [
    *((name, "a folder") for name in NAMES[:7]),
    *(("config.resolved.json", harm) for harm in ("missing", "half written", "nested")),
    *(("provenance.json", harm) for harm in ("a list", "half written")),
    *((".lock", harm) for harm in ("a pipe", "binary")),
    *(("final/run.json", harm) for harm in ("nested", "half written", "a folder")),
    *(("training_log.jsonl", "binary"), ("metrics.csv", "another object")),
    *(("final", "binary"), ("best", "a pipe"), ("checkpoint-2", "empty")),
    *(("checkpoint-2/trainer_state.json", "a list"), ("checkpoint-2/manifest.json", "a folder")),
]
WAYS = {
    "anew": [],
    "resumed": ["--resume"],
    "named": ["--resume", "checkpoint-2"],
    "overwritten": ["--set", "overwrite=true"],
}


@pytest.fixture(scope="module")
def runs(model_dir, data_dir, tmp_path_factory):
    """A run that was stopped after its first update, and one that was finished."""
    folder = tmp_path_factory.mktemp("runs")
    run_training(model_dir, data_dir, folder / "stopped", stop_after(1), **RUN)
    run_training(model_dir, data_dir, folder / "finished", **RUN | {"save_total_limit": 0})
    return folder


@pytest.mark.parametrize("state", ["stopped", "finished"])
@pytest.mark.parametrize(
    ("name", "harm"), mostly_long([(name, harm) for name in NAMES for harm in HARM], *QUICK)
)
def test_a_damaged_file_ends_in_one_line_or_in_a_run(typed, runs, tmp_path, name, harm, state):
    for way, words in WAYS.items():
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(runs / state, out)
        (out / name).parent.mkdir(exist_ok=True)
        HARM[harm](out / name)
        code, _, err, changed = typed(*words, **RUN)
        assert code in (0, 2), (way, err)
        assert "Traceback" not in err
        if code == 2:
            assert err.startswith("error: "), way
            assert len(err.splitlines()) <= 4
            stale = {"out/.lock"} if name == ".lock" else set()  # is removed, as after a kill
            assert not changed - {"settings.toml"} - stale, (way, changed)
        else:
            assert err == ""
            assert (out / "final" / "model.safetensors").is_file()
        kept = [*out.rglob("mine.txt"), *out.rglob("*/mine.txt")]
        assert kept or harm != "a folder", f"{way}: what was in the folder is gone"


def test_a_finished_run_that_does_not_say_with_what_settings(typed, runs, tmp_path):
    """Its end is known all the same, and a loop around --resume comes to its own."""
    for harm in ("missing", "half written"):
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(runs / "finished", out)
        HARM[harm](out / "config.resolved.json")
        code, said, err, changed = typed("--resume", **RUN)
        assert (code, err, changed - {"settings.toml"}) == (0, "", set())
        assert said == "finished  the run in out was complete: see out/final\n"
        message = typed("--resume", **RUN | {"learning_rate": 0.5})[2]
        assert "learning_rate (was 0.001, is 0.5)" in message, "the checkpoint says"
        for folder in out.glob("checkpoint-*"):
            shutil.rmtree(folder)
        code, said, err, _ = typed("--resume", **RUN)
        assert (code, err) == (0, "")
        assert "warning   out/config.resolved.json is missing or damaged" in said
        assert "finished  the run in out was complete" in said


def test_what_cannot_be_read_is_kept_under_another_name(typed, runs, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(runs / "stopped", out)
    for name in (ours.CONFIG, ours.PROVENANCE):
        (out / name).write_text('{"cut o')
    code, said, err, _ = typed("--resume", **RUN)
    assert (code, err) == (0, "")
    for name in (ours.CONFIG, ours.PROVENANCE):
        assert f"{name} could not be read; it is {name}.damaged now" in said
        assert (out / f"{name}.damaged").read_text() == '{"cut o'
        assert ours.known(out / name)


def test_there_is_nothing_to_resume_yet(typed, tmp_path):
    """As at the first turn of a loop around --resume."""
    (tmp_path / "out").mkdir()
    code, said, err, _ = typed("--resume", **RUN)
    assert (code, err) == (0, "")
    assert "resume    there is no checkpoint in out to go on from: the run starts anew" in said
