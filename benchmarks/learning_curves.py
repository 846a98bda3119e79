"""Train models/tiny-math with configs/tiny_math.toml for several seeds, and draw what it learnt.

    uv run python benchmarks/learning_curves.py                 three seeds, then table and picture
    uv run python benchmarks/learning_curves.py --draw-only     from the records of an earlier run

Each seed is one run of the command that README shows, timed from outside. Records go to
benchmarks/records/learning_curves.jsonl, the picture to docs/learning_curves.png, the table of
format, arithmetic and exact match into models/tiny-math/README.md, its short form into README.md.
"""

import argparse
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import results  # noqa: E402
from utils.base.script import load_script  # noqa: E402
from utils.device import runtime  # noqa: E402

RECORDS = ROOT / "benchmarks/records/learning_curves.jsonl"
PICTURE = ROOT / "docs/learning_curves.png"
MODEL_README = ROOT / "models/tiny-math/README.md"
CONFIG = "configs/tiny_math.toml"


def train(seed: int, output_dir: Path) -> float:
    """Run the README's command for one seed; seconds it took as a whole process."""
    command = [sys.executable, "mlx-grpo.py", "--config", CONFIG]
    command += ["--set", f"seed={seed}", "--set", f"output_dir={output_dir}"]
    start = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True)
    return time.perf_counter() - start


def grade(model: Path, seed: int, output_dir: Path) -> dict[str, dict[str, float]]:
    """Format, arithmetic and exact match on the test questions, greedy and at temperature 1."""
    from utils.data.order import subset
    from utils.pretraining import tiny_math

    grpo = load_script()
    overrides = [f"model_name={model}", f"seed={seed}", f"output_dir={output_dir}"]
    trainer = grpo.build_trainer(grpo.read_config(str(ROOT / CONFIG), overrides), "")
    figures = {}
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        rows = subset(trainer.eval_dataset, 0)
        responses = trainer.answers(rows, temperature=temperature)
        for part, wanted in (("all", (True, False)), ("seen", (False,)), ("held out", (True,))):
            grades = [
                tiny_math.grade(response.text.removeprefix(tiny_math.PREFIX), int(row["answer"]))
                for row, response in zip(rows, responses, strict=True)
                if row["held_out"] in wanted
            ]
            figures[f"{name}, {part}"] = summary(grades)
    return figures


def summary(grades: list[Any]) -> dict[str, float]:
    equations = sum(g.equations for g in grades)
    return {
        "questions": len(grades),
        "format": sum(g.well_formed for g in grades) / len(grades),
        "arithmetic": sum(g.equations_right for g in grades) / max(equations, 1),
        "exact match": sum(g.exact for g in grades) / len(grades),
    }


def curve(output_dir: Path) -> dict[str, list]:
    """From the log: greedy exact match of evaluations, sampled exact match of training rollouts."""
    records = results.read(output_dir / "training_log.jsonl")
    test = [(r["update"], r["em"]) for r in records if r.get("split") == "test"]
    rollouts = [(r["update"], r["reward/correctness"] / 2) for r in records if "loss" in r]
    return {"greedy": test, "rollouts": rollouts}


def measure(seeds: list[int]) -> None:
    before = grade(ROOT / "models/tiny-math", 0, ROOT / "outputs/learning-curves/before")
    for seed in seeds:
        output_dir = Path(f"outputs/learning-curves/seed-{seed}")
        seconds = train(seed, output_dir)
        after = grade(ROOT / output_dir / "final", seed, output_dir / "after")
        record = {
            "date": time.strftime("%Y-%m-%d"),
            "seed": seed,
            "seconds": round(seconds, 1),
            "cpus": os.cpu_count(),
            "machine": platform.machine(),
            **{k: v for k, v in runtime.provenance(ROOT).items() if k != "platform"},
            "before": before,
            "after": after,
            "curve": curve(ROOT / output_dir),
        }
        results.append(RECORDS, record)


def newest_records() -> list[dict[str, Any]]:
    """The last record of each seed."""
    return [*{record["seed"]: record for record in results.read(RECORDS)}.values()]


def draw(records: list[dict[str, Any]]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(figsize=(8, 4.2), dpi=150)
    for color, record in zip(("tab:blue", "tab:orange", "tab:green"), records, strict=False):
        updates, greedy = zip(*record["curve"]["greedy"], strict=True)
        seed, minutes = record["seed"], record["seconds"] / 60
        label = f"seed {seed}, {minutes:.1f} minutes"
        axes.plot(updates, greedy, "o-", color=color, label=label, markersize=4)
        steps, sampled = zip(*record["curve"]["rollouts"], strict=True)
        width = 8  # a rollout is 64 completions: smooth over 8 of them
        smooth = np.convolve(sampled, np.ones(width) / width, mode="valid")
        axes.plot(steps[width - 1 :], smooth, "--", color=color, linewidth=1.2)
    axes.plot([], [], "--", color="gray", label="rollouts on training questions, temperature 1")
    axes.set(xlabel="optimizer update", ylabel="exact match", ylim=(0, 1.03))
    axes.set_title("models/tiny-math: greedy on 600 test questions (solid), rollouts (dashed)")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(PICTURE)


def table(records: list[dict[str, Any]]) -> list[str]:
    """Before and after RL, one line per way of answering and part of the test set."""
    rows = [
        "| test questions | format | arithmetic | exact match |",
        "|---|---|---|---|",
    ]
    for name, before in records[0]["before"].items():
        cells = []
        for key in ("format", "arithmetic", "exact match"):
            after = " / ".join(f"{r['after'][name][key]:.3f}" for r in records)
            cells.append(f"{before[key]:.3f} -> {after}")
        rows.append(f"| {name} ({before['questions']}) | {' | '.join(cells)} |")
    seeds = ", ".join(str(r["seed"]) for r in records)
    minutes = ", ".join(f"{r['seconds'] / 60:.1f}" for r in records)
    return [
        "",
        f"Before -> after `{CONFIG}`, seeds {seeds} ({minutes} minutes on "
        f"{records[0]['cpus']} cores; `benchmarks/learning_curves.py`; sampled: temperature 1, one "
        "completion per question):",
        "",
        *rows,
        "",
    ]


def short_table(records: list[dict[str, Any]]) -> list[str]:
    rows = [
        "| seed | greedy, before -> after | sampled, before -> after | time |",
        "|---|---|---|---|",
    ]
    for r in records:
        cells = [
            f"{r['before'][part]['exact match']:.3f} -> {r['after'][part]['exact match']:.3f}"
            for part in ("greedy, all", "sampled, all")
        ]
        rows.append(f"| {r['seed']} | {' | '.join(cells)} | {r['seconds'] / 60:.1f} min |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated (default: 0,1,2)")
    parser.add_argument("--draw-only", action="store_true", help="use the existing records")
    arguments = parser.parse_args()
    if not arguments.draw_only:
        measure([int(seed) for seed in arguments.seeds.split(",")])
    records = newest_records()
    draw(records)
    results.write_section("rl-results", table(records), MODEL_README)
    results.write_section("learning", short_table(records), ROOT / "README.md")
    print("\n".join(table(records)))


if __name__ == "__main__":
    main()
