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
    w = pi_old / pi_s, s: what sampled, in 4 bits or some time ago  importance_weights
    J = min(r A, clip(r, 1 - clip_eps, 1 + clip_eps) A)             clipped_surrogate
    loss = mean over tokens, then sequences, of -w J + kl_coeff KL  token_weights, grpo_loss

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
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
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
from utils.data import files, order
from utils.data.completion import Completion
from utils.data.files import Row
from utils.data.questions import encode_questions, load_questions
from utils.data.questions import extract_hash_answer as extract_hash_answer
from utils.device import cores, fast, ranks, team
from utils.gradient import adamw, loss_scale, on_cores, shared_prompts
from utils.gradient.micro_batch import MicroBatch
from utils.gradient.scorer import Scorer
from utils.memory import this_machine
from utils.memory.memory import Memory
from utils.memory.meter import Meter, timed
from utils.model.adapters import without_adapters
from utils.model.copies import quantize_copy, quantizes
from utils.model.loading import LoadedModel, check_model, load_model
from utils.model.tiktoken_wrapper import TiktokenTokenizerWrapper as TiktokenTokenizerWrapper
from utils.rewards import builtin, by_name
from utils.rewards.answers import extract_xml_answer, last_text, same_answer
from utils.rewards.calls import Reward, TrainerState
from utils.rewards.formats import (
    int_reward_func,
    soft_format_reward_func,
    strict_format_reward_func,
    xmlcount_reward_func,
)
from utils.rewards.rewards import Rewards
from utils.rollouts import caches, compiled_step, draw, merged_layers, whole
from utils.rollouts.asking import environments_of, with_turns
from utils.rollouts.sampler import Sampler, Sampling, sampling_settings
from utils.rollouts.stop_rule import Reader, StopRule
from utils.run import checkpoints, command_line, dry_run, ending, evaluation, launch, opening
from utils.run.log import TokenSums, rollout_metrics
from utils.run.run import Run, due
from utils.run.state import Record
from utils.settings import checks, reading
from utils.settings.run_settings import Settings

# mlx_lm, transformers and datasets take seconds to import, so that happens where they are used:
# `--help` and a mistyped setting answer at once.

ROOT = Path(__file__).resolve().parent


@dataclass
class MLXGRPOConfig(Settings):
    """Settings of the algorithm: sampling, loss, advantages, reference, optimizer.

    Those of a run (model, data, rewards, adapters, evaluation, checkpoints, memory) are in
    utils/settings/run_settings.py. Precedence of both: defaults < TOML file < `--set key=value`.
    """

    # How much is sampled and learnt, in which portions
    seed: int = 0
    """Decides data order, every sampled token, adapter initialisation and dropout."""
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

    # How a completion is sampled
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

    # Loss
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

    # From rewards to advantages
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

    # Distance to a reference, and to the policy that sampled
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

    # Optimizer
    learning_rate: float = 1e-6
    """Peak learning rate of full fine-tuning."""
    lora_learning_rate: float = 2e-5
    """Learning rate of adapters (they need more than full fine-tuning)."""
    lr_scheduler_type: str = "cosine"
    """After the warm-up: constant, or cosine or linear to 0, one update after the last."""
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
        self.follow("loss_type")
        checks.check(self, loss_type=LOSSES, advantage_estimator=ADVANTAGES, kl_estimator=KL)
        super().__post_init__()

    def follow(self, name: str) -> None:
        """A loss brings the settings of its paper with it, where the user has not set them."""
        if name in ("loss_type", "advantage_estimator"):
            checks.follow_loss(self, LOSSES)

    @property
    def loss(self) -> Loss:
        return LOSSES[self.loss_type]


def get_gsm8k_questions(split: str = "train") -> list[Row]:
    """GSM8K from the hub, as rows that the trainer takes."""
    return load_questions(MLXGRPOConfig(), split)


# Reward functions have TRL's interface: `completions` are conversations, most often of one message,
# every column of the data is a keyword, and one value per completion comes back.


def correctness_reward_func(completions: list, answer: list[str], **_: Any) -> list[float]:
    """2.0 for the right answer, numbers compared as numbers."""
    given = (extract_xml_answer(last_text(c)) for c in completions)
    return [2.0 if same_answer(g, a) else 0.0 for g, a in zip(given, answer, strict=True)]


REWARDS: dict[str, Reward] = {
    "correctness": correctness_reward_func,
    "int": int_reward_func,
    "strict_format": strict_format_reward_func,
    "soft_format": soft_format_reward_func,
    "xmlcount": xmlcount_reward_func,
    **builtin.table(extract_xml_answer, correctness_reward_func),
}


@dataclass
class Rollout:
    """P prompts with G completions each, and what F reward functions say of them."""

    prompts: np.ndarray  # (P,) indices of the training set
    completions: np.ndarray  # (P, G) of Completion
    values: np.ndarray  # (P, G, F)
    rewards: np.ndarray  # (P, G) their weighted sum; NaN where no function applied
    replaced: list[Rollout] = field(default_factory=list)  # groups that gave others their places

    @property
    def lengths(self) -> np.ndarray:
        """(P, G) sampled tokens."""
        count = np.vectorize(lambda completion: completion.sampled, otypes=[int])
        return count(self.completions)

    def put(self, groups: np.ndarray, other: Rollout) -> None:
        """Replace some groups (indices) by those of another rollout."""
        names = "prompts", "completions", "values", "rewards"
        self.replaced.append(Rollout(*(getattr(self, name)[groups] for name in names)))
        for name in names:
            getattr(self, name)[groups] = getattr(other, name)


