"""The recipe of `utils/pretrain.py` that made `models/tiny-math`, the embedded model.

    uv run python utils/pretrain.py --config configs/pretrain/tiny_math.toml

Two stages, both plain cross-entropy on the completion:

1. good demonstrations of an endless supply of word problems, until the arithmetic is known;
2. a short finish on demonstrations of mixed quality, so that the model's usual answer is a bad one
   and a good one is sampled about a third of the time: a fair subject for reinforcement learning.

The folder then holds weights, tokenizer, train.jsonl, test.jsonl and `pretrain.json` (figures and
settings). Data and tokenizer come out the same everywhere; weights differ by rounding between
devices, and on a CPU the command takes hours instead of minutes.
"""

import dataclasses
import itertools
import json
import os
import platform
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx_lm.generate import batch_generate
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import get_total_parameters, save_config, save_model
from transformers import PreTrainedTokenizerFast

from ..base.errors import UserError
from ..base.say import say
from ..base.task_progress import Progress
from ..model.shape import ModelConfig
from . import tiny_math
from .model import new_model
from .ranges import check_numbers

T = TypeVar("T")
WEIGHTS, RECORDS = "model.safetensors", ("generation_config.json", "pretrain.json")
Figures = dict[str, dict[str, float]]
"""Of an evaluation: kind of questions -> metric -> share."""


@dataclasses.dataclass
class TinyMathConfig:
    """Settings of both stages; names as in LitGPT where it has one."""

    recipe: str = "tiny_math"
    """This recipe; without the key the file is one for plain pretraining."""
    out_dir: str = "outputs/pretrain"
    """Folder for the model, its tokenizer and the data."""
    overwrite: bool = False
    """Replace the model and the data that out_dir holds."""
    seed: int = 0
    """Seed of data, weights, batches and samples."""
    train_size: int = 4000
    """Questions in train.jsonl."""
    test_size: int = 600
    """Questions in test.jsonl, half of them on held-out operand pairs."""
    vocab_size: int = 448
    """Tokens of the tokenizer; a multiple of 64, so that the embedding quantizes."""
    tokenizer_samples: int = 6000
    """Problems whose text the tokenizer is trained on."""
    model: ModelConfig = dataclasses.field(default_factory=dict)
    """The table [model]: config.json of a model type that mlx-lm knows."""
    global_batch_size: int = 256
    """Sequences per optimizer step."""
    pool_size: int = 200_000
    """Different demonstrations drawn for stage 1; batches walk through them in random order."""
    max_steps: int = 2500
    """Optimizer steps of stage 1."""
    learning_rate: float = 2e-3
    """Peak learning rate of stage 1; cosine to zero."""
    lr_warmup_steps: int = 300
    """Steps of linear warm-up of stage 1."""
    finish_pool_size: int = 100_000
    """Different demonstrations drawn for stage 2."""
    finish_steps: int = 1000
    """Optimizer steps of stage 2; 0 leaves the model well behaved."""
    finish_learning_rate: float = 3e-4
    """Peak learning rate of stage 2."""
    finish_warmup_steps: int = 50
    """Steps of linear warm-up of stage 2."""
    one_step: dict[str, float] = dataclasses.field(default_factory=lambda: {"good": 1.0})
    """The table [one_step]: weight of each kind of demonstration in stage 2, one-step problems."""
    two_step: dict[str, float] = dataclasses.field(default_factory=lambda: {"good": 1.0})
    """The table [two_step]: the same for two-step problems."""
    weight_decay: float = 0.01
    """AdamW's weight decay."""
    beta1: float = 0.9
    """AdamW's first moment."""
    beta2: float = 0.98
    """AdamW's second moment."""
    max_norm: float = 1.0
    """Gradients are clipped to this global norm."""
    compile: bool = True
    """Compile the step with mx.compile; slower to start, pays on a GPU."""
    max_new_tokens: int = 32
    """Longest completion in evaluations."""
    eval_interval: int = 1000
    """Steps of stage 1 between greedy evaluations on the test questions; 0 = at the end only."""
    eval_samples: int = 4
    """Completions per test question at temperature 1 in the final evaluation."""
    log_interval: int = 50
    """Steps between updates of the loss that is shown with the progress."""

    def __post_init__(self) -> None:
        may_be_zero = {"seed", "finish_steps", "weight_decay", "eval_interval"}
        check_numbers(vars(self), may_be_zero)
        if self.vocab_size % 64 or self.vocab_size < 320:
            raise UserError(
                f"vocab_size = {self.vocab_size}: must be a multiple of 64 from 320 (256 bytes, "
                "special tokens, and some merges)"
            )
        if self.test_size % 2:
            raise UserError(f"test_size = {self.test_size}: must be even (half is held out)")
        self._check_stage("pool_size", "max_steps", "lr_warmup_steps")
        if self.finish_steps:
            self._check_stage("finish_pool_size", "finish_steps", "finish_warmup_steps")
        for name in ("one_step", "two_step"):
            _check_mixture(name, getattr(self, name))

    def _check_stage(self, pool: str, steps: str, warmup: str) -> None:
        if getattr(self, pool) < self.global_batch_size:
            raise UserError(
                f"{pool} = {getattr(self, pool)}: must be at least global_batch_size = "
                f"{self.global_batch_size}"
            )
        if getattr(self, warmup) >= getattr(self, steps):
            raise UserError(
                f"{warmup} = {getattr(self, warmup)}: must be less than {steps} = "
                f"{getattr(self, steps)}"
            )


