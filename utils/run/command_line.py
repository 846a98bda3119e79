"""The command line of mlx-grpo.py: its arguments, the folder of a run, how an error is told."""

import argparse
import dataclasses
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..base.errors import RunError, UserError
from ..base.say import say
from ..base.script import ROOT
from ..base.text import redact
from ..device import runtime
from ..settings import checks, reading
from . import checkpoints, ending, folders, introduction, trackers


def command_line(script: str, config: str | None, overrides: Sequence[str]) -> str:
    """What to type for the same run again; runs are continued and replaced by adding to it."""
    words = ["uv", "run"] if "UV" in os.environ else ["python"]  # `uv run` sets it
    words += [os.path.relpath(script), *(["--config", config] if config else [])]
    shown = map(reading.shown_override, overrides)
    return shlex.join([*words, *(word for text in shown for word in ("--set", text))])


def parse_arguments(
    argv: Sequence[str] | None, config_class: type, script: str
) -> argparse.Namespace:
    """`overrides` has --set and --resume, and `command` what to type for the same run again."""
    asked = {"-h", "--help"} & {*(argv or sys.argv)}
    parser = argparse.ArgumentParser(
        prog="mlx-grpo.py",
        description="Teach a language model to reason by GRPO, on MLX.",
        epilog="Settings (in the TOML file, or --set key=value):\n"
        + (reading.help_text(config_class) if asked else ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    chosen = os.environ.get("MLX_GRPO_CONFIG")
    also = "TOML file (default: $MLX_GRPO_CONFIG, then configs/default.toml)"
    add("--config", default=chosen, help=also)
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting")
    add("--dry-run", action="store_true", help="print settings and memory plan, write nothing")
    again = "go on from the newest whole checkpoint of output_dir, or from this one"
    add("--resume", nargs="?", const="auto", metavar="CHECKPOINT", help=again)
    add("--debug", action="store_true", help="show the traceback of an error")
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        hint = hint_for(unknown, config_class)
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    resume = [f"resume={arguments.resume}"] if arguments.resume else []
    arguments.overrides = [*arguments.set, *resume]
    arguments.command = command_line(script, arguments.config, arguments.set)
    return arguments


def hint_for(unknown: Sequence[str], config_class: type) -> str:
    """How to type what stands where it does not belong, if that is known."""
    if unknown[0].endswith(".toml"):
        return f"; a settings file goes behind --config: --config {unknown[0]}"
    word, _, value = unknown[0].partition("=")
    name = word.lstrip("-").replace("-", "_")
    if name not in {field.name for field in dataclasses.fields(config_class)}:
        return ""
    value = value or next(iter(unknown[1:]), "VALUE")
    return f"; settings go behind --set: --set {name}={value}"


def check_surroundings(config: Any) -> None:
    """Expand `~` in paths, and refuse what has no effect here, no file, or no package."""
    checks.refuse_dead_settings(config, config.train_type)
    for name in ("model_name", "dataset", "output_dir", "adapter_path", "resume", "chat_template"):
        setattr(config, name, os.path.expanduser(getattr(config, name)))
    of_run = Path(config.output_dir, config.resume)
    if config.resume not in ("", "auto") and not Path(config.resume).exists() and of_run.is_dir():
        config.resume = str(of_run)
    template = config.chat_template
    if template not in ("", "plain") and not Path(template).is_file():
        raise UserError(f"chat_template = {template!r} is neither a file nor plain")
    trackers.check_available(config.report_to)


def start(
    config: Any, command: str, build_trainer: Callable[[Any, str], Any], blas: str | None
) -> int:
    """Train in the run's folder, which is locked, new or gone on with. Returns the exit code."""
    output_dir = Path(config.output_dir)
    with checkpoints.RunLock(output_dir) as lock:
        folders.check_output(output_dir, command, config)
        if config.resume == "auto" and folders.is_finished(output_dir, config):
            say(f"finished  the run in {output_dir} was complete: see {output_dir / 'final'}")
            return 0
        resume_from = folders.to_resume(output_dir, config.resume) if config.resume else None
        if note := runtime.keep_compiled_kernels():
            say(f"speed     {note}")
        trainer = build_trainer(config, command)
        introduction.introduce(trainer, blas)
        if resume_from:
            checkpoints.load(resume_from, trainer)
        records = checkpoints.open_run(trainer, lock, resume_from, ROOT)
        names, recorded = (config.report_to, output_dir, config.run_name), reading.recorded(config)
        since = trainer.update_step if records else checkpoints.reported(trainer) + 1
        trainer.log.tracker = trackers.make_tracker(*names, recorded, since=since, records=records)
        try:
            exit_code: int = trainer.train()
        finally:
            trainer.log.tracker.close()
    return exit_code


def exit_code_of(work: Callable[[], int], debug: bool) -> int:
    """What `work` returns. Errors and signals that end it are told in a line: 2 (bad input), 1
    (failed run), 128 + n (signal n, so 130 for Ctrl-C)."""
    try:
        with ending.signals_raise():
            return work()
    except (UserError, RunError) as error:
        if debug:
            print(redact(traceback.format_exc()), end="", file=sys.stderr)
        print(f"error: {redact(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as stop:
        return ending.left_at_once(stop)
