"""Find reward functions by name, give them their parameters, and call them for the trainer."""

import difflib
import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from . import sources
from .errors import UserError
from .reward_calls import TrainerState, described, takes_parts, waits
from .text import shown

# Parameters of built-in rewards that settings fill: the first unless reward_kwargs does.
FROM_SETTINGS = {"max_len": "max_new_tokens"}
ONLY_SETTINGS = {
    "urls": "remote_rm_url",
    "timeout": "reward_timeout",
    "reward_model": "reward_model",
    "trust_remote_code": "trust_remote_code",
}
Rewards = dict[str, Callable[..., Any]]
CODE: dict[str, str] = {}
"""SHA-256 of each file that own functions are from, as it was when it was imported."""


def load_rewards(config: Any, builtin: Rewards) -> Rewards:
    """The functions of `reward_funcs` by the names given there, with their `reward_kwargs`.

    Raises:
        UserError: no such function, or a parameter that it lacks or can't take.
    """
    rewards = {
        spec: with_parameters(spec, load_reward(spec, builtin), config, spec in builtin)
        for spec in config.reward_funcs
    }
    if config.reward_workers:
        rewards |= in_workers(config, rewards, builtin)
    set_on_purpose = config.reward_timeout != type(config).reward_timeout
    if set_on_purpose and not any(map(waits, rewards.values())):
        raise UserError("reward_timeout has no effect: none of reward_funcs waits for others")
    return rewards


def in_workers(config: Any, rewards: Rewards, builtin: Rewards) -> Rewards:
    """Own functions that would keep this process waiting, as calls to other processes."""
    from .reward_workers import InWorkers, Pool

    own = [spec for spec in rewards if spec not in builtin and not waits(rewards[spec])]
    if not own:
        raise UserError("reward_workers has no effect: reward_funcs names no own function to call")
    pool, kwargs, limit = Pool(config.reward_workers), config.reward_kwargs, config.reward_timeout
    return {s: InWorkers(s, rewards[s], kwargs.get(s, {}), pool, limit) for s in own}


def with_parameters(
    spec: str, function: Callable[..., Any], config: Any, is_builtin: bool
) -> Callable[..., Any]:
    """The function with parameters bound; a class is made an instance, once."""
    parameters = inspect.signature(function).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    names = {parameter.name for parameter in parameters}
    given = config.reward_kwargs.get(spec, {})
    settable = dict(defaults)
    if inspect.isclass(function):  # what it needs may come from reward_kwargs alone
        settable = {p.name: None if p.default is p.empty else p.default for p in parameters}
    for name in ONLY_SETTINGS if is_builtin else ():
        settable.pop(name, None)
    for name, value in given.items():
        check_parameter(spec, name, value, settable)
    if is_builtin:  # its defaults too, or a column of that name would be taken for the parameter
        settings = FROM_SETTINGS | ONLY_SETTINGS
        named = {n: getattr(config, s) for n, s in settings.items() if n in names}
        given = {**defaults, **named, **given}
    try:
        if inspect.isclass(function):
            made: Any = function(**given)
            return made
        bound = functools.partial(function, **given) if given else function
        if is_builtin:
            bound(completions=[], completion_ids=[], answer=[])  # refuses impossible values
    except UserError as error:
        raise UserError(f"reward {spec}: {error}") from None
    except Exception as error:  # also of someone else's class
        reason = str(error) if is_builtin else described(error)
        raise UserError(f"reward {spec}: {reason}") from error
    return bound


def check_parameter(spec: str, name: str, value: Any, defaults: dict[str, Any]) -> None:
    if name not in defaults:
        near = difflib.get_close_matches(name, defaults, n=1)
        known = f"it has {', '.join(defaults)}" if defaults else "it has none with a default"
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"reward_kwargs: reward {spec} has no parameter {name!r} ({known}){hint}")
    default = defaults[name]
    kinds: Any = (int, float) if isinstance(default, float) else type(default)
    if default is not None and (
        not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default, bool)
    ):
        raise UserError(
            f"reward_kwargs: {name} of {spec} must be like its default {default!r}, not {value!r}"
        )


def load_reward(spec: str, builtin: Rewards) -> Callable[..., Any]:
    """A built-in name, `module:function` or `file.py:function`.

    Raises:
        UserError: no such name, module, file or function.
    """
    if spec in builtin:
        return builtin[spec]
    if len(spec) > 1000:
        raise UserError(f"reward {shown(spec)} is too long for the name of a function")
    source, _, name = spec.rpartition(":")
    if not (source and name):
        near = difflib.get_close_matches(spec, builtin, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(
            f"reward {spec!r}: not built in ({', '.join(builtin)}); own functions are written "
            f"module:function or file.py:function{hint}"
        )
    module = import_reward_module(spec, source)
    if not callable(getattr(module, name, None)):
        known = [n for n, f in vars(module).items() if inspect.isfunction(f)]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"reward {spec!r}: {source} has no function {name!r}{hint}")
    return getattr(module, name)


def import_reward_module(spec: str, source: str) -> Any:
    if source.endswith(".py") and not Path(source).is_file():
        raise UserError(f"reward {spec!r}: file {source} does not exist")
    name = f"reward_file:{Path(source).resolve()}"  # a name that hides no other module
    try:
        if not source.endswith(".py"):
            module = importlib.import_module(source)
            if module.__file__:
                CODE.setdefault(source, sources.of_file(Path(module.__file__)))
            return module
        if name in sys.modules:
            return sys.modules[name]
        module_spec = importlib.util.spec_from_file_location(name, source)
        assert module_spec is not None
        assert module_spec.loader is not None
        module = importlib.util.module_from_spec(module_spec)
        sys.modules[name] = module  # before its code runs: dataclasses look there
        CODE[source] = sources.of_file(Path(source))
        module_spec.loader.exec_module(module)
    except Exception as error:  # someone else's code: whatever it raises, say which reward it was
        sys.modules.pop(name, None)
        raise UserError(f"reward {spec!r} cannot be imported: {described(error)}") from error
    return module


def code(config: Any) -> dict[str, str]:
    """What own functions of `reward_funcs` are from, with its SHA-256."""
    named = (spec.rpartition(":")[0] for spec in config.reward_funcs)
    return {source: CODE[source] for source in named if source in CODE}


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