def _check_mixture(name: str, mixture: dict[str, float]) -> None:
    for kind, weight in mixture.items():
        if kind not in tiny_math.DEMONSTRATIONS:
            known = ", ".join(tiny_math.DEMONSTRATIONS)
            raise UserError(f"[{name}] {kind}: unknown kind of demonstration; known: {known}")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or weight < 0:
            raise UserError(f"[{name}] {kind} = {weight!r}: a weight is a number from 0 up")
    if not sum(mixture.values()):
        raise UserError(f"[{name}] needs a kind with a weight above 0")


@dataclasses.dataclass
class Pool:
    """Padded sequences: tokens (N, T), and mask (N, T) with ones on completions."""

    tokens: mx.array
    mask: mx.array

    def batches(self, size: int, rng: np.random.Generator) -> Iterator[tuple[mx.array, mx.array]]:
        """Batches (B, T) without end, each pass over the pool in a new random order."""
        total = self.tokens.shape[0]
        while True:
            order = rng.permutation(total)
            for start in range(0, total - size + 1, size):
                rows = mx.array(order[start : start + size])
                yield self.tokens[rows], self.mask[rows]


def make_pool(
    tokenizer: PreTrainedTokenizerFast, examples: list[tuple[tiny_math.Problem, str]]
) -> Pool:
    say(f"tokenizing {len(examples):,} demonstrations")
    prompts = tiny_math.prompt_ids(tokenizer, [problem.question for problem, _ in examples])
    completions = tiny_math.completion_ids(tokenizer, [text for _, text in examples])
    length = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    tokens = np.full((len(examples), length), tokenizer.pad_token_id, dtype=np.int32)
    mask = np.zeros((len(examples), length), dtype=np.float32)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        end = len(prompt) + len(completion)
        tokens[row, :end] = prompt + completion
        mask[row, len(prompt) : end] = 1
    return Pool(mx.array(tokens), mx.array(mask))


def good_examples(data: tiny_math.TinyMath, size: int) -> list[tuple[tiny_math.Problem, str]]:
    rng = random.Random(data.seed)
    drawn = itertools.islice(data.stream("pretrain"), size)
    problems = with_progress(drawn, size, "drawing demonstrations for stage 1")
    return [(problem, tiny_math.good(problem, rng)) for problem in problems]


def mixed_examples(
    data: tiny_math.TinyMath, config: TinyMathConfig
) -> list[tuple[tiny_math.Problem, str]]:
    rng = random.Random(f"tiny-math mixture {data.seed}")
    mixtures = {1: config.one_step, 2: config.two_step}
    size = config.finish_pool_size
    drawn = itertools.islice(data.stream("finish"), size)
    problems = with_progress(drawn, size, "drawing demonstrations for stage 2")
    return [(p, tiny_math.demonstrate(p, mixtures[len(p.ops)], rng)) for p in problems]


def build_model(config: TinyMathConfig) -> tuple[nn.Module, ModelConfig]:
    """A model with fresh float32 weights and its config.json."""
    sizes = {"vocab_size": config.vocab_size, "tie_word_embeddings": True}
    model_config = {**config.model, **sizes, "torch_dtype": "float32"}
    return new_model(model_config, config.seed), model_config


def completion_loss(model: nn.Module, tokens: mx.array, mask: mx.array) -> mx.array:
    """Mean cross-entropy where mask is 1, on completions; tokens and mask (B, T)."""
    logits = model(tokens[:, :-1])  # (B, T-1, V)
    losses = nn.losses.cross_entropy(logits, tokens[:, 1:])  # (B, T-1)
    return (losses * mask[:, 1:]).sum() / mask[:, 1:].sum()


def learning_rate_schedule(peak: float, warmup: int, steps: int) -> Callable[[mx.array], mx.array]:
    """Linear to `peak` over `warmup` steps, then cosine to zero at `steps`."""
    rise = optim.linear_schedule(0.0, peak, warmup)
    return optim.join_schedules([rise, optim.cosine_decay(peak, steps - warmup)], [warmup])


