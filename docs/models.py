"""Writes models.md: what a model of each of mlx-lm's architectures can do here, tried out.

    uv run python docs/models.py                 # the page, from models.json
    uv run python docs/models.py --try           # models.json anew: an hour or so
    uv run python docs/models.py --try llama jamba

Each is tried with random weights of a few kB (tiny_models.py) in a process of its own, since
importing some of mlx-lm's modules ends the process or never returns.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import tiny_models  # noqa: E402

from utils.base.errors import RunError, UserError, reason  # noqa: E402
from utils.base.json_files import write_json  # noqa: E402
from utils.base.script import load_script  # noqa: E402
from utils.convert_model import READ_ERRORS  # noqa: E402
from utils.device import runtime  # noqa: E402

RECORD, PAGE = HERE / "models.json", HERE / "models.md"
SECONDS = 120  # of one architecture; most take a tenth of it
ERRORS = (UserError, RunError, *READ_ERRORS)
PARTS = ("full", "lora", "4 bits")
SETTINGS = {
    "dataset": str(tiny_models.TOKENIZER),
    "system_prompt": "",
    "reward_funcs": [f"{HERE / 'tiny_models.py'}:any_difference"],
    "max_updates": 2,
    "max_train_samples": 8,
    "num_generations": 4,
    "gradient_accumulation_steps": 2,
    "max_new_tokens": 12,
    "eval_max_new_tokens": 4,
    "eval_samples": 2,
    "eval_subset_size": 0,
    "save_steps": 0,
    "temperature": 1.0,
    "max_grad_norm": 1.0,
    "use_compile": False,
    "quantize_for_rollouts": False,
    "log_completions": 0,
}
REMARKS = {
    "phi3small": "mlx-lm computes another thing with its cache than without",
    "plamo3": "mlx-lm's cache keeps one token less of a window (16 here) than its mask shows",
}
"""Of what is far apart: the fault is mlx-lm's, with a cache of its own too."""
Found = dict[str, Any]
"""What one architecture did, as models.json holds it: by part, "" or why it does not."""


def try_one(name: str, file: Path) -> None:
    """Fill the file part by part: what was found stays when the process comes to a sudden end."""
    runtime.preload_blas()
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    found: Found = {}

    def attempt(part: str, work: Callable[[], object]) -> bool:
        found[part] = "did not come to an end"
        file.write_text(json.dumps(found), encoding="utf-8")
        try:
            work()
            found[part] = ""
        except ERRORS as error:
            found[part] = in_one_line(error)
        file.write_text(json.dumps(found), encoding="utf-8")
        return not found[part]

    with tempfile.TemporaryDirectory() as place:
        plain, packed = Path(place, "plain"), Path(place, "packed")
        if not attempt("made", lambda: tiny_models.make(name, plain)):
            return
        attempt("full", lambda: train(plain, Path(place, "full"), found, "full"))
        attempt("lora", lambda: train(plain, Path(place, "lora"), found, "lora"))
        attempt("4 bits", lambda: train_packed(plain, packed, found))


def in_one_line(error: Exception) -> str:
    """Without the places where it happened, which are others each time."""
    text = " ".join(reason(error).split()).replace("|", "/")
    text = re.sub(r" ?\(traceback in [^)]*\)", "", text)
    text = re.sub(r"(model )?\S*/(plain|packed) cannot be (loaded|converted): ", "", text)
    return text if len(text) <= 160 else f"{text[:157]}..."


def train_packed(plain: Path, packed: Path, found: Found) -> None:
    """Convert to 4 bits, and train that by LoRA."""
    from utils import convert_model

    words = ["--hf-path", plain, "-q", "--group-size", "32", "--output-dir", packed]
    convert_model.convert_and_report(convert_model.build_parser().parse_args([*map(str, words)]))
    train(packed, packed.with_name("4bits"), found, "lora")


