#!/usr/bin/env python3
"""GRPO: teach a language model to reason by reinforcement learning, in one file, on MLX.

One update of group relative policy optimization (DeepSeekMath, arXiv:2402.03300) is:

  1. sample a group of completions for each of a few prompts from the policy     (rollouts)
  2. score every completion with reward functions                                (rewards)
  3. advantage = how much better than its own group, in standard deviations      (no value model)
  4. raise the log-probability of the tokens of good completions and lower that of bad ones,
     clipped where the policy has moved too far from what it was before the update (loss)

In symbols, with the functions that compute them, for rewards R and policies pi:

    A = (R - mean R) / (std R + advantage_eps), in each group       group_advantages
    r = pi / pi_old, old: before the updates on this rollout        policy_ratio
    w = pi_old / pi_sampler, a 4-bit copy of pi or an earlier pi    importance_weights
    J = min(r A, clip(r, 1 - clip_eps, 1 + clip_eps) A)             clipped_surrogate
    loss = mean over tokens, then sequences, of -w J + kl_coeff KL  sequence_weights, grpo_loss

What was simplified away: the value model; the KL term unless `kl_coeff` > 0 (then k3 against a
frozen reference); and, with `num_iterations` = 1, the old policy: r is 1, its gradient grad log pi.

    uv run mlx-grpo.py --config configs/tiny_math.toml     watch a tiny model learn, offline
    uv run mlx-grpo.py --config configs/default.toml       Qwen2.5-1.5B-Instruct on GSM8K
    uv run mlx-grpo.py --help                              every setting with its meaning

Shapes in comments: P prompts of G completions each; B sequences, all P x G or a batch of them; T
tokens, of which the loss sees a window, the last W; V vocabulary. `utils/` holds what changes only
where, how fast or how it looks; the mathematics of GRPO is all here.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

from utils.device import runtime

# Before MLX is imported: its CPU wheel bundles a BLAS that is 15 to 50 times slower.
BLAS = runtime.preload_blas(as_command=__name__ == "__main__")

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from utils.base.say import say
from utils.data import chat_template, files, order
from utils.device import cores, fast
from utils.gradient import adamw, on_cores, scorer, shared_prompts
from utils.memory import retry, this_machine
from utils.memory.meter import timed
from utils.model import loading
from utils.model.adapters import without_adapters
from utils.model.copies import quantize_copy, quantizes
from utils.model.loading import LoadedModel, load_model
from utils.model.tiktoken_wrapper import TiktokenTokenizerWrapper as TiktokenTokenizerWrapper
from utils.rewards import builtin, by_name, for_trainer
from utils.rollouts import caches, compiled_step, draw, merged_layers, sampler
from utils.rollouts.stop_rule import Reader, StopRule
from utils.run import command_line, ending, progress
from utils.run.log import TokenSums, rollout_metrics
from utils.run.state import RunState, due, subset
from utils.settings import checks, reading
from utils.settings.run_settings import Settings

# mlx_lm, transformers and datasets take seconds to import, so that happens where they are used:
# `--help` and a mistyped setting answer at once.

ROOT = Path(__file__).resolve().parent
SYSTEM_PROMPT = """
Respond in the following format:
<reasoning>
...
</reasoning>
<answer>
...
</answer>
"""


@dataclass
class MLXGRPOConfig(Settings):
    """Settings of the algorithm: model, prompts, rewards, sampling, loss, advantages, optimizer.

    Those that change only where, how fast or how it looks are in utils/settings/run_settings.py.
    Precedence of both: these defaults < TOML file < `--set key=value`.
    """

    model_name: str = "Qwen/Qwen2.5-1.5B-Instruct"
    """Model to train: a folder, or a Hugging Face hub name."""
    dataset: str = "openai/gsm8k"
    """Hub name, or a .jsonl/.json/.csv/.parquet file, or a folder of such files named by split."""
    seed: int = 0
    """Decides data order, every sampled token, adapter initialisation and dropout."""
    train_type: str = "auto"
    """full, lora, dora; auto is full, or lora when the model is quantized."""

    system_prompt: str = SYSTEM_PROMPT
    """System message; empty for none."""
    reasoning_prefix: str = "<reasoning>\n"
    """Text every completion starts with; given, not sampled."""
    max_prompt_length: int = 512
    """Longer prompts (tokens) are left out and counted, never cut."""

    reward_funcs: list[str] = field(
        default_factory=lambda: ["correctness", "xmlcount", "soft_format", "int"]
    )
    """Built-in names (correctness, int, strict_format, soft_format, xmlcount, math, cosine, length,
    soft_overlong, repetition, remote_rm, reward_model, judge), or module:function, or
    file.py:function with TRL's interface. Reward files are code: they run with your rights."""
    reward_weights: list[float] = field(default_factory=list)
    """One factor per reward function; empty: all 1."""

    num_generations: int = 64
    """Completions sampled per prompt: the group."""
    batch_size: int = 1
    """Prompts per batch (a batch is the unit of `step`)."""
    gradient_accumulation_steps: int = 4
    """Batches per optimizer update."""
    num_epochs: int = 1
    """Passes over the data."""
    max_updates: int = 0
    """Stop (and end the schedule) after so many optimizer updates; 0 all."""
    num_iterations: int = 1
    """Optimizer updates on each rollout batch; from the second on, clip_eps limits the step."""
    sync_every_updates: int = 1
    """Refresh the sampling policy after so many updates; above 1, rollouts are off-policy."""
    quantize_for_rollouts: bool = True
    """Sample (and take the reference) from 4-bit copies, corrected by importance weights."""

    temperature: float = 0.7
    """Sampling temperature; log-probabilities are taken at it everywhere."""
    top_k: int = 0
    """Sample from the k most probable tokens; 0 off. Biases the gradient, as top_p and min_p do."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this much probability; 1 off."""
    min_p: float = 0.0
    """Sample from tokens with at least this fraction of the best one's probability; 0 off."""
    max_new_tokens: int = 512
    """Most tokens sampled per completion."""
    max_completion_length: int = 1024
    """Most tokens of a completion with the given reasoning prefix."""
    stop_strings: list[str] = field(default_factory=lambda: ["</answer>"])
    """Text that ends a completion; empty: only the end-of-sequence token does (and is trained)."""

    loss_type: str = "grpo"
    """grpo (clipped ratio, mean over sequences of token means), bnpo and dapo (over all tokens),
    dr_grpo (token sums over sequences x longest possible completion), gspo, gmpo, cpgd, cispo,
    sapo, reinforce (docs/objectives.md). Brings its paper's clip widths, unless they are set."""
    importance_sampling_level: str = "auto"
    """Ratio per token, or one per sequence; auto: sequence for gspo (token: GSPO-token)."""
    clip_eps: float = 0.2
    """The ratio to the old policy is clipped below 1 - this (gspo 3e-4, gmpo 0.4 in its log) and
    above 1 + clip_eps_high. Acts when num_iterations > 1."""
    clip_eps_high: float = 0.0
    """0: as clip_eps (dapo 0.28, "clip higher"; gspo 4e-4, gmpo 0.4, cispo 4)."""
    delta: float = 0.0
    """Most that the ratio of a bad token counts (dual clip, two-sided GRPO); 0 off."""
    entropy_coeff: float = 0.0
    """Bonus for the mean entropy of the trained tokens."""
    top_entropy_quantile: float = 1.0
    """Only this part of the update's tokens, those of highest entropy, has a policy gradient."""
    mask_truncated_completions: bool = False
    """Leave completions that hit the length limit out of the loss."""

    advantage_estimator: str = "group_norm"
    """group_norm ((R - mean) / std of the group), dr_grpo (no std), batch (std of the batch), rloo,
    reinforce and reinforce_baseline (REINFORCE++: all tokens whitened, reward or reward - group
    mean), gdpo (each reward by itself). gspo, gmpo, cpgd: group_norm with that loss_type."""
    advantage_eps: float = 1e-4
    """Added to the standard deviation (cpgd 1e-6)."""
    advantages_norm: bool = False
    """Whiten the advantages over all tokens of the update."""
    advantage_clip: float = 0.0
    """Advantages count within +- this; 0 off."""
    reward_running_norm: bool = False
    """Divide rewards by the standard deviation of all that the run has seen."""
    reward_running_norm_minus_mean: bool = False
    """And subtract their mean before that."""
    reward_clip: float = 0.0
    """Rewards count within +- this; 0 off."""
    dynamic_sampling: int = 0
    """Replace groups whose rewards are all equal by new prompts, in at most so many rounds."""

    kl_coeff: float = 0.0
    """Weight of the KL penalty against the reference; 0: no reference is kept."""
    kl_estimator: str = "k3"
    """k1, k2 or k3 (joschu.net/blog/kl-approx.html)."""
    kl_placement: str = "loss"
    """loss (the penalty is added, per token) or reward (its sum per completion is taken off)."""
    kl_bias_correction: bool = False
    """In the loss, multiply the estimate by the ratio, which makes its gradient unbiased."""
    kl_target: float = 0.0
    """Adapt kl_coeff so that the KL per token comes here; 0: fixed."""
    kl_horizon: int = 10000
    """The controller moves kl_coeff by at most a fifth in so many completions."""
    ref_sync_updates: int = 0
    """Move the reference towards the policy after every so many updates; 0 never."""
    ref_sync_alpha: float = 0.6
    """Share of the policy in the reference after that."""
    importance_mode: str = "token_truncate"
    """Importance weight between sampler and policy (4-bit or stale rollouts), per token or per
    sequence, limited to floor and cap (truncate) or left out beyond them (mask): token_truncate,
    token_mask, sequence_truncate, sequence_mask."""
    importance_cap: float = 2.0
    """Largest importance weight."""
    importance_floor: float = 0.0
    """Smallest importance weight."""

    learning_rate: float = 1e-6
    """Peak learning rate of full fine-tuning."""
    lora_learning_rate: float = 2e-5
    """Learning rate of adapters (they need more than full fine-tuning)."""
    lr_scheduler_type: str = "cosine"
    """After the warm-up: cosine (to 0), linear (to 0) or constant."""
    warmup_ratio: float = 0.1
    """Part of the updates with a linearly rising learning rate."""
    adam_beta1: float = 0.9
    """AdamW: decay of the gradient's mean."""
    adam_beta2: float = 0.999
    """AdamW: decay of the gradient's mean square."""
    weight_decay: float = 0.0
    """AdamW: decoupled weight decay."""
    max_grad_norm: float = 0.1
    """Gradients are scaled down to this global norm."""

    def __post_init__(self) -> None:
        checks.resolve_objective(self)  # what the paper of the loss sets and the user does not
        checks.check(self)


