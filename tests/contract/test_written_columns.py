"""Columns that PostgreSQL writes as they are answered: the text of a message, and times. The same as we write them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from uuid import uuid4

import asyncpg
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.parts import (
    FilePart,
    Part,
    ReasoningPart,
    SourcePart,
    TextPart,
    ToolPart,
    parts_to_json,
    text_from_json,
)
from models.pool import ConnectionPool
from models.records import (
    WRITTEN_TIME_CHARS,
    MessageRecord,
    message_columns,
    thread_columns,
    time_of,
    written_time,
)

# jsonb holds neither NUL nor half a surrogate pair; no part is made of them.
TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
PARTS = st.lists(
    st.one_of(
        st.builds(TextPart, TEXTS),
        st.builds(ReasoningPart, TEXTS),
        st.builds(ToolPart, TEXTS, TEXTS, st.just({"type": "text", "text": "of a call"}), TEXTS),
        st.builds(SourcePart, TEXTS, TEXTS),
        st.builds(FilePart, st.uuids(), TEXTS, TEXTS, st.integers(0, 9)),
    ),
    max_size=5,
)


@pytest.fixture
async def pool(postgres_url: str) -> AsyncIterator[ConnectionPool]:
    """As requests have it: whatever the server's own time zone is."""
    pool = ConnectionPool(f"{postgres_url}&timezone=Asia/Kolkata", size=1, timeout_seconds=10)
    yield pool
    await pool.close(5)


@pytest.fixture
async def connection(postgres_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(postgres_url)
    yield connection
    await connection.close()


_SETTINGS = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@_SETTINGS
@given(
    time=st.one_of(
        st.datetimes(datetime(1970, 1, 1), datetime(9999, 12, 31), timezones=st.just(UTC)),  # noqa: DTZ001
        # Zeros at the end of the fraction, or nothing but zeros.
        st.builds(
            lambda digits, zeros: datetime(2026, 11, 28, 23, 59, 59, digits * 10**zeros, UTC),
            st.integers(0, 9),
            st.integers(0, 5),
        ),
    )
)
async def test_a_time_is_written_as_it_would_be_by_us(pool: ConnectionPool, time: datetime) -> None:
    connection = await pool.acquire()
    read = await connection.fetchval("SELECT to_json($1::timestamptz)", time)
    pool.release(connection, clean=True)
    assert isinstance(read, str)
    assert orjson.dumps(written_time(read)) == orjson.dumps(written_time(time)) == orjson.dumps(time)
    assert time_of(read) == time_of(time) == time
    if len(read) == WRITTEN_TIME_CHARS:
        assert orjson.dumps(orjson.Fragment(read)) == orjson.dumps(time)


def test_a_time_that_is_not_there_stays_null() -> None:
    assert written_time(None) is None


def test_times_are_read_as_json_only_by_those_who_name_their_columns() -> None:
    assert "to_json(t.expires_at)" in thread_columns(frozenset({"id", "expires_at"}), whole=True)
    assert message_columns(frozenset({"created_at"}))[-1] == "to_json(m.created_at)"
    assert "to_json" not in thread_columns(None, whole=True) + "".join(message_columns(None))


@_SETTINGS
@given(parts=PARTS)
async def test_the_text_that_is_read_is_that_of_the_parts(connection: asyncpg.Connection, parts: list[Part]) -> None:
    columns = message_columns(frozenset({"id", "read_text"}))
    assert "m.parts" not in columns
    stored = parts_to_json(parts)
    row = await connection.fetchrow(
        f"SELECT {', '.join(columns)} FROM (SELECT $1::uuid AS id, 'USER' AS role, $2::jsonb AS parts) m",
        uuid4(),
        stored,
        record_class=MessageRecord.fetched,
    )
    assert row.text == row.read_text == text_from_json(stored)


def test_the_text_is_not_read_again_where_the_parts_are() -> None:
    for wanted in (None, frozenset({"read_text", "parts_json"}), frozenset({"parts_json", "created_at"})):
        columns = message_columns(wanted)
        assert "m.parts" in columns
        assert not any("->>" in column for column in columns)


@pytest.mark.parametrize("parts", [[], [TextPart("")], [TextPart("a"), ReasoningPart("no"), TextPart("b")]])
def test_a_row_by_its_names_has_its_parts_and_no_text_beside_them(parts: list[Part]) -> None:
    names = [name.removeprefix("m.") for name in message_columns(None) if name != "NULL"]
    row = dict.fromkeys(names, None) | {"id": uuid4(), "parts": parts_to_json(parts), "created_at": datetime.now(UTC)}
    record = MessageRecord.from_row(row)
    assert record.read_text is None
    assert (record.parts, record.text) == (parts, "".join(part.text for part in parts if isinstance(part, TextPart)))
