"""A send by one statement: it writes a whole turn of what it was made for, or nothing, whatever others do at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import asyncpg
import orjson
import pytest

from models.database import Database
from models.ids import new_id
from models.pool import _SETTINGS
from services.sends import _BEGIN, _CONTINUE, MAX_MESSAGES, KnownAsker, KnownAskers, Sent, begin_thread, continue_thread
from tests.conftest import make_database
from tests.query_plans import nodes_of

DEADLINE_SECONDS = 20.0
WRITTEN = """
SELECT (SELECT count(*) FROM turns WHERE owner_id = $1), (SELECT count(*) FROM threads WHERE owner_id = $1),
    (SELECT count(*) FROM messages WHERE owner_id = $1), (SELECT count(*) FROM streams WHERE owner_id = $1)
"""
END = """
WITH ended AS (DELETE FROM streams WHERE owner_id = $1)
UPDATE messages SET status = 'COMPLETE' WHERE owner_id = $1
"""
IS_WAITING = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1 AND wait_event_type = 'Lock')"


@pytest.fixture(scope="module")
async def migrated(postgres_url: str) -> AsyncIterator[Database]:
    database = Database(await make_database(postgres_url), pool_size=4, timeout_seconds=DEADLINE_SECONDS)
    await database.migrate()
    await database.connect()
    yield database
    await database.close()


class Asker:
    """A user who asks by the statements themselves."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.id = new_id()

    async def execute(self, query: str, *values: Any) -> None:
        """Run a statement beside all that."""
        async with self.database.acquire() as connection:
            await connection.execute(query, *values)

    async def choose(self, default_model: str) -> None:
        """Have settings."""
        await self.execute(
            """
            INSERT INTO settings (id, owner_id, default_model, title_model, user_name)
            VALUES ($1, $2, $3, 'titles', 'Ada')
            """,
            *(new_id(), self.id, default_model),
        )

    async def written(self) -> tuple[int, ...]:
        """How many turns, threads, messages and streams there are of the user."""
        async with self.database.acquire() as connection:
            return tuple(await connection.fetchrow(WRITTEN, self.id))

    def both(self, thread_id: UUID, text: str) -> tuple[Any, ...]:
        """Parameters of a question."""
        parts = orjson.dumps([{"type": "text", "text": text}]).decode()
        return (self.id, thread_id, new_id(), new_id(), parts, "a-model", new_id(), 7.0, None, 3_600.0)

    async def begin(self, key: str = "first", **assumed: Any) -> Sent | None:
        """Ask in a new thread."""
        async with self.database.acquire() as connection:
            both = self.both(new_id(), "How?")
            return await begin_thread(connection, both, key_of(key, **assumed), "How?", False)

    async def go_on(self, thread_id: UUID, key: str = "next", **assumed: Any) -> Sent | None:
        """Ask at the end of a thread."""
        async with self.database.acquire() as connection:
            return await continue_thread(connection, self.both(thread_id, "And?"), key_of(key, **assumed))

    async def ended(self) -> Sent:
        """A first turn that has ended."""
        sent = await self.begin()
        assert sent is not None
        await self.execute(END, self.id)
        return sent


def key_of(key: str, *, sure: bool = True, named: bool = True, default: str | None = None) -> tuple[Any, ...]:
    """The parameters of a key and of what its asker is taken for."""
    return (new_id(), key, b"print", sure, named, default)


@pytest.fixture
async def asker(migrated: Database) -> Asker:
    one = Asker(migrated)
    await one.execute("INSERT INTO users (id, anonymous) VALUES ($1, true)", one.id)
    return one


async def test_a_question_begins_a_thread_or_goes_on_below_the_end_of_its_path(asker: Asker) -> None:
    first = await asker.ended()
    second = await asker.go_on(first.thread.id)
    assert second is not None
    told = [
        (message.role_name, message.status_name, message.parent_id, message.depth, message.text)
        for message in (first.user_message, first.assistant_message, second.user_message, second.assistant_message)
    ]
    assert told == [
        ("USER", "COMPLETE", None, 0, "How?"),
        ("ASSISTANT", "STREAMING", first.user_message.id, 1, ""),
        ("USER", "COMPLETE", first.assistant_message.id, 2, "And?"),
        ("ASSISTANT", "STREAMING", second.user_message.id, 3, ""),
    ]
    assert await asker.written() == (2, 1, 4, 1)
    async with asker.database.acquire() as connection:
        children = await connection.fetch(
            "SELECT active_child_id FROM messages WHERE thread_id = $1 AND active ORDER BY depth", first.thread.id
        )
    path = (first.assistant_message, second.user_message, second.assistant_message)
    assert [row[0] for row in children] == [*(message.id for message in path), None]


async def test_in_a_thread_without_messages_it_is_the_first(asker: Asker) -> None:
    thread_id = new_id()
    await asker.execute(
        "INSERT INTO threads (id, owner_id, title, title_source) VALUES ($1, $2, 'Empty', 'USER')", thread_id, asker.id
    )
    sent = await asker.go_on(thread_id)
    assert sent is not None
    assert (sent.user_message.depth, sent.user_message.parent_id) == (0, None)


