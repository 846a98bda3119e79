"""Resuming: the state of a run, what the log says afterwards, what may change, what is kept."""

import csv
import hashlib
import json
import math
import random
import shutil
import sys
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from helpers import (
    RESUMED,
    both,
    change_json,
    mostly_long,
    read_log,
    run_training,
    score_by,
    snapshot,
    stop_after,
    stop_in_evaluation,
    timeless,
)

from utils.base.errors import UserError
from utils.model import fingerprints
from utils.run import checkpoints, folders
from utils.run.state import seed_random_states


def drawing(completion_ids, **_):
    """A reward that draws from the random states of Python, NumPy and MLX."""
    drawn = random.random() + np.random.rand() + mx.random.uniform().item()
    return [float(len(ids) % 7) + drawn * n for n, ids in enumerate(completion_ids)]


def drawn_reward(trainer):
    """In a process that has drawn already, as if it were a new one."""
    trainer.reward_funcs = {"digest": drawing}
    seed_random_states(99)


KINDS = {
    "full": {},
    "full-2-3": {"num_iterations": 2, "sync_every_updates": 3},
    "lora": {"train_type": "lora", "lora_dropout": 0.1},
    "lora-2-3": {"train_type": "lora", "num_iterations": 2, "sync_every_updates": 3},
}


@pytest.mark.parametrize("stop", mostly_long([1, 2, 3, 4], 3))
@pytest.mark.parametrize("kind", mostly_long(KINDS, "full-2-3", "lora"))
def test_every_stop_leads_to_the_same_end(model_dir, data_dir, tmp_path, kind, stop):
    """Stopped twice, with a reward that draws random numbers: the same weights, moments, log."""
    settings = RESUMED | KINDS[kind]
    if "train_type" not in KINDS[kind]:
        del settings["lora_learning_rate"]
    _, whole = run_training(model_dir, data_dir, tmp_path / "whole", drawn_reward, **settings)
    parts = tmp_path / "parts"
    stopped = both(drawn_reward, stop_after(stop))
    assert run_training(model_dir, data_dir, parts, stopped, **settings)[0] == 130
    again = both(drawn_reward, stop_after(stop + 1))
    run_training(model_dir, data_dir, parts, again, resume="auto", **settings)
    code, resumed = run_training(
        model_dir, data_dir, parts, drawn_reward, resume="auto", **settings
    )
    assert code == 0
    assert snapshot(resumed) == snapshot(whole)
    assert timeless(parts) == timeless(tmp_path / "whole")
    assert resumed.run.log.history == whole.run.log.history


def test_without_the_random_states_the_end_would_differ(model_dir, data_dir, tmp_path, monkeypatch):
    """The test above can fail."""
    settings = {"max_updates": 3, "max_new_tokens": 6}
    run_training(model_dir, data_dir, tmp_path / "whole", drawn_reward, **settings)
    stopped = both(drawn_reward, stop_after(1))
    run_training(model_dir, data_dir, tmp_path / "parts", stopped, **settings)
    monkeypatch.setattr(checkpoints, "restore_random_states", lambda states: random.seed(7))
    settings["resume"] = "auto"
    run_training(model_dir, data_dir, tmp_path / "parts", drawn_reward, **settings)
    assert timeless(tmp_path / "parts") != timeless(tmp_path / "whole")


@pytest.mark.parametrize("split", ["test", "train"])
def test_an_evaluation_that_was_cut_short_is_done_again(model_dir, data_dir, tmp_path, split):
    """Ctrl-C while the evaluation after update 3 runs: it is neither lost nor written twice."""
    settings = RESUMED | {"eval_steps": 6, "logging_steps": 1}
    del settings["lora_learning_rate"]
    _, whole = run_training(model_dir, data_dir, tmp_path / "whole", **settings)

    parts = tmp_path / "parts"
    interrupt = stop_in_evaluation(3, split)
    code, stopped = run_training(model_dir, data_dir, parts, interrupt, **settings)
    assert (code, stopped.update_step) == (130, 3)
    assert (parts / f"checkpoint-{stopped.step}").is_dir(), "the update itself is not lost"
    done = [r["split"] for r in read_log(parts) if r["update"] == 3 and "split" in r]
    assert done == ([] if split == "train" else ["train"]), "that one is not in the log yet"
    _, resumed = run_training(model_dir, data_dir, parts, resume="auto", **settings)
    assert timeless(parts) == timeless(tmp_path / "whole")
    assert snapshot(resumed) == snapshot(whole)


