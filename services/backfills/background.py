"""Runs the backfills that migrations asked for, in the server, beside what it serves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from models.database import Database, DatabaseUnavailableError
from services.backfills.runner import Backfill, BackfillRunningError, Pace, backfill_states, run_backfill

log = logging.getLogger(__name__)

_SETTLE_SECONDS = 1.0
_LOOK_SECONDS = 30.0
# A fifth of one connection's time.
_GENTLE = Pace(batch_rows=200, rest=4.0)


class BackgroundBackfills:
    """From `start` on until all are done or `stop` is called; what a stop cuts off, the next start goes on with.

    Of several servers one works: the others find the first unfinished one taken, and look again later.
    """

    def __init__(self, database: Database, backfills: Sequence[Backfill]) -> None:
        self._database = database
        self._backfills = backfills
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin, a moment after the server has."""
        self._task = asyncio.create_task(self._run(), name="backfills")

    async def stop(self) -> None:
        """Stop behind the last whole batch."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        await asyncio.sleep(_SETTLE_SECONDS)
        while True:
            try:
                if await self._run_unfinished():
                    return
            except DatabaseUnavailableError as error:
                log.warning("backfills wait for the database: %s", error)
            except Exception:
                log.exception("a backfill failed; trying again later")
            await asyncio.sleep(_LOOK_SECONDS)

    async def _run_unfinished(self) -> bool:
        """Whether nothing is left to be run."""
        async with self._database.acquire() as connection:
            states = await backfill_states(connection, [backfill.name for backfill in self._backfills])
        for backfill, state in zip(self._backfills, states, strict=True):
            if not state.unfinished:
                continue
            log.info("backfill %s: going on behind %d rows", backfill.name, state.rows_done)
            try:
                progress = await run_backfill(self._database, backfill, _GENTLE)
            except BackfillRunningError:
                return False
            log.info("backfill %s: done, %d rows. %s", backfill.name, progress.rows_done, backfill.note() or "")
        return True
