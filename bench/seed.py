"""The rows that all servers read: one user with 1,000 threads. The same at every run, but for ids and times."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from uuid import UUID

import asyncpg

from models.ids import new_id
from models.parts import TextPart, parts_to_json

_THREADS = 1_000
_LONG_THREADS = 50
_LONG_MESSAGES = 40
_SHORT_MESSAGES = 2
_PINNED = 3
_PROJECTS = 20
# One thread in so many is in no project.
_LOOSE = 5
_QUESTION_WORDS = 14
_ANSWER_WORDS = 90
_TEXT = (
    "a the of and in to is that for with as by on it from this are be or an which at not can has more one "
    "stream cursor message thread model answer reader server database row index page token event buffer "
    "because while before after however every another whole often slowly exactly once again together"
)
_WORDS = _TEXT.split()


async def seed(database_url: str, owner_id: UUID) -> None:
    """Give a user 20 projects and threads, four of five in one of them.

    The 50 threads that were active last have 40 messages each, the others 2.

    Args:
        database_url: a database that has the tables.
        owner_id: a user that exists.
    """
    words = random.Random(20)
    began = datetime.now(UTC) - timedelta(days=30)
    projects = [(new_id(), owner_id, _sentence(words, 2).capitalize()) for _ in range(_PROJECTS)]
    threads: list[tuple[object, ...]] = []
    messages: list[tuple[object, ...]] = []
    for number in range(_THREADS):
        thread_id = new_id()
        at = began + timedelta(minutes=40 * number, microseconds=words.randrange(1, 1_000_000))
        title = _sentence(words, 6).capitalize()
        count = _LONG_MESSAGES if number >= _THREADS - _LONG_THREADS else _SHORT_MESSAGES
        project_id = words.choice(projects)[0] if number % _LOOSE else None
        threads.append((thread_id, owner_id, project_id, title, "TEXT", number >= _THREADS - _PINNED, at, at))
        parent_id = None
        for depth in range(count):
            key = new_id()
            role, length = ("ASSISTANT", _ANSWER_WORDS) if depth % 2 else ("USER", _QUESTION_WORDS)
            parts = parts_to_json([TextPart(_sentence(words, length))])
            said_at = at + timedelta(seconds=20 * depth)
            messages.append(
                (key, owner_id, thread_id, parent_id, depth, True, role, "COMPLETE", parts, said_at, said_at)
            )
            parent_id = key
    connection = await asyncpg.connect(database_url)
    try:
        await connection.copy_records_to_table("projects", records=projects, columns=["id", "owner_id", "name"])
        await connection.copy_records_to_table(
            "threads",
            records=threads,
            columns=["id", "owner_id", "project_id", "title", "title_source", "pinned", "created_at", "updated_at"],
        )
        await connection.copy_records_to_table(
            "messages",
            records=messages,
            columns=[
                *("id", "owner_id", "thread_id", "parent_id", "depth", "active", "role", "status", "parts"),
                *("created_at", "updated_at"),
            ],
        )
        await connection.execute("VACUUM ANALYZE")
    finally:
        await connection.close()


def _sentence(words: random.Random, length: int) -> str:
    return " ".join(words.choices(_WORDS, k=length))
