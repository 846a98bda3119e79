"""Train models/tiny-math with every objective, and tell how far their gradients are apart.

    uv run python benchmarks/objectives_learning.py                   all, one after the other
    uv run python benchmarks/objectives_learning.py gspo rloo         some of them
    uv run python benchmarks/objectives_learning.py --far             further from the old policy
    uv run python benchmarks/objectives_learning.py --gradients       only the differences
    uv run python benchmarks/objectives_learning.py --table-only      RESULTS.md from the records

Each run is configs/tiny_math.toml with the objective and num_iterations = 2, so that every other
update is off-policy and clips or gates act; the budget in updates is the preset's. With --far it is
ten times the learning rate and num_iterations = 4, where objectives part. Records go to
benchmarks/records/objectives_learning.jsonl.
"""

import argparse
import dataclasses
import json
import math
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import results  # noqa: E402
from utils.base.script import load_script  # noqa: E402
from utils.device import runtime  # noqa: E402

RECORDS = ROOT / "benchmarks/records/objectives_learning.jsonl"
CONFIG = "configs/tiny_math.toml"
ENOUGH = 0.75  # exact match on the test questions that an objective is to reach
LOSSES = {
    "grpo": {},
    "bnpo": {"loss_type": "bnpo"},
    "dapo": {"loss_type": "dapo"},
    "dr_grpo": {"loss_type": "dr_grpo", "advantage_estimator": "dr_grpo"},
    "gspo": {"loss_type": "gspo"},
    "gspo-token": {"loss_type": "gspo", "importance_sampling_level": "token"},
    "gmpo": {"loss_type": "gmpo"},
    "cpgd": {"advantage_estimator": "cpgd"},
    "cispo": {"loss_type": "cispo"},
    "sapo": {"loss_type": "sapo"},
    "reinforce": {"loss_type": "reinforce"},
}
FAR = (*LOSSES, "grpo, two-sided", "grpo, wide clip", "cispo, cap 1.2")  # where the clip matters
ESTIMATORS = ("batch", "rloo", "reinforce", "reinforce_baseline", "gdpo")
OBJECTIVES: dict[str, dict[str, str]] = {
    **LOSSES,
    **{f"grpo, {name} advantages": {"advantage_estimator": name} for name in ESTIMATORS},
    "grpo, two-sided": {"delta": "1.5"},
    "grpo, wide clip": {"clip_eps": "0.9", "clip_eps_high": "100"},
    "cispo, cap 1.2": {"loss_type": "cispo", "clip_eps_high": "0.2"},
    "grpo, dynamic sampling": {"dynamic_sampling": "3"},
    "grpo, k2 in the loss": {"kl_coeff": "0.01", "kl_estimator": "k2"},
    "grpo, k1 in the reward": {
        "kl_coeff": "0.01",
        "kl_estimator": "k1",
        "kl_placement": "reward",
    },
}


def train(name: str, far: bool) -> dict[str, Any]:
    """One run; its record."""
    output_dir = Path("outputs/objectives") / (name.replace(", ", "-").replace(" ", "-"))
    settings = {"num_iterations": "2", "eval_steps": "0", **OBJECTIVES[name]}
    if far:
        settings |= {"num_iterations": "4", "learning_rate": "2e-4"}
        output_dir = output_dir.with_name(output_dir.name + "-far")
    command = [sys.executable, "mlx-grpo.py", "--config", CONFIG]
    for key, value in {**settings, "output_dir": str(output_dir)}.items():
        command += ["--set", f"{key}={value}"]
    start = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    lines = (ROOT / output_dir / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
    log = [json.loads(line) for line in lines]
    updates = [r for r in log if "loss" in r]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "objective": f"{name}, far" if far else name,
        "settings": settings,
        "seconds": round(time.perf_counter() - start, 1),
        "machine": platform.machine(),
        **{k: v for k, v in runtime.provenance(ROOT).items() if k != "platform"},
        "updates": updates[-1]["update"],
        "em": [r["em"] for r in log if r.get("split") == "test"],
        "held_back": mean(r["clip_low"] + r["clip_high"] for r in updates),
        "sampled_em": mean(r["reward/correctness"] / 2 for r in updates[-10:]),
        "resampled": sum(r.get("resampled_prompts", 0.0) for r in updates),
    }


def mean(values: Any) -> float:
    values = list(values)
    return round(math.fsum(values) / len(values), 6)


