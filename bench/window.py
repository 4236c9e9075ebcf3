"""One measured stretch of time: what the server used of its core, and who else was busy meanwhile."""

from __future__ import annotations

import time
from dataclasses import dataclass

from bench.cores import Cores, core_busy_seconds
from bench.servers import ServerProcess


@dataclass(frozen=True, slots=True)
class Usage:
    """What a window cost. Shares are of one core, 0 to 1.

    Attributes:
        seconds: length of the window.
        server_seconds: CPU of the server process, kernel time on its behalf included.
        others: what neither was the server's nor idle on the server's core: noise.
        generator: CPU of the load generator.
        yardstick_ms: see `yardstick_ms` of `bench.cores`; taken shortly before the window.
        generator_core: everything on the generator's core, PostgreSQL included. Near 1 it is the bottleneck.
    """

    seconds: float
    server_seconds: float
    others: float
    generator: float
    generator_core: float
    yardstick_ms: float

    @property
    def server(self) -> float:
        """Share of its core that the server used."""
        return self.server_seconds / self.seconds


class Window:
    """Opened when it is made; `close` reads the clocks again.

    Args:
        server: whose CPU is read.
        cores: where it runs, and where the generator does.
        yardstick_ms: how fast the server's core was shortly before.
    """

    def __init__(self, server: ServerProcess, cores: Cores, yardstick_ms: float) -> None:
        self._server = server
        self._cores = cores
        self._yardstick_ms = yardstick_ms
        self._began = self._clocks()

    def close(self) -> Usage:
        """What was used since the window was opened."""
        wall, server, generator, server_core, generator_core = (
            now - then for now, then in zip(self._clocks(), self._began, strict=True)
        )
        return Usage(
            seconds=wall,
            server_seconds=server,
            others=max(0.0, (server_core - server) / wall),
            generator=generator / wall,
            generator_core=min(1.0, generator_core / wall),
            yardstick_ms=self._yardstick_ms,
        )

    def _clocks(self) -> tuple[float, float, float, float, float]:
        return (
            time.perf_counter(),
            self._server.cpu_seconds(),
            time.process_time(),
            core_busy_seconds(self._cores.server),
            core_busy_seconds(self._cores.generator),
        )
