"""The plan of `--dry-run` beside the peaks that MLX measures, by phase of the update.

    uv run python benchmarks/plan_accuracy.py               the cases for this machine
    uv run python benchmarks/plan_accuracy.py --only tiny   those of one shape
    uv run python benchmarks/plan_accuracy.py --table-only

Random weights in a named shape, prompts of about 150 tokens, stop tokens off. Appends a JSON record
for each case to benchmarks/records/plan_accuracy.jsonl: what was planned for, and the peaks. The
table in benchmarks/RESULTS.md plans again with the present code, and so does tests/memory/
test_plan.py.
"""

import argparse
import dataclasses
import gc
import json
import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import update_cost  # noqa: E402

from benchmarks import results  # noqa: E402
from utils.base.script import load_script  # noqa: E402
from utils.device import runtime  # noqa: E402
from utils.memory import plan as memory_plan  # noqa: E402
from utils.memory import suggestions  # noqa: E402
from utils.model import shape as model_shape  # noqa: E402

RECORDS = ROOT / "benchmarks/records/plan_accuracy.jsonl"
SETTINGS = ("max_new_tokens=256", "num_generations=16", "quantize_for_rollouts=false")
LONG = ("max_new_tokens=512", "num_generations=16", "gradient_accumulation_steps=1")
CHECKPOINTED = "gradient_checkpointing=true"
# Shape, bits of the base (0: bfloat16), training, settings.
GPU_CASES: list[tuple[str, int, str, tuple[str, ...]]] = [
    ("1.5b", 0, "full", SETTINGS),
    ("1.5b", 4, "lora", (*LONG, CHECKPOINTED)),
    ("0.5b", 0, "full", SETTINGS),
    ("0.5b", 0, "lora", SETTINGS),
    ("tiny", 0, "full", SETTINGS),
    ("tiny", 0, "lora", SETTINGS),
    ("1.5b", 0, "lora", SETTINGS),
    ("1.5b", 0, "full", (*SETTINGS, CHECKPOINTED, "micro_batch_tokens=4000")),
    ("1.5b", 4, "lora", (*SETTINGS[:2], "micro_batch_tokens=4000")),
    ("1.5b", 4, "lora", (*SETTINGS[:2], CHECKPOINTED)),
    ("1.5b", 0, "full", (*SETTINGS, "micro_batch_tokens=6000", "use_compile=false")),
    ("0.5b", 0, "full", (*SETTINGS, "master_weights=false", "moment_bits=8")),
    ("1.5b", 4, "lora", (*LONG, CHECKPOINTED, "memory_limit_gb=6", "cache_limit_gb=0.5")),
]
SMALL = ("max_new_tokens=64", "num_generations=4", "quantize_for_rollouts=false")
CPU_CASES: list[tuple[str, int, str, tuple[str, ...]]] = [
    ("tiny", 0, "full", SMALL),
    ("tiny", 0, "lora", SMALL),
    ("tiny", 0, "full", (*SMALL, CHECKPOINTED)),
    ("tiny", 0, "full", (*SMALL, "micro_batch_tokens=600")),
    ("tiny", 4, "lora", (*SMALL[:2], CHECKPOINTED)),
    ("16k", 0, "full", SMALL),
    ("16k", 0, "full", (*SMALL, "entropy_coeff=0.01")),
    ("16k", 0, "full", (*SMALL, "top_entropy_quantile=0.5")),
    ("16k", 0, "lora", (*SMALL, "entropy_coeff=0.01")),
]


def measure(folder: Path, shape: str, bits: int, train_type: str, settings: tuple) -> dict:
    """Four updates of one case; the peaks are the largest: the queue is not always full."""
    import mlx.core as mx

    grpo = load_script()
    cpu = mx.default_device() == mx.cpu
    if not folder.exists():
        folder.mkdir()
        update_cost.write_model(folder, shape, "float32" if cpu else "bfloat16", bits)
        update_cost.write_questions(folder, 64)
        gc.collect()
        mx.clear_cache()
    overrides = [f"model_name={folder}", f"dataset={folder}", f"output_dir={folder}/out"]
    overrides += [f"train_type={train_type}", "stop_strings=[]", "eval_samples=0"]
    overrides += ['system_prompt=""', *(["use_compile=false"] if cpu else []), *settings]
    preset = str(ROOT / "configs/default.toml")
    trainer = grpo.build_trainer(grpo.read_config(preset, overrides), "")
    trainer.reward_funcs = {"reward": update_cost.reward}
    trainer.sampler.stop.eos_ids = set()  # every completion has full length
    resident, seconds = mx.get_active_memory(), []
    peaks: dict[str, int] = {}
    for step in range(4):
        start = time.perf_counter()
        trainer.train_step(trainer.prompts_of_update(step))
        seconds.append(round(time.perf_counter() - start, 2))
        trainer.memory.meter.start("other")
        for phase, peak in trainer.memory.meter.peaks.items():
            peaks[phase] = max(peaks.get(phase, 0), peak)
    versions = runtime.provenance(ROOT)
    return {
        "date": time.strftime("%Y-%m-%d"),
        **{name: versions[name] for name in ("mlx", "mlx-lm", "device", "git_revision")},
        "case": {"shape": shape, "bits": bits, "train_type": train_type, "settings": settings},
        "model": dataclasses.asdict(trainer.memory.plan.shape),
        "planned_for": dataclasses.asdict(trainer.memory.plan.demand),
        "plan": trainer.memory.plan.by_phase,
        "peaks": {name: peaks[name] for name in ("rollout", "gradient")},
        "cached": trainer.memory.meter.cached,
        "resident": resident,
        "seconds": seconds,
    }


