"""Learning curves of this project and of TRL's GRPOTrainer: same model, prompts and settings.

    uv run python benchmarks/trl_curves.py                 three seeds of both, table and picture
    uv run python benchmarks/trl_curves.py --draw-only     from the records of earlier runs

Ours is the README's command on configs/tiny_math.toml. TRL trains models/tiny-math in PyTorch on
the CPU with the values of that preset: the same prompts (the same ids, checked) in the same order,
the same learning rate at each update, AdamW, clipping, group, temperature, reward functions (those
of mlx-grpo.py) and stop token (`</answer>` is one token of this tokenizer). TRL's checkpoints are
then scored by our evaluator: greedy exact match on the same 600 test questions. Records go to
benchmarks/records/trl_curves.jsonl, the picture to docs/trl_curves.png.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import results  # noqa: E402

RECORDS = ROOT / "benchmarks/records/trl_curves.jsonl"
PICTURE = ROOT / "docs/trl_curves.png"
MODEL = ROOT / "models/tiny-math"
OUTPUT = ROOT / "outputs/trl-curves"
EVERY = 10  # updates between evaluations, as in the preset
MOST_EM, MOST_AREA = 0.05, 0.10  # final exact match within, area under the curve within


def our_trainer(model: Path, seed: int, output_dir: Path) -> Any:
    from benchmarks.learning_curves import CONFIG
    from utils.base.script import load_script

    grpo = load_script()
    overrides = [f"model_name={model}", f"seed={seed}", f"output_dir={output_dir}"]
    return grpo.build_trainer(grpo.read_config(str(ROOT / CONFIG), overrides), "")


def job_for_trl(seed: int, folder: Path) -> dict[str, Any]:
    """What our run of this seed would do: prompts of each update, learning rates, settings."""
    trainer = our_trainer(MODEL, seed, folder)
    a, rows = trainer.args, trainer.train_dataset
    updates = [trainer.prompts_of_update(u) for u in range(trainer.total_updates)]
    ids = [rows[i]["prompt_ids"] for update in updates for i in update]
    return {
        "seed": seed,
        "folder": str(folder),
        "ids": ids,
        "texts": [trainer.tokenizer.decode(row) for row in ids],
        "answers": [rows[i]["answer"] for update in updates for i in update],
        "lr": [trainer.lr_schedule(u + 1) for u in range(len(updates))],
        "betas": [a.adam_beta1, a.adam_beta2],
        "weight_decay": a.weight_decay,
        "reward_funcs": a.reward_funcs,
        "prefix": a.reasoning_prefix,
        "stop_strings": a.stop_strings,
        "config": {
            "num_generations": a.num_generations,
            "per_device_train_batch_size": len(updates[0]) * a.num_generations,
            "gradient_accumulation_steps": 1,
            "max_steps": len(updates),
            "max_completion_length": trainer.sampling.max_tokens,
            "temperature": a.temperature,
            "loss_type": a.loss_type,
            "epsilon": a.clip_eps,
            "beta": a.kl_coeff,
            "num_iterations": a.num_iterations,
            "max_grad_norm": a.max_grad_norm,
            "scale_rewards": "group",
        },
    }


def train_trl(job: dict[str, Any]) -> dict[str, Any]:
    """Runs in TRL's environment: train, save a model folder every EVERY updates."""
    import torch
    from datasets import Dataset
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(1)  # measured: two are slower on a model this small
    tokenizer = PreTrainedTokenizerFast.from_pretrained(MODEL)
    assert tokenizer(job["texts"])["input_ids"] == job["ids"]
    stop_ids = [tokenizer.eos_token_id]
    for text in job["stop_strings"]:
        stop_ids += tokenizer.encode(text)
    assert len(stop_ids) == 1 + len(job["stop_strings"])
    model = LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="sdpa")
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=1.0,
        betas=tuple(job["betas"]),
        eps=1e-8,
        weight_decay=job["weight_decay"],
    )
    rates = [*job["lr"], 0.0]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rates[step])
    sampled: list[float] = []
    folder = Path(job["folder"])
    arguments = GRPOConfig(
        output_dir=str(folder / "trl"),
        seed=job["seed"],
        shuffle_dataset=False,
        generation_kwargs={"eos_token_id": stop_ids},
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **job["config"],
    )
    trainer = GRPOTrainer(
        model=model,
        args=arguments,
        processing_class=tokenizer,
        reward_funcs=[our_rewards(job, tokenizer, stop_ids, sampled)],
        train_dataset=Dataset.from_dict({"prompt": job["texts"], "answer": job["answers"]}),
        optimizers=(optimizer, schedule),
        callbacks=[checkpoint_writer(folder)],
    )
    trainer.eos_token_ids = stop_ids
    start = time.perf_counter()
    trainer.train()
    return {"seconds": time.perf_counter() - start, "sampled": sampled}


