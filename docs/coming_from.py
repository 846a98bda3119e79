"""Writes coming_from.md: the options of other trainers, and what does their work here.

    uv run python docs/coming_from.py                 # the page, from coming_from.json and our map
    uv run python docs/coming_from.py --read FOLDER   # coming_from.json anew, from their wheels

FOLDER holds wheels of trl, transformers and mlx-lm-lora (`pip download --no-deps NAME`); their
argument classes and parsers are read, not run. An option of theirs that our map does not know
stands as "not mapped yet" on the page, and a test fails.
"""

import argparse
import ast
import dataclasses
import json
import sys
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from utils.base.script import load_script  # noqa: E402
from utils.settings import other_names  # noqa: E402

# Title of a table, distribution, file in its wheel, what to read there.
PEERS = (
    ("TRL's GRPOConfig", "trl", "trl/trainer/grpo_config.py", "GRPOConfig"),
    (
        "transformers' TrainingArguments, which TRL's and Unsloth's configurations inherit",
        "transformers",
        "transformers/training_args.py",
        "TrainingArguments",
    ),
    ("mlx-lm-lora", "mlx_lm_lora", "mlx_lm_lora/train.py", "CONFIG_DEFAULTS"),
)
UNSLOTH = (
    "model_name max_seq_length load_in_4bit fast_inference gpu_memory_utilization r lora_alpha "
    "target_modules use_gradient_checkpointing"
)
INTRODUCTION = """# Coming from another trainer

Their options, in their order, with what does the same work here. What is typed by their name in a
TOML file or behind `--set` is answered with the same words. LightRFT's options have a page of their
own, with what differs and the tests: [lightrft.md](lightrft.md).

<!-- Made by `uv run python docs/coming_from.py`; change utils/settings/other_names.py. -->
"""


def names_in(source: str, wanted: str) -> list[str]:
    """Fields of a dataclass, or keys of a table of defaults, of that name."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == wanted:
            fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
            return [part.target.id for part in fields if isinstance(part.target, ast.Name)]
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == wanted:
            return list(ast.literal_eval(node.value))
    raise SystemExit(f"error: no {wanted} in there")


def read(folder: Path) -> dict[str, dict[str, object]]:
    """Version and names of each peer, from wheels."""
    found = {}
    for _, name, file, wanted in PEERS:
        wheels = sorted(folder.glob(f"{name}-*.whl"))
        if not wheels:
            raise SystemExit(f"error: {folder} holds no wheel of {name}")
        source = zipfile.ZipFile(wheels[-1]).read(file).decode()
        version = wheels[-1].name.split("-")[1]
        found[name] = {"version": version, "names": names_in(source, wanted)}
    return found


def page(peers: dict[str, dict]) -> str:
    ours = {f.name for f in dataclasses.fields(load_script().MLXGRPOConfig)}
    parts = [INTRODUCTION]
    for title, name, _, _ in PEERS:
        parts.append(f"## {title}\n\nOf version {peers[name]['version']}.\n")
        parts.append(table(peers[name]["names"], ours))
    parts.append("## Unsloth's FastLanguageModel\n")
    parts.append(table(UNSLOTH.split(), ours))
    return "\n".join(parts)


def table(names: list[str], ours: set[str]) -> str:
    rows = ["| theirs | here | |", "|---|---|---|"]
    return "\n".join([*rows, *(row(name, ours) for name in names)]) + "\n"


def row(name: str, ours: set[str]) -> str:
    if name in other_names.HERE:
        settings, remark = other_names.HERE[name]
        shown = ", ".join(f"`{setting}`" for setting in settings.split()) or "not needed"
        return f"| `{name}` | {shown} | {remark} |"
    if name in ours:
        return f"| `{name}` | `{name}` | {other_names.SAME.get(name, '')} |"
    return f"| `{name}` | none | {other_names.REASONS.get(name, 'not mapped yet')} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--read", type=Path, metavar="FOLDER", help="wheels to read their names of")
    parser.add_argument("--check", action="store_true", help="exit 1 where the page is not current")
    args = parser.parse_args()
    record, target = HERE / "coming_from.json", HERE / "coming_from.md"
    if args.read:
        record.write_text(json.dumps(read(args.read), indent=1) + "\n", encoding="utf-8")
    text = page(json.loads(record.read_text(encoding="utf-8")))
    if args.check:
        sys.exit(target.read_text(encoding="utf-8") != text)
    target.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
