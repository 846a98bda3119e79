"""What happens every so many batches or updates: records, evaluations, checkpoints."""

import math
from typing import Any

import numpy as np

from . import checkpoints, console
from .errors import RunError


def due(every: int, before: int, now: int) -> bool:
    """Whether an action of every so many steps falls due between two counts (0: never)."""
    return every > 0 and now // every > before // every


def after_update(trainer: Any, before: tuple[int, int], records: list[dict[str, Any]]) -> None:
    """Log, evaluate and save whatever falls due between the counters `before` and now.

    Raises:
        RunError: five updates in a row were not finite.
    """
    a, log, (step, update) = trainer.args, trainer.log, before
    if update == 0 and trainer.loaded.train_type == "full":
        console.warn_of_kl(records[0]["kl"])
    log.pending += records
    log.watch(records)
    trainer.bar.update(trainer.update_step - update)
    trainer.bar.set_postfix_str(console.progress_text(records[-1], log))
    if due(a.logging_steps, step, trainer.step):
        log.training(trainer.step, trainer.elapsed)
        log.completions(trainer.shown, trainer.reward_calls.extras)
    if due(a.eval_every_updates, update, trainer.update_step):
        trainer.evaluate("train")
    last = trainer.update_step >= trainer.total_updates  # after it, the run ends with an evaluation
    if due(a.eval_steps, step, trainer.step) and not last:
        trainer.evaluate("test")
    trainer.mark()
    if due(a.save_steps, step, trainer.step) and trainer.saved_at < trainer.update_step:
        trainer.save_checkpoint(trainer.output_dir / f"checkpoint-{trainer.step}")
        checkpoints.prune(trainer.output_dir, a.save_total_limit, a.max_ckpt_gb)
    if trainer.bad_updates >= 5:
        raise RunError(
            "five updates in a row were not finite: lower the learning rate, or try dtype = float32"
        )


def evaluate(trainer: Any, split: str) -> float:
    """Score the fixed subset of a split, log it, return the score (NaN: no questions)."""
    train = split == "train"
    dataset = trainer.train_dataset if train else trainer.eval_dataset
    samples = trainer.args.eval_subset_size if train else trainer.args.eval_samples
    if not (dataset and samples):
        return math.nan
    result: dict[str, Any] = trainer.score(dataset, samples)
    counters = {"update": trainer.update_step, "batch_step": trainer.step, "split": split}
    trainer.log.evaluation(counters | result)
    if trainer.args.save_best and not train:
        checkpoints.keep_best(trainer)
    return float(result["em"])


def subset(rows: list[dict[str, Any]], samples: int) -> list[dict[str, Any]]:
    """The `samples` rows (0: all) that every run is evaluated on, whatever its seed."""
    order = np.random.default_rng(0).permutation(len(rows))
    return [rows[i] for i in order[: samples or len(rows)]]
