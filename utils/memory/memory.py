"""How much of the work is done at once: by the plan, and by what was found out since."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

from ..base.errors import RunError
from ..base.say import say
from ..base.text import shown
from ..device import cores
from ..settings.run_settings import Settings
from .meter import Meter
from .plan import HEADROOM, Plan
from .retry import retried
from .suggestions import planned

T = TypeVar("T")
SIZES = ("rollout_batch_size", "micro_batch_tokens")
MICRO_BATCHES_A_CORE = 2  # so that uneven ones are shared out more evenly
SHARE = 0.5  # of the memory that several micro-batches at once may take
GRADIENT_ADVICE = (
    "set micro_batch_tokens lower still, or gradient_checkpointing = true, and go on with --resume"
)


class MicroBatch(Protocol):
    """What counts of the gradient's (gradient/micro_batch.py)."""

    @property
    def count(self) -> int:
        """Sequences."""

    @property
    def tokens_read(self) -> int: ...


M = TypeVar("M", bound=MicroBatch)


class Found(Protocol):
    """What a run found out about memory, which a checkpoint keeps (run/state.py)."""

    measured_factor: float
    """Measured over planned bytes of a micro-batch; 1 until the first update was measured."""
    halved: dict[str, int]
    """Sizes that memory ran out with, as they are since."""


