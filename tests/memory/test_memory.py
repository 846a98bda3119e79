"""The sizes of a run: what they become when memory runs out, and what is said of it."""

from types import SimpleNamespace

import pytest
from helpers import make_trainer

from utils.base.errors import RunError
from utils.memory.memory import RolloutSize, half_of


@pytest.fixture
def trainer(model_dir, data_dir, tmp_path):
    return make_trainer(model_dir, data_dir, tmp_path / "o")


def batches(*sizes):
    """Micro-batches of so many sequences and tokens."""
    return [SimpleNamespace(count=count, tokens_read=tokens) for count, tokens in sizes]


def test_micro_batches_are_half_of_the_largest_that_did_not_fit(trainer):
    """Which may be far below what was planned."""
    memory, state = trainer.memory, trainer.run.state
    assert memory.plan.micro_batch_tokens > 131
    assert memory.halve_micro_batches(batches((4, 90), (3, 131), (1, 40))) == (
        "micro_batch_tokens = 65"
    )
    assert memory.plan.micro_batch_tokens == state.halved["micro_batch_tokens"] == 65
    assert memory.plan.halved == ("micro_batch_tokens",)
    assert state.notes == ["after update 0: out of memory, then micro_batch_tokens = 65"]
    memory.halve_micro_batches([])
    assert memory.plan.micro_batch_tokens == 32, "of what was planned, where nothing was cut yet"
    memory.halve_micro_batches(batches((2, 1)))
    assert memory.plan.micro_batch_tokens == 1, "never none"


def test_one_sequence_is_not_halved(trainer):
    with pytest.raises(RunError, match=r"out of memory with one sequence at once: set .* --resume"):
        trainer.memory.halve_micro_batches(batches((1, 90), (1, 40)))
    assert trainer.memory.plan.halved == ()


def test_an_update_that_runs_out_of_memory_is_done_in_halves(trainer):
    memory, loss_and_grad, cut = trainer.memory, trainer.loss_and_grad, []
    halve = memory.halve_micro_batches

    def halved(batches):
        cut.extend(batch.tokens_read for batch in batches)
        return halve(batches)

    def starved(batch):
        if batch.count > 4:
            raise MemoryError
        return loss_and_grad(batch)

    memory.halve_micro_batches, trainer.loss_and_grad = halved, starved
    trainer.train_step([0, 1])
    assert trainer.run.state.update_step == 1
    assert memory.plan.micro_batch_tokens == max(cut) // 2


@pytest.mark.parametrize(
    ("rows", "planned", "then"), [(8, 8, 4), (5, 8, 2), (2, 2, 1), (64, 8, 8), (9, 8, 8)]
)
def test_rows_are_halved_or_as_many_as_planned(rows, planned, then):
    """An evaluation samples more at once than a rollout."""
    assert half_of(rows, planned) == then
    size = RolloutSize(planned)
    assert size.halve_rows(rows) == f"rollout_batch_size = {then}"
    assert size.rows_at_once(1000) == then


def test_one_row_is_not_halved(trainer):
    with pytest.raises(RunError, match="one completion at once: lower max_new_tokens"):
        trainer.memory.halve_rows(1)
    trainer.memory.halve_rows(6)
    assert trainer.memory.plan.rollout_batch_size == trainer.run.state.halved["rollout_batch_size"]
    assert trainer.memory.plan.rollout_batch_size == 3