@pytest.mark.parametrize("eval_steps", [2, 6], ids=["due", "not-due"])
def test_out_of_time_after_an_update_evaluates_it_once(
    model_dir, data_dir, tmp_path, capsys, eval_steps
):
    settings = {"max_updates": 4, "eval_samples": 3, "eval_steps": eval_steps, "max_new_tokens": 4}
    run_training(model_dir, data_dir, tmp_path / "whole", **settings)

    def out_of_time(trainer):
        def train_step(batch, call=trainer.train_step):
            trainer.args.max_hours = 1e-9 if trainer.update_step == 1 else 0.0
            return call(batch)

        trainer.train_step = train_step

    capsys.readouterr()
    parts = tmp_path / "parts"
    assert run_training(model_dir, data_dir, parts, out_of_time, **settings)[0] == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("eval      update    2")]) == 1
    assert [r["split"] for r in read_log(parts) if r["update"] == 2 and "split" in r] == ["test"]
    run_training(model_dir, data_dir, parts, resume="auto", **settings)
    assert timeless(parts) == timeless(tmp_path / "whole")


@pytest.mark.parametrize("train_type", ["full", "lora"])
def test_a_stop_in_the_last_evaluation(model_dir, data_dir, tmp_path, train_type):
    settings = {"max_updates": 2, "eval_samples": 3, "train_type": train_type, "logging_steps": 3}
    _, whole = run_training(model_dir, data_dir, tmp_path / "whole", **settings)

    parts = tmp_path / "parts"
    assert run_training(model_dir, data_dir, parts, stop_in_evaluation(2), **settings)[0] == 130
    assert not (parts / "final").exists()
    code, resumed = run_training(model_dir, data_dir, parts, resume="auto", **settings)
    assert code == 0
    assert timeless(parts) == timeless(tmp_path / "whole")
    assert snapshot(resumed) == snapshot(whole)


def test_going_back_to_an_older_checkpoint(model_dir, data_dir, tmp_path, capsys):
    """What came after it is set aside: a later resume must not jump ahead of the log."""
    settings = {"max_updates": 4, "save_steps": 2, "save_total_limit": 0}
    parts = tmp_path / "parts"
    _, whole = run_training(model_dir, data_dir, parts, **settings)
    log = timeless(parts)
    older = str(parts / "checkpoint-2")
    run_training(model_dir, data_dir, parts, stop_after(2), resume=older, **settings)
    out = capsys.readouterr().out
    assert "checkpoint-8.abandoned is set aside" in out
    assert sorted(p.name for p in parts.glob("checkpoint-*")) == [
        *("checkpoint-2", "checkpoint-4", "checkpoint-4.abandoned"),
        *("checkpoint-6.abandoned", "checkpoint-8.abandoned"),
    ]
    _, resumed = run_training(model_dir, data_dir, parts, resume="auto", **settings)
    assert "checkpoint-4 at update 2" in capsys.readouterr().out
    assert timeless(parts) == log
    assert snapshot(resumed) == snapshot(whole)


def test_a_renamed_checkpoint_can_be_gone_on_from(model_dir, data_dir, tmp_path, capsys):
    """Such as one that was set aside."""
    settings = {"max_updates": 2, "save_steps": 2, "save_total_limit": 0}
    _, whole = run_training(model_dir, data_dir, tmp_path / "o", **settings)
    older = (tmp_path / "o" / "checkpoint-2").rename(tmp_path / "o" / "checkpoint-2.abandoned")
    code, resumed = run_training(model_dir, data_dir, tmp_path / "o", resume=str(older), **settings)
    assert code == 0
    assert "checkpoint-4.abandoned is set aside" in capsys.readouterr().out
    assert snapshot(resumed) == snapshot(whole)


def test_a_checkpoint_goes_on_in_another_folder_with_its_log(model_dir, data_dir, tmp_path):
    settings = {"max_updates": 3, "save_steps": 2}
    _, whole = run_training(model_dir, data_dir, tmp_path / "one", **settings)
    from_there = str(tmp_path / "one" / "checkpoint-4")
    _, moved = run_training(model_dir, data_dir, tmp_path / "two", resume=from_there, **settings)
    assert timeless(tmp_path / "two") == timeless(tmp_path / "one")
    assert snapshot(moved) == snapshot(whole)
    with pytest.raises(UserError, match="holds another run"):
        run_training(model_dir, data_dir, tmp_path / "two", resume=from_there, **settings)


