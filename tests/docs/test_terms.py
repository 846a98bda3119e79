"""docs/terms.md: its example has the numbers that it says."""

import re
import tomllib

import pytest
from conftest import ROOT
from helpers import make_trainer

PAGE = (ROOT / "docs/terms.md").read_text(encoding="utf-8")
EXAMPLE = tomllib.loads(re.search(r"```toml\n(.*?)```", PAGE, re.DOTALL)[1])
ROWS = [
    [cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if "|" in line
]
HERE = {row[0]: row[3] for row in ROWS if len(row) == 4}


@pytest.fixture
def trainer(model_dir, data_dir, tmp_path):
    def made(**settings):
        return make_trainer(model_dir, data_dir, tmp_path / "o", **EXAMPLE | settings)

    return made


def test_the_example_has_the_numbers_that_it_says(trainer):
    made, steps = trainer(), []
    while made.update_step < made.total_updates:
        before = made.step
        made.train_step(made.prompts_of_update(made.run.state.rollout))
        steps.append(made.step - before)
    prompts, group = made.rollout.completions.shape
    epoch = made.rollouts_per_epoch
    assert steps == [EXAMPLE["gradient_accumulation_steps"]] * made.total_updates
    assert HERE["group"] == f"{group} completions"
    assert HERE["batch"] == f"{prompts // steps[0]} prompts"
    assert HERE["rollout"] == f"{prompts} prompts, {made.rollout.completions.size} completions"
    assert HERE["update"] == f"{made.total_updates // made.run.state.rollout} per rollout"
    assert HERE["epoch"] == f"{epoch} rollouts, {epoch * steps[0]} steps"
    assert HERE["run"] == f"{made.update_step} updates, {made.step} steps"
    whole = f"{EXAMPLE['num_epochs']} epochs, {made.update_step} updates, {made.step} steps"
    assert whole in PAGE, "in the picture"
    assert f"1: {prompts} prompts" in PAGE
    assert f"1: {len(made.train_dataset)} prompts" in PAGE


def test_more_iterations_are_more_updates_of_the_same_steps(trainer):
    made = trainer(num_iterations=2)
    made.train_step(made.prompts_of_update(0))
    assert (made.update_step, made.step) == (2, EXAMPLE["gradient_accumulation_steps"])
    steps = made.rollouts_per_epoch * EXAMPLE["num_epochs"] * made.step
    assert f"twice: {made.total_updates} updates, and still {steps} steps" in PAGE


def test_its_settings_are_settings(grpo):
    known = grpo.MLXGRPOConfig.__dataclass_fields__
    counters = {"step", "batch_step", "update"}
    assert {*re.findall(r"`([a-z_]+)(?: = \d+)?`", PAGE)} <= {*known} | counters
