"""How often is a model right? Exact match and pass@k, with intervals, for one model or several.

    uv run python utils/evaluate_model.py models/tiny-math outputs/tiny-math/final

Prompt, sampler, rewards and the reading of answers are the trainer's own.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TypedDict

if __name__ == "__main__" and not __package__:  # typed as a script: sys.path[0] is utils/ itself
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    __package__ = "utils"

from .base.errors import UserError
from .base.intervals import percent
from .base.say import Parser, say
from .base.script import load_script
from .base.task_progress import Progress
from .base.text import counted, json_line
from .data.files import Row
from .data.questions import encode_questions
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
from .rewards.answers import extract_xml_answer, same_answer

if TYPE_CHECKING:  # `--help` answers without them
    from .data.tokenizer import Messages, Tokenizer
    from .rewards.calls import Reward
    from .settings.reading import Value
    from .settings.run_settings import Settings

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
two-sided sign test over questions, which for one sample is McNemar's. Where eval_metric names a
reward (last_number), a sample is right if that is above 0."""


def ks(text: str) -> list[int]:
    parse = number(int, lambda v: v >= 1, "whole numbers from 1 up, such as 1,4,16")
    return sorted({parse(part) for part in text.split(",")})


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
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


def sign_test(better: int, worse: int) -> float:
    """Two-sided exact p-value that better and worse are equally likely (McNemar's exact test)."""
    total = better + worse
    tail = sum(math.comb(total, i) for i in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**total)


class Record(TypedDict):
    """What is told of a completion, as JSON."""

    index: int
    sample: int
    question: object
    answer: str
    completion: str
    extracted_answer: str
    correct: bool
    finish_reason: str
    tokens: int
    rewards: dict[str, float | None]
    prompt: NotRequired[Messages]
    """Where the question came with other messages."""


class SavedRecord(Record):
    model: str
    split: str
    """Of the data: what was asked of a test split must not be trained on."""


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


def resolve(args: argparse.Namespace) -> tuple[Settings, str]:
    """The trainer's configuration with the arguments on top, and where it is from."""
    from .settings.reading import replaced  # here: `--help` answers at once

    config, source = trainer_settings(args.config, args.set, args.models)
    changes: dict[str, Value] = {"trust_remote_code": args.trust_remote_code}
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


def read_questions(args: argparse.Namespace, config: Settings) -> list[Row]:
    """The split, or the same fixed subset of it that the trainer evaluates on."""
    from .data.order import subset

    rows = load_script().load_questions(config, args.split)
    if args.samples and args.samples > len(rows):
        raise UserError(f"--samples {args.samples}: {config.dataset} ({args.split}) holds only "
                        f"{len(rows)} questions")  # fmt: skip
    return subset(rows, args.samples) if args.samples else rows


