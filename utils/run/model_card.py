"""README.md of a trained model: what it is, how it was made, its scores, and how to ask it."""

import json
import re
import shlex
from pathlib import Path

from ..base.text import counted, redact
from ..model.served_prompt import MARKER, ORIGINAL, ServedPrompt
from ..settings.run_settings import Settings
from .run import Trainer
from .state import Record

CARD = "README.md"
MODEL = "MODEL="  # a variable of the shell, so that the folder is named in lines of its own
HEADER = """---
library_name: mlx
pipeline_tag: text-generation
tags:
- mlx
- grpo
---
"""
METHODS = {
    "full": "all weights",
    "lora": "LoRA adapters, merged here and kept in adapters/",
    "dora": "DoRA adapters, merged here and kept in adapters/",
}


def write(folder: Path, place: Path, trainer: Trainer, prompt: ServedPrompt, early: str) -> None:
    """Into `folder`, which will be at `place`. `early`: why the run ended before its schedule."""
    a, state = trainer.args, trainer.run.state
    made = METHODS[trainer.loaded.train_type]
    done = counted(state.update_step, "update")
    if early:
        done += f" of {trainer.total_updates:,} ({early})"
    parts = [
        f"{HEADER}# {a.run_name}\n",
        f"{a.model_name}, trained by GRPO on the questions of {a.dataset}: {made}, {done}.\n",
        *scores(trainer.run.log.history, a),
        "## How to ask it\n",
        how_to_ask(place, prompt, a, adapters=trainer.loaded.train_type != "full"),
    ]
    (folder / CARD).write_text(redact("\n".join(parts)), encoding="utf-8")


def scores(history: list[Record], a: Settings) -> list[str]:
    """A table of the evaluations on the test split before and after training."""
    if not history:
        return []
    metric = "exact match" if a.eval_metric == "em" else a.eval_metric
    shown = "{:.1%}" if a.eval_metric == "em" else "{:.3f}"
    rows = [("before", history[0])] if len(history) > 1 else []
    rows.append(("after", history[-1]))
    lines = [f"| {name} | {shown.format(record['em'])} |" for name, record in rows]
    asked = counted(history[-1]["em_subset"], "test question")
    how = f"On {asked}, greedy, with at most {counted(a.eval_max_new_tokens, 'token')} an answer."
    return ["\n".join(["| | " + metric + " |", "|---|---|", *lines]) + f"\n\n{how}\n"]


def how_to_ask(place: Path, prompt: ServedPrompt, a: Settings, adapters: bool) -> str:
    variable = f"{MODEL}{shlex.quote(str(place))}\n"
    request = {
        "messages": [{"role": "user", "content": "Your question"}],
        "max_tokens": a.eval_max_new_tokens,
    }
    if a.stop_strings:
        request["stop"] = a.stop_strings
    parts = [about_prompt(prompt, a)]
    if prompt.template is not None:
        parts += [
            f'```bash\n{variable}mlx_lm.server --model "$MODEL"\n```\n',
            "```bash\ncurl http://127.0.0.1:8080/v1/chat/completions "
            '-H "Content-Type: application/json" \\\n    -d '
            f"{shlex.quote(json.dumps(request, ensure_ascii=False))}\n```\n",
            about_stop(a.stop_strings),
            about_adapters(variable, a.model_name) if adapters else "",
        ]
    parts.append(
        "With the repository of MLX-GRPO, which asks and judges as in training:\n\n"
        f'```bash\n{variable}uv run python utils/inference.py --model "$MODEL" "Your question"\n'
        'uv run python utils/evaluate_model.py "$MODEL"\n```\n'
    )
    kept = f"They read `{MARKER}`"
    if prompt.original:
        kept += f" and `{ORIGINAL}`, the chat template without what training added"
    parts.append(f"{kept}.\n")
    return "\n".join(part for part in parts if part)


def about_prompt(prompt: ServedPrompt, a: Settings) -> str:
    """What training added to the questions, and what adds it here."""
    added = []
    if a.system_prompt:
        added.append(f"a system message,\n\n{fenced(a.system_prompt)}")
    if a.reasoning_prefix:
        added.append(f"the beginning of the answer, `{json.dumps(a.reasoning_prefix)[1:-1]}`")
    if not added:
        return "Questions were asked as they are, through the chat template of this folder.\n"
    text = "Training added to every question " + "\nand ".join(added) + ".\n\n"
    if prompt.template is None:
        return f"{text}This folder's chat template does not: {prompt.trouble}.\n"
    text += "This folder's chat template adds the same, so send the question alone."
    if a.system_prompt:
        text += " A system message of your\nown takes the place of this one."
    if prompt.trouble:
        text += (
            f"\nIt is not quite the same to the model, though: {prompt.trouble} than in training."
        )
    return text + "\n"


def fenced(text: str) -> str:
    fence = "`" * 3
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text.strip()}\n{fence}\n"


def about_adapters(variable: str, base: str) -> str:
    """mlx_lm takes the template from the base, which knows nothing of training."""
    return (
        "The adapters alone, over their base:\n\n"
        f"```bash\n{variable}mlx_lm.server --model {shlex.quote(base)} "
        '--adapter-path "$MODEL/adapters" \\\n'
        '    --chat-template "$(cat "$MODEL/adapters/chat_template.jinja")"\n```\n'
    )


def moved(card: str, place: str, note: str) -> str:
    """A card for a copy of the model at another place, with a note on how it was made."""
    card = re.sub(rf"^{MODEL}.*$", lambda _: MODEL + shlex.quote(place), card, flags=re.MULTILINE)
    return (
        card.replace("\n## How to ask it\n", f"\n{note}\n\n## How to ask it\n", 1) if note else card
    )


def about_stop(stop_strings: list[str]) -> str:
    if not stop_strings:
        return ""
    shown = " or ".join(f"`{text}`" for text in stop_strings)
    return (
        f"Keep `stop` in the request: in training an answer was over at {shown}, so the model has\n"
        "not learnt to end there by itself, and mlx_lm reads no stop strings from a folder. The\n"
        "stop string itself is not part of the reply.\n"
    )
