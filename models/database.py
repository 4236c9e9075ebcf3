"""The one door to PostgreSQL: a bounded pool, deadlines on everything, migrations under a lock.

Tortoise defines the tables and migrates them. What a request waits for goes through this asyncpg pool with SQL written
for the purpose: a page of 50 rows costs 0.3 ms that way against 1.0 ms through model objects, and the pool belongs to
one object instead of to a context variable (docs/decisions/0003-tortoise-for-tables-asyncpg-for-queries.md).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pkgutil import iter_modules
from typing import TYPE_CHECKING

import asyncpg

import models.migrations
from models.metrics import Histogram
from models.pool import ConnectionPool

if TYPE_CHECKING:
    from types import TracebackType

    from asyncpg import Connection

log = logging.getLogger(__name__)

# Any constant will do, as long as nothing else in the database uses it.
_MIGRATION_LOCK = 0x7468_7264
_SERVER_LOCK = 0x7468_7265


class DatabaseUnavailableError(Exception):
    """PostgreSQL is out of reach or out of room. Nothing is known to be written; trying again later is right."""


class PooledError(Exception):
    """Between here and PostgreSQL is a pooler that gives each transaction another session."""


class DatabaseConflictError(DatabaseUnavailableError):
    """A transaction was rolled back for another's sake: a deadlock, or what cannot be put in one order."""


class Database:
    """The pool of one process. Made by `connect`, closed by `close`; every wait in it ends by its timeout.

    Args:
        url: a PostgreSQL URL; query parameters are handed to asyncpg (`host` for a socket folder, `sslmode`).
        pool_size: most connections.
        timeout_seconds: longest wait for a connection, and for one statement.
    """

    def __init__(self, url: str, *, pool_size: int, timeout_seconds: float) -> None:
        self.url = url
        self._pool_size = pool_size
        self._timeout_seconds = timeout_seconds
        self._pool: ConnectionPool | None = None
        self._claim: Connection | None = None
        # For metrics: how long was waited for a connection, and how often there was none in time, by what was raised.
        self.waits = Histogram()
        self.unavailable: Counter[str] = Counter()

    async def connect(self) -> None:
        """Open the pool.

        Raises:
            OSError, asyncpg.PostgresError: there is no database at the address.
        """
        self._pool = ConnectionPool(self.url, size=self._pool_size, timeout_seconds=self._timeout_seconds)
        async with self.acquire() as connection:
            version = connection.get_server_version()
        if version.major < 15:
            raise RuntimeError(f"PostgreSQL 15 or newer is needed; DATABASE_URL leads to version {version.major}")

    async def check_sessions(self) -> None:
        """See whether a connection is one session of PostgreSQL for as long as it lasts: locks need that.

        Raises:
            PooledError: what is asked on two connections is answered by one session, or on one by two.
            OSError, asyncpg.PostgresError: there is no database at the address.
        """
        both = [
            await asyncpg.connect(self.url, timeout=self._timeout_seconds, statement_cache_size=0) for _ in range(2)
        ]
        seen: list[set[int]] = [set(), set()]
        try:
            # Twice each and alternately: whether a pooler prefers the session used last or the one used longest ago.
            for which in (0, 0, 1, 1, 0, 1):
                seen[which].add(await both[which].fetchval("SELECT pg_backend_pid()", timeout=self._timeout_seconds))
        except asyncpg.InvalidSQLStatementNameError as error:
            # Prepared in one session, asked for in another.
            raise PooledError from error
        finally:
            for connection in both:
                await connection.close(timeout=5)
        if seen[0] & seen[1] or any(len(pids) > 1 for pids in seen):
            raise PooledError

    async def close(self) -> None:
        """Give up the claim to the database and close every connection; those in use are given 5 seconds."""
        if self._claim is not None:
            claim, self._claim = self._claim, None
            await claim.close(timeout=5)
        if self._pool is not None:
            pool, self._pool = self._pool, None
            await pool.close(5)

    async def migrate(self, *, to: str | None = None) -> list[str]:
        """Bring the tables up to this version. Servers that start at once migrate once; the others wait.

        Each migration and the note that it was applied are one transaction: whatever ends it, a fault or a `kill -9`,
        it is done or it has not begun. A database that a newer version migrated is left as it is.

        Args:
            to: the last migration to apply; the newest unless given.

        Returns:
            The names of the migrations that were applied.
        """
        guard = await asyncpg.connect(self.url, timeout=self._timeout_seconds)
        try:
            if not await guard.fetchval("SELECT pg_try_advisory_lock($1)", _MIGRATION_LOCK):
                log.info("waiting for another process that migrates the database")
                await guard.execute("SELECT pg_advisory_lock($1)", _MIGRATION_LOCK)
            wanted = [name for name in _migrations() if to is None or name <= to]
            table = await guard.fetchval("SELECT to_regclass('tortoise_migrations')")
            rows = [] if table is None else await guard.fetch("SELECT name FROM tortoise_migrations")
            applied = {row["name"] for row in rows}
            pending = [name for name in wanted if name not in applied]
            if pending:
                # Only now: what makes tables takes half a second to import, and most starts make none.
                from models.migrating import apply_migrations

                await apply_migrations(self.url, pending)
            return pending
        finally:
            await guard.close(timeout=5)

    async def claim_server(self, patience_seconds: float, *, shared: bool) -> bool:
        """Whether this process may serve the database; the claim holds until `close`, or a lost connection.

        With an in-memory channel a second server would not see the first one's streams: such a server claims the
        database for itself alone, others share it. After `kill -9` PostgreSQL notices the dead owner within moments,
        hence the patience. Claiming again what is held is true at once.
        """
        if self._claim is not None and not self._claim.is_closed():
            return True
        connection = await asyncpg.connect(self.url, timeout=self._timeout_seconds)
        deadline = asyncio.get_running_loop().time() + patience_seconds
        lock = "pg_try_advisory_lock_shared" if shared else "pg_try_advisory_lock"
        while not await connection.fetchval(f"SELECT {lock}($1)", _SERVER_LOCK):
            if asyncio.get_running_loop().time() >= deadline:
                await connection.close(timeout=5)
                return False
            await asyncio.sleep(0.1)
        self._claim = connection
        return True

    def acquire(self) -> AbstractAsyncContextManager[Connection]:
        """A connection for one or a few reads. Nothing that is set for the session may be left behind.

        Raises:
            DatabaseUnavailableError: no connection in time, the connection broke, a statement ran too long, or there is
                no room on the disk.
            DatabaseConflictError: the transaction was rolled back for another's sake.
        """
        if self._pool is None:
            raise DatabaseUnavailableError("closed")
        return _Acquired(self, self._pool)

    def transaction(self) -> AbstractAsyncContextManager[Connection]:
        """A connection in a transaction: committed at the end of the block, rolled back by any exception.

        Raises:
            DatabaseUnavailableError: as `acquire`; whether a commit that broke took place is not known.
        """
        if self._pool is None:
            raise DatabaseUnavailableError("closed")
        return _Transaction(self, self._pool)

    @asynccontextmanager
    async def session(self, *, statement_seconds: float | None = None) -> AsyncIterator[Connection]:
        """A connection beside the pool, for work that takes long and must not keep requests from theirs.

        Args:
            statement_seconds: longest wait for one of its statements; None: as long as in the pool.

        Raises:
            DatabaseUnavailableError: as `acquire`.
        """
        try:
            connection = await asyncpg.connect(
                self.url, timeout=self._timeout_seconds, command_timeout=statement_seconds or self._timeout_seconds
            )
            try:
                yield connection
            except BaseException:
                # At once: whoever needed it is gone, and what it was doing is rolled back.
                connection.terminate()
                raise
            await connection.close(timeout=5)
        except _UNAVAILABLE as error:
            raise self.out_of_reach(error) from error

    @property
    def connections(self) -> tuple[int, int]:
        """How many connections the pool has open, and how many of them nobody uses now."""
        return (0, 0) if self._pool is None else (self._pool.opened, self._pool.idle)

    @property
    def pool_size(self) -> int:
        """How many connections it may open."""
        return self._pool_size

    def out_of_reach(self, error: BaseException) -> DatabaseUnavailableError:
        self.unavailable[type(error).__name__] += 1
        return DatabaseUnavailableError(type(error).__name__)