def has_signal(rewards: np.ndarray) -> np.ndarray:
    """(P,) whether the rewards of each group differ, by more than rounding does."""
    low, high = np.nanmin(rewards, 1, initial=np.inf), np.nanmax(rewards, 1, initial=-np.inf)
    return high - low > np.maximum(1e-8, 1e-12 * np.maximum(-low, high))


def centred(rewards: np.ndarray, share: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(P, G) rewards minus the mean of their group, and the (P, 1) number that were valued.

    NaN (no function applied) counts nowhere and gets 0, as do a group without signal, and what
    differs from the mean by rounding only. `share`: (P, G) of each in the mean, if not equal.
    """
    count = np.maximum((~np.isnan(rewards)).sum(axis=1, keepdims=True), 1)
    total = np.nansum(rewards if share is None else rewards * share, axis=1, keepdims=True)
    above = rewards - (total / count if share is None else total)
    signal = np.abs(above) > 1e-12 * np.nanmax(np.abs(rewards), 1, keepdims=True, initial=0)
    return np.where(signal & has_signal(rewards)[:, None], above, 0.0), count


def deviation(values: np.ndarray) -> float:
    """The standard deviation, ddof = 1, of all that is a number; 0 where fewer than two are."""
    return float(np.nanstd(values, ddof=1)) if (~np.isnan(values)).sum() > 1 else 0.0


def group_advantages(rewards: np.ndarray, eps: float = 1e-4) -> np.ndarray:
    """(P, G) rewards -> (P, G) advantages (R - mean) / (std + eps), as in TRL, with ddof = 1."""
    centre, count = centred(rewards)
    std = np.sqrt((centre**2).sum(axis=1, keepdims=True) / np.maximum(count - 1, 1))
    return centre / (std + eps)


def leave_one_out(centre: np.ndarray, count: np.ndarray) -> np.ndarray:
    """RLOO (arXiv:2402.14740): R minus the mean of the others of its group, so n / (n - 1) times R
    minus the mean of all n."""
    return centre * count / np.maximum(count - 1, 1)


def gdpo_advantages(r: Rollout, a: MLXGRPOConfig) -> np.ndarray:
    """GDPO (arXiv:2601.05242): each reward normalised in its group, the sum over the batch."""
    each = [group_advantages(x, a.advantage_eps) for x in np.moveaxis(r.values, -1, 0)]  # F, (P, G)
    weights = a.reward_weights or [1.0] * len(each)
    total = np.where(np.isnan(r.rewards), np.nan, np.tensordot(weights, each, axes=1))
    return centred(total)[0] / (deviation(total) + a.advantage_eps)  # its mean is 0


def whitened_over_tokens(values: np.ndarray, r: Rollout) -> np.ndarray:
    """(P, G) values with mean 0 and variance 1 over all tokens; 0 where all values are equal."""
    valid = ~np.isnan(r.rewards)
    share = np.where(valid, r.lengths, 0) / max(r.lengths[valid].sum(), 1)  # (P, G) of all tokens
    known = np.where(valid, values, np.nan)
    shifted = centred(known.reshape(1, -1), share.reshape(1, -1))[0].reshape(known.shape)
    return shifted / np.sqrt((share * shifted**2).sum() + 1e-8)


ADVANTAGES: dict[str, Callable[[Rollout, MLXGRPOConfig], np.ndarray]] = {
    "group_norm": lambda r, a: group_advantages(r.rewards, a.advantage_eps),
    "dr_grpo": lambda r, a: centred(r.rewards)[0],  # arXiv:2503.20783
    # TRL's scale_rewards = "batch", arXiv:2508.08221
    "batch": lambda r, a: centred(r.rewards)[0] / (deviation(r.rewards) + a.advantage_eps),
    "rloo": lambda r, a: leave_one_out(*centred(r.rewards)),
    "reinforce": lambda r, a: whitened_over_tokens(r.rewards, r),  # REINFORCE++, arXiv:2501.03262
    "reinforce_baseline": lambda r, a: whitened_over_tokens(centred(r.rewards)[0], r),
    "gdpo": gdpo_advantages,
}


def running_moments(seen: list[float], rewards: np.ndarray) -> list[float]:
    """[count, mean, sum of squared deviations] of all rewards, these added (Chan's update)."""
    new = rewards[~np.isnan(rewards)]
    count, shift = seen[0] + new.size, (new.mean() if new.size else 0.0) - seen[1]
    share = new.size / max(count, 1)
    squares = seen[2] + ((new - new.mean()) ** 2).sum() if new.size else seen[2]
    return [count, seen[1] + shift * share, float(squares + shift**2 * seen[0] * share)]


def estimate_advantages(
    r: Rollout, moments: list[float], penalty: np.ndarray | float, a: MLXGRPOConfig
) -> np.ndarray:
    """(P, G) advantages of the rewards, which are normalised, clipped and penalised before."""
    rewards = r.rewards
    if a.reward_running_norm:
        count, mean, squares = moments
        std = math.sqrt(squares / max(count - 1, 1)) + 1e-8
        rewards = (rewards - mean * a.reward_running_norm_minus_mean) / std
    if a.reward_clip:
        rewards = np.clip(rewards, -a.reward_clip, a.reward_clip)
    r = dataclasses.replace(r, rewards=rewards - penalty)
    # What has no reward has no advantage.
    advantages = np.nan_to_num(ADVANTAGES[a.advantage_estimator](r, a))
    if a.advantages_norm:
        advantages = whitened_over_tokens(advantages, r)
    if a.advantage_clip:
        advantages = np.clip(advantages, -a.advantage_clip, a.advantage_clip)
    return advantages


ROLLOUT, EVALUATION, DROPOUT = range(3)  # what random numbers are for


def random_key(seed: int, purpose: int, place: Sequence[int]) -> np.ndarray:
    """(2,) uint32 key, by nothing else (place: update, prompt, number of a completion), so that
    resuming a run, splitting a batch or dropping finished rows changes no token."""
    return np.random.SeedSequence((seed, purpose, *place)).generate_state(2, np.uint32)


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
    reader: Reader,
) -> Generator[tuple[mx.array, mx.array], None, list[Completion]]:
    """A completion for each of `rows` (N indices into `prompts`), by (N, 2) `keys`.

    B at once, the places that the reader has; the next takes the place of one that has ended. Each
    step is yielded before MLX has computed it: batches can take turns on the cores of a CPU. The
    host looks for ends one block of steps behind the device, and drops what was sampled past them.
    """
    begun = [rows[n] for n in reader.next()]
    cache = caches.prefill(model, prompts, begun, how.max_tokens)
    tokens = mx.array([prompts[row][-1] for row in begun])  # (B,) that the cache has not yet
    keys_now, next_position = mx.array(keys[: len(begun)]), mx.array([0, 1], mx.uint32)  # (B, 2)
    forward = compiled_step.forward(model, cache)  # (B, 1) tokens -> (B, 1, V) logits
    sample_step = caches.compiled(partial(sample_tokens, how=how))
    while steps := reader.steps():
        block = []
        for _ in steps:
            logits = forward(tokens[:, None])[:, -1]  # (B, V)
            tokens, logprobs = sample_step(logits, keys_now)  # (B,)
            yield tokens, logprobs  # the device works while the host builds the next step
            block.append((tokens, logprobs))
            keys_now = keys_now + next_position
        keep = reader.read(block, compiled_step.part_to_leave(forward))
        if len(keep) == len(tokens):
            continue
        index, new = mx.array(keep, mx.int32), reader.next()
        last = mx.array([prompts[rows[n]][-1] for n in new], tokens.dtype)
        tokens = mx.concatenate([tokens[index], last])
        keys_now = mx.concatenate([keys_now[index], mx.array(keys[new])])
        going_on = [rows[n] for n in new]
        caches.refill(cache, keep, model, prompts, going_on, how.max_tokens, reader.waiting)
    return reader.completions()


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


@dataclass(frozen=True)
class Loss:
    """An objective, how it is averaged over the update, and what its paper sets."""

    objective: Objective
    average: str  # sequence, token or constant, see token_weights
    clip_eps: float | None = 0.2  # None: it has no lower clip
    clip_eps_high: float | None = 0.0  # 0: as clip_eps; None: it has no upper clip
    importance_sampling_level: str = "auto"  # auto: per token
    advantage_eps: float = 1e-4
    per_token: str = ""  # why a ratio per sequence has no meaning; empty where it has one
    per_sequence: bool = False  # all tokens of a sequence share one gradient
    dual_clip: bool = False  # `delta` acts


OF_TOKENS, ITSELF = "has a gradient per token", "averages token ratios itself"
clipped = partial(Loss, clipped_surrogate, dual_clip=True)
LOSSES: dict[str, Loss] = {
    "grpo": clipped("sequence"),  # arXiv:2402.03300
    "bnpo": clipped("token"),  # TRL's name
    "dapo": clipped("token", clip_eps_high=0.28),  # arXiv:2503.14476
    "dr_grpo": clipped("constant"),  # arXiv:2503.20783
    "gspo": clipped("sequence", 3e-4, 4e-4, "sequence"),  # arXiv:2507.18071
    "gmpo": Loss(geometric_mean, "sequence", 0.4, 0.4, per_token=ITSELF, per_sequence=True),
    "cpgd": Loss(clipped_policy_gradient, "sequence", advantage_eps=1e-6, per_token=OF_TOKENS),
    "cispo": Loss(capped_weight, "token", None, 4.0),
    "sapo": Loss(soft_gate, "sequence", None, None),
    "reinforce": Loss(policy_gradient, "token", None, None, per_token=OF_TOKENS),
}


def token_weights(lengths: np.ndarray, loss_type: str, longest: int) -> np.ndarray:
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
    return weights[LOSSES[loss_type].average]


def importance_weights(
    log_weights: mx.array, mask: mx.array, a: MLXGRPOConfig
) -> tuple[mx.array, mx.array]:
    """exp(old - sampler) within floor and cap, (B, W) or (B, 1), and where it was beyond them."""
    level, bound = a.importance_mode.split("_")
    if level == "sequence":
        log_weights = clamped((log_weights * mask).sum(axis=1, keepdims=True))
    weights = mx.exp(log_weights)
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
    logprobs: mx.array, batch: MicroBatch, a: MLXGRPOConfig, entropies: mx.array | None = None
) -> tuple[mx.array, dict[str, mx.array]]:
    """The objective `loss_type`, the KL penalty and the entropy bonus.

    Args:
        logprobs: (B, W) of the current policy, as are the `entropies` that a bonus needs.
        batch: Without old_logprobs the current policy is its own anchor: the ratio is 1, its
            gradient that of log pi.

    Returns:
        The loss, a sum weighted by the batch's `weights`, and sums over tokens for the log.
    """
    mask, advantages = batch.mask, batch.advantages[:, None]
    anchor = batch.old_logprobs
    old_logprobs = mx.stop_gradient(logprobs) if anchor is None else anchor
    log_ratio = clamped(logprobs - old_logprobs)
    ratio = policy_ratio(logprobs, log_ratio, mask, a)
    terms = Terms(logprobs, old_logprobs, log_ratio, ratio, advantages, mask)
    objective, held_back = a.loss.objective(terms, a)
    log_weights = clamped(old_logprobs - batch.sampler_logprobs)
    importance, outside = importance_weights(log_weights, mask, a)
    per_token = -importance * objective * batch.trained  # (B, W)
    sums = {
        "policy_reward": ratio * advantages,
        "clip_low": held_back * (advantages < 0),
        "clip_high": held_back * (advantages > 0),
        "importance_weight": importance,
        "importance_capped": outside,
        "sampler_mismatch": mx.abs(log_weights),
    }
    if batch.ref_logprobs is not None:
        kl = KL[a.kl_estimator](clamped(batch.ref_logprobs - logprobs))
        sums["kl"] = kl
        corrected = kl * ratio if a.kl_bias_correction else kl
        kl_coeff = a.kl_coeff if batch.kl_coeff is None else batch.kl_coeff
        per_token = per_token + kl_coeff * corrected
    loss = (per_token * mask * batch.weights[:, None]).sum()
    if entropies is not None and batch.entropy_weight is not None:
        loss = loss - (entropies * batch.trained * batch.entropy_weight).sum()
        sums["policy_entropy"] = entropies
    return loss, {name: mx.stop_gradient((x * mask).sum()) for name, x in sums.items()}


