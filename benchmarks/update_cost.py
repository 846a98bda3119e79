"""What one update costs: seconds by stage and peak memory, beside the plan of `--dry-run`.

    uv run python benchmarks/update_cost.py --shape 1.5b --train-type full --set num_generations=16

Random weights in a named shape cost what trained ones do. Stop tokens are off, so that every
completion has max_new_tokens tokens. Each call appends one JSON record to
benchmarks/records/update_cost.jsonl, and rewrites the table in benchmarks/RESULTS.md.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import results  # noqa: E402
from docs.readme_tables import QWEN  # noqa: E402
from utils.base.script import load_script  # noqa: E402
from utils.device import runtime  # noqa: E402

RECORDS = ROOT / "benchmarks/records/update_cost.jsonl"
SHAPES = {
    "tiny": {**QWEN, "hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 256}
    | {"num_attention_heads": 4, "vocab_size": 512},
    "16k": {**QWEN, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128}
    | {"num_attention_heads": 4, "vocab_size": 16_384},  # logits are most of it
    "0.5b": {**QWEN, "hidden_size": 896, "num_hidden_layers": 24, "intermediate_size": 4864}
    | {"num_attention_heads": 14},
    "1.5b": QWEN,
    "3b": {**QWEN, "hidden_size": 2048, "num_hidden_layers": 36, "intermediate_size": 11008}
    | {"num_attention_heads": 16},
}


def write_model(folder: Path, shape: str, dtype: str, bits: int) -> None:
    """A folder with random weights of the shape and the tokenizer of models/tiny-math."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten
    from mlx_lm.utils import _get_classes

    config: dict[str, Any] = {**SHAPES[shape], "rms_norm_eps": 1e-6, "rope_theta": 1e6}
    config |= {"max_position_embeddings": 4096, "eos_token_id": 2}
    config |= {"architectures": ["Qwen2ForCausalLM"]}  # for PyTorch tools
    model_class, arguments = _get_classes(config)
    mx.random.seed(0)
    model = model_class(arguments.from_dict(config))
    model.set_dtype(getattr(mx, dtype))
    if bits:
        nn.quantize(model, group_size=64, bits=bits)
        config["quantization"] = {"group_size": 64, "bits": bits}
    weights: Any = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((ROOT / "models/tiny-math" / name).read_bytes())


def write_questions(folder: Path, count: int) -> None:
    """Questions of about 150 tokens for the tokenizer of models/tiny-math."""
    rows = (ROOT / "models/tiny-math/train.jsonl").read_text(encoding="utf-8").splitlines()
    for split in ("train", "test"):
        questions = [
            " ".join(json.loads(rows[(n * 4 + i) % len(rows)])["question"] for i in range(4))
            for n in range(count)
        ]
        lines = [json.dumps({"question": q, "answer": "#### 1"}) for q in questions]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def reward(completions: list, **_: Any) -> list[float]:
    """Any values with variance: what they say does not change the cost."""
    return [hash(c[0]["content"]) % 97 / 97 for c in completions]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    import mlx.core as mx

    grpo = load_script()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder, arguments.shape, arguments.dtype, arguments.bits)
        write_questions(folder, 64)
        overrides = [f"model_name={folder}", f"dataset={folder}", f"output_dir={folder}/out"]
        overrides += [f"train_type={arguments.train_type}", "stop_strings=[]", "eval_samples=0"]
        overrides += ['system_prompt=""', *arguments.set]
        preset = str(ROOT / "configs/default.toml")
        trainer = grpo.build_trainer(grpo.read_config(preset, overrides), "")
    trainer.reward_funcs = {"reward": reward}
    trainer.sampler.stop.eos_ids = set()  # every completion has full length
    records = []
    for step in range(arguments.updates + 1):
        if step == 1:
            mx.reset_peak_memory()
        start = time.perf_counter()
        record = trainer.train_step(trainer.prompts_of_update(step))[-1]
        records.append({**record, "seconds": time.perf_counter() - start})
    return summarize(arguments, trainer, records, mx.get_peak_memory())


class WithoutStop:
    """The tokenizer with no end-of-sequence token, so that every completion has full length."""

    eos_token_ids = frozenset[int]()

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


def summarize(
    arguments: argparse.Namespace, trainer: Any, records: list[dict[str, Any]], peak: int
) -> dict[str, Any]:
    counted = records[1:]  # the first update compiles and fills the cache

    def median(name: str) -> float:
        return round(statistics.median(r[name] for r in counted), 4)

    versions = runtime.provenance(ROOT)
    kept = ("mlx", "mlx-lm", "device", "git_revision")
    return {
        "date": time.strftime("%Y-%m-%d"),
        **{name: versions[name] for name in kept},
        "shape": arguments.shape,
        "dtype": arguments.dtype,
        "bits": arguments.bits,
        "train_type": arguments.train_type,
        "settings": arguments.set,
        "completions": trainer.args.num_generations * len(trainer.prompts_of_update(0)),
        "tokens": trainer.sampling.max_tokens,
        "updates": len(counted),
        "first_seconds": round(records[0]["seconds"], 2),
        "seconds": median("seconds"),
        "seconds_rollout": median("seconds_rollout"),
        "seconds_gradient": median("seconds_gradient"),
        "tokens_per_second": round(median("tokens_per_second")),
        # The check that the figures are of right results: sampler and trainer agree, no NaN.
        "sampler_mismatch": median("sampler_mismatch"),
        "skipped": sum(r["skipped"] for r in records),
        "peak_gb": round(peak / 1e9, 2),
        "plan_gb": round(trainer.memory.plan.peak / 1e9, 2),
        "plan": dataclasses.asdict(trainer.memory.plan),
    }


def table(records: list[dict[str, Any]]) -> list[str]:
    rows = [
        "| machine | shape | training | completions x tokens | settings | rollout tok/s "
        "| rollout s | gradient s | update s | peak GB | plan GB | mismatch |",
        "|---" * 12 + "|",
    ]
    for r in records:
        weights = f"{r['bits']}-bit" if r["bits"] else r["dtype"]
        rows.append(
            f"| {r['device']} | {r['shape']} {weights} | {r['train_type']} "
            f"| {r['completions']} x {r['tokens']} | {', '.join(r['settings'])} "
            f"| {r['tokens_per_second']:,} | {r['seconds_rollout']} | {r['seconds_gradient']} "
            f"| {r['seconds']} | {r['peak_gb']} | {r['plan_gb']} "
            f"| {r['sampler_mismatch']} |"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="tiny")
    add("--train-type", choices=("full", "lora", "dora"), default="full")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    add("--bits", type=int, default=0, help="quantize the base (0: not)")
    add("--updates", type=int, default=3, help="measured updates after one that warms up")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the trainer")
    add("--table-only", action="store_true", help="rewrite RESULTS.md from the records")
    arguments = parser.parse_args()
    if not arguments.table_only:
        record = measure(arguments)
        results.append(RECORDS, record)
        print({k: v for k, v in record.items() if k != "plan"})
    results.write_section("update-cost", table(results.read(RECORDS)))


if __name__ == "__main__":
    main()
