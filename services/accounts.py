"""The end of an account: everything of a user is deleted, in small steps, by whichever process gets to it.

First the user is marked as deleted, and from there on the database refuses what would begin anything for them (see the
migration of deleted owners). Then rows go in batches, each in a short transaction of its own, and the user's row goes
last and takes what is left with it. A process that dies midway leaves a marked user, whom `sweep` finds.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING
from uuid import UUID

from models.database import Database, DatabaseUnavailableError
from services.errors import BadUserInputError, UnauthenticatedError
from services.generation import Generations
from services.thread_deletion import delete_some
from services.viewer import Viewer

if TYPE_CHECKING:
    from asyncpg import Connection

    _Step = Callable[[Connection, UUID], Awaitable[bool]]

log = logging.getLogger(__name__)

CONFIRMATION = "DELETE MY ACCOUNT"
# How long a caller waits for the end of it; the work goes on without them.
_PATIENCE_SECONDS = 20.0
_THREADS, _MESSAGES, _ROWS = 100, 2_000, 5_000

_MARK = "UPDATE users SET deleted_at = coalesce(deleted_at, now()) WHERE id = $1 RETURNING id"
_MARKED = "SELECT id FROM users WHERE deleted_at IS NOT NULL ORDER BY deleted_at LIMIT $1"
# One process at a time works on an account: rows of two tables are never locked by two in different orders.
_LOCK = "SELECT pg_advisory_xact_lock($1, hashtext($2))"
_TRY_LOCK = "SELECT pg_try_advisory_xact_lock($1, hashtext($2))"
_LOCK_CLASS = 0x7468_6461
# Whoever is deleted is told nothing.
_QUIET = "SET LOCAL threadgraph.quiet = 'on'"
_LOCK_THREADS = "SELECT id FROM threads WHERE owner_id = $1 ORDER BY id LIMIT $2 FOR UPDATE"
# Tables that may have many rows of one user. What is not named here goes with the user's row.
_TABLES = ("turns", "usage_events", "usage_quarters", "changes")
_LOCK_ATTACHMENTS = "SELECT id FROM attachments WHERE owner_id = $1 ORDER BY id LIMIT $2 FOR UPDATE"
# Those that are locked are the sweeper's already, and go with its look.
_FORGET_TASKS = """
DELETE FROM sweep_tasks WHERE id IN (
    SELECT id FROM sweep_tasks WHERE kind = 'ATTACHMENT' AND subject = ANY($1::text[]) FOR UPDATE SKIP LOCKED
)
"""
_DELETE_USER = "DELETE FROM users WHERE id = $1 AND deleted_at IS NOT NULL"


class Accounts:
    """Deletes accounts."""

    def __init__(self, database: Database, generations: Generations) -> None:
        self._database = database
        self._generations = generations
        self._tasks: set[asyncio.Task[bool]] = set()

    async def delete(self, viewer: Viewer, confirmation: str) -> None:
        """Delete the viewer's account. From now on it can begin nothing; all is gone at the end, or soon after.

        Args:
            confirmation: `CONFIRMATION`, to the letter.

        Raises:
            BadUserInputError: the confirmation is another.
            UnauthenticatedError: the account was deleted before.
        """
        if confirmation != CONFIRMATION:
            raise BadUserInputError(f'To delete everything, confirm it by "{CONFIRMATION}".', field="confirmation")
        async with self._database.acquire() as connection:
            if await connection.fetchval(_MARK, viewer.id) is None:
                raise UnauthenticatedError("The account of this token does not exist any more.")
        # In a task of its own: it goes on when the caller leaves.
        task = asyncio.create_task(self._erase(viewer.id, patient=True), name="account deletion")
        self._tasks.add(task)
        task.add_done_callback(self._disown)
        await asyncio.wait({task}, timeout=_PATIENCE_SECONDS)

    async def sweep(self, limit: int) -> int:
        """Go on with deletions that were begun by anybody, of at most so many accounts; how many are through.

        Raises:
            DatabaseUnavailableError: the rest waits for the next time.
        """
        async with self._database.acquire() as connection:
            marked = [row["id"] for row in await connection.fetch(_MARKED, limit)]
        done = 0
        for user_id in marked:
            done += await self._erase(user_id, patient=False)
        return done

    async def close(self) -> None:
        """Leave off; the sweep of whoever runs next goes on."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _erase(self, user_id: UUID, *, patient: bool) -> bool:
        """Delete everything of a marked user. False where another process is at it and this one does not wait."""
        await self._generations.end_owned(user_id)
        for step in _STEPS:
            while True:
                async with self._database.transaction() as connection:
                    if patient:
                        await connection.execute(_LOCK, _LOCK_CLASS, str(user_id))
                    elif not await connection.fetchval(_TRY_LOCK, _LOCK_CLASS, str(user_id)):
                        return False
                    await connection.execute(_QUIET)
                    if not await step(connection, user_id):
                        break
        await self._generations.end_owned(user_id)
        log.info("an account was deleted")
        return True

    def _disown(self, task: asyncio.Task[bool]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            waits = isinstance(error, DatabaseUnavailableError)
            log.error("the deletion of an account waits for the next sweep", exc_info=None if waits else error)


async def _threads(connection: Connection, user_id: UUID) -> bool:
    """Delete some threads, or some messages of those; whether there may be more."""
    # The thread is locked first, as by everything that writes into one.
    threads = [row["id"] for row in await connection.fetch(_LOCK_THREADS, user_id, _THREADS)]
    await delete_some(connection, threads, _MESSAGES)
    return bool(threads)


async def _attachments(connection: Connection, user_id: UUID) -> bool:
    """Delete some attachments, and what the sweeper was to look at of them; whether there may be more.

    Their bytes are the sweeper's, as after any deletion.
    """
    found = await connection.fetch(_LOCK_ATTACHMENTS, user_id, _ROWS)
    ids = [row["id"] for row in found]
    await connection.execute("DELETE FROM attachments WHERE id = ANY($1::uuid[])", ids)
    await connection.execute(_FORGET_TASKS, [str(attachment_id) for attachment_id in ids])
    return bool(ids)


async def _rows(table: str, connection: Connection, user_id: UUID) -> bool:
    """Delete some rows of a table; whether there may be more."""
    some = f"SELECT ctid FROM {table} WHERE owner_id = $1 LIMIT {_ROWS}"  # noqa: S608 - names and numbers of ours
    return _number(await connection.execute(f"DELETE FROM {table} WHERE ctid = ANY(ARRAY({some}))", user_id)) == _ROWS  # noqa: S608


async def _user(connection: Connection, user_id: UUID) -> bool:
    """Delete the user, and with it what is left. There is never more."""
    await connection.execute(_DELETE_USER, user_id)
    return False


# In order; each says whether there may be more for it.
_STEPS: tuple[_Step, ...] = (_threads, _attachments, *(partial(_rows, table) for table in _TABLES), _user)


def _number(tag: str) -> int:
    """How many rows a command's tag, such as "DELETE 3", tells of."""
    return int(tag.rsplit(" ", 1)[1])