def plan_of(record: dict[str, Any]) -> memory_plan.Plan:
    """The plan of a recorded case by the present code."""
    shape = model_shape.ModelShape(**record["model"])
    known = {field.name for field in dataclasses.fields(memory_plan.Demand)}
    wanted = {name: x for name, x in record["planned_for"].items() if name in known}
    return suggestions.planned(shape, **wanted)


def measured(record: dict[str, Any], plan: memory_plan.Plan) -> dict[str, int]:
    """Peaks by phase, less what earlier cases left: once, all ran in one process."""
    left = max(0, record["resident"] - plan.resident)
    return {name: peak - left for name, peak in record["peaks"].items()}


def table(records: list[dict[str, Any]]) -> list[str]:
    rows = [
        "| machine | shape | training | settings | rollout GB: plan, measured "
        "| gradient GB: plan, measured | plan / measured | cached GB | update s |",
        "|---" * 9 + "|",
    ]
    for record in records:
        case, plan = record["case"], plan_of(record)
        peaks = measured(record, plan)
        cells = [f"{plan.by_phase[name] / 1e9:.3g}, {peaks[name] / 1e9:.3g}" for name in peaks]
        ratio = plan.peak / max(peaks.values())
        weights = f"{case['bits']}-bit" if case["bits"] else "bfloat16"
        if record["device"].startswith(("AMD", "Intel")):
            weights = weights.replace("bfloat16", "float32")
        rows.append(
            f"| {record['device']} | {case['shape']} {weights} | {case['train_type']} "
            f"| {', '.join(case['settings'])} | {cells[0]} | {cells[1]} | {ratio:.2f} "
            f"| {record['cached'] / 1e9:.3g} | {record['seconds'][-1]} |"
        )
    return rows


def newest() -> list[dict[str, Any]]:
    """The last record of each case on each device, in the order of their first ones."""
    records: dict[str, dict[str, Any]] = {}
    for record in results.read(RECORDS):
        records[json.dumps([record["device"], record["case"]])] = record
    return list(records.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--only", help="cases of one shape")
    add("--bits", type=int, help="cases of one kind of base: 4, or 0 for bfloat16")
    add("--seconds", type=float, default=1e9, help="start no case after so many seconds")
    add("--table-only", action="store_true", help="rewrite RESULTS.md from the records")
    arguments = parser.parse_args()
    if not arguments.table_only:
        run(arguments.only, arguments.bits, arguments.seconds)
    results.write_section("plan-accuracy", table(newest()))


def run(only: str | None, wanted: int | None, seconds: float) -> None:
    """Each case in a process of its own: limits stay set, and memory may stay held."""
    import mlx.core as mx

    start, cpu = time.perf_counter(), mx.default_device() == mx.cpu
    alone: dict[str, Any] = {"mp_context": multiprocessing.get_context("spawn")}
    alone["max_tasks_per_child"] = 1
    with tempfile.TemporaryDirectory() as root, ProcessPoolExecutor(1, **alone) as pool:
        for shape, bits, train_type, settings in CPU_CASES if cpu else GPU_CASES:
            if (only and shape != only) or (wanted is not None and bits != wanted):
                continue
            if time.perf_counter() - start > seconds:
                continue
            folder = Path(root) / f"{shape}-{bits}"
            record = pool.submit(measure, folder, shape, bits, train_type, settings).result()
            results.append(RECORDS, record)
            shown = ("case", "plan", "peaks", "cached", "resident", "seconds")
            print(json.dumps({name: record[name] for name in shown}), flush=True)


if __name__ == "__main__":
    main()
