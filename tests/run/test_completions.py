"""Every completion is kept, once, with what it earned and why."""

import gzip
import json
import os
import resource
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import completion, read_log, run_training, stop_after, stop_in_evaluation

from utils.rewards.answers import extract_xml_answer
from utils.run import background, completions
from utils.run.state import State
from utils.run.token_lines import trained_logprobs

RUN = {
    **{"max_updates": 3, "max_new_tokens": 8, "eval_samples": 3, "eval_steps": 4},
    **{"eval_every_updates": 2, "eval_subset_size": 2, "learning_rate": 0.01},
    "log_completions": 0,
}


def groups(folder, **how):
    return [*completions.read(folder, **how)]


def heads(folder):
    return [(g["kind"], g["split"], g["update"], g["prompt_index"]) for g in groups(folder)]


@pytest.fixture(scope="module")
def kept(model_dir, data_dir, tmp_path_factory):
    """(folder, trainer, what was sampled and learnt in each update) of a run."""
    folder, seen = tmp_path_factory.mktemp("kept") / "o", []

    def watch(trainer):
        def learn(rollout, advantages, call=trainer.learn):
            seen.append((rollout, advantages))
            return call(rollout, advantages)

        trainer.learn = learn

    _, trainer = run_training(model_dir, data_dir, folder, watch, **RUN)
    return folder, trainer, seen


def test_every_completion_of_every_update_is_there(kept):
    folder, trainer, seen = kept
    found = [group for group in groups(folder) if group["kind"] == "train"]
    assert [g["update"] for g in found] == [1, 1, 2, 2, 3, 3]
    for group, (p, (rollout, advantages)) in zip(
        found, [(p, pair) for pair in seen for p in (0, 1)], strict=True
    ):
        row = trainer.train_dataset[rollout.prompts[p]]
        assert group["prompt_index"] == rollout.prompts[p]
        assert (group["question"], group["answer"]) == (row["question"], row["answer"])
        assert row["question"] in group["prompt"]
        assert len(group["completions"]) == trainer.args.num_generations
        for i, one in enumerate(group["completions"]):
            sampled = rollout.completions[p, i]
            assert (one["text"], one["ids"], one["mask"]) == (
                sampled.text,
                sampled.ids,
                sampled.mask,
            )
            assert one["sampled_logprobs"] == pytest.approx(sampled.logprobs, abs=6e-4)
            assert (one["finish_reason"], one["length"]) == (sampled.finish_reason, sampled.sampled)
            assert one["rewards"] == {"helpers:digest": rollout.values[p, i, 0]}
            assert (one["reward"], one["advantage"]) == (rollout.rewards[p, i], advantages[p, i])
            assert one["parsed"] == (extract_xml_answer(sampled.text) or None)
            assert one["correct"] is False
            prefix = trainer.args.reasoning_prefix
            end = trainer.tokenizer.decode([*trainer.tokenizer.eos_token_ids][:1])
            whole = prefix + "".join(one["pieces"])
            assert whole.removesuffix(end) == one["text"] or whole.startswith(one["text"])


def test_evaluations_are_there_with_their_scores(kept):
    folder, trainer, _ = kept
    found = [group for group in groups(folder) if group["kind"] == "eval"]
    visits = [("test", 0), ("train", 2), ("test", 2), ("test", 3)]
    assert sorted({(g["split"], g["update"]) for g in found}) == sorted(visits)
    for split, update in visits:
        own = [g for g in found if (g["split"], g["update"]) == (split, update)]
        rows = trainer.train_dataset if split == "train" else trainer.eval_dataset
        assert [g["question"] for g in own] == [rows[g["prompt_index"]]["question"] for g in own]
        scores = [one["rewards"]["em"] for g in own for one in g["completions"]]
        logged = [r for r in read_log(folder) if r.get("split") == split and r["update"] == update]
        assert np.mean(scores) == logged[0]["em"]
        assert all(one["advantage"] is None for g in own for one in g["completions"])


def test_without_tokens_it_is_the_same_without_tokens(kept):
    folder, *_ = kept
    for whole, part in zip(groups(folder), groups(folder, tokens=False), strict=True):
        for one in whole["completions"]:
            one |= {"ids": [], "pieces": [], "sampled_logprobs": [], "mask": []}
            one["trained_logprobs"] = None
        assert whole == part


