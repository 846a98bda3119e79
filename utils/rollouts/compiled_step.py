"""Decode steps on CUDA, compiled once for every position of the cache.

A step of a model of 28 layers is some 700 operations, and building them in Python keeps the host
about as long as the GPU needs for 64 rows. A compiled step is built once and serves until rows
leave or the cache grows: it takes all of the cache, its free room too, and the position of the next
token, on which shapes depend in a plain step, is an array.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from ..base.say import say
from ..device import fast, runtime
from . import lean_step
from .caches import Cache, RolloutCache, keep_rows

ALIKE = 0.1  # difference of the logits over their spread, both as norms: rounding gives 0.01
_usable: dict[str, str] = {}  # the way to compile it, if there is one, by model and its sizes

Step = Callable[[mx.array], mx.array]
"""The next (B, 1) tokens of a batch -> their (B, 1, V) logits."""
Stored = list[tuple[mx.array, mx.array]]
"""Keys and values of each layer."""


def forward(model: nn.Module, cache: Cache) -> Step:
    """The model on the next tokens of the rows in `cache`, which keeps them."""
    own = isinstance(cache[0], RolloutCache) and cache[0].keys.size > 0
    if not own or runtime.platform_name() != "cuda" or fast.part("cuda") is None:
        return partial(model, cache=cache)
    ways = {"lean": lean_step.of(model), "its own": partial(_own, model)}
    kind = f"{type(model)} {getattr(model, 'args', '')} {ways['lean'] is None}"
    if kind not in _usable:
        _usable[kind] = _way_that_agrees(ways, model, cache)
    step = ways.get(_usable[kind])
    return partial(model, cache=cache) if step is None else CompiledStep(step, cache)


def _own(model: nn.Module, tokens: mx.array, cache: list[RolloutCache]) -> mx.array:
    return cast(mx.array, model(tokens, cache=cache))


def _way_that_agrees(
    ways: dict[str, lean_step.Step | None], model: nn.Module, cache: list[RolloutCache]
) -> str:
    """The first way whose steps are those of the model, "" for none; what is left out is said."""
    kind = type(model).__module__.rpartition(".")[2]
    for name, step in ways.items():
        problem = "" if step is None else _disagreement(step, model, cache)
        if step is not None and not problem:
            return name
        if name == "lean" and problem:
            say(f"rollouts  lean steps of {kind} left out, and slower for it: {problem}")
    say(f"rollouts  steps of {kind} are not compiled, and slower for it: {problem}")
    return ""


def part_to_leave(forward: Step) -> float:
    """The part of a batch that has to have ended before rows leave it.

    Caches are copied then, and steps that are compiled are compiled anew.
    """
    return 1 / 2 if isinstance(forward, CompiledStep) else 1 / 8


def _disagreement(step: lean_step.Step, model: nn.Module, cache: list[RolloutCache]) -> str:
    """Why compiled steps are not the plain ones, for the shortest and the longest prompt, if so.

    They are not where a model needs the position as a number, or has an attention of its own.
    """
    cache = copy.deepcopy(cache)
    begins = cache[0].rows.begins
    keep_rows(cache, [begins.index(max(begins)), begins.index(min(begins))])
    cache[0].rows.limit += 1  # a batch may be for one step, and two are compared
    plain = _two_steps(partial(model, cache=copy.deepcopy(cache)), cache)
    for layer in cache:  # what is not to be seen shall be noticed
        layer.make_room(layer.keys, layer.values)
        layer.values[:, :, layer.end :] = 1000
    try:
        difference = _two_steps(CompiledStep(step, cache), cache) - plain
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        return str(error) or repr(error)
    apart, spread = _norm(difference), _norm(plain - plain.mean())
    alike = apart <= ALIKE * spread  # both 0 for a head that is not trained yet
    return "" if alike else f"the logits differ by {apart:.2g}, and spread by {spread:.2g}"


def _two_steps(forward: Step, cache: list[RolloutCache]) -> mx.array:
    """The second sees what the first has stored."""
    count = len(cache[0].rows.begins)
    # All different: attention to tokens that are alike is the same, whichever it is to.
    tokens = mx.arange(2 * count).reshape(2, count, 1)
    logits = []
    for token in tokens:
        logits.append(forward(token).astype(mx.float32))
        mx.eval(logits)  # the next tokens are not made from these logits: nothing else would wait
    return mx.concatenate(logits)


def _norm(x: mx.array) -> float:
    return cast(float, (x * x).sum().item()) ** 0.5


class CompiledStep:
    """(B, 1) tokens -> (B, 1, V) logits, with a token more in the cache.

    All attention is `attention.to_rows`, which stores keys and values without telling MLX: tokens
    must be made from the logits of the step before, or nothing would wait for it.
    """

    def __init__(self, step: lean_step.Step, cache: list[RolloutCache]) -> None:
        self.cache = cache
        # Of functions, not of methods: in a circle of references, the cache would stay in memory
        # until Python looks for circles.
        self.traced = partial(_at_position, step, cache)
        self.compiled, self.longest = mx.compile(self.traced), cache[0].rows.longest
        self.position = mx.zeros((0,), mx.int32)  # (B,) of the next tokens, alike
        self.stands_for = -1, 0  # the position in it, and B

    def __call__(self, tokens: mx.array) -> mx.array:
        for layer in self.cache:
            layer.make_room(layer.keys, layer.values)
        rows, end, count = self.cache[0].rows, self.cache[0].end, len(tokens)
        padding = rows.padding
        if rows.longest > self.longest:  # a sliding window may not hold all of a row any more
            self.compiled, self.longest = mx.compile(self.traced), rows.longest
        if self.stands_for != (end, count):  # at first, and when rows have left
            # Made by a sum, or it would be in the host's memory, as all that Python gives to MLX.
            self.position = mx.zeros((count,), mx.int32) + end
        try:
            result = self.compiled(tokens, self.position, padding, _stored(self.cache))
        finally:
            rows.be_at(None, padding)
        logits, self.position, stored = result
        _store(self.cache, stored)  # when it was traced, placeholders came in their place
        for layer in self.cache:
            layer.end += 1
        self.stands_for = end + 1, count
        return logits


def _at_position(
    step: lean_step.Step,
    cache: list[RolloutCache],
    tokens: mx.array,
    position: mx.array,
    padding: mx.array,
    stored: Stored,
) -> tuple[mx.array, mx.array, Stored]:
    cache[0].rows.be_at(position, padding)
    _store(cache, stored)
    cuda = fast.part("cuda")
    assert cuda is not None, "`forward` would have taken plain steps"
    with cuda.noting_rotations(cache[0].rows):
        logits = step(tokens, cache)
    return logits, position + 1, _stored(cache)


def _stored(cache: list[RolloutCache]) -> Stored:
    return [(layer.keys, layer.values) for layer in cache]


def _store(cache: list[RolloutCache], stored: Stored) -> None:
    for layer, (keys, values) in zip(cache, stored, strict=True):
        layer.keys, layer.values = keys, values
