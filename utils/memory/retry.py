"""What to do when memory runs out: the same work once more in halves, then a clean stop.

Halving changes no result: a sample depends on its own key alone, and the weights of the loss are
fixed before the update is cut up. MLX raises only where the allocator is asked: Metal and CUDA do,
mostly; on a CPU, and when a Metal command buffer fails, the process dies as by `kill -9`, and a
resumed run goes on from the last checkpoint.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from ..base.errors import RunError
from ..base.say import say
from . import this_machine
from .meter import tokens_read

T = TypeVar("T")
MARKS = (
    *("out of memory", "outofmemory", "insufficient memory", "unable to allocate", "bad_alloc"),
    *("[metal::malloc]", "[malloc", "resource limit"),
)


def ran_out(error: Exception) -> bool:
    """Whether this is how MLX (Metal, CUDA, CPU) or Python says that there is no memory left."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(mark in text for mark in MARKS)


def retried(work: Callable[[], T], halve: Callable[[], str], advice: str) -> T:
    """`work()`, and once more after `halve()`, which says what it did.

    Raises:
        RunError: out of memory again; `advice` is what to set.
    """
    import mlx.core as mx

    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        reason = str(error) or type(error).__name__
    # Outside of `except`: the traceback kept what the failed attempt had computed.
    mx.clear_cache()
    done = halve()
    say(f"memory    ran out ({reason}); once more with {done}")
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        raise RunError(f"out of memory, also with {done}: {advice} ({error})") from error


def resized(plan: Any, **sizes: int) -> Any:
    """The plan with sizes that stay so, also in a run that goes on from a checkpoint."""
    halved = tuple(sorted({*plan.halved, *sizes}))
    return type(plan)(**vars(plan) | sizes | {"halved": halved})


def record(trainer: Any, text: str) -> str:
    """For the log, and for the checkpoint of a run that stops here, even if there is one."""
    trainer.saved_at = -1
    trainer.log.notes.append(f"after update {trainer.update_step}: out of memory, then {text}")
    return text


def sampled(trainer: Any, work: Callable[[], T], most: Callable[[], int]) -> T:
    """Run `work`, which samples at most `most()` completions at once."""

    def halve() -> str:
        planned, rows = trainer.plan.rollout_batch_size, most()
        size = planned if rows > planned else rows // 2
        if not size:
            raise RunError("out of memory with one completion at once: lower max_new_tokens")
        trainer.plan = resized(trainer.plan, rollout_batch_size=size)
        return record(trainer, f"rollout_batch_size = {size}")

    advice = "set rollout_batch_size lower still, or lower max_new_tokens, and go on with --resume"
    return retried(work, halve, advice)


GRADIENT_ADVICE = (
    "set micro_batch_tokens lower still, or gradient_checkpointing = true, and go on with --resume"
)


def scored(
    trainer: Any,
    cut_up: Callable[[], list[dict[str, Any]]],
    score: Callable[[list[dict[str, Any]]], T],
) -> T:
    """`score` the micro-batches of `cut_up`; they are cut up smaller if need be."""
    micro_batches: list[dict[str, Any]] = []

    def work() -> T:
        micro_batches[:] = cut_up()
        return score(micro_batches)

    return retried(work, partial(halve_micro_batches, trainer, micro_batches), GRADIENT_ADVICE)


def updated(
    trainer: Any,
    work: Callable[[], T],
    micro_batches: list[dict[str, Any]],
    cut_up: Callable[[], list[dict[str, Any]]],
) -> T:
    """Run `work`, which takes the gradient of `micro_batches`; they are cut up smaller if need be.

    Only before the first step on a rollout: later ones have anchors that belong to the cut.
    """
    begun = trainer.update_step

    def halve() -> str:
        if trainer.update_step != begun or any("old_logprobs" in b for b in micro_batches[-1:]):
            raise RunError(f"out of memory after the first step of a rollout: {GRADIENT_ADVICE}")
        done = halve_micro_batches(trainer, micro_batches)
        trainer.model.eval()  # it was left with its dropout on, and `cut_up` may score
        micro_batches[:] = cut_up()
        return done

    return retried(work, halve, GRADIENT_ADVICE)


def halve_micro_batches(trainer: Any, micro_batches: list[dict[str, Any]]) -> str:
    if micro_batches and all(len(batch["mask"]) < 2 for batch in micro_batches):
        ways = this_machine.memory_advice(trainer) or "lower max_new_tokens"
        raise RunError(
            f"out of memory with one sequence at once: set {ways}, and go on with --resume"
        )
    largest = max(map(tokens_read, micro_batches), default=trainer.plan.micro_batch_tokens)
    tokens = max(1, largest // 2)
    trainer.plan = resized(trainer.plan, micro_batch_tokens=tokens)
    return record(trainer, f"micro_batch_tokens = {tokens}")
