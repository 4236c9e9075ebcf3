"""Repairs of what is kept about usage. A batch takes where the one before ended, and says where it ended itself."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

if TYPE_CHECKING:
    from asyncpg import Connection

_OWNERS = "SELECT id FROM users WHERE id > $1 ORDER BY id LIMIT $2"
# Conflicts with FOR KEY SHARE, which every insert of a usage event takes on its user: none is written meanwhile.
_LOCK_OWNER = "SELECT FROM users WHERE id = $1 FOR UPDATE"
_CLEAR = "DELETE FROM usage_quarters WHERE owner_id = $1"
_ROLL_UP = """
INSERT INTO usage_quarters (owner_id, began_at, model, requests, prompt_tokens, completion_tokens, reasoning_tokens,
    cached_tokens, priced_requests, cost_micros)
SELECT owner_id, date_bin('15 minutes', created_at, '2000-01-01 00:00:00+00'), model, count(*), sum(prompt_tokens),
    sum(completion_tokens), sum(reasoning_tokens), sum(cached_tokens), count(cost_micros), coalesce(sum(cost_micros), 0)
FROM usage_events WHERE owner_id = $1 GROUP BY 1, 2, 3
"""
_EVENTS = "SELECT id FROM usage_events WHERE id > $1 ORDER BY id LIMIT $2"
_FILL_THREADS = """
UPDATE usage_events SET thread_id = threads.id
FROM messages JOIN threads ON threads.id = messages.thread_id AND NOT threads.temporary
WHERE usage_events.id = ANY($1::uuid[]) AND usage_events.thread_id IS NULL AND messages.id = usage_events.message_id
"""
_START = UUID(int=0)
# As the last ANALYZE found it: to count is to read the table.
_ABOUT = "SELECT greatest(reltuples, 0)::bigint FROM pg_class WHERE oid = to_regclass($1)"


async def count_users(connection: Connection) -> int:
    """About how many users there are."""
    return int(await connection.fetchval(_ABOUT, "users"))


async def count_events(connection: Connection) -> int:
    """About how many usage events there are."""
    return int(await connection.fetchval(_ABOUT, "usage_events"))


async def rebuild_quarters(connection: Connection, position: str | None, limit: int) -> tuple[str | None, int]:
    """Sum up the usage events of the next users anew, each in a transaction of its own. Ends of answers wait for it.

    Args:
        position: the id of the last user that was done; None at the start.
        limit: most users.

    Returns:
        The new position, None where no user is left; and how many users were done.
    """
    after = _START if position is None else UUID(position)
    owners = [row["id"] for row in await connection.fetch(_OWNERS, after, limit)]
    for owner_id in owners:
        async with connection.transaction():
            await connection.execute(_LOCK_OWNER, owner_id)
            await connection.execute(_CLEAR, owner_id)
            await connection.execute(_ROLL_UP, owner_id)
    return _ended_at(owners, limit)


async def fill_threads(connection: Connection, position: str | None, limit: int) -> tuple[str | None, int]:
    """Give the next usage events without a thread that of their message, unless it is temporary or gone.

    Args:
        position: the id of the last event that was looked at; None at the start.
        limit: most events.

    Returns:
        The new position, None where no event is left; and how many events were looked at.
    """
    after = _START if position is None else UUID(position)
    events = [row["id"] for row in await connection.fetch(_EVENTS, after, limit)]
    await connection.execute(_FILL_THREADS, events)
    return _ended_at(events, limit)


def _ended_at(ids: list[UUID], limit: int) -> tuple[str | None, int]:
    return (ids[-1].hex if len(ids) == limit else None), len(ids)
