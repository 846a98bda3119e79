"""How a run ends: finished, out of time, by a signal or by an error. Nothing is lost, and the last
line says why.

A run that ends between two updates is saved as it is. One that ends within an update is saved as
it was before it, as long as no weight has moved; then the update is done again, to the same result.
"""

import contextlib
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

from ..base.errors import DiskError, RunError, Signalled, UserError
from ..base.json_files import write_json
from ..base.say import complain, say
from ..base.text import redact, visible
from ..device import ranks
from ..rewards import foreign
from . import checkpoints, closing, completions, folders, model_card, ours, page_at_end
from .log import RunLog
from .run import Interrupted, Run, Trainer
from .state import Record

SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}
LINGER = 10.0  # seconds for threads of other people to end, once the run has
SLEPT = 60.0  # seconds by which the wall clock may run ahead before it is worth a line

Handler = Callable[[int, FrameType | None], object] | int | None


class Guard:
    """Stands around the main loop: knows when it is over, and saves what a stop would lose."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.run = trainer, trainer.run
        self.exit_code = 0
        self.signal = signal.SIGINT
        self.reason = ""

    def __enter__(self) -> "Guard":
        self.handlers = listen(self.on_signal)
        ranks.here().listen(lambda: self.signal * self.run.interrupted, self.obey)
        self.start, self.wall = time.perf_counter(), time.time()
        self.process = os.getpid()
        self.before = self.run.state.elapsed
        return self

    def on_signal(self, number: int, _: FrameType | None) -> None:
        """The first asks the trainer to stop cleanly, the second leaves at once."""
        if self.run.interrupted:
            raise Signalled(number)
        self.run.interrupted = True
        self.signal = signal.Signals(number)
        with contextlib.suppress(RuntimeError):  # it came in the middle of another line
            say("stopping  and saving the last finished update; once more leaves at once")

    def obey(self, number: int) -> NoReturn:
        """Another rank got a signal."""
        self.run.interrupted, self.signal = True, signal.Signals(number)
        raise Interrupted

    def seconds(self) -> float:
        """How long the run has been going, by a clock that nobody can set back.

        It stands still while the machine sleeps, and so does `max_hours`: said once.
        """
        passed = time.perf_counter() - self.start
        slept = time.time() - self.wall - passed
        if slept > SLEPT:
            self.wall = math.inf
            say(
                f"clock     {slept / 60:.0f} minutes ahead of the run: the machine slept, or its "
                "clock was set; only time awake counts"
            )
        return self.before + passed

    def is_over(self) -> bool:
        """Whether there is no update left to do; if it ends early, `reason` says why."""
        a, log = self.run.args, self.run.log
        if self.run.state.update_step >= self.trainer.total_updates:
            return True
        if a.max_hours and time.perf_counter() - self.start >= a.max_hours * 3600:
            self.reason = f"max_hours = {a.max_hours:g} reached"  # of this process
        if a.early_stopping_patience and log.history:
            best = best_of(log.history)
            since = len(log.history) - 1 - (log.history.index(best) if best else 0)
            if since >= a.early_stopping_patience:
                self.reason = f"early_stopping_patience: {since} evaluations without "
                self.reason += better_than(best, log)
        self.reason = next(filter(None, ranks.here().all_say(self.reason)), "")
        return bool(self.reason)

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if os.getpid() != self.process:  # a child of the run has nothing to save
            return False
        stop = foreign_exit(error) if isinstance(error, SystemExit) else error
        if isinstance(stop, Exception):
            ranks.here().tell(self.signal if isinstance(stop, Interrupted) else stop)
        try:
            if isinstance(stop, Exception):  # not the KeyboardInterrupt of the second Ctrl-C
                keep(self.trainer, stop)
        finally:
            put_back(self.handlers)
        if isinstance(error, SystemExit):
            raise foreign_exit(error) from error
        if not isinstance(error, Exception):
            return False
        if isinstance(error, Interrupted):
            say(f"reason    {SIGNALS[self.signal]}")
            self.exit_code = 128 + self.signal
            return True
        if isinstance(error, RunError | UserError):
            return False
        raise unexpected(error, self.run.folder) from error


def better_than(best: Record | None, log: RunLog) -> str:
    """What an evaluation would have had to give for the run to go on."""
    if best is None:
        return f"a value ({log.args.eval_metric} gave none)"
    return f"a better one than {log.score_text(best['em'])} at update {best['update']}"


def best_of(history: list[Record]) -> Record | None:
    """The first of the best evaluations."""
    return max((r for r in history if not math.isnan(r["em"])), key=score_of, default=None)


def score_of(record: Record) -> float:
    return float(record["em"])


def listen(handler: Handler) -> dict[signal.Signals, Handler]:
    """Install a handler for all ways to ask a process to end; returns those that were there.

    `nohup` has SIGHUP ignored, and it stays so. Only a program's main thread gets signals.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    wanted = [s for s in SIGNALS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in wanted}


