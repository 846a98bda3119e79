"""The targets for speed and memory, each with the figure that was measured and whether it is met.

    uv run python benchmarks/targets.py

Reads benchmarks/records/compare.jsonl and rewrites a table in benchmarks/RESULTS.md: the figures of
each run that has what a target compares, which is met where one run meets all of it. Nothing is
measured here; `benchmarks/compare.py` has the commands.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import results  # noqa: E402
from benchmarks.compare import newest, read_records  # noqa: E402

Record = dict[str, Any]
GB = 1e9
GPU_WORK = {"shape": "1.5b", "bits": 0, "train_type": "full", "group": 16, "tokens": 256}
# Of a bfloat16 model: weights 2, float32 master 4, float32 moments 8, gradients 2.
BYTES_PER_PARAMETER = 16


class Missing(Exception):
    """A record that a target needs is not there."""


def runs(records: list[Record], on_cpu: bool) -> list[list[Record]]:
    """The records of each run on a CPU, or on a GPU, the newest run first."""
    chosen = [r for r in records if r["device"].endswith("cores") == on_cpu]
    names = dict.fromkeys(r["run"] for r in reversed(chosen))
    return [[r for r in chosen if r["run"] == name] for name in names]


def find(records: list[Record], **wanted: Any) -> list[Record]:
    found = [r for r in records if all(r.get(k) == v for k, v in wanted.items())]
    if not found:
        raise Missing(", ".join(f"{k} {v}" for k, v in wanted.items()))
    return found


def best(records: list[Record], key: str, **wanted: Any) -> Record:
    """The record with the most tokens/s, or with the fewest seconds."""
    found = [r for r in find(records, **wanted) if r.get(key) is not None]
    if not found:
        raise Missing(f"{key} of {wanted}")
    choose = max if key == "tokens_per_second" else min
    return choose(found, key=lambda r: r[key])


def rollout(records: list[Record]) -> tuple[str, bool]:
    work = {**GPU_WORK, "prompts": 4}
    ours = best(records, "tokens_per_second", tool="ours", **work)["tokens_per_second"]
    other = best(records, "tokens_per_second", tool="mlx-lm", **work)["tokens_per_second"]
    text = f"{ours:,.0f} tok/s, {ours / other:.2f}x ({other:,.0f})"
    return text, ours >= 11_000 and ours / other >= 1.4


def update(prompts: int, most: float, times: float) -> Callable[[list[Record]], tuple[str, bool]]:
    def check(records: list[Record]) -> tuple[str, bool]:
        work = {**GPU_WORK, "prompts": prompts}
        ours = best(records, "seconds", tool="ours", **work)["seconds"]
        trl = best(records, "seconds", tool="trl", **work)["seconds"]
        text = f"{ours:.2f} s, {trl / ours:.2f}x (TRL {trl:.2f} s)"
        return text, ours <= most and trl / ours >= times

    return check


def gradient(records: list[Record]) -> tuple[str, bool]:
    work = {**GPU_WORK, "prompts": 4}
    find(records, tool="torch", setting="compile", **work)  # not without its fastest, so far
    names = {"32 rows": "eager", "compile": "torch.compile"}
    found = find(records, tool="torch", **work)
    torch = {names[r["setting"]]: r["gradient"] for r in found if r["setting"] in names}
    ours = find(records, tool="ours", **work)
    plain = best(ours, "gradient", setting="plain")["gradient"]
    shared = best(ours, "gradient", setting="best")["gradient"]
    ratios = [
        f"{plain / seconds:.2f}x and {shared / seconds:.2f}x PyTorch's {seconds:.3f} s ({how})"
        for how, seconds in torch.items()
    ]
    text = f"plain {plain:.3f} s, shared {shared:.3f} s: {', '.join(ratios)}"
    least = min(torch.values())
    return text, plain <= 1.15 * least and shared < least


def small(records: list[Record]) -> tuple[str, bool]:
    work = {**GPU_WORK, "prompts": 4, "tool": "ours"}
    least = find(records, setting="small", **work)[-1]
    fastest = best(records, "seconds", **work)["seconds"]
    bound = 1.25 * BYTES_PER_PARAMETER * least["parameters"]
    peak, slower = least["peak_bytes"], least["seconds"] / fastest
    text = f"{peak / GB:.1f} GB (at most {bound / GB:.1f}) in {least['seconds']:.2f} s, "
    return f"{text}{slower:.2f}x the fastest", peak <= bound and slower <= 1.5


def adapters(shape: str, most: float) -> Callable[[list[Record]], tuple[str, bool]]:
    def check(records: list[Record]) -> tuple[str, bool]:
        work = {"shape": shape, "bits": 4, "train_type": "lora", "prompts": 1, "tokens": 512}
        found = min(find(records, tool="ours", **work), key=lambda r: r["peak_bytes"])
        peak, cache = found["peak_bytes"] / GB, found["options"]["cache_limit_gb"]
        text = f"{peak + cache:.2f} GB (peak of active memory {peak:.2f}, cache at most {cache}), "
        return f"{text}{found['seconds']:.1f} s an update", peak + cache <= most

    return check


def on_cpu(records: list[Record]) -> tuple[str, bool]:
    ours = best(records, "tokens_per_second", tool="ours", shape="tiny-math")["tokens_per_second"]
    found = find(records, tool="mlx-lm-lora", shape="tiny-math")
    rates = {r["blas"]: r["tokens_per_second"] for r in found if r["setting"] == "best"}
    parts = [
        f"{ours / rate:.1f}x with {'the BLAS it installs' if blas is None else 'our BLAS'} "
        f"({rate:,.0f})"
        for blas, rate in rates.items()
    ]
    return f"{ours:,.0f} tok/s, {', '.join(parts)}", ours >= 5 * max(rates.values())


TARGETS: list[tuple[str, str, bool, Callable[[list[Record]], tuple[str, bool]]]] = [
    (
        "rollout, 4 prompts x 16 in one batch",
        ">= 11,000 tok/s and >= 1.4x `mlx_lm.batch_generate`",
        False,
        rollout,
    ),
    ("update on 4 prompts", "<= 2.0 s and >= 2.5x faster than TRL", False, update(4, 2.0, 2.5)),
    ("update on 16 prompts", "<= 4.5 s and >= 5x faster than TRL", False, update(16, 4.5, 5)),
    (
        "forward + backward, 64 x 406 tokens",
        "<= 1.15x PyTorch's without prefix sharing, faster than it with",
        False,
        gradient,
    ),
    (
        "peak memory, smallest setting",
        "<= weights + master + moments + gradients + 25 %, in <= 1.5x the fastest time",
        False,
        small,
    ),
    (
        "4-bit 1.5B + LoRA, 16 x 512 tokens",
        "active + cache <= 6 GB",
        False,
        adapters("1.5b", 6),
    ),
    ("4-bit 3B + LoRA, 16 x 512 tokens", "active + cache <= 8 GB", False, adapters("3b", 8)),
    ("CPU, tiny-math", ">= 5x mlx-lm-lora's rollout tok/s", True, on_cpu),
]


def tried(check: Callable, run: list[Record]) -> tuple[str, bool] | None:
    """The figure of a run with its name, and whether it meets the target; None: it has none."""
    try:
        figure, met = check(run)
    except Missing:
        return None
    return f"{figure} (run {run[0]['run']})", met


def table(records: list[Record]) -> list[str]:
    rows = ["| what | target | measured | |", "|---|---|---|---|"]
    for what, target, needs_cpu, check in TARGETS:
        found = [result for run in runs(records, needs_cpu) if (result := tried(check, run))]
        figures = "; ".join(figure for figure, _ in found) or "not measured"
        verdict = "met" if any(met for _, met in found) else "**not met**" if found else ""
        rows.append(f"| {what} | {target} | {figures} | {verdict} |")
    return ["", *rows, ""]


def main() -> None:
    rows = table(newest(read_records()))
    results.write_section("targets", rows)
    print("\n".join(rows))


if __name__ == "__main__":
    main()
