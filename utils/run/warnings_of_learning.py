"""Warns of learning that went wrong, from the figures of the last updates.

One warning a window at most, the likely cause before its consequences. Thresholds are far from
what a healthy run shows (docs/faults.md says how they were chosen): a warning that comes for
nothing teaches to ignore it.
"""

import statistics
from typing import Any

FIGURES = ("reward_mean", "entropy", "kl", "groups_without_signal", "truncation_rate")


def symptom(recent: list[dict[str, Any]], start: dict[str, Any]) -> str | None:
    """What the records of one window say that needs a person; None when nothing does.

    Args:
        recent: the last records of updates, with FIGURES (None or missing: not known).
        start: `level` of the first window, with `best_reward` and `reward_noise` of the best one.
    """
    now = level(recent)
    reward, best = now["reward_mean"], start.get("best_reward")
    if above(now["truncation_rate"], 0.99):
        return (
            "every completion was cut off, so that none could answer: raise max_new_tokens (and "
            "max_completion_length), or check that stop_strings can occur"
        )
    if above(now["groups_without_signal"], 0.99):
        return (
            f"no group had any variance, so nothing was learnt (mean reward {reward:.3g}): if that "
            "is the best there is, stop; else use easier or harder questions, a reward with more "
            "steps, a higher temperature or more num_generations"
        )
    if above(now["kl"], max(1.0, 5 * (start.get("kl") or 0.0))):
        return (
            f"the policy is far from its reference (KL {now['kl']:.2g} a token): "
            "start anew with a lower learning rate or a higher kl_coeff"
        )
    noise = start["reward_noise"]
    if reward is not None and best is not None and best - reward > max(abs(best) / 2, 4 * noise):
        return (
            f"the reward has collapsed, from {best:.3g} at its best to {reward:.3g}: start anew "
            "with a lower learning rate or kl_coeff above 0; an older checkpoint may still be good"
        )
    first, entropy = start.get("entropy"), now["entropy"]
    gained = (
        reward is not None and reward > (start.get("reward_mean") or 0.0) + start["reward_noise"]
    )
    if first and entropy is not None and entropy < first / 10 and not gained:
        return (
            f"the entropy has collapsed, from {first:.2g} to {entropy:.2g} nats a token, and the "
            "reward has not gained by it: all samples are alike; raise temperature, lower the "
            "learning rate, or raise clip_eps_high"
        )
    return None


def above(value: float | None, limit: float) -> bool:
    return value is not None and value > limit


def level(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean of each figure; None where no record has it."""
    known = {n: [r[n] for r in records if is_known(r.get(n))] for n in FIGURES}
    return {name: statistics.fmean(values) if values else None for name, values in known.items()}


def is_known(value: Any) -> bool:
    return value is not None and value == value  # NaN is not


def watched(state: dict[str, Any], records: list[dict[str, Any]], window: int) -> dict[str, Any]:
    """The state after some more records of updates; `warning` is in it when one is due now.

    The state is JSON and is not changed in place: it is part of a checkpoint.
    """
    state = {"recent": [], "start": None, "quiet": 0, **state, "warning": None}
    for record in records:
        recent = [*state["recent"], {n: record.get(n) for n in FIGURES}][-window:]
        state |= {"recent": recent, "quiet": max(0, state["quiet"] - 1)}
        if len(recent) < window:
            continue
        state["start"] = compared(state["start"], recent)
        if not state["quiet"] and (text := symptom(recent, state["start"])):
            state |= {"warning": text, "quiet": window}
    return state


def compared(start: dict[str, Any] | None, recent: list[dict[str, Any]]) -> dict[str, Any]:
    """The first window's level (of the KL, the first record's, which is the error of a quantized
    reference), and the best reward so far with its noise from update to update."""
    now = level(recent)
    rewards = [r["reward_mean"] for r in recent if is_known(r["reward_mean"])]
    start = start or {**now, "kl": recent[0]["kl"], "best_reward": None, "reward_noise": 0.0}
    best = start["best_reward"]
    if rewards and (best is None or now["reward_mean"] > best):
        noise = statistics.pstdev(rewards)
        return {**start, "best_reward": now["reward_mean"], "reward_noise": noise}
    return start
