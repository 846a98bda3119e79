"""Ways to take the gradient of one micro-batch: time, peak memory, distance from the plain way.

    uv run python benchmarks/scoring_ways.py --shape 1.5b --groups 1 4

Random weights, prompts of 150 tokens, 16 completions of 256 tokens each. `plain` is what
`token_logprobs` in the script does; `completions` applies the head to completions only, in rows
padded to 512 tokens, where attention has a fused backward pass on CUDA; `shared` reads each prompt
once; `pieces` makes the logits 2^27 at a time and again in the backward pass; `checkpointing`
recomputes the blocks. Each call appends JSON records to benchmarks/records/scoring_ways.jsonl and
rewrites the table in benchmarks/RESULTS.md.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import results  # noqa: E402
from utils.device import runtime  # noqa: E402

runtime.preload_blas()

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import numpy as np  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from benchmarks.update_cost import SHAPES  # noqa: E402
from utils.gradient import agreement, head, micro_batch, packing, shared_prompts  # noqa: E402
from utils.gradient import scorer as scoring  # noqa: E402
from utils.gradient.micro_batch import MicroBatch  # noqa: E402

RECORDS = ROOT / "benchmarks/records/scoring_ways.jsonl"
PROMPT, COMPLETION, EACH = 150, 256, 16
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "completions": {"split": True, "length": 512},
    "shared": {"split": True, "shared": True},
    "shared, pieces": {"split": True, "shared": True, "pieces": True},
    "shared, pieces, checkpointing": {"split": True, "shared": True, "pieces": True}
    | {"checkpointing": True},
}


def make_model(shape: str, dtype: str, checkpointing: bool) -> nn.Module:
    from mlx_lm.utils import _get_classes

    config = {**SHAPES[shape], "rms_norm_eps": 1e-6, "rope_theta": 1e6}
    model_class, arguments = _get_classes({**config, "max_position_embeddings": 4096})
    mx.random.seed(0)
    model = model_class(arguments.from_dict({**config, "max_position_embeddings": 4096}))
    model.set_dtype(getattr(mx, dtype))
    if checkpointing:
        shared_prompts.checkpoint_layers(model)
    mx.eval(model.train().parameters())
    return model


def make_batch(vocabulary: int, groups: int, way: dict[str, Any]) -> MicroBatch:
    random = np.random.default_rng(0)
    pairs = [
        [(prompt, random.integers(3, vocabulary, COMPLETION).tolist()) for _ in range(EACH)]
        for prompt in random.integers(3, vocabulary, (groups, PROMPT)).tolist()
    ]
    batch = agreement.plain_batch([pair for group in pairs for pair in group])
    shapes = packing.Shapes(bucketed=True)
    length = way.get("length", 0)
    if length:
        missing = (0, 0), (0, length + 1 - batch.tokens.shape[1])
        batch.tokens, batch.mask = mx.pad(batch.tokens, missing), mx.pad(batch.mask, missing)
    mask = np.array(batch.mask)
    if way.get("shared"):
        batch.layout = packing.layout_groups(pairs, [[1] * COMPLETION] * len(mask), mask, shapes)
    elif way.get("split"):
        batch.layout = packing.layout_rows(mask, batch.tokens.shape[1], shapes)
    batch.advantages = mx.array(random.normal(size=(groups * EACH, 1)).astype(np.float32))
    return batch


def make_step(model: nn.Module, way: dict[str, Any], compiled: bool) -> Callable:
    from utils.base.script import load_script

    scorer = scoring.Scorer(load_script().token_logprobs, compiled=True)
    scorer.names = head.head_parameters(model)
    scorer.piece, scorer.keep = 2**27, not way.get("pieces")

    def loss(batch: MicroBatch) -> mx.array:
        logprobs, _ = scorer(model, batch, 0.7)
        return -(logprobs * batch.advantages * batch.mask).sum() / batch.mask.sum()

    step = nn.value_and_grad(model, loss)
    return micro_batch.compiled(step, model) if compiled else step


def measure(arguments: argparse.Namespace, name: str, groups: int, compiled: bool) -> dict:
    way = WAYS[name]
    model = make_model(arguments.shape, arguments.dtype, way.get("checkpointing", False))
    batch = make_batch(SHAPES[arguments.shape]["vocab_size"], groups, way)
    step = make_step(model, way, compiled)
    seconds, gradient = [], {}
    for repeat in range(2 + arguments.repeats):
        gradient = {}
        if repeat == 2:
            mx.reset_peak_memory()
        start = time.perf_counter()
        value, grads = step(batch)
        mx.eval(value, grads)
        seconds.append(time.perf_counter() - start)
        gradient, grads = dict(tree_flatten(grads)), None
    return {
        "way": name,
        "rows": groups * EACH,
        "compiled": compiled,
        "ms": round(1e3 * statistics.median(seconds[2:]), 1),
        "peak_gb": round(mx.get_peak_memory() / 1e9, 2),
        "first_seconds": round(seconds[0], 1),
        "loss": round(value.item(), 5),
        "gradient": gradient,
    }


def distance(one: dict[str, mx.array], other: dict[str, mx.array]) -> float:
    """Relative L2 distance of two gradients."""
    pairs = [(a.astype(mx.float32), other[name].astype(mx.float32)) for name, a in one.items()]
    error = sum(mx.square(a - b).sum().item() for a, b in pairs)
    return float((error / sum(mx.square(a).sum().item() for a, _ in pairs)) ** 0.5)


def run(arguments: argparse.Namespace) -> None:
    machine = runtime.provenance(ROOT)
    about = {"date": time.strftime("%Y-%m-%d"), "shape": arguments.shape, "dtype": arguments.dtype}
    about |= {name: machine[name] for name in ("mlx", "mlx-lm", "device", "git_revision")}
    RECORDS.parent.mkdir(exist_ok=True)
    for groups in arguments.groups:
        plain: dict[str, mx.array] = {}
        for name in arguments.ways:
            logits = groups * EACH * (PROMPT + COMPLETION) * SHAPES[arguments.shape]["vocab_size"]
            if name == "plain" and logits > 2**31:
                continue  # more than MLX can index
            record = measure(arguments, name, groups, arguments.compile)
            gradient = record.pop("gradient")
            plain = plain or (gradient if name == "plain" else {})
            record["distance"] = float(f"{distance(plain, gradient):.2g}") if plain else None
            print(json.dumps(record), flush=True)
            results.append(RECORDS, about | record)
            del gradient
            mx.clear_cache()


def table(records: list[dict[str, Any]]) -> list[str]:
    rows = [
        "| machine | shape | rows x tokens | way | compiled | ms | peak GB | distance |",
        "|---" * 8 + "|",
    ]
    rows += [
        f"| {r['device']} | {r['shape']} {r['dtype']} | {r['rows']} x {PROMPT + COMPLETION} "
        f"| {r['way']} | {'yes' if r['compiled'] else 'no'} | {r['ms']} | {r['peak_gb']} "
        f"| {'' if r['distance'] is None else r['distance']} |"
        for r in records
    ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="tiny")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    add("--groups", type=int, nargs="+", default=[1], help="prompts of a micro-batch")
    add("--ways", choices=WAYS, nargs="+", default=list(WAYS))
    add("--repeats", type=int, default=3, help="measured after two that warm up")
    add("--no-compile", dest="compile", action="store_false")
    add("--table-only", action="store_true", help="rewrite RESULTS.md from the records")
    arguments = parser.parse_args()
    if not arguments.table_only:
        run(arguments)
    results.write_section("scoring-ways", table(results.read(RECORDS)))


if __name__ == "__main__":
    main()