def our_rewards(job: dict[str, Any], tokenizer: Any, stop_ids: list[int], sampled: list) -> Any:
    """The sum of mlx-grpo.py's reward functions on the text that it would read."""
    os.environ["MLX_GRPO_BLAS"] = "none"
    from utils.base.script import load_script

    grpo = load_script()
    functions = [grpo.REWARDS[name] for name in job["reward_funcs"]]
    ends = SimpleNamespace(decode=tokenizer.decode, eos_token_ids=stop_ids[:1])
    stop = grpo.StopRule(ends, job["stop_strings"])

    def reward(completion_ids: list[list[int]], answer: list[str], **_: Any) -> list[float]:
        texts = [job["prefix"] + stop.text(ids) for ids in completion_ids]
        completions = [[{"role": "assistant", "content": text}] for text in texts]
        columns = [function(completions=completions, answer=answer) for function in functions]
        right = grpo.correctness_reward_func(completions, answer)
        sampled.append(sum(right) / len(right) / 2)
        return [sum(values) for values in zip(*columns, strict=True)]

    return reward


def checkpoint_writer(folder: Path) -> Any:
    """A callback that saves weights under the names that mlx-lm and transformers share."""
    from safetensors.torch import save_file
    from transformers import TrainerCallback

    class Writer(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % EVERY:
                return
            place = folder / f"checkpoint-{state.global_step}"
            place.mkdir(parents=True, exist_ok=True)
            for file in MODEL.iterdir():
                if file.suffix in (".json", ".jinja"):
                    (place / file.name).write_bytes(file.read_bytes())
            weights = kwargs["model"].state_dict()
            weights = {k: v.contiguous() for k, v in weights.items() if k != "lm_head.weight"}
            save_file(weights, place / "model.safetensors", metadata={"format": "mlx"})

    return Writer()


def measure_trl(seed: int, python: Path) -> dict[str, Any]:
    """Train with TRL for one seed, then score its checkpoints with our evaluator."""
    folder = OUTPUT / f"trl-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    job = job_for_trl(seed, folder)
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    script = str(ROOT / "benchmarks/trl_curves.py")
    subprocess.run([str(python), script, "--worker", str(folder)], check=True)
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    greedy = []
    for update in range(0, job["config"]["max_steps"] + 1, EVERY):
        model = folder / f"checkpoint-{update}" if update else MODEL
        trainer = our_trainer(model, seed, folder / "evaluation")
        greedy.append((update, trainer.evaluate_em(trainer.eval_dataset)))
    sampled = [(n + 1, em) for n, em in enumerate(result["sampled"])]
    return result | {"greedy": greedy, "rollouts": sampled}


def measure_ours(seed: int) -> dict[str, Any]:
    from benchmarks.learning_curves import curve, train

    folder = OUTPUT / f"ours-{seed}"
    seconds = train(seed, folder)
    return {"seconds": seconds, **curve(folder)}


def measure(tool: str, seed: int, python: Path) -> None:
    from utils.device import runtime

    result = measure_ours(seed) if tool == "ours" else measure_trl(seed, python)
    versions = runtime.provenance(ROOT)
    record = {
        "date": time.strftime("%Y-%m-%d"),
        "tool": tool,
        "seed": seed,
        "seconds": round(result["seconds"], 1),
        "greedy": result["greedy"],
        "rollouts": result["rollouts"],
        "versions": result.get("versions")
        or {k: versions[k] for k in ("mlx", "mlx-lm", "git_revision")},
    }
    results.append(RECORDS, record)


def area(curve: list[tuple[int, float]]) -> float:
    """Mean height of a curve (trapezoids)."""
    total = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(curve))
    return total / (curve[-1][0] - curve[0][0])


