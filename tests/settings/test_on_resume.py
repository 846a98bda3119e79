"""Which settings may change when a run goes on."""

import dataclasses

import pytest

from utils.base.errors import UserError
from utils.settings import on_resume, reading


@pytest.fixture
def recorded(grpo):
    """What a run with a seed of its own has on record."""
    return reading.recorded(grpo.MLXGRPOConfig(seed=7))


def test_what_may_change_are_settings(grpo):
    assert {field.name for field in dataclasses.fields(grpo.MLXGRPOConfig)} > on_resume.MAY_CHANGE


def test_only_what_would_alter_the_rest_of_the_run_is_refused(grpo, recorded):
    on_resume.refuse_changes(recorded, grpo.MLXGRPOConfig(seed=7, save_steps=9, max_hours=1.0))
    changed = grpo.MLXGRPOConfig(seed=8, temperature=0.5, save_steps=9)
    assert on_resume.changes(recorded, changed) == {
        "seed": (7, 8),
        "temperature": (0.7, 0.5),
        "save_steps": (recorded["save_steps"], 9),
    }
    with pytest.raises(UserError, match=r"seed \(was 7, is 8\), temperature \(was 0.7, is 0.5\);"):
        on_resume.refuse_changes(recorded, changed)


def test_a_setting_that_was_not_known_yet_had_its_default(grpo, recorded):
    del recorded["top_k"]
    on_resume.refuse_changes(recorded, grpo.MLXGRPOConfig(seed=7))
    with pytest.raises(UserError, match=r"top_k \(was 0, is 5\)"):
        on_resume.refuse_changes(recorded, grpo.MLXGRPOConfig(seed=7, top_k=5))
