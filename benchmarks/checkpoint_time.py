"""How long a checkpoint takes: write, verify and load, and what share of a run the writing is.

    uv run python benchmarks/checkpoint_time.py --shape 1.5b --train-type full

Random weights in a named shape, on the disk that holds the temporary directory. Writing includes
the checksums and the flush to the disk; the share is that of the default preset, which saves every
`save_steps` batches, with its update timed on the same machine. Each call appends one JSON record
to benchmarks/records/checkpoint_time.jsonl, and rewrites the table in benchmarks/RESULTS.md.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import update_cost  # noqa: E402

from benchmarks import results  # noqa: E402
from utils.base.script import load_script  # noqa: E402
from utils.device import runtime  # noqa: E402
from utils.run import checkpoints, folders  # noqa: E402

RECORDS = ROOT / "benchmarks/records/checkpoint_time.jsonl"


def timed(work: Any, *arguments: Any) -> float:
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    grpo = load_script()
    update_cost.write_model(folder, arguments.shape, arguments.dtype, 0)
    update_cost.write_questions(folder, 64)
    overrides = [f"model_name={folder}", f"dataset={folder}", f"output_dir={folder}/out"]
    overrides += [f"train_type={arguments.train_type}", "stop_strings=[]", "eval_samples=0"]
    overrides += ['system_prompt=""', *arguments.set]
    config = grpo.read_config(str(ROOT / "configs/default.toml"), overrides)
    trainer = grpo.build_trainer(config, "")
    trainer.reward_funcs = {"reward": update_cost.reward}
    updates = [
        timed(trainer.train_step, trainer.prompts_of_update(n)) for n in range(arguments.updates)
    ]
    path = folder / "out" / "checkpoint-1"
    writing = [timed(trainer.save_checkpoint, path) for _ in range(arguments.saves)]
    hashing = [timed(folders.seal, path) for _ in range(arguments.saves)]
    start = time.perf_counter()
    assert folders.damage(path) is None
    verifying = time.perf_counter() - start
    size = sum(file.stat().st_size for file in path.iterdir())
    loading = timed(checkpoints.load, path, trainer)
    seconds = statistics.median(writing)
    between = config.save_steps / config.gradient_accumulation_steps
    versions = runtime.provenance(ROOT)
    return {
        "date": time.strftime("%Y-%m-%d"),
        **{name: versions[name] for name in ("mlx", "device", "git_revision")},
        **{"shape": arguments.shape, "dtype": arguments.dtype},
        **{"train_type": arguments.train_type, "settings": arguments.set},
        "gb": round(size / 1e9, 2),
        "seconds_write": round(seconds, 2),
        "seconds_checksums": round(statistics.median(hashing), 2),
        "seconds_verify": round(verifying, 2),
        "seconds_load": round(loading, 2),
        "seconds_update": round(updates[-1], 2) if updates else None,
        "updates_between": between,
        "share": round(seconds / (between * updates[-1]), 4) if updates else None,
        "disk_gb_free": round(shutil.disk_usage(folder).free / 1e9),
    }


def table(records: list[dict[str, Any]]) -> list[str]:
    rows = [
        "| machine | shape | training | GB | write s | of it checksums s | verify s | load s "
        "| update s | share of a run |",
        "|---" * 10 + "|",
    ]
    for r in records:
        share = "" if r["share"] is None else f"{r['share']:.2%}"
        rows.append(
            f"| {r['device']} | {r['shape']} {r['dtype']} | {r['train_type']} | {r['gb']} "
            f"| {r['seconds_write']} | {r['seconds_checksums']} | {r['seconds_verify']} "
            f"| {r['seconds_load']} | {r['seconds_update'] or ''} | {share} |"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--shape", choices=update_cost.SHAPES, default="tiny")
    add("--train-type", choices=("full", "lora", "dora"), default="full")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    add("--updates", type=int, default=2, help="updates to time, the last counts (0: none)")
    add("--saves", type=int, default=3, help="checkpoints to time")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the trainer")
    add("--folder", help="on the disk to measure (default: the temporary directory)")
    add("--table-only", action="store_true", help="rewrite RESULTS.md from the records")
    arguments = parser.parse_args()
    if not arguments.table_only:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            record = measure(arguments, Path(folder))
        results.append(RECORDS, record)
        print(json.dumps(record))
    results.write_section("checkpoint-time", table(results.read(RECORDS)))


if __name__ == "__main__":
    main()
