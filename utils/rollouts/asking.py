"""The sampler of a run or a command: alone, or in conversation with an environment."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import mlx.core as mx

from ..base.errors import UserError
from ..data.chat_template import template_options
from ..data.tokenizer import Tokenizer
from ..memory import this_machine
from ..memory.memory import RolloutSize
from ..memory.plan import HEADROOM
from ..model.loading import LoadedModel
from ..settings.run_settings import Settings
from . import merged_layers
from .sampler import Batch, Sampler
from .stop_rule import StopRule

if TYPE_CHECKING:
    from .environments import Environments


def environments_of(a: Settings, tokenizer: Tokenizer) -> "Environments | None":
    """Of conversations, where settings ask for them; from now on prompts tell the model of tools.

    Raises:
        UserError: an environment or a tool that cannot be imported, or a template without calls.
    """
    if not a.has_turns:
        return None
    from . import environments, tool_parsers  # nothing of it is loaded without

    try:
        calls = {"parser": tool_parsers.named(tokenizer, template_options(tokenizer, a))}
    except UserError as error:  # of which only those with tools need to know
        calls = {"problem": str(error)}
    made = environments.Environments(a, calls)
    vars(a)["tool_schemas"] = tuple(made.schemas)
    return made


def with_turns(
    plain: Sampler, a: Settings, tokenizer: Tokenizer, environments: "Environments | None"
) -> Sampler:
    """A sampler of conversations, where there are environments for them.

    Raises:
        UserError: the chat template has no turns.
    """
    if environments is None:
        return plain
    from . import turns  # nothing of it is loaded without

    return turns.conversations(plain, a, tokenizer, environments)


def sampler_of_command(
    sample_batch: Callable[..., Batch], stop: StopRule, a: Settings, loaded: LoadedModel, rows: int
) -> Sampler:
    """For a command that does nothing but sample, `rows` at once.

    It puts a view in the place of the loaded model, unpacked and joined as far as memory allows.
    """
    room = HEADROOM * this_machine.budget_bytes(a) - mx.get_active_memory()
    # What is unpacked or joined goes: both are there only before anything is sampled.
    loaded.model = merged_layers.joined(merged_layers.unpacked(loaded.model, room), room)
    environments = environments_of(a, loaded.tokenizer)
    plain = Sampler(sample_batch, stop, RolloutSize(rows))
    return with_turns(plain, a, loaded.tokenizer, environments)