def train(model: Path, output: Path, found: Found, kind: str) -> None:
    """A whole run of two updates, and what it says of the fast ways.

    Raises:
        Exception: whatever kept it from training.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten

    grpo = load_script()
    settings = {**SETTINGS, "model_name": str(model), "output_dir": str(output), "train_type": kind}
    settings["learning_rate" if kind == "full" else "lora_learning_rate"] = 1e-2
    words = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    config = grpo.read_config(os.devnull, words)
    with grpo.opening.locked(config, "") as place:
        trainer = grpo.build_trainer(config, "")
        with grpo.opening.opened(trainer, place, grpo.BLAS):
            if kind == "full":
                fast_ways(trainer, found)
            before = dict(tree_flatten(trainer.model.trainable_parameters()))
            code = trainer.train()
            after = dict(tree_flatten(trainer.model.trainable_parameters()))
    check_updates(output / "training_log.jsonl", code)
    still = [key for key, value in before.items() if bool(mx.array_equal(value, after[key]))]
    if len(still) == len(before):
        raise RuntimeError("no weight moved")
    if kind == "full":
        found["still"] = still


def check_updates(log: Path, code: int) -> None:
    """Two of them, with a gradient. Raises RuntimeError."""
    records = map(json.loads, log.read_text(encoding="utf-8").splitlines())
    updates = [record for record in records if "grad_norm" in record]
    done = [record for record in updates if not record["skipped"]]
    if code or len(done) != 2:
        raise RuntimeError(f"exit code {code}, {len(done)} of 2 updates")


def fast_ways(trainer: Any, found: Found) -> None:
    """Whether prompts are shared and sampled together, and how far fast ways are from plain."""
    from utils.gradient import agreement
    from utils.rollouts import caches

    trainer.model.eval()
    questions = [question["prompt_ids"] for question in trainer.train_dataset]
    trainer.scorer.check(trainer.model, questions)
    found["shares"] = ""
    if not trainer.scorer.shares:
        problem = agreement.splitting_problem(trainer.model, questions[0])
        found["shares"] = problem or trainer.scorer.sharing_problem(trainer.model, questions)
    longest, shortest = max(questions, key=len), min(questions, key=len)
    cache = caches.prefill(trainer.model, [longest], [0, 0], 4)
    found["cache"] = type(cache[0]).__name__
    if found["cache"] != "RolloutCache":
        found["cache"] = ", ".join(sorted({type(layer).__name__ for layer in cache}))
    found["together"] = len([*caches.batches(trainer.model, 2, 1, 2)]) == 1
    found["mismatch"] = mismatch(trainer, [questions.index(longest), questions.index(shortest)])


def mismatch(trainer: Any, batch: list[int]) -> float:
    """The largest difference of a token's log-prob, of the sampler and of the scorer from the
    script's `token_logprobs`, on completions of these prompts."""
    import mlx.core as mx
    import numpy as np

    completions = trainer.generate_responses(batch)
    size = len(completions)
    prompts = [trainer.train_dataset[i]["prompt_ids"] for i in batch]
    prompts = [prompt for prompt in prompts for _ in range(size // len(batch))]
    ones, largest = np.ones(size), 0.0
    parts = trainer.scorer.micro_batches(
        prompts, completions, ones, ones, range(size), trainer.memory.plan
    )
    for part in parts:
        fast = trainer.rescored(trainer.model, part)[0]
        plain, _ = trainer.scorer.plain(trainer.model, part.tokens, part.mask.shape[1], 1.0)
        apart = [mx.abs(x - plain) * part.mask for x in (fast, part.sampler_logprobs)]
        largest = max(largest, *(float(x.max()) for x in apart))
    return largest if math.isfinite(largest) else -1.0


def in_a_process(name: str) -> Found:
    """What `try_one` finds, with why the process ended early if it did."""
    with tempfile.TemporaryDirectory() as place:
        file = Path(place, "found.json")
        command = [sys.executable, __file__, "--one", name, "--to", str(file)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=SECONDS, check=False
            )
            last = (done.stdout + done.stderr).strip().splitlines()[-1:]
            ended = f"its process ended: {' '.join(last)}"
        except subprocess.TimeoutExpired:
            ended = f"did not come to an end in {SECONDS} s"
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"made": ended}
    early = {key: ended for key, value in found.items() if value == "did not come to an end"}
    return found | early


def try_all(names: list[str], at_once: int) -> None:
    """Bring the record up to date, after each architecture: it may be stopped and gone on with."""
    record = read_record() if RECORD.is_file() else {"models": {}}
    record["mlx_lm"] = importlib.metadata.version("mlx-lm")
    known = tiny_models.architectures()
    with ThreadPoolExecutor(at_once) as pool:
        for name, found in zip(names, pool.map(in_a_process, names), strict=True):
            models = record["models"] | {name: found}
            record["models"] = {key: models[key] for key in known if key in models}
            write_json(RECORD, record)
            problems = [f"{key}: {found[key]}" for key in ("made", *PARTS) if found.get(key)]
            print(name, "; ".join(problems) or "trains", flush=True)


INTRODUCTION = """# Which models can be trained

Every architecture of mlx-lm {version} with random weights of a few kB, tried on a CPU in float32 by
whole runs of two updates, from `config.json` to `final/`: {full} of {count} train fully, {lora} by
LoRA, {packed} by LoRA on 4 bits made by utils/convert_model.py. A model of another `model_type`,
which mlx-lm maps to one of these (mistral to llama, say), trains as that one does.

* **4 bits**: converted with `--quantize --group-size 32`, and trained by LoRA.
* **shared**: a prompt is read once for all its completions in the gradient phase. Where it says no,
  every completion reads its own; the gradient is the same.
* **together**: rows of prompts of different lengths are sampled in one batch. Where it says no, one
  prompt after the other.
* **compiled**: decode steps can be compiled on CUDA (`compiled_step.py`), because every layer keeps
  plain keys and values. A run compares them with plain steps first.
* **apart**: the largest difference of a token's log-probability between the fast ways (sampler,
  scorer) and the script's own `token_logprobs`. Rounding in float32 gives up to about 1e-4.
* **no gradient**: weights that an update leaves as they are, because mlx-lm's code has no gradient
  for them: what only chooses experts or tokens, or is in the files and not used.

<!-- Made by `uv run python docs/models.py`; `--try` tries the models again. -->
"""
HEADER = """\
| architecture | fully | LoRA | 4 bits | shared | together | compiled | apart | remarks |
|---|---|---|---|---|---|---|---|---|"""


def page(record: dict[str, Any]) -> str:
    models = record["models"]
    trained = {part: sum(f.get(part) == "" for f in models.values()) for part in PARTS}
    introduction = INTRODUCTION.format(
        version=record["mlx_lm"],
        count=len(models),
        full=trained["full"],
        lora=trained["lora"],
        packed=trained["4 bits"],
    )
    rows = [row(name, models[name]) for name in sorted(models, key=str.lower)]
    return "\n".join([introduction, HEADER, *rows]) + "\n"


def row(name: str, found: Found) -> str:
    cells = [yes(found.get(part, "no") == "") for part in PARTS]
    if "mismatch" in found:
        compiled = found["cache"] == "RolloutCache"
        cells += [yes(flag) for flag in (not found["shares"], found["together"], compiled)]
        cells.append(f"{found['mismatch']:.0e}")
    else:
        cells += [""] * 4
    return f"| {name} | {' | '.join(cells)} | {remarks(name, found)} |"


def yes(flag: bool) -> str:
    return "yes" if flag else "no"


def remarks(name: str, found: Found) -> str:
    """Why something does not work, once where it is the same; and what has no gradient."""
    problems: dict[str, list[str]] = {}
    for part in ("made", *PARTS):
        if found.get(part):
            problems.setdefault(found[part], []).append(part)
    texts = [f"{text} ({', '.join(parts)})" for text, parts in problems.items()]
    if found.get("shares"):
        texts.append(f"not shared: {found['shares']}")
    still = {".".join(key.split(".")[-2:]) for key in found.get("still", ())}
    if still:
        names = ", ".join(f"`{key}`" for key in sorted(still)[:3])
        texts.append(f"no gradient: {names}{' and others' if len(still) > 3 else ''}")
    return "; ".join([*texts, *([REMARKS[name]] if name in REMARKS else [])])


def read_record() -> dict[str, Any]:
    return json.loads(RECORD.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 where the page is not current")
    parser.add_argument("--try", nargs="*", dest="names", metavar="NAME", help="try them out anew")
    parser.add_argument("--at-once", type=int, default=2, metavar="N", help="processes; default 2")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--to", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        try_one(args.one, args.to)
        return
    if args.names is not None:
        try_all(args.names or tiny_models.architectures(), args.at_once)
    text = page(read_record())
    if args.check:
        sys.exit(PAGE.read_text(encoding="utf-8") != text)
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