class MLXGRPOTrainer:
    """Holds the policies and runs the loop sample -> score -> update.

    `model` learns, `model_old` samples, `ref_model` is what it must not leave too far behind. What
    it does with them it leaves to `sampler`, `rewards`, `scorer` (log-probs), `memory` (how much at
    once) and `run` (folder, log, and the state that a checkpoint keeps). Methods stand in the order
    in which a run needs them.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        reward_funcs: dict[str, Reward],
        args: MLXGRPOConfig,
        train_dataset: list[Row],
        eval_dataset: list[Row],
        command: str = "mlx-grpo.py",
    ) -> None:
        self.args, self.loaded, self.reward_funcs = args, loaded, reward_funcs
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        if args.gradient_checkpointing:
            shared_prompts.checkpoint_layers(self.model)
        meter = Meter()
        self.run = Run(args, command, meter)
        environments = environments_of(args, self.tokenizer)  # prompts tell of their tools
        encode = partial(encode_questions, self.tokenizer, loaded.vocabulary, args)
        self.train_dataset = encode(train_dataset, "training")
        self.eval_dataset = encode(eval_dataset, "evaluation") if eval_dataset else []
        self.data_sha256 = files.fingerprint(self.train_dataset)
        self.order = order.PromptOrder(args, self.train_dataset)
        prefix = len(self.tokenizer.encode(args.reasoning_prefix, add_special_tokens=False))
        self.how = partial(sampling_settings, args, prefix)
        self.sampling = self.how(args.temperature, args.max_new_tokens)
        prompts = [question["prompt_ids"] for question in self.train_dataset]
        plan = this_machine.plan_of(args, loaded, max(map(len, prompts)), self.sampling.longest)
        self.memory = Memory(plan, self.run.state, self.run.halved, meter)
        stop = StopRule(self.tokenizer, tuple(args.stop_strings), args.reasoning_prefix)
        plain = Sampler(sample_batch, stop, self.memory, self.run.pulse)
        self.sampler = with_turns(plain, args, self.tokenizer, environments)
        self.rewards = Rewards(
            lambda: self.reward_funcs, args, self.tokenizer, prefix, self.progress, self.run.pulse
        )
        self.scorer = Scorer(token_logprobs, args.use_compile, (self.model, prompts))
        # AdamW over float32 masters: bfloat16 weights do not move at a learning rate of 1e-6.
        self.optimizer = adamw.make(self.model, args)
        self.loss_scale = loss_scale.LossScale(self.model)
        self.loss_and_grad = self.make_loss_and_grad()
        self.rollout: Rollout | None = None  # the last one, to be shown
        self.set_up_schedule()
        self.set_up_policies()

    @property
    def step(self) -> int:
        """Batches of prompts that were learnt from."""
        return self.run.state.step

    @property
    def update_step(self) -> int:
        """Optimizer updates that were done."""
        return self.run.state.update_step

    def make_loss_and_grad(self) -> Callable[[MicroBatch], Any]:
        """batch -> (what compute_grpo_loss returns, gradient of its loss by what trains)."""
        return self.loss_scale.value_and_grad(self.compute_grpo_loss, self.args.use_compile)

    def set_up_schedule(self) -> None:
        """How many updates there are, of how many prompts, and their highest learning rate."""
        a = self.args
        self.prompts_per_update = a.batch_size * a.gradient_accumulation_steps
        self.rollouts_per_epoch = math.ceil(len(self.train_dataset) / self.prompts_per_update)
        self.total_updates = a.num_epochs * self.rollouts_per_epoch * a.num_iterations
        if a.max_updates:
            self.total_updates = min(self.total_updates, a.max_updates)
        full = self.loaded.train_type == "full"
        self.peak_learning_rate = a.learning_rate if full else a.lora_learning_rate

    def lr_schedule(self, update: int) -> float:
        """The learning rate of an update, from 1."""
        how = self.args.warmup_ratio, self.args.lr_scheduler_type
        return adamw.learning_rate(self.peak_learning_rate, self.total_updates, *how, update)

    def progress(self) -> TrainerState:
        """For reward functions, by transformers' names."""
        epoch = self.run.state.rollout / self.rollouts_per_epoch
        return TrainerState(self.update_step, self.total_updates, epoch, self.args.num_epochs)

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

    def refresh_old_policy(self) -> nn.Module:
        """Bring the sampling copy up to date; with adapters, only they are copied."""
        stale = self.update_step - self.run.state.last_sync >= self.args.sync_every_updates
        if self.model_old is None or (self.old_is_copy and stale):
            self.run.state.last_sync = self.update_step
            if self.model_old is not None and self.loaded.train_type != "full":
                self.model_old.update(self.model.trainable_parameters())
            else:
                self.model_old = None  # frees the previous copy before the next is made
                self.model_old = self.copy_policy()
        return self.model_old

    def copy_policy(self) -> nn.Module:
        """A sampling copy of the policy as it is now; arrays that never change are shared."""
        policy = quantize_copy(self.model) if self.quantizes else copy.deepcopy(self.model)
        mx.eval(policy.parameters())
        return policy

    # Sample and score.

    def prompts_of_update(self, rollout: int) -> list[int]:
        """Indices of the training set for the nth rollout."""
        size = self.prompts_per_update
        if self.args.dynamic_sampling:  # the position in the stream depends on what was replaced
            return order.Stream(self.order, self.run.state.drawn).draw(size)
        epoch, position = divmod(rollout, self.rollouts_per_epoch)
        return self.order(epoch)[position * size : (position + 1) * size].tolist()

    def generate_responses(self, batch: list[int]) -> list[Completion]:
        """`num_generations` completions for each prompt (index of the training set), in order; of
        several machines, each has its own prompts."""
        size, update = self.args.num_generations, self.update_step
        drawn = order.occurrences(batch)  # a weighted prompt may come twice
        drawn = [drawn[place] for place in whole.dealt(len(batch))]
        keys = [
            random_key(self.args.seed, ROLLOUT, (update, prompt, again * size + n))
            for prompt, again in drawn
            for n in range(size)
        ]
        questions = [self.train_dataset[prompt] for prompt, _ in drawn]
        room = self.memory.spare_for_rollouts
        policy = merged_layers.merged(self.refresh_old_policy(), room, unpack=not self.quantizes)
        so_far = partial(self.rewards.ahead, questions, size)  # slow rewards begin meanwhile
        return self.sampler(policy, questions, keys, self.sampling, so_far)

    def compute_rewards(
        self, questions: list[Row], completions: list[Completion]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(B,) weighted totals and the (B,) values per function, for B question-completion pairs.

        None from a function (NaN here) adds nothing; where no function applies, the total is NaN.
        """
        values = self.rewards(questions, completions)
        stacked = np.stack(list(values.values()))  # (F, B)
        weights = np.array(self.args.reward_weights or [1.0] * len(values))[:, None]
        totals = np.nansum(stacked * weights, axis=0)
        return np.where(np.isnan(stacked).all(axis=0), np.nan, totals), values

    def roll_out(self, batch: list[int], metrics: dict[str, float]) -> Rollout:
        """Completions of each prompt (index of the training set), and their rewards."""
        mine = whole.dealt(len(batch))  # of several machines, each has a part
        own, shape = [batch[i] for i in mine], (len(mine), self.args.num_generations)  # (P, G)
        with timed(metrics, "seconds_rollout"):
            completions = self.generate_responses(batch) if mine or not batch else []
        with timed(metrics, "seconds_rewards"):
            rewards, values = self.compute_rewards(self.repeated(own, shape[1]), completions)
        groups, stacked, rewards = whole.whole(
            mine,
            np.array(completions, dtype=object).reshape(shape),
            np.stack(list(values.values()), axis=-1).reshape(*shape, len(values)),
            rewards.reshape(shape),
        )
        rollout = Rollout(np.array(batch), groups, stacked, rewards)
        metrics["tokens_sampled"] = metrics.get("tokens_sampled", 0.0) + rollout.lengths.sum()
        return rollout

    def repeated(self, prompts: Sequence[int] | np.ndarray, group: int) -> list[Row]:
        """The question of each completion, B in all."""
        return [self.train_dataset[i] for i in prompts for _ in range(group)]

    def collect(self, batch: list[int], stream: order.Stream, metrics: dict[str, float]) -> Rollout:
        """Roll out the prompts of an update.

        With dynamic sampling (DAPO), groups without variance give their places to the next prompts
        of the stream, until none is left or the rounds are used up.
        """
        self.rewards.start()
        rollout = self.roll_out(batch, metrics)
        for _ in range(self.args.dynamic_sampling):
            metrics.setdefault("resampled_prompts", 0.0)
            dull = np.flatnonzero(~has_signal(rollout.rewards))
            prompts = stream.draw(len(dull))
            if not prompts:
                break
            rollout.put(dull[: len(prompts)], self.roll_out(prompts, metrics))
            metrics["resampled_prompts"] += len(prompts)
        return rollout

    def train_step(self, batch: list[int]) -> list[Record]:
        """Roll out the prompts of one update, score them, update `num_iterations` times."""
        a, state, metrics = self.args, self.run.state, dict[str, float]()
        self.run.refuse_to_go_beyond(self.total_updates)
        self.memory.meter.start("rollout")
        stream = order.Stream.after(self.order, state.drawn, batch if a.dynamic_sampling else [])
        rollout = self.collect(batch, stream, metrics)
        self.memory.meter.start("gradient")
        with timed(metrics, "seconds_gradient"):
            moments = running_moments(state.reward_moments, rollout.rewards)
            penalty = self.kl_penalty(rollout, metrics)
            advantages = estimate_advantages(rollout, moments, penalty, a)  # (P, G)
            records = self.learn(rollout, advantages)
        metrics |= rollout_metrics(rollout, advantages, self.reward_funcs) | self.rewards.metrics()
        metrics["tokens_per_second"] = metrics.pop("tokens_sampled") / metrics["seconds_rollout"]
        records = [record | metrics for record in records]
        self.rollout = rollout
        # Only here the run gets ahead: what is stopped before is done once more from a checkpoint.
        self.move_reference(records, rollout.rewards.size)
        self.run.log.note_right(self.train_dataset, rollout, self.reward_funcs)
        state.reward_moments, state.drawn = moments, stream.position
        state.step += math.ceil(len(batch) / a.batch_size)
        state.rollout += 1
        for record in records:
            state.update_step = record["update"]
            state.bad_updates = state.bad_updates + 1 if record["skipped"] else 0
        self.run.mark()
        return records

    # Update.

    def learn(self, rollout: Rollout, advantages: np.ndarray) -> list[Record]:
        """`num_iterations` updates on a rollout with its (P, G) advantages."""
        first, tokens = self.update_step, float(rollout.lengths.sum())

        def cut() -> list[MicroBatch]:
            """The update in parts: in smaller ones where memory runs out, which changes nothing."""
            self.model.eval()  # an attempt that failed left its dropout on
            parts = partial(self.micro_batches, rollout, advantages)
            return self.memory.score(parts, self.select_tokens)

        batches, records = cut(), []
        for iteration in range(min(self.args.num_iterations, self.total_updates - first)):
            update = partial(self.update, batches, first + 1 + iteration, iteration, tokens)
            records.append(self.memory.update(update, batches, cut, lambda: self.run.moved))
        if first == 0:
            self.memory.recalibrate(batches)
        rollouts = [*rollout.replaced, rollout]
        self.run.completions.training(rollouts, advantages, batches, first + 1)
        return records

    def micro_batches(
        self, rollout: Rollout, advantages: np.ndarray, with_masked: bool = False
    ) -> list[MicroBatch]:
        """The update in padded batches; the model reads at most `micro_batch_tokens` for each.

        Sequences with advantage 0 are left out where nothing else gives them a gradient, but their
        tokens count in the normaliser: the weights are made before. Those of masked ones do not.
        """
        a = self.args
        completions: list[Completion] = rollout.completions.reshape(-1).tolist()  # B
        questions = self.repeated(rollout.prompts, rollout.completions.shape[1])
        pairs = zip(completions, questions, strict=True)
        prompts = [completion.after(question["prompt_ids"]) for completion, question in pairs]
        truncated = np.array([c.finish_reason == "length" for c in completions])
        masked = truncated & (a.mask_truncated_completions and not with_masked)
        masked |= np.array([c.failed for c in completions], dtype=bool)
        advantages = advantages.reshape(-1)
        lengths = np.where(masked, 0, rollout.lengths.reshape(-1))
        weights = token_weights(lengths, a.loss_type, self.sampling.max_tokens)
        kl_in_loss = self.ref_model is not None and a.kl_placement == "loss"
        always = kl_in_loss or a.entropy_coeff > 0 or a.top_entropy_quantile < 1
        used = np.flatnonzero(~masked & (always | (advantages != 0))).tolist()
        used = whole.own_groups(used, rollout.lengths)
        plan = self.memory.plan
        return self.scorer.micro_batches(prompts, completions, advantages, weights, used, plan)

    def select_tokens(self, batches: list[MicroBatch]) -> list[MicroBatch]:
        """Mark the update's tokens of highest entropy (arXiv:2506.01939), and weigh the bonus for
        entropy: a mean over all tokens that are trained."""
        a, now = self.args, self.run.state.rollout
        if a.top_entropy_quantile < 1:
            entropies = [self.rescored(self.model, batch, True)[1] for batch in batches]  # (B, W)
            pairs = list(zip(entropies, batches, strict=True))
            own = [np.array(e)[np.array(b.mask) > 0] for e, b in pairs]
            every = whole.of_all(f"entropies {now}", own)
            least = np.quantile(every, 1 - a.top_entropy_quantile)
            for entropy, batch in pairs:
                batch.selected = (entropy >= least).astype(mx.float32)
        if a.entropy_coeff:
            counts = np.array([batch.trained.sum().item() for batch in batches])
            count = whole.of_all(f"trained {now}", [counts]).sum()
            for batch in batches:
                batch.entropy_weight = mx.array(a.entropy_coeff / count)
        return batches

    def update(
        self, batches: list[MicroBatch], number: int, iteration: int, tokens: float
    ) -> Record:
        """Optimizer update `number`, from the summed gradients of all micro-batches.

        `tokens`: how many the completions have, over which the log's means are.
        """
        # One dropout mask for all iterations, or it would move the ratio.
        mx.random.seed(int(random_key(self.args.seed, DROPOUT, [self.run.state.rollout])[0]))
        loss, grads, sums = 0.0, None, TokenSums()
        self.model.train()  # dropout, and no kernels that have no gradient
        gradient = partial(self.gradient, iteration == 0)
        at_once = self.memory.micro_batches_at_once(self.args, self.update_step)
        for batch, result in on_cores.spread(gradient, batches, at_once):
            (part, stats, logprobs), new = result
            grads = adamw.accumulate(grads, new)
            result = new = None  # each gradient's memory goes as it is added
            mx.eval(grads, part, stats, logprobs)  # MLX is lazy: it computes when asked to
            if iteration == 0:
                batch.old_logprobs = logprobs  # the anchor of the ratio from now on
            loss += float(part)
            sums.add(stats, batch.mask)
        self.model.eval()
        if grads is None:  # no completion had an advantage
            grads = tree_map(mx.zeros_like, self.model.trainable_parameters())
        loss, grads = sums.of_all(loss), ranks.here().added(grads)
        if self.loss_scale.overflowed(loss, grads):  # in float16: once more with a smaller scale
            return self.update(batches, number, iteration, tokens)
        norm, skipped = self.apply_gradients(loss, grads, number)
        record = {"loss": loss, "grad_norm": norm, "skipped": skipped, "kl": None}
        return {"update": number, "lr": self.lr_schedule(number), **record, **sums.means(tokens)}

    def gradient(self, first: bool, batch: MicroBatch) -> Any:
        """Loss and gradient of a micro-batch; the `first` adds the reference's log-probs to it."""
        if first:  # later, weights have moved, and an update can't be dropped
            self.run.pulse("gradient")
            if self.ref_model is not None and self.args.kl_placement == "loss":
                batch.ref_logprobs = self.rescored(self.ref_model, batch)[0]
        if self.args.kl_target:
            batch.kl_coeff = mx.array(self.run.state.kl_coeff)
        return self.loss_and_grad(batch)

    def rescored(
        self, model: nn.Module, batch: MicroBatch, with_entropy: bool = False
    ) -> tuple[mx.array, mx.array | None]:
        """(B, W) log-probs (and entropies) of a micro-batch, without a gradient."""
        found = self.scorer(model, batch, self.args.temperature, with_entropy)
        mx.eval(found)
        return found

    def compute_grpo_loss(
        self, batch: MicroBatch
    ) -> tuple[mx.array, dict[str, mx.array], mx.array]:
        """Loss, sums for the log, and the (B, W) log-probs of the policy being trained."""
        a = self.args
        logprobs, entropies = self.scorer(self.model, batch, a.temperature, a.entropy_coeff > 0)
        loss, sums = grpo_loss(logprobs, batch, a, entropies)
        return loss, sums, mx.stop_gradient(logprobs)

    def apply_gradients(self, loss: float, grads: Any, number: int) -> tuple[float, int]:
        """Clip by the global norm and step. A non-finite update changes nothing."""
        self.run.moved = True  # also by an update that is left out: the next has its anchors
        norm = adamw.global_norm(grads, self.args.use_compile)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            say(f"update {number}: loss {loss}, gradient norm {norm}: left out")
            return norm, 1
        clip = min(1.0, self.args.max_grad_norm / (norm + 1e-6))
        self.optimizer.update(self.model, grads, self.lr_schedule(number), clip)
        return norm, 0

    def kl_penalty(self, rollout: Rollout, metrics: dict[str, float]) -> np.ndarray | float:
        """(P, G) what is taken off the rewards for the distance to the reference, if anything."""
        ref_model = self.ref_model
        if ref_model is None or self.args.kl_placement != "reward":
            return 0.0
        shape = rollout.rewards.shape

        def summed(batches: list[MicroBatch]) -> np.ndarray:
            """(B,) KL between policy and reference of each completion, over its tokens."""
            total = np.zeros(rollout.rewards.size)
            for batch in batches:
                self.run.pulse("scoring")  # the progress bar goes on, and Ctrl-C is heard
                ref_logprobs = self.rescored(ref_model, batch)[0]
                x = clamped(ref_logprobs - self.rescored(self.model, batch)[0])
                sums = (KL[self.args.kl_estimator](x) * batch.mask).sum(axis=1)
                # Rows that only fill up a batch are completion 0 with an empty mask.
                np.add.at(total, np.array(batch.completion, int), np.array(sums))
            return whole.total(total)

        kl = self.memory.score(partial(self.micro_batches, rollout, np.ones(shape), True), summed)
        metrics["kl"] = kl.sum() / rollout.lengths.sum()
        return self.run.state.kl_coeff * kl.reshape(shape)

    def move_reference(self, records: list[Record], completions: int) -> None:
        """Adapt kl_coeff to the target, and bring the reference nearer where that is due."""
        a, state, kl = self.args, self.run.state, records[-1]["kl"]
        if a.kl_target and kl is not None and math.isfinite(kl):
            records[-1]["kl_coeff"] = state.kl_coeff
            share = completions / a.kl_horizon
            state.kl_coeff = adapted_kl_coeff(state.kl_coeff, kl, a.kl_target, share)
        now = records[-1]["update"]
        if self.ref_model is not None and due(a.ref_sync_updates, state.update_step, now):
            mixed = tree_map(
                lambda p, r: (a.ref_sync_alpha * p + (1 - a.ref_sync_alpha) * r).astype(r.dtype),
                self.optimizer.masters(self.model),  # float32, as the optimizer moves them
                self.ref_model.parameters(),
            )
            self.ref_model.update(mixed)  # TR-DPO, arXiv:2404.09656
            mx.eval(mixed)

    # Evaluate, and the whole run.

    def answers(
        self, questions: list[Row], temperature: float = 0.0, model: nn.Module | None = None
    ) -> list[Completion]:
        """One completion of each question."""
        how = self.how(temperature, self.args.eval_max_new_tokens)
        keys = [random_key(self.args.seed, EVALUATION, [i]) for i in range(len(questions))]
        policy = merged_layers.unpacked(model or self.model, self.memory.spare_for_rollouts)
        return whole.answers(self.sampler, policy, questions, keys, how)

    def evaluate(self, split: str = "test") -> float:
        """Score the fixed subset of a split, log it, return the score (NaN: no questions)."""
        return evaluation.evaluate(self, split)

    def evaluate_em(self, dataset: list[Row], samples: int = 0, **how: Any) -> float:
        """Mean exact match (or `eval_metric`) on `samples` (0: all) rows of `load_questions`."""
        return evaluation.of_questions(self, dataset, samples, **how)["em"]

    def save_checkpoint(self, path: Path) -> None:
        """A complete model folder (or adapters in mlx-lm's format) with the trainer's state."""
        checkpoints.save_now(Path(path), self)

    def train(self) -> int:
        """Evaluate, update until the schedule ends, evaluate, save. Returns the exit code."""
        run, state = self.run, self.run.state
        with ending.Guard(self) as guard, run.showing(self.total_updates):
            if state.unreported:
                run.after_update(self, *state.unreported)  # an evaluation was cut short
            elif self.update_step == 0:
                self.evaluate("test")
            while not guard.is_over():
                before = self.step, self.update_step
                records = self.train_step(self.prompts_of_update(state.rollout))
                state.elapsed = guard.seconds()
                run.mark((before, records))
                run.after_update(self, before, records)
            ending.finish(self, guard.reason)
        return guard.exit_code


def read_config(path: str | None, overrides: Sequence[str]) -> MLXGRPOConfig:
    """Settings from defaults, TOML file and overrides, all checked."""
    config = reading.resolve(MLXGRPOConfig, Path(path or ROOT / "configs/default.toml"), overrides)
    command_line.check_surroundings(config)
    return config


def build_trainer(config: MLXGRPOConfig, command: str) -> MLXGRPOTrainer:
    """Everything that can fail for bad input, cheap things first; nothing is written."""
    check_model(config.model_name)
    rewards = by_name.load_rewards(config, REWARDS)
    train_rows = load_questions(config, "train")
    train_rows = train_rows[: config.max_train_samples or len(train_rows)]
    test_rows = load_questions(config, "test") if config.eval_samples else []
    runtime.set_memory_limits(config.wired_limit_gb, config.cache_limit_gb, config.memory_limit_gb)
    cores.take_turns(config)
    return MLXGRPOTrainer(load_model(config), rewards, config, train_rows, test_rows, command)


def start(config: MLXGRPOConfig, command: str) -> int:
    """Train from the settings to `final/`, in the run's folder. Returns the exit code."""
    with team.together(config.rank_timeout), opening.locked(config, command) as place:
        if place.finished:
            return 0
        trainer = build_trainer(config, command)
        with opening.opened(trainer, place, BLAS):
            return trainer.train()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 0, 1 (failed run), 2 (bad input), 128 + n (ended by signal n)."""
    given = command_line.parse_arguments(argv, MLXGRPOConfig, __file__)

    def work() -> int:
        config = read_config(given.config, given.overrides)
        if launch.is_to_start(given):
            return launch.ranks(given, __file__)
        return dry_run.of(config, REWARDS, given) if given.dry_run else start(config, given.command)

    return command_line.exit_code_of(work, given.debug)


if __name__ == "__main__":
    ending.leave(launch.told(main))