def extract_hash_answer(text: str) -> str | None:
    """GSM8K's final answer: what follows the last `####`; None without one."""
    return text.rpartition("####")[2].strip() if "####" in text else None


def extract_xml_answer(text: str) -> str:
    """The text of the last complete <answer>...</answer>; empty without one."""
    for part in reversed(text.split("<answer>")[1:]):
        answer, closing, _ = part.partition("</answer>")
        if closing:
            return answer.strip()
    return ""


NUMBER = re.compile(r"[-+]?\$?(\d{1,3}(,\d{3})+|\d+)(\.\d*)?|[-+]?\$?\.\d+", re.ASCII)


def as_number(text: str) -> Decimal | None:
    """The number that `text` writes ("-3", "$1,234.00"); None when it is not just a number."""
    if not NUMBER.fullmatch(text.strip()):
        return None
    return Decimal(text.strip().replace("$", "").replace(",", ""))


def same_answer(given: str, expected: str) -> bool:
    """Equal as numbers where both are numbers ("1,234.00" and "$1234"), else as text."""
    numbers = as_number(given), as_number(expected)
    return numbers[0] == numbers[1] if None not in numbers else given.strip() == expected.strip()


def load_questions(config: MLXGRPOConfig, split: str) -> list[dict[str, Any]]:
    """Rows of "train" or "test": the file's columns with `question`, `answer` (extracted; the raw
    text is kept as `solution`) and `prompt` (chat messages).

    Raises:
        UserError: missing file, split or column, malformed or empty data.
        RunError: the hub is out of reach.
    """
    each = files.sources(config, split)  # the settings, by data set of `dataset_mix`
    return [as_question(own, row) for own in each for row in files.read_dataset(own, split)]


def as_question(config: MLXGRPOConfig, row: dict[str, Any]) -> dict[str, Any]:
    """A row of the data as the trainer takes it."""
    question, solution = row[config.question_column], row[config.answer_column]
    answer = extract_hash_answer(str(solution))
    messages = [{"role": "user", "content": str(question)}]
    if config.system_prompt:
        messages.insert(0, {"role": "system", "content": config.system_prompt})
    return {
        "solution": solution,
        **row,
        "question": question,
        "answer": str(solution).strip() if answer is None else answer,
        "prompt": messages,
    }


def get_gsm8k_questions(split: str = "train") -> list[dict[str, Any]]:
    """GSM8K from the hub, as rows that the trainer takes."""
    return load_questions(MLXGRPOConfig(), split)


def encode_prompt(tokenizer: Any, config: MLXGRPOConfig, row: dict[str, Any]) -> list[int]:
    """Token ids of chat template + reasoning prefix, each tokenized apart so that no merge crosses.

    Raises:
        UserError: the tokenizer has no chat template, or its template refuses the messages.
    """
    prefix = tokenizer.encode(config.reasoning_prefix, add_special_tokens=False)
    return [*chat_template.chat_ids(tokenizer, config, row["prompt"]), *prefix]


# Reward functions have TRL's interface: `completions` are conversations of one message each, every
# column of the data is a keyword, and one value per completion comes back.


def correctness_reward_func(completions: list, answer: list[str], **_: Any) -> list[float]:
    """2.0 for the right answer, numbers compared as numbers."""
    given = (extract_xml_answer(c[0]["content"]) for c in completions)
    return [2.0 if same_answer(g, a) else 0.0 for g, a in zip(given, answer, strict=True)]


def int_reward_func(completions: list, **_: Any) -> list[float]:
    """0.5 for an answer that is an integer ("-3" and "1,234" are)."""
    given = (extract_xml_answer(c[0]["content"]) for c in completions)
    return [0.5 if re.fullmatch(r"-?(\d{1,3}(,\d{3})+|\d+)", g, re.ASCII) else 0.0 for g in given]


TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")


def well_formed(text: str, between: str, inside: str) -> bool:
    """Exactly one of each tag, in order, nothing else outside but white space.

    `between` separates </reasoning> from <answer>; `inside` must stand at both inner edges of each
    pair of tags. Not one regular expression, whose time could grow faster than the length.
    """
    text = text.strip()
    if [text.count(tag) for tag in TAGS] != [1] * 4:
        return False
    if not (text.startswith(TAGS[0]) and text.endswith(TAGS[3])):
        return False
    reasoning, _, rest = text[len(TAGS[0]) : -len(TAGS[3])].partition(TAGS[1])
    gap, opening, answer = rest.partition(TAGS[2])
    edges = all(t.startswith(inside) and t.endswith(inside) for t in (reasoning, answer))
    return bool(opening) and edges and (gap == between if between else not gap.strip())


def strict_format_reward_func(completions: list, **_: Any) -> list[float]:
    """0.5 for the tags each on a line of their own."""
    return [0.5 if well_formed(c[0]["content"], "\n", "\n") else 0.0 for c in completions]


