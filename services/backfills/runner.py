"""Runs one backfill: batch by batch, each in a short transaction together with how far it has come.

So whatever ends a run, a `kill -9` as well, the next one goes on behind the last whole batch. One process at a time
runs a backfill, by an advisory lock of its name that goes with the connection. To be safe beside a server that serves,
a batch waits shortly for locks and is ended by the database when it takes too long; it is then tried again, smaller.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

import asyncpg

from models.database import Database

if TYPE_CHECKING:
    from asyncpg import Connection

log = logging.getLogger(__name__)

_LOCK_CLASS = 0x7468_7467
_LOCK_SECONDS = 2
_BATCH_SECONDS = 30
# A batch that takes longer is followed by a smaller one: what it locks, somebody may wait for.
_LONG_SECONDS = 0.5
_TRIES = 8
_PASSING = (
    asyncpg.LockNotAvailableError,
    asyncpg.DeadlockDetectedError,
    asyncpg.SerializationError,
    asyncpg.QueryCanceledError,
    TimeoutError,
)

# Rows written by this transaction until now. The view also counts what the session has not reported yet: subtract.
_WRITTEN = "SELECT coalesce(sum(n_tup_ins + n_tup_upd + n_tup_del), 0)::bigint FROM pg_stat_xact_user_tables"
_BEGIN_AGAIN = """
INSERT INTO backfills (name) VALUES ($1)
ON CONFLICT (name) DO UPDATE SET position = NULL, rows_done = 0, started_at = now(), finished_at = NULL
"""
_STATES = "SELECT name, position, rows_done, started_at, finished_at FROM backfills WHERE name = ANY($1::text[])"
_ADVANCE = """
INSERT INTO backfills AS b (name, position, rows_done, finished_at)
VALUES ($1, $2, $3, CASE WHEN $2::text IS NULL THEN now() END)
ON CONFLICT (name) DO UPDATE SET
    position = excluded.position, rows_done = b.rows_done + excluded.rows_done, finished_at = excluded.finished_at
