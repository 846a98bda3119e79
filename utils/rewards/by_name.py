"""Find reward functions by name, give them their parameters, and call them for the trainer."""

import copy
import difflib
import functools
import inspect
from typing import cast

from ..base.errors import UserError
from ..settings.run_settings import Settings
from . import foreign
from .calls import Reward, described, waits
from .importing import Rewards, load_reward
from .workers import InWorkers, new_pool

Parameters = dict[str, object]

# Parameters of built-in rewards that settings fill: the first unless reward_kwargs does.
FROM_SETTINGS = {"max_len": "max_new_tokens"}
ONLY_SETTINGS = {
    "urls": "remote_rm_url",
    "timeout": "reward_timeout",
    "reward_model": "reward_model",
    "trust_remote_code": "trust_remote_code",
}


def load_rewards(config: Settings, builtin: Rewards) -> Rewards:
    """The functions of `reward_funcs` by the names given there, with their `reward_kwargs`.

    Raises:
        UserError: no such function, or a parameter that it lacks or can't take.
    """
    rewards: Rewards = {}
    # The built-in ones first: one's own may leave the current folder, which their paths count from.
    for spec in sorted(config.reward_funcs, key=lambda spec: spec not in builtin):
        function = load_reward(spec, builtin, config.start)
        rewards[spec] = with_parameters(spec, function, config, spec in builtin)
    rewards = {spec: rewards[spec] for spec in config.reward_funcs}
    if config.reward_workers:
        rewards |= in_workers(config, rewards, builtin)
    set_on_purpose = config.reward_timeout != type(config).reward_timeout
    if set_on_purpose and all(s in builtin and not waits(f) for s, f in rewards.items()):
        raise UserError(
            "reward_timeout has no effect: reward_funcs names no own function, server or judge"
        )
    return rewards


def in_workers(config: Settings, rewards: Rewards, builtin: Rewards) -> Rewards:
    """Own functions that would keep this process waiting, as calls to other processes."""
    own = [spec for spec in rewards if spec not in builtin and not waits(rewards[spec])]
    if not own:
        raise UserError("reward_workers has no effect: reward_funcs names no own function to call")
    pool, kwargs, limit = (
        new_pool(config.reward_workers, config.started_in),
        config.reward_kwargs,
        config.reward_timeout,
    )
    return {s: InWorkers(s, rewards[s], kwargs.get(s, {}), pool, limit) for s in own}


def with_parameters(spec: str, function: Reward, config: Settings, is_builtin: bool) -> Reward:
    """The function with parameters bound; a class is made an instance, once."""
    parameters = inspect.signature(function).parameters
    given = copy.deepcopy(config.reward_kwargs.get(spec, {}))  # the function's: it may change them
    allowed = settable(function, is_builtin)
    for name, value in given.items():
        check_parameter(spec, name, value, allowed)
    if is_builtin:  # its defaults too, or a column of that name would be taken for the parameter
        settings = FROM_SETTINGS | ONLY_SETTINGS
        filled = {n: getattr(config, s) for n, s in settings.items() if n in parameters}
        given = {**defaults(function), **filled, **given}
    try:
        return bound(function, given, is_builtin)
    except UserError as error:
        raise UserError(f"reward {spec}: {error}") from None
    except Exception as error:  # also of someone else's class
        reason = str(error) if is_builtin else described(error)
        raise UserError(f"reward {spec}: {reason}") from error


def defaults(function: Reward) -> Parameters:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def settable(function: Reward, is_builtin: bool) -> Parameters:
    """What `reward_kwargs` may set, with the defaults; None where there is none."""
    found = defaults(function)
    if inspect.isclass(function):  # what it needs may come from reward_kwargs alone
        found = {name: found.get(name) for name in inspect.signature(function).parameters}
    hidden = ONLY_SETTINGS if is_builtin else {}
    return {name: default for name, default in found.items() if name not in hidden}


def bound(function: Reward, given: Parameters, is_builtin: bool) -> Reward:
    if inspect.isclass(function):
        return cast(Reward, foreign.called(functools.partial(function, **given)))
    made = functools.partial(function, **given) if given or is_builtin else function
    if is_builtin:
        vars(made)["own_timeout"] = True  # what they compute has an end, or a limit of its own
        made(completions=[], completion_ids=[], answer=[])  # refuses impossible values
    return made


def check_parameter(spec: str, name: str, value: object, known: Parameters) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        has = f"it has {', '.join(known)}" if known else "it has none with a default"
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"reward_kwargs: reward {spec} has no parameter {name!r} ({has}){hint}")
    default = known[name]
    if default is not None and not is_like(value, default):
        raise UserError(
            f"reward_kwargs: {name} of {spec} must be like its default {default!r}, not {value!r}"
        )


def is_like(value: object, default: object) -> bool:
    """Whether it is of that kind; an integer is like a float, a bool like nothing else."""
    kinds = (int, float) if isinstance(default, float) else type(default)
    return isinstance(value, kinds) and isinstance(value, bool) == isinstance(default, bool)
