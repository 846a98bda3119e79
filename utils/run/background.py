"""A piece of work beside the training thread: one at a time, so that at most one waits in memory.

Packing and writing release Python's lock, and while the device computes the training thread waits
without it: what is done here costs a run next to nothing.
"""

import threading
from collections.abc import Callable


class Background:
    """Does one piece of work at a time, in a thread that ends with it.

    What a piece raises is raised once: where the next one begins, by `check` or by `settle`. A
    program ends only after its last piece, unless it is killed.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def begin(self, work: Callable[[], None]) -> None:
        """Start it once the piece before it is done. Raises what that one raised."""
        self.settle()
        thread = threading.Thread(target=self.do, args=[work], name=self.name)
        thread.start()
        self.thread = thread

    def do(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - the training thread raises it
            self.error = error

    def check(self) -> None:
        """Raise what the piece raised, if it has by now."""
        if self.error is not None:
            self.settle()

    def wait(self) -> None:
        """Until nothing is at work; raises nothing."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def settle(self) -> None:
        """Wait, and raise what the piece raised."""
        self.wait()
        error, self.error = self.error, None
        if error is not None:
            raise error
