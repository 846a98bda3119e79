"""The event loop of async reward functions, in a thread: that of a notebook has one already."""

import asyncio
import os
import sys
import threading
import weakref
from concurrent.futures import Future
from contextvars import ContextVar
from typing import Any

from . import foreign

OWNER: ContextVar[str] = ContextVar("function", default="")


class Loop:
    """An event loop in a thread of its own, which no task ends that means to end the program."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.loop.set_task_factory(self.task)
        self.owners: weakref.WeakKeyDictionary[asyncio.Task, str] = weakref.WeakKeyDictionary()
        self.failed: tuple[str, BaseException] | None = None
        self.process = os.getpid()
        self.thread = threading.Thread(target=self.turn, daemon=True, name="rewards")
        self.thread.start()

    def task(self, loop: asyncio.AbstractEventLoop, work: Any, **how: Any) -> asyncio.Task:
        """A task, of the function for which it or the task that makes it was made."""
        made: asyncio.Task = asyncio.Task(work, loop=loop, **how)
        self.owners[made] = OWNER.get()
        return made

    def turn(self) -> None:
        while True:
            try:
                return self.loop.run_forever()
            except BaseException as error:  # noqa: BLE001 - of a task that perhaps nobody awaits
                foreign.end_child(self.process, error)
                self.failed = self.failed or (self.owner_of(error), error)

    def owner_of(self, error: BaseException) -> str:
        """The function whose task raised it; empty where that is not known."""
        done = [(task, name) for task, name in self.owners.items() if task.done()]
        found = (n for task, n in done if not task.cancelled() and task.exception() is error)
        return next(found, "")

    def begin(self, name: str, work: Any) -> Future:
        """Run the coroutine `work` for the function `name`."""
        token = OWNER.set(name)  # tasks and callbacks are made with the variables of who makes them
        try:
            return asyncio.run_coroutine_threadsafe(work, self.loop)
        finally:
            OWNER.reset(token)

    def blocked_by(self) -> tuple[str, str]:
        """The function whose task does not give control back, and where it stands; or nothing."""
        task = asyncio.current_task(self.loop)
        name = self.owners.get(task, "") if task else ""
        frame = sys._current_frames().get(self.thread.ident or 0)
        return name, foreign.place(frame) if name else ""
