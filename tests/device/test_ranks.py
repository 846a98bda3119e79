"""One process is all there is, until mlx.launch has started several."""

import mlx.core as mx

from utils.device import ranks


def test_alone_all_is_its_own():
    us = ranks.here()
    assert (us.rank, us.size) == (0, 1)
    assert us.places([3.0, 1.0]) == [0, 1]
    assert us.all_say({"a": 1.5}) == [{"a": 1.5}]
    tree = {"w": mx.array([1.0, 2.0])}
    assert us.added(tree) is tree
    assert us.of_first(tree) is tree
    us.check()
    us.tell(ValueError("nobody hears it"))
    us.check()


def test_the_newest_team_is_in_force(monkeypatch):
    class Other(ranks.Alone):
        rank, size = 1, 2

    monkeypatch.setattr(ranks, "team", [ranks.ALONE, Other()])
    assert ranks.here().size == 2
