"""A migration loses nothing, happens once, and is whole or has not begun."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest

from models.database import Database
from models.ids import IdKind, outside_id
from server.runtime import Server
from services.viewer import Sessions
from tests.api.test_changes import mutate
from tests.client import connect
from tests.conftest import make_database, test_settings
from tests.scripts import SCRIPTS, TextDelta

ROOT = Path(__file__).parents[2]
NAMES = sorted(file.stem for file in (ROOT / "models/migrations").glob("[0-9]*.py"))
PREVIOUS_RELEASE = "0001_initial"

FILL = (ROOT / "tests/contract/previous_release.sql").read_text()
# Every event once, in the quarter of an hour it belongs to, however the rollup is kept.
ROLLUP_DIFFERENCES = """
SELECT count(*) FROM (
    SELECT owner_id, to_timestamp(floor(extract(epoch FROM created_at) / 900) * 900) AS began_at, model,
        count(*) AS requests, sum(prompt_tokens) AS prompt, sum(completion_tokens) AS completion,
        sum(reasoning_tokens) AS reasoning, sum(cached_tokens) AS cached
    FROM usage_events GROUP BY 1, 2, 3
) summed FULL JOIN usage_quarters USING (owner_id, began_at, model)
WHERE (summed.requests, prompt, completion, reasoning, cached) IS DISTINCT FROM
    (usage_quarters.requests, prompt_tokens, completion_tokens, reasoning_tokens, cached_tokens)
"""


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(url)
    try:
        yield connection
    finally:
        await connection.close()


def database_at(url: str) -> Database:
    return Database(url, pool_size=2, timeout_seconds=10)


async def applied(url: str) -> list[str]:
    """The names of the migrations in the order in which they were applied."""
    async with connected(url) as connection:
        return [row["name"] for row in await connection.fetch("SELECT name FROM tortoise_migrations ORDER BY id")]


async def columns_of(connection: asyncpg.Connection) -> dict[str, list[str]]:
    """The columns of every table, Tortoise's own left out."""
    rows = await connection.fetch(
        """
        SELECT table_name, array_agg(column_name::text ORDER BY ordinal_position) AS names
        FROM information_schema.columns WHERE table_schema = 'public' AND table_name <> 'tortoise_migrations' GROUP BY 1
        """
    )
    return {row["table_name"]: row["names"] for row in rows}


async def contents(connection: asyncpg.Connection, columns: dict[str, list[str]]) -> dict[str, tuple[int, int]]:
    """Of every table: how many rows, and a sum of hashes of these columns of each of them."""
    found = {}
    for table, names in columns.items():
        row = ", ".join(f'"{name}"' for name in names)
        found[table] = tuple(
            await connection.fetchrow(
                f"SELECT count(*), coalesce(sum(hashtextextended(ROW({row})::text, 0)), 0) FROM {table}"
            )
        )
    return found


async def test_100_000_messages_of_the_previous_release_are_all_there_after_the_migration(
    postgres_url: str, tmp_path: Path
) -> None:
    url = await make_database(postgres_url, empty=True)
    database = database_at(url)
    assert await database.migrate(to=PREVIOUS_RELEASE) == [PREVIOUS_RELEASE]
    async with connected(url) as connection:
        await connection.execute(FILL)
        columns = await columns_of(connection)
        before = await contents(connection, columns)
        owner, thread = await connection.fetchrow(
            "SELECT owner_id, id FROM threads ORDER BY pinned DESC, updated_at DESC, id DESC LIMIT 1"
        )
    assert before["messages"][0] == 100_000
    assert {table for table, (rows, _) in before.items() if rows == 0} == {"streams", "stream_checkpoints"}

    began = time.monotonic()
    assert await database.migrate() == NAMES[1:]
    print(f"A database with 100,000 messages was migrated in {time.monotonic() - began:.2f} s.")

    async with connected(url) as connection:
        assert await contents(connection, columns) == before
        assert await connection.fetchval(ROLLUP_DIFFERENCES) == 0
        assert await connection.fetchval("SELECT sum(requests) FROM usage_quarters") == before["usage_events"][0]

    settings = test_settings(url, tmp_path)
    server = Server(settings)
    await server.start()
    try:
        async with connect(server.address) as client:
            sessions = Sessions(server.database, secret=str(settings.session_secret), ttl_seconds=600, allowed=True)
            client.token = sessions.session_of(owner).token
            listed = await client.run(
                "{ threads(first: 1) { nodes { id title messages(last: 3) { nodes { role status text } } } } }"
            )
            assert listed["threads"]["nodes"][0]["id"] == outside_id(IdKind.THREAD, thread)
            messages = listed["threads"]["nodes"][0]["messages"]["nodes"]
            assert [message["role"] for message in messages] == ["ASSISTANT", "USER", "ASSISTANT"]
            assert messages[1]["text"].startswith("Question ")
            turn = await client.send("still here?", model="scripted-echo", threadId=outside_id(IdKind.THREAD, thread))
            assert (await client.finish(turn["assistantMessage"]["id"]))["status"] == "COMPLETE"
    finally:
        await server.drain()
        await server.close()


