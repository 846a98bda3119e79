"""What several ranks have made, here threads of one process, is whole on each."""

import threading
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest
from helpers import completion

from utils.device import ranks
from utils.rollouts import whole


class Together(ranks.Alone):
    """Ranks that share memory; each thread is one."""

    def __init__(self, size):
        self.size, self.own, self.said = size, threading.local(), [None] * size
        self.all = threading.Barrier(size)

    @property
    def rank(self):
        return self.own.rank

    def places(self, costs):
        return list(range(self.rank, len(costs), self.size))

    def all_say(self, value, key=""):
        self.all.wait()
        self.said[self.rank] = value
        self.all.wait()
        return [*self.said]


def on_each(size, work):
    us = Together(size)

    def one(rank):
        us.own.rank = rank
        return work()

    with mock.patch.object(ranks, "team", [us]), ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


@pytest.mark.parametrize("size", [2, 3, 5])
def test_rows_come_back_to_their_places(size):
    groups = [[completion([n, m], [-0.1 * n, float(m)]) for m in range(2)] for n in range(4)]
    values = np.array([[[0.1 * n, np.nan]] * 2 for n in range(4)])

    def work():
        mine = ranks.here().places([1.0] * 4)
        objects = np.empty((len(mine), 2), object)
        for place, n in enumerate(mine):
            objects[place] = groups[n]
        return whole.whole(mine, objects, values[mine])

    for found, numbers in on_each(size, work):
        assert found.tolist() == groups
        np.testing.assert_array_equal(numbers, values)


def test_work_is_shared_out():
    for found in on_each(3, lambda: whole.shared_out([1.0] * 7, lambda mine: np.array(mine) * 2.0)):
        assert found.tolist() == [0, 2, 4, 6, 8, 10, 12]


def test_gradients_are_of_whole_groups():
    lengths = np.array([[3, 4], [5, 6], [7, 8]])
    parts = on_each(2, lambda: whole.own_groups([0, 1, 3, 4, 5], lengths))
    assert parts == [[0, 1, 4, 5], [3]]
    assert whole.own_groups([0, 3], lengths) == [0, 3]  # alone


def test_sums_and_all_values():
    for found in on_each(3, lambda: whole.total(np.array([1.5, ranks.here().rank]))):
        assert found.tolist() == [4.5, 3.0]
    parts = on_each(3, lambda: whole.of_all("x", [np.array([0.5])] * ranks.here().rank))
    assert [part.tolist() for part in parts] == [[0.5] * 3] * 3
    assert whole.of_all("x", []).tolist() == [0.0]
