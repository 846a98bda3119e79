"""Time and memory of a run by phase: for the log, and for the plan after the first update."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

GB = 1e9


@contextmanager
def timed(metrics: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds that the block takes to `metrics[name]`."""
    start = time.perf_counter()
    yield
    metrics[name] = metrics.get(name, 0.0) + time.perf_counter() - start


@dataclass
class Meter:
    """MLX counts one peak; this one resets it where a phase begins.

    A phase begins with an empty cache: what the last one freed has other shapes than this one
    needs, and would stay allocated beside it. Not on CUDA, whose memory is no other program's, and
    where MLX gives up its cache by itself before memory runs out: freeing the 74 GB of a 1.5B
    model's gradient took 0.1 s of every update on one H200.
    """

    phase: str = "other"
    peaks: dict[str, int] = field(default_factory=dict)
    """Bytes by phase, since the last `report`."""
    cached: int = 0
    """Most bytes that were freed and kept for reuse at the end of a phase."""
    resident: int = 0
    """Bytes in use where the current phase began."""
    most: int = 0
    """Bytes at the highest peak so far."""

    def start(self, phase: str) -> None:
        import mlx.core as mx

        self._note()
        if not mx.cuda.is_available():
            mx.clear_cache()
        mx.reset_peak_memory()
        self.phase, self.resident = phase, mx.get_active_memory()

    def peak(self) -> int:
        """Bytes at the peak of the phase so far."""
        self._note()
        return self.peaks[self.phase]

    def _note(self) -> None:
        import mlx.core as mx

        peak = mx.get_peak_memory()
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), peak)
        self.most = max(self.most, peak)
        self.cached = max(self.cached, mx.get_cache_memory())

    def report(self) -> dict[str, float]:
        """Figures for a record of the log, in GB of 10^9 bytes; peaks are counted anew from here.

        Arrays at their most, arrays now, and what MLX keeps beside them.
        """
        import mlx.core as mx

        self._note()
        figures = {
            "peak_memory_gb": max(self.peaks.values()) / GB,
            "active_memory_gb": mx.get_active_memory() / GB,
            "cache_memory_gb": self.cached / GB,
        }
        self.peaks, self.cached = {}, 0
        mx.reset_peak_memory()
        return figures
