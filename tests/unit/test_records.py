"""Records: a row by its names, whether asyncpg read it or it was put together."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from models.records import THREAD_COLUMNS, MessageRecord, ProjectRecord, RowRecord, ThreadRecord

ID = UUID(int=1)
MADE = datetime(2026, 1, 2, tzinfo=UTC)
VALUES = [ID, ID, "Titled", False, True, False, None, None, MADE, MADE]


async def test_what_asyncpg_reads_is_a_record_and_what_follows_its_columns_stays(postgres_url: str) -> None:
    connection = await asyncpg.connect(postgres_url)
    try:
        (read,) = await connection.fetch(
            f"SELECT {THREAD_COLUMNS}, 7 AS behind FROM (VALUES ($1::uuid, $1::uuid, 'Titled', false, true, false, "
            f"NULL::uuid, NULL::timestamptz, $2::timestamptz, $2::timestamptz)) AS row ({THREAD_COLUMNS})",
            ID,
            MADE,
            record_class=ThreadRecord.fetched,
        )
    finally:
        await connection.close()
    assert isinstance(read, ThreadRecord)
    made = ThreadRecord.of(VALUES)
    assert [getattr(read, name) for name in ThreadRecord.columns] == [
        getattr(made, name) for name in ThreadRecord.columns
    ]
    rows: list[Any] = [read, made]
    assert rows[0][len(ThreadRecord.columns)] == 7
    with pytest.raises(IndexError):
        rows[1][len(ThreadRecord.columns)]


def test_a_record_is_made_of_a_row_in_any_order_and_cannot_be_changed() -> None:
    row = dict(reversed(list(zip(ThreadRecord.columns, VALUES, strict=True)))) | {"other": 1}
    record: Any = ThreadRecord.from_row(row)
    assert (record.id, record.title, record.archived, record.updated_at) == (ID, "Titled", True, MADE)
    with pytest.raises(AttributeError):
        record.title = "Another"
    with pytest.raises(AttributeError):
        record.other  # noqa: B018


@pytest.mark.parametrize("kind", [ThreadRecord, ProjectRecord, MessageRecord])
def test_no_column_hides_what_a_row_can_do(kind: type[RowRecord]) -> None:
    assert not set(kind.columns) & (set(dir(asyncpg.Record)) | set(dir(tuple)))