def test_what_changed_on_the_way_is_on_record(model_dir, data_dir, tmp_path, capsys):
    settings = {"max_updates": 3, "max_new_tokens": 2}
    run_training(model_dir, data_dir, tmp_path / "o", stop_after(1), **settings)
    settings |= {"resume": "auto", "rollout_batch_size": 3}
    run_training(model_dir, data_dir, tmp_path / "o", stop_after(2), **settings)
    assert "rollout_batch_size was 0, is 3" in capsys.readouterr().out
    assert run_training(model_dir, data_dir, tmp_path / "o", **settings)[0] == 0
    provenance = json.loads((tmp_path / "o" / "provenance.json").read_text())
    assert provenance["resumed"] == [
        {"from": "checkpoint-2", "update": 1, "changed": {"rollout_batch_size": [0, 3]}},
        {"from": "checkpoint-4", "update": 2, "changed": {}},
    ]


def test_training_data_that_changed_is_refused(model_dir, data_dir, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(data_dir, data)
    settings = {"max_updates": 2, "max_new_tokens": 2}
    run_training(model_dir, data, tmp_path / "o", stop_after(1), **settings)
    lines = (data / "train.jsonl").read_text().splitlines()
    (data / "train.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    with pytest.raises(UserError, match=r"has changed since .*checkpoint-2 was written"):
        run_training(model_dir, data, tmp_path / "o", resume="auto", **settings)


def mean_rewards(output):
    return [r["reward_mean"] for r in read_log(output) if "loss" in r]


@pytest.mark.parametrize("edited", [True, False])
def test_rewards_that_changed_are_said_and_on_record(model_dir, data_dir, tmp_path, capsys, edited):
    """Not refused: a function that failed has to be mended before the run can go on."""
    file, output = tmp_path / "mine.py", tmp_path / "o"
    file.write_text("def reward(completion_ids, **_):\n    return [1.0] * len(completion_ids)\n")
    settings = {"max_updates": 4, "max_new_tokens": 2, "reward_funcs": [f"{file}:reward"]}
    run_training(model_dir, data_dir, output, stop_after(2), **settings)
    if edited:
        file.write_text(file.read_text().replace("1.0", "2.0"))
    sys.modules.pop(f"reward_file:{file}")  # as a new process has it
    capsys.readouterr()
    assert run_training(model_dir, data_dir, output, resume="auto", **settings)[0] == 0
    assert mean_rewards(output) == [1.0, 1.0, *[2.0 if edited else 1.0] * 2]
    said = f"warning   the rewards of {file} have changed since checkpoint-4 was written"
    assert capsys.readouterr().out.count(said) == edited
    notes = [note for record in read_log(output) for note in record.get("notes", [])]
    assert len(notes) == edited
    provenance = json.loads((output / "provenance.json").read_text())
    assert [*provenance["resumed"][0]["changed"]] == [str(file)] * edited
    assert provenance["rewards_sha256"] == {
        str(file): hashlib.sha256(file.read_bytes()).hexdigest()
    }


@pytest.mark.parametrize(
    ("kind", "refused"),
    [
        ({"train_type": "lora"}, "the base of the adapters, has changed since .*checkpoint-4 was"),
        ({"kl_coeff": 0.1}, "the reference, has changed since"),
        ({}, ""),  # all weights are in the checkpoint
    ],
    ids=["lora", "full-with-reference", "full"],
)
def test_a_base_that_changed_is_refused(model_dir, data_dir, tmp_path, kind, refused):
    """Its weights, not its shape: as after some more training of it."""
    model, output = tmp_path / "model", tmp_path / "o"
    shutil.copytree(model_dir, model)
    settings = {"max_updates": 3, "max_new_tokens": 2, **kind}
    run_training(model, data_dir, output, stop_after(1), **settings)
    config = model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()), indent=4))
    run_training(model, data_dir, output, stop_after(2), resume="auto", **settings)
    weights = dict(mx.load(str(model / "model.safetensors")))
    mx.eval(weights)
    moved = {name: weight * 1.001 for name, weight in weights.items()}
    mx.save_safetensors(str(model / "model.safetensors"), moved, metadata={"format": "mlx"})
    if not refused:
        assert run_training(model, data_dir, output, resume="auto", **settings)[0] == 0
        return
    log = (output / "training_log.jsonl").read_bytes()
    with pytest.raises(UserError, match=refused):
        run_training(model, data_dir, output, resume="auto", **settings)
    assert (output / "training_log.jsonl").read_bytes() == log


