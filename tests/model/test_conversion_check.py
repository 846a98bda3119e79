"""What is said of a converted model beside its source."""

import pytest

from utils.model import conversion_check


def test_a_model_far_from_its_source_is_warned_about():
    reading = conversion_check.Reading([1, 2, 3], [-1.0, -2.0], -5.9, 10, 4.5, "")
    near, far = reading._replace(logprobs=[-1.1, -2.0]), reading._replace(logprobs=[-3.0, -1.5])
    assert "-1.550, source -1.500; difference to the source: mean 0.05, largest 0.1" in (
        conversion_check.compare(reading, near)
    )
    assert "warning" not in conversion_check.compare(reading, near)
    assert "warning: that is far from the source" in conversion_check.compare(reading, far)
    with pytest.raises(conversion_check.RunError, match="tokenizer reads a fixed text differently"):
        conversion_check.compare(reading, reading._replace(tokens=[1, 2, 4]))
