"""What it costs to keep completions: share of an update's time, and MB for 1,000 of them.

    uv run python benchmarks/completions_cost.py                                 tiny-math, trained
    uv run python benchmarks/completions_cost.py --tokenizer HuggingFaceTB/SmolLM2-135M
    uv run python benchmarks/completions_cost.py --tokenizer HuggingFaceTB/SmolLM2-135M --formats

With a tokenizer: an update of 8 x 64 completions of 200 tokens each, which are cut out of this
repository's own text, with random log-probs. What is counted are processor seconds, of which a
machine that does other work besides takes no more: those of the training thread, for which the run
waits, and all, most of which are spent in a thread that packs and writes while the run goes on.
`--formats` writes their tokens in other ways.
Each call appends JSON records to benchmarks/records/completions_cost.jsonl, and rewrites the tables
in benchmarks/RESULTS.md.
"""

import argparse
import io
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import results  # noqa: E402
from utils.base.script import load_script  # noqa: E402
from utils.device import runtime  # noqa: E402

RECORDS = ROOT / "benchmarks/records/completions_cost.jsonl"
PROMPTS, GROUP, LENGTH = 8, 64, 200


def record_of(what: str, **figures: Any) -> dict[str, Any]:
    versions = runtime.provenance(ROOT)
    kept = {name: versions[name] for name in ("device", "git_revision")}
    return {"date": time.strftime("%Y-%m-%d"), **kept, "what": what, **figures}


def of_tiny_math(updates: int) -> dict[str, Any]:
    """A run of the preset: seconds spent in the store over seconds spent in updates."""
    grpo = load_script()
    from utils.run.completions import Completions

    spent: dict[str, list[float]] = {}
    write, lines = Completions.training, []

    def timed(
        name: str, call: Callable[..., Any], clock: Callable[[], float] = time.thread_time
    ) -> Callable[..., Any]:
        def and_time(*arguments: Any, **options: Any) -> Any:
            start = clock()
            try:
                return call(*arguments, **options)
            finally:
                spent.setdefault(name, []).append(clock() - start)

        return and_time

    with tempfile.TemporaryDirectory() as folder:
        settings = [f"output_dir={folder}", f"max_updates={updates}", "eval_samples=0"]
        config = grpo.read_config(str(ROOT / "configs/tiny_math.toml"), [*settings, "plot_every=0"])
        train_step = timed("update", grpo.MLXGRPOTrainer.train_step, time.perf_counter)
        with (
            mock.patch.object(Completions, "training", timed("keep", write)),
            mock.patch.object(Completions, "add", timed("beside", Completions.add)),
            mock.patch.object(grpo.MLXGRPOTrainer, "train_step", train_step),
        ):
            assert grpo.start(config, "benchmark") == 0
        size = sum(path.stat().st_size for path in Path(folder, "completions").iterdir())
        lines += [*read_back(Path(folder))]
    kept = sum(len(group["completions"]) for group in lines)
    lengths = [one["length"] for group in lines for one in group["completions"]]
    names = ("keep", "beside", "update")
    keep, beside, update = (statistics.median(spent[name][1:]) for name in names)
    return record_of(
        "tiny-math",
        completions=kept // updates,
        tokens=round(statistics.mean(lengths)),
        milliseconds=round((keep + beside) * 1000, 2),
        milliseconds_waited=round(keep * 1000, 2),
        seconds_update=round(update, 4),
        mb_per_1000=round(size / kept / 1000, 3),
    )


def read_back(folder: Path) -> Iterator[Any]:
    from utils.run.completions import read

    return read(folder)


def sampled(tokenizer: Any) -> tuple[Any, list[Any]]:
    """A rollout as the script has it, and the micro-batches that it was learnt in."""
    import mlx.core as mx
    import numpy as np

    from utils.data.completion import Completion

    files = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("utils/*/*.py")])
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    ids = tokenizer.encode(text)[: PROMPTS * GROUP * LENGTH]
    assert len(ids) == PROMPTS * GROUP * LENGTH, "the repository has too little text"
    random = np.random.default_rng(0)
    cells = np.empty(PROMPTS * GROUP, object)
    logprobs = -random.gamma(0.35, 1.2, (len(cells), LENGTH)).astype(np.float32)
    for n in range(len(cells)):
        own = ids[n * LENGTH : (n + 1) * LENGTH]
        text = tokenizer.decode(own)
        cells[n] = Completion(own, logprobs[n].tolist(), [1] * LENGTH, "length", text)
    rewards = random.normal(size=(PROMPTS, GROUP))
    rollout = SimpleNamespace(
        prompts=np.arange(PROMPTS),
        completions=cells.reshape(PROMPTS, GROUP),
        rewards=rewards,
        values=np.stack([rewards, rewards], -1),
    )
    trained = logprobs + random.normal(0, 0.01, logprobs.shape).astype(np.float32)
    batch = SimpleNamespace(
        old_logprobs=mx.array(trained),
        mask=mx.ones(trained.shape),
        completion=mx.arange(len(trained)),
    )
    return rollout, [batch]


