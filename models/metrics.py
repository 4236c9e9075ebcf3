"""What is counted: plain numbers on the object where the thing happens, read when somebody asks for them.

Nothing here knows Prometheus (`server/metrics.py` does), and nothing is global: two servers in a process count apart.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
LONG_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1_800.0)


class Histogram:
    """How often something took how long: counts by upper bound, and the sum.

    Args:
        bounds: the greatest value of each bucket, ascending; what is greater than all has a bucket of its own.
    """

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float] = SECONDS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        """How many were counted."""
        return sum(self.counts)
