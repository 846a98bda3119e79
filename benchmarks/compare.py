"""The same work for this project and its peers, one cell per command.

    uv run python benchmarks/compare.py --tool ours --shape 1.5b --prompts 4
    uv run python benchmarks/compare.py --tool trl --setting default --shape 1.5b --prompts 4
    uv run python benchmarks/compare.py --table-only

A cell is a tool at one of its settings on a randomly initialised model of a named shape (random
weights cost what trained ones do): `--prompts` prompts of 150 tokens, 16 completions of 256 tokens
each, stop tokens off, one optimizer update. Each cell runs in the tool's own environment, which uv
makes from the package index (or in the interpreter `--python` names), and appends one record to
benchmarks/records/compare.jsonl; benchmarks/RESULTS.md is generated from the records. Cells with
the same `--run` name belong together: ratios are taken within a run only.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import results  # noqa: E402
from benchmarks.peers import STAGES  # noqa: E402
from benchmarks.update_cost import SHAPES, write_model  # noqa: E402

RECORDS = ROOT / "benchmarks/records/compare.jsonl"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx-grpo-benchmarks"
MLX = ["mlx[cpu]==0.32.4; sys_platform == 'linux'", "mkl; platform_machine == 'x86_64'"]
TORCH = ["torch==2.13.0", "transformers>=5.5,<6", "accelerate", "datasets", "peft"]
UNSLOTH = ["transformers>=5.5,<=5.17", "datasets>=4.6,<5", "mlx-lm==0.32.2", "mlx-vlm", "msgspec"]
ENVIRONMENTS = {
    "mlx-lm-lora": ["mlx-lm-lora==5.10.2", *MLX],
    "trl": ["trl==1.16.0", *TORCH, *MLX[:1]],  # MLX: trl_curves.py takes our rewards
    "torch": ["trl==1.16.0", *TORCH],
    "unsloth": [*UNSLOTH, "psutil", "pillow", "requests", "tqdm", "sentencepiece", *MLX],
}
# unsloth_zoo asks for PyTorch and Triton outside Apple silicon, which its MLX trainer does not
# import: it is installed without its requirements, which stand above.
WITHOUT_REQUIREMENTS = {"unsloth": "unsloth_zoo==2026.10.9"}

TRL_FAST = {"gradient_checkpointing": False, "per_device_train_batch_size": 64}
TRL_FLOAT32 = TRL_FAST | {"bf16": False, "model_init_kwargs": {"dtype": "float32"}}
TRL_BFLOAT16 = TRL_FAST | {"bf16": False, "model_init_kwargs": {"dtype": "bfloat16"}}
# The settings of each tool. "best" is the fastest that was found; the other names are what was
# tried beside it, so that a reader can see that it is.
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "ours": {
        "best": {"quantize_for_rollouts": False},
        "best cpu": {"quantize_for_rollouts": False, "use_compile": False},
        "plain": {"quantize_for_rollouts": False, "shared_prompts": False},
        "small": {"quantize_for_rollouts": False, "gradient_checkpointing": True}
        | {"memory_limit_gb": 30},
        "16 GB": {"gradient_checkpointing": True, "memory_limit_gb": 5, "cache_limit_gb": 0.5},
        "default": {},
    },
    "mlx-lm": {
        "best": {"completion_batch_size": "rows", "prefill_batch_size": "rows"},
        "default": {},
    },
    "mlx-lm-lora": {
        "best": {"beta": 0.0, "top_p": 1.0, "top_k": 0},
        "one step": {"beta": 0.0, "top_p": 1.0, "top_k": 0, "warmup": 0},
        "default": {},
    },
    "unsloth": {
        "best": {"gradient_checkpointing": False},
        "eager": {"gradient_checkpointing": False, "compile": False},
        "default": {},
    },
    "trl": {
        "best": TRL_BFLOAT16,
        "best cpu": TRL_FLOAT32 | {"threads": 1},
        "master": TRL_FAST,
        "paged": TRL_BFLOAT16 | {"use_transformers_continuous_batching": True},
        "default": {},
    },
    "torch": {
        "best": {"micro_rows": 16},
        "32 rows": {"micro_rows": 32},
        "compile": {"micro_rows": 16, "compile": True},
    },
    "limits": {"best": {}},
}


WORK = ("tool", "setting", "shape", "dtype", "bits", "train_type", "prompts", "group")
WORK += ("prompt_tokens", "tokens", "updates")


def environment(tool: str) -> Path:
    """The interpreter of a peer's environment, made by uv when it is not there yet."""
    if tool not in ENVIRONMENTS:
        return Path(sys.executable)
    folder = CACHE / ("trl" if tool == "torch" else tool)
    python = folder / "bin/python"
    if not python.exists():
        install = ["uv", "pip", "install", "--python", str(python)]
        subprocess.run(["uv", "venv", "--python", "3.11", str(folder)], check=True)
        subprocess.run([*install, *ENVIRONMENTS[tool]], check=True)
        if tool in WITHOUT_REQUIREMENTS:
            subprocess.run([*install, "--no-deps", WITHOUT_REQUIREMENTS[tool]], check=True)
    return python


