"""Applying migrations. Apart from the database's door, because nothing else at run time needs Tortoise."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Sequence
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import asyncpg
from tortoise import Tortoise
from tortoise.connection import get_connection
from tortoise.migrations.executor import MigrationExecutor, MigrationTarget
from tortoise.migrations.schema_editor import AsyncpgSchemaEditor
from tortoise.transactions import in_transaction

log = logging.getLogger(__name__)

_APP = "threadgraph"
_CONNECTION = "default"
# A change of a table waits for the statements that use it, and everything new waits behind the change. So it waits
# shortly, lets those pass, and tries again.
_TABLE_LOCK_SECONDS = 3
_TABLE_LOCK_TRIES = 20


async def apply_migrations(url: str, names: Sequence[str]) -> None:
    """Apply migrations in this order. The caller holds the lock that keeps other processes from doing the same.

    Args:
        url: of the database.
    """
    config = tortoise_config(url)
    await Tortoise.init(config=config, init_connections=False)
    try:
        executor = MigrationExecutor(get_connection(_CONNECTION), config["apps"])
        # First of all: Tortoise reads the table in the transaction below, where a failure would not be overlooked.
        await executor.recorder.ensure_schema(AsyncpgSchemaEditor(executor.connection, atomic=False))
        for name in names:
            log.info("migrating the database: %s", name)
            await _apply_migration(config, name)
            # Each leaves its picture of all tables, in circles, and a start collects nothing by itself: 20 MiB each.
            gc.collect()
    finally:
        await Tortoise.close_connections()


def _without_querysets(apps: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same, for a migration, which is made of definitions alone.

    Tortoise would make a queryset of every table anew after each operation, for Python code among them that asks the
    tables; there is none. An empty database is migrated with 1.6 s of CPU so, and with 3.7 otherwise.
    """
    return {name: app | {"default_connection": None} for name, app in apps.items()}


async def _apply_migration(config: dict[str, Any], name: str) -> None:
    """One migration and its record, in one transaction. Tortoise's own `migrate` records it behind its commit."""
    for tries_left in reversed(range(_TABLE_LOCK_TRIES)):
        try:
            async with in_transaction(_CONNECTION) as transaction:
                await transaction.execute_script(
                    f"SET LOCAL lock_timeout = '{_TABLE_LOCK_SECONDS}s'; SET LOCAL statement_timeout = 0"
                )
                # The executor finds this transaction as its connection; the one that it begins itself is a savepoint.
                executor = MigrationExecutor(transaction, _without_querysets(config["apps"]))
                await executor.migrate([MigrationTarget(_APP, name)], direction="forward")
        except asyncpg.LockNotAvailableError:
            if not tries_left:
                raise
            log.warning("the migration %s waits for statements that use its tables", name)
            await asyncio.sleep(1)
        else:
            return


def tortoise_config(url: str) -> dict[str, Any]:
    """What Tortoise is initialised with, for a database."""
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query))
    credentials: dict[str, Any] = {
        "host": query.pop("host", None) or parts.hostname,
        "port": parts.port or int(query.pop("port", 5432)),
        "user": unquote(parts.username or "postgres"),
        "password": unquote(parts.password) if parts.password else None,
        "database": parts.path.lstrip("/") or "postgres",
        "minsize": 1,
        "maxsize": 2,
    }
    if "sslmode" in query:
        credentials["ssl"] = query.pop("sslmode")
    return {
        "connections": {_CONNECTION: {"engine": "tortoise.backends.asyncpg", "credentials": credentials}},
        "apps": {
            _APP: {
                "models": ["models.tables"],
                "migrations": "models.migrations",
                "default_connection": _CONNECTION,
            }
        },
        "use_tz": True,
    }
