"""The pool of connections: bounded, with deadlines, and nobody is given a connection that somebody left in a mess."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import asyncpg
import pytest

from models.database import Database, DatabaseUnavailableError
from models.pool import ConnectionPool
from tests.conftest import make_database


@pytest.fixture(scope="session")
async def url(postgres_url: str) -> str:
    return await make_database(postgres_url, empty=True)


@pytest.fixture
async def pool(url: str) -> AsyncIterator[ConnectionPool]:
    pool = ConnectionPool(url, size=2, timeout_seconds=20)
    try:
        yield pool
    finally:
        await pool.close(5)


@pytest.fixture
async def database(url: str) -> AsyncIterator[Database]:
    database = Database(url, pool_size=1, timeout_seconds=20)
    await database.connect()
    try:
        yield database
    finally:
        await database.close()


async def session_of(pool: ConnectionPool) -> int:
    connection = await pool.acquire()
    pid: int = await connection.fetchval("SELECT pg_backend_pid()")
    pool.release(connection, clean=True)
    return pid


async def test_the_connection_that_was_used_last_is_used_next_and_more_are_opened_only_when_needed(
    pool: ConnectionPool,
) -> None:
    assert {await session_of(pool) for _ in range(5)} == {await session_of(pool)}
    assert (pool.opened, pool.idle) == (1, 1)
    one, two = await pool.acquire(), await pool.acquire()
    assert one is not two
    assert (pool.opened, pool.idle) == (2, 0)
    pool.release(one, clean=True)
    pool.release(two, clean=True)
    assert await pool.acquire() is two
    pool.release(two, clean=True)


async def test_who_waits_gets_a_connection_in_turn(pool: ConnectionPool) -> None:
    held = [await pool.acquire() for _ in range(2)]
    order: list[int] = []

    async def use(number: int) -> None:
        connection = await pool.acquire()
        order.append(number)
        await connection.fetchval("SELECT 1")
        pool.release(connection, clean=True)

    users = []
    for number in range(10):
        users.append(asyncio.create_task(use(number)))
        await asyncio.sleep(0)
    assert (order, pool.opened) == ([], 2)
    pool.release(held[0], clean=True)
    await asyncio.gather(*users)
    assert order == list(range(10))
    pool.release(held[1], clean=True)


async def test_who_has_left_the_queue_takes_nothing_with_them(pool: ConnectionPool) -> None:
    held = [await pool.acquire() for _ in range(2)]
    gone, stays = asyncio.create_task(pool.acquire()), asyncio.create_task(pool.acquire())
    await asyncio.sleep(0)
    # At once: the connection is on its way to one who is being cancelled.
    pool.release(held[0], clean=True)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    assert await stays is held[0]
    pool.release(held[0], clean=True)
    pool.release(held[1], clean=True)
    assert (pool.opened, pool.idle) == (2, 2)


async def test_nobody_waits_longer_than_the_deadline(url: str) -> None:
    pool = ConnectionPool(url, size=1, timeout_seconds=0.2)
    held = await pool.acquire()
    with pytest.raises(TimeoutError):
        await pool.acquire()
    pool.release(held, clean=True)
    assert await pool.acquire() is held
    pool.release(held, clean=True)
    await pool.close(5)


async def test_a_connection_that_is_lost_makes_room_for_another(pool: ConnectionPool) -> None:
    held = [await pool.acquire() for _ in range(2)]
    waiting = asyncio.create_task(pool.acquire())
    await asyncio.sleep(0)
    held[0].terminate()
    pool.release(held[0], clean=True)
    fresh = await waiting
    assert await fresh.fetchval("SELECT 1") == 1
    for connection in (held[1], fresh):
        pool.release(connection, clean=True)
    # One that is lost while nobody uses it.
    fresh.terminate()
    assert await session_of(pool)
    assert await session_of(pool)
    assert pool.opened <= 2


async def test_a_connection_that_cannot_be_opened_lets_the_next_one_try(url: str) -> None:
    pool = ConnectionPool(url.replace("/test_", "/missing_"), size=1, timeout_seconds=5)
    refused = await asyncio.gather(*(pool.acquire() for _ in range(3)), return_exceptions=True)
    assert {type(error) for error in refused} == {asyncpg.InvalidCatalogNameError}
    assert pool.opened == 0
    await pool.close(5)


async def sleep_in_a_transaction(database: Database) -> None:
    async with database.transaction() as connection:
        await connection.execute("CREATE TABLE left_behind (x int)")
        await connection.execute("SELECT pg_sleep(20)")


async def test_a_connection_plans_each_statement_once_also_after_it_was_left_in_a_mess(url: str) -> None:
    pool = ConnectionPool(url, size=1, timeout_seconds=20)
    try:
        connection = await pool.acquire()
        assert await connection.fetchval("SHOW plan_cache_mode") == "force_generic_plan"
        await connection.execute("BEGIN; SET LOCAL plan_cache_mode = auto")
        pool.release(connection, clean=False)
        again = await pool.acquire()
        assert again is connection
        assert await again.fetchval("SHOW plan_cache_mode") == "force_generic_plan"
        assert await again.fetchval("SHOW enable_seqscan") == "off"
        pool.release(again, clean=True)
    finally:
        await pool.close(5)


async def test_what_a_cancelled_request_left_behind_is_gone(database: Database) -> None:
    request = asyncio.create_task(sleep_in_a_transaction(database))
    sleeping = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()"
    async with database.session() as beside:
        while not await beside.fetchval(sleeping):
            await asyncio.sleep(0.005)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    async with database.acquire() as connection:
        assert not connection.is_in_transaction()
        assert await connection.fetchval("SELECT to_regclass('left_behind')") is None


async def test_a_request_can_be_cancelled_anywhere_in_its_transaction(database: Database) -> None:
    complaints: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, complaint: complaints.append(complaint))

    async def a_transaction() -> None:
        async with database.transaction() as connection:
            await connection.execute("SELECT 1")

    for ticks in range(300):
        request = asyncio.create_task(a_transaction())
        for _ in range(ticks):
            await asyncio.sleep(0)
        request.cancel()
        await asyncio.wait([request])
        async with database.acquire() as connection:
            assert not connection.is_in_transaction()
            assert await connection.fetchval("SELECT 1") == 1
    assert complaints == []


async def test_an_error_in_a_block_costs_no_connection(database: Database) -> None:
    async def pid() -> int:
        async with database.acquire() as connection:
            return int(await connection.fetchval("SELECT pg_backend_pid()"))

    first = await pid()
    with pytest.raises(asyncpg.DivisionByZeroError):
        async with database.acquire() as connection:
            await connection.fetchval("SELECT 1 / 0")
    with pytest.raises(KeyError):
        async with database.transaction():
            raise KeyError
    assert await pid() == first

    async def too_long() -> None:
        async with database.transaction() as connection:
            await connection.execute("SET LOCAL statement_timeout = 1")
            await connection.execute("SELECT pg_sleep(20)")

    with pytest.raises(DatabaseUnavailableError):
        await too_long()
    assert await pid() == first


async def test_it_shrinks_to_one_when_nobody_needs_more(url: str) -> None:
    pool = ConnectionPool(url, size=3, timeout_seconds=20, idle_seconds=0.05)
    held = [await pool.acquire() for _ in range(3)]
    for connection in held:
        pool.release(connection, clean=True)
    async with asyncio.timeout(20):
        while pool.opened > 1:
            await asyncio.sleep(0.01)
    assert await session_of(pool)
    await pool.close(5)


async def test_a_closed_pool_refuses_and_waits_for_what_is_in_use(url: str) -> None:
    pool = ConnectionPool(url, size=1, timeout_seconds=20)
    held = await pool.acquire()
    waiting = asyncio.create_task(pool.acquire())
    await asyncio.sleep(0)
    closing = asyncio.create_task(pool.close(20))
    with pytest.raises(asyncpg.InterfaceError):
        await waiting
    with pytest.raises(asyncpg.InterfaceError):
        await pool.acquire()
    assert not closing.done()
    pool.release(held, clean=True)
    await closing
    assert held.is_closed()
