"""Every completion is kept, once, with what it earned and why."""

import shutil

import numpy as np
import pytest
from helpers import read_log, run_training, stop_after, stop_in_evaluation

from utils.rewards.answers import extract_xml_answer
from utils.run import completions

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