@pytest.mark.parametrize("why", ["taken", "live", "foreign", "missing", "full", "own", "default"])
async def test_where_it_cannot_be_written_nothing_is(asker: Asker, why: str) -> None:
    thread_id, assumed = (await asker.ended()).thread.id, dict[str, Any]()
    match why:
        case "taken":
            assert await asker.go_on(thread_id) is not None
            await asker.execute(END, asker.id)
        case "live":
            assert await asker.go_on(thread_id, "other") is not None
        case "foreign":
            other = Asker(asker.database)
            await other.execute("INSERT INTO users (id, anonymous) VALUES ($1, true)", other.id)
            thread_id = (await other.ended()).thread.id
        case "missing":
            thread_id = new_id()
        case "full":
            await asker.execute(
                "UPDATE messages SET depth = $2 WHERE thread_id = $1 AND depth = 1", thread_id, MAX_MESSAGES - 2
            )
        case "own":
            assumed = {"sure": False}
            columns = "(id, owner_id, provider, ciphertext, last_four)"
            await asker.execute(
                f"INSERT INTO provider_keys {columns} VALUES ($1, $2, 'x', '', '')",
                *(new_id(), asker.id),
            )
        case "default":
            assumed = {"sure": False, "named": False, "default": "what it was"}
            await asker.choose("what it is")
    before = await asker.written()
    assert await asker.go_on(thread_id, **assumed) is None
    assert await asker.written() == before


@pytest.mark.parametrize(
    "assumed",
    [
        {"sure": False},
        {"sure": False, "named": False, "default": "chosen"},
        {"sure": True, "named": False, "default": "another"},
    ],
)
async def test_who_is_as_they_were_taken_for_is_answered(asker: Asker, assumed: dict[str, Any]) -> None:
    await asker.choose("chosen")
    sent = await asker.begin(**assumed)
    assert sent is not None
    assert (sent.title_model, sent.personalization.name) == ("titles", "Ada")


async def test_the_default_of_a_threads_project_goes_before_its_owners(asker: Asker) -> None:
    thread_id, project_id = (await asker.ended()).thread.id, new_id()
    await asker.choose("theirs")
    await asker.execute(
        "INSERT INTO projects (id, owner_id, name, default_model) VALUES ($1, $2, 'P', 'the project''s')",
        *(project_id, asker.id),
    )
    await asker.execute("UPDATE threads SET project_id = $2 WHERE id = $1", thread_id, project_id)
    for default in ("theirs", None):
        assert await asker.go_on(thread_id, sure=False, named=False, default=default) is None
    assert await asker.go_on(thread_id, sure=False, named=False, default="the project's") is not None


async def test_a_thread_that_somebody_has_locked_is_not_waited_for(asker: Asker) -> None:
    thread_id = (await asker.ended()).thread.id
    before = await asker.written()
    async with asker.database.transaction() as beside:
        await beside.execute("SELECT FROM threads WHERE id = $1 FOR UPDATE", thread_id)
        assert await asker.go_on(thread_id) is None
    assert await asker.written() == before
    assert await asker.go_on(thread_id) is not None


@pytest.mark.parametrize("change", ["a turn", "another branch"])
async def test_what_came_between_its_look_and_its_lock_is_seen(asker: Asker, change: str) -> None:
    """It looks, waits for an equal request that fails in the end, and meanwhile the path leads elsewhere."""
    first = await asker.ended()
    thread_id = first.thread.id
    async with asker.database.acquire() as waiting:
        pid = await waiting.fetchval("SELECT pg_backend_pid()")
        beside = await asyncpg.connect(asker.database.url)
        try:
            equal = beside.transaction()
            await equal.start()
            await beside.execute(
                """
                INSERT INTO turns (id, owner_id, idempotency_key, fingerprint, thread_id, user_message_id,
                    assistant_message_id)
                VALUES ($1, $2, 'next', '', $1, $1, $1)
                """,
                *(new_id(), asker.id),
            )
            both = asker.both(thread_id, "Too late")
            sending = asyncio.create_task(continue_thread(waiting, both, key_of("next")))
            async with asyncio.timeout(DEADLINE_SECONDS):
                while not await beside.fetchval(IS_WAITING, pid):
                    await asyncio.sleep(0.005)
                if change == "a turn":
                    assert await asker.go_on(thread_id, "other") is not None
                    await asker.execute(END, asker.id)
                else:
                    # As `selectMessage` does, which writes nothing into the thread itself.
                    await asker.execute("UPDATE messages SET active = false WHERE id = $1", first.assistant_message.id)
                before = await asker.written()
                await equal.rollback()
                assert await sending is None
        finally:
            await beside.close()
    assert await asker.written() == before


async def test_of_equal_requests_at_once_one_is_written(asker: Asker) -> None:
    thread_id = (await asker.ended()).thread.id
    sent = await asyncio.gather(*(asker.go_on(thread_id) for _ in range(8)))
    assert sum(one is not None for one in sent) == 1
    assert await asker.written() == (2, 1, 4, 1)


@pytest.mark.parametrize(("query", "parameters"), [(_BEGIN, 18), (_CONTINUE, 17)])
async def test_its_plan_reads_every_table_by_keys(asker: Asker, query: str, parameters: int) -> None:
    connection = await asyncpg.connect(asker.database.url)
    try:
        await connection.execute(_SETTINGS)
        await connection.execute(f"PREPARE asked AS {query}")
        (told,) = await connection.fetch(f"EXPLAIN (FORMAT JSON) EXECUTE asked ({', '.join(['NULL'] * parameters)})")
    finally:
        await connection.close()
    nodes = list(nodes_of(orjson.loads(told[0])[0]["Plan"]))
    reads = [node for node in nodes if "Relation Name" in node and node["Node Type"] != "ModifyTable"]
    assert reads
    assert [node["Relation Name"] for node in reads if "Index Cond" not in node] == []


def test_of_many_askers_those_who_were_here_last_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.sends._MAX_KNOWN", 2)
    known, ids = KnownAskers(), [new_id() for _ in range(3)]
    for user_id in ids[:2]:
        known.note(user_id, KnownAsker(has_own=False, default_model=None))
    assert known.get(ids[0]) is not None
    known.note(ids[2], KnownAsker(has_own=True, default_model="a-model"))
    assert [known.get(user_id) is not None for user_id in ids] == [True, False, True]
