"""Deleting threads with all that hangs on them, however long they are: no statement has more than a batch to do.

A statement that deletes a thread of a hundred thousand messages runs longer than statements may.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING
from uuid import UUID

if TYPE_CHECKING:
    from asyncpg import Connection

_BATCH = 5_000

# The deepest first, so that no deletion takes a long branch along.
_DELETE_MESSAGES = """
DELETE FROM messages WHERE id IN (
    SELECT id FROM messages WHERE thread_id = ANY($1::uuid[]) ORDER BY depth DESC LIMIT $2
)
"""


async def delete_threads(connection: Connection, thread_ids: Sequence[UUID]) -> None:
    """Delete threads that the caller's transaction has locked: all of them with it, or nothing."""
    while await delete_some(connection, thread_ids, _BATCH):
        pass


async def delete_some(connection: Connection, thread_ids: Sequence[UUID], limit: int) -> bool:
    """Delete so many messages of locked threads, and the threads with the last of them; whether any may be left."""
    # The command tag, such as "DELETE 3".
    if await connection.execute(_DELETE_MESSAGES, thread_ids, limit) == f"DELETE {limit}":
        return True
    await connection.execute("DELETE FROM threads WHERE id = ANY($1::uuid[])", thread_ids)
    return False