def test_the_fingerprint_of_a_model_reads_a_little_of_everything(tmp_path):
    """A large file by pieces: what was trained further differs in all of them."""
    (tmp_path / "config.json").write_text('{"a": 1}')
    path = tmp_path / "model-00001-of-00002.safetensors"
    rng = np.random.default_rng(0)
    weights = {"w": mx.array(rng.normal(size=(1500, 1000)).astype(np.float32))}
    mx.save_safetensors(str(path), weights)
    before, read = fingerprints.of_model(tmp_path), fingerprints.pieces(100, 100 + 6_000_000)
    assert sum(count for _, count in read) == 16 * 2**16
    assert (read[0][0], sum(read[-1])) == (100, 100 + 6_000_000)
    mx.save_safetensors(str(path), weights)
    assert fingerprints.of_model(tmp_path) == before
    mx.save_safetensors(str(path), {"w": weights["w"] + 1e-3})
    assert fingerprints.of_model(tmp_path) != before
    path.rename(tmp_path / "model.safetensors")
    assert fingerprints.of_model(tmp_path) != before


def test_the_csv_files_have_each_record_once(model_dir, data_dir, tmp_path):
    settings = {"max_updates": 4, "save_steps": 4, "eval_samples": 3, "eval_steps": 2}
    settings |= {"report_to": ["csv"], "max_new_tokens": 2}
    output = tmp_path / "o"

    def fail(trainer):
        def generate(rows, call=trainer.generate_responses):
            if trainer.update_step == 3:
                shutil.rmtree(output / "checkpoint-6", ignore_errors=True)
                raise KeyboardInterrupt  # as a kill does: nothing is saved
            return call(rows)

        trainer.generate_responses = generate

    with pytest.raises(KeyboardInterrupt):
        run_training(model_dir, data_dir, output, fail, **settings)
    assert run_training(model_dir, data_dir, output, resume="auto", **settings)[0] == 0
    records = read_log(output)
    for name, kind in (("metrics.csv", False), ("metrics_eval.csv", True)):
        with (output / name).open(newline="") as file:
            updates = [int(row["update"]) for row in csv.DictReader(file)]
        assert updates == [r["update"] for r in records if ("split" in r) == kind]


def edit_line(path, number, line):
    lines = path.read_bytes().split(b"\n")
    lines[number - 1] = line
    path.write_bytes(b"\n".join(lines))


@pytest.mark.parametrize("line", [b"oops", b"[1]", b'{"loss": 1}', b"\xff\x00", b"[" * 100_000])
def test_a_log_that_is_none_is_named_before_anything_loads(
    model_dir, data_dir, tmp_path, capsys, line
):
    settings = {"max_updates": 3, "max_new_tokens": 2}
    log = tmp_path / "o" / "training_log.jsonl"
    run_training(model_dir, data_dir, tmp_path / "o", stop_after(2), **settings)
    sizes = list(map(len, log.read_bytes().split(b"\n")))
    edit_line(log, 1, line[: sizes[0]].ljust(sizes[0]))
    capsys.readouterr()
    with pytest.raises(UserError, match=r"training_log\.jsonl, line 1 is no record .* delete it"):
        run_training(model_dir, data_dir, tmp_path / "o", resume="auto", **settings)
    assert capsys.readouterr().out == "", "no model was loaded"


@pytest.mark.parametrize("kept", [2, 3])
def test_a_log_whose_line_was_deleted_goes_on_once(model_dir, data_dir, tmp_path, kept):
    """As the error says to do: its bytes no longer are where the checkpoint has them."""
    settings = {"max_updates": 5, "max_new_tokens": 2, "save_steps": 2, "save_total_limit": 0}
    output = tmp_path / "o"
    run_training(model_dir, data_dir, output, **settings)
    lines = (output / "training_log.jsonl").read_bytes().splitlines(keepends=True)
    (output / "training_log.jsonl").write_bytes(b"".join([lines[0], *lines[2:]]))
    settings["resume"] = str(output / f"checkpoint-{2 * kept}")
    assert run_training(model_dir, data_dir, output, **settings)[0] == 0
    assert [r["update"] for r in read_log(output)] == [1, 3, 4, 5]