async def test_migrations_begun_at_once_are_applied_once_and_all_succeed(postgres_url: str) -> None:
    url = await make_database(postgres_url, empty=True)
    program = (
        "import asyncio, sys; from models.database import Database; "
        "print(*asyncio.run(Database(sys.argv[1], pool_size=2, timeout_seconds=30).migrate()))"
    )
    processes = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", program, url), cwd=ROOT, stdout=asyncio.subprocess.PIPE
        )
        for _ in range(3)
    ]
    here = [asyncio.create_task(database_at(url).migrate()) for _ in range(2)]
    async with asyncio.timeout(60):
        outputs = await asyncio.gather(*(process.communicate() for process in processes))
        found = [output.decode().split() for output, _ in outputs] + list(await asyncio.gather(*here))
    assert [process.returncode for process in processes] == [0, 0, 0]
    # One of the five did all, the others found it done.
    assert sorted(found) == [[], [], [], [], NAMES]
    assert await applied(url) == NAMES


async def test_a_migration_that_fails_midway_leaves_nothing_and_can_be_applied_later(postgres_url: str) -> None:
    url = await make_database(postgres_url, empty=True)
    database = database_at(url)
    await database.migrate(to=PREVIOUS_RELEASE)
    async with connected(url) as connection:
        before = await columns_of(connection)
        # In the way of its last operation, behind all new tables and columns.
        await connection.execute("CREATE INDEX threads_expiring ON users (created_at)")
        with pytest.raises(Exception, match="threads_expiring"):
            await database.migrate()
        assert await columns_of(connection) == before
        assert await applied(url) == [PREVIOUS_RELEASE]
        await connection.execute("DROP INDEX threads_expiring")
    assert await database.migrate() == NAMES[1:]
    assert await applied(url) == NAMES


async def blocked(connection: asyncpg.Connection, table: str) -> None:
    """Wait until somebody waits for a lock of a table."""
    async with asyncio.timeout(30):
        while not await connection.fetchval(
            "SELECT EXISTS (SELECT FROM pg_locks WHERE relation = $1::regclass AND NOT granted)", table
        ):
            await asyncio.sleep(0.01)


async def test_a_migration_that_is_killed_midway_leaves_nothing_and_can_be_applied_later(postgres_url: str) -> None:
    url = await make_database(postgres_url, empty=True)
    await database_at(url).migrate(to=PREVIOUS_RELEASE)
    async with connected(url) as connection, connected(url) as watcher:
        before = await columns_of(connection)
        async with connection.transaction():
            # It alters this table behind others: here it stands, with a part of it done.
            await connection.execute("LOCK TABLE usage_events IN ACCESS SHARE MODE")
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c"),
                "import asyncio, sys; from models.database import Database; "
                "asyncio.run(Database(sys.argv[1], pool_size=2, timeout_seconds=30).migrate())",
                url,
                cwd=ROOT,
            )
            await blocked(watcher, "usage_events")
            process.kill()
            assert await process.wait() == -signal.SIGKILL
        assert await database_at(url).migrate() == NAMES[1:]
        assert before.keys() < (await columns_of(connection)).keys()
    assert await applied(url) == NAMES