def model_folder(shape: str, dtype: str, bits: int) -> Path:
    """Random weights of the shape, written once; tiny-math is the bundled model."""
    if shape == "tiny-math":
        return ROOT / "models/tiny-math"
    folder = CACHE / "models" / f"{shape}-{f'{bits}-bit' if bits else dtype}"
    if not (folder / "chat_template.jinja").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_model(folder, shape, dtype, bits)
    return folder


def write_prompts(folder: Path, model: Path, count: int, length: int) -> dict[str, list]:
    """`count` prompts of exactly `length` tokens: a question of digits, which are a token each."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))

    def text_of(question: str) -> str:
        return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n<reasoning>\n"

    around = len(tokenizer.encode(text_of("")).ids)
    draw = random.Random(0)
    questions = ["".join(draw.choices("0123456789", k=length - around)) for _ in range(count)]
    lines = [json.dumps({"question": q, "answer": "#### 1"}) + "\n" for q in questions]
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    texts = [text_of(question) for question in questions]
    ids = [tokenizer.encode(text).ids for text in texts]
    assert {len(row) for row in ids} == {length}
    return {"texts": texts, "ids": ids}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the cell in its environment and return its record."""
    tool = arguments.tool
    python = Path(arguments.python) if arguments.python else environment(tool)
    options = SETTINGS[tool][arguments.setting] | dict(map(parsed, arguments.option))
    model = model_folder(arguments.shape, arguments.dtype, arguments.bits)
    work = {name: getattr(arguments, name) for name in WORK}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cell = {**work, "options": options, "model": str(model), "folder": name}
        cell["blas"] = arguments.blas == "fast"
        count = arguments.prompts * (arguments.updates + 1)
        cell |= write_prompts(folder, model, count, arguments.prompt_tokens)
        (folder / "cell.json").write_text(json.dumps(cell), encoding="utf-8")
        script = str(ROOT / "benchmarks/peers.py")
        command = [str(python), script, f"{name}/cell.json", f"{name}/result.json"]
        subprocess.run(command, check=True, cwd=name)
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return {
        "run": arguments.run or time.strftime("%Y-%m-%d"),
        "date": time.strftime("%Y-%m-%d"),
        **work,
        "options": options,
        **weights_of(model, arguments.bits),
        **summary(result),
        "command": command_line(),
    }


def parsed(option: str) -> tuple[str, Any]:
    """KEY=VALUE, the value as JSON, or as text where it is none."""
    key, _, value = option.partition("=")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def command_line() -> str:
    """What to type for this cell, without this machine's paths and the run's name."""
    words, skip = ["benchmarks/compare.py"], False
    for word in sys.argv[1:]:
        if skip or word in ("--python", "--run"):
            skip = not skip
            continue
        words.append(f"'{word}'" if " " in word else word)
    return " ".join(words)


