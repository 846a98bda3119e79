"""The progress bar: what it shows first, and what fits."""

import types

import pytest
from tqdm import tqdm

from utils.run import progress
from utils.run.log import RunLog


def test_the_progress_bar_shows_the_metric_that_is_evaluated(tmp_path):
    """A mean reward is no share of answers: 2.3 is not 230 %."""
    record = {"reward_mean": 1.0, "completion_length": 9.0, "kl": None}
    for metric, text in (("em", "exact match 230.0%"), ("correctness", "correctness 2.300")):
        log = RunLog(types.SimpleNamespace(output_dir=tmp_path, eval_metric=metric))
        log.state.history = [{"em": 2.3}]
        assert progress.progress_text(record, log) == f"reward 1.00, {text}, length 9"


LONG = "950/1869|", "| 9:40:25 left, reward 1.38"


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (40, LONG),
        (80, (*LONG, ", exact match 100.0%, length 20, gradient")),
        (100, (*LONG, ", gradient, 10:00:00")),
    ],
)
def test_a_terminal_shows_what_matters_most(columns, shown):
    """Of a long run, too: ten hours, and as many left."""
    line = tqdm.format_meter(
        *(950, 1869, 36_000),
        ncols=columns,
        prefix="gradient",
        bar_format=progress.BAR,
        postfix="reward 1.38, exact match 100.0%, length 20",
    )
    assert len(line) == columns
    assert all(part in line for part in shown)
