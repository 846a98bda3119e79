"""Pretrain MoE-200M on the Python sources and documentation of this machine; draw its curve.

    python benchmarks/moe_200m.py --collect data/custom_text      make the text folders, then train:
    python utils/pretrain.py --config configs/pretrain/moe_200m_long.toml --micro-batch-size 32
    python benchmarks/moe_200m.py --record checkpoints            keep the curve, then draw it
    python benchmarks/moe_200m.py --draw-only                     from the kept curve

The text is every .py, .pyi, .rst, .md and .txt file of the standard library and the installed
packages, each once; one file in fifty, by a hash of its content, is held out. The question is
whether the model learns from context: its held-out loss has to fall below the unigram entropy of
the held-out text, which no model that knows only word frequencies can do.
"""

import argparse
import csv
import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import results  # noqa: E402

RECORDS = ROOT / "benchmarks/records/moe_200m.jsonl"
PICTURE = ROOT / "docs/moe_200m.png"
SUFFIXES = {".py", ".pyi", ".rst", ".md", ".txt"}
HELD_OUT = 50  # one file in this many


def sources(roots: list[Path]) -> Iterator[bytes]:
    """Contents of the text files, each once; the largest are tables rather than text."""
    seen = set()
    for root in roots:
        for file in sorted(root.rglob("*")):
            if file.suffix not in SUFFIXES or not file.is_file():
                continue
            content = file.read_bytes()
            digest = hashlib.sha256(content).digest()
            if not 500 < len(content) < 300_000 or digest in seen:
                continue
            seen.add(digest)
            try:
                content.decode("utf-8")
            except UnicodeDecodeError:
                continue
            yield content


def collect(folder: Path, megabytes: int) -> None:
    """Text files of about a megabyte each in folder/train and folder/val."""
    places = sysconfig.get_paths()
    roots = [Path(places[name]) for name in ("purelib", "stdlib")]
    parts: dict[str, list[bytes]] = {"train": [], "val": []}
    files, sizes = {"train": 0, "val": 0}, {"train": 0, "val": 0}
    for content in sources(roots):
        if sizes["train"] >= megabytes * 1_000_000:
            break
        digest = hashlib.sha256(content).digest()
        part = "val" if int.from_bytes(digest[:4], "big") % HELD_OUT == 0 else "train"
        parts[part].append(content)
        files[part] += 1
        sizes[part] += len(content)
    for part, contents in parts.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        for index in range(0, len(contents), 100):
            text = b"\n\n".join(contents[index : index + 100])
            (folder / part / f"{index // 100:04}.txt").write_bytes(text)
        print(f"{folder / part}: {files[part]:,} files, {sizes[part] / 1e6:.1f} MB")


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            yield {k: v if k == "split" else json.loads(v) for k, v in row.items() if v}


def record(run: Path, device: str) -> None:
    """The run's record and every row of its metrics, as JSON lines."""
    summary = json.loads((run / "final/pretrain.json").read_text(encoding="utf-8"))
    summary["device"] = device or summary["device"]
    paths = ("out_dir", "tokenizer_dir", "train_data_path", "val_data_path")
    summary["settings"] = {k: v for k, v in summary["settings"].items() if k not in paths}
    lines = [{"kind": "run", **summary}]
    lines += [{"kind": "train", **row} for row in rows_of(run / "metrics.csv")]
    lines += [{"kind": "val", **row} for row in rows_of(run / "metrics_eval.csv")]
    RECORDS.unlink(missing_ok=True)
    for line in lines:
        results.append(RECORDS, line)


def draw() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = results.read(RECORDS)
    run = lines[0]
    tokens = {line["update"]: line["tokens"] / 1e6 for line in lines if line["kind"] == "train"}
    train = [line for line in lines if line["kind"] == "train"]
    val = [line for line in lines if line["kind"] == "val"]
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot(tokens.values(), [r["loss"] for r in train], color="0.7", lw=1, label="training")
    places = [tokens[r["update"]] for r in val]
    axes.plot(places, [r["loss"] for r in val], "o-", ms=3, color="C0", label="held out")
    entropy = run["val_unigram_entropy"]
    axes.axhline(entropy, color="C3", ls="--", lw=1)
    axes.text(places[-1], entropy + 0.08, "unigram entropy", color="C3", ha="right")
    axes.set(xlabel="million tokens", ylabel="loss, nats per token", title=title(run))
    axes.set_ylim(0, 11.5)
    axes.legend()
    figure.tight_layout()
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=110)
    print(f"{PICTURE.relative_to(ROOT)}: held out {val[-1]['loss']:.3f}, unigrams {entropy:.3f}")


def title(run: dict[str, Any]) -> str:
    speed = f"{run['tokens_per_second']:,.0f} tokens/s"
    return f"MoE-200M on {run['device']}: {speed}, peak {run['peak_memory_gb']:.0f} GB"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--collect", type=Path, metavar="FOLDER", help="write FOLDER/train and val")
    what.add_argument("--record", type=Path, metavar="RUN", help="out_dir of a finished run")
    what.add_argument("--draw-only", action="store_true", help="draw the kept curve again")
    parser.add_argument("--megabytes", type=int, default=120, help="text to collect at most")
    parser.add_argument("--device", default="", help="name of the machine for the record")
    arguments = parser.parse_args()
    if arguments.collect:
        collect(arguments.collect, arguments.megabytes)
        return 0
    if arguments.record:
        record(arguments.record, arguments.device)
    draw()
    return 0


if __name__ == "__main__":
    sys.exit(main())
