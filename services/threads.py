"""Threads of a viewer: listed, found, renamed, pinned, deleted."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from models.database import Database
from models.records import THREAD_COLUMNS, ThreadRecord
from services.errors import NotFoundError
from services.input import checked_text
from services.paging import Page, PageRequest, ThreadPosition
from services.viewer import Viewer

MAX_TITLE_BYTES = 800
_FIND = f"SELECT {THREAD_COLUMNS} FROM threads WHERE id = ANY($1::uuid[]) AND owner_id = $2"  # noqa: S608


def _list_query(order: str) -> str:
    # Row comparisons and one direction for all keys: the index threads_by_activity serves filter and order both ways.
    return f"""
    SELECT {THREAD_COLUMNS} FROM threads
    WHERE owner_id = $1 AND (pinned, updated_at, id) < ($2, $3, $4) AND (pinned, updated_at, id) > ($5, $6, $7)
    ORDER BY pinned {order}, updated_at {order}, id {order} LIMIT $8
    """  # noqa: S608


_LIST = _list_query("DESC")
_LIST_BACKWARDS = _list_query("ASC")
# Ends of the list that no row reaches.
_TOP = ThreadPosition(True, datetime(9999, 1, 1, tzinfo=UTC), UUID(int=2**128 - 1))
_BOTTOM = ThreadPosition(False, datetime(1, 1, 2, tzinfo=UTC), UUID(int=0))


class Threads:
    """The viewer's threads: pinned first, then by last activity.

    Args:
        end_live: ends the answer that is being written in a thread, waiting for its end (see `Generations`).
    """

    def __init__(self, database: Database, *, end_live: Callable[[UUID], Awaitable[None]]) -> None:
        self._database = database
        self._end_live = end_live

    async def page(self, viewer: Viewer, request: PageRequest[ThreadPosition]) -> Page[ThreadRecord]:
        """One page of the list."""
        above, below = request.after or _TOP, request.before or _BOTTOM
        async with self._database.acquire() as connection:
            rows = await connection.fetch(
                _LIST_BACKWARDS if request.backwards else _LIST,
                viewer.id,
                *(above.pinned, above.updated_at, above.id),
                *(below.pinned, below.updated_at, below.id),
                request.limit + 1,
            )
        return Page.of(request, [ThreadRecord.from_row(row) for row in rows])

    async def find(self, viewer: Viewer, thread_id: UUID) -> ThreadRecord | None:
        """One thread, or None where there is none of the viewer's."""
        return (await self.find_many(viewer, [thread_id]))[0]

    async def find_many(self, viewer: Viewer, ids: Sequence[UUID]) -> list[ThreadRecord | None]:
        """Threads in the order of the ids; None where there is none of the viewer's."""
        async with self._database.acquire() as connection:
            rows = await connection.fetch(_FIND, ids, viewer.id)
        found = {row["id"]: ThreadRecord.from_row(row) for row in rows}
        return [found.get(thread_id) for thread_id in ids]

    async def rename(self, viewer: Viewer, thread_id: UUID, title: str) -> ThreadRecord:
        """Give a thread the title its user chose; no model will overwrite it.

        Raises:
            BadUserInputError: the title is blank, too long or cannot be stored.
            NotFoundError: no such thread of the viewer's.
        """
        title = checked_text(" ".join(title.split()), field="title", max_bytes=MAX_TITLE_BYTES)
        return await self._change("title = $3, title_source = 'USER'", viewer, thread_id, title)

    async def pin(self, viewer: Viewer, thread_id: UUID, *, pinned: bool) -> ThreadRecord:
        """Move a thread to the top of the list, or back.

        Raises:
            NotFoundError: no such thread of the viewer's.
        """
        return await self._change("pinned = $3", viewer, thread_id, pinned)

    async def delete(self, viewer: Viewer, thread_id: UUID) -> None:
        """Delete a thread and all that hangs on it; a live answer is ended first. What was used stays counted.

        Raises:
            NotFoundError: no such thread of the viewer's.
        """
        if await self.find(viewer, thread_id) is None:
            raise NotFoundError("thread", field="threadId")
        await self._end_live(thread_id)
        async with self._database.acquire() as connection:
            deleted = await connection.fetchval(
                "DELETE FROM threads WHERE id = $1 AND owner_id = $2 RETURNING id", thread_id, viewer.id
            )
        if deleted is None:
            raise NotFoundError("thread", field="threadId")
        # An answer that began since then has lost its stream row; this makes it notice at once.
        await self._end_live(thread_id)

    async def _change(self, assignment: str, viewer: Viewer, thread_id: UUID, value: Any) -> ThreadRecord:
        async with self._database.acquire() as connection:
            row = await connection.fetchrow(
                f"UPDATE threads SET {assignment} WHERE id = $1 AND owner_id = $2 RETURNING {THREAD_COLUMNS}",  # noqa: S608
                thread_id,
                viewer.id,
                value,
            )
        if row is None:
            raise NotFoundError("thread", field="threadId")
        return ThreadRecord.from_row(row)
