"""Run other people's code in this process, and come back from it with the process as it was.

A reward function may end the program, raise what Ctrl-C raises, block for ever, fork, close the
standard output or set signal handlers, most often without meaning to. `called` turns all of that
into an ordinary error, and puts back what a run relies on.
"""

import contextlib
import gc
import importlib
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn, TextIO, TypeVar

import numpy as np

from ..base.errors import Signalled
from ..base.say import complain
from ..base.text import shown

T = TypeVar("T")
Handler = Callable[[int, FrameType | None], object] | int | None

# Ignored where nobody handles it, and hardly used: one that comes late does no harm.
ALARM = getattr(signal, "SIGURG", None)
PATIENCE = 1.0  # seconds in which code that is over its time may end in its own way
STUBBORN = 10  # seconds after which it is said that it can't be ended
# The first three end a run; without the others it ends at `| head`, or loses its children's codes.
HANDLED = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE, signal.SIGCHLD]

leave_process = os._exit
"""The real one: see `no_way_out`."""


class TooLong(BaseException):
    """The time is over. No Exception, which code that tries again would catch."""


class Left(BaseException):
    """Code called os._exit, os.abort or os.exec..., with these words."""


class Misbehaved(Exception):
    """What code did to the process, in words, for all that is no Exception."""


def called(work: Callable[[], T], seconds: float | None = None, importing: bool = False) -> T:
    """What `work` returns, in at most so many seconds.

    Python code, sleep, waiting for a socket, a lock or another process are interrupted, in a
    program's main thread (nowhere else are there signals). C code that does not return is not.

    Raises:
        TooLong: it took longer, even if it caught that and went on.
        Misbehaved: it, or a thread that it waited for, ended the program or raised something else
            that is no Exception.
        Signalled: a signal came meanwhile.
        Exception: that it raised.
    """
    with no_way_out(), kept(importing), threads_watched() as ended:
        try:
            result = Limit(seconds).spent_on(work)
        except BaseException as error:
            refuse(error)
            raise
        if ended:
            raise Misbehaved(f"had a thread that {did(ended[0])}") from ended[0]
    return result


def refuse(error: BaseException) -> None:
    """Raise what an error means, unless it is an Exception that means nothing else."""
    for cause in chain(error):  # code may turn either into something of its own
        if isinstance(cause, TooLong | Signalled):
            raise cause
    if not isinstance(error, Exception):
        raise Misbehaved(did(error)) from error


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those it came from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def did(error: BaseException) -> str:
    """What code did that raised this."""
    if isinstance(error, SystemExit):
        code = "" if error.code is None else shown(error.code)
        return f"tried to end the program with sys.exit({code})"
    if isinstance(error, Left):
        return f"tried to end the program with {error}"
    if isinstance(error, KeyboardInterrupt):
        return "raised KeyboardInterrupt, as Ctrl-C does"
    return f"raised {type(error).__name__}: {error}"


# Processes.


def in_this_process(work: Callable[[], T]) -> T:
    """What `work` returns; a child that it forked ends here, whichever way it comes out.

    The child has a copy of the run: it would train on, delete the run's lock and write its log.
    """
    parent = os.getpid()
    try:
        result = work()
    except BaseException as error:
        end_child(parent, error)
        raise
    end_child(parent)
    return result


def end_child(parent: int, error: BaseException | None = None) -> None:
    """In another process than that one: end it, without a word or deed of the run's."""
    if os.getpid() == parent:
        return
    status: object = None
    if isinstance(error, SystemExit):
        status = error.code
    elif error is not None:
        status = "".join(traceback.format_exception(error)).rstrip()
    if not isinstance(status, int | None):  # as Python does
        complain(str(status))
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    leave_process(status if isinstance(status, int) else int(status is not None))


class Ways:
    """When what ends or replaces this process raises: while such code runs, or (a command, whose
    process is all its own, also against threads that stay) for good."""

    calls = 0
    for_good = False
    lock = threading.Lock()


@contextmanager
def no_way_out() -> Iterator[None]:
    """While this lasts, what ends or replaces a process raises in this one, not in its children."""
    close_ways()
    with Ways.lock:
        Ways.calls += 1
    try:
        yield
    finally:
        with Ways.lock:
            Ways.calls -= 1


