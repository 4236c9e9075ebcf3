"""What time does: threads that expire, shares that end, keys and feed entries that are not kept any longer.

Safe on many nodes at once: every statement takes rows that nobody else holds. A thread is deleted in a transaction of
its own, like a user's deletion of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from uuid import UUID

from models.database import Database, DatabaseUnavailableError
from services.thread_deletion import delete_threads

log = logging.getLogger(__name__)

_BATCH = 500
# An answer that will not end must not keep an expired thread for ever.
_LIVE_GRACE_SECONDS = 3_600

_IDLE = """NOT EXISTS (SELECT FROM messages m WHERE m.thread_id = t.id AND m.status = 'STREAMING')"""
_EXPIRED_LIVE = """
SELECT t.id FROM threads t WHERE expires_at <= now()
AND EXISTS (SELECT FROM messages m WHERE m.thread_id = t.id AND m.status = 'STREAMING') LIMIT $1
"""
_EXPIRED = f"""
SELECT id FROM threads t
WHERE expires_at <= now() AND ({_IDLE} OR expires_at < now() - make_interval(secs => {_LIVE_GRACE_SECONDS}))
AND id <> ALL($1::uuid[])
ORDER BY expires_at LIMIT 1 FOR UPDATE SKIP LOCKED
"""  # noqa: S608
_RETIRED = f"""
SELECT id FROM threads t WHERE updated_at < now() - make_interval(secs => $2) AND {_IDLE}
AND id <> ALL($1::uuid[])
ORDER BY updated_at LIMIT 1 FOR UPDATE SKIP LOCKED
"""  # noqa: S608
_ENDED_SHARES = """
DELETE FROM shares WHERE id IN (
    SELECT id FROM shares WHERE expires_at <= now() ORDER BY expires_at LIMIT $1 FOR UPDATE SKIP LOCKED
)
"""
_OLD_TURNS = """
DELETE FROM turns WHERE id IN (
    SELECT id FROM turns WHERE created_at < now() - make_interval(secs => $2) AND NOT EXISTS (
        SELECT FROM messages WHERE messages.id = turns.assistant_message_id AND status = 'STREAMING'
    ) ORDER BY created_at LIMIT $1 FOR UPDATE SKIP LOCKED
)
"""
# The user's row first, as everything that deletes an account does; then what is purged and up to where, at once.
_OLD_CHANGES = """
WITH old AS (
    SELECT owner_id, id FROM changes WHERE created_at < now() - make_interval(secs => $2) ORDER BY created_at LIMIT $1
), owners AS (
    SELECT id FROM users WHERE id IN (SELECT owner_id FROM old) ORDER BY id FOR NO KEY UPDATE SKIP LOCKED
), purged AS (
    DELETE FROM changes USING old, owners WHERE changes.id = old.id AND owners.id = old.owner_id
    RETURNING changes.owner_id, changes.id
)
UPDATE users SET changes_purged_to = greatest(changes_purged_to, upto) FROM (
    SELECT owner_id, max(id) AS upto FROM purged GROUP BY owner_id
) p WHERE users.id = p.owner_id
"""


@dataclass(frozen=True, slots=True)
class Retention:
    """How long things are kept, in seconds. `threads` None: for ever."""

    threads: float | None
    changes: float
    idempotency_keys: float


class Sweeper:
    """Sweeps from `start` to `stop`, and once whenever `sweep` is called.

    Args:
        end_live: ends the answer that is being written in a thread, waiting for its end (see `Generations`).
        every_seconds: pause between two sweeps.
        others: further sweeps by what they sweep; each takes a bound and says how much it did.
    """

    def __init__(
        self,
        database: Database,
        retention: Retention,
        *,
        end_live: Callable[[UUID], Awaitable[None]],
        every_seconds: float,
        others: Mapping[str, Callable[[int], Awaitable[int]]] | None = None,
    ) -> None:
        self._database = database
        self._retention = retention
        self._end_live = end_live
        self._every_seconds = every_seconds
        self._sweeps: tuple[Callable[[int], Awaitable[int]], ...] = (
            self._expired_threads,
            self._retired_threads,
            self._ended_shares,
            self._old_turns,
            self._old_changes,
            *(self._counted(name, sweep) for name, sweep in (others or {}).items()),
        )
        self._task: asyncio.Task[None] | None = None
        # For metrics: how much was done, by what was swept (of feeds: how many were cut), and how often that failed.
        self.done: Counter[str] = Counter()
        self.failed = 0

    def start(self) -> None:
        """Begin to sweep."""
        self._task = asyncio.create_task(self._run(), name="sweeper")

    async def stop(self) -> None:
        """Stop sweeping; what is left is found by the next sweep, wherever it runs."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def sweep(self) -> None:
        """Do all there is to do now; one sweep that fails does not keep the others from theirs."""
        for sweep in self._sweeps:
            try:
                done = _BATCH
                while done >= _BATCH:
                    done = await sweep(_BATCH)
            except DatabaseUnavailableError as error:
                self.failed += 1
                log.warning("the sweeper waits for the database: %s", error)
            except Exception:
                self.failed += 1
                log.exception("a sweep failed; it is tried again")

    async def _run(self) -> None:
        while True:
            await self.sweep()
            await asyncio.sleep(self._every_seconds)

    def _counted(self, name: str, sweep: Callable[[int], Awaitable[int]]) -> Callable[[int], Awaitable[int]]:
        async def counted(limit: int) -> int:
            done = await sweep(limit)
            self.done[name] += done
            return done

        return counted

    async def _expired_threads(self, limit: int) -> int:
        async with self._database.acquire() as connection:
            live = [row["id"] for row in await connection.fetch(_EXPIRED_LIVE, limit)]
        for thread_id in live:
            await self._end_live(thread_id)
        return await self._delete_one_by_one("expired_threads", _EXPIRED, limit)

    async def _retired_threads(self, limit: int) -> int:
        if self._retention.threads is None:
            return 0
        return await self._delete_one_by_one("retired_threads", _RETIRED, limit, self._retention.threads)

    async def _delete_one_by_one(self, name: str, statement: str, limit: int, *values: object) -> int:
        """Delete at most so many threads, and pass by those that cannot be deleted now: they must not keep the rest."""
        done = 0
        passed: list[UUID] = []
        while done < limit and len(passed) < limit:
            thread_id: UUID | None = None
            try:
                async with self._database.transaction() as connection:
                    thread_id = await connection.fetchval(statement, passed, *values)
                    if thread_id is None:
                        break
                    await delete_threads(connection, [thread_id])
            except Exception:
                # Without a thread there is no database, and none for the rest either.
                if thread_id is None:
                    raise
                passed.append(thread_id)
                self.failed += 1
                log.exception("a thread could not be deleted; it is tried again")
                continue
            done += 1
            self.done[name] += 1
        return done

    async def _ended_shares(self, limit: int) -> int:
        return await self._rows("ended_shares", _ENDED_SHARES, limit)

    async def _old_turns(self, limit: int) -> int:
        return await self._rows("idempotency_keys", _OLD_TURNS, limit, self._retention.idempotency_keys)

    async def _old_changes(self, limit: int) -> int:
        # Counted by users, whose rows are updated: fewer than changes. It ends when nothing is left to purge.
        return await self._rows("feeds", _OLD_CHANGES, limit, self._retention.changes) * limit

    async def _rows(self, name: str, statement: str, limit: int, *values: object) -> int:
        async with self._database.acquire() as connection:
            # The command tag, such as "DELETE 3".
            rows = int((await connection.execute(statement, limit, *values)).rsplit(" ", 1)[1])
        self.done[name] += rows
        return rows