def _migrations() -> list[str]:
    """The names of all migrations, in their order."""
    return sorted(module.name for module in iter_modules(models.migrations.__path__))


_UNAVAILABLE = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.PostgresConnectionError,
    asyncpg.exceptions.AdminShutdownError,
    asyncpg.exceptions.CrashShutdownError,
    asyncpg.exceptions.CannotConnectNowError,
    # Too many connections, a full disk, no memory.
    asyncpg.exceptions.InsufficientResourcesError,
    # The server behind the address is a standby now.
    asyncpg.exceptions.ReadOnlySQLTransactionError,
    asyncpg.exceptions.QueryCanceledError,
)


class _Acquired:
    """A connection of the pool for as long as a block lasts. Every request has some, so it is no generator."""

    __slots__ = ("_connection", "_database", "_pool")

    def __init__(self, database: Database, pool: ConnectionPool) -> None:
        self._database = database
        self._pool = pool

    async def __aenter__(self) -> Connection:
        asked = time.monotonic()
        try:
            self._connection = await self._pool.acquire()
        except _UNAVAILABLE as error:
            raise self._database.out_of_reach(error) from error
        self._database.waits.observe(time.monotonic() - asked)
        return self._connection

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._pool.release(self._connection, clean=True)
            return
        # Whoever was cancelled, or came to the deadline, left in the middle of a statement.
        broken = not isinstance(error, Exception) or isinstance(error, _UNAVAILABLE)
        self._pool.release(self._connection, clean=not broken)
        if isinstance(error, asyncpg.exceptions.TransactionRollbackError):
            raise DatabaseConflictError(type(error).__name__) from error
        if isinstance(error, _UNAVAILABLE):
            raise self._database.out_of_reach(error) from error


class _Transaction(_Acquired):
    """A connection with a transaction for as long as a block lasts."""

    __slots__ = ("_transaction",)

    async def __aenter__(self) -> Connection:
        connection = await super().__aenter__()
        self._transaction = connection.transaction()
        try:
            # Not its `start`: what is entered and is cut off there is rolled back by asyncpg without a word.
            await self._transaction.__aenter__()
        except BaseException as error:
            await super().__aexit__(type(error), error, error.__traceback__)
            raise
        return connection

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self._transaction.__aexit__(kind, error, trace)
        except BaseException as failed:
            await super().__aexit__(type(failed), failed, failed.__traceback__)
            raise
        await super().__aexit__(kind, error, trace)
