"""A run: what falls due, and that a signal is heard between two blocks of work."""

import pytest
from helpers import make_trainer

from utils.run.run import Interrupted, due


def test_an_action_falls_due_when_a_count_passes_a_multiple():
    assert [step for step in range(1, 10) if due(3, step - 1, step)] == [3, 6, 9]
    assert due(3, 2, 7), "once for several"
    assert not due(3, 3, 5)
    assert not any(due(0, step, step + 1) for step in range(9))


def test_a_signal_is_heard_between_blocks_of_work(model_dir, data_dir, tmp_path):
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o")
    trainer.run.pulse("sampling")
    trainer.run.interrupted = True
    with pytest.raises(Interrupted):
        trainer.run.pulse("sampling")
    with pytest.raises(Interrupted):
        trainer.train_step([0, 1])
    assert trainer.run.state.update_step == 0


def test_a_mark_is_where_a_run_that_stops_goes_on_from(model_dir, data_dir, tmp_path):
    """Each rollout is learnt from twice; the second update of the second rollout is stopped."""
    trainer = make_trainer(model_dir, data_dir, tmp_path / "o", num_iterations=2)
    run, apply = trainer.run, trainer.apply_gradients
    assert run.between is None
    trainer.train_step([0, 1])
    assert (run.between.update_step, run.state.update_step, run.moved) == (2, 2, False)

    def stopped(loss, grads, number):
        if number == 4:
            raise Interrupted
        return apply(loss, grads, number)

    trainer.apply_gradients = stopped
    with pytest.raises(Interrupted):
        trainer.train_step([2, 3])
    assert (run.between.update_step, run.moved) == (2, True)
    assert run.checkpoint() == tmp_path / "o" / f"checkpoint-{run.between.step}"