def gradients() -> dict[str, dict[str, float]]:
    """|g/|g| - h/|h|| of the gradients g of one loss and h of another, off the policy.

    All start from the same weights, rollouts and rewards: grpo makes two updates at the peak
    learning rate, then each loss differentiates the same batch with the same old log-probs. The
    optimizer is blind to the size of a gradient, so that directions are compared.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten

    grpo = load_script()
    output = ROOT / "outputs/objectives/gradients"
    base = ["num_iterations=3", "warmup_ratio=0", f"output_dir={output}", "max_updates=2"]
    trainer = grpo.build_trainer(grpo.read_config(str(ROOT / CONFIG), base), "")
    sampled, anchored, scored = [], [], []

    def keep_batches(*arguments: Any) -> Any:  # what they were made of, and what becomes of them
        sampled[:], anchored[:] = arguments[:1], split(*arguments)
        return anchored

    def keep_scores(*arguments: Any) -> Any:
        scored[:] = arguments[:3]
        return estimate(*arguments)

    split, trainer.micro_batches = trainer.micro_batches, keep_batches
    estimate = grpo.estimate_advantages
    with mock.patch.object(grpo, "estimate_advantages", keep_scores):
        trainer.train_step(trainer.prompts_of_update(0))
    found = {}
    for name, settings in LOSSES.items():
        overrides = [*base, *(f"{key}={value}" for key, value in settings.items())]
        trainer.args = grpo.read_config(str(ROOT / CONFIG), overrides)
        loss_and_grad, total = trainer.make_loss_and_grad(), []
        advantages = estimate(*scored, trainer.args)
        for batch, old in zip(split(*sampled, advantages), anchored, strict=True):
            _, grads = loss_and_grad(dataclasses.replace(batch, old_logprobs=old.old_logprobs))
            total.append(mx.concatenate([g.reshape(-1) for _, g in tree_flatten(grads)]))
            mx.eval(total)
        found[name] = sum(total) / mx.linalg.norm(sum(total))
    return {a: {b: mx.linalg.norm(g - found[b]).item() for b in found} for a, g in found.items()}


def newest_records() -> dict[str, dict[str, Any]]:
    return {r["objective"]: r for r in results.read(RECORDS)}


def table(records: dict[str, dict[str, Any]], suffix: str) -> list[str]:
    rows = [
        "| objective | exact match, greedy | reached 0.75 | sampled, last rollouts | "
        "held back by clip or gate | prompts replaced | machine |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in OBJECTIVES:
        if name + suffix not in records:
            continue
        r = records[name + suffix]
        enough = "yes" if r["em"][-1] >= ENOUGH else "no"
        rows.append(
            f"| {name} | {r['em'][0]:.3f} -> {r['em'][-1]:.3f} | {enough} | "
            f"{r['sampled_em']:.3f} | {r['held_back']:.4%} | {r['resampled']:.0f} | {r['device']} |"
        )
    return rows


def gradient_table(found: dict[str, dict[str, float]]) -> list[str]:
    rows = ["| | " + " | ".join(LOSSES) + " |", "|---" * (1 + len(LOSSES)) + "|"]
    for name, others in found.items():
        rows.append(f"| {name} | " + " | ".join(f"{x:.1e}" for x in others.values()) + " |")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="OBJECTIVE", help=", ".join(OBJECTIVES))
    parser.add_argument("--far", action="store_true", help="ten times the rate, four iterations")
    parser.add_argument("--gradients", action="store_true", help="only the gradients' differences")
    parser.add_argument("--table-only", action="store_true", help="only write RESULTS.md")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in OBJECTIVES]
    if unknown:
        parser.error(f"unknown objective {unknown[0]!r}; known: {', '.join(OBJECTIVES)}")
    if not arguments.table_only:
        if not (arguments.names or arguments.far):
            results.append(RECORDS, {"objective": "gradients", "distance": gradients()})
        names = arguments.names or (FAR if arguments.far else OBJECTIVES)
        for name in [] if arguments.gradients else names:
            record = train(name, arguments.far)
            results.append(RECORDS, record)
            print(name, record["em"], record["held_back"], record["seconds"], flush=True)
    records = newest_records()
    results.write_section("objectives-learning", table(records, ""))
    results.write_section("objectives-far", table(records, ", far"))
    if "gradients" in records:
        rows = gradient_table(records["gradients"]["distance"])
        results.write_section("objectives-gradients", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
