"""When memory runs out: what is taken for it, and the one second try."""

import pytest

from utils.base.errors import RunError
from utils.memory import retry


@pytest.mark.parametrize(
    ("error", "ran_out"),
    [
        (MemoryError(), True),
        (RuntimeError("[malloc_or_wait] Unable to allocate 8 bytes."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("Resource limit exceeded."), True),
        (RuntimeError("[matmul] Last dimension must match"), False),
        (ValueError("cannot broadcast"), False),
    ],
)
def test_what_says_that_memory_ran_out(error, ran_out):
    assert retry.ran_out(error) == ran_out


def attempts(*errors):
    """`work` that fails so, then succeeds."""
    left = list(errors)

    def work():
        if left:
            raise left.pop(0)
        return "done"

    return work


def test_work_is_done_once_more_in_halves(capsys):
    halved = []
    assert retry.retried(attempts(), halved.append, "lower it") == "done"
    assert retry.retried(attempts(MemoryError()), lambda: "size = 4", "lower it") == "done"
    assert not halved
    assert capsys.readouterr().out == "memory    ran out (MemoryError); once more with size = 4\n"


def test_twice_is_the_end():
    with pytest.raises(RunError, match=r"out of memory, also with size = 4: lower it \(no room"):
        retry.retried(
            attempts(MemoryError(), MemoryError("no room")), lambda: "size = 4", "lower it"
        )


@pytest.mark.parametrize("before", [[], [MemoryError()]])
def test_another_error_is_no_reason_to_try_again(before):
    with pytest.raises(RuntimeError, match="a bug"):
        retry.retried(attempts(*before, RuntimeError("a bug")), lambda: "size = 4", "lower it")