def test_a_line_that_a_crash_tore_is_dropped(model_dir, data_dir, tmp_path, capsys):
    """The machine went down before the end of the log was on its disk."""
    settings = {"max_updates": 4, "max_new_tokens": 2, "report_to": ["csv"]}
    output = tmp_path / "o"
    log = output / "training_log.jsonl"
    run_training(model_dir, data_dir, output, stop_after(2), **settings)
    data = log.read_bytes()
    log.write_bytes(data[:-9] + bytes(4))
    capsys.readouterr()
    assert run_training(model_dir, data_dir, output, resume="auto", **settings)[0] == 0
    out = capsys.readouterr().out
    assert out.count(f"the last line of {log} was cut off by a crash, and is dropped") == 1
    assert [r["update"] for r in read_log(output)] == [1, 3, 4]
    with (output / "metrics.csv").open(newline="") as file:
        assert [row["update"] for row in csv.DictReader(file)] == ["1", "3", "4"]


def test_a_log_without_its_last_end_of_line_loses_nothing(model_dir, data_dir, tmp_path):
    settings = {"max_updates": 3, "max_new_tokens": 2}
    log = tmp_path / "o" / "training_log.jsonl"
    run_training(model_dir, data_dir, tmp_path / "o", stop_after(2), **settings)
    log.write_bytes(log.read_bytes()[:-1])
    assert run_training(model_dir, data_dir, tmp_path / "o", resume="auto", **settings)[0] == 0
    assert [r["update"] for r in read_log(tmp_path / "o")] == [1, 2, 3]


# What is kept.


def scripted(*scores):
    """Evaluations with given scores, as a `prepare`."""

    def prepare(trainer):
        left = iter(scores)
        score_by(trainer, lambda: next(left))

    return prepare


EVALUATED = {"max_updates": 4, "eval_steps": 2, "eval_samples": 3, "max_new_tokens": 2}


def test_the_best_model_is_kept(model_dir, data_dir, tmp_path, capsys):
    import mlx_lm

    weights = {}

    def remember(trainer):
        def evaluate(which="test", call=trainer.evaluate):
            result = call(which)
            weights[trainer.update_step] = snapshot(trainer)
            return result

        trainer.evaluate = evaluate

    prepare = both(scripted(0.2, 0.1, 0.6, 0.6, 0.5), remember)
    settings = EVALUATED | {"save_best": True, "learning_rate": 0.01}
    run_training(model_dir, data_dir, tmp_path / "o", prepare, **settings)
    best = tmp_path / "o" / "best"
    assert json.loads((best / "evaluation.json").read_text())["update"] == 2
    model, _ = mlx_lm.load(str(best))
    name = "weights.model.norm.weight"
    kept = np.array(model.model.norm.weight.astype(mx.float32)).tobytes()
    assert kept == weights[2][name] != weights[3][name]
    assert "best      exact match 60.0% at update 2" in capsys.readouterr().out


def test_a_run_that_never_beats_its_start_has_no_best(model_dir, data_dir, tmp_path):
    prepare = scripted(0.5, 0.1, 0.5, 0.2, 0.5)
    run_training(model_dir, data_dir, tmp_path / "o", prepare, **EVALUATED, save_best=True)
    assert not (tmp_path / "o" / "best").exists()


def test_an_evaluation_without_a_value_is_beaten_by_any(model_dir, data_dir, tmp_path):
    """No reward applied to any answer: NaN, to which no number compares as greater."""
    prepare = scripted(math.nan, 0.1, 0.3, math.nan, 0.2)
    run_training(model_dir, data_dir, tmp_path / "o", prepare, **EVALUATED, save_best=True)
    best = tmp_path / "o" / "best" / "evaluation.json"
    assert json.loads(best.read_text())["em"] == 0.3


