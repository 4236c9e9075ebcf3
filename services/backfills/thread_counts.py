"""Counts the threads of every project anew, and mends `projects.thread_count` where it differs.

Right beside writers: whoever changes a thread changes its project's row in the same statement (trigger `threads_count`)
and holds that row until the commit. So while this holds the row, a change of a thread is either committed, with its
count, or its count is still to come and will be added to ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

if TYPE_CHECKING:
    from asyncpg import Connection

_COUNT = "SELECT count(*) FROM projects"
_NEXT = "SELECT id FROM projects WHERE $1::uuid IS NULL OR id > $1 ORDER BY id LIMIT $2"
# The lock that the trigger's update takes; a foreign key check does not wait for it.
_LOCK = "SELECT id FROM projects WHERE id = $1 FOR NO KEY UPDATE"
_LOCK_FREE = "SELECT id FROM projects WHERE id = ANY($1::uuid[]) FOR NO KEY UPDATE SKIP LOCKED"
_MEND = """
UPDATE projects SET thread_count = counted.threads
FROM unnest($1::uuid[]) AS wanted (id) CROSS JOIN LATERAL (
    SELECT count(*) AS threads FROM threads WHERE project_id = wanted.id AND NOT archived AND NOT temporary
) counted
WHERE projects.id = wanted.id AND projects.thread_count <> counted.threads
"""


async def count(connection: Connection) -> int:
    """How many projects there are."""
    return int(await connection.fetchval(_COUNT))


async def run_batch(connection: Connection, position: str | None, limit: int) -> tuple[str | None, int]:
    """Mend the projects behind a position, at most `limit` of them.

    Only the first may be waited for. The batch ends before the next one that somebody holds: who waits with locks in
    hand can be part of a deadlock.
    """
    rows = await connection.fetch(_NEXT, None if position is None else UUID(position), limit)
    if not rows:
        return None, 0
    first, *others = [row["id"] for row in rows]
    await connection.execute(_LOCK, first)
    free = {row["id"] for row in await connection.fetch(_LOCK_FREE, others)}
    held = next((place for place, key in enumerate(others) if key not in free), len(others))
    batch = [first, *others[:held]]
    # In a statement of its own: its snapshot is younger than the locks.
    await connection.execute(_MEND, batch)
    return batch[-1].hex, len(batch)
