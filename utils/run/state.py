"""What a run has beside the algorithm: its log and bar, evaluations, checkpoints, its position."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from ..base.errors import RunError, UserError
from ..rewards import for_trainer
from ..rewards.calls import RewardCalls
from . import checkpoints, ending, folders, progress
from .log import RunLog


def due(every: int, before: int, now: int) -> bool:
    """Whether an action of every so many steps falls due between two counts (0: never)."""
    return every > 0 and now // every > before // every


def subset(rows: list[dict[str, Any]], samples: int) -> list[dict[str, Any]]:
    """The `samples` rows (0: all) that every run is evaluated on, whatever its seed."""
    order = np.random.default_rng(0).permutation(len(rows))
    return [rows[i] for i in order[: samples or len(rows)]]


class RunState:
    """The base of MLXGRPOTrainer. `step` counts batches of prompts, `update_step` updates."""

    loaded: Any
    reward_funcs: dict[str, Any]
    train_dataset: list[dict[str, Any]]
    eval_dataset: list[dict[str, Any]]
    total_updates: int

    def __init__(self, args: Any, command: str) -> None:
        self.args, self.command = args, command
        self.output_dir = Path(args.output_dir)
        self.log = RunLog(args)
        self.reward_calls = RewardCalls(args.reward_timeout)
        self.bar = progress.no_bar()
        self.interrupted = False
        self.step = self.update_step = self.rollout = 0
        self.elapsed = 0.0  # seconds
        self.bad_updates = 0  # in a row
        self.measured_factor = 1.0  # of memory, from the first update
        self.shown: list[tuple] = []  # (row, completion, reward), for the terminal
        self.saved_at = 0
        self.position: dict[str, Any] = {}
        self.unreported: tuple[tuple[int, int], list[dict]] | None = None

    def pulse(self, phase: str) -> None:
        """Between blocks of work: show that it goes on, and stop if a signal asked for it."""
        self.bar.set_description_str(phase)
        if self.interrupted:
            raise ending.Interrupted

    def mark(self, unreported: tuple[tuple[int, int], list[dict]] | None = None) -> None:
        """Note the position between two updates: a run that is stopped goes on from here."""
        self.unreported = unreported
        self.position = checkpoints.position(self)

    def after_update(self, before: tuple[int, int], records: list[dict[str, Any]]) -> None:
        """Log, evaluate and save whatever falls due between the counters `before` and now.

        Raises:
            RunError: five updates in a row were not finite.
        """
        a, log, (step, update) = self.args, self.log, before
        if update == 0 and self.loaded.train_type == "full":
            progress.warn_of_kl(records[0]["kl"])
        log.pending += records
        log.watch(records)
        self.bar.update(self.update_step - update)
        self.bar.set_postfix_str(progress.progress_text(records[-1], log))
        if due(a.logging_steps, step, self.step):
            log.training(self.step, self.elapsed)
            log.completions(self.shown, self.reward_calls.extras)
        if due(a.eval_every_updates, update, self.update_step):
            self.evaluate("train")
        last = self.update_step >= self.total_updates  # after it, the run ends with an evaluation
        if due(a.eval_steps, step, self.step) and not last:
            self.evaluate("test")
        self.mark()
        if due(a.save_steps, step, self.step) and self.saved_at < self.update_step:
            self.save_checkpoint(self.output_dir / f"checkpoint-{self.step}")
            folders.prune(self.output_dir, a.save_total_limit, a.max_ckpt_gb)
        if self.bad_updates >= 5:
            raise RunError(
                "five updates in a row were not finite: lower the learning rate, or try "
                "dtype = float32"
            )

    def save_checkpoint(self, path: Path) -> None:
        """A complete model folder (or adapters in mlx-lm's format) with the trainer's state."""
        self.mark()
        checkpoints.save(Path(path), self)
        self.saved_at = self.update_step

    def evaluate(self, split: str = "test") -> float:
        """Score the fixed subset of a split, log it, return the score (NaN: no questions)."""
        train = split == "train"
        dataset = self.train_dataset if train else self.eval_dataset
        samples = self.args.eval_subset_size if train else self.args.eval_samples
        if not (dataset and samples):
            return math.nan
        result = self.score(dataset, samples)
        counters = {"update": self.update_step, "batch_step": self.step, "split": split}
        self.log.evaluation(counters | result)
        if self.args.save_best and not train:
            checkpoints.keep_best(self)
        return float(result["em"])

    def evaluate_em(self, dataset: list[dict], samples: int = 0, **how: Any) -> float:
        """Mean exact match (or `eval_metric`) over a fixed subset of `samples` rows (0: all).

        dataset: rows of `load_questions`, or of the trainer's own data sets.
        Raises UserError if it holds no question whose prompt fits.
        """
        if not dataset:
            raise UserError("there is nothing to evaluate: the data set holds no questions")
        if "prompt_ids" not in dataset[0]:
            dataset = self.encode(dataset, "evaluation")
        return float(self.score(dataset, samples, **how)["em"])

    def encode(self, rows: list[dict[str, Any]], what: str) -> list[dict[str, Any]]:
        """Rows with `prompt_ids`, without those whose prompts are too long."""
        raise NotImplementedError

    def score(self, dataset: list[dict], samples: int = 0, **how: Any) -> dict[str, Any]:
        """Score the answers of the policy (or of another model)."""
        rows, responses = self.answers(dataset, samples, **how)
        name = self.args.eval_metric
        if name == "em":
            scores = [self.is_right(r, row) for r, row in zip(responses, rows, strict=True)]
        else:
            functions = {name: self.reward_funcs[name]}
            scores = for_trainer.call(self, functions, rows, responses)[name].tolist()
        cut = float(np.mean([r.finish_reason == "length" for r in responses]))
        return {"em": float(np.nanmean(scores)), "em_subset": len(rows), "truncation_rate": cut}

    def answers(
        self, dataset: list[dict], samples: int = 0, temperature: float = 0.0, model: Any = None
    ) -> tuple[list[dict[str, Any]], list[Any]]:
        """A fixed subset of `samples` rows (0: all), and one completion of each."""
        raise NotImplementedError

    def is_right(self, response: Any, row: dict[str, Any]) -> bool:
        """Whether a completion answers the row's question."""
        raise NotImplementedError
