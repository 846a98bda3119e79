"""`--dry-run`: what the run would take, and which settings it would have."""

import argparse
import json
import math

from ..base.say import say
from ..base.text import counted
from ..data import files as datafiles
from ..device import runtime
from ..memory import this_machine
from ..model import loading
from ..rewards import by_name
from ..rewards.importing import Rewards
from ..settings import idle, reading
from ..settings.run_settings import Settings


def of(config: Settings, builtin: Rewards, given: argparse.Namespace) -> int:
    """Print the plan, from config.json and safetensors headers alone, and then the settings that
    differ from the defaults (all of them with `--all`). Reward functions are looked up."""
    loading.check_model(config.model_name)
    by_name.load_rewards(config, builtin)
    shape = loading.read_shape(loading.find_model(config.model_name) or config.model_name)
    train_type = loading.resolve_train_type(config, shape.quantized_bits is not None)
    completion = min(config.max_new_tokens, config.max_completion_length)
    plan = this_machine.plan_memory(config, shape, train_type, config.max_prompt_length, completion)
    say(
        f"train_type resolves to {train_type}. An upper bound: prompts count as "
        f"max_prompt_length = {config.max_prompt_length} tokens."
    )
    for line in idle.lines(config, train_type, runtime.platform_name()):
        say(line)
    say(plan.table())
    say(planned_updates(config))
    say_settings(config, given.all)
    return 0


def say_settings(config: Settings, everything: bool) -> None:
    """As they would stand in a TOML file."""
    values, defaults = reading.recorded(config), reading.recorded(type(config)())
    shown = {n: v for n, v in values.items() if everything or v != defaults[n]}
    say("\nAll settings:" if everything else "\nSettings that differ from the defaults:")
    for name, value in shown.items():
        say(f"{name} = {json.dumps(value, ensure_ascii=False)}")
    if not everything:
        say("The others have their defaults: --dry-run --all shows them.")


def planned_updates(config: Settings) -> str:
    """The length of the run, from the number of questions if that can be known offline."""
    questions = config.max_train_samples
    sources = datafiles.sources(config, "train")
    if all(datafiles.local_path(source.dataset) for source in sources):
        rows = sum(len(datafiles.read_dataset(source, "train")) for source in sources)
        questions = min(rows, questions) if questions else rows
    if not questions:
        names = ", ".join(source.dataset for source in sources)
        return f"updates: known once {names} is loaded (max_train_samples = 0: all of it)"
    prompts = config.batch_size * config.gradient_accumulation_steps
    updates = config.num_epochs * math.ceil(questions / prompts) * config.num_iterations
    updates = min(updates, config.max_updates or updates)
    rollouts = math.ceil(updates / config.num_iterations)
    asked = min(rollouts * prompts, config.num_epochs * questions)
    if config.dynamic_sampling:  # in every round, all of them could be replaced
        asked = rollouts * min(prompts * (1 + config.dynamic_sampling), questions)
    completions = asked * config.num_generations
    return (
        f"updates: {updates:,} on at most {counted(questions, 'question')}, "
        f"at most {completions * config.max_new_tokens:,} sampled tokens"
    )
