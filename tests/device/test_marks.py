"""Whose keys and values attention gets is told by the cache alone."""

from types import SimpleNamespace

import mlx.core as mx
import pytest

from utils.device import marks
from utils.device.cuda import attention

SHAPE = (1, 2, 3, 16)


@pytest.fixture
def ways(monkeypatch):
    """`attend(cache)` says which way it went."""
    monkeypatch.setattr(attention, "in_tiles", lambda *_: "gradient")
    monkeypatch.setattr(attention, "to_rows", lambda *_: "decoding")
    monkeypatch.setattr(attention, "fits", lambda *_: True)
    attend = attention.dispatching(lambda *_, **__: "plain")
    x = mx.zeros(SHAPE)
    return lambda cache, mask=None: attend(x, x, x, cache, 1.0, mask)


def decode_cache(position):
    cache = marks.DecodeCache()
    cache.rows = SimpleNamespace(position=position, all_seen="all", rotated={})
    cache.keys = cache.values = mx.zeros(SHAPE)
    return cache


def test_each_mark_has_its_way(ways):
    assert ways(None) == "gradient"
    assert ways(marks.GradientCache()) == "gradient"
    assert ways(decode_cache(mx.array([1])), "all") == "decoding"
    assert ways(decode_cache(None)) == "plain", "a step that is not compiled for every position"
    assert ways(object()) == "plain", "a cache of mlx-lm's"
