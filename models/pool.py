"""The connections to PostgreSQL that a process shares among its requests.

asyncpg's own pool takes 80 to 100 µs of CPU for every use of a connection, twice what a small statement costs: a proxy
for the connection, a task for giving it back, timers for its age. This one takes 3: a list of what is idle and a queue
of who waits (docs/decisions/0023-planned-execution.md).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine
from contextlib import suppress
from typing import TYPE_CHECKING

import asyncpg

if TYPE_CHECKING:
    from asyncpg import Connection

_IDLE_SECONDS = 300.0
# Statements are written so that one plan is right for every user, and are run thousands of times. Left to itself,
# PostgreSQL plans many of them anew each time: half of the time that a page takes it. Plans are kept while tables grow,
# those of foreign keys too: one that was made when a table was small must not read all of it. And where that cannot be
# avoided, before version 18 it would look so dear that it was compiled first.
_PLAN_ONCE = "SET plan_cache_mode = force_generic_plan; SET enable_seqscan = off; SET jit = off"
# Times that PostgreSQL writes are UTC, as those that we do.
_SETTINGS = f"{_PLAN_ONCE}; SET TimeZone = 'UTC'"
_BROKEN = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError)


class ConnectionPool:
    """At most `size` connections, opened when they are needed; the one used last is used next. Closed by `close`.

    Statements are planned once. Nothing is reset between two uses: nothing may be set but for a transaction. What sets
    more, or locks for a session, has a connection of its own.

    Args:
        url: a PostgreSQL URL.
        size: most connections.
        timeout_seconds: longest wait for a connection, for opening one, and for one statement.
        idle_seconds: after which one that is not needed is closed; one stays.
    """

    def __init__(self, url: str, *, size: int, timeout_seconds: float, idle_seconds: float = _IDLE_SECONDS) -> None:
        self._url = url
        self._size = size
        self._timeout_seconds = timeout_seconds
        self._idle_seconds = idle_seconds
        # The last one used comes last, each with the time of its last use.
        self._idle: list[tuple[Connection, float]] = []
        self._open: set[Connection] = set()
        self._opening = 0
        self._waiting: deque[asyncio.Future[Connection | None]] = deque()
        self._background: set[asyncio.Task[None]] = set()
        self._all_free: asyncio.Event = asyncio.Event()
        self._closed = False
        self._timer: asyncio.TimerHandle | None = None

    @property
    def opened(self) -> int:
        """How many connections are open."""
        return len(self._open)

    @property
    def idle(self) -> int:
        """How many of them nobody uses now."""
        return len(self._idle)

    async def acquire(self) -> Connection:
        """A connection, to be given back with `release`.

        Raises:
            TimeoutError: there was none in time.
            OSError, asyncpg.PostgresError, asyncpg.InterfaceError: none can be opened.
        """
        if self._closed:
            raise asyncpg.InterfaceError("the pool is closed")
        while self._idle:
            connection, _ = self._idle.pop()
            if not connection.is_closed():
                return connection
            self._open.discard(connection)
        if len(self._open) + self._opening < self._size:
            self._opening += 1
            return await self._connect()
        return await self._wait()

    def release(self, connection: Connection, *, clean: bool) -> None:
        """Give a connection back.

        Args:
            clean: whether it can be used again as it is. One that was left in the middle of something is used again
                when PostgreSQL has given that up, or is closed.
        """
        if connection.is_closed():
            self._drop(connection)
        elif self._closed:
            self._in_background(self._close(connection))
        elif clean and not connection.is_in_transaction():
            self._give(connection)
        else:
            self._in_background(self._recover(connection))

    async def close(self, patience_seconds: float) -> None:
        """Close every connection; those in use are given some time to be released, and are then cut."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        while self._idle:
            self._in_background(self._close(self._idle.pop()[0]))
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_exception(asyncpg.InterfaceError("the pool is closed"))
        if self._open:
            try:
                async with asyncio.timeout(patience_seconds):
                    await self._all_free.wait()
            except TimeoutError:
                for connection in list(self._open):
                    connection.terminate()
        if self._background:
            await asyncio.wait(self._background, timeout=patience_seconds)

    async def _connect(self) -> Connection:
        """Open a connection, in a place that was kept for it."""
        try:
            connection = await asyncpg.connect(
                self._url, timeout=self._timeout_seconds, command_timeout=self._timeout_seconds
            )
            try:
                await connection.execute(_SETTINGS)
            except BaseException:
                connection.terminate()
                raise
        except BaseException:
            self._give(None)
            raise
        self._opening -= 1
        self._open.add(connection)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._idle_seconds, self._thin_out)
        return connection

    async def _wait(self) -> Connection:
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        try:
            async with asyncio.timeout(self._timeout_seconds):
                connection: Connection | None = await waiter
        except BaseException:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                # Too late for this one, but there it is.
                self._give(waiter.result())
            else:
                waiter.cancel()
            raise
        return await self._connect() if connection is None else connection

    def _give(self, connection: Connection | None) -> None:
        """Let the next one in line have a connection, or a place to open one in."""
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(connection)
                return
        if connection is None:
            self._opening -= 1
        else:
            self._idle.append((connection, asyncio.get_running_loop().time()))

    def _thin_out(self) -> None:
        loop = asyncio.get_running_loop()
        long_ago = loop.time() - self._idle_seconds
        while len(self._idle) > 1 and self._idle[0][1] < long_ago:
            connection, _ = self._idle.pop(0)
            self._in_background(self._close(connection))
        self._timer = loop.call_later(self._idle_seconds, self._thin_out)

    def _drop(self, connection: Connection) -> None:
        """Forget a connection that is closed; whoever waits may open another one."""
        self._open.discard(connection)
        if self._waiting and not self._closed:
            self._opening += 1
            self._give(None)
        if not self._open:
            self._all_free.set()

    def _in_background(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work, name="tidying a connection up")
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _recover(self, connection: Connection) -> None:
        """Wait until PostgreSQL has given up what a connection was left in, and roll back.

        asyncpg's own reset looks at what the connection was before that, and calls a transaction it finds a defect.
        """
        try:
            async with asyncio.timeout(self._timeout_seconds):
                # It is sent when what was given up has ended.
                with suppress(asyncpg.InFailedSQLTransactionError):
                    await connection.execute("SELECT 1")
                if connection.is_in_transaction():
                    await connection.execute("ROLLBACK")
                await connection.reset()
                await connection.execute(_SETTINGS)
        except _BROKEN:
            connection.terminate()
            self._drop(connection)
        else:
            self.release(connection, clean=True)

    async def _close(self, connection: Connection) -> None:
        try:
            await connection.close(timeout=self._timeout_seconds)
        except _BROKEN:
            connection.terminate()
        self._drop(connection)