def weights_of(model: Path, bits: int) -> dict[str, int]:
    """Parameters (of the unquantized shape) and bytes that a decode step has to read."""
    with (model / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    parameters = total = 0
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        total += last - first
        packed = 32 // bits if entry["dtype"] == "U32" else 1
        if not (bits and name.endswith((".scales", ".biases"))):
            parameters += product(entry["shape"]) * packed
    return {"parameters": parameters, "weight_bytes": total}


def product(shape: list[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Medians over the updates beside the raw seconds."""
    updates = result.pop("updates", None)
    if updates is None:
        return result
    medians = {}
    for stage in ("seconds", *STAGES):
        values = [update[stage] for update in updates]
        medians[stage] = None if None in values else round(statistics.median(values), 4)
    rates = [
        tokens / update["rollout"]
        for tokens, update in zip(result["tokens"], updates, strict=True)
        if tokens and update["rollout"]
    ]
    sampled = result.pop("tokens")
    return {
        **medians,
        "tokens_per_second": round(statistics.median(rates), 1) if rates else None,
        "sampled": sampled,
        "raw": [{k: v and round(v, 4) for k, v in update.items()} for update in updates],
        **result,
    }


def read_records() -> list[dict[str, Any]]:
    return results.read(RECORDS) if RECORDS.exists() else []


def newest(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last record of each cell of a run."""
    keys = ("run", "device", "blas", *(key for key in WORK if key != "updates"))
    return [*{(*(r[k] for k in keys), str(r["options"])): r for r in records}.values()]


def groups_of(records: list[dict[str, Any]]) -> dict[tuple, list[dict[str, Any]]]:
    """Records of the same work in the same run on the same machine, with the run's limits."""
    keys = ("run", "device", *(key for key in WORK if key not in ("tool", "setting", "updates")))
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for record in records:
        if record["tool"] != "limits":
            groups.setdefault(tuple(record[key] for key in keys), []).append(record)
    return groups


def limits_for(record: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, float] | None:
    """Tokens/s and gradient seconds that the machine's bandwidth and arithmetic allow."""
    found = [
        r
        for r in records
        if r["tool"] == "limits"
        and all(r[key] == record[key] for key in ("run", "device", "dtype"))
    ]
    if not found:
        return None
    rows = record["prompts"] * record["group"]
    step = record["weight_bytes"] / found[-1]["copy_bytes_per_second"]
    trained = rows * (record["prompt_tokens"] + record["tokens"])
    return {
        "tokens_per_second": rows / step,
        "rollout": step * record["tokens"],
        "gradient": 6 * record["parameters"] * trained / found[-1]["flops_per_second"],
    }


def number(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else format(value, form)


def row_of(record: dict[str, Any], ours: dict[str, Any] | None) -> str:
    """One line of a table; the ratios say how many times faster our best setting is."""
    ratios = []
    for name, inverse in (("tokens_per_second", True), ("seconds", False)):
        mine, other = (ours or {}).get(name), record.get(name)
        ratios.append(mine and other and (mine / other if inverse else other / mine))
    blas = " (bundled BLAS)" if record["blas"] is None and "torch" not in record["versions"] else ""
    blas = blas if record["dtype"] == "float32" else ""
    given = SETTINGS[record["tool"]][record["setting"]]
    more = [f"{k}={v}" for k, v in record["options"].items() if k not in given or given[k] != v]
    cells = [
        ", ".join([record["tool"], record["setting"], *more]) + blas,
        number(record["tokens_per_second"], ",.0f"),
        number(ratios[0]),
        *(number(record[stage], ".3g") for stage in STAGES),
        number(record["seconds"], ".3g"),
        number(ratios[1]),
        number((record["peak_bytes"] or record["rss_bytes"]) / 1e9, ".3g"),
        str(len(record["raw"])),
    ]
    return f"| {' | '.join(cells)} |"


def tables(records: list[dict[str, Any]]) -> list[str]:
    lines: list[str] = []
    for key, group in groups_of(records).items():
        run, device, shape, dtype, bits, train_type, prompts, size, prompt_tokens, tokens = key
        ours = [r for r in group if r["tool"] == "ours" and r["setting"].startswith("best")]
        best = min(ours, key=lambda r: r["seconds"], default=None)
        lines += [
            "",
            f"**{device}, {shape} ({f'{bits}-bit' if bits else dtype}), {train_type}: {prompts} "
            f"prompts of {prompt_tokens} tokens x {size} completions of {tokens}** (run {run})",
            "",
            "| tool, setting | rollout tok/s | ours / it | rollout s | scoring s | gradient s "
            "| optimizer s | update s | it / ours | peak GB | updates |",
            "|---" * 11 + "|",
        ]
        limit = limits_for(group[0], records)
        if limit:
            lines.append(
                f"| *physical limit* | {limit['tokens_per_second']:,.0f} | | "
                f"{limit['rollout']:.3g} | | {limit['gradient']:.3g} | | | | | |"
            )
        order = sorted(group, key=lambda r: (r["tool"] != "ours", r["tool"], r["setting"]))
        lines += [row_of(record, best) for record in order]
    return [*lines, ""]


def commands(records: list[dict[str, Any]]) -> list[str]:
    """The commands that give the newest records, and the versions they ran."""
    seen = dict.fromkeys(f"python {record['command']}" for record in records)
    versions: dict[str, dict[str, str]] = {}
    for record in records:
        versions.setdefault(record["tool"], {}).update(record["versions"])
    told = [
        f"{tool}: " + ", ".join(f"{name} {version}" for name, version in found.items())
        for tool, found in versions.items()
    ]
    return ["", "Versions: " + "; ".join(told) + ".", "", "```", *seen, "```", ""]


def write_results() -> None:
    records = newest(read_records())
    results.write_section("compare", [*tables(records), *commands(records)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tool", choices=SETTINGS, default="ours")
    add("--setting", default="best", help="a setting of the tool (see SETTINGS)")
    add("--option", action="append", default=[], metavar="KEY=VALUE", help="change the setting")
    add("--shape", choices=("tiny-math", *SHAPES), default="tiny")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    add("--bits", type=int, default=0, help="quantize the base (0: not; MLX tools only)")
    add("--train-type", choices=("full", "lora"), default="full")
    add("--prompts", type=int, default=4, help="prompts of one update")
    add("--group", type=int, default=16, help="completions of each prompt")
    add("--prompt-tokens", type=int, default=150)
    add("--tokens", type=int, default=256, help="tokens of each completion")
    add("--updates", type=int, default=3, help="measured updates after one that warms up")
    add("--blas", choices=("fast", "bundled"), default="fast", help="for MLX on a Linux CPU")
    add("--python", default="", help="interpreter that has the tool (default: uv makes one)")
    add("--run", default="", help="name of the run this cell belongs to (default: the date)")
    add("--table-only", action="store_true", help="rewrite RESULTS.md from the records")
    arguments = parser.parse_args()
    if arguments.setting not in SETTINGS[arguments.tool]:
        parser.error(f"{arguments.tool} has the settings {', '.join(SETTINGS[arguments.tool])}")
    if not arguments.table_only:
        record = measure(arguments)
        results.append(RECORDS, record)
        print({k: v for k, v in record.items() if k not in ("raw", "command")})
    write_results()


if __name__ == "__main__":
    main()
