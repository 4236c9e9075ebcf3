"""Messages of a viewer: found by id, paged along the active path, and which branch is active."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING
from uuid import UUID

from models.database import Database
from models.records import THREAD_COLUMNS, MessageRecord, ThreadRecord, message_columns
from services.errors import NotFoundError
from services.paging import Page, PageRequest, PathPosition
from services.viewer import Viewer

if TYPE_CHECKING:
    from asyncpg import Connection

MAX_SIBLINGS = 100

_M_COLUMNS = ", ".join(message_columns(None))
_FIND = f"SELECT {_M_COLUMNS} FROM messages m WHERE id = ANY($1::uuid[]) AND owner_id = $2"  # noqa: S608
_LIVE = f"""
SELECT {_M_COLUMNS} FROM messages m WHERE thread_id = ANY($1::uuid[]) AND owner_id = $2 AND status = 'STREAMING'
"""  # noqa: S608
_CHILDREN = f"""
SELECT {_M_COLUMNS} FROM unnest($1::uuid[]) AS wanted (parent_id) CROSS JOIN LATERAL (
    SELECT * FROM messages WHERE parent_id = wanted.parent_id AND owner_id = $2 ORDER BY id LIMIT {MAX_SIBLINGS}
) m
"""  # noqa: S608
_ROOTS = f"""
SELECT {_M_COLUMNS} FROM unnest($1::uuid[]) AS wanted (thread_id) CROSS JOIN LATERAL (
    SELECT * FROM messages WHERE thread_id = wanted.thread_id AND depth = 0 AND owner_id = $2
    ORDER BY id LIMIT {MAX_SIBLINGS}
) m
"""  # noqa: S608


def path_rows(order: str, first: int) -> str:
    """The query of a page of the active path of the thread `t`.

    Most threads are short, and PostgreSQL expects no other: told of the thread alone, it would read a whole long one
    and sort it. Rows are therefore asked for as an index has them.

    Args:
        first: the number of the first of its three parameters, which are those of `path_arguments`.
    """
    return f"""
    SELECT * FROM messages
    WHERE active AND (thread_id, depth) > (t.id, ${first}) AND (thread_id, depth) < (t.id, ${first + 1})
    ORDER BY thread_id {order}, depth {order} LIMIT ${first + 2}
    """  # noqa: S608


def path_arguments(request: PageRequest[PathPosition], wanted: frozenset[str] | None) -> tuple[int, int, int]:
    """The parameters of `path_rows`."""
    return (
        request.after.depth if request.after else -1,
        request.before.depth if request.before else _MAX_DEPTH,
        request.rows(wanted),
    )


_MAX_DEPTH = 2**31 - 1


@lru_cache(maxsize=256)
def _path_query(order: str, wanted: frozenset[str] | None) -> str:
    # A thread is asked for by its key and nothing else, or all of its owner's might be read for a few.
    return f"""
    SELECT {", ".join(message_columns(wanted))}, wanted.place
    FROM unnest($1::uuid[]) WITH ORDINALITY AS wanted (thread_id, place)
    CROSS JOIN LATERAL (SELECT id FROM threads WHERE id = wanted.thread_id AND owner_id = $2 LIMIT 1) t
    CROSS JOIN LATERAL ({path_rows(order, 3)}) m
    """  # noqa: S608


# Climbs from a message to the nearest ancestor (itself included) on the active path.
_CLIMB = """
WITH RECURSIVE up AS (
    SELECT id, parent_id, depth, active FROM messages WHERE id = $1
    UNION ALL
    SELECT m.id, m.parent_id, m.depth, m.active FROM up CROSS JOIN LATERAL (
        SELECT id, parent_id, depth, active FROM messages WHERE id = up.parent_id LIMIT 1
    ) m WHERE NOT up.active
)
SELECT id, parent_id, depth, active FROM up
"""
# Descends by the child that was on the path last, to the leaf that was left.
_DESCEND = """
WITH RECURSIVE down AS (
    SELECT id, active_child_id, depth FROM messages WHERE id = $1
    UNION ALL
    SELECT m.id, m.active_child_id, m.depth FROM down CROSS JOIN LATERAL (
        SELECT id, active_child_id, depth FROM messages WHERE id = down.active_child_id LIMIT 1
    ) m
)
SELECT id FROM down ORDER BY depth
"""


class Messages:
    """Reads of messages, and the choice of the active branch."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def find(self, viewer: Viewer, message_id: UUID) -> MessageRecord | None:
        """One message, or None where there is none of the viewer's."""
        return (await self.find_many(viewer, [message_id]))[0]

    async def find_many(self, viewer: Viewer, ids: Sequence[UUID]) -> list[MessageRecord | None]:
        """Messages in the order of the ids; None where there is none of the viewer's."""
        async with self._database.acquire() as connection:
            rows = await connection.fetch(_FIND, ids, viewer.id, record_class=MessageRecord.fetched)
        found = {row.id: row for row in rows}
        return [found.get(message_id) for message_id in ids]

    async def live(self, viewer: Viewer, thread_ids: Sequence[UUID]) -> list[MessageRecord | None]:
        """The answer being written in each thread, if any."""
        async with self._database.acquire() as connection:
            rows = await connection.fetch(_LIVE, thread_ids, viewer.id, record_class=MessageRecord.fetched)
        found = {row.thread_id: row for row in rows}
        return [found.get(thread_id) for thread_id in thread_ids]

    async def pages(
        self,
        viewer: Viewer,
        thread_ids: Sequence[UUID],
        request: PageRequest[PathPosition],
        wanted: frozenset[str] | None = None,
    ) -> list[Page[MessageRecord]]:
        """One page of the active path of each thread, in one query.

        Args:
            wanted: the fields of the records that will be looked at, and `WHETHER_MORE`; None: all.
        """
        async with self._database.acquire() as connection:
            rows = await connection.fetch(
                _path_query("DESC" if request.backwards else "ASC", wanted),
                thread_ids,
                viewer.id,
                *path_arguments(request, wanted),
                record_class=MessageRecord.fetched,
            )
        by_place: list[list[MessageRecord]] = [[] for _ in thread_ids]
        for row in rows:
            by_place[row[-1] - 1].append(row)
        return [Page.of(request, records) for records in by_place]

    async def siblings(self, viewer: Viewer, messages: Sequence[tuple[UUID, UUID | None]]) -> list[list[MessageRecord]]:
        """All versions at each message's place, oldest first, itself among them.

        Args:
            messages: of each, its thread and its parent (None for a root).
        """
        parents = list({parent for _, parent in messages if parent is not None})
        threads = list({thread for thread, parent in messages if parent is None})
        by_place: dict[tuple[UUID, UUID | None], list[MessageRecord]] = {place: [] for place in messages}
        async with self._database.acquire() as connection:
            for query, keys in ((_CHILDREN, parents), (_ROOTS, threads)):
                if keys:
                    for row in await connection.fetch(query, keys, viewer.id, record_class=MessageRecord.fetched):
                        by_place[row.thread_id, row.parent_id].append(row)
        return [by_place[place] for place in messages]

    async def select(self, viewer: Viewer, message_id: UUID) -> tuple[ThreadRecord, MessageRecord]:
        """Make a message's branch the active one, down to the leaf that was active in it last.

        Raises:
            NotFoundError: there is no such message of the viewer's.
        """
        async with self._database.transaction() as connection:
            thread_id = await connection.fetchval(
                "SELECT thread_id FROM messages WHERE id = $1 AND owner_id = $2", message_id, viewer.id
            )
            locked = await connection.fetchrow(
                f"SELECT {THREAD_COLUMNS} FROM threads WHERE id = $1 FOR UPDATE",  # noqa: S608
                thread_id,
            )
            if locked is None:
                raise NotFoundError("message", field="messageId")
            leaf = await activate_branch(connection, locked["id"], message_id)
            row = await connection.fetchrow(_FIND, [message_id], viewer.id)
            if leaf is not None:
                # The last statement: its lock must come behind all others (see `record_change` in the migrations).
                await connection.execute("SELECT record_change($1, 'MESSAGE_SELECTED', $2)", viewer.id, leaf)
        return ThreadRecord.from_row(locked), MessageRecord.from_row(row)


