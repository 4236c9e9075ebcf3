"""Search reads by index, on rows of many users; and PostgreSQL and Python take a text apart alike."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import AsyncIterator
from uuid import UUID

import asyncpg
import pytest

from bench.search_data import fill
from models.database import Database
from services import search
from services.backfills.search_documents import run_batch
from services.paging import LAST_ID
from services.search_query import document_query, lexeme, one_slip_away, parse_query, words_of
from tests.conftest import make_database

ANYWHERE = (None, None, None, False, None, None)
# Tables that are small in no real database.
LARGE = ("search_documents", "messages", "threads")


@pytest.fixture(scope="module")
async def filled(postgres_url: str) -> tuple[str, list[UUID]]:
    """A database of 8,000 messages of 40 users, the first with 1,000 of them; and the users."""
    database = Database(await make_database(postgres_url), pool_size=2, timeout_seconds=60)
    await database.migrate()
    return database.url, await fill(database.url, messages=8_000, users=40, heavy=1_000)


@pytest.fixture
async def connection(filled: tuple[str, list[UUID]]) -> AsyncIterator[asyncpg.Connection]:
    """A connection to it; what a test writes is not kept."""
    connection = await asyncpg.connect(filled[0])
    transaction = connection.transaction()
    await transaction.start()
    yield connection
    await transaction.rollback()
    await connection.close()


async def plan(connection: asyncpg.Connection, query: str, *arguments: object) -> str:
    """How PostgreSQL runs a query: as often asked with other arguments too, and as asked with these for once."""
    plans = []
    for mode in ("force_custom_plan", "force_generic_plan"):
        await connection.execute(f"SET LOCAL plan_cache_mode = {mode}")
        plans += [row[0] for row in await connection.fetch(f"EXPLAIN (ANALYZE) {query}", *arguments)]
    return "\n".join(plans)


def scanned(plan: str) -> set[str]:
    """The large tables that are read from end to end."""
    return {table for table in LARGE if re.search(rf"Seq Scan on {table}\b", plan)}


@pytest.mark.parametrize("heavy", [True, False])
@pytest.mark.parametrize("query", ["fi vi", "be", "plda -mira", '"fi vi be"', "zobusafa", "sorodi relil"])
async def test_what_is_looked_for_is_found_by_index(
    connection: asyncpg.Connection, filled: tuple[str, list[UUID]], query: str, heavy: bool
) -> None:
    owner = filled[1][0 if heavy else 7]
    pattern = document_query(owner, parse_query(query), {})
    found = await plan(connection, search._FIND, owner, pattern, *ANYWHERE, float("inf"), LAST_ID, 26)
    assert "Bitmap Index Scan on search_documents_words" in found
    assert scanned(found) == set(), found


async def test_misspelt_words_are_compared_by_index(
    connection: asyncpg.Connection, filled: tuple[str, list[UUID]]
) -> None:
    owner, word = filled[1][7], "zobusaffa"
    guesses = one_slip_away(word)
    known = await plan(connection, search._IS_KNOWN, owner, document_query(owner, parse_query(word), {}), *ANYWHERE)
    guessed = await plan(connection, search._KNOWN, owner, guesses, [lexeme(owner, guess) for guess in guesses])
    for found in (known, guessed):
        assert "Bitmap Index Scan on search_documents_words" in found
        assert scanned(found) == set(), found
    recent = await plan(connection, search._RECENT_WORDS, owner, 7, 11)
    assert scanned(recent) == set(), recent


async def test_a_plan_that_reads_a_table_would_be_noticed(connection: asyncpg.Connection) -> None:
    assert scanned(await plan(connection, "SELECT * FROM messages WHERE parts IS NOT NULL")) == {"messages"}


async def test_a_backfill_makes_what_the_triggers_would_have_made(
    connection: asyncpg.Connection, filled: tuple[str, list[UUID]]
) -> None:
    kept = "SELECT id, owner_id, thread_id, message_id, document::text FROM search_documents ORDER BY id"
    await connection.execute("DELETE FROM threads WHERE owner_id <> ALL($1::uuid[])", filled[1][5:8])
    before = await connection.fetch(kept)
    assert len(before) > 500
    await connection.execute("DELETE FROM search_documents WHERE message_id IS NULL OR id > $1", before[100]["id"])
    assert await connection.fetch(kept) != before
    rows = "SELECT (SELECT count(*) FROM threads) + (SELECT count(*) FROM messages)"
    assert await run_through(connection, 100) == await connection.fetchval(rows)
    assert await connection.fetch(kept) == before
    versions = "SELECT id, xmin::text FROM search_documents ORDER BY id"
    first = await connection.fetch(versions)
    await run_through(connection, 1_000)
    assert await connection.fetch(versions) == first, "what is there is not made again"


async def test_a_backfill_passes_by_what_is_not_searched(connection: asyncpg.Connection) -> None:
    await connection.execute("UPDATE threads SET temporary = true")
    await connection.execute("UPDATE messages SET status = 'STREAMING' WHERE depth = 0")
    await connection.execute("DELETE FROM search_documents")
    await run_through(connection, 10_000)
    assert await connection.fetchval("SELECT count(*) FROM search_documents") == 0


async def run_through(connection: asyncpg.Connection, limit: int) -> int:
    """The whole backfill; how many rows it saw."""
    position, seen = await run_batch(connection, None, limit)
    while position is not None:
        position, more = await run_batch(connection, position, limit)
        seen += more
    return seen


async def in_sql(connection: asyncpg.Connection, text: str) -> list[str]:
    words = (await connection.fetchval("SELECT search_words($1)", text)).split(" ")
    return [word[:64] for word in words if word]


async def test_every_character_is_the_same_kind_to_postgresql_and_python(connection: asyncpg.Connection) -> None:
    """All that Python knows; of letters younger than its Unicode only PostgreSQL knows the lower case."""
    characters = [
        chr(code) for code in range(1, sys.maxunicode + 1) if unicodedata.category(chr(code)) not in ("Cs", "Cn", "Co")
    ]
    assert len(characters) > 140_000
    for at in range(0, len(characters), 3_000):
        text = "".join(f"a{character}b c{character} " for character in characters[at : at + 3_000])
        assert await in_sql(connection, text) == words_of(text)
