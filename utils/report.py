"""See what runs did: one page with curves, every completion, questions over time, comparisons.

    uv run python utils/report.py outputs/tiny-math
    uv run python utils/report.py outputs/tiny-math --serve

The page is one HTML file that needs nothing else: it opens by a double click, without a network.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__" and not __package__:  # typed as a script: sys.path[0] is utils/ itself
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    __package__ = "utils"

from .base.errors import UserError, readable
from .base.say import Parser, complain, say
from .base.text import counted
from .inference import number, run

if TYPE_CHECKING:  # `--help` answers without it
    from .run import page

COMMAND = "uv run python utils/report.py"
EXAMPLES = f"""examples:
  {COMMAND} outputs/tiny-math
      writes outputs/tiny-math/report.html; the run may still be going
  {COMMAND} outputs/first outputs/second -o compared.html
      two runs in the same plots, with a paired test of their answers
  {COMMAND} outputs/tiny-math --serve
      every text, however many, at an address of this machine; follows a run that is going

RUN is the output_dir of a run. A page has at most 30 MB: where the texts of a run are more, it
holds those of a share of the groups, evenly over the run, and says so."""
PORT = number(int, lambda v: 0 <= v < 65536, "a whole number from 0 (any free one) to 65535")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="report.py",
        description="One page that shows runs: curves, completions, questions, comparisons.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folder of a run; several are compared")
    add("-o", "--output", type=Path, metavar="FILE", help="default: report.html in the folder of "
        "the run; of several runs, in the current folder")  # fmt: skip
    add("--serve", action="store_true", help="show it on 127.0.0.1 until Ctrl-C instead")
    add("--port", type=PORT, metavar="N", help="with --serve; default 8765, else any free one")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what contradicts itself. Raises UserError."""
    if args.serve and args.output:
        raise UserError("--serve writes no file: leave -o out")
    if args.port is not None and not args.serve:
        raise UserError("--port belongs to --serve")
    places = [os.path.realpath(name) for name in args.runs]
    doubled = next((n for n, p in zip(args.runs, places, strict=True) if places.count(p) > 1), None)
    if doubled:
        raise UserError(f"{doubled} is named twice")


def report(args: argparse.Namespace) -> int:
    from .run import page, page_server
    from .run.ours import PAGE
    from .run.page_source import Source

    check_arguments(args)
    sources = [Source.at(Path(os.path.expanduser(name))) for name in args.runs]
    if args.serve:
        return page_server.serve(sources, args.port)
    path = args.output or Path(PAGE if len(sources) > 1 else sources[0].folder / PAGE)
    kept = page.write(path, sources, page.Room(page.LIMIT))
    for source, own in zip(sources, kept, strict=True):
        for text in source.all_damage():
            complain(f"warning: {source.folder}: {text}; the rest is shown")
        tell(source.folder, own)
    say(f"{path}: {readable(path.stat().st_size)}, {counted(len(sources), 'run')}")
    return 0


def tell(folder: Path, kept: page.Kept) -> None:
    """What of a run does not fit into the page, or is not there."""
    if not len(kept.shelf):
        say(f"{folder} holds no completions: curves and evaluations alone are shown")
    elif kept.shelf.share < 1:
        say(
            f"{folder}: texts of {kept.shelf.share:.0%} of {counted(len(kept.shelf), 'group')} fit "
            f"into {readable(page_limit())}; all are in {COMMAND} {folder} --serve"
        )
    elif kept.shelf.numbers["length"] and kept.tokens < 1:
        say(f"{folder}: what is known of each token fits for {kept.tokens:.0%} of the groups")


def page_limit() -> int:
    from .run.page import LIMIT

    return LIMIT


def main(argv: list[str] | None = None) -> int:
    """Returns 0, 2 (bad input), 1 (a page that could not be written) or 130 (Ctrl-C)."""
    args = build_parser().parse_args(argv)
    return run(lambda: report(args))


if __name__ == "__main__":
    sys.exit(main())