def stay_for_good() -> None:
    close_ways()
    Ways.for_good = True


def close_ways() -> None:
    if os._exit is not leave_process:
        return
    for name in ("_exit", "abort", "execv", "execve"):
        refused = refusing(f"os.{name}", getattr(os, name), os.getpid())
        for module in (os, sys.modules.get("posix")):
            if module is not None:
                setattr(module, name, refused)


def refusing(name: str, real: Callable[..., NoReturn], process: int) -> Callable[..., NoReturn]:
    def way_out(*arguments: object) -> NoReturn:
        if os.getpid() == process and (Ways.calls or Ways.for_good):
            raise Left(f"{name}({', '.join(map(shown, arguments))})")
        real(*arguments)

    return way_out


@contextmanager
def threads_watched() -> Iterator[list[BaseException]]:
    """What ended threads meanwhile that is no Exception: Python is silent about most of it."""
    ended: list[BaseException] = []
    before = threading.excepthook

    def watch(args: threading.ExceptHookArgs) -> None:
        error = args.exc_value
        if error is None or isinstance(error, Exception):
            before(args)
        else:
            ended.append(error)

    threading.excepthook = watch
    try:
        yield ended
    finally:
        threading.excepthook = before


# Time.


class Limit:
    """Some seconds for a piece of code in the main thread."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self.inside = self.over = self.caught = False
        self.done = threading.Event()
        self.thread = threading.get_ident()
        self.handlers: dict[int, Handler] = {}
        self.tries = 0

    def spent_on(self, work: Callable[[], T]) -> T:
        """What it returns. Raises TooLong."""
        in_main = threading.current_thread() is threading.main_thread()
        if self.seconds is None or not in_main or ALARM is None:
            return in_this_process(work)
        self.end = time.monotonic() + self.seconds
        timer = signal.getitimer(signal.ITIMER_REAL)
        self.handle(ALARM)
        if not timer[0]:  # it also reaches code that keeps Python's lock, such as a slow pattern
            self.handle(signal.SIGALRM)
            signal.setitimer(signal.ITIMER_REAL, self.seconds)
        watch = threading.Thread(target=self.watch, name="reward_timeout", daemon=True)
        watch.start()
        try:
            try:
                self.inside = True
                result = in_this_process(work)
            finally:
                self.inside = False  # before anything that an alarm could interrupt
        finally:
            self.inside = False
            self.done.set()
            watch.join()
            if signal.SIGALRM in self.handlers:
                signal.setitimer(signal.ITIMER_REAL, *timer)
            for number, handler in self.handlers.items():
                signal.signal(number, handler)
        if self.over:
            raise TooLong
        return result

    def handle(self, number: int) -> None:
        before = signal.signal(number, self.on_alarm)
        self.handlers.setdefault(number, before)

    def watch(self) -> None:
        """Send the alarm when the time is over: once, then as often as it is caught.

        The timer alone would not do: other code that wants a limit sets it, and then sets it to 0.
        """
        assert ALARM is not None
        assert self.seconds is not None
        if self.done.wait(self.seconds + 0.1):
            return
        if not self.over:  # else the timer has done it, and what follows that is not to be hit
            self.over = True
            signal.pthread_kill(self.thread, ALARM)
        if self.done.wait(PATIENCE):
            return
        self.caught = True
        for _ in range(STUBBORN):
            signal.pthread_kill(self.thread, ALARM)
            if self.done.wait(1.0):
                return
        where = place(sys._current_frames().get(self.thread))
        complain(
            f"warning: a reward function{where} is over reward_timeout = {self.seconds:g} seconds "
            "and cannot be interrupted there (code that is not Python's): wait for it, or kill "
            "this run and resume it with reward_workers = 1, whose processes can be ended"
        )

    def on_alarm(self, *_: object) -> None:
        self.over = self.over or time.monotonic() >= self.end
        if not (self.inside and self.over):
            return
        if self.caught:
            self.soon_again()
        raise TooLong

    def soon_again(self) -> None:
        """Raise once more in a few microseconds, each time after others.

        A loop that catches everything is left from where it does not: between an `except` and the
        next `try`. Sooner or later, well within a second, an alarm comes just there.
        """
        if not self.tries:
            self.handle(signal.SIGALRM)
        self.tries += 1
        signal.setitimer(signal.ITIMER_REAL, 1e-6 + 6e-6 * (self.tries * 0.618 % 1))


def place(frame: FrameType | None) -> str:
    """The line of a file that a thread is at, outside of Python's own modules where possible."""
    frames = [(f.f_code.co_filename, line) for f, line in traceback.walk_stack(frame)]
    found = innermost(frames[::-1]) if frame else None
    return f" in {found[0]}, line {found[1]}," if found else ""


