"""Settings by hand: a copy with changes, or an assignment, is what the constructor gives."""

import copy
import dataclasses
import pickle

import pytest
from helpers import load_script

Config = load_script().MLXGRPOConfig
LOSSES = sorted(load_script().LOSSES)
SETTINGS = [f.name for f in dataclasses.fields(Config)]


def assigned(config, **changes):
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def values(config):
    return {name: getattr(config, name) for name in SETTINGS}


@pytest.mark.parametrize("before", LOSSES)
@pytest.mark.parametrize("after", LOSSES)
def test_another_loss_brings_its_own_settings(before, after):
    made = Config(loss_type=after)
    for other in (
        dataclasses.replace(Config(loss_type=before), loss_type=after),
        assigned(Config(loss_type=before), loss_type=after),
    ):
        assert values(other) == values(made)
        assert other == made
        # A copy cannot tell a default that was given from one that was not.
        assert other.explicit == {"loss_type"} or (after == "grpo" and not other.explicit)


def test_the_clip_of_dapo_is_higher():
    assert dataclasses.replace(Config(), loss_type="dapo").clip_eps_high == 0.28
    assert assigned(Config(), loss_type="dapo").clip_eps_high == 0.28


@pytest.mark.parametrize("loss_type", ["grpo", "gspo", "gmpo"])
def test_what_was_set_stays(loss_type):
    own = {"clip_eps": 0.11, "clip_eps_high": 0.12, "advantage_eps": 1e-3}
    made = Config(loss_type=loss_type, **own)
    for other in (
        dataclasses.replace(Config(**own), loss_type=loss_type),
        dataclasses.replace(Config(loss_type=loss_type), **own),
        assigned(Config(), **own, loss_type=loss_type),
    ):
        assert values(other) == values(made)
        assert {*own} <= other.explicit <= {*own, "loss_type"}


def test_nothing_is_explicit_that_nobody_set():
    assert Config().explicit == frozenset()
    assert dataclasses.replace(Config()).explicit == frozenset()
    assert Config(seed=0).explicit == {"seed"}


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))]
)
def test_a_copy_knows_what_was_set(copied):
    config = Config(loss_type="gspo", seed=3)
    other = copied(config)
    assert values(other) == values(config)
    assert other.explicit == {"loss_type", "seed"}
    other.loss_type = "grpo"
    assert other.clip_eps == Config().clip_eps
    assert config.loss_type == "gspo"
