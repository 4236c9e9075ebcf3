"""What is rolled up is what was used: reports against an oracle that reads every event, and what repairs them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.database import Database
from models.ids import new_id
from services.backfills.usage import fill_threads, rebuild_quarters
from services.usage import REPORT, TokenTotals, read_report
from services.usage_window import Timeframe, UsageWindow, usage_window, zone_keys
from tests.conftest import make_database

NOW = datetime(2026, 11, 23, 12, 34, 56, 789, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)

_ADD_EVENTS = """
INSERT INTO usage_events (id, owner_id, message_id, kind, model, status, prompt_tokens, completion_tokens,
    reasoning_tokens, cached_tokens, estimated, cost_micros, created_at)
SELECT gen_random_uuid(), $1, gen_random_uuid(), 'ANSWER', model, 'COMPLETE', prompt, completion, reasoning, cached,
    false, cost, at
FROM unnest($2::text[], $3::int[], $4::int[], $5::int[], $6::int[], $7::bigint[], $8::timestamptz[])
    AS given (model, prompt, completion, reasoning, cached, cost, at)
"""

Batch = Callable[[asyncpg.Connection, str | None, int], Awaitable[tuple[str | None, int]]]
Event = tuple[str, int, int, int, int, int | None, datetime]
"""Model, prompt, completion, reasoning, cached, cost, time."""


@pytest.fixture(scope="module")
async def database(postgres_url: str) -> AsyncIterator[Database]:
    """A database of this module, with the tables."""
    database = Database(await make_database(postgres_url), pool_size=10, timeout_seconds=10)
    await database.migrate()
    await database.connect()
    yield database
    await database.close()


@pytest.fixture
async def connection(database: Database) -> AsyncIterator[asyncpg.Connection]:
    """A connection to it."""
    async with database.acquire() as connection:
        yield connection


async def new_user(connection: asyncpg.Connection) -> UUID:
    user_id = new_id()
    await connection.execute("INSERT INTO users (id, anonymous) VALUES ($1, true)", user_id)
    return user_id


async def add(connection: asyncpg.Connection, owner_id: UUID, events: Sequence[Event]) -> None:
    await connection.execute(_ADD_EVENTS, owner_id, *(list(column) for column in zip(*events, strict=True)))


def summed(events: list[Event]) -> TokenTotals:
    """The oracle: a loop over events."""
    costs = [event[5] for event in events if event[5] is not None]
    return TokenTotals(
        len(events),
        sum(event[1] for event in events),
        sum(event[2] for event in events),
        sum(event[3] for event in events),
        sum(event[4] for event in events),
        sum(costs) if costs else None,
    )


async def check(connection: asyncpg.Connection, owner_id: UUID, window: UsageWindow) -> None:
    """A report says what the events say, and agrees with itself."""
    rows = await connection.fetch(
        """
        SELECT model, prompt_tokens, completion_tokens, reasoning_tokens, cached_tokens, cost_micros, created_at
        FROM usage_events WHERE owner_id = $1
        """,
        owner_id,
    )
    events: list[Event] = [tuple(row) for row in rows]
    inside = [event for event in events if window.begins_at <= event[6] < window.ends_at]
    report = await read_report(connection, owner_id, window)
    assert report.totals == summed(inside)
    assert report.by_model == {
        model: summed([event for event in inside if event[0] == model]) for model in {event[0] for event in inside}
    }
    assert list(report.buckets) == [
        summed([event for event in inside if begins_at <= event[6] < ends_at])
        for begins_at, ends_at in pairwise(window.edges)
    ]
    assert sum(report.buckets, TokenTotals()) == sum(report.by_model.values(), TokenTotals()) == report.totals
    used = [totals.prompt + totals.completion for totals in report.by_model.values()]
    assert used == sorted(used, reverse=True)


counts = st.integers(0, 2**31 - 1)
models = st.sampled_from(["gpt", "claude", "mine/custom 🦉", "gone"])
costs = st.none() | st.integers(0, 10**12)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
async def test_totals_are_the_sum_of_the_buckets_and_of_the_models_in_any_zone(
    connection: asyncpg.Connection, data: st.DataObject
) -> None:
    zone = ZoneInfo(data.draw(st.sampled_from(sorted(zone_keys())), "zone"))
    now = data.draw(st.datetimes(datetime(2020, 1, 1), datetime(2030, 1, 1), timezones=st.just(UTC)), "now")  # noqa: DTZ001
    windows = [usage_window(timeframe, zone, now) for timeframe in Timeframe]
    # Anywhere, and just at the edges, on both sides.
    edges = sorted({edge for window in windows for edge in window.edges})
    at_an_edge = st.builds(
        lambda edge, off: edge + off * MICROSECOND, st.sampled_from(edges), st.sampled_from([-1, 0, 1])
    )
    anywhere = st.integers(0, 35 * 86_400_000_000).map(lambda back: windows[0].ends_at - back * MICROSECOND)
    event = st.tuples(models, counts, counts, counts, counts, costs, at_an_edge | anywhere)
    events = data.draw(st.lists(event, min_size=1, max_size=25), "events")
    owner_id, stranger_id = await new_user(connection), await new_user(connection)
    await add(connection, stranger_id, events)
    cut = data.draw(st.integers(0, len(events)), "cut")
    for batch in (events[:cut], events[cut:]):
        if batch:
            await add(connection, owner_id, batch)
    for window in windows:
        await check(connection, owner_id, window)


@pytest.mark.parametrize("zone", ["UTC", "Asia/Kathmandu", "Australia/Lord_Howe", "America/New_York", "Africa/Cairo"])
@pytest.mark.parametrize("now", ["2026-03-29T12:00:00Z", "2026-10-04T12:00:00Z", "2026-11-01T12:00:00Z"])
async def test_every_edge_cuts_between_two_microseconds(connection: asyncpg.Connection, zone: str, now: str) -> None:
    for timeframe in Timeframe:
        window = usage_window(timeframe, ZoneInfo(zone), datetime.fromisoformat(now.replace("Z", "+00:00")))
        owner_id = await new_user(connection)
        await add(
            connection,
            owner_id,
            [("m", 1, 0, 0, 0, None, edge) for edge in window.edges]
            + [("m", 100, 0, 0, 0, None, edge - MICROSECOND) for edge in window.edges],
        )
        report = await read_report(connection, owner_id, window)
        assert {(bucket.requests, bucket.prompt) for bucket in report.buckets} == {(2, 101)}
        await check(connection, owner_id, window)


async def test_an_event_that_is_not_inserted_for_it_is_there_is_not_rolled_up_again(
    connection: asyncpg.Connection,
) -> None:
    owner_id, message_id = await new_user(connection), new_id()
    for _ in range(3):
        await connection.execute(
            """
            INSERT INTO usage_events (id, owner_id, message_id, kind, model, status, prompt_tokens, completion_tokens,
                reasoning_tokens, cached_tokens, estimated)
            VALUES (gen_random_uuid(), $1, $2, 'ANSWER', 'm', 'COMPLETE', 1, 1, 0, 0, false)
            ON CONFLICT (message_id, kind) DO NOTHING
            """,
            *(owner_id, message_id),
        )
    report = await read_report(
        connection, owner_id, usage_window(Timeframe.DAY, ZoneInfo("UTC"), datetime.now(UTC) + timedelta(seconds=1))
    )
    assert report.totals == TokenTotals(1, 1, 1, 0, 0, None)


async def test_a_report_is_read_by_the_unique_index_of_the_quarters(connection: asyncpg.Connection) -> None:
    owners = [await new_user(connection) for _ in range(20)]
    await connection.execute(
        """
        INSERT INTO usage_quarters (owner_id, began_at, model, requests, prompt_tokens, completion_tokens,
            reasoning_tokens, cached_tokens, priced_requests, cost_micros)
        SELECT owner_id, $2::timestamptz - n * interval '15 minutes', 'm', 1, 1, 1, 0, 0, 0, 0
        FROM unnest($1::uuid[]) AS owner_id, generate_series(1, 3000) AS n
        """,
        *(owners, NOW.replace(minute=30, second=0, microsecond=0)),
    )
    await connection.execute("VACUUM ANALYZE usage_quarters")
    for timeframe in (Timeframe.DAY, Timeframe.MONTH):
        window = usage_window(timeframe, ZoneInfo("Asia/Kathmandu"), NOW)
        plan = await connection.fetchval(
            f"EXPLAIN (FORMAT JSON) {REPORT}",
            *(owners[0], window.begins_at, window.ends_at, window.edges),
        )
        nodes = flattened(json.loads(plan)[0]["Plan"])
        (index,) = [node for node in nodes if "Index Name" in node]
        assert index["Node Type"] == "Index Only Scan"
        assert index["Index Name"] == "usage_quarters_once"
        for condition in ("owner_id =", "began_at >=", "began_at <"):
            assert condition in index["Index Cond"]


def flattened(node: dict[str, Any]) -> list[dict[str, Any]]:
    """A plan and all plans below it."""
    return [node, *(inner for below in node.get("Plans", []) for inner in flattened(below))]


async def quarters_of(connection: asyncpg.Connection, owner_id: UUID) -> list[tuple[Any, ...]]:
    rows = await connection.fetch("SELECT * FROM usage_quarters WHERE owner_id = $1 ORDER BY began_at, model", owner_id)
    return [tuple(row)[1:] for row in rows]


async def run(connection: asyncpg.Connection, batch: Batch, limit: int) -> int:
    """All batches of a backfill; how many things were done."""
    position: str | None = None
    done = 0
    while True:
        position, more = await batch(connection, position, limit)
        assert more <= limit
        done += more
        if position is None:
            return done


async def test_a_rebuild_makes_the_quarters_that_the_trigger_made(connection: asyncpg.Connection) -> None:
    events: list[Event] = [
        (f"m{n % 3}", n, 2 * n, n, 1, n if n % 2 else None, NOW - n * timedelta(minutes=7)) for n in range(100)
    ]
    owners = [await new_user(connection) for _ in range(5)]
    for owner_id in owners[:4]:
        await add(connection, owner_id, events)
    before = {owner_id: await quarters_of(connection, owner_id) for owner_id in owners}
    await connection.execute("DELETE FROM usage_quarters WHERE owner_id = $1", owners[0])
    await connection.execute(
        "UPDATE usage_quarters SET requests = 0, model = model || 'x' WHERE owner_id = $1", owners[1]
    )
    await connection.execute(
        """
        INSERT INTO usage_quarters (owner_id, began_at, model, requests, prompt_tokens, completion_tokens,
            reasoning_tokens, cached_tokens, priced_requests, cost_micros)
        VALUES ($1, '2026-01-01Z', 'stale', 9, 9, 9, 9, 9, 9, 9)
        """,
        owners[4],
    )
    users = await connection.fetchval("SELECT count(*) FROM users")
    assert await run(connection, rebuild_quarters, 7) == users
    assert {owner_id: await quarters_of(connection, owner_id) for owner_id in owners} == before
    assert before[owners[4]] == []


async def test_a_rebuild_loses_no_event_that_is_written_meanwhile(database: Database) -> None:
    async with database.acquire() as connection:
        owner_id = await new_user(connection)

    async def write() -> None:
        async with database.acquire() as connection:
            for n in range(40):
                await add(connection, owner_id, [("m", 1, 1, 0, 0, None, NOW - n * MICROSECOND)])

    async def rebuild() -> None:
        async with database.acquire() as connection:
            # From just before this user, so that others of this module do not take time.
            for _ in range(15):
                await rebuild_quarters(connection, UUID(int=owner_id.int - 1).hex, 1)

    async with asyncio.timeout(30):
        await asyncio.gather(write(), write(), write(), rebuild(), rebuild())
    async with database.acquire() as connection:
        (quarter,) = await quarters_of(connection, owner_id)
        assert (quarter[0], quarter[2:5]) == (datetime(2026, 11, 23, 12, 30, tzinfo=UTC), (120, 120, 120))


async def test_old_events_are_given_the_thread_of_their_message_unless_it_is_temporary_or_gone(
    connection: asyncpg.Connection,
) -> None:
    owner_id = await new_user(connection)
    threads = {"kept": new_id(), "temporary": new_id()}
    messages = {name: new_id() for name in ("kept", "temporary", "gone")}
    for name, thread_id in threads.items():
        await connection.execute(
            "INSERT INTO threads (id, owner_id, title, title_source, temporary) VALUES ($1, $2, 'T', 'TEXT', $3)",
            *(thread_id, owner_id, name == "temporary"),
        )
        await connection.execute(
            """
            INSERT INTO messages (id, owner_id, thread_id, depth, active, role, status, parts)
            VALUES ($1, $2, $3, 0, true, 'ASSISTANT', 'COMPLETE', '[]')
            """,
            *(messages[name], owner_id, thread_id),
        )
    for message_id in messages.values():
        for kind in ("ANSWER", "TITLE"):
            await connection.execute(
                """
                INSERT INTO usage_events (id, owner_id, message_id, kind, model, status, prompt_tokens,
                    completion_tokens, reasoning_tokens, cached_tokens, estimated)
                VALUES (gen_random_uuid(), $1, $2, $3, 'm', 'COMPLETE', 1, 1, 0, 0, false)
                """,
                *(owner_id, message_id, kind),
            )
    before = await quarters_of(connection, owner_id)
    assert await run(connection, fill_threads, 1_000) == await connection.fetchval("SELECT count(*) FROM usage_events")
    found = await connection.fetch("SELECT message_id, thread_id FROM usage_events WHERE owner_id = $1", owner_id)
    expected = {messages["kept"]: threads["kept"], messages["temporary"]: None, messages["gone"]: None}
    assert {(row["message_id"], row["thread_id"]) for row in found} == set(expected.items())
    assert len(found) == 6
    assert await quarters_of(connection, owner_id) == before