class Asker:
    """A model, asked and judged as the trainer does it."""

    def __init__(
        self, args: argparse.Namespace, config: Settings, rewards: dict[str, Reward], name: str
    ) -> None:
        from .rewards.rewards import Rewards
        from .rollouts import asking, sampler
        from .rollouts.stop_rule import StopRule

        self.name, self.config = name, config
        self.loaded = loaded = open_model(name, trust=args.trust_remote_code)
        prefix = loaded.tokenizer.encode(config.reasoning_prefix, add_special_tokens=False)
        temperature, most = temperature_of(args, config), config.eval_max_new_tokens
        self.how = sampler.sampling_settings(config, len(prefix), temperature, most)
        stop = StopRule(loaded.tokenizer, tuple(config.stop_strings), config.reasoning_prefix)
        self.sampler = asking.sampler_of_command(
            load_script().sample_batch, stop, config, loaded, args.batch_size
        )
        self.rewards = Rewards(lambda: rewards, config, loaded.tokenizer, len(prefix))

    @property
    def encoding(self) -> tuple[Tokenizer, int, Settings]:
        """How questions become prompts."""
        return self.loaded.tokenizer, self.loaded.vocabulary, self.config

    def note_long(self, rows: list[Row]) -> None:
        """Say so where a question and its answer are more than the model was made for."""
        from .model import loading

        longest = max(len(row["prompt_ids"]) for row in rows) + self.how.max_tokens
        if beyond := loading.beyond_context(self.loaded, self.name, longest, read=longest - 1):
            note(f"note: {beyond}: the longest question and its answer")

    def ask(self, n: int, numbers: list[int], rows: list[Row]) -> Iterator[Record]:
        """n completions of each row with what they earned."""
        grpo, seed = load_script(), self.config.seed
        keys = [grpo.random_key(seed, grpo.EVALUATION, (i, j)) for i in numbers for j in range(n)]
        completions = self.sampler(self.loaded.model, rows, keys, self.how)
        repeated = [row for row in rows for _ in range(n)]
        values = self.rewards(repeated, completions)
        for i, (row, completion) in enumerate(zip(repeated, completions, strict=True)):
            extracted = extract_xml_answer(completion.text)
            earned = {name: float(column[i]) for name, column in values.items()}
            record: Record = {
                "index": numbers[i // n],
                "sample": i % n,
                "question": row["question"],
                "answer": row["answer"],
                "completion": completion.text,
                "extracted_answer": extracted,
                "correct": is_right(self.config.eval_metric, extracted, row["answer"], earned),
                "finish_reason": completion.finish_reason,
                "tokens": completion.sampled,
                # JSON knows no NaN, which stands for "not applicable"
                "rewards": {name: None if math.isnan(v) else v for name, v in earned.items()},
            }
            yield with_conversation(record, row["prompt"])


def with_conversation(record: Record, messages: Messages) -> Record:
    """Of a question that came with other messages than a system prompt, all of them."""
    if sum(message["role"] != "system" for message in messages) > 1:
        record["prompt"] = messages
    return record


def is_right(metric: str, given: str, expected: str, earned: dict[str, float]) -> bool:
    """By exact match, or where `eval_metric` names a reward, by whether that is above 0."""
    return same_answer(given, expected) if metric == "em" else earned[metric] > 0


def evaluate(
    args: argparse.Namespace,
    config: Settings,
    rewards: dict[str, Reward],
    questions: list[Row],
    name: str,
    save: Callable[[SavedRecord], None],
) -> Scores:
    """Ask one model all questions, in batches; each completion is handed to `save`."""
    from .settings.reading import replaced

    scores, start = Scores(name), time.perf_counter()
    os.chdir(config.started_in)  # where a reward may have left, and other models are named from
    asker = Asker(args, replaced(config, model_name=name), rewards, name)
    rows = encode_questions(*asker.encoding, questions, "evaluation")  # leaves too long ones out
    number_of = {id(row["prompt"]): i for i, row in enumerate(questions)}
    numbers = [number_of[id(row["prompt"])] for row in rows]
    asker.note_long(rows)
    size = max(1, args.batch_size // args.n)
    shown = Progress(len(rows) * args.n, "sample", label=f"{short(name)}: ", tell=note)
    with shown:
        asker.sampler.pulse = asker.rewards.pulse = shown.stage
        for first in range(0, len(rows), size):
            part = slice(first, first + size)
            records = [*asker.ask(args.n, numbers[part], rows[part])]
            for record in records:
                count(scores, record)
                save({"model": name, "split": args.split, **record})
            shown.step(len(records), f"{config.eval_metric} {scores.pass_at(args.n, 1):.1%}")
    scores.seconds = time.perf_counter() - start
    return scores


def temperature_of(args: argparse.Namespace, config: Settings) -> float:
    """Greedy for a single sample, as the trainer evaluates; else as it samples."""
    if args.temperature is not None:
        return args.temperature
    return 0.0 if args.n == 1 else config.temperature


def count(scores: Scores, record: Record) -> None:
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


def mean_reward(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.3f}" if known else "-"


def table(scores: list[Scores], n: int, wanted: list[int], metric: str = "em") -> str:
    """One column per model."""
    names = [short(s.name) for s in scores]
    if len({*names}) < len(names):
        names = [s.name for s in scores]
    rows = [["", *names]]
    for label, text in (rates(n, wanted, metric) | rewards_of(scores[0]) | COSTS).items():
        rows.append([label, *map(text, scores)])
    return aligned(rows)


def rates(n: int, wanted: list[int], metric: str) -> dict[str, Callable[[Scores], str]]:
    """Lines of the table on how often a model is right: pass@1 is exact match (or the metric)."""
    match = "exact match" if metric == "em" else metric

    def rate(k: int) -> Callable[[Scores], str]:
        return lambda s: percent(s.pass_at(n, k), len(s.right))

    if n == 1:
        return {match: rate(1)}
    first = {} if 1 in wanted else {match: rate(1)}
    equal = {1: f" = {match}"}
    return first | {f"pass@{k}{equal.get(k, '')}": rate(k) for k in wanted}


def rewards_of(scores: Scores) -> dict[str, Callable[[Scores], str]]:
    """Lines of the table on the rewards, which are the same for all models."""

    def mean(name: str) -> Callable[[Scores], str]:
        return lambda s: mean_reward(s.rewards[name])

    return {f"reward {name}": mean(name) for name in scores.rewards}


COSTS: dict[str, Callable[[Scores], str]] = {
    "cut off at the limit": lambda s: f"{s.truncated / s.completions:.1%}",
    "tokens a completion": lambda s: f"{s.tokens / s.completions:.1f}",
    "questions": lambda s: f"{len(s.right):,}",
    "seconds with loading": lambda s: f"{s.seconds:.1f}",
}


def aligned(rows: list[list[str]]) -> str:
    """Cells of all rows padded to the width of their column."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
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


def report(args: argparse.Namespace, config: Settings) -> int:
    """Evaluate every model and print what came out."""
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
    say(table(scores, args.n, args.k, config.eval_metric))
    for other in scores[1:]:
        say(comparison(scores[0], other))
    if any(s.truncated > 0.05 * s.completions for s in scores):
        say("More than 5 % were cut off before they could answer: raise --max-tokens.")
    return 0


@contextmanager
def completions_file(path: Path | None) -> Iterator[Callable[[SavedRecord], None]]:
    """A function that appends a record; what was asked before Ctrl-C or an error is kept."""
    if path is None:
        yield lambda _: None
        return
    written = 0
    with path.open("x", encoding="utf-8", buffering=1) as file:  # a line at a time

        def save(record: SavedRecord) -> None:
            nonlocal written
            file.write(json_line(record, default=str) + "\n")
            written += 1

        try:
            yield save
        finally:
            note(f"{counted(written, 'completion')} in {path}")


def main(argv: list[str] | None = None) -> int:
    """Returns 0, 2 (bad input), 1 (a run that failed) or 130 (Ctrl-C)."""
    args = build_parser().parse_args(argv)

    def command() -> int:
        check_arguments(args)
        args.models = [os.path.expanduser(name) for name in args.models]
        config, source = resolve(args)
        say(f"settings  from {source}")
        return report(args, config)

    return run(command)


if __name__ == "__main__":
    code = main()
    from .run.ending import leave  # brings MLX: not for --help

    leave(code)
