"""Figures that may be absent: rewards that do not apply, evaluations without a value."""

import json
import math
import warnings

import numpy as np
import pytest
from helpers import make_trainer, run_training

from utils.base.errors import RunError
from utils.run import log, warnings_of_learning

ESTIMATORS = ("group_norm", "dr_grpo", "batch", "rloo", "reinforce", "reinforce_baseline", "gdpo")
SMALL = {"max_new_tokens": 2, "batch_size": 2, "gradient_accumulation_steps": 1}


def nothing(completions, **_):
    return [None] * len(completions)


def nowhere(completions, **_):
    return nothing(completions)


def sometimes(completions, completion_ids, prompts, trainer_state, **_):
    """No value in the first update; then none for the first completion of each group."""
    if trainer_state.global_step == 0:
        return [None] * len(completions)
    return [None if i % 4 == 0 else float(len(ids) + i) for i, ids in enumerate(completion_ids)]


def records(folder):
    lines = (folder / "training_log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "split" not in record]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_reward_that_never_applies(estimator, model_dir, data_dir, tmp_path, capsys):
    """The run says so at once, goes on, is watched, ends well, and can be resumed in the middle."""
    settings = SMALL | {
        **{"reward_funcs": [f"test_absent_figures:{name}" for name in ("nothing", "nowhere")]},
        "advantage_estimator": estimator,
        **{"max_updates": 6, "watchdog_window": 3, "save_steps": 4, "overwrite": True},
        **{"eval_samples": 2, "eval_steps": 2},
        **{"eval_metric": "test_absent_figures:nothing", "eval_every_updates": 2},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        code, _ = run_training(model_dir, data_dir, tmp_path / "o", **settings)
        assert code == 0
        out = capsys.readouterr().out
        name = "test_absent_figures:nothing"
        first = f"warning   reward {name} gave no completion of the first update a value"
        assert f"{first}; the first expected answer is " in out
        assert f"{name} gave no value" in out
        for record in records(tmp_path / "o"):
            assert record["reward_mean"] is None
            assert record["loss"] == 0
        weights = (tmp_path / "o/final/model.safetensors").read_bytes()
        settings |= {"resume": "checkpoint-4", "overwrite": False}
        code, _ = run_training(model_dir, data_dir, tmp_path / "o", **settings)
    assert code == 0
    assert (tmp_path / "o/final/model.safetensors").read_bytes() == weights


def test_the_watchdog_knows_rewards_that_are_absent():
    figures = {"groups_without_signal": 1.0, "truncation_rate": 0.0}
    for reward in (None, math.nan):
        state = warnings_of_learning.watched({}, [{**figures, "reward_mean": reward}] * 4, 4)
        assert state["warning"].startswith("no reward function gave any completion a value")
    state = warnings_of_learning.watched({}, [{**figures, "reward_mean": 0.0}] * 4, 4)
    assert "mean reward 0)" in state["warning"]


def test_means_are_over_what_applies(model_dir, data_dir, tmp_path):
    settings = SMALL | {"reward_funcs": ["test_absent_figures:sometimes"], "max_updates": 2}
    run_training(model_dir, data_dir, tmp_path / "one", logging_steps=1, **settings)
    run_training(model_dir, data_dir, tmp_path / "two", logging_steps=4, **settings)
    apart, together = records(tmp_path / "one"), records(tmp_path / "two")
    assert apart[0]["reward_mean"] is None
    for name in ("reward_mean", "reward_std", "reward/test_absent_figures:sometimes"):
        assert apart[1][name] > 0
        assert together[0][name] == apart[1][name]


def test_the_spread_of_a_group_is_that_of_its_values():
    nan = math.nan
    rewards = np.array([[1.0, 3.0, nan], [nan, nan, 5.0], [nan, nan, nan], [2.0, 2.0, 2.0]])
    spread = log.group_deviations(rewards)
    assert spread[0] == pytest.approx(2**0.5)
    assert np.isnan(spread[1:3]).all()
    assert spread[3] == 0


def test_patience_ends_where_no_evaluation_has_a_value(model_dir, data_dir, tmp_path, capsys):
    settings = SMALL | {
        **{"reward_funcs": ["test_absent_figures:nothing"]},
        **{"max_updates": 9, "eval_samples": 2, "eval_steps": 1, "early_stopping_patience": 3},
        **{"eval_metric": "test_absent_figures:nothing", "eval_every_updates": 0},
    }
    code, trainer = run_training(model_dir, data_dir, tmp_path / "o", **settings)
    assert (code, trainer.update_step) == (0, 3)
    assert capsys.readouterr().out.splitlines()[-1] == (
        "reason    early_stopping_patience: 3 evaluations without a value "
        f"(test_absent_figures:nothing gave none); look at {tmp_path / 'o' / 'report.html'}"
    )


def test_patience_counts_evaluations_without_a_value(model_dir, data_dir, tmp_path):
    from test_resume import scripted

    settings = SMALL | {"max_updates": 9, "eval_samples": 3, "eval_steps": 1}
    prepare = scripted(0.1, 0.4, math.nan, math.nan, 0.9)
    code, trainer = run_training(
        model_dir, data_dir, tmp_path / "o", prepare, early_stopping_patience=2, **settings
    )
    assert (code, trainer.update_step) == (0, 3)


def test_a_step_after_the_last_is_refused(model_dir, data_dir, tmp_path):
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", max_updates=1)
    trainer.train_step([0, 1])
    sampled = trainer.sampler
    trainer.sampler = None  # no rollout is wasted
    with pytest.raises(RunError, match=r"all 1 updates are done: set max_updates or num_epochs"):
        trainer.train_step([0, 1])
    assert sampled


def test_a_run_without_rewards_stops_as_set(model_dir, data_dir, tmp_path, capsys):
    settings = SMALL | {"reward_funcs": ["test_absent_figures:nothing"], "max_updates": 9}
    with pytest.raises(RunError, match="no reward function gave any completion of the last five"):
        run_training(model_dir, data_dir, tmp_path / "o", stop_without_reward=True, **settings)
    assert len(records(tmp_path / "o")) == 5
