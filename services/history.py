"""What a model is told: the branch that leads to the question, oldest first, within a limit."""

from __future__ import annotations

import codecs
from contextlib import aclosing
from typing import TYPE_CHECKING
from uuid import UUID

from models.database import Database
from models.parts import FilePart, parts_from_json, parts_text
from providers.base import PromptMessage, Role
from services.file_types import TEXT
from storage.base import Storage
from streams.tokens import BYTES_PER_TOKEN, estimate_tokens

if TYPE_CHECKING:
    from asyncpg import Connection

MAX_HISTORY_MESSAGES = 500
# What formats of conversations add to each message's text (its role and its ends), and the naming of a file.
_TOKENS_PER_MESSAGE = 4
_TOKENS_PER_FILE = 40

# By parents, not by the active path: what leads to a message never changes, whatever is selected meanwhile.
_BRANCH = """
WITH RECURSIVE branch AS (
    SELECT id, parent_id, role, parts, 1 AS steps FROM messages WHERE id = $1
    UNION ALL
    SELECT m.id, m.parent_id, m.role, m.parts, steps + 1
    FROM messages m JOIN branch ON m.id = branch.parent_id WHERE steps < $2
)
SELECT id, role, parts FROM branch ORDER BY steps
"""
_FILES = """
SELECT l.message_id, a.id, b.key
FROM attachment_links l JOIN attachments a ON a.id = l.attachment_id JOIN blobs b ON b.id = a.blob_id
WHERE l.message_id = ANY($1::uuid[])
"""
_PROJECT_PROMPT = """
SELECT p.prompt FROM messages m JOIN threads t ON t.id = m.thread_id JOIN projects p ON p.id = t.project_id
WHERE m.id = $1
"""
_ROLES: dict[str, Role] = {"USER": "user", "ASSISTANT": "assistant", "SYSTEM": "system"}


async def history(
    database: Database, storage: Storage, message_id: UUID, *, max_chars: int
) -> tuple[PromptMessage, ...]:
    """The messages up to and with this one, as a model gets them; before them what the thread's project tells it.

    Files are named before the text they were sent with, and those of text are quoted, as far as there is room. Answers
    without text (failed before their first word) are left out. Beyond 500 messages or `max_chars` code points the
    oldest are left out, and what is left begins with a user's message; the last message is always there.

    Raises:
        StorageError: a file cannot be read.
    """
    async with database.acquire() as connection:
        rows = await connection.fetch(_BRANCH, message_id, MAX_HISTORY_MESSAGES)
        links = await connection.fetch(_FILES, [row["id"] for row in rows])
        instruction = await connection.fetchval(_PROJECT_PROMPT, message_id)
    keys = {(link["message_id"], link["id"]): link["key"] for link in links}
    newest_first: list[PromptMessage] = []
    left = max_chars
    for row in rows:
        parts = parts_from_json(row["parts"])
        text = parts_text(parts)
        left -= len(text)
        if newest_first and left < 0:
            break
        files: list[str] = []
        for part in parts:
            if isinstance(part, FilePart):
                files.append(await _told(storage, part, keys.get((row["id"], part.attachment_id)), max(left, 0)))
                left -= len(files[-1])
        if text:
            newest_first.append(PromptMessage(_ROLES[row["role"]], "\n\n".join([*files, text])))
    while len(newest_first) > 1 and newest_first[-1].role == "assistant":
        newest_first.pop()
    if instruction:
        newest_first.append(PromptMessage("system", instruction))
    return tuple(reversed(newest_first))


async def estimate_prompt(connection: Connection, message_id: UUID, *, max_chars: int) -> int:
    """About how many tokens `history` will be, without reading a file: in the transaction that writes the question."""
    rows = await connection.fetch(_BRANCH, message_id, MAX_HISTORY_MESSAGES)
    tokens, left = estimate_tokens(await connection.fetchval(_PROJECT_PROMPT, message_id) or ""), max_chars
    for place, row in enumerate(rows):
        parts = parts_from_json(row["parts"])
        text = parts_text(parts)
        left -= len(text)
        if place > 0 and left < 0:
            break
        tokens += estimate_tokens(text) + _TOKENS_PER_MESSAGE
        for part in parts:
            if isinstance(part, FilePart):
                quoted = min(part.size, max(left, 0)) if part.content_type == TEXT else 0
                tokens += quoted // BYTES_PER_TOKEN + _TOKENS_PER_FILE
                left -= quoted
    return tokens


async def _told(storage: Storage, part: FilePart, key: str | None, max_chars: int) -> str:
    """What a model is told about a file.

    Args:
        key: where its bytes are; None where it was deleted.
    """
    named = f'File "{part.name}" ({part.content_type}, {part.size} bytes)'
    if key is None:
        return f"[{named}: deleted since.]"
    if part.content_type != TEXT or max_chars == 0:
        return f"[{named}: its content is not shown here.]"
    text = await _beginning(storage, key, max_chars)
    ending = "The rest of the file is left out" if len(text) > max_chars else "End of the file"
    return f"[{named}:]\n{text[:max_chars]}\n[{ending}.]"


async def _beginning(storage: Storage, key: str, max_chars: int) -> str:
    """A text up to a little more than so many code points."""
    decoder, text, length = codecs.getincrementaldecoder("utf-8")(), list[str](), 0
    async with aclosing(storage.read(key)) as pieces:
        async for piece in pieces:
            text.append(decoder.decode(piece))
            length += len(text[-1])
            if length > max_chars:
                break
    return "".join(text)
