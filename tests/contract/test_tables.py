"""The tables in the database are those of models/tables.py, and every row that somebody can reach has an owner."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from tortoise import Tortoise
from tortoise.migrations.autodetector import MigrationAutodetector
from tortoise.migrations.constraints import CheckConstraint, UniqueConstraint
from tortoise.models import Model

from models import tables
from models.database import Database
from models.migrating import tortoise_config
from tests.conftest import make_database

MODELS: list[type[Model]] = [
    kind for kind in vars(tables).values() if isinstance(kind, type) and issubclass(kind, Model) and kind is not Model
]
CONSTRAINTS = [(model, constraint) for model in MODELS for constraint in getattr(model.Meta, "constraints", ())]
INDEXES = [(model, index) for model in MODELS for index in getattr(model.Meta, "indexes", ())]

# Tables without an owner of their own, with the reason.
OWNERLESS = {
    "users": "a user is an owner",
    "stream_checkpoints": "written and read by servers only, and gone with its stream, which has an owner",
    "share_messages": "reached by the token of its share only, which has an owner",
    "share_attachments": "reached by the token of its share only, which has an owner",
    "attachment_links": "between an attachment and a message, which have one owner",
    "blobs": "shared by what refers to them, which has an owner each; never reached but through that",
    "sweep_tasks": "the sweeper's",
    "backfills": "the operator's",
}
# Columns that name another row and are no foreign keys, with the reason.
FREE_IDS = {
    "messages.active_child_id": "a memory of what was shown; followed by joins, which pass by a row that is gone",
    "usage_events.message_id": "what was billed outlives its message",
    "usage_events.thread_id": "what was billed outlives its thread",
    "changes.object_id": "a change may tell of a deletion",
}
# Foreign keys without an index that begins with them: a deletion of what they refer to reads the table.
UNINDEXED_KEYS = {
    "streams.owner_id": "only as many rows as answers are being written now",
}

# Times of what need not happen, and times that are not the row's own making.
UNSET_TIMES = {
    "users.deleted_at",
    "threads.expires_at",
    "shares.expires_at",
    "backfills.finished_at",
    "attachments.expires_at",
}
COMPUTED_TIMES = {"streams.lease_expires_at", "usage_quarters.began_at"}


@pytest.fixture(scope="module")
async def database(postgres_url: str) -> Database:
    """The address of a database that the migrations made."""
    database = Database(await make_database(postgres_url), pool_size=2, timeout_seconds=10)
    await database.migrate()
    return database


@pytest.fixture
async def connection(database: Database) -> AsyncIterator[asyncpg.Connection]:
    """A connection to it; what a test writes is not kept."""
    connection = await asyncpg.connect(database.url)
    transaction = connection.transaction()
    await transaction.start()
    yield connection
    await transaction.rollback()
    await connection.close()


def table_of(model: type[Model]) -> str:
    return str(model.Meta.table)  # type: ignore[attr-defined]


def name_of(case: object) -> str:
    return str(getattr(case, "name", None) or getattr(case, "__name__", ""))


async def index_of(connection: asyncpg.Connection, name: str) -> asyncpg.Record | None:
    """An index by its name: its table, columns in order, and condition."""
    found: asyncpg.Record | None = await connection.fetchrow(
        """
        SELECT indrelid::regclass::text AS on_table, indisunique AS is_unique, indisvalid AS is_valid,
            pg_get_expr(indpred, indrelid) AS condition,
            (SELECT array_agg(attname::text ORDER BY place) FROM unnest(indkey) WITH ORDINALITY AS key (number, place)
                JOIN pg_attribute ON attrelid = indrelid AND attnum = number WHERE place <= indnkeyatts) AS columns
        FROM pg_index WHERE indexrelid = to_regclass($1)
        """,
        name,
    )
    return found


def literals(expression: str) -> set[str]:
    """What stands in quotes in an SQL expression."""
    return set(re.findall(r"'([^']*)'", expression))


@pytest.mark.parametrize(("model", "constraint"), CONSTRAINTS, ids=name_of)
async def test_every_constraint_of_the_models_is_in_the_database(
    connection: asyncpg.Connection, model: type[Model], constraint: Any
) -> None:
    found = await connection.fetchrow(
        """
        SELECT contype::text AS kind, conrelid::regclass::text AS on_table, pg_get_constraintdef(oid) AS definition,
            convalidated AS holds
        FROM pg_constraint WHERE conname = $1
        """,
        constraint.name,
    )
    if isinstance(constraint, CheckConstraint):
        assert found, f"the migrations do not create {constraint.name}"
        assert (found["kind"], found["on_table"], found["holds"]) == ("c", table_of(model), True)
        assert literals(found["definition"]) == literals(constraint.check)
        assert constraint.check.split()[0] in found["definition"]
        return
    assert isinstance(constraint, UniqueConstraint)
    # A condition makes it a partial index, which PostgreSQL does not call a constraint.
    assert (found is None) == (constraint.condition is not None)
    assert constraint.name
    index = await index_of(connection, constraint.name)
    assert index, f"the migrations do not create {constraint.name}"
    assert (index["on_table"], index["is_unique"], index["is_valid"]) == (table_of(model), True, True)
    assert index["columns"] == list(constraint.fields)
    assert (index["condition"] is None) == (constraint.condition is None)
    assert literals(index["condition"] or "") == literals(constraint.condition or "")


@pytest.mark.parametrize(("model", "index"), INDEXES, ids=name_of)
async def test_every_index_of_the_models_is_in_the_database(
    connection: asyncpg.Connection, model: type[Model], index: Any
) -> None:
    found = await index_of(connection, index.name)
    assert found, f"the migrations do not create {index.name}"
    assert (found["on_table"], found["columns"], found["condition"]) == (table_of(model), list(index.fields), None)


async def leading_columns(connection: asyncpg.Connection) -> set[str]:
    """The first column of every index that has no condition."""
    rows = await connection.fetch(
        """
        SELECT indrelid::regclass || '.' || attname FROM pg_index
        JOIN pg_attribute ON attrelid = indrelid AND attnum = indkey[0]
        WHERE indpred IS NULL AND indrelid::regclass::text !~ '^pg_'
        """
    )
    return {str(row[0]) for row in rows}


async def test_every_column_that_the_models_call_indexed_is(connection: asyncpg.Connection, database: Database) -> None:
    leading = await leading_columns(connection)
    await Tortoise.init(config=tortoise_config(database.url))
    try:
        wanted = {
            f"{table_of(model)}.{field.source_field or name}"
            for model in MODELS
            for name, field in model._meta.fields_map.items()
            if field.index
        }
    finally:
        await Tortoise.close_connections()
    assert len(wanted) > 5
    assert wanted - leading == set()


async def test_every_foreign_key_is_served_by_an_index(connection: asyncpg.Connection) -> None:
    leading = await leading_columns(connection)
    assert {key for key in await foreign_keys(connection) if key not in leading} == UNINDEXED_KEYS.keys()


async def test_no_migration_is_missing(database: Database) -> None:
    config = tortoise_config(database.url)
    await Tortoise.init(config=config)
    try:
        assert Tortoise.apps is not None
        changes = await MigrationAutodetector(Tortoise.apps, config["apps"]).changes()
    finally:
        await Tortoise.close_connections()
    operations = [operation for writer in changes for operation in writer.operations]
    assert operations == [], "write one: tortoise makemigrations (constraints by hand, see models/migrations)"


async def test_a_change_of_a_model_would_be_noticed(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tortoise_config(database.url)
    await Tortoise.init(config=config)
    try:
        monkeypatch.setattr(tables.Thread._meta.fields_map["title"], "null", True)
        assert Tortoise.apps is not None
        changes = await MigrationAutodetector(Tortoise.apps, config["apps"]).changes()
    finally:
        await Tortoise.close_connections()
    assert [len(writer.operations) for writer in changes] == [1]


async def columns(connection: asyncpg.Connection) -> dict[str, asyncpg.Record]:
    """Every column of ours as `table.column`."""
    rows = await connection.fetch(
        """
        SELECT table_name, column_name, data_type, is_nullable = 'YES' AS is_nullable, column_default
        FROM information_schema.columns WHERE table_schema = 'public' AND table_name <> 'tortoise_migrations'
        """
    )
    return {f"{row['table_name']}.{row['column_name']}": row for row in rows}


async def foreign_keys(connection: asyncpg.Connection) -> dict[str, asyncpg.Record]:
    """Every foreign key as `table.column`: the table it refers to and what a deletion there does."""
    rows = await connection.fetch(
        """
        SELECT conrelid::regclass || '.' || attname AS place, confrelid::regclass::text AS refers_to,
            confdeltype::text AS on_delete, cardinality(conkey) AS width
        FROM pg_constraint JOIN pg_attribute ON attrelid = conrelid AND attnum = conkey[1] WHERE contype = 'f'
        """
    )
    assert all(row["width"] == 1 for row in rows)
    return {row["place"]: row for row in rows}


async def test_the_database_has_the_tables_of_the_models_and_no_other(connection: asyncpg.Connection) -> None:
    found = {place.split(".")[0] for place in await columns(connection)}
    assert found == {table_of(model) for model in MODELS}


async def test_every_table_has_an_owner(connection: asyncpg.Connection) -> None:
    places, keys = await columns(connection), await foreign_keys(connection)
    owned = {place.split(".")[0] for place in places if place.endswith(".owner_id")}
    assert {place.split(".")[0] for place in places} - owned == OWNERLESS.keys()
    for table in owned:
        assert not places[f"{table}.owner_id"]["is_nullable"]
        assert keys[f"{table}.owner_id"]["refers_to"] == "users"
        assert keys[f"{table}.owner_id"]["on_delete"] == "c", "rows go with their owner"


async def test_every_column_that_names_another_row_is_a_foreign_key(connection: asyncpg.Connection) -> None:
    named = {place for place in await columns(connection) if place.endswith("_id")}
    keys = (await foreign_keys(connection)).keys()
    assert named - keys == FREE_IDS.keys()
    assert keys - named == set()


async def test_what_hangs_on_a_deleted_row_goes_with_it_but_for_the_memory_of_turns(
    connection: asyncpg.Connection,
) -> None:
    kept = {place for place, key in (await foreign_keys(connection)).items() if key["on_delete"] != "c"}
    assert kept == {
        "turns.thread_id",
        "turns.user_message_id",
        "turns.assistant_message_id",
        "threads.project_id",
        # What is referred to cannot be deleted, whoever errs.
        "attachments.blob_id",
        "share_attachments.blob_id",
    }


async def test_every_time_is_a_point_in_time_set_by_the_database(connection: asyncpg.Connection) -> None:
    times = {place: row for place, row in (await columns(connection)).items() if place.endswith("_at")}
    assert len(times) > 8
    for place, row in times.items():
        assert row["data_type"] == "timestamp with time zone", place
        assert row["is_nullable"] == (place in UNSET_TIMES), place
        if place not in UNSET_TIMES | COMPUTED_TIMES:
            assert row["column_default"] == "CURRENT_TIMESTAMP", place


async def test_no_text_column_cuts_what_a_user_or_a_model_wrote(connection: asyncpg.Connection) -> None:
    bounded = {place for place, row in (await columns(connection)).items() if row["data_type"] == "character varying"}
    assert bounded == {
        "threads.title_source",
        "messages.role",
        "messages.status",
        "usage_events.kind",
        "usage_events.status",
        "share_messages.role",
        "share_messages.status",
        "attachments.state",
        "sweep_tasks.kind",
        "changes.kind",
        "custom_providers.format",
        "backfills.name",
    }


async def test_migrating_again_changes_nothing(database: Database) -> None:
    async def schema() -> list[tuple[object, ...]]:
        connection = await asyncpg.connect(database.url)
        try:
            rows = await connection.fetch(
                """
                SELECT relname, attname, atttypid, attnotnull FROM pg_attribute JOIN pg_class ON attrelid = pg_class.oid
                WHERE relnamespace = 'public'::regnamespace AND attnum > 0 ORDER BY relname, attnum
                """
            )
        finally:
            await connection.close()
        return [tuple(row) for row in rows]

    before = await schema()
    await database.migrate()
    assert await schema() == before
