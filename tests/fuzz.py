"""Fuzz whatever reads what others wrote: one process, one seed, no traceback, no hang.

    python tests/fuzz.py --cases 20000          all surfaces, prints the table of docs/faults.md
    python tests/fuzz.py --only "data files" --cases 500 --seed 7

A case may be accepted, or refused by a UserError or RunError with a bounded message. Anything else
is a failure, printed with the seed that makes it again: another exception, a panic, more than
SECONDS, an answer that breaks what the surface promises, or a token id that is no row of the
embedding table on its way into MLX, which does not check and crashes. `good` cases must be
accepted, or a reader that refuses everything would pass.
"""

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent))

from conftest import ROOT, load_script, make_model

from utils.base.errors import RunError, UserError

SECONDS = 20.0  # for one case; most take a millisecond


@dataclass
class Case:
    """Something to run, and what is known of its input."""

    run: Callable[[], object]
    valid: bool  # structurally: it parses as the format it claims to be
    good: bool = False  # must be accepted


@dataclass
class Surface:
    name: str
    share: float  # of all cases
    minimum: int  # cases of the long version (20,000), stated in docs/faults.md
    make: Callable[["World", random.Random], Case]


@dataclass
class Result:
    name: str
    cases: int = 0
    valid: int = 0
    refused: int = 0
    slowest: float = 0.0
    failures: list[str] = field(default_factory=list)


class OutOfTime(BaseException):
    """Not an Exception, so that no handler on the way takes it for the input's fault."""


class OutOfBounds(BaseException):
    """A token id that MLX would read foreign memory for."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise OutOfTime(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def bounds_checked() -> Iterator[None]:
    """Embeddings that raise instead of reading what is not theirs."""
    import mlx.nn as nn
    import numpy as np

    def checked(kind: type) -> Callable:
        look_up = kind.__call__

        def call(self, ids):
            found = np.array(ids)
            if found.size and not (found.min() >= 0 and found.max() < self.weight.shape[0]):
                raise OutOfBounds(f"token ids {found.min()} to {found.max()} reach MLX")
            return look_up(self, ids)

        return call

    with (
        mock.patch.object(nn.Embedding, "__call__", checked(nn.Embedding)),
        mock.patch.object(nn.QuantizedEmbedding, "__call__", checked(nn.QuantizedEmbedding)),
    ):
        yield


class World:
    """What cases start from: a random model, its folder, a checkpoint, room for files."""

    def __init__(self, folder: Path) -> None:
        import fuzz_surfaces

        self.folder, self.grpo = folder, load_script()
        self.model_dir = make_model(folder / "model", hidden=16, layers=1)
        self.files = folder / "files"
        self.files.mkdir()
        self.settings = {"model_name": str(self.model_dir), "system_prompt": "", "eval_samples": 0}
        self.loaded = self.grpo.load_model(self.config())
        self.data = folder / "data.jsonl"
        rows = [{"question": f"How many is {n}?", "answer": f"#### {n}"} for n in range(6)]
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.run_dir = fuzz_surfaces.make_run(self)

    def config(self, **settings):
        return self.grpo.MLXGRPOConfig(**{**self.settings, **settings})

    def file(self, name: str, data: bytes) -> Path:
        """A file in the folder of the case, which is emptied before each."""
        path = self.files / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def clean(self) -> None:
        shutil.rmtree(self.files)
        self.files.mkdir()


def out_of_time(error: BaseException | None) -> bool:
    """Whether the limit of a case ended it, whatever was made of that."""
    while error is not None and not isinstance(error, OutOfTime):
        error = error.__cause__ or error.__context__
    return error is not None


def run_case(world: World, surface: Surface, seed: str) -> tuple[Case | None, str, str, float]:
    """(case, "accepted" or "refused" or "", failure or "", seconds)."""
    case, outcome, failure, start = None, "", "", time.perf_counter()
    world.clean()
    try:
        case = surface.make(world, random.Random(seed))
        start = time.perf_counter()
        with time_limit(SECONDS), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            case.run()
        outcome = "accepted"
    except (UserError, RunError) as error:
        outcome = "refused"
        if out_of_time(error):  # a reward that hangs is told by its name
            failure = f"OutOfTime: {error}"
        elif case is None or case.good:
            failure = f"refused a good case: {error}"
        elif len(str(error)) > 6000 or "Traceback" in str(error):
            failure = f"a message of {len(str(error))} characters: {str(error)[:300]}"
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - panics and our own ends are none of Exception
        lines = traceback.format_exception(error)
        failure = "".join(lines)[-1500:]
    return case, outcome, failure, time.perf_counter() - start


def fuzz(world: World, surface: Surface, cases: int, seed: int, until: str = "") -> Result:
    """So many cases, or fewer: up to the first failure with `until` in it."""
    result = Result(surface.name)
    for number in range(cases):
        name = f"{seed}/{surface.name}/{number}"
        case, outcome, failure, seconds = run_case(world, surface, name)
        result.cases += 1
        result.valid += bool(case and case.valid)
        result.refused += outcome == "refused"
        result.slowest = max(result.slowest, seconds)
        if failure:
            result.failures.append(f"seed {name}: {failure}")
        if failure and until and until in failure:
            break
    return result


@contextmanager
def new_world() -> Iterator[World]:
    from utils.data import chat_template

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(chat_template, "SECONDS", 0.3):
        world = World(Path(folder))
        with bounds_checked():
            yield world


def table(results: list[Result], minima: dict[str, int]) -> str:
    lines = ["| surface | cases | minimum | valid | refused cleanly | slowest, s | failures |"]
    lines.append("|---|---|---|---|---|---|---|")
    lines += [
        f"| {r.name} | {r.cases:,} | {minima[r.name]:,} | {r.valid / max(r.cases, 1):.0%} "
        f"| {r.refused / max(r.cases, 1):.0%} | {r.slowest:.2f} | {len(r.failures)} |"
        for r in results
    ]
    total, valid = sum(r.cases for r in results), sum(r.valid for r in results)
    failures = sum(len(r.failures) for r in results)
    lines.append(f"| all | {total:,} | | {valid / max(total, 1):.0%} | | | {failures} |")
    return "\n".join(lines)


def run_all(world: World, cases: int, seed: int, only: str = "") -> list[Result]:
    from fuzz_surfaces import SURFACES

    chosen = [surface for surface in SURFACES if only in ("", surface.name)]
    shares = sum(surface.share for surface in chosen)
    counts = [max(1, round(cases * surface.share / shares)) for surface in chosen]
    return [fuzz(world, *work, seed) for work in zip(chosen, counts, strict=True)]


def main() -> int:
    from fuzz_surfaces import SURFACES

    parser = argparse.ArgumentParser(description="Fuzz whatever reads what others wrote.")
    parser.add_argument("--cases", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", choices=["", *(s.name for s in SURFACES)])
    args = parser.parse_args()
    start = time.perf_counter()
    with new_world() as world:
        results = run_all(world, args.cases, args.seed, args.only)
    for failure in [failure for result in results for failure in result.failures][:20]:
        print(f"--- {failure}\n")
    print(table(results, {surface.name: surface.minimum for surface in SURFACES}))
    print(f"seed {args.seed}, {time.perf_counter() - start:.0f} s")
    return 1 if any(result.failures for result in results) else 0


if __name__ == "__main__":
    sys.modules["fuzz"] = sys.modules["__main__"]  # the surfaces import this file by its name
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
