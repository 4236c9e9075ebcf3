"""Servers as child processes: started on a core, watched, stopped by their process id."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from bench.cores import on_core

HOST = "127.0.0.1"
PEERS = Path(__file__).parent / "peers"
_ROOT = Path(__file__).parent.parent
_START_SECONDS = 60.0
_STOP_SECONDS = 30.0
_POLL_SECONDS = 0.02
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_SECRET = "a key for measuring only, never for users"
_COMPLAINT = re.compile(r" (?:WARNING|ERROR|CRITICAL) |^Traceback ")


class BenchError(Exception):
    """A figure cannot be had: a server did not start, or answered something else than it should."""


@dataclass(frozen=True, slots=True)
class Place:
    """What every server is given.

    Attributes:
        database_url: the PostgreSQL that all share.
        folder: a temporary folder for data and logs.
        core: where a server runs.
    """

    database_url: str
    folder: Path
    core: int


class ServerProcess:
    """One server, listening on a free port of 127.0.0.1 once `start` returns."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str], place: Place) -> None:
        self.name = name
        self.port = _free_port()
        self._command = command
        self._environment = {"PATH": os.environ.get("PATH", ""), "HOST": HOST, "PORT": str(self.port), **environment}
        self._core = place.core
        self._log_file = place.folder / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process id of the running server."""
        assert self._process is not None, "started"
        return self._process.pid

    async def start(self) -> None:
        """Start on the core and wait until the port answers.

        Raises:
            BenchError: it ended, or did not listen in time.
        """
        with on_core(self._core), self._log_file.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=_ROOT,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + _START_SECONDS
        while not await _listens(self.port):
            if self._process.poll() is not None or time.monotonic() > deadline:
                await self.stop()
                raise BenchError(f"{self.name} did not start:\n{self._log()[-2_000:]}")
            await asyncio.sleep(_POLL_SECONDS)

    async def stop(self) -> None:
        """Ask it to end; after 30 s, make it."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.terminate()
        deadline = time.monotonic() + _STOP_SECONDS
        while process.poll() is None:
            if time.monotonic() > deadline:
                process.kill()
            await asyncio.sleep(_POLL_SECONDS)

    def cpu_seconds(self) -> float:
        """CPU the process has used so far, user and system, in all its threads.

        What utime + stime of `/proc/<pid>/stat` say, in nanoseconds instead of 10 ms: the process's CPU clock, under
        the number that clock_getcpuclockid(3) makes of a process id.
        """
        return time.clock_gettime(~self.pid << 3 | 2)

    def resident_mib(self) -> float:
        """Memory the process holds now, in MiB."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * _PAGE_BYTES / 2**20

    def descriptors(self) -> int:
        """How many descriptors the process has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def complaints(self) -> list[str]:
        """Warnings and errors in its log so far."""
        return [line for line in self._log().splitlines() if _COMPLAINT.search(line)]

    def _log(self) -> str:
        return self._log_file.read_text(errors="replace")


def product(place: Place, scripts: Path, *, name: str = "product", **more: str) -> ServerProcess:
    """This repository's server.

    Args:
        scripts: a file of scripted models to offer.
        name: its own, where there are several.
        more: further settings.
    """
    environment = {
        "DATABASE_URL": place.database_url,
        "DATA_DIR": str(place.folder / name),
        "GRAPHIQL": "false",
        "SESSION_SECRET": _SECRET,
        "SCRIPTED_MODELS_FILE": str(scripts),
        # Answers that still run when a window is over are of no use to anybody.
        "SHUTDOWN_GRACE_SECONDS": "0",
        # Ten thousand users come at once, from one address; and one reads all answers.
        "ANONYMOUS_SESSIONS_PER_MINUTE": "1000000",
        "TURNS_PER_MINUTE": "0",
        "UPLOADS_PER_MINUTE": "0",
        "SHARES_PER_MINUTE": "0",
        "KEY_CHANGES_PER_MINUTE": "0",
        "MAX_SOCKETS_PER_USER": "20000",
        # Whoever runs a server watches it: what counting costs is part of every figure.
        "METRICS_TOKEN": "a-token-for-measuring-only",
    }
    return ServerProcess(name, [sys.executable, "-m", "server"], environment | more, place)


def raw(place: Place) -> ServerProcess:
    """The server written by hand: see `bench.raw_server`."""
    return ServerProcess("RAW", [sys.executable, "-m", "bench.raw_server"], _given(place), place)


def raw_turns(place: Place) -> ServerProcess:
    """The server written by hand for whole turns: see `bench.raw_turns`."""
    return ServerProcess("RAW", [sys.executable, "-m", "bench.raw_turns"], _given(place), place)


def plain_strawberry(place: Place) -> ServerProcess:
    """Strawberry as one begins with it: see `bench.strawberry_server`."""
    return ServerProcess("Strawberry", [sys.executable, "-m", "bench.strawberry_server"], _given(place), place)


def by_node(place: Place, name: str, script: str, **more: str) -> ServerProcess:
    """A server of `bench/peers`.

    Args:
        name: its own.
        script: its file.
        more: further settings.

    Raises:
        BenchError: there is no Node, or its packages are not installed.
    """
    node = shutil.which("node")
    if node is None:
        raise BenchError("Node is not installed")
    if not (PEERS / "node_modules").is_dir():
        raise BenchError("its packages are not installed: npm ci in bench/peers")
    return ServerProcess(name, [node, str(PEERS / script)], _given(place) | {"NODE_ENV": "production"} | more, place)


def _given(place: Place) -> dict[str, str]:
    return {"DATABASE_URL": place.database_url, "SESSION_SECRET": _SECRET}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


async def _listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection(HOST, port)
    except OSError:
        return False
    writer.close()
    return True
