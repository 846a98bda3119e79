"""Where a run is: copied, written, and read from what a checkpoint says."""

import dataclasses
import json
import random

import mlx.core as mx
import numpy as np
import pytest

from utils.run import state as states
from utils.run.state import State


def test_a_copy_stays_as_it_was():
    state = State(step=3, notes=["one"], halved={"rollout_batch_size": 4})
    before = state.copied()
    state.step, state.notes = 4, [*state.notes, "two"]
    state.halved |= {"micro_batch_tokens": 9}
    state.history.append({"em": 1.0})
    assert before == State(step=3, notes=["one"], halved={"rollout_batch_size": 4})


def test_what_a_checkpoint_says_is_taken_as_it_was_written():
    state = State(step=4, update_step=2, kl_coeff=0.5, notes=["one"], history=[{"em": 0.5}])
    state.unreported, state.random = ((2, 1), [{"loss": 1.0}]), {"mlx": [1, 2]}
    counters = json.loads(json.dumps(dataclasses.asdict(state)))
    read = State()
    read.take(counters)
    assert json.dumps(dataclasses.asdict(read)) == json.dumps(counters)
    with pytest.raises(KeyError, match="kl_coeff"):
        State().take({name: value for name, value in counters.items() if name != "kl_coeff"})
    with pytest.raises(ValueError, match="written by a newer version"):
        State().take(counters | {"format": states.FORMAT + 1})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("step", value) for value in (-1, 1.0, True, "1", None, 2**31)),
        *(("elapsed", value) for value in (-0.5, float("nan"), "1")),
        *(("notes", value) for value in ("text", [1], None)),
        *(("history", value) for value in ({}, ["text"])),
        *(("halved", value) for value in ([], 1)),
        *(("reward_moments", value) for value in ({}, 0.0)),
    ],
)
def test_what_is_not_of_its_kind_is_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name} = "):
        State().take(dataclasses.asdict(State()) | {name: value})


def test_generators_go_on_where_they_were():
    def draw():
        return random.random(), np.random.rand(), mx.random.uniform().item()

    states.seed_random_states(5)
    first = draw()
    kept = json.loads(json.dumps(states.random_states()))
    then = draw()
    states.seed_random_states(5)
    assert draw() == first
    states.restore_random_states(kept)
    assert draw() == then != first
