"""The sampler of a run or a command: alone, or in conversation with an environment."""

from collections.abc import Callable

import mlx.core as mx

from ..data.tokenizer import Tokenizer
from ..memory import this_machine
from ..memory.memory import RolloutSize
from ..memory.plan import HEADROOM
from ..model.loading import LoadedModel
from ..settings.run_settings import Settings
from . import merged_layers
from .sampler import Batch, Sampler
from .stop_rule import StopRule


def with_turns(plain: Sampler, a: Settings, tokenizer: Tokenizer) -> Sampler:
    """A sampler of conversations, where settings ask for them.

    Raises:
        UserError: their environment cannot be imported, or the chat template has no turns.
    """
    if not a.has_turns:
        return plain
    from . import turns  # nothing of it is loaded without

    return turns.conversations(plain, a, tokenizer)


def sampler_of_command(
    sample_batch: Callable[..., Batch], stop: StopRule, a: Settings, loaded: LoadedModel, rows: int
) -> Sampler:
    """For a command that does nothing but sample, `rows` at once.

    It puts a view in the place of the loaded model, unpacked and joined as far as memory allows.
    """
    room = HEADROOM * this_machine.budget_bytes(a) - mx.get_active_memory()
    # What is unpacked or joined goes: both are there only before anything is sampled.
    loaded.model = merged_layers.joined(merged_layers.unpacked(loaded.model, room), room)
    return with_turns(Sampler(sample_batch, stop, RolloutSize(rows)), a, loaded.tokenizer)