def fit(
    model: nn.Module,
    pool: Pool,
    config: TinyMathConfig,
    schedule: Callable[[mx.array], mx.array],
    steps: int,
    label: str,
    after_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Train `model` in place for `steps` optimizer steps."""
    optimizer = optim.AdamW(
        learning_rate=schedule,
        betas=[config.beta1, config.beta2],
        weight_decay=config.weight_decay,
        bias_correction=True,
    )
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]
    loss_and_grad = nn.value_and_grad(model, completion_loss)

    def step_once(tokens: mx.array, mask: mx.array) -> mx.array:
        loss, grads = loss_and_grad(model, tokens, mask)
        grads, _ = optim.clip_grad_norm(grads, config.max_norm)
        optimizer.update(model, grads)
        return loss

    if config.compile:
        step_once = mx.compile(step_once, inputs=state, outputs=state)
        say(f"{label}: the first step is compiled, which can take a minute")
    batches = pool.batches(config.global_batch_size, np.random.default_rng(config.seed))
    with Progress(steps, "step", label=f"{label}: ") as shown:
        for step in range(1, steps + 1):
            loss = step_once(*next(batches))
            mx.eval(loss, state)
            known = step in (1, steps) or step % config.log_interval == 0
            shown.step(figures=f"loss {loss.item():.4f}" if known else "")
            after_step(step)


MANY = 10_000


def with_progress(items: Iterable[T], count: int, label: str) -> Iterator[T]:
    """The items, with their number shown if there are many."""
    say(f"{label}: {count:,}")
    with Progress(count, "problem", quiet=count < MANY) as shown:
        for item in items:
            yield item
            shown.step()


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    questions: list[str],
    temperature: float,
    max_new_tokens: int,
) -> list[str]:
    """One completion per question (without the prefix and the end-of-text token)."""
    rows = min(256, len(questions))
    response = batch_generate(
        model,
        TokenizerWrapper(tokenizer),
        tiny_math.prompt_ids(tokenizer, questions),
        max_tokens=max_new_tokens,
        sampler=make_sampler(temp=temperature),
        completion_batch_size=rows,
        prefill_batch_size=rows,
    )
    return response.texts


def summarize(grades: list[tiny_math.Grade]) -> dict[str, float]:
    """Shares: exact match, format, and of the equations written those that are true."""
    written = sum(grade.equations for grade in grades)
    return {
        "exact_match": round(sum(grade.exact for grade in grades) / len(grades), 4),
        "format": round(sum(grade.well_formed for grade in grades) / len(grades), 4),
        "arithmetic": round(sum(g.equations_right for g in grades) / max(written, 1), 4),
    }


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    data: tiny_math.TinyMath,
    config: TinyMathConfig,
    temperature: float,
) -> Figures:
    """Figures on all test questions, on those with seen pairs and on the held-out ones."""
    repeats = config.eval_samples if temperature else 1
    problems = data.test * repeats
    say(f"evaluating: {len(problems):,} completions at temperature {temperature:g}")
    questions = [problem.question for problem in problems]
    texts = generate(model, tokenizer, questions, temperature, config.max_new_tokens)
    grades = [tiny_math.grade(t, p.answer) for t, p in zip(texts, problems, strict=True)]
    marks = [data.is_held_out(problem) for problem in problems]
    parts = {
        "all": grades,
        "seen pairs": [g for g, mark in zip(grades, marks, strict=True) if not mark],
        "held-out pairs": [g for g, mark in zip(grades, marks, strict=True) if mark],
    }
    return {name: summarize(part) for name, part in parts.items()}


def report(title: str, figures: Figures) -> None:
    for part, values in figures.items():
        line = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
        say(f"{title:<24} {part:<15} {line}")


def train_both_stages(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    data: tiny_math.TinyMath,
    config: TinyMathConfig,
) -> dict[str, dict[str, Figures]]:
    """Train `model` in place and return the figures after each stage."""

    def greedy() -> Figures:
        return evaluate(model, tokenizer, data, config, temperature=0.0)

    def now_and_then(step: int) -> None:
        if config.eval_interval and step % config.eval_interval == 0 and step < config.max_steps:
            report(f"stage 1, step {step}", greedy())

    schedule = learning_rate_schedule(
        config.learning_rate, config.lr_warmup_steps, config.max_steps
    )
    pool = make_pool(tokenizer, good_examples(data, config.pool_size))
    fit(model, pool, config, schedule, config.max_steps, "stage 1", now_and_then)
    figures = {"stage 1": final_figures(model, tokenizer, data, config, "stage 1")}
    if config.finish_steps:
        schedule = learning_rate_schedule(
            config.finish_learning_rate, config.finish_warmup_steps, config.finish_steps
        )
        pool = make_pool(tokenizer, mixed_examples(data, config))
        fit(model, pool, config, schedule, config.finish_steps, "stage 2")
        figures["stage 2"] = final_figures(model, tokenizer, data, config, "stage 2")
    return figures


def final_figures(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    data: tiny_math.TinyMath,
    config: TinyMathConfig,
    stage: str,
) -> dict[str, Figures]:
    mx.random.seed(config.seed)
    figures = {}
    for name, temperature in (("greedy", 0.0), ("temperature 1", 1.0)):
        figures[name] = evaluate(model, tokenizer, data, config, temperature)
        report(f"{stage}, {name}", figures[name])
    return figures


def save(
    folder: Path,
    model: nn.Module,
    model_config: ModelConfig,
    tokenizer: PreTrainedTokenizerFast,
    record: dict[str, object],
) -> None:
    """Weights, config.json, generation_config.json and pretrain.json, for `mlx_lm.load`.

    They are written aside and then renamed, so that a stop leaves the model that was there.
    """
    stops = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    with aside(folder) as new:
        save_model(new, model)
        save_config({**model_config, **stops}, new / "config.json")
        for name, content in (("generation_config", stops), ("pretrain", record)):
            (new / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
        for name in (WEIGHTS, "model.safetensors.index.json", "config.json", *RECORDS):
            (new / name).replace(folder / name)


@contextmanager
def aside(folder: Path) -> Iterator[Path]:
    """A folder in this one, for files before they take the place of others."""
    new = folder / ".mlx-grpo-incomplete"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        yield new
    finally:
        shutil.rmtree(new, ignore_errors=True)


def refuse_to_overwrite(config: TinyMathConfig, data_only: bool) -> None:
    """Raises UserError where out_dir holds a model, unless it may be replaced; or, also then, what
    this recipe did not make."""
    folder = Path(config.out_dir)
    found = [name for name in (WEIGHTS, "config.json", *RECORDS) if os.path.lexists(folder / name)]
    if not found or data_only:
        return
    if not config.overwrite:
        raise UserError(
            f"out_dir = {config.out_dir!r} already holds a model ({found[0]}): choose another "
            "--out-dir, or --overwrite it"
        )
    if not made_here(folder):
        raise UserError(
            f"out_dir = {config.out_dir!r} holds {found[0]}, which this recipe did not make: "
            "choose another --out-dir"
        )


def made_here(folder: Path) -> bool:
    try:
        record = json.loads((folder / "pretrain.json").read_text(encoding="utf-8"))
        return bool(record["settings"]["recipe"] == "tiny_math")
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def write_data(
    folder: Path,
    data: tiny_math.TinyMath,
    tokenizer: PreTrainedTokenizerFast,
    config: TinyMathConfig,
) -> None:
    """train.jsonl, test.jsonl and the tokenizer.

    Raises:
        UserError: one is there with something else in it, and may not be replaced.
    """
    with aside(folder) as new:
        data.write(new, config.train_size)
        tokenizer.save_pretrained(new)
        for file in sorted(new.iterdir()):
            old = folder / file.name
            if not os.path.lexists(old) or config.overwrite:
                continue
            if not old.is_file() or old.read_bytes() != file.read_bytes():
                raise UserError(
                    f"out_dir = {config.out_dir!r} already holds another {file.name}: choose "
                    "another --out-dir, or --overwrite it"
                )
        for file in sorted(new.iterdir()):
            file.replace(folder / file.name)


def run(config: TinyMathConfig, data_only: bool) -> None:
    """Make the data and the tokenizer, then train and save the model unless `data_only`."""
    started = time.perf_counter()
    folder = Path(config.out_dir)
    model, model_config = build_model(config)
    refuse_to_overwrite(config, data_only)
    say("making the data and the tokenizer")
    data = tiny_math.TinyMath.make(config.seed, config.test_size)
    corpus = tiny_math.tokenizer_corpus(data, config.tokenizer_samples)
    tokenizer = tiny_math.build_tokenizer(corpus, config.vocab_size)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_data(folder, data, tokenizer, config)
    except OSError as error:
        raise UserError(f"out_dir = {config.out_dir!r}: {error.strerror}") from None
    say(f"{folder}: train.jsonl, test.jsonl and the tokenizer are written")
    if data_only:
        return
    parameters = get_total_parameters(model)
    say(f"{parameters:,} parameters in float32 on {mx.default_device()}")
    figures = train_both_stages(model, tokenizer, data, config)
    used = dataclasses.asdict(config)
    del used["out_dir"], used["overwrite"]  # a path of this machine, and what was there
    record = {
        "parameters": parameters,
        "figures": figures,
        "seconds": round(time.perf_counter() - started),
        "device": mx.default_device().type.name,
        "settings": used,
        "versions": versions(),
    }
    save(folder, model, model_config, tokenizer, record)
    say(f"saved to {folder} in {record['seconds']} s")


def versions() -> dict[str, str]:
    names = ("mlx", "mlx-lm", "transformers", "tokenizers", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in names}
