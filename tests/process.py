"""A server in a process of its own, started as a user would, and ended in every way there is."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
_ADDRESS = re.compile(r"(http://127\.0\.0\.1:\d+)/graphql")
# Tests ask faster than people, as one user.
_DEFAULTS = {
    "PORT": "0",
    "LOG_LEVEL": "WARNING",
    "TURNS_PER_MINUTE": "0",
    "UPLOADS_PER_MINUTE": "0",
    "SHARES_PER_MINUTE": "0",
    "KEY_CHANGES_PER_MINUTE": "0",
}
# Generous: the machine may be slow, and the tests beside this one start servers too.
_START_SECONDS = 120.0


class ServerProcess:
    """`python -m server` with these environment variables and nothing else of ours."""

    def __init__(self, **environment: str) -> None:
        kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "TMPDIR")}
        self.environment = kept | _DEFAULTS | environment
        self.address = ""
        self.output = ""

    async def launch(self) -> None:
        """Start the process without waiting for it to serve."""
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "server",
            cwd=ROOT,
            env=self.environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        self._reading = asyncio.create_task(self._read())

    async def start(self) -> ServerProcess:
        """Start and wait until it prints its address."""
        await self.launch()
        async with asyncio.timeout(_START_SECONDS):
            while not self.address and self.process.returncode is None:
                await asyncio.sleep(0.02)
        assert self.address, self.output
        return self

    async def end(self, number: signal.Signals = signal.SIGTERM, *, within: float = 90.0) -> int:
        """Send a signal and wait for the exit; the status."""
        if self.process.returncode is None:
            self.process.send_signal(number)
        return await self.wait(within)

    async def wait(self, within: float = 90.0) -> int:
        """Wait for the exit; the status."""
        async with asyncio.timeout(within):
            status = await self.process.wait()
            await self._reading
        return status

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.output += line.decode()
            if not self.address and (found := _ADDRESS.search(self.output)):
                self.address = found[1]