class RolloutSize:
    """How much to sample at once, for a command that does nothing else."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    @property
    def spare_for_rollouts(self) -> float:
        """Bytes that a view of the policy which samples faster may take; a command made its own."""
        return 0.0

    def rows_at_once(self, longest: int) -> int:
        """How many sequences of up to `longest` tokens to sample together."""
        return self.rows

    def halve_rows(self, rows: int) -> str:
        """Sample fewer than `rows` from here on; says how many."""
        self.rows = half_of(rows, self.rows)
        return f"rollout_batch_size = {self.rows}"

    def sample(self, work: Callable[[], T], most: Callable[[], int]) -> T:
        """`work`, which samples at most `most()` completions at once, again in halves if need be.

        Raises:
            RunError: out of memory again.
        """
        advice = (
            "set rollout_batch_size lower still, or lower max_new_tokens, and go on with --resume"
        )
        return retried(work, lambda: self.halve_rows(most()), advice)


def half_of(rows: int, planned: int) -> int:
    """What to sample at once after memory ran out with `rows`, which may be more than planned.

    Raises:
        RunError: it was one.
    """
    size = planned if rows > planned else rows // 2
    if not size:
        raise RunError("out of memory with one completion at once: lower max_new_tokens")
    return size


def refuse_other_than_sizes(halved: Mapping[str, object]) -> None:
    """Raise ValueError for what no run can have found out."""
    known = halved.keys() <= {*SIZES}
    if not known or any(type(size) is not int or size < 1 for size in halved.values()):
        raise ValueError(f"halved = {shown(halved)}")


class Memory(RolloutSize):
    """The sizes in force, the retries, and the measuring of one run.

    `note` gets a line for the log, and for whoever goes on from a checkpoint, each time that a
    size is halved.
    """

    def __init__(self, plan: Plan, found: Found, note: Callable[[str], None], meter: Meter) -> None:
        self.plan, self.found, self.note, self.meter = plan, found, note, meter

    @property
    def spare_for_rollouts(self) -> float:
        return self.plan.spare_for_rollouts

    def rows_at_once(self, longest: int) -> int:
        return self.plan.rows_at_once(longest)

    def halve_rows(self, rows: int) -> str:
        return self.resize(rollout_batch_size=half_of(rows, self.plan.rollout_batch_size))

    def micro_batches_at_once(self, args: Settings, update: int) -> int:
        """How many micro-batches of an update to compute together: several on a CPU with cores to
        spare, but one in the first rollout, from which the plan learns what one takes.

        Several are not at their peaks at the same time: on 2 cores, updates took 0.88 to 1.33 times
        what is planned for one (tests/memory/test_plan.py, benchmarks/plan_accuracy.py), as they do
        one by one.
        """
        if update < args.num_iterations or not cores.are_used(args):
            return 1
        plan = self.plan
        constant = plan.resident + plan.summed_gradients
        each = plan.gradients + plan.gradient_peak - constant
        fitting = int((SHARE * plan.budget_bytes - constant) // each)
        return max(1, min(MICRO_BATCHES_A_CORE * cores.cores(), fitting))

    def score(self, cut: Callable[[], list[M]], work: Callable[[list[M]], T]) -> T:
        """`work` on the micro-batches of `cut`, which are cut up smaller if need be.

        Raises:
            RunError: out of memory again.
        """
        batches: list[M] = []

        def again() -> T:
            batches[:] = cut()
            return work(batches)

        return retried(again, lambda: self.halve_micro_batches(batches), GRADIENT_ADVICE)

    def update(
        self,
        work: Callable[[], T],
        batches: list[M],
        cut: Callable[[], list[M]],
        begun: Callable[[], bool],
    ) -> T:
        """`work`, which takes the gradient of `batches`; they become those of `cut` if need be.

        Only before the first step on a rollout, so not once it has `begun`: later ones have anchors
        that belong to the cut.

        Raises:
            RunError: out of memory again, or after the first step.
        """

        def halve() -> str:
            if begun():
                raise RunError(
                    f"out of memory after the first step of a rollout: {GRADIENT_ADVICE}"
                )
            done = self.halve_micro_batches(batches)
            batches[:] = cut()
            return done

        return retried(work, halve, GRADIENT_ADVICE)

    def halve_micro_batches(self, batches: Sequence[MicroBatch]) -> str:
        if batches and all(batch.count < 2 for batch in batches):
            ways = self.advice() or "lower max_new_tokens"
            raise RunError(
                f"out of memory with one sequence at once: set {ways}, and go on with --resume"
            )
        largest = max(
            (batch.tokens_read for batch in batches), default=self.plan.micro_batch_tokens
        )
        return self.resize(micro_batch_tokens=max(1, largest // 2))

    def resize(self, **sizes: int) -> str:
        """Change sizes for good, also of a run that goes on from a checkpoint; says which."""
        self.found.halved |= sizes
        halved = tuple(sorted({*self.plan.halved, *sizes}))
        self.plan = dataclasses.replace(self.plan, **sizes, halved=halved)  # type: ignore[arg-type]
        text = ", ".join(f"{name} = {size}" for name, size in sizes.items())
        self.note(f"out of memory, then {text}")
        return text

    def advice(self) -> str:
        """What to set after the gradient ran out of memory, from the mildest on."""
        plan = self.plan
        # Planned again for three quarters of it: the plan was too low, or the rest of the machine
        # needs more than it leaves.
        budget = int(0.75 * plan.needed / HEADROOM)
        smaller = dataclasses.replace(plan.demand, budget_bytes=min(budget, plan.budget_bytes))
        return " or ".join(planned(plan.shape, **vars(smaller)).suggestions)

    # What the first update shows.

    def recalibrate(self, batches: Sequence[MicroBatch]) -> None:
        """Plan again with what the first update took, and say so where that changes anything.

        Micro-batches become smaller when such as these, at the planned size, would not fit the
        machine; and larger when the plan had cut the update into more than fit.
        """
        plan = self.plan
        used = max((batch.tokens_read for batch in batches), default=0)
        if not used or plan.demand.micro_batch_tokens:
            return
        base = plan.resident + plan.summed_gradients
        # Completions may have been shorter than they can be.
        more = max(1.0, plan.micro_batch_tokens / used)
        factor = (self.meter.peak() - base) / (plan.gradient_peak - base) * more
        needed = base + factor * (plan.gradient_needed - base)
        tight = needed > HEADROOM * plan.budget_bytes
        safe = len(batches) > 1 and used > 0.8 * plan.micro_batch_tokens and factor < 0.9
        if tight or safe:
            self.found.measured_factor = round(min(max(factor, 0.5), 5.0), 2)
            self.apply_factor()

    def apply_factor(self) -> None:
        """Plan with the measured factor."""
        old, factor = self.plan, self.found.measured_factor
        wanted = dataclasses.replace(old.demand, measured_factor=factor)
        new = planned(old.shape, **vars(wanted))
        # Sizes that ran out of memory and were halved stay so.
        kept = {name: min(getattr(old, name), getattr(new, name)) for name in old.halved}
        new = dataclasses.replace(new, **kept, halved=old.halved)
        if new.micro_batch_tokens != old.micro_batch_tokens:
            self.plan, self.found.halved = new, kept
            say(
                f"plan      the first update took {factor:.2f} times what was planned "
                f"for its micro-batches: {new.micro_batch_tokens:,} tokens each from here on, not "
                f"{old.micro_batch_tokens:,}"
            )

    def go_on(self, before: Mapping[str, object], now: Mapping[str, object]) -> None:
        """After a checkpoint was read into `found`: plan with what the run had found out, but for
        sizes that its settings `before` had other values for than those of `now`.

        Raises:
            ValueError: they are no sizes.
        """
        sizes, self.found.halved = self.found.halved, {}
        refuse_other_than_sizes(sizes)
        if self.found.measured_factor != 1:
            self.apply_factor()
        still = [name for name in sorted(sizes) if before.get(name, 0) == now[name]]
        if still:
            kept = {name: min(sizes[name], getattr(self.plan, name)) for name in still}
            self.found.halved = kept
            self.plan = dataclasses.replace(self.plan, **kept, halved=tuple(still))
            text = ", ".join(f"{name} = {size}" for name, size in kept.items())
            say(f"plan      {text}, since memory ran out with more")
