"""What would let a run fit into the memory there is, found by planning again with each change."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

from ..base.errors import readable
from ..model.shape import ModelShape
from .plan import HEADROOM, QUANTIZED_BITS, Demand, Plan, build, make_plan


class Case(NamedTuple):
    """A run that could be planned instead, and what the user would have to write for it."""

    text: str
    shape: ModelShape
    demand: Demand


Remedy = Callable[[Case], Iterator[Case]]
"""Ways to change a run, the mildest first; none when it does not apply."""


def _changed(case: Case, text: str, **changes: Any) -> Case:
    return Case(text, case.shape, replace(case.demand, **changes))


def _halvings(case: Case, key: str, field: str, least: int) -> Iterator[Case]:
    value = getattr(case.demand, field) // 2
    while value >= least:
        yield _changed(case, f"{key} = {value}", **{field: value})
        value //= 2


def _with_8_bit_moments(case: Case) -> Iterator[Case]:
    if case.demand.moment_bytes > 3:
        yield _changed(case, "moment_bits = 8", moment_bytes=2.03)


def _without_masters(case: Case) -> Iterator[Case]:
    s = case.demand
    if s.train_type == "full" and s.train_dtype_bytes == 2 and s.master_bytes == 2:
        yield _changed(case, "master_weights = false", master_bytes=0)


def _as_lora(case: Case) -> Iterator[Case]:
    if case.demand.train_type == "full":
        yield _changed(case, 'train_type = "lora"', train_type="lora", trainable_parameters=None)


def _as_four_bit(case: Case) -> Iterator[Case]:
    """A converted base; it is trained through LoRA, so this changes the train type as well."""
    if case.shape.quantized_bits is None:
        parameters = case.shape.parameters
        packed = int(parameters * QUANTIZED_BITS / 8)
        shape = replace(case.shape, quantized_bits=4, bytes_on_disk=packed)
        lora = next(_as_lora(case), case)
        text = "a 4-bit model (uv run python utils/convert_model.py --hf-path MODEL --quantize)"
        prefix = f"{lora.text} on " if lora is not case else ""
        yield Case(prefix + text, shape, lora.demand)


def _with_automatic_batches(case: Case) -> Iterator[Case]:
    if case.demand.rollout_batch_size or case.demand.micro_batch_tokens:
        text = "rollout_batch_size = 0 and micro_batch_tokens = 0"
        yield _changed(case, text, rollout_batch_size=0, micro_batch_tokens=0)


def _with_checkpointing(case: Case) -> Iterator[Case]:
    if not case.demand.gradient_checkpointing:
        yield _changed(case, "gradient_checkpointing = true", gradient_checkpointing=True)


def _without_reference(case: Case) -> Iterator[Case]:
    if case.demand.has_reference and case.demand.train_type == "full":
        yield _changed(case, "kl_coeff = 0", has_reference=False)


def _with_other_rollout_copy(case: Case) -> Iterator[Case]:
    """Quantizing shrinks a copy that is needed anyway, and adds one where there was none."""
    other = not case.demand.quantize_for_rollouts
    text = f"quantize_for_rollouts = {str(other).lower()}"
    yield _changed(case, text, quantize_for_rollouts=other)
    if case.demand.sync_every_updates > 1:
        yield _changed(case, "sync_every_updates = 1", sync_every_updates=1)


def _with_fewer_generations(case: Case) -> Iterator[Case]:
    yield from _halvings(case, "num_generations", "num_generations", 2)


def _with_shorter_completions(case: Case) -> Iterator[Case]:
    yield from _halvings(case, "max_new_tokens", "completion_tokens", 32)


# In the order in which they cost least: first what changes no result, last what changes the task.
_REMEDIES: tuple[Remedy, ...] = (
    _with_automatic_batches,
    _with_checkpointing,
    _with_other_rollout_copy,
    _without_reference,
    _with_8_bit_moments,
    _without_masters,
    _as_lora,
    _as_four_bit,
    _with_fewer_generations,
    _with_shorter_completions,
)


def _fits(case: Case) -> bool:
    return build(case.shape, case.demand).fits


def _apply(case: Case, remedies: Sequence[Remedy]) -> tuple[Case, list[str]]:
    """One remedy after the other until it fits, each as mild as it may be; those that save nothing
    are left."""
    texts: list[str] = []
    for remedy in remedies:
        if _fits(case):
            break
        before = build(case.shape, case.demand).needed
        smaller = [c for c in remedy(case) if build(c.shape, c.demand).needed < before]
        if smaller:
            case = next(filter(_fits, smaller), smaller[-1])
            texts.append(case.text)
    return case, texts


def _combined(start: Case) -> str:
    """A set of remedies that fits and from which none can be dropped, the costliest first."""
    case, texts = _apply(start, _REMEDIES)
    if not _fits(case):
        needed = readable(build(case.shape, case.demand).needed / HEADROOM)
        return f"a smaller model: even with {' and '.join(texts)} this one needs {needed}"
    chosen = list(_REMEDIES)
    for remedy in reversed(_REMEDIES):
        fewer = [other for other in chosen if other is not remedy]
        case, rest = _apply(start, fewer)
        # A mild remedy must not be dropped at the price of more of a costly one.
        if _fits(case) and set(rest) < set(texts):
            chosen, texts = fewer, rest
    return " and ".join(texts)


def suggestions(shape: ModelShape, demand: Demand) -> tuple[str, ...]:
    """Settings that make a run fit: each alone, or a set of them where none is enough."""
    start = Case("", shape, demand)
    single: list[str] = []
    for remedy in _REMEDIES:
        single += [case.text for case in islice(filter(_fits, remedy(start)), 1)]
    return tuple(single) or (_combined(start),)


def planned(shape: ModelShape, **demand: Any) -> Plan:
    """`make_plan`, with what would make it fit where it does not."""
    plan = make_plan(shape, **demand)
    if plan.fits:
        return plan
    return replace(plan, suggestions=suggestions(shape, plan.demand))
