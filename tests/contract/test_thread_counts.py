"""`projects.thread_count` is the count, whatever writers do at once and however they end; its backfill mends it."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from uuid import UUID

import asyncpg
import pytest

from models.database import Database
from models.ids import new_id
from services.backfills.registry import BACKFILLS
from services.backfills.runner import Pace, run_backfill
from tests.conftest import make_database

PROJECTS = 4
WRITERS = 8
CHANGES = 80
THREAD_COUNTS = next(backfill for backfill in BACKFILLS if backfill.name == "thread-counts")

WRONG = """
SELECT count(*) FROM projects WHERE thread_count <> (
    SELECT count(*) FROM threads WHERE project_id = projects.id AND NOT archived AND NOT temporary
)
"""
# Each is one statement, as the services write.
CHANGES_OF_A_THREAD = (
    "UPDATE threads SET project_id = $2 WHERE id = $1",
    "UPDATE threads SET project_id = NULL WHERE id = $1 AND $2::uuid IS NOT NULL",
    "UPDATE threads SET archived = NOT archived WHERE id = $1 AND $2::uuid IS NOT NULL",
    "UPDATE threads SET temporary = NOT temporary WHERE id = $1 AND $2::uuid IS NOT NULL",
    "UPDATE threads SET archived = true, project_id = $2 WHERE id = $1",
    "DELETE FROM threads WHERE id = $1 AND $2::uuid IS NOT NULL",
)


@pytest.fixture(scope="module")
async def migrated(postgres_url: str) -> AsyncIterator[Database]:
    database = Database(await make_database(postgres_url), pool_size=2, timeout_seconds=10)
    await database.migrate()
    await database.connect()
    yield database
    await database.close()


@pytest.fixture
async def database(migrated: Database) -> AsyncIterator[Database]:
    """A database without users."""
    yield migrated
    async with migrated.acquire() as connection:
        await connection.execute("DELETE FROM users")


class Board:
    """One user with a few projects, and all the threads that writers have made."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.owner = new_id()
        self.projects = [new_id() for _ in range(PROJECTS)]
        self.threads: list[UUID] = []
        self.written = 0

    async def begin(self) -> None:
        async with self.database.acquire() as connection:
            await connection.execute("INSERT INTO users (id, anonymous) VALUES ($1, true)", self.owner)
            await connection.executemany(
                "INSERT INTO projects (id, owner_id, name) VALUES ($1, $2, 'P')",
                [(project, self.owner) for project in self.projects],
            )

    async def write(self, seed: int, changes: int = CHANGES) -> None:
        """So many random changes; some are rolled back, some end with the death of their connection."""
        chance = random.Random(seed)
        done = 0
        while done < changes:
            connection = await asyncpg.connect(self.database.url)
            try:
                while done < changes:
                    done += 1
                    await self._change(connection, chance)
            except (asyncpg.AdminShutdownError, asyncpg.ConnectionDoesNotExistError):
                pass
            except asyncpg.InternalServerError as error:
                # PostgreSQL 18, once in some thousand changes beside one that is killed: the change is rolled back.
                if "new multixact has more than one updating member" not in str(error):
                    raise
            finally:
                with contextlib.suppress(OSError, asyncpg.InterfaceError):
                    await connection.close()

    async def _change(self, connection: asyncpg.Connection, chance: random.Random) -> None:
        transaction = connection.transaction()
        await transaction.start()
        project = chance.choice(self.projects)
        added = None
        if not self.threads or chance.random() < 0.4:
            added = new_id()
            await connection.execute(
                """
                INSERT INTO threads (id, owner_id, title, title_source, project_id, archived, temporary)
                VALUES ($1, $2, 'T', 'TEXT', $3, $4, $5)
                """,
                *(added, self.owner, chance.choice([project, None]), chance.random() < 0.2, chance.random() < 0.1),
            )
        else:
            await connection.execute(chance.choice(CHANGES_OF_A_THREAD), chance.choice(self.threads), project)
        end = chance.random()
        if end < 0.1:
            await transaction.rollback()
        elif end < 0.15:
            # Dies with the change in hand.
            await connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")
        else:
            await transaction.commit()
            self.written += 1
            if added is not None:
                self.threads.append(added)

    async def wrong(self) -> int:
        """How many projects have a count that is not theirs."""
        async with self.database.acquire() as connection:
            return int(await connection.fetchval(WRONG))


async def test_counts_are_right_after_any_changes_at_once_rollbacks_and_killed_connections(database: Database) -> None:
    board = Board(database)
    await board.begin()
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        for seed in range(WRITERS):
            group.create_task(board.write(seed))
    assert board.written > WRITERS * CHANGES / 2
    assert await board.wrong() == 0
    async with database.acquire() as connection:
        counts = [row[0] for row in await connection.fetch("SELECT thread_count FROM projects")]
    assert all(count > 0 for count in counts)


async def test_two_threads_that_change_places_do_not_deadlock(database: Database) -> None:
    board = Board(database)
    await board.begin()
    here, there = board.projects[:2]
    threads = [new_id(), new_id()]
    add = "INSERT INTO threads (id, owner_id, title, title_source, project_id) VALUES ($1, $2, 'T', 'TEXT', $3)"
    async with database.acquire() as connection:
        await connection.executemany(add, [(threads[0], board.owner, here), (threads[1], board.owner, there)])

    async def to_and_fro(thread: UUID, places: list[UUID]) -> None:
        connection = await asyncpg.connect(database.url)
        try:
            for turn in range(200):
                await connection.execute(CHANGES_OF_A_THREAD[0], thread, places[turn % 2])
        finally:
            await connection.close()

    async with asyncio.timeout(60):
        await asyncio.gather(to_and_fro(threads[0], [there, here]), to_and_fro(threads[1], [here, there]))
    assert await board.wrong() == 0


async def test_the_backfill_mends_counts_that_were_broken_by_hand_while_writers_go_on(database: Database) -> None:
    board = Board(database)
    await board.begin()
    await board.write(1, changes=50)
    async with database.acquire() as connection:
        # Enough that the backfill has several batches.
        await connection.execute(
            "INSERT INTO projects (id, owner_id, name) SELECT gen_random_uuid(), $1, 'Q' FROM generate_series(1, 100)",
            board.owner,
        )
        await connection.execute("UPDATE projects SET thread_count = thread_count + 1000")
    assert await board.wrong() == PROJECTS + 100
    async with asyncio.timeout(60):
        mending = asyncio.create_task(run_backfill(database, THREAD_COUNTS, Pace(batch_rows=10, rest=1.0)))
        await asyncio.gather(*(board.write(seed) for seed in range(2, 6)))
        progress = await mending
    assert progress.rows_done == PROJECTS + 100
    assert progress.rows_written == PROJECTS + 100
    assert await board.wrong() == 0