"""


@dataclass(frozen=True, slots=True)
class Backfill:
    """What a run needs to know of a backfill.

    Args:
        name: its name in the table and on the command line; never changed.
        description: one sentence, for the operator.
        count: about how many rows there are to look at.
        run_batch: looks at rows behind a position (None: from the start), about as many as the limit says, in the
            caller's transaction; returns the position behind them, or None where nothing is left, and how many rows
            they were. Doing a batch twice does no harm.
        note: what else to tell the operator of a run that has ended, if anything.
    """

    name: str
    description: str
    count: Callable[[Connection], Awaitable[int]]
    run_batch: Callable[[Connection, str | None, int], Awaitable[tuple[str | None, int]]]
    note: Callable[[], str | None] = lambda: None


@dataclass(frozen=True, slots=True)
class BackfillState:
    """How far a backfill has come by all its runs; `started_at` None: it was never begun."""

    name: str
    position: str | None = None
    rows_done: int = 0
    started_at: datetime | None = None
    finished_at: datetime | None = None

    @property
    def unfinished(self) -> bool:
        """Whether it was begun, or asked for by a migration, and is not done."""
        return self.started_at is not None and self.finished_at is None


@dataclass(frozen=True, slots=True)
class BackfillProgress:
    """Rows looked at since the first run began, about how many there are, and rows written by this run.

    `rows_in_all` is None where counting them would have taken too long.
    """

    rows_done: int
    rows_in_all: int | None
    rows_written: int


@dataclass(frozen=True, slots=True)
class Pace:
    """How hard a run presses: most rows in a batch, and the rest behind a batch in multiples of what the batch took."""

    batch_rows: int
    rest: float


class BackfillRunningError(Exception):
    """Another process is running this backfill."""


async def backfill_states(connection: Connection, names: Sequence[str]) -> list[BackfillState]:
    """How far the backfills of these names have come, in their order."""
    found = {row["name"]: BackfillState(**row) for row in await connection.fetch(_STATES, names)}
    return [found.get(name, BackfillState(name)) for name in names]


async def run_backfill(
    database: Database,
    backfill: Backfill,
    pace: Pace,
    *,
    dry_run: bool = False,
    restart: bool = False,
    tell: Callable[[BackfillProgress], None] = lambda progress: None,
) -> BackfillProgress:
    """Run a backfill to its end, from where the last run was ended. One that has ended is not run again.

    Args:
        dry_run: do every batch and roll it back: what it would write is told, and nothing is written. Goes over all
            rows where the backfill has ended before.
        restart: begin at the first row again.
        tell: called behind every batch.

    Raises:
        BackfillRunningError: another process runs it now.
        DatabaseUnavailableError: the database went away, or a batch could not be done in several tries; what was done
            before stays done.
    """
    async with database.session(statement_seconds=_BATCH_SECONDS + 5) as connection:
        await connection.execute(f"SET lock_timeout = '{_LOCK_SECONDS}s'; SET statement_timeout = '{_BATCH_SECONDS}s'")
        if not await connection.fetchval("SELECT pg_try_advisory_lock($1, hashtext($2))", _LOCK_CLASS, backfill.name):
            raise BackfillRunningError(backfill.name)
        if restart and not dry_run:
            await connection.execute(_BEGIN_AGAIN, backfill.name)
        state = (await backfill_states(connection, [backfill.name]))[0]
        if dry_run and (restart or state.finished_at is not None):
            state = BackfillState(backfill.name)
        run = _Run(connection, backfill, pace, dry_run, state)
        if state.finished_at is None:
            await run.to_the_end(tell)
        return run.progress


class _Run:
    """One run, on a connection that holds the lock."""

    def __init__(
        self, connection: Connection, backfill: Backfill, pace: Pace, dry_run: bool, state: BackfillState
    ) -> None:
        self._connection = connection
        self._backfill = backfill
        self._pace = pace
        self._dry_run = dry_run
        self._position = state.position
        self._limit = pace.batch_rows
        self._finished = False
        self.progress = BackfillProgress(state.rows_done, None, 0)

    async def to_the_end(self, tell: Callable[[BackfillProgress], None]) -> None:
        """All batches that are left."""
        rows_in_all = await self._count()
        self.progress = BackfillProgress(self.progress.rows_done, rows_in_all, 0)
        tell(self.progress)
        while not self._finished:
            began = time.monotonic()
            done, written = await self._patient_batch()
            took = time.monotonic() - began
            before = self.progress
            self.progress = BackfillProgress(before.rows_done + done, rows_in_all, before.rows_written + written)
            tell(self.progress)
            if took > _LONG_SECONDS:
                self._limit = max(1, self._limit // 2)
            elif self._limit < self._pace.batch_rows:
                self._limit = min(self._limit * 2, self._pace.batch_rows)
            await asyncio.sleep(took * self._pace.rest)

    async def _count(self) -> int | None:
        try:
            return await self._backfill.count(self._connection)
        except _PASSING:
            return None

    async def _patient_batch(self) -> tuple[int, int]:
        for tries_left in reversed(range(_TRIES)):
            try:
                return await self._batch()
            except _PASSING as error:
                if not tries_left:
                    raise
                log.info("backfill %s: a batch is tried again: %s", self._backfill.name, type(error).__name__)
                self._limit = max(1, self._limit // 2)
                await asyncio.sleep(0.1 * 2 ** (_TRIES - tries_left))
        raise AssertionError("not reached")

    async def _batch(self) -> tuple[int, int]:
        """One batch; rows looked at and rows written. Where the commit fails, the run has not moved."""
        connection, name = self._connection, self._backfill.name
        transaction = connection.transaction()
        await transaction.start()
        try:
            before = await connection.fetchval(_WRITTEN)
            position, done = await self._backfill.run_batch(connection, self._position, self._limit)
            written = await connection.fetchval(_WRITTEN) - before
            if not self._dry_run:
                await connection.execute(_ADVANCE, name, position, done)
        except BaseException:
            # A connection that broke has rolled back by itself.
            if not connection.is_closed():
                await transaction.rollback()
            raise
        await (transaction.rollback() if self._dry_run else transaction.commit())
        self._position, self._finished = position, position is None
        return done, written