@contextmanager
def signals_raise() -> Iterator[None]:
    """While there is nothing to save yet, every signal is a KeyboardInterrupt."""

    def leave(number: int, _: FrameType | None) -> None:
        raise Signalled(number)

    handlers = listen(leave)
    try:
        yield
    finally:
        put_back(handlers)


def left_at_once(stop: KeyboardInterrupt) -> int:
    """Say why, and return the exit code that a shell knows for it."""
    number = signal.Signals(stop.args[0] if stop.args else signal.SIGINT)
    say(f"reason    {SIGNALS[number]}: left at once")
    return 128 + number


def foreign_exit(error: SystemExit) -> RunError:
    """Nothing here ends the program within a run: a library or a tracker did."""
    return RunError(f"something called sys.exit({error.code!r}), which ends no run well")


def leave(code: int) -> NoReturn:
    """End the program, also where threads that other people's code started do not, and with this
    code, whatever such a thread would end it with."""
    foreign.stay_for_good()
    threading.Thread(target=end_anyway, args=[code], daemon=True).start()
    sys.exit(code)


def end_anyway(code: int) -> None:
    """Python waits for such threads before it ends, and for good if one of them hangs."""
    time.sleep(LINGER)
    left = [t.name for t in threading.enumerate() if not t.daemon and t.name != "MainThread"]
    if left:
        complain(f"warning: left although threads still run: {', '.join(left)}")
        foreign.leave_process(code)


def put_back(handlers: dict[signal.Signals, Handler]) -> None:
    """Put back the handlers that `listen` replaced."""
    for number, handler in handlers.items():
        signal.signal(number, handler)


def unexpected(error: Exception, folder: Path) -> RunError:
    """One line for an error that nobody foresaw; its traceback goes into a file."""
    text = visible(redact("".join(traceback.format_exception(error))))
    said = redact(f"unexpected {type(error).__name__}: {error}")
    names = ("traceback.txt", *(f"traceback-{number}.txt" for number in range(2, 100)))
    paths = [folder / name for name in names]
    path = next((p for p in paths if ours.known(p) or not os.path.lexists(p)), folder)
    try:
        path.write_text(f"{ours.OPENING}\n{text}", encoding="utf-8")
    except OSError:
        return RunError(f"{text}\n{said}")
    return RunError(f"{said} (traceback in {path})")


def keep(trainer: Trainer, stop: Exception | None = None) -> None:
    """Save where the run was between two updates, unless that was done; say how to go on.

    `stop`: what ends the run, which its last line will say.
    """
    run = trainer.run
    if ranks.here().rank:  # rank 0 does
        return None
    if run.between is None:
        return say("stopped   before the first update was finished: nothing to save")
    update, path = run.between.update_step, run.checkpoint()
    if isinstance(stop, DiskError) and stop.path == path:
        say(f"stopped   after update {update}, which could not be saved")
        return run.say_newest()
    try:
        if run.saved_at != update:
            if run.moved:
                raise RunError("its weights have moved on")
            checkpoints.save(path, trainer)
            run.prune()
    except RunError as error:
        say(f"stopped   after update {update}, which could not be saved: {error}")
        return run.say_newest()
    say(f"stopped   after update {update}, saved in {run.shown(path)}. To continue:")
    return say(f"          {run.command} --resume")