def innermost(places: list[tuple[str, int]]) -> tuple[str, int] | None:
    """Of files and lines, the last one of a person's own file; else of any file but ours."""
    ours = os.path.dirname(__file__), importlib.__path__[0]
    others = [p for p in places if os.path.dirname(p[0]) not in ours and os.path.isfile(p[0])]
    library = os.path.dirname(os.__file__), sys.prefix
    own = [p for p in others if not p[0].startswith(library)]
    return next(iter([*own[::-1], *others[::-1]]), None)


# Surroundings.


@contextmanager
def kept(importing: bool = False) -> Iterator[None]:
    """Put back what a run relies on, where code changes it.

    A module that is imported may set up warnings, logging or another standard output for good.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(handlers_kept())
        stack.enter_context(streams_kept(replaced=not importing))
        if not importing:
            stack.enter_context(settings_kept())
        yield


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Handlers of signals, which of them are blocked, and the timer that sends one; meanwhile
    Ctrl-C raises Signalled."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in HANDLED}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    on_interrupt = before[signal.SIGINT]

    def interrupt(number: int, frame: FrameType | None) -> None:
        try:
            on_interrupt(number, frame)  # type: ignore[operator, misc]
        except KeyboardInterrupt as error:
            raise error if isinstance(error, Signalled) else Signalled(number) from None

    if callable(on_interrupt):
        signal.signal(signal.SIGINT, interrupt)
    timer = signal.getitimer(signal.ITIMER_REAL)[0]
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) != handler and handler is not None:
                signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if not timer:  # one that was left running would end the process
            signal.setitimer(signal.ITIMER_REAL, 0)


@contextmanager
def streams_kept(replaced: bool) -> Iterator[None]:
    """Standard output and error, if they are closed (or `replaced`), and their descriptors."""
    before = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    spare = {number: duplicate(number) for number in (1, 2)}
    try:
        yield
    finally:
        for number, copy in spare.items():
            if copy is not None:
                put_back(copy, number)
        for number, (name, stream) in enumerate(before.items(), start=1):
            if stream is not None and (replaced or is_closed(getattr(sys, name))):
                setattr(sys, name, reopened(stream, number) if is_closed(stream) else stream)


def duplicate(number: int) -> int | None:
    """A second descriptor; None where there is not even one."""
    try:
        return os.dup(number)
    except OSError:
        return None


def put_back(copy: int, number: int) -> None:
    """Open a descriptor again by its duplicate, which is closed."""
    if not is_open(number):
        os.dup2(copy, number)
    os.close(copy)


def is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def is_closed(stream: TextIO | None) -> bool:
    return stream is None or getattr(stream, "closed", False)


def reopened(stream: TextIO, number: int) -> TextIO:
    """A stream like one that was closed."""
    encoding, errors = stream.encoding, stream.errors
    return open(number, "w", encoding=encoding, errors=errors, closefd=False)


@contextmanager
def settings_kept() -> Iterator[None]:
    """Of Python, NumPy and MLX, those that would change what the run does or whether it goes on."""
    depth, errors, filters = sys.getrecursionlimit(), np.geterr(), warnings.filters[:]
    mx = sys.modules.get("mlx.core")  # not where it is not used, as in workers
    device, collects = mx.default_device() if mx else None, gc.isenabled()
    try:
        yield
    finally:
        if sys.getrecursionlimit() != depth:
            sys.setrecursionlimit(depth)
        if collects:
            gc.enable()
        if np.geterr() != errors:
            np.seterr(**errors)
        if warnings.filters[:] != filters:
            warnings.filters[:] = filters  # type: ignore[index]
        if mx and mx.default_device() != device:
            mx.set_default_device(device)