def test_a_stop_and_a_resume_lose_and_double_nothing(kept, model_dir, data_dir, tmp_path):
    for prepare in (stop_after(2), stop_in_evaluation(2), stop_in_evaluation(2, "test")):
        out = tmp_path / "o"
        shutil.rmtree(out, ignore_errors=True)
        assert run_training(model_dir, data_dir, out, prepare, **RUN)[0] == 130
        assert run_training(model_dir, data_dir, out, resume="auto", **RUN)[0] == 0
        assert groups(out) == groups(kept[0])


def test_what_came_after_the_checkpoint_is_cut(kept, model_dir, data_dir, tmp_path):
    run, out = RUN | {"save_steps": 2, "save_total_limit": 0}, tmp_path / "o"
    run_training(model_dir, data_dir, out, **run)
    for back in ("checkpoint-2", "checkpoint-4"):
        shutil.rmtree(out / "final")
        assert run_training(model_dir, data_dir, out, resume=str(out / back), **run)[0] == 0
        assert groups(out) == groups(kept[0])
    # from a checkpoint of a run in another folder, which stays as it is
    before = groups(out)
    other = tmp_path / "other"
    checkpoint = str(out / "checkpoint-2")
    assert run_training(model_dir, data_dir, other, resume=checkpoint, **run)[0] == 0
    assert groups(other) == groups(kept[0])
    assert groups(out) == before


# What may go wrong, and what is left out on purpose.


class Words:
    """A tokenizer of numbered words."""

    def decode(self, ids):
        return "".join(f" w{i}" for i in ids)


def store(folder, rows=4, **settings):
    args = {"keep_completions": "all", "max_completions_gb": 0.0, "seed": 0, "eval_metric": "em"}
    args |= settings
    questions = [{"question": f"Question {n}?", "answer": str(n)} for n in range(rows)]
    return completions.Completions(
        SimpleNamespace(**args),
        State(),
        folder,
        Words(),
        lambda asked: [f"<user>{row['question']}" for row in asked],
        {"train": questions, "test": questions},
        lambda: ["first", "second"],
    )


def update(kept, number, texts=None, prompts=(0, 1), group=2, **given):
    """Give the store an update of prompts with a group of completions each."""
    count = len(prompts) * group
    texts = texts or [f"<answer>{n}</answer> of update {number}" for n in range(count)]
    cells = np.empty(count, object)
    cells[:] = [completion([n, n + 1], [-0.5, -1.5], text=text) for n, text in enumerate(texts)]
    rewards = np.arange(count, dtype=float).reshape(-1, group)
    values = np.stack([rewards, np.full_like(rewards, np.nan)], -1)
    rollout = SimpleNamespace(
        prompts=np.array(prompts),
        completions=cells.reshape(-1, group),
        rewards=rewards,
        values=values,
    )
    made = {"rollouts": [rollout], "advantages": rewards - 1, "batches": [], **given}
    kept.training(made["rollouts"], made["advantages"], made["batches"], number)
    kept.settle()
    return rollout


def test_rewards_without_a_value_and_wrong_and_right_answers(tmp_path):
    update(store(tmp_path), 1, ["<answer>0.0</answer>", "none", "<answer>7</answer>", "1"])
    found = [one for group in groups(tmp_path) for one in group["completions"]]
    assert [one["rewards"] for one in found] == [{"first": n, "second": None} for n in range(4)]
    assert [one["parsed"] for one in found] == ["0.0", None, "7", None]
    assert [one["correct"] for one in found] == [True, False, False, False]
    assert [one["pieces"] for one in found][:2] == [[" w0", " w1"], [" w1", " w2"]]


def test_right_is_what_the_evaluations_count(tmp_path):
    """A reward above 0, where that is their metric; nobody knows where no reward has its name."""
    texts = ["so it is 0.", "none", "it is 7", "<answer>1</answer>"]
    for metric, right in ("first", [False, True, True, True]), ("last_number", [None] * 4):
        folder = tmp_path / metric
        folder.mkdir()
        update(store(folder, eval_metric=metric), 1, texts)
        found = [one for group in groups(folder) for one in group["completions"]]
        assert [one["correct"] for one in found] == right
    assert [one["parsed"] for one in found] == ["0", None, "7", "1"]