def test_early_stopping_ends_well_and_can_be_taken_back(model_dir, data_dir, tmp_path, capsys):
    settings = EVALUATED | {"max_updates": 6, "early_stopping_patience": 2}
    prepare = scripted(0.1, 0.4, 0.2, 0.4, 0.3)
    code, stopped = run_training(model_dir, data_dir, tmp_path / "o", prepare, **settings)
    assert (code, stopped.update_step) == (0, 3)
    reason = "2 evaluations without a better one than exact match 40.0% at update 1"
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"reason    early_stopping_patience: {reason}; look at {tmp_path / 'o' / 'report.html'}"
    )
    assert (tmp_path / "o" / "final").is_dir()
    settings |= {"early_stopping_patience": 0, "resume": "auto"}
    code, resumed = run_training(
        model_dir, data_dir, tmp_path / "o", scripted(*[0.0] * 5), **settings
    )
    assert (code, resumed.update_step) == (0, 6)


def test_checkpoints_within_so_many_gb(model_dir, data_dir, tmp_path):
    settings = {"max_updates": 4, "save_steps": 2, "save_total_limit": 0, "max_new_tokens": 2}
    run_training(model_dir, data_dir, tmp_path / "all", **settings)
    sizes = [
        sum(file.stat().st_size for file in folder.iterdir())
        for folder in folders.found(tmp_path / "all")
    ]
    assert len(sizes) == 4
    limit = (sizes[-1] + sizes[-2]) * 1.2 / 1e9
    run_training(model_dir, data_dir, tmp_path / "o", **settings, max_ckpt_gb=limit)
    assert [f.name for f in folders.found(tmp_path / "o")] == ["checkpoint-6", "checkpoint-8"]


def test_the_last_checkpoint_outlives_a_limit_that_is_too_small(tmp_path):
    for folder in ("checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-10"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "big").write_bytes(bytes(900))
        manifest = {"files": {"big": {}, "trainer_state.json": {}}}  # as a run leaves it
        (tmp_path / folder / "manifest.json").write_text(json.dumps(manifest).ljust(100))
    for limit, kept in (3e-6, [4, 6, 10]), (2.99e-6, [6, 10]):  # a GB is 10^9 bytes
        folders.prune(tmp_path, limit=0, max_gb=limit)
        found = folders.found(tmp_path)
        assert [f.name for f in found] == [f"checkpoint-{step}" for step in kept]
    folders.prune(tmp_path, limit=1, max_gb=1e-9)
    assert [f.name for f in folders.found(tmp_path)] == ["checkpoint-10"]


DATED = "{{ strftime_now('%Y-%m-%d %H:%M:%S.%f') }} {{ messages[-1].content }}"


def test_a_prompt_with_the_date_has_that_of_the_runs_start(data_dir, tmp_path, own_model):
    """So a run can be resumed on another day (here: a moment later); other changes are refused."""
    change_json(own_model, name="tokenizer_config.json", chat_template=DATED)
    shutil.copytree(data_dir, tmp_path / "data")
    settings = {"max_updates": 3, "save_steps": 2, "max_new_tokens": 2}
    run = partial(run_training, own_model, tmp_path / "data")
    _, straight = run(tmp_path / "o", **settings)
    _, resumed = run(tmp_path / "o", resume="checkpoint-2", **settings)
    assert resumed.args.started_on == straight.args.started_on
    assert [r["prompt_ids"] for r in resumed.train_dataset] == [
        r["prompt_ids"] for r in straight.train_dataset
    ]
    _, other = run(tmp_path / "other", **settings)
    assert other.train_dataset[0]["prompt_ids"] != straight.train_dataset[0]["prompt_ids"]
    (tmp_path / "data/train.jsonl").write_text('{"question": "New?", "answer": "1"}\n' * 24)
    with pytest.raises(UserError, match="has changed since"):
        run(tmp_path / "o", resume="checkpoint-2", **settings)


@pytest.mark.parametrize("date", [None, 3, "yesterday"])
def test_a_checkpoint_without_a_date_is_gone_on_from(model_dir, data_dir, tmp_path, date):
    """As those of older versions are; a template that tells the date would give other prompts."""
    settings = {"max_updates": 3, "save_steps": 2, "max_new_tokens": 2}
    run_training(model_dir, data_dir, tmp_path / "o", **settings)
    folder = tmp_path / "o/checkpoint-2"
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state.pop("started_on")
    changed = state | ({} if date is None else {"started_on": date})
    (folder / "trainer_state.json").write_text(json.dumps(changed))
    folders.seal(folder)
    code, _ = run_training(model_dir, data_dir, tmp_path / "o", resume="checkpoint-2", **settings)
    assert code == 0
