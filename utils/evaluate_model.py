"""How often is a model right? Exact match and pass@k, with intervals, for one model or several.

    uv run python utils/evaluate_model.py models/tiny-math outputs/tiny-math/final

Prompt, sampler, rewards and the reading of answers are the trainer's own.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__" and not __package__:  # typed as a script: sys.path[0] is utils/ itself
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    __package__ = "utils"

from .base.errors import UserError
from .base.script import load_script
from .base.text import counted
from .inference import (
    POSITIVE,
    SEED,
    TEMPERATURE,
    check_model,
    check_output,
    note,
    number,
    open_model,
    run,
    trainer_settings,
)
from .run.log import RunLog

COMMAND = "uv run python utils/evaluate_model.py"
EXAMPLES = f"""examples:
  {COMMAND} outputs/tiny-math/final
      on the test questions of the run that made it, with its prompt, greedy
  {COMMAND} models/tiny-math outputs/tiny-math/final
      base against tuned, side by side, with a paired test
  {COMMAND} outputs/run/final --k 1,4,16 --output completions.jsonl
      16 samples of each question at the training temperature
  {COMMAND} Qwen/Qwen2.5-1.5B-Instruct --data gsm8k --samples 200
  {COMMAND} utils/mlx_model --data mine.jsonl \\
      --set question_column=problem

A model is a hub name, a folder, a checkpoint-N/ or a final/. Settings are those of --config, else
of the first run among those that made the models, else the trainer's defaults; --set is on top.
All models get the same prompt.

pass@k is the unbiased estimate from n samples, 1 - C(n-c, k) / C(n, k) with c right ones
(arXiv:2107.03374, eq. 1). Intervals are Wilson's, 95 %, over the questions; with several samples
they are on the wide side, because a question counts as one trial. The paired test is the exact
two-sided sign test over questions, which for one sample is McNemar's."""