def test_groups_that_dynamic_sampling_replaced_are_kept_as_not_trained(
    model_dir, data_dir, tmp_path
):
    seen = []

    def equal(completions, **_):  # the first groups of each update have no variance
        seen.append(len(completions))
        return [1.0 if len(seen) % 2 else float(n) for n in range(len(completions))]

    def prepare(trainer):
        trainer.reward_funcs = {"equal": equal}

    run = RUN | {"dynamic_sampling": 2, "max_updates": 2, "eval_samples": 0, "eval_subset_size": 0}
    run_training(model_dir, data_dir, tmp_path / "o", prepare, **run)
    found = groups(tmp_path / "o")
    assert [g["update"] for g in found] == [1] * 4 + [2] * 4
    trained = [[one["advantage"] is not None for one in g["completions"]] for g in found]
    assert trained == ([[False] * 4] * 2 + [[True] * 4] * 2) * 2
    assert len({g["prompt_index"] for g in found}) == 8
    assert {one["reward"] for g in found[:2] for one in g["completions"]} == {1.0}


def test_trained_log_probs_are_kept_where_the_sampler_differs(model_dir, data_dir, tmp_path):
    """From a copy in 4 bits, over several updates of a rollout: those before the first."""
    run = RUN | {"quantize_for_rollouts": True, "num_iterations": 2, "max_updates": 2}
    run |= {"learning_rate": 1e-9}
    _, trainer = run_training(model_dir, data_dir, tmp_path / "o", **run)
    found = [g for g in groups(tmp_path / "o") if g["kind"] == "train"]
    assert [g["update"] for g in found] == [1, 1], "one rollout"
    kept = [one for g in found for one in g["completions"] if one["trained_logprobs"]]
    assert kept
    batches = trainer.micro_batches(trainer.rollout, np.ones((2, 4)))
    expected = {}
    for batch in batches:
        batch.old_logprobs = trainer.rescored(trainer.model, batch)[0]
    expected = trained_logprobs(batches)
    every = [one for g in found for one in g["completions"]]
    for n, one in enumerate(every):
        if one["trained_logprobs"]:
            assert one["trained_logprobs"] == pytest.approx(expected[n], abs=2e-3)
            difference = np.abs(np.subtract(one["trained_logprobs"], one["sampled_logprobs"]))
            assert difference.max() > 1e-3


def test_secrets_are_hidden_in_every_text_and_not_told_by_ids(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "correct-horse-battery")
    texts = ["my key is correct-horse-battery", "hf_abcdefghijklmnopqrstuvwx", "<answer>1</answer>"]
    kept = store(tmp_path)
    kept.rows["train"][1]["question"] = "What is correct-horse-battery?"
    update(kept, 1, [*texts, "<answer>correct-horse-battery</answer>"])
    found = groups(tmp_path)
    written = json.dumps(found) + "".join(
        gzip.decompress(path.read_bytes()).decode() for path in (tmp_path / "completions").iterdir()
    )
    assert "horse" not in written
    assert "hf_abc" not in written
    every = [one for group in found for one in group["completions"]]
    assert [len(one["ids"]) for one in every] == [0, 0, 2, 0]
    assert [one["length"] for one in every] == [2, 2, 2, 2]
    assert every[3]["parsed"] == "***"


def test_hostile_texts_come_back_as_they_were(tmp_path):
    texts = ["\x1b[2J\0\u202e</script>", "a\n\0\nb", "\u2028\r\n", "[" * 5000]
    update(store(tmp_path), 1, texts)
    found = [one["text"] for group in groups(tmp_path) for one in group["completions"]]
    assert found == texts
    for path in (tmp_path / "completions").iterdir():
        assert "\x1b" not in gzip.decompress(path.read_bytes()).decode()


