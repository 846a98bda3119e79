"""Several ranks train one policy: the same from the start, and the same ever after."""

import hashlib

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from ..base.errors import UserError
from ..device import ranks
from ..settings import reading
from . import completions
from .run import Trainer
from .state import seed_random_states

OWN = {"model_name", "dataset", "output_dir", "resume", "chat_template", "adapter_path", "quiet"}
"""Settings that may differ, since machines have their files where they like."""


def refuse_others(trainer: Trainer) -> None:
    """Raises UserError where a rank has other data, another model or other settings than rank 0, or
    where the settings are for one process alone."""
    if ranks.here().size == 1:
        return
    if trainer.args.has_turns:
        raise UserError(
            "environment: conversations are not dealt out to several ranks yet; train with one"
        )
    own = {n: v for n, v in reading.recorded(trainer.args).items() if n not in OWN}
    mine = {"training data": trainer.data_sha256, "a model": trainer.loaded.fingerprint, **own}
    first, *others = ranks.here().all_say(mine)
    for rank, other in enumerate(others, 1):
        for name, value in first.items():
            if other.get(name) != value:
                raise UserError(
                    f"rank {rank} has {name} that differ from rank 0's ({other.get(name)!r}, "
                    f"{value!r}): copy the files of one machine to all"
                )


def take_weights(trainer: Trainer) -> None:
    """Rank 0's, which may come from a checkpoint."""
    if ranks.here().size == 1:
        return
    weights = dict(tree_flatten(trainer.model.trainable_parameters()))
    trainer.model.update(tree_unflatten(list(ranks.here().of_first(weights).items())))


def compare_weights(trainer: Trainer) -> None:
    """Say once when ranks no longer have the same weights to the bit."""
    run = trainer.run
    if ranks.here().size == 1:
        return
    first, *others = ranks.here().all_say(checksum(trainer))
    apart = [rank for rank, other in enumerate(others, 1) if other != first]
    text = "do not have rank 0's weights to the bit: their machines round otherwise"
    if apart and not run.apart:
        run.apart = True
        run.log.note(f"ranks {', '.join(map(str, apart))} {text}")


def checksum(trainer: Trainer) -> str:
    found = hashlib.sha256()
    weights: dict[str, mx.array] = dict(tree_flatten(trainer.model.trainable_parameters()))
    for name, weight in weights.items():
        found.update(name.encode() + np.array(weight.view(mx.uint8)).tobytes())
    return found.hexdigest()


def keep_nothing(trainer: Trainer, *, resumed: bool) -> None:
    """A rank other than 0 writes and shows nothing."""
    vars(trainer.args).update(quiet=True, log_jsonl=False)
    trainer.run.completions = completions.NoStore()
    if not resumed:
        seed_random_states(trainer.args.seed)
