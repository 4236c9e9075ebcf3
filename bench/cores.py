"""Which core runs what, and how busy it is."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_YARDSTICK_STEPS = 200_000
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Cores:
    """The server has one core to itself; the load generator shares the other with PostgreSQL."""

    server: int
    generator: int

    @classmethod
    def pick(cls) -> Cores:
        """The first and the second core this process may use; with one core alone both are the same."""
        allowed = sorted(os.sched_getaffinity(0))
        return cls(allowed[0], allowed[1] if len(allowed) > 1 else allowed[0])

    @property
    def shared(self) -> bool:
        """Whether server and generator must share one core, which makes every figure of time worthless."""
        return self.server == self.generator


@contextmanager
def on_core(core: int) -> Iterator[None]:
    """What is started inside of this is pinned to the core: a child inherits the affinity of its parent."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def yardstick_ms(core: int) -> float:
    """CPU milliseconds that a fixed loop takes on a core now.

    It tells how fast the machine is at the moment: a virtual core can be half as fast as a minute ago, and no clock of
    the guest shows why.
    """
    with on_core(core):
        began = time.process_time()
        total = 0
        for step in range(_YARDSTICK_STEPS):
            total += step * step
        return (time.process_time() - began) * 1_000


def core_busy_seconds(core: int) -> float:
    """Seconds for which a core was not idle since the machine started (proc(5), `/proc/stat`), 10 ms exact."""
    for line in Path("/proc/stat").read_text().splitlines():
        name, *ticks = line.split()
        if name == f"cpu{core}":
            # user nice system idle iowait irq softirq steal: the guest columns are counted in user already.
            user, nice, system, _, _, irq, softirq, steal = (int(tick) for tick in ticks[:8])
            return (user + nice + system + irq + softirq + steal) / _TICKS
    raise RuntimeError(f"/proc/stat does not know core {core}")
