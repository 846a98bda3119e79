"""What a reward function says of itself, for people who look at what it gave."""

import functools
import inspect
from collections.abc import Mapping

from .calls import Reward
from .workers import InWorkers

LONGEST = 300  # characters


def about(rewards: Mapping[str, Reward]) -> dict[str, str]:
    """The first paragraph of the docstring of each that has one."""
    found = {name: first_paragraph(docstring(function)) for name, function in rewards.items()}
    return {name: text for name, text in found.items() if text}


def docstring(function: object) -> str:
    """Of a function, whatever parameters or processes were put around it, or of a class."""
    while isinstance(function, functools.partial | InWorkers):
        function = function.func if isinstance(function, functools.partial) else function.takes
    if not (inspect.isroutine(function) or inspect.isclass(function)):
        function = type(function)
    text = function.__doc__
    return inspect.cleandoc(text) if isinstance(text, str) else ""


def first_paragraph(text: str) -> str:
    paragraph = " ".join(text.partition("\n\n")[0].split())
    return paragraph if len(paragraph) <= LONGEST else f"{paragraph[:LONGEST]}..."
