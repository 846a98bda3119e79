"""The progress bar and the figures in it."""

from tqdm import tqdm

from ..base.say import say
from .log import RunLog, figure
from .state import Record

# What matters most stands first, the reward in the postfix within 40 columns: a terminal cuts the
# end off. Without tqdm's rate and percentage, which the time left and the count say as well.
BAR = "{n_fmt}/{total_fmt}|{bar}| {remaining} left{postfix}, {desc}, {elapsed}"


def progress_bar(total: int, done: int) -> tqdm:
    """Of so many updates."""
    return tqdm(
        desc="starting",
        total=total,
        initial=done,
        bar_format=BAR,
        disable=None,  # silent when the output is not a terminal
        leave=False,  # the lines that were printed stay
        dynamic_ncols=True,
        smoothing=0.1,
    )


def no_bar() -> tqdm:
    """A bar that shows nothing, for a trainer that is used as a library."""
    return tqdm(disable=True)


def progress_text(record: Record, log: RunLog) -> str:
    """The figures that a person watches, the most important first."""
    parts = [f"reward {figure(record['reward_mean'], '.2f')}"]
    parts += [log.score_text(log.history[-1]["em"])] if log.history else []
    parts += [f"length {record['completion_length']:.0f}"]
    parts += [] if record["kl"] is None else [f"kl {record['kl']:.3f}"]
    return ", ".join(parts)


def warn_of_kl(kl: float | None, train_type: str) -> None:
    """KL of the first update: the policy has not moved, so this is how far off the 4-bit copy is
    that full fine-tuning has as its reference."""
    if train_type == "full" and kl is not None and kl > 0.01:
        say(
            f"kl        {kl:.3f} before anything was learnt: the error of the 4-bit reference, to "
            "which kl_coeff pulls the policy; quantize_for_rollouts = false avoids it"
        )
