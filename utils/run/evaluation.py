"""How good the policy is: exact match, or the mean of a reward, on a fixed subset of questions."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from ..base.errors import UserError
from ..data.completion import Completion
from ..data.files import Row
from ..data.order import subset
from ..data.questions import encode_questions
from ..rewards.answers import extract_xml_answer, same_answer
from ..rollouts.whole import shared_out
from . import checkpoints
from .log import conversation_metrics, mean
from .run import Trainer
from .state import Record

Keep = Callable[[list[Row], list[Completion], dict[str, Sequence[float]]], None]


def evaluate(trainer: Trainer, split: str) -> float:
    """Score the fixed subset of a split, log it, return the score (NaN: no questions)."""
    train, run = split == "train", trainer.run
    dataset = trainer.train_dataset if train else trainer.eval_dataset
    samples = trainer.args.eval_subset_size if train else trainer.args.eval_samples
    if not (dataset and samples):
        return math.nan
    update = run.state.update_step
    keep = partial(run.completions.evaluation, split, update)
    with run.doing(f"evaluating on {split}"):
        result = score(trainer, subset(dataset, samples), keep=keep)
    counters = {"update": update, "batch_step": run.state.step, "split": split}
    run.log.evaluation(counters | result)
    if trainer.args.save_best and not train:
        checkpoints.keep_best(trainer)
    return float(result["em"])


def of_questions(trainer: Trainer, dataset: list[Row], samples: int, **how: Any) -> Record:
    """Score a fixed subset of `samples` questions (0: all); `how`: see the trainer's `answers`.

    Raises:
        UserError: there is no question whose prompt fits.
    """
    if not dataset:
        raise UserError("there is nothing to evaluate: the data set holds no questions")
    if "prompt_ids" not in dataset[0]:
        loaded = trainer.loaded
        which = loaded.tokenizer, loaded.vocabulary, trainer.args
        dataset = encode_questions(*which, dataset, "evaluation")
    return score(trainer, subset(dataset, samples), **how)


def score(trainer: Trainer, questions: list[Row], keep: Keep | None = None, **how: Any) -> Record:
    """The mean exact match (or `eval_metric`), of how many, and how many were cut off.

    `keep` gets the questions, their completions, and their scores by the metric's name.
    """
    completions, name = trainer.answers(questions, **how), trainer.args.eval_metric
    if name == "em":
        pairs = zip(completions, questions, strict=True)
        scores = [same_answer(extract_xml_answer(c.text), q["answer"]) for c, q in pairs]
    else:

        def valued(mine: list[int]) -> np.ndarray:
            own = [questions[i] for i in mine], [completions[i] for i in mine]
            return trainer.rewards.of(name, *own) if mine else np.zeros(0)

        scores = shared_out([1.0] * len(questions), valued).tolist()
    if keep:
        keep(questions, completions, {name: [*map(float, scores)]})
    cut = float(np.mean([c.finish_reason == "length" for c in completions]))
    score = mean(np.array(scores, float))
    figures = {"em": score, "em_subset": len(questions), "truncation_rate": cut}
    return figures | conversation_metrics(completions)
