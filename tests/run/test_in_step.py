"""Ranks that are not the same are told."""

from unittest import mock

import mlx.core as mx
import pytest
from helpers import make_trainer

from utils.base.errors import UserError
from utils.device import ranks
from utils.run import in_step


class Two(ranks.Alone):
    """Rank 0 of two; the other says the same, but for what is `changed`."""

    size = 2

    def __init__(self, **changed):
        self.changed = changed

    def all_say(self, value, key=""):
        other = {**value, **self.changed} if isinstance(value, dict) else self.changed.get("sum")
        return [value, other or value]


@pytest.fixture
def trainer(model_dir, data_dir, tmp_path):
    return make_trainer(model_dir, data_dir, tmp_path / "run")


@pytest.mark.parametrize("name", ["training data", "learning_rate", "a model"])
def test_what_differs_is_named(trainer, name):
    message = f"rank 1 has {name} that differ from rank 0's"
    with (
        mock.patch.object(ranks, "team", [Two(**{name: "other"})]),
        pytest.raises(UserError, match=message),
    ):
        in_step.refuse_others(trainer)
    with mock.patch.object(ranks, "team", [Two()]):
        in_step.refuse_others(trainer)
    in_step.refuse_others(trainer)  # alone


def test_conversations_are_for_one_process(trainer):
    trainer.args.environment = "game.py:Game"
    in_step.refuse_others(trainer)  # alone
    with (
        mock.patch.object(ranks, "team", [Two()]),
        pytest.raises(UserError, match="environment: conversations are not dealt out"),
    ):
        in_step.refuse_others(trainer)


def test_weights_that_are_apart_are_told_once(trainer, capsys):
    with mock.patch.object(ranks, "team", [Two()]):
        in_step.compare_weights(trainer)
    assert "round otherwise" not in capsys.readouterr().out
    with mock.patch.object(ranks, "team", [Two(sum="other")]):
        in_step.compare_weights(trainer)
        in_step.compare_weights(trainer)
    assert capsys.readouterr().out.count("ranks 1 do not have rank 0's weights to the bit") == 1
    assert len(trainer.run.state.notes) == 1


def test_the_checksum_is_of_every_bit(trainer):
    before = in_step.checksum(trainer)
    assert in_step.checksum(trainer) == before
    weights = trainer.model.model.norm.weight
    trainer.model.model.norm.weight = mx.array(weights)
    assert in_step.checksum(trainer) == before
    trainer.model.model.norm.weight = weights.at[0].add(1e-7)
    assert in_step.checksum(trainer) != before


def test_weights_of_rank_0_are_taken(trainer):
    class Other(Two):
        def of_first(self, arrays):
            return {name: array + 1 for name, array in arrays.items()}

    before = mx.array(trainer.model.model.norm.weight)
    with mock.patch.object(ranks, "team", [Other()]):
        in_step.take_weights(trainer)
    assert mx.array_equal(trainer.model.model.norm.weight, before + 1)
