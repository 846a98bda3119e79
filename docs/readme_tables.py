"""Write the generated parts of README.md (main loop, which preset fits where) and docs/settings.md.

uv run python docs/readme_tables.py           rewrite them
uv run python docs/readme_tables.py --check   exit 1 if one is out of date (a test)
"""

import argparse
import dataclasses
import inspect
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils.base.script import load_script  # noqa: E402
from utils.memory import plan as memory_plan  # noqa: E402
from utils.memory import suggestions  # noqa: E402
from utils.model import shape as model_shape  # noqa: E402
from utils.settings import reading  # noqa: E402

# The published config.json of Qwen/Qwen2.5-1.5B-Instruct, as far as memory depends on it.
QWEN = {
    "model_type": "qwen2",
    "hidden_size": 1536,
    "num_hidden_layers": 28,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
PROMPT_TOKENS = 256  # GSM8K's questions with the system prompt stay below this
RAM_GB = (8, 16, 32, 64)


def setting_rows() -> list[str]:
    cls = load_script().MLXGRPOConfig
    docs, defaults = reading.field_docs(cls), dataclasses.asdict(cls())
    rows = []
    for title, fields in reading.parts(cls):
        rows += ["", title, "", "| setting | default | meaning |", "|---|---|---|"]
        for name in (field.name for field in fields):
            text = json.dumps(defaults[name]) if name != "system_prompt" else "(asks for the tags)"
            rows.append(f"| `{name}` | `{text}` | {docs[name].replace('|', '/')} |")
    return [*rows, ""]


def working_set(ram_gb: float) -> int:
    """What Metal recommends a process to keep resident: 2/3 of small memories, 3/4 of large."""
    return int(ram_gb * 2**30 * (2 / 3 if ram_gb <= 36 else 3 / 4))


def plan_for(config: Any, four_bit: bool, ram_gb: float) -> memory_plan.Plan:
    return suggestions.planned(
        model_shape.shape_from_config(QWEN, 0.5625 if four_bit else 2),
        train_type="lora" if four_bit or config.train_type == "lora" else "full",
        lora_rank=config.lora_rank,
        lora_layers=config.lora_layers,
        prompts_per_update=config.batch_size * config.gradient_accumulation_steps,
        num_generations=config.num_generations,
        prompt_tokens=PROMPT_TOKENS,
        completion_tokens=config.max_new_tokens,
        quantize_for_rollouts=config.quantize_for_rollouts,
        has_reference=config.kl_coeff > 0,
        sync_every_updates=config.sync_every_updates,
        gradient_checkpointing=config.gradient_checkpointing,
        train_dtype_bytes=2,
        budget_bytes=working_set(ram_gb),
    )


def fits(config: Any, four_bit: bool, ram_gb: float) -> str:
    for name in ("", "gradient_checkpointing"):
        changed = dataclasses.replace(config, **({name: True} if name else {}))
        plan = plan_for(changed, four_bit, ram_gb)
        if plan.fits:
            note = f" with `{name} = true`" if name else ""
            return f"yes, {plan.needed / 1e9:.1f} GB{note}"
    return "no"


def hardware_rows() -> list[str]:
    cls = load_script().MLXGRPOConfig
    cases = [
        (name, reading.resolve(cls, ROOT / "configs" / f"{name}.toml"), four_bit)
        for name, four_bit in (
            ("ultra_light", True),
            ("medium", True),
            ("prod", True),
            ("default", False),
        )
    ]
    full = dataclasses.replace(cases[-1][1], train_type="full")
    cases.append(("default, train_type=full", full, False))
    rows = [
        "| preset, Qwen2.5-1.5B | " + " | ".join(f"{ram} GB" for ram in RAM_GB) + " |",
        "|---" * (1 + len(RAM_GB)) + "|",
    ]
    for name, config, four_bit in cases:
        cells = " | ".join(fits(config, four_bit, ram) for ram in RAM_GB)
        weights = "4-bit" if four_bit else "bf16"
        rows.append(f"| `{name}` ({weights}) | {cells} |")
    return rows


def loop_rows() -> list[str]:
    """MLXGRPOTrainer.train as it stands in the script."""
    source = inspect.getsource(load_script().MLXGRPOTrainer.train)
    return ["```python", *textwrap.dedent(source).splitlines(), "```"]


def replaced(text: str, name: str, rows: list[str]) -> str:
    """`text` with the lines between <!-- name --> and <!-- /name --> replaced by `rows`."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, opening, rest = text.partition(start)
    _, closing, after = rest.partition(end)
    if not (opening and closing):
        raise ValueError(f"the text has no {start} ... {end}")
    return "\n".join([before + start, *rows, end + after])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare, exit 1 on a difference")
    check = parser.parse_args().check
    readme = {"loop": loop_rows(), "hardware": hardware_rows()}
    pages = {"README.md": readme, "docs/settings.md": {"settings": setting_rows()}}
    return max([written(ROOT / name, parts, check) for name, parts in pages.items()])


def written(path: Path, parts: dict[str, list[str]], check: bool) -> int:
    """Whether a page is out of date; unless that is all that is asked, it no longer is."""
    text = new = path.read_text(encoding="utf-8")
    for name, rows in parts.items():
        new = replaced(new, name, rows)
    if not check:
        path.write_text(new, encoding="utf-8")
    elif new != text:
        print(f"{path.name} is out of date: uv run python docs/readme_tables.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