async def test_a_migration_lets_statements_pass_that_came_while_it_waited_for_a_table(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.migrating._TABLE_LOCK_SECONDS", 0.2)
    url = await make_database(postgres_url, empty=True)
    await database_at(url).migrate(to=PREVIOUS_RELEASE)
    async with connected(url) as slow, connected(url) as watcher, connected(url) as request:
        transaction = slow.transaction()
        await transaction.start()
        await slow.execute("LOCK TABLE usage_events IN ACCESS SHARE MODE")
        migrating = asyncio.create_task(database_at(url).migrate())
        await blocked(watcher, "usage_events")
        # Stands behind the waiting migration, which gives way.
        assert await request.fetchval("SELECT count(*) FROM usage_events", timeout=10) == 0
        assert not migrating.done()
        await transaction.rollback()
        assert await migrating == NAMES[1:]


async def test_a_database_that_a_newer_version_migrated_is_left_as_it_is(postgres_url: str) -> None:
    url = await make_database(postgres_url, empty=True)
    database = database_at(url)
    await database.migrate()
    async with connected(url) as connection:
        await connection.execute(
            "INSERT INTO tortoise_migrations (app, name, applied_at) VALUES ('threadgraph', '9999_future', now())"
        )
        before = await columns_of(connection)
        assert await database.migrate() == []
        assert await columns_of(connection) == before


async def test_statements_of_the_previous_release_work_on_the_tables_of_this_one(postgres_url: str) -> None:
    url, old = await make_database(postgres_url, empty=True), await make_database(postgres_url, empty=True)
    database = database_at(url)
    await database_at(old).migrate(to=PREVIOUS_RELEASE)
    await database.migrate()
    async with connected(old) as before, connected(url) as after:
        columns = await columns_of(before)
        there_are = await columns_of(after)
        for table, names in columns.items():
            assert set(names) <= set(there_are[table]), "a server of the release before reads and writes them"
        # Fewer rows than above, and with every trigger and every check of what belongs together.
        written = FILL.replace("SET LOCAL session_replication_role = replica;", "").replace("99999", "1999")
        assert written.count("1999") == 1
        await after.execute(written)
        await before.execute(written)
        of_old = await contents(before, columns)
        assert await contents(after, columns) == of_old
        assert of_old["messages"][0] == 2_000
        assert await after.fetchval(ROLLUP_DIFFERENCES) == 0


async def test_a_server_goes_on_while_a_newer_version_adds_to_its_tables(postgres_url: str, tmp_path: Path) -> None:
    url = await make_database(postgres_url, empty=True)
    server = Server(test_settings(url, tmp_path, database_pool_size=3), providers=SCRIPTS.models())
    await server.start()
    try:
        async with connect(server.address) as client:
            await client.sign_in()

            async def use(question: str) -> None:
                """Statements that the connections of the server have prepared by the second time."""
                turn = await client.send(question, model="driven")
                queue = SCRIPTS.driven.queue(question)
                async with client.reading(turn["assistantMessage"]["id"]) as reading:
                    queue.put_nowait(TextDelta("a word"))
                    await reading.next()
                    if question == "during":
                        await add()
                    queue.put_nowait(None)
                    events = [event async for event in reading.events()]
                assert events[-1]["message"]["status"] == "COMPLETE"
                thread_id = turn["thread"]["id"]
                assert len(await client.path(thread_id)) == 2
                for name, given in (
                    ("renameThread", {"threadId": thread_id, "title": question}),
                    ("pinThread", {"threadId": thread_id, "pinned": True}),
                    ("createProject", {"name": question}),
                    ("updateSettings", {"defaultModelId": "two-words"}),
                    ("shareThread", {"threadId": thread_id}),
                    ("deleteThread", {"threadId": thread_id}),
                ):
                    await mutate(client, name, given)
                await client.run(
                    "{ threads { nodes { id } } projects { nodes { id } } settings { defaultModel { id } } }"
                )
                await client.run('{ usage(timeframe: DAY, timezone: "UTC") { totals { requests } } }')

            async def add() -> None:
                async with connected(url) as beside:
                    for table in await columns_of(beside):
                        await beside.execute(
                            f"ALTER TABLE {table} ADD COLUMN from_the_future text NOT NULL DEFAULT 'x'"
                        )
                        await beside.execute(f"ALTER TABLE {table} ADD COLUMN and_this text")

            for question in ("before", "before, too", "during", "after", "and after"):
                await use(question)
    finally:
        await server.drain()
        await server.close()
