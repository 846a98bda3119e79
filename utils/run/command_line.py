"""The command line of mlx-grpo.py: its arguments, and how an error is told."""

import argparse
import dataclasses
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from ..base.errors import RunError, UserError
from ..base.say import Parser, complain, tell_everything
from ..rewards import foreign
from ..settings import checks, reading
from ..settings.run_settings import Settings
from . import ending, launch, trackers


def command_line(script: str, config: str | None, overrides: Sequence[str]) -> str:
    """What to type for the same run again; runs are continued and replaced by adding to it."""
    words = ["uv", "run"] if "UV" in os.environ else ["python"]  # `uv run` sets it
    typed = shlex.split(os.environ.get(launch.TYPED, ""))
    words += [os.path.relpath(script), *typed, *(["--config", config] if config else [])]
    shown = map(reading.shown_override, overrides)
    return shlex.join([*words, *(word for text in shown for word in ("--set", text))])


def parse_arguments(
    argv: Sequence[str] | None, config_class: type, script: str
) -> argparse.Namespace:
    """`overrides` has --set and --resume, and `command` what to type for the same run again."""
    asked = {"-h", "--help"} & {*(argv or sys.argv)}
    parser = Parser(
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
    add("--dry-run", action="store_true", help="print plan and settings, write nothing")
    add("--all", action="store_true", help="with --dry-run: also settings that have their default")
    add("--ranks", type=int, metavar="N", help="train with N processes on this machine")
    add("--hostfile", help="train on the machines of this file (docs/distributed.md)")
    again = "go on from the newest whole checkpoint of output_dir, or from this one"
    add("--resume", nargs="?", const="auto", metavar="CHECKPOINT", help=again)
    add("--quiet", action="store_true", help="show only warnings, errors and how the run ended")
    add("--debug", action="store_true", help="show the traceback of an error")
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        hint = hint_for(unknown, config_class)
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    if arguments.all and not arguments.dry_run:
        parser.error("--all goes with --dry-run")
    resume = [f"resume={arguments.resume}"] if arguments.resume else []
    quiet = ["quiet=true"] if arguments.quiet else []
    arguments.overrides = [*arguments.set, *resume, *quiet]
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


def check_surroundings(config: Settings) -> None:
    """Expand `~` in paths, and refuse what has no effect here, no file, or no package."""
    checks.refuse_dead_settings(config, config.train_type)
    for name in ("model_name", "dataset", "output_dir", "adapter_path", "resume", "chat_template"):
        given = getattr(config, name)
        if given.startswith("~"):
            setattr(config, name, os.path.expanduser(given))
    of_run = Path(config.output_dir, config.resume)
    if config.resume not in ("", "auto") and not Path(config.resume).exists() and of_run.is_dir():
        config.resume = str(of_run)
    template = config.chat_template
    if template not in ("", "plain") and not Path(template).is_file():
        raise UserError(f"chat_template = {template!r} is neither a file nor plain")
    trackers.check_available(config.report_to)


def exit_code_of(work: Callable[[], int], debug: bool) -> int:
    """What `work` returns. Errors and signals that end it are told in a line: 2 (bad input), 1
    (failed run), 128 + n (signal n, so 130 for Ctrl-C)."""
    tell_everything()
    try:
        with foreign.no_way_out(), ending.signals_raise():
            return work()
    except SystemExit as stop:
        complain(f"error: {ending.foreign_exit(stop)}")
        return 1
    except (UserError, RunError) as error:
        if debug:
            complain(traceback.format_exc(), end="")
        complain(f"error: {error}")
        return error.exit_code
    except OSError as error:
        if debug or not error.filename:
            raise
        complain(f"error: {error.filename}: {error.strerror}")
        return 1
    except KeyboardInterrupt as stop:
        return ending.left_at_once(stop)
