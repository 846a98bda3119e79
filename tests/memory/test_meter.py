"""Time and memory by phase."""

import mlx.core as mx

from utils.memory import meter


def test_a_block_adds_its_seconds(monkeypatch):
    now = iter([1.0, 3.0, 10.0, 14.0])
    monkeypatch.setattr(meter.time, "perf_counter", lambda: next(now))
    metrics = {}
    for _ in range(2):
        with meter.timed(metrics, "seconds_rollout"):
            pass
    assert metrics == {"seconds_rollout": 6.0}


def test_each_phase_has_its_peak():
    made = meter.Meter()
    made.start("rollout")
    before = mx.get_active_memory()
    mx.eval(mx.zeros((1000, 1000)))
    made.start("gradient")
    mx.eval(mx.zeros((10, 10)))
    assert made.peak() < before + 10**6
    assert made.peaks["rollout"] >= before + 4 * 10**6
    figures = made.report()
    assert figures["peak_memory_gb"] * 1e9 >= before + 4 * 10**6
    assert made.peak() < before + 10**6, "counted anew from the report on"
