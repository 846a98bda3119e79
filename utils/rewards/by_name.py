"""Find reward functions by name, give them their parameters, and call them for the trainer."""

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any

from ..base.errors import UserError
from .calls import described, waits
from .importing import Rewards, load_reward

# Parameters of built-in rewards that settings fill: the first unless reward_kwargs does.
FROM_SETTINGS = {"max_len": "max_new_tokens"}
ONLY_SETTINGS = {
    "urls": "remote_rm_url",
    "timeout": "reward_timeout",
    "reward_model": "reward_model",
    "trust_remote_code": "trust_remote_code",
}


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
    from .workers import InWorkers, new_pool

    own = [spec for spec in rewards if spec not in builtin and not waits(rewards[spec])]
    if not own:
        raise UserError("reward_workers has no effect: reward_funcs names no own function to call")
    pool, kwargs, limit = (
        new_pool(config.reward_workers),
        config.reward_kwargs,
        config.reward_timeout,
    )
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