def of_vocabulary(name: str, repeats: int) -> tuple[dict[str, Any], Any, list[Any]]:
    from transformers import AutoTokenizer

    from utils.run.completions import Completions
    from utils.run.state import State

    tokenizer = AutoTokenizer.from_pretrained(name)
    rollout, batches = sampled(tokenizer)
    rows = [{"question": f"How many is {n}?", "answer": str(n)} for n in range(PROMPTS)]
    args = SimpleNamespace(keep_completions="all", max_completions_gb=0.0, seed=0, eval_metric="em")
    seconds, waited = [], []
    with tempfile.TemporaryDirectory() as folder:
        store = Completions(
            args,  # type: ignore[arg-type]
            State(),
            Path(folder),
            tokenizer,
            lambda questions: [question["question"] for question in questions],
            {"train": rows},
            lambda: ["correctness", "format"],
        )
        for update in range(1, repeats + 1):
            start, own = time.process_time(), time.thread_time()
            store.training([rollout], rollout.rewards, batches, update)
            waited.append(time.thread_time() - own)
            store.settle()
            seconds.append(time.process_time() - start)
        size, kept = store.written, store.kept
    record = record_of(
        f"{Path(name).name}, {tokenizer.vocab_size:,} tokens",
        completions=PROMPTS * GROUP,
        tokens=LENGTH,
        milliseconds=round(statistics.median(seconds) * 1000, 1),
        milliseconds_waited=round(statistics.median(waited) * 1000, 1),
        seconds_update=None,
        mb_per_1000=round(size / kept / 1000, 3),
    )
    return record, rollout, batches


def formats(rollout: Any, batches: list[Any]) -> Iterator[dict[str, Any]]:
    """The ids and log-probs of the same completions in JSON lines and in parquet."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from utils.run.token_lines import Pieces, token_line, trained_logprobs

    completions = rollout.completions.reshape(-1).tolist()
    trained = trained_logprobs(batches)
    pieces = Pieces(SimpleNamespace(decode=lambda ids: ""))  # type: ignore[arg-type]

    def as_lines(level: int) -> int:
        parts = range(0, len(completions), GROUP)
        lines = [
            token_line(
                n, completions[n : n + GROUP], [trained[n + i] for i in range(GROUP)], pieces
            )
            for n in parts
        ]
        return len(zlib.compress("\n".join(lines).encode(), level))

    def as_parquet(compression: str) -> int:
        half = pa.list_(pa.float16())
        sampled = [np.array(c.logprobs, np.float16) for c in completions]
        after = [trained[n].astype(np.float16) for n in range(len(completions))]
        columns = {
            "ids": pa.array([c.ids for c in completions], pa.list_(pa.int32())),
            "sampled_logprobs": pa.array(sampled, half),
            "trained_logprobs": pa.array(after, half),
        }
        file = io.BytesIO()
        pq.write_table(pa.table(columns), file, compression=compression)
        return len(file.getvalue())

    ways: dict[str, Callable[[], int]] = {
        **{f"JSON lines, gzip {n}": (lambda n=n: as_lines(n)) for n in (1, 4, 6, 9)},
        **{f"parquet, {c}": (lambda c=c: as_parquet(c)) for c in ("snappy", "zstd")},
    }
    for name, way in ways.items():
        way()
        start = time.process_time()
        size = way()
        passed = time.process_time() - start
        yield record_of(
            name,
            form=True,
            milliseconds=round(passed * 1000, 1),
            mb_per_1000=round(size / len(completions) / 1000, 3),
        )


def table(records: list[dict[str, Any]]) -> list[str]:
    rows = [
        "| machine | what | completions x tokens | ms in all | ms the run waits | update s "
        "| share of it | 2 % of an update at, tokens/s | MB for 1,000 |",
        "|---" * 9 + "|",
    ]
    for r in (r for r in records if not r.get("form")):
        waited, update = r.get("milliseconds_waited", r["milliseconds"]), r["seconds_update"]
        seconds = waited / 1000
        share = f"{seconds / update:.2%}" if update else ""
        fastest = r["completions"] * r["tokens"] / (50 * seconds)
        rows.append(
            f"| {r['device']} | {r['what']} | {r['completions']} x {r['tokens']} "
            f"| {r['milliseconds']} | {waited} | {update or ''} | {share} "
            f"| {fastest:,.0f} | {r['mb_per_1000']} |"
        )
    return rows


def table_of_formats(records: list[dict[str, Any]]) -> list[str]:
    return [
        "| machine | tokens of an update in | ms | MB for 1,000 |",
        "|---" * 4 + "|",
        *(
            f"| {r['device']} | {r['what']} | {r['milliseconds']} | {r['mb_per_1000']} |"
            for r in records
            if r.get("form")
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--tokenizer", help="a folder or a hub name, for completions of 200 tokens")
    add("--formats", action="store_true", help="compare ways to write their tokens")
    add("--updates", type=int, default=20)
    add("--table-only", action="store_true", help="rewrite RESULTS.md from the records")
    arguments = parser.parse_args()
    if not arguments.table_only:
        if arguments.tokenizer:
            record, *given = of_vocabulary(arguments.tokenizer, arguments.updates)
            found = [record, *(formats(*given) if arguments.formats else ())]
        else:
            found = [of_tiny_math(arguments.updates)]
        for record in found:
            results.append(RECORDS, record)
            print(record)
    records = results.read(RECORDS)
    results.write_section("completions-cost", table(records))
    results.write_section("completions-formats", table_of_formats(records))


if __name__ == "__main__":
    main()