@pytest.mark.parametrize("most", [3000, 20_000])
def test_a_full_store_drops_the_oldest_tokens_first_and_says_so_once(tmp_path, capsys, most):
    kept = store(tmp_path, max_completions_gb=most / 1e9)
    for number in range(1, 60):
        update(kept, number, [f"{number} {os.urandom(60).hex()}" for _ in range(4)])
    size = sum(path.stat().st_size for path in (tmp_path / "completions").iterdir())
    assert size <= most
    found = groups(tmp_path)
    with_tokens = [bool(one["ids"]) for group in found for one in group["completions"]]
    assert with_tokens == sorted(with_tokens), "the newest have theirs"
    assert found[-1]["update"] == 59
    assert [g["update"] for g in found] == sorted(g["update"] for g in found)
    out = capsys.readouterr().out
    assert out.count("token ids and log-probs of the oldest updates are dropped") == 1
    assert out.count("the completions of the oldest updates are dropped") == 1
    assert len(kept.state.notes) == 2, "for the log"


def test_a_sample_is_of_whole_groups_and_the_same_in_every_process(tmp_path):
    for name in ("one", "two"):
        kept = store(tmp_path / name, keep_completions="sample:2")
        (tmp_path / name).mkdir()
        for number in range(1, 9):
            update(kept, number, prompts=(0, 1, 2, 3))
    assert groups(tmp_path / "one") == groups(tmp_path / "two")
    found = heads(tmp_path / "one")
    assert [head[2] for head in found] == sorted([*range(1, 9)] * 2)
    assert {head[3] for head in found} == {0, 1, 2, 3}, "not always the first"
    assert all(len(group["completions"]) == 2 for group in groups(tmp_path / "one"))


def test_none_keeps_nothing(model_dir, data_dir, tmp_path, capsys):
    run = RUN | {"keep_completions": "none", "max_updates": 1}
    assert run_training(model_dir, data_dir, tmp_path / "o", **run)[0] == 0
    assert not (tmp_path / "o" / "completions").exists()
    assert groups(tmp_path / "o") == []
    assert "kept  " not in capsys.readouterr().out


def test_the_end_says_how_much_was_kept(kept, capsys):
    folder, trainer, _ = kept
    size = sum(path.stat().st_size for path in (folder / "completions").iterdir())
    said = trainer.run.completions.size()
    assert said.startswith("35 completions (")
    assert f"{size / 35 * 1000 / 1e6:.2f} MB" in said


def test_a_running_run_can_be_read(tmp_path):
    kept = store(tmp_path)
    for number in range(1, 4):
        update(kept, number)
        assert [g["update"] for g in groups(tmp_path)][-1] == number
    newest = sorted((tmp_path / "completions").glob("*.gz"))
    for path in newest:  # as a writer at work leaves them
        path.write_bytes(path.read_bytes()[:-5])
    assert [g["update"] for g in groups(tmp_path)] == [1, 1, 2, 2]


def failing(monkeypatch, update):
    """The lines of an update can't be made."""
    lines = completions.Completions.lines

    def fails(store, first, number, *rest):
        if number == update:
            raise ZeroDivisionError("of the store")
        return lines(store, first, number, *rest)

    def begin_and_wait(beside, work, begin=background.Background.begin):
        begin(beside, work)
        beside.wait()

    monkeypatch.setattr(completions.Completions, "lines", fails)
    monkeypatch.setattr(background.Background, "begin", begin_and_wait)


def test_an_error_of_the_writer_ends_the_run_at_the_next_update(typed, monkeypatch):
    failing(monkeypatch, update=1)
    few = {"eval_samples": 0, "eval_subset_size": 0}
    code, out, err, changed = typed(**RUN | few)
    assert code == 1
    assert "unexpected ZeroDivisionError: of the store" in err
    assert "stopped   after update 1, saved in" in out
    assert "out/traceback.txt" in {str(name) for name in changed}


def test_an_error_of_the_writer_is_told_where_there_is_no_next_update(typed, monkeypatch):
    failing(monkeypatch, update=2)
    few = {"eval_samples": 0, "eval_subset_size": 0, "max_updates": 2}
    code, _, err, changed = typed(**RUN | few)
    assert code == 1
    assert "unexpected ZeroDivisionError: of the store" in err
    assert "out/final/model.safetensors" in {str(name) for name in changed}, "what was learnt"


