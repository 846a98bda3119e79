"""Completions of which a part was given."""

from utils.data.completion import Completion


def test_what_was_given_is_not_counted():
    made = Completion([5, 6, 7, 8], [-1.0, 0.0, 0.0, -2.0], [1, 0, 0, 1], "stop", "so")
    assert (made.sampled, made.sampled_ids) == (2, [5, 8])
    alone = Completion([5, 6], [-1.0, -1.0], [1, 1], "length", "so")
    assert (alone.sampled, alone.sampled_ids) == (2, [5, 6])
