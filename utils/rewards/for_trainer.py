"""Reward functions called for the trainer, with TRL's keywords."""

import functools
from typing import Any

import numpy as np

from .calls import TrainerState, takes_parts
from .importing import Rewards


def call(
    trainer: Any, functions: Rewards, rows: list[dict], responses: list[Any]
) -> dict[str, np.ndarray]:
    """(B,) values by name of the function, for B row-completion pairs."""
    columns = keywords(trainer, rows, responses)
    pulse = functools.partial(trainer.pulse, "rewards")
    values: dict[str, np.ndarray] = trainer.reward_calls(functions, columns, state(trainer), pulse)
    return values


def ahead(trainer: Any, rows: list[dict], responses: list[Any]) -> None:
    """Let functions that wait for others begin on whole groups while the next are sampled."""
    functions, size = takes_parts(trainer.reward_funcs), trainer.args.num_generations
    whole = len(responses) // size
    if functions and 0 < whole < len(rows):
        repeated = [row for row in rows[:whole] for _ in range(size)]
        columns = keywords(trainer, repeated, responses[: whole * size])
        trainer.reward_calls.ahead(functions, columns, state(trainer))


def state(trainer: Any) -> TrainerState:
    epoch = trainer.rollout / trainer.rollouts_per_epoch
    return TrainerState(trainer.update_step, trainer.total_updates, epoch, trainer.args.num_epochs)


def keywords(trainer: Any, rows: list[dict], responses: list[Any]) -> dict[str, list]:
    """TRL's keywords for B row-completion pairs, and `prompt_texts`."""
    names = {name for row in rows for name in row} - {"prompt_ids", "prompt"}
    columns: dict[str, list] = {n: [row.get(n) for row in rows] for n in sorted(names)}
    columns["prompts"] = [row["prompt"] for row in rows]
    columns["completions"] = [[{"role": "assistant", "content": r.text}] for r in responses]
    columns["completion_ids"] = [response.ids for response in responses]
    # Prompts as the model reads them, up to the reasoning prefix; each is decoded once.
    distinct = {id(row): row["prompt_ids"] for row in rows}
    end = -len(trainer.prefix_ids) or None
    texts = {key: trainer.tokenizer.decode(ids[:end]) for key, ids in distinct.items()}
    columns["prompt_texts"] = [texts[id(row)] for row in rows]
    return columns