def test_ctrl_c_and_checkpoints_wait_for_what_is_being_written(
    model_dir, data_dir, tmp_path, monkeypatch
):
    add = completions.Completions.add

    def slow(store, *rest):
        time.sleep(0.3)
        add(store, *rest)

    monkeypatch.setattr(completions.Completions, "add", slow)
    few = RUN | {"eval_samples": 0, "eval_subset_size": 0, "save_steps": 1}
    code, trainer = run_training(model_dir, data_dir, tmp_path / "o", stop_after(2), **few)
    assert code == 130
    assert max(group["update"] for group in groups(tmp_path / "o")) == 2
    assert trainer.run.between.groups_kept == len(groups(tmp_path / "o"))


def test_a_disk_that_fills_up_ends_no_run_and_spoils_nothing(tmp_path, capsys):
    kept = store(tmp_path)
    update(kept, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        update(kept, 2)
        update(kept, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    update(kept, 4)
    found = groups(tmp_path)
    assert [g["update"] for g in found] == [1, 1, 4, 4]
    assert all(one["ids"] for group in found for one in group["completions"])
    out, err = capsys.readouterr()
    assert out.count("completions from update 2 on cannot be kept in") == 1
    assert "File too large" in out
    assert err == ""


def test_a_store_that_is_deleted_meanwhile_is_begun_again(tmp_path, capsys):
    kept = store(tmp_path)
    update(kept, 1)
    shutil.rmtree(tmp_path / "completions")
    update(kept, 2)
    update(kept, 3)
    assert {g["update"] for g in groups(tmp_path)} <= {2, 3}
    assert groups(tmp_path)[-1]["update"] == 3
    assert all(one["ids"] for group in groups(tmp_path) for one in group["completions"])


HARM = {
    "zeros": lambda path: path.write_bytes(bytes(5000)),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "text": lambda path: path.write_text("mine\n"),
    "no json": lambda path: path.write_bytes(gzip.compress(b"mine\n", mtime=0)),
    "other json": lambda path: path.write_bytes(gzip.compress(b"[1]\n{}\n", mtime=0)),
    "missing": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("kind", ["groups-", "tokens-"])
@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_store_never_stops_a_resume(model_dir, data_dir, tmp_path, capsys, harm, kind):
    out, run = tmp_path / "o", RUN | {"eval_samples": 0, "eval_subset_size": 0}
    assert run_training(model_dir, data_dir, out, stop_after(2), **run)[0] == 130
    (path,) = (out / "completions").glob(f"{kind}*")
    HARM[harm](path)
    capsys.readouterr()
    assert run_training(model_dir, data_dir, out, resume="auto", **run)[0] == 0
    said = capsys.readouterr().out
    quiet = ("cut", "missing", "no json", "other json")  # whole pieces are not looked into
    assert (f"warning   {path} is damaged: " in said) == (harm not in quiet)
    found = groups(out)
    assert [g["update"] for g in found][-2:] == [3, 3], "the run goes on beside it"
    assert all(one["ids"] for one in found[-1]["completions"])
    if harm not in ("cut", "missing"):
        assert f"{path} is damaged" in capsys.readouterr().err, "readers are told too"


def test_an_unwritable_store_is_found_out_before_the_run(typed, tmp_path):
    for make in (Path.touch, os.mkfifo, lambda path: (path.mkdir(), (path / "mine").touch())):
        path = tmp_path / "out" / "completions"
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        path.parent.mkdir()
        make(path)
        code, _, err, _ = typed(**RUN)
        assert code == 2
        assert "out holds completions, which is" in err
        assert "choose another output_dir" in err
        assert typed(**RUN, keep_completions="none")[0] == 0, "it is not needed then"


def test_what_was_added_to_the_store_is_not_overwritten(typed, tmp_path):
    assert typed(**RUN)[0] == 0
    mine = tmp_path / "out" / "completions" / "notes.txt"
    mine.write_text("mine")
    code, _, err, _ = typed("--set", "overwrite=true", **RUN)
    assert code == 2
    assert "would delete out/completions/notes.txt, which was added to the run" in err
    mine.unlink()
    assert typed("--set", "overwrite=true", **RUN)[0] == 0
    assert next(g["update"] for g in groups(tmp_path / "out") if g["kind"] == "train") == 1
