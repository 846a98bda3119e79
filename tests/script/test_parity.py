"""Every objective that TRL has gives TRL's advantages, loss and gradient (benchmarks/parity.py)."""

import dataclasses
import json
import math

import numpy as np
import pytest

from benchmarks import parity


@pytest.fixture(scope="module")
def found():
    return parity.differences()


@pytest.mark.parametrize("name", [case.name for case in parity.CASES])
def test_same_as_trl(found, name):
    parts = found[name]
    assert parts["size"] > 1e-3, "a zero gradient would make any comparison pass"
    for part in ("advantages", "loss", "gradient"):
        assert parts[part] is None or parts[part] <= 1e-5, part
    assert parts["advantages"] is not None
    assert parts["gradient"] is not None


def test_the_fixture_holds_every_case_of_a_known_trl():
    fixture = json.loads(parity.FIXTURE.read_text())
    assert [case["name"] for case in fixture["cases"]] == [case.name for case in parity.CASES]
    assert fixture["trl"] == "1.16.0"
    given = json.loads(json.dumps(parity.inputs()).replace("NaN", "null"))
    assert fixture["inputs"] == given, "TRL read the numbers that we read"


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("dapo", {"clip_eps_high": 0.2}),
        ("gspo, wider clip", {"clip_eps_high": 0.1}),
        ("gmpo", {"clip_eps": 0.2}),
        ("cispo, cap 1.3", {"clip_eps_high": 0.4}),
        ("sapo", {"loss_type": "grpo"}),
        ("grpo, two-sided", {"delta": 0.0}),
        ("grpo, k3 in the loss", {"kl_bias_correction": True}),
        ("importance weights, sequence_mask", {"importance_mode": "sequence_truncate"}),
        ("grpo, batch advantages", {"advantage_estimator": "group_norm"}),
        ("rloo, on policy, k1 in the reward, reward clip", {"reward_clip": 0.0}),
    ],
)
def test_the_comparison_can_fail(found, monkeypatch, name, wrong):
    """The numbers leave every clip and cap: with one setting off, the same comparison fails."""
    [case] = [case for case in parity.CASES if case.name == name]
    changed = dataclasses.replace(case, ours={**case.ours, **wrong})
    monkeypatch.setattr(parity, "CASES", [changed])
    parts = parity.differences()[name]
    assert max(parts["gradient"], parts["advantages"]) > 1e-4


def test_the_table_is_that_of_today(found):
    text = parity.results.RESULTS.read_text()
    table = text.split("<!-- parity -->")[1].split("<!-- /parity -->")[0].strip().splitlines()
    names = [line.split("|")[1].strip() for line in table[2:]]
    assert names == [case.name for case in parity.CASES]
    assert all(math.isfinite(parts["gradient"]) for parts in found.values())
    assert np.isfinite([parts["size"] for parts in found.values()]).all()
