"""A TCP proxy on 127.0.0.1 that loses, holds and delays what passes, as networks do."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self, TypeAlias

Connect: TypeAlias = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]

_AT_ONCE = 65_536


class Proxy:
    """Passes bytes between whoever connects to `port` and what `connect` reaches. Leaving it cuts everything.

    What is held is held in the kernel's buffers: nothing is read that is not passed on.
    """

    def __init__(self, connect: Connect) -> None:
        self.port = 0
        self._connect = connect
        self._passing = asyncio.Event()
        self._passing.set()
        self._is_cut = False
        self._delay_seconds = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        await self.drop()
        await self._server.wait_closed()

    def hold(self) -> None:
        """Let nothing pass, with all connections open: packets are lost, and no one is told."""
        self._passing.clear()

    async def cut(self) -> None:
        """Break all connections, and refuse new ones."""
        self._is_cut = True
        await self.drop()

    def delay(self, seconds: float) -> None:
        """Let everything be this late."""
        self._delay_seconds = seconds

    def heal(self) -> None:
        """Pass everything again; what was held comes now."""
        self._is_cut = False
        self._delay_seconds = 0.0
        self._passing.set()

    async def drop(self) -> None:
        """Break all connections; new ones are taken."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers = [writer]
        try:
            if self._is_cut:
                return
            there, back = await self._connect()
            writers.append(back)
            passing = [asyncio.create_task(self._pass(reader, back)), asyncio.create_task(self._pass(there, writer))]
            try:
                await asyncio.wait(passing, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in passing:
                    task.cancel()
                await asyncio.gather(*passing, return_exceptions=True)
        except OSError:
            pass
        finally:
            for each in writers:
                each.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(_AT_ONCE):
                if self._delay_seconds:
                    await asyncio.sleep(self._delay_seconds)
                await self._passing.wait()
                writer.write(data)
                await writer.drain()