def newest_records() -> dict[str, list[dict[str, Any]]]:
    """The last record of each tool and seed, by tool."""
    newest = {(record["tool"], record["seed"]): record for record in results.read(RECORDS)}
    return {tool: [r for key, r in newest.items() if key[0] == tool] for tool in ("ours", "trl")}


def table(records: dict[str, list[dict[str, Any]]]) -> list[str]:
    rows = [
        "| | seeds | final exact match | area under the greedy curve "
        "| area under the rollout curve |",
        "|---|---|---|---|---|",
    ]
    means: dict[str, list[float]] = {}
    for tool, runs in records.items():
        columns = [
            [run["greedy"][-1][1] for run in runs],
            [area(run["greedy"]) for run in runs],
            [area(run["rollouts"]) for run in runs],
        ]
        means[tool] = [sum(values) / len(values) for values in columns]
        cells = [
            f"{mean:.3f} ({', '.join(f'{v:.3f}' for v in values)})"
            for mean, values in zip(means[tool], columns, strict=True)
        ]
        seeds = ", ".join(str(run["seed"]) for run in runs)
        rows.append(f"| {tool} | {seeds} | {' | '.join(cells)} |")
    ours, trl = means["ours"], means["trl"]
    apart = abs(ours[0] - trl[0])
    ratios = [abs(o / t - 1) for o, t in zip(ours[1:], trl[1:], strict=True)]
    rows.append(
        f"| apart | | {apart:.3f} (at most {MOST_EM}: {said(apart <= MOST_EM)}) "
        f"| {ratios[0]:.1%} (at most {MOST_AREA:.0%}: {said(ratios[0] <= MOST_AREA)}) "
        f"| {ratios[1]:.1%} |"
    )
    versions = {**records["trl"][-1]["versions"], **records["ours"][-1]["versions"]}
    told = ", ".join(f"{k} {v}" for k, v in versions.items() if k != "git_revision")
    return ["", *rows, "", f"Mean over the seeds (each seed). Versions: {told}.", ""]


def said(met: bool) -> str:
    return "met" if met else "not met"


def draw(records: dict[str, list[dict[str, Any]]]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), dpi=130, sharey=True)
    names = {"ours": "MLX-GRPO", "trl": "TRL (PyTorch, CPU)"}
    for (tool, runs), color in zip(records.items(), ("tab:blue", "tab:orange"), strict=True):
        for axes, kind, width in zip(panels, ("greedy", "rollouts"), (1, 8), strict=True):
            curves = []
            for run in runs:
                steps, values = np.array(run[kind]).T
                smooth = np.convolve(values, np.ones(width) / width, mode="valid")
                axes.plot(steps[width - 1 :], smooth, color=color, lw=0.8, alpha=0.45)
                curves.append(smooth)
            mean, places = np.mean(curves, axis=0), steps[width - 1 :]
            axes.plot(places, mean, color=color, lw=2.2, label=f"{names[tool]}, mean")
    panels[0].set(ylabel="exact match", ylim=(0, 1.03), title="greedy, 600 test questions")
    panels[1].set(title="training rollouts, temperature 1 (mean of 8 updates)")
    for axes in panels:
        axes.set(xlabel="optimizer update")
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
    figure.suptitle("models/tiny-math, configs/tiny_math.toml: three seeds of each (thin)")
    figure.tight_layout()
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE)


def work(folder: Path) -> None:
    """`--worker`: train in TRL's environment."""
    from benchmarks.peers import versions

    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    result = train_trl(job)
    result["versions"] = versions("trl", "torch", "transformers")
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tools", default="ours,trl", help="comma-separated (default: ours,trl)")
    add("--seeds", default="0,1,2", help="comma-separated (default: 0,1,2)")
    add("--python", default="", help="interpreter that has TRL (default: uv makes one)")
    add("--draw-only", action="store_true", help="use the existing records")
    add("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker)
        return
    from benchmarks.compare import environment

    if not arguments.draw_only:
        python = Path(arguments.python) if arguments.python else environment("trl")
        for seed in arguments.seeds.split(","):
            for tool in arguments.tools.split(","):
                measure(tool, int(seed), python)
    records = newest_records()
    if all(records.values()):
        draw(records)
        results.write_section("trl-curves", table(records))
        print("\n".join(table(records)))


if __name__ == "__main__":
    main()
