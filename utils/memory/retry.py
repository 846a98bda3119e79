"""What to do when memory runs out: the same work once more in halves, then a clean stop.

Halving changes no result: a sample depends on its own key alone, and the weights of the loss are
fixed before the update is cut up. MLX raises only where the allocator is asked: Metal and CUDA do,
mostly; on a CPU, and when a Metal command buffer fails, the process dies as by `kill -9`, and a
resumed run goes on from the last checkpoint.
"""

from collections.abc import Callable
from typing import TypeVar

from ..base.errors import RunError
from ..base.say import say

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