async def activate_branch(connection: Connection, thread_id: UUID, message_id: UUID) -> UUID | None:
    """Lead the active path through this message. The caller holds the thread's row lock.

    Returns:
        The end of the new path, or None where the message was on the path already and nothing changed.
    """
    climbed = await connection.fetch(_CLIMB, message_id)
    fork = next((row["depth"] for row in climbed if row["active"]), -1)
    if climbed[0]["active"]:
        return None
    joining = [row for row in climbed if not row["active"]]
    below = await connection.fetch(_DESCEND, message_id)
    await connection.execute(
        "UPDATE messages SET active = false WHERE thread_id = $1 AND active AND depth > $2", thread_id, fork
    )
    await connection.execute(
        "UPDATE messages SET active = true WHERE id = ANY($1::uuid[])",
        [row["id"] for row in joining] + [row["id"] for row in below],
    )
    await connection.execute(
        """
        UPDATE messages SET active_child_id = link.child
        FROM unnest($1::uuid[], $2::uuid[]) AS link (parent, child) WHERE messages.id = link.parent
        """,
        [row["parent_id"] for row in joining],
        [row["id"] for row in joining],
    )
    leaf: UUID = below[-1]["id"]
    return leaf


async def leave_branch(connection: Connection, thread_id: UUID, parent_id: UUID | None) -> None:
    """End the active path at this message (None: before any root), for a new one to be added below it.

    The caller holds the thread's row lock.
    """
    depth = -1
    if parent_id is not None:
        await activate_branch(connection, thread_id, parent_id)
        depth = await connection.fetchval("SELECT depth FROM messages WHERE id = $1", parent_id)
    await connection.execute(
        "UPDATE messages SET active = false WHERE thread_id = $1 AND active AND depth > $2", thread_id, depth
    )
