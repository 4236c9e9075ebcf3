"""Search documents of the threads and messages that were there before the triggers were."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

from services.paging import FIRST_ID

if TYPE_CHECKING:
    from asyncpg import Connection

_THREADS = "threads"
_MESSAGES = "messages"

# FOR SHARE: what is read here is neither changed nor deleted before its document is there, and the triggers keep it
# from then on. A document that is there is as new as its row.
_OF_THREADS = """
WITH batch AS (
    SELECT id, owner_id, title, temporary FROM threads WHERE id > $1 ORDER BY id LIMIT $2 FOR SHARE
), made AS MATERIALIZED (
    SELECT keep_search_document(id, owner_id, id, NULL, title) FROM batch
    WHERE NOT temporary AND NOT EXISTS (SELECT FROM search_documents WHERE search_documents.id = batch.id)
)
SELECT (SELECT count(*) FROM made) AS made, (SELECT count(*) FROM batch) AS seen, id FROM batch ORDER BY id DESC LIMIT 1
"""
_OF_MESSAGES = """
WITH batch AS (
    SELECT m.id, m.owner_id, m.thread_id, m.parts, m.status, t.temporary
    FROM messages m JOIN threads t ON t.id = m.thread_id
    WHERE m.id > $1 ORDER BY m.id LIMIT $2 FOR SHARE
), made AS MATERIALIZED (
    SELECT keep_search_document(id, owner_id, thread_id, id, search_text(parts)) FROM batch
    WHERE NOT temporary AND status <> 'STREAMING'
        AND NOT EXISTS (SELECT FROM search_documents WHERE search_documents.id = batch.id)
)
SELECT (SELECT count(*) FROM made) AS made, (SELECT count(*) FROM batch) AS seen, id FROM batch ORDER BY id DESC LIMIT 1
"""


# As the last ANALYZE found it: to count is to read the tables.
_COUNT = (
    "SELECT coalesce(sum(greatest(reltuples, 0)), 0)::bigint FROM pg_class WHERE oid IN ($1::regclass, $2::regclass)"
)


async def count(connection: Connection) -> int:
    """About how many threads and messages there are."""
    return int(await connection.fetchval(_COUNT, _THREADS, _MESSAGES))


async def run_batch(connection: Connection, position: str | None, limit: int) -> tuple[str | None, int]:
    """Make the documents of the next `limit` rows that have none, in one statement.

    Args:
        position: where the batch before ended; None to begin.

    Returns:
        Where this one ended (None: there is nothing left), and how many rows it saw.
    """
    table, _, key = (position or f"{_THREADS}:{FIRST_ID}").partition(":")
    row = await connection.fetchrow(_OF_THREADS if table == _THREADS else _OF_MESSAGES, UUID(key), limit)
    if row is not None:
        return f"{table}:{row['id']}", row["seen"]
    return (f"{_MESSAGES}:{FIRST_ID}", 0) if table == _THREADS else (None, 0)