def soft_format_reward_func(completions: list, **_: Any) -> list[float]:
    """0.5 for the tags in order, however they are spaced."""
    return [0.5 if well_formed(c[0]["content"], "", "") else 0.0 for c in completions]


def xmlcount_reward_func(completions: list, **_: Any) -> list[float]:
    """0.25 per complete pair of tags, minus 0.001 per character after </answer>, at least 0."""
    return [xmlcount(c[0]["content"]) for c in completions]


def xmlcount(text: str) -> float:
    pairs = ((TAGS[0], TAGS[1]), (TAGS[2], TAGS[3]))
    score = 0.25 * sum(
        text.count(a) == text.count(b) == 1 and text.index(a) < text.index(b) for a, b in pairs
    )
    trailing = text.rpartition(TAGS[3])[2].strip() if TAGS[3] in text else ""
    return max(0.0, score - 0.001 * len(trailing))


REWARDS: dict[str, Callable[..., list]] = {
    "correctness": correctness_reward_func,
    "int": int_reward_func,
    "strict_format": strict_format_reward_func,
    "soft_format": soft_format_reward_func,
    "xmlcount": xmlcount_reward_func,
    **builtin.table(extract_xml_answer, correctness_reward_func),
}


@dataclass
class Scores:
    """What advantages are made of, for P groups of G completions and F reward functions."""

    responses: np.ndarray  # (P, G) completions
    rewards: np.ndarray  # (P, G)
    lengths: np.ndarray  # (P, G) tokens
    values: np.ndarray  # (P, G, F)
    weights: np.ndarray  # (F,)
    penalty: np.ndarray | float = 0.0  # (P, G) taken off the reward
    eps: float = 1e-4  # added to a standard deviation

    def put(self, groups: np.ndarray, other: Scores) -> None:
        """Replace some groups (indices) by those of another rollout."""
        for name in ("responses", "rewards", "lengths", "values"):
            getattr(self, name)[groups] = getattr(other, name)


def has_signal(rewards: np.ndarray) -> np.ndarray:
    """(P,) whether the rewards of each group differ, by more than rounding does."""
    valid = ~np.isnan(rewards)
    span = np.where(valid, rewards, -np.inf).max(1) - np.where(valid, rewards, np.inf).min(1)
    return span > 1e-8


