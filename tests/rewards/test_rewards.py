"""The reward functions of a run: what they see, and what they log for an update."""

import json

import pytest
from helpers import completion, make_trainer, read_log, run_training


def progress(completions, trainer_state, log_metric, log_extra, **kwargs):
    log_metric("told", trainer_state.global_step)
    log_metric("told", trainer_state.global_step + 1)
    log_metric("horizon", trainer_state.max_steps)
    log_extra("seen", [len(c[0]["content"]) for c in completions])
    return [float(n % 2 + trainer_state.epoch) for n in range(len(completions))]


def test_functions_see_progress_and_log(model_dir, data_dir, tmp_path, capsys):
    """TRL's trainer_state, log_metric and log_extra."""

    def prepare(trainer):
        trainer.reward_funcs = {"progress": progress}

    code, trainer = run_training(
        model_dir, data_dir, tmp_path / "o", prepare, max_updates=3, log_completions=1
    )
    assert code == 0
    records = [r for r in read_log(tmp_path / "o") if "split" not in r]
    assert [r["metric/told"] for r in records] == [0.5, 1.5, 2.5], "the mean of an update"
    assert [r["metric/horizon"] for r in records] == [3, 3, 3]
    epochs = [n / trainer.rollouts_per_epoch for n in range(3)]
    assert [r["reward/progress"] for r in records] == pytest.approx([0.5 + e for e in epochs])
    out = capsys.readouterr().out
    assert out.count("\n    seen: ") == 3


@pytest.mark.parametrize("prefix", ["", "<reasoning>\n"])
def test_prompts_as_the_model_reads_them(model_dir, data_dir, tmp_path, prefix):
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", reasoning_prefix=prefix)
    row = trainer.train_dataset[0]
    response = completion([5], text="so")
    [text] = trainer.rewards.keywords([row], [response])["prompt_texts"]
    assert text + prefix == trainer.tokenizer.decode(row["prompt_ids"])
    assert text.endswith("assistant\n")


def test_evaluation_by_a_reward_gets_the_same_keywords(model_dir, data_dir, tmp_path):
    name = "test_rewards:progress"
    settings = {"reward_funcs": [name], "eval_metric": name, "eval_samples": 4}
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", None, **settings)
    assert trainer.evaluate("test") == 0.5
    assert json.dumps(trainer.rewards.calls.logged.metrics)
