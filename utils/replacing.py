"""Functions of ours in place of those that mlx-lm's models look up in their own modules."""

import sys
from collections.abc import Callable
from typing import Any


def replace(model: Any, name: str, plain: Callable, ours: Callable[[Callable], Callable]) -> None:
    """Where a module of the model's layers has `plain` as `name`, let it have ours(plain).

    For the whole process. What has been replaced is left as it is.
    """
    for place in {type(module).__module__ for module in model.modules()}:
        module = sys.modules[place]
        if getattr(module, name, None) is plain:
            setattr(module, name, ours(plain))
