"""Work beside the training thread."""

import threading

import pytest

from utils.run.background import Background


def test_a_piece_begins_when_the_one_before_it_is_done():
    beside, go, done = Background("test"), threading.Event(), []
    beside.begin(lambda: (go.wait(20), done.append(1)))
    assert done == [], "the caller goes on meanwhile"
    assert any(thread.name == "test" for thread in threading.enumerate())
    threading.Timer(0.05, go.set).start()
    beside.begin(lambda: done.append(2))
    assert done[0] == 1, "there is never more than one"
    beside.settle()
    assert done == [1, 2]
    assert not any(thread.name == "test" for thread in threading.enumerate())


def test_what_a_piece_raises_is_raised_once_and_not_by_waiting():
    def fails():
        raise ZeroDivisionError("of the piece")

    beside, done = Background("test"), []
    beside.begin(fails)
    beside.wait()
    assert beside.error
    with pytest.raises(ZeroDivisionError, match="of the piece"):
        beside.begin(lambda: done.append(1))
    assert done == []
    beside.begin(lambda: done.append(2))
    beside.settle()
    assert done == [2]
    beside.check()
    beside.begin(fails)
    beside.wait()
    with pytest.raises(ZeroDivisionError):
        beside.check()
    beside.settle()