def ks(text: str) -> list[int]:
    parse = number(int, lambda v: v >= 1, "whole numbers from 1 up, such as 1,4,16")
    return sorted({parse(part) for part in text.split(",")})


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evaluate_model.py",
        description="Exact match and pass@k of models on questions with known answers.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="the first is what the others are compared to")
    add("--data", metavar="DATA", help="gsm8k, another hub name, a file or a folder by split")
    add("--split", choices=("test", "train"), default="test", help="default test")
    add("--samples", type=POSITIVE, metavar="N", help="a fixed subset of N questions; default all")
    add("--k", type=ks, default=[1], metavar="K,K", help="pass@k for these; default 1")
    add("--n", type=POSITIVE, metavar="N", help="samples of each question; default the largest k")
    add("--temperature", type=TEMPERATURE, metavar="T", help="default 0 (greedy) for one sample, "
        "else the training temperature")  # fmt: skip
    add("--max-tokens", type=POSITIVE, metavar="N", help="default: eval_max_new_tokens")
    add("--batch-size", type=POSITIVE, default=64, metavar="N", help="samples at once; default 64")
    add("--seed", type=SEED, metavar="N", help="of the sampling; default: the settings'")
    add("--output", type=Path, metavar="FILE", help="completions as JSONL")
    add("--config", metavar="TOML", help="settings to ask by, instead of the run's")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    add("--trust-remote-code", action="store_true", help="run Python code that comes with a model")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what contradicts itself before anything is loaded. Raises UserError."""
    args.n = args.n or max(args.k)
    if args.n < max(args.k):
        raise UserError(f"--k {max(args.k)} needs at least as many samples: --n {args.n} is fewer")
    if args.n > 1 and args.temperature == 0:
        raise UserError(f"--temperature 0 would draw the same sample {args.n} times")
    doubled = next((name for name in args.models if args.models.count(name) > 1), None)
    if doubled:
        raise UserError(f"{doubled} is named twice")
    if args.output:
        check_output(args.output)


def pass_at_k(n: int, right: int, k: int) -> float:
    """The chance that k of the n samples, drawn without replacement, hold a right one."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def wilson(mean: float, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """The interval of a proportion that stays within 0 and 1 (Wilson 1927)."""
    centre = mean + z * z / (2 * trials)
    half = z * math.sqrt(mean * (1 - mean) / trials + (z / (2 * trials)) ** 2)
    scale = 1 + z * z / trials
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def sign_test(better: int, worse: int) -> float:
    """Two-sided exact p-value that better and worse are equally likely (McNemar's exact test)."""
    total = better + worse
    tail = sum(math.comb(total, i) for i in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**total)


@dataclass
class Scores:
    """What one model achieved: right samples by question (index into the data), and sums."""

    name: str
    right: dict[int, int] = field(default_factory=dict)
    rewards: dict[str, list[float | None]] = field(default_factory=dict)
    completions: int = 0
    truncated: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def pass_at(self, n: int, k: int) -> float:
        return sum(pass_at_k(n, right, k) for right in self.right.values()) / len(self.right)


def resolve(args: argparse.Namespace) -> tuple[Any, str]:
    """The trainer's configuration with the arguments on top, and where it is from."""
    from .settings.reading import replaced  # here: `--help` answers at once

    config, source = trainer_settings(args.config, args.set, args.models)
    changes: dict[str, Any] = {"trust_remote_code": args.trust_remote_code}
    if args.data:
        # With eval_samples = 0 the reader keeps nothing of a single file for training.
        changes |= {"dataset": args.data, "eval_samples": 0, "dataset_mix": []}
        if args.data in ("gsm8k", "openai/gsm8k"):
            changes |= {"dataset": "openai/gsm8k", "dataset_config": "main"}
            changes |= {"question_column": "question", "answer_column": "answer"}
            changes |= {"train_split": "train", "test_split": "test"}
    if args.max_tokens:
        changes["eval_max_new_tokens"] = args.max_tokens
        changes["max_completion_length"] = max(
            config.max_completion_length, args.max_tokens + len(config.reasoning_prefix.encode())
        )
    if args.seed is not None:
        changes["seed"] = args.seed
    return replaced(config, **changes), source


def read_questions(args: argparse.Namespace, config: Any) -> list[dict[str, Any]]:
    """The split, or the same fixed subset of it that the trainer evaluates on."""
    from .run.state import subset

    rows = load_script().load_questions(config, args.split)
    if args.samples and args.samples > len(rows):
        raise UserError(f"--samples {args.samples}: {config.dataset} ({args.split}) holds only "
                        f"{len(rows)} questions")  # fmt: skip
    return subset(rows, args.samples) if args.samples else rows


@dataclasses.dataclass(frozen=True)
class Batches:
    """What sampling asks of a trainer's plan."""

    rollout_batch_size: int
    spare_for_rollouts: float = 0.0
    halved: tuple[str, ...] = ()

    def rows_at_once(self, _: int) -> int:
        return self.rollout_batch_size


def make_evaluator(loaded: Any, config: Any, rewards: dict[str, Any], batch_size: int) -> Any:
    """A trainer without what trains (optimizer, master weights, copies of the policy).

    Its own methods encode the questions, sample and call the reward functions.
    """
    from .rewards.calls import RewardCalls
    from .run import progress

    cls = load_script().MLXGRPOTrainer
    evaluator = object.__new__(cls)
    evaluator.args, evaluator.loaded, evaluator.reward_funcs = config, loaded, rewards
    evaluator.model, evaluator.tokenizer = loaded.model, loaded.tokenizer
    evaluator.prefix_ids = loaded.tokenizer.encode(
        config.reasoning_prefix, add_special_tokens=False
    )
    evaluator.reward_calls = RewardCalls(config.reward_timeout)
    evaluator.update_step = evaluator.total_updates = evaluator.rollout = evaluator.step = 0
    evaluator.log = RunLog(dataclasses.replace(config, log_jsonl=False))
    evaluator.rollouts_per_epoch = 1
    evaluator.plan = Batches(batch_size)
    evaluator.interrupted, evaluator.bar = False, progress.no_bar()
    return evaluator


def evaluate(
    args: argparse.Namespace,
    config: Any,
    rewards: dict[str, Any],
    questions: list[dict[str, Any]],
    name: str,
    save: Callable[[dict[str, Any]], Any],
) -> Scores:
    """Ask one model all questions, in batches; each completion is handed to `save`."""
    import mlx.core as mx
    from tqdm import tqdm

    from .memory import plan as memory_plan
    from .memory import this_machine
    from .model import loading
    from .rollouts import merged_layers
    from .settings.reading import replaced

    scores, start = Scores(name), time.perf_counter()
    loaded = open_model(name, trust=args.trust_remote_code)
    config = replaced(config, model_name=name)
    # What is unpacked or joined goes: both are there only before anything is sampled.
    room = memory_plan.HEADROOM * this_machine.budget_bytes(config) - mx.get_active_memory()
    loaded.model = merged_layers.joined(merged_layers.unpacked(loaded.model, room), room)
    evaluator = make_evaluator(loaded, config, rewards, args.batch_size)
    how = evaluator.sampling_with(temperature_of(args, config), config.eval_max_new_tokens)
    number_of = {id(row["prompt"]): i for i, row in enumerate(questions)}
    rows = evaluator.encode(questions, "evaluation")  # leaves too long ones out, copies the rest
    numbers = [number_of[id(row["prompt"])] for row in rows]
    longest = max(len(row["prompt_ids"]) for row in rows) + how.max_tokens
    if beyond := loading.beyond_context(loaded, name, longest, read=longest - 1):
        note(f"note: {beyond}: the longest question and its answer")
    size = max(1, args.batch_size // args.n)
    evaluator.bar = bar = tqdm(
        total=len(rows) * args.n, desc=short(name), unit="sample", disable=None, dynamic_ncols=True
    )
    with bar:
        for first in range(0, len(rows), size):
            part = slice(first, first + size)
            for record in ask(evaluator, how, args.n, numbers[part], rows[part]):
                count(scores, record)
                save({"model": name, **record})
                bar.update()
            bar.set_postfix_str(f"EM {scores.pass_at(args.n, 1):.1%}")
    scores.seconds = time.perf_counter() - start
    return scores


def temperature_of(args: argparse.Namespace, config: Any) -> float:
    """Greedy for a single sample, as the trainer evaluates; else as it samples."""
    if args.temperature is not None:
        return args.temperature
    return 0.0 if args.n == 1 else config.temperature


def ask(
    evaluator: Any, how: Any, n: int, numbers: list[int], rows: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """n completions of each row with what they earned."""
    grpo = load_script()
    keys = [grpo.row_key(evaluator.args.seed, 1, i, j) for i in numbers for j in range(n)]
    responses = evaluator.sample(evaluator.model, rows, keys, how)
    repeated = [row for row in rows for _ in range(n)]
    _, values = evaluator.compute_rewards(repeated, responses)
    for i, (row, response) in enumerate(zip(repeated, responses, strict=True)):
        extracted = grpo.extract_xml_answer(response.text)
        earned = {name: float(column[i]) for name, column in values.items()}
        yield {
            "index": numbers[i // n],
            "sample": i % n,
            "question": row["question"],
            "answer": row["answer"],
            "completion": response.text,
            "extracted_answer": extracted,
            "correct": grpo.same_answer(extracted, row["answer"]),
            "finish_reason": response.finish_reason,
            "tokens": len(response.ids),
            # JSON knows no NaN, which stands for "not applicable"
            "rewards": {name: None if math.isnan(v) else v for name, v in earned.items()},
        }


def count(scores: Scores, record: dict[str, Any]) -> None:
    question = record["index"]
    scores.right[question] = scores.right.get(question, 0) + record["correct"]
    for name, value in record["rewards"].items():
        scores.rewards.setdefault(name, []).append(value)
    scores.completions += 1
    scores.truncated += record["finish_reason"] == "length"
    scores.tokens += record["tokens"]


def short(name: str) -> str:
    """The last two parts of a path, which fit above a column."""
    return "/".join(name.rstrip("/").split("/")[-2:])


def percent(value: float, trials: int) -> str:
    low, high = wilson(value, trials)
    return f"{value:.1%} [{low:.1%}, {high:.1%}]"


def mean_reward(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.3f}" if known else "-"


def table(scores: list[Scores], n: int, wanted: list[int]) -> str:
    """One column per model."""
    names = [short(s.name) for s in scores]
    if len({*names}) < len(names):
        names = [s.name for s in scores]
    rows = [["", *names]]
    if 1 not in wanted or n == 1:
        rows.append(["exact match", *(percent(s.pass_at(n, 1), len(s.right)) for s in scores)])
    for k in wanted if n > 1 else []:
        label = f"pass@{k}" + (" = exact match" if k == 1 else "")
        rows.append([label, *(percent(s.pass_at(n, k), len(s.right)) for s in scores)])
    rows += [
        [f"reward {name}", *(mean_reward(s.rewards[name]) for s in scores)]
        for name in scores[0].rewards
    ]
    rows += [
        ["cut off at the limit", *(f"{s.truncated / s.completions:.1%}" for s in scores)],
        ["tokens a completion", *(f"{s.tokens / s.completions:.1f}" for s in scores)],
        ["questions", *(f"{len(s.right):,}" for s in scores)],
        ["seconds with loading", *(f"{s.seconds:.1f}" for s in scores)],
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def comparison(base: Scores, other: Scores) -> str:
    """The paired test on the questions that both were asked."""
    common = base.right.keys() & other.right.keys()
    better = sum(other.right[i] > base.right[i] for i in common)
    worse = sum(other.right[i] < base.right[i] for i in common)
    p = sign_test(better, worse)
    shown = "p < 0.0001" if p < 0.0001 else f"p = {p:.4f}"
    return (
        f"{short(other.name)} against {short(base.name)}: better on {better}, worse on {worse}, "
        f"equal on {len(common) - better - worse} questions, {shown} (paired exact sign test)"
    )


def report(args: argparse.Namespace, config: Any) -> int:
    """Evaluate every model and print what came out."""
    from .base.say import say
    from .device import runtime
    from .rewards import by_name

    for name in args.models:  # all of them, before the first takes its time
        check_model(name)
    rewards = by_name.load_rewards(config, load_script().REWARDS)
    questions = read_questions(args, config)
    runtime.set_memory_limits(config.wired_limit_gb, config.cache_limit_gb)
    if kernels := runtime.keep_compiled_kernels():
        say(f"speed     {kernels}")
    temperature = temperature_of(args, config)
    how = f"{args.n} samples at temperature {temperature:g}" if temperature else "greedy"
    say(
        f"data      {config.dataset} ({args.split}): {counted(len(questions), 'question')}, {how}, "
        f"at most {counted(config.eval_max_new_tokens, 'token')}"
    )
    with completions_file(args.output) as save:
        scores = [evaluate(args, config, rewards, questions, name, save) for name in args.models]
    say(table(scores, args.n, args.k))
    for other in scores[1:]:
        say(comparison(scores[0], other))
    if any(s.truncated > 0.05 * s.completions for s in scores):
        say("More than 5 % were cut off before they could answer: raise --max-tokens.")
    return 0


@contextmanager
def completions_file(path: Path | None) -> Iterator[Callable[[dict[str, Any]], Any]]:
    """A function that appends a record; what was asked before Ctrl-C or an error is kept."""
    if path is None:
        yield lambda _: None
        return
    written = 0
    with path.open("x", encoding="utf-8", buffering=1) as file:  # a line at a time

        def save(record: dict[str, Any]) -> None:
            nonlocal written
            file.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
            written += 1

        try:
            yield save
        finally:
            note(f"{counted(written, 'completion')} in {path}")


def main(argv: list[str] | None = None) -> int:
    """Returns 0, 2 (bad input), 1 (a run that failed) or 130 (Ctrl-C)."""
    args = build_parser().parse_args(argv)

    def command() -> int:
        from .base.say import say

        check_arguments(args)
        args.models = [os.path.expanduser(name) for name in args.models]
        config, source = resolve(args)
        say(f"settings  from {source}")
        return report(args, config)

    return run(command)


if __name__ == "__main__":
    sys.exit(main())