def finish(trainer: Trainer, early: str) -> None:
    """Evaluate once more and write `final/`, a model folder that mlx_lm loads by itself.

    `early`: why the run ends before its schedule does; then it can be continued.
    """
    run, state = trainer.run, trainer.run.state
    if early and state.step:
        keep(trainer)  # before the records that are there only because it stops
    if state.pending:
        run.log.training(run.meter.report())
    adapters = trainer.loaded.train_type != "full"
    if adapters and not early and run.saved_at != state.update_step:
        # Fusing takes memory that training did not: the adapters first.
        trainer.save_checkpoint(run.checkpoint())
    if not evaluated(run):
        trainer.evaluate("test")
    if not ranks.here().rank:
        with ranks.here().by_itself():
            write_final(trainer, early)


def write_final(trainer: Trainer, early: str) -> None:
    """`final/`, and the last lines."""
    run, state = trainer.run, trainer.run.state
    adapters = trainer.loaded.train_type != "full"
    run.progress.stage("writing final/")
    with folders.written_aside(run.folder / "final") as folder:
        checkpoints.write_final(folder, trainer)
        if adapters:
            compare_fused(trainer, folder)
        ended = {"updates": state.update_step, "of": trainer.total_updates, "reason": early}
        write_json(folder / folders.ENDED, ended)
        prompt = checkpoints.prompt_of(trainer)
        model_card.write(folder, run.shown(run.folder / "final"), trainer, prompt, early)
        ours.sign(folder)
    folders.drop_replaced(run.folder)
    run.completions.settle()  # the page shows them
    say_the_end(run, early, trainer.total_updates, page_at_end.last_words(run))


def say_the_end(run: Run, early: str, total: int, page: str) -> None:
    """`page`: what the last line says of it."""
    run.log.say_what_stayed()
    run.log.summary(run.state.update_step)
    for line in closing.table(run.log, run.meter):
        say(line)
    if run.args.closing_note:
        say(f"note      {run.args.closing_note}")
    if not run.args.quiet and (size := run.completions.size()):
        say(f"kept      {size} in {run.shown(run.folder / completions.FOLDER)}")
    say(f"saved     {run.shown(run.folder / 'final')}")
    if run.prompt and run.prompt.trouble:
        say(f"warning   mlx_lm does not ask final/ as in training: {run.prompt.trouble}")
    for line in closing.next_step(run.shown(run.folder)):
        say(line)
    say(f"reason    {early}{page}" if early else f"finished  {all_updates(total)}{page}")


def all_updates(number: int) -> str:
    return "the only update" if number == 1 else f"all {number:,} updates"


def evaluated(run: Run) -> bool:
    """Whether the policy as it is now has an evaluation, as after one that ends the run early."""
    return any(record["update"] == run.state.update_step for record in run.log.history[-1:])


def compare_fused(trainer: Trainer, folder: Path) -> None:
    """Evaluate the model that was written, if there is memory for it beside the run."""
    from mlx_lm.utils import load_model

    if not trainer.eval_dataset:
        return
    args, plan = trainer.args, trainer.memory.plan
    if not plan.fits_with_final:
        say(f"fused     not evaluated: {plan.final_bytes / 1e9:.1f} GB more do not fit")
        return
    fused, _ = load_model(folder, trust_remote_code=args.trust_remote_code)
    fused.eval()
    score = trainer.evaluate_em(trainer.eval_dataset, args.eval_samples, model=fused)
    unfused = trainer.run.log.history[-1]["em"]
    say(f"fused     scores {score:.3f}, base with adapters {unfused:.3f}")
