"""Which bfloat16 weights move at a small learning rate: plain, over masters, rounded at random.

    uv run python benchmarks/bf16_updates.py

A random model in the shape of models/tiny-math reads its questions (next-token loss, the same
batches for every row of the table). Appends one JSON record to benchmarks/records/
bf16_updates.jsonl, and rewrites the table in benchmarks/RESULTS.md from the newest record.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import results  # noqa: E402
from utils.device import runtime  # noqa: E402

runtime.preload_blas()

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import mlx.optimizers as optim  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from utils.gradient.adamw import AdamW  # noqa: E402

RECORDS = ROOT / "benchmarks/records/bf16_updates.jsonl"
MODEL = ROOT / "models/tiny-math"
KINDS: dict[str, dict[str, Any] | None] = {
    "plain bfloat16 weights and moments (mlx.optimizers.AdamW)": None,
    "master_weights = true": {},
    "master_weights = false (random rounding)": {"master_weights": False},
    "moment_bits = 8": {"moment_bits": 8},
    "master_weights = false, moment_bits = 8": {"master_weights": False, "moment_bits": 8},
}


def random_model() -> nn.Module:
    from mlx_lm.utils import _get_classes

    config = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    model_class, arguments = _get_classes(config)
    mx.random.seed(0)
    model = model_class(arguments.from_dict(config))
    model.set_dtype(mx.bfloat16)
    mx.eval(model.parameters())
    return model


def batches(updates: int, rows: int, length: int) -> list[mx.array]:
    """(rows, length) tokens of the questions, joined."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    lines = (MODEL / "train.jsonl").read_text(encoding="utf-8").splitlines()
    ids: list[int] = []
    for line in lines:
        if len(ids) >= updates * rows * length:
            break
        ids += tokenizer.encode(json.loads(line)["question"]).ids
    count = min(updates, len(ids) // (rows * length))
    tokens = mx.array(ids[: count * rows * length]).reshape(count, rows, length)
    return [tokens[n % count] for n in range(updates)]


def loss(model: nn.Module, tokens: mx.array) -> mx.array:
    logits = model(tokens[:, :-1]).astype(mx.float32)  # (B, T - 1, V)
    return nn.losses.cross_entropy(logits, tokens[:, 1:], reduction="mean")


def bytes_of(state: Any, weights: int) -> float:
    arrays: Any = tree_flatten(state)
    return sum(x.nbytes for _, x in arrays) / weights


def measure(kind: str, data: list[mx.array], learning_rate: float, marks: list[int]) -> dict:
    model = random_model()
    start: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    count = sum(w.size for w in start.values())
    how = KINDS[kind]
    plain = optim.AdamW(learning_rate, bias_correction=True)
    plain.init(model.trainable_parameters())
    ours = AdamW(model, (0.9, 0.999), **how) if how is not None else None
    gradient = nn.value_and_grad(model, loss)
    held_out, moved = data[-1], {}
    before = loss(model, held_out).item()
    for update, tokens in enumerate(data[:-1], start=1):
        _, grads = gradient(model, tokens)
        if ours:
            ours.update(model, grads, learning_rate)
        else:
            plain.update(model, grads)
        mx.eval(model.parameters(), plain.state)
        if update in marks:
            now: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
            changed = sum((now[name] != w).sum().item() for name, w in start.items())
            moved[update] = round(changed / count, 4)
    return {
        "bytes": round(bytes_of(ours.state if ours else plain.state, count), 2),
        "moved": moved,
        "loss_before": before,
        "loss_change": loss(model, held_out).item() - before,
    }


def table(record: dict[str, Any]) -> list[str]:
    marks = [str(n) for n in record["marks"]]
    head = " | ".join(f"moved after {n}" for n in marks)
    rows = [
        f"bfloat16, learning rate {record['learning_rate']:g}, {marks[-1]} updates, "
        f"{record['device']}, MLX {record['mlx']}, {record['date']}.",
        "",
        f"| optimizer | bytes a weight beside weight and gradient | {head} | loss |",
        "|---" * (len(marks) + 3) + "|",
    ]
    for kind, r in record["kinds"].items():
        moved = " | ".join(f"{r['moved'][n]:.1%}" for n in marks)
        rows.append(f"| {kind} | {r['bytes']} | {moved} | {r['loss_change']:+.4f} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--updates", type=int, default=100)
    add("--learning-rate", type=float, default=1e-6)
    add("--table-only", action="store_true", help="rewrite RESULTS.md from the records")
    arguments = parser.parse_args()
    if not arguments.table_only:
        marks = sorted({1, 10, arguments.updates})
        data = batches(arguments.updates + 1, rows=2, length=48)
        versions = runtime.provenance(ROOT)
        record = {
            "date": time.strftime("%Y-%m-%d"),
            **{name: versions[name] for name in ("mlx", "device", "git_revision")},
            "learning_rate": arguments.learning_rate,
            "marks": marks,
            "kinds": {},
        }
        for kind in KINDS:
            record["kinds"][kind] = measure(kind, data, arguments.learning_rate, marks)
            print(kind, record["kinds"][kind], flush=True)
        results.append(RECORDS, record)
    newest = results.read(RECORDS)[-1]
    results.write_section("bf16-updates", table(newest))


if __name__ == "__main__":
    main()
