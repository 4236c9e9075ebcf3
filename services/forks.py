"""Forks: a branch of a thread copied into a thread of its own.

The copies have new ids and refer to nothing of the thread they were made from. They keep what they say and what they
cost to make (model, tokens, duration), but make no usage event: usage is what was asked of a model, and nobody was.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING
from uuid import UUID

from models.database import Database
from models.ids import new_id
from models.records import THREAD_COLUMNS, MessageStatus, ThreadRecord
from services.errors import BadUserInputError, NotFoundError, ThreadBusyError
from services.input import checked_line
from services.threads import MAX_TITLE_BYTES
from services.viewer import Viewer

if TYPE_CHECKING:
    from asyncpg import Connection

MAX_COPIED_MESSAGES = 10_000
# More copies than these are not told one by one: whoever follows the feed is told to fetch anew.
MAX_TOLD_MESSAGES = 200

_FIND = "SELECT depth, status FROM messages WHERE id = $1 AND owner_id = $2"
# By parents, each by its key (a plan that is made while there are few messages would read all of them for each, and is
# kept), not by the active path: any branch can be forked. One statement, so one snapshot: whatever happens to the
# thread meanwhile, the copy is of one moment. The new ids are by depth, so a copy's neighbours are those of its depth;
# beyond both ends of the array is null. The project is locked first, as strongly as the count of its threads will need
# it: the foreign key's weaker lock, raised later, would be a deadlock with a deletion of the project. Where that wins,
# the fork is in none.
_FORK = f"""
WITH RECURSIVE branch AS (
    SELECT id, parent_id, thread_id FROM messages WHERE id = $1 AND owner_id = $2
    UNION ALL
    SELECT m.id, m.parent_id, m.thread_id FROM branch CROSS JOIN LATERAL (
        SELECT id, parent_id, thread_id FROM messages WHERE id = branch.parent_id LIMIT 1
    ) m
), thread AS (
    INSERT INTO threads (id, owner_id, title, title_source, pinned, temporary, project_id, expires_at)
    SELECT $3, $2, coalesce($4, t.title), CASE WHEN $4::text IS NULL THEN t.title_source ELSE 'USER' END, false,
        t.temporary, (SELECT id FROM projects WHERE id = t.project_id AND owner_id = $2 FOR NO KEY UPDATE), t.expires_at
    FROM branch JOIN threads t ON t.id = branch.thread_id WHERE branch.id = $1
    RETURNING {THREAD_COLUMNS}
), copies AS (
    INSERT INTO messages (id, owner_id, thread_id, parent_id, active_child_id, depth, active, role, status, parts,
        model, error_code, error_message, error_retry_after, prompt_tokens, completion_tokens, reasoning_tokens,
        cached_tokens, tokens_estimated, duration_ms, created_at, updated_at)
    SELECT ($5::uuid[])[m.depth + 1], $2, thread.id, ($5::uuid[])[m.depth], ($5::uuid[])[m.depth + 2], m.depth, true,
        m.role, m.status, m.parts, m.model, m.error_code, m.error_message, m.error_retry_after, m.prompt_tokens,
        m.completion_tokens, m.reasoning_tokens, m.cached_tokens, m.tokens_estimated, m.duration_ms, m.created_at,
        m.updated_at
    FROM thread CROSS JOIN branch CROSS JOIN LATERAL (SELECT * FROM messages WHERE id = branch.id LIMIT 1) m
    ORDER BY m.depth
), links AS (
    INSERT INTO attachment_links (attachment_id, message_id)
    SELECT l.attachment_id, ($5::uuid[])[m.depth + 1]
    FROM thread CROSS JOIN branch CROSS JOIN LATERAL (SELECT id, depth FROM messages WHERE id = branch.id LIMIT 1) m
    JOIN attachment_links l ON l.message_id = m.id
)
SELECT {THREAD_COLUMNS} FROM thread
"""  # noqa: S608


class Forks:
    """Makes forks of the viewer's threads."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def fork(self, viewer: Viewer, message_id: UUID, title: str | None) -> ThreadRecord:
        """A new thread with copies of everything that leads to a message, and of the message.

        It is in the same project, as temporary as the thread was, expires when that does, and has its title where none
        is given; it is not pinned and not archived.

        Raises:
            BadUserInputError: the title cannot be accepted, or the branch is longer than 10,000 messages.
            NotFoundError: no such message of the viewer's.
            ThreadBusyError: the message is an answer that is being written.
        """
        if title is not None:
            title = checked_line(title, field="title", max_bytes=MAX_TITLE_BYTES)
        async with self._database.transaction() as connection:
            found = await connection.fetchrow(_FIND, message_id, viewer.id)
            if found is None:
                raise NotFoundError("message", field="messageId")
            # Only the last message of a branch can be live: nothing is added below an answer that is being written.
            if found["status"] == MessageStatus.STREAMING:
                raise ThreadBusyError
            count = found["depth"] + 1
            check_copied(count, field="messageId")
            ids = [new_id() for _ in range(count)]
            async with copying(connection, viewer, count):
                row = await connection.fetchrow(_FORK, message_id, viewer.id, new_id(), title, ids)
            if row is None:
                raise NotFoundError("message", field="messageId")
        return ThreadRecord.from_row(row)


def check_copied(count: int, *, field: str) -> None:
    """Refuse to copy more messages than one request may.

    Raises:
        BadUserInputError: more than 10,000.
    """
    if count > MAX_COPIED_MESSAGES:
        raise BadUserInputError(f"At most {MAX_COPIED_MESSAGES} messages are copied at once.", field=field)


@asynccontextmanager
async def copying(connection: Connection, viewer: Viewer, count: int) -> AsyncIterator[None]:
    """For the last statement of a transaction, which adds this many messages: tells the viewer's feed of a great many
    by one reset, instead of one by one.
    """
    if count <= MAX_TOLD_MESSAGES:
        yield
        return
    await connection.execute("SET LOCAL threadgraph.quiet = 'on'; SET CONSTRAINTS messages_added IMMEDIATE")
    yield
    await connection.execute("SET LOCAL threadgraph.quiet = 'off'")
    await connection.execute("SELECT record_change($1, 'RESET', NULL)", viewer.id)