def centred(rewards: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(P, G) rewards minus the mean of their group, and the (P, 1) number that were valued.

    A reward of NaN (no function applied) counts nowhere and gets 0, and so does a group without
    signal: it says nothing about which completion was better.
    """
    valid = ~np.isnan(rewards)
    count = np.maximum(valid.sum(axis=1, keepdims=True), 1)
    mean = np.where(valid, rewards, 0).sum(axis=1, keepdims=True) / count
    return np.where(valid & has_signal(rewards)[:, None], rewards - mean, 0.0), count


def group_advantages(rewards: np.ndarray, eps: float = 1e-4) -> np.ndarray:
    """(P, G) rewards -> (P, G) advantages (R - mean) / (std + eps), as in TRL, with ddof = 1."""
    centre, count = centred(rewards)
    std = np.sqrt((centre**2).sum(axis=1, keepdims=True) / np.maximum(count - 1, 1))
    return centre / (std + eps)


def leave_one_out(centre: np.ndarray, count: np.ndarray) -> np.ndarray:
    """RLOO (arXiv:2402.14740): R minus the mean of the others of its group, so n / (n - 1) times R
    minus the mean of all n."""
    return centre * count / np.maximum(count - 1, 1)


def gdpo_advantages(s: Scores) -> np.ndarray:
    """GDPO (arXiv:2601.05242): each reward normalised in its group, the sum over the batch."""
    each = [group_advantages(x, s.eps) for x in np.moveaxis(s.values, -1, 0)]  # F of (P, G)
    total = np.where(np.isnan(s.rewards), np.nan, np.tensordot(s.weights, each, axes=1))
    return np.nan_to_num((total - np.nanmean(total)) / (np.nanstd(total, ddof=1) + s.eps))


def whiten(values: np.ndarray, s: Scores) -> np.ndarray:
    """(P, G) values with mean 0 and variance 1 over all tokens; 0 where all values are equal."""
    valid = ~np.isnan(s.rewards)
    share = np.where(valid, s.lengths, 0) / max(s.lengths[valid].sum(), 1)  # (P, G) of all tokens
    known = np.where(valid, values, np.nan)
    shifted = np.nan_to_num(known) - np.nansum(share * known)
    scaled = shifted / np.sqrt((share * shifted**2).sum() + 1e-8)
    return np.where(valid & has_signal(known.reshape(1, -1)), scaled, 0.0)


ADVANTAGES: dict[str, Callable[[Scores], np.ndarray]] = {
    "group_norm": lambda s: group_advantages(s.rewards, s.eps),
    "dr_grpo": lambda s: centred(s.rewards)[0],  # arXiv:2503.20783
    # TRL's scale_rewards = "batch", arXiv:2508.08221
    "batch": lambda s: centred(s.rewards)[0] / (np.nanstd(s.rewards, ddof=1) + s.eps),
    "rloo": lambda s: leave_one_out(*centred(s.rewards)),
    "reinforce": lambda s: whiten(s.rewards, s),  # REINFORCE++, arXiv:2501.03262
    "reinforce_baseline": lambda s: whiten(centred(s.rewards)[0], s),
    "gdpo": gdpo_advantages,
}


def running_moments(seen: list[float], rewards: np.ndarray) -> list[float]:
    """[count, mean, sum of squared deviations] of all rewards, these added (Chan's update)."""
    new = rewards[~np.isnan(rewards)]
    count, shift = seen[0] + new.size, (new.mean() if new.size else 0.0) - seen[1]
    share = new.size / max(count, 1)
    squares = seen[2] + ((new - new.mean()) ** 2).sum() if new.size else seen[2]
    return [count, seen[1] + shift * share, float(squares + shift**2 * seen[0] * share)]


def estimate_advantages(s: Scores, moments: list[float], a: MLXGRPOConfig) -> np.ndarray:
    """(P, G) advantages of the rewards, which are normalised, clipped and penalised before."""
    rewards = s.rewards
    if a.reward_running_norm:
        count, mean, squares = moments
        std = math.sqrt(squares / max(count - 1, 1)) + 1e-8
        rewards = (rewards - mean * a.reward_running_norm_minus_mean) / std
    if a.reward_clip:
        rewards = np.clip(rewards, -a.reward_clip, a.reward_clip)
    s = dataclasses.replace(s, rewards=rewards - s.penalty, eps=a.advantage_eps)
    advantages = np.nan_to_num(ADVANTAGES[a.advantage_estimator](s))  # NaN is for what is left out
    if a.advantages_norm:
        advantages = whiten(advantages, s)
    if a.advantage_clip:
        advantages = np.clip(advantages, -a.advantage_clip, a.advantage_clip)
    return advantages


@dataclass(frozen=True)
class Sampling:
    """How to sample; temperature 0 is greedy."""

    temperature: float
    max_tokens: int
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop_strings: tuple[str, ...] = ()


@dataclass
class Completion:
    """One sampled completion: `ids` with the token that ended it, each with its log-probability."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = ""  # "stop" (end of sequence or a stop string) or "length"
    text: str = ""  # reasoning prefix + text up to the end of the stop string


def row_key(*stream: int) -> np.ndarray:
    """(2,) uint32 random key, from (seed, 0, update, prompt, row) for a completion of a rollout.

    Because a sample depends on nothing else, resuming a run, splitting a batch or dropping
    finished rows changes no token. The second number keeps evaluation (1) and dropout (2) apart.
    """
    return np.random.SeedSequence(stream).generate_state(2, np.uint32)


def sample_tokens(logits: mx.array, keys: mx.array, how: Sampling) -> tuple[mx.array, mx.array]:
    """(B, V) logits, (B, 2) keys -> (B,) tokens and their (B,) log-probs before any filter.

    Temperature first, then top_k, top_p, min_p: the order of Hugging Face.
    """
    logits = logits.astype(mx.float32) / (how.temperature or 1.0)
    best = logits.max(axis=-1, keepdims=True)
    # (B, V) probabilities up to a factor, the largest 1; by mx.exp, or what is faster on x86-64.
    weights = fast.exp(logits - best)
    kept = weights
    if 0 < how.top_k < logits.shape[-1]:
        kept = mx.where(kept >= mx.topk(kept, how.top_k).min(axis=-1, keepdims=True), kept, 0)
    if how.top_p < 1:
        kept = mx.where(kept >= draw.threshold(kept, how.top_p), kept, 0)
    if how.min_p > 0:
        kept = mx.where(kept >= how.min_p, kept, 0)
    # mx.random.categorical takes one key for the whole batch; each row has its own here.
    tokens = draw.draw(kept, keys) if how.temperature else mx.argmax(logits, axis=-1)
    chosen = mx.take_along_axis(logits, tokens[:, None], axis=-1)
    return tokens, (chosen - best - mx.log(weights.sum(axis=-1, keepdims=True)))[:, 0]


def sample_batch(
    model: nn.Module,
    prompts: list[list[int]],
    rows: list[int],
    keys: np.ndarray,
    how: Sampling,
    stop: StopRule,
) -> Generator[tuple[mx.array, mx.array], None, list[Completion]]:
    """One completion for each of `rows` (B indices into `prompts`), by (B, 2) `keys`, in one batch.

    MLX is lazy: a step here only says what is to be computed, and yields that, so that several
    batches can take turns. The host looks for ends one block behind the device; what was sampled
    past them is dropped.
    """
    completions = [Completion() for _ in rows]
    cache = caches.prefill(model, prompts, rows, how.max_tokens)
    tokens = mx.array([prompts[row][-1] for row in rows])  # (B,) that the cache has not yet
    # The key of a position is the row's with the position added: (max_tokens, B, 2)
    positions = np.arange(how.max_tokens, dtype=np.uint32)[:, None, None] * np.array([0, 1], "u4")
    step_keys = mx.array(keys + positions)
    forward = compiled_step.forward(model, cache)  # (B, 1) tokens -> (B, 1, V) logits
    reader = Reader(stop, completions, compiled_step.part_to_leave(forward))
    sample_step = caches.compiled(partial(sample_tokens, how=how))
    for start in range(0, how.max_tokens, reader.block):
        block = []
        for step in range(start, min(start + reader.block, how.max_tokens)):
            logits = forward(tokens[:, None])[:, -1]  # (B, V)
            tokens, logprobs = sample_step(logits, step_keys[step])  # (B,)
            yield tokens, logprobs  # the device works while the host builds the next step
            block.append((tokens, logprobs))
        keep = reader.read(block)
        if not keep:
            break
        if len(keep) < len(tokens):  # the rows that have ended leave the batch
            index = mx.array(keep)
            tokens, step_keys = tokens[index], step_keys[:, index]
            caches.keep_rows(cache, keep)
    reader.finish()
    return completions


def token_logprobs(
    model: nn.Module, tokens: mx.array, width: int, temperature: float, with_entropy: bool = False
) -> tuple[mx.array, mx.array | None]:
    """(B, W) log pi, at `temperature`, of the last `width` = W of (B, T) tokens.

    With `with_entropy` also the (B, W) entropies, in nats, of the distributions they are from.
    utils/gradient/ does the same faster, and checks itself against this before the first update.
    """
    logits = model(tokens[:, :-1])[:, -width:]  # (B, W, V): at t, of the token at t + 1
    logits = logits.astype(mx.float32) / temperature
    chosen = mx.take_along_axis(logits, tokens[:, -width:, None], axis=-1)[..., 0]  # (B, W)
    normaliser = mx.logsumexp(logits, axis=-1)
    if not with_entropy:
        return chosen - normaliser, None
    mean = (mx.softmax(logits, axis=-1) * logits).sum(axis=-1)
    return chosen - normaliser, normaliser - mean  # -E[log p] = normaliser - E[logit]


def clamped(log_ratio: mx.array) -> mx.array:
    """Within +-20, as in verl: its exponential and the gradient of that stay finite."""
    return mx.clip(log_ratio, -20, 20)


def token_mean(values: mx.array, mask: mx.array) -> mx.array:
    """(B, 1) means over the tokens of each sequence."""
    total = (values * mask).sum(axis=1, keepdims=True)
    return total / mx.maximum(mask.sum(axis=1, keepdims=True), 1)


def policy_ratio(
    logprobs: mx.array, log_ratio: mx.array, mask: mx.array, a: MLXGRPOConfig
) -> mx.array:
    """pi / pi_old of (B, W) tokens, or one for each sequence, (B, 1)."""
    if a.importance_sampling_level == "sequence":  # GSPO eq. 7
        return mx.exp(token_mean(log_ratio, mask))
    if a.loss_type == "gspo":  # GSPO-token, eq. 14: the value of the sequence, a token's gradient
        of_sequence = mx.stop_gradient(token_mean(log_ratio, mask))
        return mx.exp(of_sequence + logprobs - mx.stop_gradient(logprobs))
    return mx.exp(log_ratio)


@dataclass(frozen=True)
class Terms:
    """What an objective is made of."""

    logprobs: mx.array  # (B, W)
    old_logprobs: mx.array  # (B, W)
    log_ratio: mx.array  # (B, W)
    ratio: mx.array  # (B, W), or (B, 1): one per sequence
    advantages: mx.array  # (B, 1)
    mask: mx.array  # (B, W)


# An objective gives what a token, (B, W), or sequence, (B, 1), contributes, and the share of its
# gradient that is held back: 1 where the policy has moved too far in the advantage's direction.
Objective = Callable[[Terms, MLXGRPOConfig], tuple[mx.array, mx.array]]


def clipped_surrogate(t: Terms, a: MLXGRPOConfig) -> tuple[mx.array, mx.array]:
    """PPO (arXiv:1707.06347) eq. 7: no gain from moving further than the clip in the direction of
    the advantage. `delta` bounds what a bad token costs (dual clip, arXiv:1912.09729)."""
    low, high = 1 - a.clip_eps, 1 + (a.clip_eps_high or a.clip_eps)
    bounded = mx.minimum(t.ratio, a.delta) if a.delta else t.ratio
    objective = mx.minimum(bounded * t.advantages, mx.clip(t.ratio, low, high) * t.advantages)
    bad = (t.ratio < low) | (bounded < t.ratio)
    return objective, mx.where(t.advantages > 0, t.ratio > high, bad)


def geometric_mean(t: Terms, a: MLXGRPOConfig) -> tuple[mx.array, mx.array]:
    """GMPO (arXiv:2507.20673): the geometric mean of token ratios, clipped in their logarithm."""
    high, good = a.clip_eps_high or a.clip_eps, t.advantages > 0
    within = mx.clip(t.log_ratio, -a.clip_eps, high)
    limited = mx.where(good, mx.minimum(t.log_ratio, within), mx.maximum(t.log_ratio, within))
    objective = mx.exp(token_mean(limited, t.mask)) * t.advantages  # (B, 1)
    return objective, mx.where(good, t.log_ratio > high, t.log_ratio < -a.clip_eps)


def clipped_policy_gradient(t: Terms, a: MLXGRPOConfig) -> tuple[mx.array, mx.array]:
    """CPGD (arXiv:2505.12504): log pi, not the ratio, so that no token counts more as it moves."""
    low, high = 1 - a.clip_eps, 1 + (a.clip_eps_high or a.clip_eps)
    above = mx.minimum(t.logprobs, t.old_logprobs + math.log(high))
    below = mx.maximum(t.logprobs, t.old_logprobs + math.log(low))
    objective = mx.where(t.advantages > 0, above, below) * t.advantages
    return objective, mx.where(t.advantages > 0, t.ratio > high, t.ratio < low)


def capped_weight(t: Terms, a: MLXGRPOConfig) -> tuple[mx.array, mx.array]:
    """CISPO (arXiv:2506.13585): every token keeps its gradient, its weight is capped."""
    weight = mx.stop_gradient(mx.minimum(t.ratio, 1 + (a.clip_eps_high or a.clip_eps)))
    return weight * t.advantages * t.logprobs, 1 - weight / t.ratio


def soft_gate(t: Terms, a: MLXGRPOConfig) -> tuple[mx.array, mx.array]:
    """SAPO (arXiv:2511.20347): a sigmoid around ratio 1, steeper for bad tokens, as the clip."""
    steepness = mx.where(t.advantages > 0, 1.0, 1.05)
    gate = mx.sigmoid(steepness * (t.ratio - 1))
    return gate * 4 / steepness * t.advantages, 1 - 4 * gate * (1 - gate)


def policy_gradient(t: Terms, a: MLXGRPOConfig) -> tuple[mx.array, mx.array]:
    """REINFORCE: A log pi, without a ratio; meant for num_iterations = 1."""
    return t.advantages * t.logprobs, mx.zeros_like(t.ratio)


LOSSES: dict[str, tuple[Objective, str]] = {  # and how it is averaged over the update
    "grpo": (clipped_surrogate, "sequence"),  # arXiv:2402.03300
    "bnpo": (clipped_surrogate, "token"),  # TRL's name
    "dapo": (clipped_surrogate, "token"),  # arXiv:2503.14476
    "dr_grpo": (clipped_surrogate, "constant"),  # arXiv:2503.20783
    "gspo": (clipped_surrogate, "sequence"),  # arXiv:2507.18071, with a ratio per sequence
    "gmpo": (geometric_mean, "sequence"),
    "cpgd": (clipped_policy_gradient, "sequence"),
    "cispo": (capped_weight, "token"),
    "sapo": (soft_gate, "sequence"),
    "reinforce": (policy_gradient, "token"),
}


def sequence_weights(lengths: np.ndarray, loss_type: str, longest: int) -> np.ndarray:
    """(B,) weight of each token of a sequence, over the whole update of B sequences.

    sequence: mean over sequences of token means (DeepSeekMath eq. 3); token: mean over all tokens
    (DAPO eq. 8); constant: length has no influence (Dr. GRPO). Since the weights are fixed before
    the update is split, any split into micro-batches gives the same gradient.
    """
    sequences = len(lengths)
    weights = {
        "sequence": 1.0 / (sequences * np.maximum(lengths, 1)),
        "token": np.full(sequences, 1.0 / max(lengths.sum(), 1)),
        "constant": np.full(sequences, 1.0 / (sequences * longest)),
    }
    return weights[LOSSES[loss_type][1]]


def importance_weights(
    mismatch: mx.array, mask: mx.array, a: MLXGRPOConfig
) -> tuple[mx.array, mx.array]:
    """exp(old - sampler) within floor and cap, (B, W) or (B, 1), and where it was beyond them."""
    level, bound = a.importance_mode.split("_")
    if level == "sequence":
        mismatch = clamped((mismatch * mask).sum(axis=1, keepdims=True))
    weights = mx.exp(mismatch)
    outside = (weights > a.importance_cap) | (weights < a.importance_floor)
    if bound == "mask":
        return mx.where(outside, 0.0, weights), outside
    return mx.clip(weights, a.importance_floor, a.importance_cap), outside


# Estimates of the KL by x = ref_logprobs - logprobs of a sampled token.
KL: dict[str, Callable[[mx.array], mx.array]] = {  # joschu.net/blog/kl-approx.html
    "k1": lambda x: -x,
    "k2": lambda x: 0.5 * x**2,
    "k3": lambda x: mx.minimum(mx.exp(x) - x - 1, 10),  # at most 10, as in verl
}


def adapted_kl_coeff(kl_coeff: float, kl: float, target: float, share: float) -> float:
    """The controller of arXiv:1909.08593: towards the target, by at most a fifth per horizon."""
    return kl_coeff * (1 + min(max(kl / target - 1, -0.2), 0.2) * share)


def grpo_loss(
    logprobs: mx.array,
    batch: dict[str, mx.array],
    a: MLXGRPOConfig,
    entropies: mx.array | None = None,
) -> tuple[mx.array, dict[str, mx.array]]:
    """The objective `loss_type`, the KL penalty and the entropy bonus.

    Args:
        logprobs: (B, W) of the current policy, as are the `entropies` that a bonus needs.
        batch: (B, W) mask and sampler_logprobs, (B,) advantages and weights, and optionally
            (B, W) old_logprobs (without it the current policy is its own anchor: the ratio is 1,
            its gradient that of log pi), ref_logprobs, selected (tokens with a policy gradient),
            and the scalars kl_coeff and entropy_weight.

    Returns:
        The loss, a sum weighted by `weights`, and sums over tokens for the log.
    """
    mask, advantages = batch["mask"], batch["advantages"][:, None]
    old_logprobs = batch.get("old_logprobs", mx.stop_gradient(logprobs))
    log_ratio = clamped(logprobs - old_logprobs)
    ratio = policy_ratio(logprobs, log_ratio, mask, a)
    terms = Terms(logprobs, old_logprobs, log_ratio, ratio, advantages, mask)
    objective, held_back = LOSSES[a.loss_type][0](terms, a)
    # Rollouts may come from a 4-bit or stale sampler.
    mismatch = clamped(old_logprobs - batch["sampler_logprobs"])
    importance, outside = importance_weights(mismatch, mask, a)
    per_token = -importance * objective * batch.get("selected", 1.0)  # (B, W)
    sums = {
        "policy_reward": ratio * advantages,
        "clip_low": held_back * (advantages < 0),
        "clip_high": held_back * (advantages > 0),
        "importance_weight": importance,
        "importance_capped": outside,
        "sampler_mismatch": mx.abs(mismatch),
    }
    if "ref_logprobs" in batch:
        kl = KL[a.kl_estimator](clamped(batch["ref_logprobs"] - logprobs))
        sums["kl"] = kl
        corrected = kl * ratio if a.kl_bias_correction else kl
        per_token = per_token + batch.get("kl_coeff", a.kl_coeff) * corrected
    loss = (per_token * mask * batch["weights"][:, None]).sum()
    if entropies is not None:
        trained = entropies * mask * batch.get("selected", 1.0)
        loss = loss - (trained * batch["entropy_weight"]).sum()
        sums["policy_entropy"] = entropies
    return loss, {name: mx.stop_gradient((x * mask).sum()) for name, x in sums.items()}


class MLXGRPOTrainer(RunState):
    """Holds the policies and runs the loop sample -> score -> update.

    `step` counts batches of prompts, `update_step` optimizer updates, `rollout` calls of
    `train_step`. Methods stand in the order in which a run needs them; what it has beside them
    (log, evaluations, checkpoints) is in utils/run/state.py.
    """

    args: MLXGRPOConfig

    def __init__(
        self,
        loaded: LoadedModel,
        reward_funcs: dict[str, Callable[..., list]],
        args: MLXGRPOConfig,
        train_dataset: list[dict[str, Any]],
        eval_dataset: list[dict[str, Any]],
        command: str = "mlx-grpo.py",
    ) -> None:
        super().__init__(args, command)
        self.loaded, self.model, self.tokenizer = loaded, loaded.model, loaded.tokenizer
        if args.gradient_checkpointing:
            shared_prompts.checkpoint_layers(self.model)
        self.reward_funcs = reward_funcs
        self.prefix_ids = self.tokenizer.encode(args.reasoning_prefix, add_special_tokens=False)
        self.train_dataset = self.encode(train_dataset, "training")
        self.eval_dataset = self.encode(eval_dataset, "evaluation") if eval_dataset else []
        self.data_sha256 = files.fingerprint(self.train_dataset)
        self.order = order.PromptOrder(args, self.train_dataset)
        self.drawn = 0  # prompts that dynamic sampling took from the stream
        self.sampling = self.sampling_with(args.temperature, args.max_new_tokens)
        self.reward_moments = [0.0, 0.0, 0.0]
        self.kl_coeff = args.kl_coeff  # which kl_target moves
        self.plan = this_machine.plan_of(self)
        self.set_up_schedule()
        self.set_up_optimizer()
        self.set_up_policies()

    def encode(self, rows: list[dict[str, Any]], what: str) -> list[dict[str, Any]]:
        """Add `prompt_ids` to each row; prompts over max_prompt_length are left out and counted."""
        rows = [{**r, "prompt_ids": encode_prompt(self.tokenizer, self.args, r)} for r in rows]
        return files.usable_prompts(self.args, rows, what, self.loaded.vocabulary)

    def sampling_with(self, temperature: float, max_tokens: int) -> Sampling:
        """The settings' filters and stop strings; what is greedy needs no filters."""
        a = self.args
        room = checks.room_for_sampling(a, len(self.prefix_ids))
        filters = (a.top_k, a.top_p, a.min_p) if temperature else (0, 1.0, 0.0)
        return Sampling(temperature, min(max_tokens, room), *filters, tuple(a.stop_strings))

    def set_up_schedule(self) -> None:
        """How many updates there are, of how many prompts, and their highest learning rate."""
        a = self.args
        self.prompts_per_update = a.batch_size * a.gradient_accumulation_steps
        self.rollouts_per_epoch = math.ceil(len(self.train_dataset) / self.prompts_per_update)
        self.total_updates = a.num_epochs * self.rollouts_per_epoch * a.num_iterations
        if a.max_updates:
            self.total_updates = min(self.total_updates, a.max_updates)
        full = self.loaded.train_type == "full"
        self.peak_lr = a.learning_rate if full else a.lora_learning_rate

    def lr_schedule(self, update: int) -> float:
        """Learning rate of update 1..U: linear warm-up to the peak, then by lr_scheduler_type."""
        warmup = max(1, int(self.total_updates * self.args.warmup_ratio))
        if update <= warmup:
            return self.peak_lr * update / warmup
        done = (update - warmup) / max(1, self.total_updates - warmup)
        shape = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1}
        return self.peak_lr * shape[self.args.lr_scheduler_type]

    def prompts_of_update(self, rollout: int) -> tuple[list[int], int]:
        """Rows of the training set for the nth rollout, and how many batches they make."""
        size = self.prompts_per_update
        if self.args.dynamic_sampling:  # the position in the stream depends on what was replaced
            rows, _ = self.order.draw(size, self.drawn, set())
        else:
            epoch, position = divmod(rollout, self.rollouts_per_epoch)
            rows = self.order(epoch)[position * size : (position + 1) * size].tolist()
        return rows, math.ceil(len(rows) / self.args.batch_size)

    def set_up_optimizer(self) -> None:
        """AdamW over float32 masters: bfloat16 weights do not move at a learning rate of 1e-6."""
        self.optimizer = adamw.make(self.model, self.args)
        self.scorer = scorer.Scorer(token_logprobs, self.args.use_compile)
        self.loss_and_grad = self.make_loss_and_grad()

    @property
    def master(self) -> Any:
        """The trainable weights in float32, as the optimizer moves them."""
        return self.optimizer.masters(self.model)

    def make_loss_and_grad(self) -> Callable:
        """batch -> (what compute_grpo_loss returns, gradient of its loss by what trains)."""
        function = nn.value_and_grad(self.model, self.compute_grpo_loss)
        if not self.args.use_compile:
            return function
        # Weights and random state go in and out, or they would be compiled in as constants.
        state = [self.model.state, mx.random.state]
        return mx.compile(function, inputs=state, outputs=state)

    def set_up_policies(self) -> None:
        """`ref_model` begins as the policy is now; `model_old` is refreshed before a rollout."""
        a = self.args
        self.ref_model: nn.Module | None = None
        if a.kl_coeff > 0:
            # An update makes new arrays and changes none in place: a deepcopy takes no memory.
            if a.ref_sync_updates:  # it moves, so that it needs adapters of its own
                self.ref_model = copy.deepcopy(self.model)
            elif self.loaded.train_type == "full" and a.quantize_for_rollouts:
                self.ref_model = quantize_copy(self.model)
            else:
                self.ref_model = without_adapters(self.model)
            self.ref_model.freeze()
        self.quantizes = a.quantize_for_rollouts and quantizes(self.model)
        self.old_is_copy = self.quantizes or a.sync_every_updates > 1
        self.model_old: nn.Module | None = None if self.old_is_copy else self.model
        self.last_sync = 0

    def refresh_old_policy(self) -> None:
        """Bring the sampling copy up to date; with adapters, only they are copied."""
        stale = self.update_step - self.last_sync >= self.args.sync_every_updates
        if not self.old_is_copy or (self.model_old is not None and not stale):
            return
        self.last_sync = self.update_step
        if self.model_old is not None and self.loaded.train_type != "full":
            self.model_old.update(self.model.trainable_parameters())
            return
        self.model_old = None  # frees the previous copy before the next is made
        self.model_old = self.copy_policy()

    def copy_policy(self) -> nn.Module:
        """A sampling copy of the policy as it is now; arrays that never change are shared."""
        policy = quantize_copy(self.model) if self.quantizes else copy.deepcopy(self.model)
        mx.eval(policy.parameters())
        return policy

    def sample(
        self,
        model: nn.Module,
        rows: list[dict],
        keys: list[np.ndarray],
        how: Sampling,
        after_batch: Callable[[list[Completion]], None] = lambda _: None,
    ) -> list[Completion]:
        """len(keys) / len(rows) completions of each row, in as few batches as memory allows."""
        return sampler.sampled(self, sample_batch, model, rows, keys, how, after_batch)

    def generate_responses(self, batch: list[int]) -> list[Completion]:
        """`num_generations` completions for each row (index) of the training set, in order."""
        self.refresh_old_policy()
        size = self.args.num_generations
        keys = [
            row_key(self.args.seed, 0, self.update_step, row, again * size + n)
            for row, again in order.occurrences(batch)  # a weighted prompt may come twice
            for n in range(size)
        ]
        rows = [self.train_dataset[row] for row in batch]
        after_batch = partial(for_trainer.ahead, self, rows)  # slow rewards begin meanwhile
        return self.sample(merged_layers.for_rollouts(self), rows, keys, self.sampling, after_batch)

    def compute_rewards(
        self, rows: list[dict[str, Any]], responses: list[Completion]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(B,) weighted totals and the (B,) values per function, for B row-completion pairs.

        None from a function (NaN here) adds nothing; a row that no function values is NaN.
        """
        values = for_trainer.call(self, self.reward_funcs, rows, responses)
        stacked = np.stack(list(values.values()))  # (F, B)
        weights = np.array(self.args.reward_weights or [1.0] * len(values))[:, None]
        totals = np.nansum(stacked * weights, axis=0)
        return np.where(np.isnan(stacked).all(axis=0), np.nan, totals), values

    def roll_out(self, batch: np.ndarray, metrics: dict[str, float]) -> Scores:
        """Completions and their scores for each row (index) of the training set."""
        shape = len(batch), self.args.num_generations  # (P, G)
        rows = [self.train_dataset[i] for i in batch for _ in range(shape[1])]
        with timed(metrics, "seconds_rollout"):
            responses = self.generate_responses(batch.tolist())
        with timed(metrics, "seconds_rewards"):
            rewards, values = self.compute_rewards(rows, responses)
        lengths = np.array([len(response.ids) for response in responses])
        metrics["tokens_sampled"] += float(lengths.sum())
        return Scores(
            responses=np.array(responses, dtype=object).reshape(shape),
            rewards=rewards.reshape(shape),
            lengths=lengths.reshape(shape),
            values=np.stack(list(values.values()), axis=-1).reshape(*shape, -1),
            weights=np.array(self.args.reward_weights or [1.0] * len(values)),
        )

    def collect(
        self, batch: list[int], metrics: dict[str, float]
    ) -> tuple[np.ndarray, Scores, int]:
        """Roll out the prompts of an update: (P,) rows, their scores, the position in the stream.

        With dynamic sampling (DAPO), groups without variance give their places to the next prompts
        of the stream, until none is left or the rounds are used up.
        """
        prompts, position = np.array(batch), self.drawn
        scores = self.roll_out(prompts, metrics)
        if not self.args.dynamic_sampling:
            return prompts, scores, position
        used = set(batch)
        _, position = self.order.draw(len(batch), position, set())
        metrics["resampled_prompts"] = 0.0
        for _ in range(self.args.dynamic_sampling):
            dull = np.flatnonzero(~has_signal(scores.rewards))
            rows, position = self.order.draw(len(dull), position, used)
            if not rows:
                break
            places = dull[: len(rows)]
            prompts[places] = rows
            scores.put(places, self.roll_out(np.array(rows), metrics))
            metrics["resampled_prompts"] += len(rows)
            self.reward_calls.extras = {}  # they are of the rows of one round
        return prompts, scores, position

    def train_step(self, batch: list[int]) -> list[dict[str, Any]]:
        """Roll out the prompts of one update, score them, update `num_iterations` times."""
        a, first, metrics = self.args, self.update_step, {"tokens_sampled": 0.0}
        self.log.meter.start("rollout")
        prompts, scores, position = self.collect(batch, metrics)
        rows = [self.train_dataset[i] for i in prompts for _ in range(a.num_generations)]
        responses = scores.responses.reshape(-1).tolist()
        self.log.meter.start("gradient")
        with timed(metrics, "seconds_gradient"):
            moments = running_moments(self.reward_moments, scores.rewards)
            if self.ref_model is not None and a.kl_placement == "reward":
                kl = self.kl_of(rows, responses)
                scores.penalty = self.kl_coeff * kl.reshape(scores.rewards.shape)
                metrics["kl"] = kl.sum() / scores.lengths.sum()
            advantages = estimate_advantages(scores, moments, a)  # (P, G)
            metrics |= rollout_metrics(scores, advantages, self.reward_funcs)
            metrics |= self.reward_calls.metrics  # what functions logged
            truncated = np.array([r.finish_reason == "length" for r in responses])  # (B,)
            masked = truncated & a.mask_truncated_completions
            trained = np.where(masked, np.nan, advantages.reshape(-1))  # NaN: left out of the loss
            records = self.learn(rows, responses, trained, metrics["tokens"])
        metrics["tokens_per_second"] = metrics.pop("tokens_sampled") / metrics["seconds_rollout"]
        records = [record | metrics for record in records]
        # Nothing can stop this update any more: what the next one builds on changes now.
        self.drawn, self.reward_moments = position, moments
        self.move_reference(first, records, len(responses))
        shown = zip(rows, responses, scores.rewards.reshape(-1), strict=True)
        self.shown = list(shown)[: a.log_completions]
        return records

    def kl_of(self, rows: list[dict], responses: list[Completion]) -> np.ndarray:
        """(B,) KL between policy and reference of each completion, summed over its tokens."""

        def summed(batches: list[dict[str, mx.array]]) -> np.ndarray:
            total = np.zeros(len(rows))
            for batch in batches:
                self.pulse("scoring")  # the progress bar goes on, and Ctrl-C is heard
                self.add_reference(batch)
                x = clamped(batch["ref_logprobs"] - self.rescored(self.model, batch)[0])
                sums: Any = (KL[self.args.kl_estimator](x) * batch["mask"]).sum(axis=1)
                # Rows that only fill up a batch are row 0 with an empty mask.
                np.add.at(total, np.array(batch["row"], int), np.array(sums))
            return total

        cut = partial(self.micro_batches, rows, responses, np.ones(len(rows)))
        return retry.scored(self, cut, summed)

    def learn(
        self, rows: list[dict], responses: list[Completion], advantages: np.ndarray, tokens: float
    ) -> list[dict[str, Any]]:
        """`num_iterations` updates on a rollout of B completions with their (B,) advantages.

        `tokens`: how many the completions have, over which the log's means are.
        """
        first, records = self.update_step, []
        # As functions: where memory runs out, the update is cut up smaller and done once more.
        cut = partial(self.micro_batches, rows, responses, advantages)
        cut_and_select = partial(retry.scored, self, cut, self.select_tokens)
        micro_batches = cut_and_select()
        for iteration in range(min(self.args.num_iterations, self.total_updates - first)):
            work = partial(self.update, micro_batches, iteration, tokens)
            records.append(retry.updated(self, work, micro_batches, cut_and_select))
        if first == 0:
            this_machine.recalibrate(self, micro_batches)
        return records

    def micro_batches(
        self, rows: list[dict], responses: list[Completion], advantages: np.ndarray
    ) -> list[dict[str, mx.array]]:
        """The update in padded batches; the model reads at most `micro_batch_tokens` for each.

        Sequences with advantage 0 are left out where nothing else gives them a gradient, but their
        tokens count in the normaliser: the weights are made before. With NaN they do not.
        """
        a = self.args
        lengths = np.array([len(response.ids) for response in responses])  # (B,)
        lengths = np.where(np.isnan(advantages), 0, lengths)
        weights = sequence_weights(lengths, a.loss_type, self.sampling.max_tokens)
        kl_in_loss = self.ref_model is not None and a.kl_placement == "loss"
        always = kl_in_loss or a.entropy_coeff > 0 or a.top_entropy_quantile < 1
        idle = np.isnan(advantages) | ((advantages == 0) & (not always))
        per_row = {"advantages": advantages, "weights": weights, "row": np.arange(len(rows))}
        used = np.flatnonzero(~idle).tolist()
        return self.scorer.micro_batches(self.model, rows, responses, per_row, used, self.plan)

    def select_tokens(self, batches: list[dict[str, mx.array]]) -> list[dict[str, mx.array]]:
        """Mark the update's tokens of highest entropy (arXiv:2506.01939), and weigh the bonus for
        entropy: a mean over all tokens that are trained."""
        a = self.args
        if a.top_entropy_quantile < 1 and batches:
            entropies = [self.rescored(self.model, batch, True)[1] for batch in batches]  # (B, W)
            pairs = list(zip(entropies, batches, strict=True))
            every = np.concatenate([np.array(e)[np.array(b["mask"]) > 0] for e, b in pairs])
            least = np.quantile(every, 1 - a.top_entropy_quantile)
            for entropy, batch in pairs:
                batch["selected"] = (entropy >= least).astype(mx.float32)
        trained = sum((b["mask"] * b.get("selected", 1.0)).sum().item() for b in batches)
        for batch in batches if a.entropy_coeff else []:
            batch["entropy_weight"] = mx.array(a.entropy_coeff / trained)
        return batches

    def update(
        self, micro_batches: list[dict[str, mx.array]], iteration: int, tokens: float
    ) -> dict[str, Any]:
        """One optimizer update from the summed gradients of all micro-batches."""
        # One dropout mask for all iterations, or it would move the ratio.
        mx.random.seed(int(row_key(self.args.seed, 2, self.rollout)[0]))
        loss, grads, sums = 0.0, None, TokenSums()
        self.model.train()  # dropout, and no kernels that have no gradient
        gradient = partial(self.gradient, iteration == 0)
        # On a CPU, several micro-batches are computed together; elsewhere one after the other.
        done = on_cores.spread(gradient, micro_batches, this_machine.at_once(self))
        for batch, ((part, stats, logprobs), new) in done:
            grads, new = adamw.accumulate(grads, new), None  # so that each goes as it is added
            mx.eval(grads, part, stats, logprobs)  # MLX is lazy: it computes when asked to
            if iteration == 0 and self.args.num_iterations > 1:
                batch["old_logprobs"] = logprobs  # the anchor of the ratio from now on
            loss += float(part)
            sums.add(stats, batch["mask"])
        self.model.eval()
        if grads is None:  # no completion had an advantage
            grads = tree_map(mx.zeros_like, self.model.trainable_parameters())
        norm, skipped = self.apply_gradients(loss, grads)
        lr = self.lr_schedule(self.update_step)
        record = {"update": self.update_step, "lr": lr, "loss": loss, "grad_norm": norm}
        return {**record, "skipped": skipped, "kl": None, **sums.means(tokens)}

    def gradient(self, first: bool, batch: dict[str, mx.array]) -> Any:
        """Loss and gradient of a micro-batch; the `first` adds the reference's log-probs to it."""
        if first:  # later, weights have moved, and an update can't be dropped
            self.pulse("gradient")
            if self.args.kl_placement == "loss":
                self.add_reference(batch)
        if self.args.kl_target:
            batch["kl_coeff"] = mx.array(self.kl_coeff)
        return self.loss_and_grad(batch)

    def add_reference(self, batch: dict[str, mx.array]) -> None:
        if self.ref_model is not None:
            batch["ref_logprobs"] = self.rescored(self.ref_model, batch)[0]

    def rescored(
        self, model: nn.Module, batch: dict[str, mx.array], with_entropy: bool = False
    ) -> tuple[mx.array, mx.array | None]:
        """(B, W) log-probs (and entropies) of a micro-batch, without a gradient."""
        found = self.scorer(model, batch, self.args.temperature, with_entropy)
        mx.eval(found)
        return found

    def compute_grpo_loss(
        self, batch: dict[str, mx.array]
    ) -> tuple[mx.array, dict[str, mx.array], mx.array]:
        """Loss, sums for the log, and the (B, W) log-probs of the policy being trained."""
        a = self.args
        logprobs, entropies = self.scorer(
            self.model, batch, a.temperature, with_entropy=a.entropy_coeff > 0
        )
        loss, sums = grpo_loss(logprobs, batch, a, entropies)
        return loss, sums, mx.stop_gradient(logprobs)

    def apply_gradients(self, loss: float, grads: Any) -> tuple[float, int]:
        """Clip by the global norm and step. A non-finite update changes nothing."""
        norm = adamw.global_norm(grads, self.args.use_compile)
        self.update_step += 1
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.bad_updates += 1
            say(f"update {self.update_step}: loss {loss}, gradient norm {norm}: left out")
            return norm, 1
        self.bad_updates = 0
        clip = min(1.0, self.args.max_grad_norm / (norm + 1e-6))
        self.optimizer.update(self.model, grads, self.lr_schedule(self.update_step), clip)
        return norm, 0

    def move_reference(self, first: int, records: list[dict[str, Any]], completions: int) -> None:
        """Adapt kl_coeff to the target, and bring the reference nearer where that is due."""
        a, kl = self.args, records[-1]["kl"]
        if a.kl_target and kl is not None and math.isfinite(kl):
            records[-1]["kl_coeff"] = self.kl_coeff
            share = completions / a.kl_horizon
            self.kl_coeff = adapted_kl_coeff(self.kl_coeff, kl, a.kl_target, share)
        if self.ref_model is not None and due(a.ref_sync_updates, first, self.update_step):
            mixed = tree_map(
                lambda p, r: (a.ref_sync_alpha * p + (1 - a.ref_sync_alpha) * r).astype(r.dtype),
                self.master,
                self.ref_model.parameters(),
            )
            self.ref_model.update(mixed)  # TR-DPO, arXiv:2404.09656
            mx.eval(mixed)

    def answers(
        self,
        dataset: list[dict[str, Any]],
        samples: int = 0,
        temperature: float = 0.0,
        model: nn.Module | None = None,
    ) -> tuple[list[dict[str, Any]], list[Completion]]:
        """A fixed subset of `samples` rows (0: all), and one completion of each."""
        rows = subset(dataset, samples)
        how = self.sampling_with(temperature, self.args.eval_max_new_tokens)
        keys = [row_key(self.args.seed, 1, i) for i in range(len(rows))]
        policy = merged_layers.unpacked(model or self.model, self.plan.spare_for_rollouts)
        return rows, self.sample(policy, rows, keys, how)

    def is_right(self, response: Completion, row: dict[str, Any]) -> bool:
        """Exact match, the metric that evaluations report."""
        return same_answer(extract_xml_answer(response.text), row["answer"])

    def train(self) -> int:
        """Evaluate, update until the schedule ends, evaluate, save. Returns the exit code."""
        with ending.Guard(self) as run, progress.progress_bar(self) as self.bar:
            if self.unreported:
                self.after_update(*self.unreported)  # an evaluation was cut short
            elif self.update_step == 0:
                self.evaluate("test")
            while not run.is_over():
                before = self.step, self.update_step
                batch, batches = self.prompts_of_update(self.rollout)
                records = self.train_step(batch)
                self.step, self.rollout = self.step + batches, self.rollout + 1
                self.elapsed = run.seconds()
                self.mark((before, records))
                self.after_update(before, records)
            ending.finish(self, run.reason)
        return run.exit_code


def read_config(path: str | None, overrides: Sequence[str]) -> MLXGRPOConfig:
    """Settings from defaults, TOML file and overrides, all checked."""
    config = reading.resolve(MLXGRPOConfig, Path(path or ROOT / "configs/default.toml"), overrides)
    command_line.check_surroundings(config)
    return config


def build_trainer(config: MLXGRPOConfig, command: str) -> MLXGRPOTrainer:
    """Everything that can fail for bad input, cheap things first; nothing is written."""
    loading.check_model(config.model_name)
    rewards = by_name.load_rewards(config, REWARDS)
    train_rows = load_questions(config, "train")
    train_rows = train_rows[: config.max_train_samples or len(train_rows)]
    test_rows = load_questions(config, "test") if config.eval_samples else []
    runtime.set_memory_limits(config.wired_limit_gb, config.cache_limit_gb, config.memory_limit_gb)
    cores.take_turns(config)
    loaded = load_model(config)
    return MLXGRPOTrainer(loaded, rewards, config, train_rows, test_rows, command)


def start(config: MLXGRPOConfig, command: str) -> int:
    """Train from the settings to `final/`. Returns the exit code."""
    return command_line.start(config, command, build_trainer, BLAS)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 0, 1 (failed run), 2 (bad input), 128 + n (ended by signal n)."""
    given = command_line.parse_arguments(argv, MLXGRPOConfig, __file__)

    def work() -> int:
        config = read_config(given.config, given.overrides)
        return this_machine.dry_run(config) if given.dry_run else start(config, given.command)

    return command_line.exit_code_of(work, given.debug)


if __name__ == "__main__":
    sys.exit(main())
