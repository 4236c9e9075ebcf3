"""What a model is told: the branch that leads to the question, oldest first, within a limit."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

from models.database import Database
from models.parts import parts_from_json, parts_text
from providers.base import PromptMessage, Role

if TYPE_CHECKING:
    from asyncpg import Connection

MAX_HISTORY_MESSAGES = 500

# By parents, not by the active path: what leads to a message never changes, whatever is selected meanwhile.
_BRANCH = """
WITH RECURSIVE branch AS (
    SELECT id, parent_id, role, parts, 1 AS steps FROM messages WHERE id = $1
    UNION ALL
    SELECT m.id, m.parent_id, m.role, m.parts, steps + 1
    FROM messages m JOIN branch ON m.id = branch.parent_id WHERE steps < $2
)
SELECT role, parts FROM branch ORDER BY steps
"""
_PROJECT_PROMPT = """
SELECT p.prompt FROM messages m JOIN threads t ON t.id = m.thread_id JOIN projects p ON p.id = t.project_id
WHERE m.id = $1
"""
_ROLES: dict[str, Role] = {"USER": "user", "ASSISTANT": "assistant", "SYSTEM": "system"}


async def history(database: Database, message_id: UUID, *, max_chars: int) -> tuple[PromptMessage, ...]:
    """The messages up to and with this one, as a model gets them; before them what the thread's project tells it.

    Answers without text (failed before their first word) are left out. Beyond 500 messages or `max_chars` code points
    the oldest are left out, and what is left begins with a user's message; the last message is always there.
    """
    async with database.acquire() as connection:
        return await read_history(connection, message_id, max_chars=max_chars)


async def read_history(connection: Connection, message_id: UUID, *, max_chars: int) -> tuple[PromptMessage, ...]:
    """The same, in the transaction of a connection."""
    rows = await connection.fetch(_BRANCH, message_id, MAX_HISTORY_MESSAGES)
    instruction = await connection.fetchval(_PROJECT_PROMPT, message_id)
    newest_first: list[PromptMessage] = []
    chars = 0
    for row in rows:
        text = parts_text(parts_from_json(row["parts"]))
        chars += len(text)
        if newest_first and chars > max_chars:
            break
        if text:
            newest_first.append(PromptMessage(_ROLES[row["role"]], text))
    while len(newest_first) > 1 and newest_first[-1].role == "assistant":
        newest_first.pop()
    if instruction:
        newest_first.append(PromptMessage("system", instruction))
    return tuple(reversed(newest_first))
