"""Warns of learning that went wrong, from the figures of the last updates.

One warning a window at most, the likely cause before its consequences. Thresholds are far from
what a healthy run shows (docs/faults.md says how they were chosen): a warning that comes for
nothing teaches to ignore it.
"""

import statistics

import numpy as np

from ..base.text import Json, shown
from ..rewards.answer_forms import ANSWER_REWARDS
from .trackers import Record

Figures = dict[str, float | None]
"""By name; None: not known."""
FIGURES = ("reward_mean", "entropy", "kl", "groups_without_signal", "truncation_rate")


TAIL = 60  # characters of the end of a completion that a warning shows


def symptom(
    recent: list[Record], start: Record, wrong: dict[str, Json] | None = None
) -> str | None:
    """What the records of one window say that needs a person; None when nothing does.

    Args:
        recent: the last records of updates, with FIGURES (None or missing: not known).
        start: `level` of the first window, with `best_reward` and `reward_noise` of the best one.
        wrong: of each reward for answers, a sample; None where one was right (see `noted`).
    """
    now = level(recent)
    found = (no_answer(now, start), never_right(wrong or {}), *(sign(now, start) for sign in SIGNS))
    return next(filter(None, found), None)


def noted(
    watched: dict[str, Json], values: np.ndarray, names: list[str], expected: str, text: str
) -> dict[str, Json]:
    """The state with which rewards for answers have never been above 0.

    Args:
        values: (P, G, F) of a rollout, NaN where a reward did not apply.
        names: of the F rewards.
        expected: what the first completion was to answer.
        text: that completion.
    """
    wrong = dict(watched.get("wrong", {}))
    sample = {"expected": expected, "end": text[-TAIL:]}
    for n, name in enumerate(names):
        if name in ANSWER_REWARDS and wrong.get(name, sample) is not None:
            wrong[name] = None if (values[..., n] > 0).any() else sample
    return {**watched, "wrong": wrong}


def never_right(wrong: dict[str, Json]) -> str | None:
    names = [name for name, sample in wrong.items() if sample is not None]
    if not names:
        return None
    sample = wrong[names[0]]
    has = "have" if len(names) > 1 else "has"
    return (
        f"{' and '.join(names)} {has} never been above 0 (expected {shown(sample['expected'])}, "
        f"a completion ended in {shown(sample['end'])}): compare the two, and see docs/rewards.md "
        "for what counts as equal; or use easier questions or a model that solves some"
    )


def no_answer(now: Figures, _: Record) -> str | None:
    if not above(now["truncation_rate"], 0.99):
        return None
    return (
        "every completion was cut off, so that none could answer: raise max_new_tokens (and "
        "max_completion_length), or check that stop_strings can occur"
    )


def no_signal(now: Figures, _: Record) -> str | None:
    if not above(now["groups_without_signal"], 0.99):
        return None
    if now["reward_mean"] is None:
        return (
            "no reward function gave any completion a value, so nothing was learnt: see what they "
            "need of the data (None from a function means that it does not apply)"
        )
    return (
        f"no group had any variance, so nothing was learnt (mean reward {now['reward_mean']:.3g}): "
        "if that is the best there is, stop; else use easier or harder questions, a reward with "
        "more steps, a higher temperature or more num_generations"
    )


def far_away(now: Figures, start: Record) -> str | None:
    if not above(now["kl"], max(1.0, 5 * (start.get("kl") or 0.0))):
        return None
    return (
        f"the policy is far from its reference (KL {now['kl']:.2g} a token): "
        "start anew with a lower learning rate or a higher kl_coeff"
    )


def reward_collapsed(now: Figures, start: Record) -> str | None:
    reward, best, noise = now["reward_mean"], start.get("best_reward"), start["reward_noise"]
    if reward is None or best is None or not above(best - reward, max(abs(best) / 2, 4 * noise)):
        return None
    return (
        f"the reward has collapsed, from {best:.3g} at its best to {reward:.3g}: start anew "
        "with a lower learning rate or kl_coeff above 0; an older checkpoint may still be good"
    )


def entropy_collapsed(now: Figures, start: Record) -> str | None:
    first, entropy = start.get("entropy"), now["entropy"]
    gained = above(now["reward_mean"], (start.get("reward_mean") or 0.0) + start["reward_noise"])
    if gained or not first or entropy is None or not entropy < first / 10:
        return None
    return (
        f"the entropy has collapsed, from {first:.2g} to {entropy:.2g} nats a token, and the "
        "reward has not gained by it: all samples are alike; raise temperature, lower the "
        "learning rate, or raise clip_eps_high"
    )


# Causes before what follows from them, after `no_answer` and `never_right`.
SIGNS = (no_signal, far_away, reward_collapsed, entropy_collapsed)


def above(value: float | None, limit: float) -> bool:
    return value is not None and value > limit


def level(records: list[Record]) -> Figures:
    """The mean of each figure; None where no record has it."""
    known = {n: [r[n] for r in records if is_known(r.get(n))] for n in FIGURES}
    return {name: statistics.fmean(values) if values else None for name, values in known.items()}


def is_known(value: object) -> bool:
    return value is not None and value == value  # NaN is not


def watched(state: dict[str, Json], records: list[Record], window: int) -> dict[str, Json]:
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
        text = symptom(recent, state["start"], state.get("wrong"))
        if text and not state["quiet"]:
            state |= {"warning": text, "quiet": window}
    return state


def compared(start: Record | None, recent: list[Record]) -> Record:
    """The first window's level (of the KL, the first record's, which is the error of a quantized
    reference), and the best reward so far with its noise from update to update."""
    now = level(recent)
    start = start or {**now, "kl": recent[0]["kl"], "best_reward": None, "reward_noise": 0.0}
    reward, best = now["reward_mean"], start["best_reward"]
    if reward is None or not (best is None or reward > best):
        return start
    noise = statistics.pstdev([r["reward_mean"] for r in recent if is_known(r["reward_mean"])])
    return {**start, "best_reward": reward, "reward_noise": noise}
