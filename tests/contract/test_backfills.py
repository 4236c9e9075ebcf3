"""A backfill does every row once, however often it is cut off, and writers beside it hardly notice."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import asyncpg
import pytest

from models.database import Database, DatabaseUnavailableError
from models.ids import new_id
from server.runtime import Server
from services.backfills.registry import BACKFILLS
from services.backfills.runner import (
    Backfill,
    BackfillProgress,
    BackfillRunningError,
    Pace,
    backfill_states,
    run_backfill,
)
from services.seed import SeedPlan, seed
from tests.conftest import make_database, test_settings

ROWS = 300
PACE = Pace(batch_rows=7, rest=0.0)


async def count(connection: asyncpg.Connection) -> int:
    return int(await connection.fetchval("SELECT count(*) FROM items"))


async def add_one(connection: asyncpg.Connection, position: str | None, limit: int) -> tuple[str | None, int]:
    """Not harmless to do twice, so that a second time is seen."""
    rows = await connection.fetch(
        """
        UPDATE items SET done = done + 1 WHERE id IN (SELECT id FROM items WHERE id > $1 ORDER BY id LIMIT $2)
        RETURNING id
        """,
        int(position or 0),
        limit,
    )
    last = max((row["id"] for row in rows), default=None)
    return None if last is None else str(last), len(rows)


ADD_ONE = Backfill("add-one", "Adds one to every item.", count, add_one)


@pytest.fixture(scope="module")
async def migrated(postgres_url: str) -> AsyncIterator[Database]:
    database = Database(await make_database(postgres_url), pool_size=5, timeout_seconds=10)
    await database.migrate()
    await database.connect()
    yield database
    await database.close()


@pytest.fixture
async def database(migrated: Database) -> AsyncIterator[Database]:
    """A database with 300 items, in which no backfill was run."""
    async with migrated.acquire() as connection:
        await connection.execute("CREATE TABLE items (id int PRIMARY KEY, done int NOT NULL DEFAULT 0)")
        await connection.execute("INSERT INTO items (id) SELECT generate_series(1, $1::int)", ROWS)
    yield migrated
    async with migrated.acquire() as connection:
        await connection.execute("DROP TABLE items; DELETE FROM backfills; DELETE FROM users")


async def times_done(database: Database) -> set[int]:
    async with database.acquire() as connection:
        return {row["done"] for row in await connection.fetch("SELECT DISTINCT done FROM items")}


async def test_a_run_does_every_row_once_and_says_how_many(database: Database) -> None:
    told: list[BackfillProgress] = []
    progress = await run_backfill(database, ADD_ONE, PACE, tell=told.append)
    assert await times_done(database) == {1}
    assert progress == BackfillProgress(ROWS, ROWS, ROWS)
    assert [one.rows_done for one in told] == sorted(one.rows_done for one in told)
    assert told[0].rows_done == 0
    async with database.acquire() as connection:
        state = (await backfill_states(connection, ["add-one"]))[0]
    assert state.rows_done == ROWS
    assert state.finished_at is not None


async def test_one_that_has_ended_is_run_again_only_from_the_start(database: Database) -> None:
    await run_backfill(database, ADD_ONE, PACE)
    await run_backfill(database, ADD_ONE, PACE)
    assert await times_done(database) == {1}
    progress = await run_backfill(database, ADD_ONE, PACE, restart=True)
    assert await times_done(database) == {2}
    assert progress.rows_done == ROWS


async def test_runs_that_are_cut_off_anywhere_do_every_row_once_together(database: Database) -> None:
    chance = random.Random(7)
    cuts = 0

    async def slow(connection: asyncpg.Connection, position: str | None, limit: int) -> tuple[str | None, int]:
        """Dies now and then, before or behind what it writes; its caller is told at once, or is cut off itself."""
        fate = chance.random()
        if fate < 0.1:
            await connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")
        result = await add_one(connection, position, limit)
        if fate > 0.9:
            await connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")
        if 0.4 < fate < 0.5:
            raise asyncio.CancelledError
        return result

    async with asyncio.timeout(60):
        while True:
            try:
                progress = await run_backfill(database, Backfill("add-one", "", count, slow), PACE)
                break
            except (DatabaseUnavailableError, asyncio.CancelledError):
                cuts += 1
    assert cuts > 5
    assert progress.rows_done == ROWS
    assert await times_done(database) == {1}


async def test_a_second_runner_of_the_same_backfill_is_sent_away(database: Database) -> None:
    inside, go_on = asyncio.Event(), asyncio.Event()

    async def waits(connection: asyncpg.Connection, position: str | None, limit: int) -> tuple[str | None, int]:
        inside.set()
        await go_on.wait()
        return await add_one(connection, position, limit)

    first = asyncio.create_task(run_backfill(database, Backfill("add-one", "", count, waits), PACE))
    await inside.wait()
    with pytest.raises(BackfillRunningError):
        await run_backfill(database, ADD_ONE, PACE)
    # Another one is no matter.
    await run_backfill(database, Backfill("add-two", "", count, add_one), PACE)
    go_on.set()
    await first
    assert await times_done(database) == {2}


async def test_a_dry_run_tells_what_would_be_written_and_writes_nothing(database: Database) -> None:
    progress = await run_backfill(database, ADD_ONE, PACE, dry_run=True)
    assert (progress.rows_done, progress.rows_written) == (ROWS, ROWS)
    assert await times_done(database) == {0}
    async with database.acquire() as connection:
        assert await connection.fetchval("SELECT count(*) FROM backfills WHERE name = 'add-one'") == 0


async def test_a_batch_that_waits_for_a_lock_gives_way_and_is_tried_again(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.backfills.runner._LOCK_SECONDS", 0.1)
    gave_way = asyncio.Event()

    async def watched(connection: asyncpg.Connection, position: str | None, limit: int) -> tuple[str | None, int]:
        try:
            return await add_one(connection, position, limit)
        except asyncpg.LockNotAvailableError:
            gave_way.set()
            raise

    async with database.transaction() as writer:
        await writer.execute("UPDATE items SET done = done WHERE id = 100")
        run = asyncio.create_task(run_backfill(database, Backfill("add-one", "", count, watched), PACE))
        async with asyncio.timeout(30):
            await gave_way.wait()
    progress = await run
    assert progress.rows_done == ROWS
    assert await times_done(database) == {1}


async def test_a_server_ends_what_a_migration_asked_for(database: Database, tmp_path: Path) -> None:
    owner = new_id()
    async with database.acquire() as connection:
        await connection.execute("INSERT INTO users (id, anonymous) VALUES ($1, true)", owner)
        await connection.execute(
            "INSERT INTO projects (id, owner_id, name, thread_count) VALUES ($1, $2, 'P', 7)", new_id(), owner
        )
        # What a migration writes; and one of a newer version, which is nobody's business.
        await connection.execute("INSERT INTO backfills (name) VALUES ('thread-counts'), ('of-tomorrow')")
    server = Server(test_settings(database.url, tmp_path))
    await server.start()
    try:
        async with asyncio.timeout(30), database.acquire() as connection:
            while not await connection.fetchval(
                "SELECT finished_at IS NOT NULL FROM backfills WHERE name = 'thread-counts'"
            ):
                await asyncio.sleep(0.05)
            assert await connection.fetchval("SELECT thread_count FROM projects") == 0
            assert await connection.fetchval("SELECT finished_at IS NULL FROM backfills WHERE name = 'of-tomorrow'")
    finally:
        await server.drain()
        await server.close()


@pytest.mark.parametrize("backfill", BACKFILLS, ids=lambda backfill: backfill.name)
async def test_every_backfill_leaves_good_data_as_it_is_and_a_dry_run_changes_nothing_at_all(
    database: Database, backfill: Backfill
) -> None:
    await seed(database, SeedPlan(users=5, threads=20, messages=200, seed=3, now=datetime.now(UTC)))
    async with database.session(statement_seconds=30) as connection:

        async def everything(but: str = "") -> dict[str, int]:
            tables = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
            return {
                table: await connection.fetchval(
                    # Without the generated ids: a backfill may write a row anew.
                    f"SELECT coalesce(sum(hashtextextended((to_jsonb(t) - '{but}')::text, 0)), 0) FROM {table} t"
                )
                for (table,) in tables
                if table != "backfills"
            }

        before, before_but_ids = await everything(), await everything("id")
        await run_backfill(database, backfill, PACE, dry_run=True)
        assert await everything() == before
        progress = await run_backfill(database, backfill, PACE)
        assert progress.rows_done > 0
        assert await everything("id") == before_but_ids
