"""How sure a share is."""

from utils.base.intervals import percent


def test_a_share_with_its_interval():
    assert percent(0.0, 4) == "0.0% [0.0%, 49.0%]"
    assert percent(0.242, 600) == "24.2% [20.9%, 27.8%]"
