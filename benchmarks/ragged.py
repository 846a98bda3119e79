"""Rollouts of completions of real lengths: how much of the device's time goes to waiting.

    uv run python benchmarks/ragged.py --completions 256 --places 32
    uv run python benchmarks/ragged.py --completions 256 --places 32 --root OTHER_CHECKOUT

Completions end where a lognormal distribution says (a mean of a quarter of the limit, a tail to
it), by their own first tokens, so that every revision samples the same ones. The time is compared
with what as many tokens take in batches in which no place is ever empty. Each call appends one
record to benchmarks/records/ragged.jsonl, and rewrites the table in benchmarks/RESULTS.md.
"""

import argparse
import hashlib
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "benchmarks/records/ragged.jsonl"
SPREAD = 0.8  # of the logarithm of the lengths


def planned_length(first: list[int], limit: int) -> int:
    """By a few sampled tokens: with a mean of about a quarter of the limit."""
    digest = hashlib.blake2b(repr(first).encode(), digest_size=8).digest()
    share = (int.from_bytes(digest, "big") + 0.5) / 2**64
    deviate = statistics.NormalDist().inv_cdf(share)
    median = limit / 4 / math.exp(SPREAD**2 / 2)
    return max(4, min(limit, round(median * math.exp(SPREAD * deviate))))


def stop_rule(plain: type, limit: int, ragged: bool) -> type:
    """The project's stop rule with planned ends; none at all where all have the same length."""

    class Planned(plain):  # type: ignore[misc, valid-type]
        def length(self, ids: list[int], checked: int) -> int | None:
            end = planned_length(ids[:3], limit) if ragged else limit + 1
            return end if len(ids) >= 3 and checked < end <= len(ids) else None

    return Planned


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    import mlx.core as mx

    from utils.base.script import load_script
    from utils.device import runtime

    grpo = load_script()
    group, limit = 16, arguments.tokens
    overrides = [f"model_name={arguments.model}", f"rollout_batch_size={arguments.places}"]
    overrides += [f"num_generations={group}", f"max_new_tokens={limit}", "stop_strings=[]"]
    overrides += [f"max_completion_length={2 * limit}", "eval_samples=0", "temperature=1.0"]
    preset = str(Path.cwd() / "configs/tiny_math.toml")
    trainer = grpo.build_trainer(grpo.read_config(preset, overrides), "")
    batch = list(range(arguments.completions // group))

    def seconds(ragged: bool) -> tuple[float, list[Any]]:
        kind = stop_rule(type(trainer.sampler.stop), limit, ragged)
        rule, usual = object.__new__(kind), trainer.sampler.stop
        vars(rule).update(vars(usual))
        trainer.sampler.stop = rule
        start = time.perf_counter()
        try:
            completions = trainer.generate_responses(batch)
        finally:
            trainer.sampler.stop = usual
        return time.perf_counter() - start, completions

    times: dict[bool, list[float]] = {True: [], False: []}
    counts = {}
    for turn in range(arguments.repeats + 1):
        for ragged in (True, False):
            taken, completions = seconds(ragged)
            counts[ragged] = sum(len(completion.ids) for completion in completions)
            if turn:  # the first fills caches and compiles
                times[ragged].append(taken)
    ragged, full = (statistics.median(times[which]) for which in (True, False))
    texts = hashlib.blake2b(digest_size=8)
    for completion in seconds(True)[1]:
        texts.update(repr(completion.ids).encode())
    return {
        "date": time.strftime("%Y-%m-%d"),
        "revision": arguments.name,
        "device": runtime.provenance(ROOT)["device"],
        "mlx": mx.__version__,
        "model": Path(arguments.model).name,
        "completions": arguments.completions,
        "places": arguments.places,
        "limit": limit,
        "mean_length": round(counts[True] / arguments.completions, 1),
        "seconds": [round(taken, 3) for taken in times[True]],
        "seconds_full": [round(taken, 3) for taken in times[False]],
        "tokens_per_second": round(counts[True] / ragged),
        "tokens_per_second_full": round(counts[False] / full),
        "over_full": round(ragged / counts[True] * counts[False] / full, 2),
        "samples": texts.hexdigest(),
    }


def table(records: list[dict[str, Any]]) -> list[str]:
    rows = [
        "| machine | revision | model | completions | at once | mean of limit | tokens/s "
        "| no place empty | time over that |",
        "|---" * 9 + "|",
    ]
    return rows + [
        f"| {r['device']} | {r['revision']} | {r['model']} | {r['completions']} "
        f"| {r['places']} | {r['mean_length']} of {r['limit']} | {r['tokens_per_second']:,} "
        f"| {r['tokens_per_second_full']:,} | {r['over_full']} |"
        for r in records
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="models/tiny-math")
    add("--completions", type=int, default=256)
    add("--places", type=int, default=32, help="rows at once, as if memory allowed no more")
    add("--tokens", type=int, default=128, help="limit of a completion")
    add("--repeats", type=int, default=5)
    add("--root", type=Path, default=ROOT, help="the checkout that is measured")
    add("--name", default="", help="of the revision, in the table (default: git's)")
    add("--table-only", action="store_true", help="rewrite RESULTS.md from the records")
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.root.resolve()))
    if not arguments.table_only:
        git = ["git", "-C", str(arguments.root), "rev-parse", "--short", "HEAD"]
        arguments.name = arguments.name or subprocess.check_output(git, text=True).strip()
        record = measure(arguments)
        print(record)
        results.append(RECORDS, record)
    results.write_section("ragged", table(results.read(RECORDS)))


sys.path.insert(0, str(ROOT))
from benchmarks import results  # noqa: E402

if __name__ == "__main__":
    main()
