"""The operator's keys are changed beside servers that serve; CHECKLIST S54."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from config import SettingsError
from models.database import Database
from models.ids import new_id
from server.runtime import Server
from services.backfills.registry import backfills
from services.backfills.runner import BackfillProgress, Pace, run_backfill
from services.encryption import Vault
from services.provider_keys import ProviderKeys
from tests.accounts import key_of
from tests.client import Client, connect
from tests.conftest import make_database, test_settings
from tests.e2e.test_commands import run

OLD, NEW = b"o" * 32, b"n" * 32
PACE = Pace(batch_rows=7, rest=0.0)
SET = 'mutation($key: String!) { setProviderKey(input: {provider: "openai", key: $key}) { __typename } }'
LIST = "{ settings { providerKeys { usable problem } } }"


@pytest.fixture(scope="module")
async def migrated(postgres_url: str) -> AsyncIterator[Database]:
    database = Database(await make_database(postgres_url), pool_size=4, timeout_seconds=10)
    await database.migrate()
    await database.connect()
    yield database
    await database.close()


@pytest.fixture
async def database(migrated: Database) -> AsyncIterator[Database]:
    """A database without users, in which no backfill was run."""
    yield migrated
    async with migrated.acquire() as connection:
        await connection.execute("DELETE FROM backfills; DELETE FROM users")


async def fill(database: Database, vault: Vault, users: int) -> None:
    """So many users, each with a key."""
    keys = ProviderKeys(database, vault, tuple)
    async with database.transaction() as connection:
        for number in range(users):
            owner_id = new_id()
            await connection.execute("INSERT INTO users (id, anonymous) VALUES ($1, true)", owner_id)
            await keys.store(connection, owner_id, "openai", f"the-key-of-user-{number}")


async def readable(database: Database, vault: Vault) -> int:
    """How many keys can be read."""
    keys = ProviderKeys(database, vault, tuple)
    async with database.acquire() as connection:
        owners = await connection.fetch("SELECT id FROM users")
        found = [await keys.of(connection, owner["id"]) for owner in owners]
    return sum(key.key is not None for of_one in found for key in of_one.values())


async def rotate(database: Database, vault: Vault, *, dry_run: bool = False) -> tuple[BackfillProgress, str | None]:
    backfill = backfills(vault)[-1]
    return await run_backfill(database, backfill, PACE, dry_run=dry_run, restart=True), backfill.note()


async def test_all_keys_are_encrypted_with_the_first_key_and_nobody_is_told(database: Database) -> None:
    await fill(database, Vault([OLD]), 50)
    both = Vault([NEW, OLD])
    async with database.acquire() as connection:
        changes = await connection.fetchval("SELECT count(*) FROM changes")
        before = await connection.fetch("SELECT id, updated_at, last_four FROM provider_keys ORDER BY id")
    progress, note = await rotate(database, both, dry_run=True)
    assert (progress.rows_done, progress.rows_written, note) == (50, 50, None)
    assert await readable(database, Vault([NEW])) == 0
    progress, note = await rotate(database, both)
    assert (progress.rows_done, progress.rows_written, note) == (50, 50, None)
    assert await readable(database, Vault([NEW])) == 50
    assert await readable(database, Vault([OLD])) == 0
    progress, _ = await rotate(database, both)
    assert (progress.rows_done, progress.rows_written) == (50, 0)
    async with database.acquire() as connection:
        assert await connection.fetchval("SELECT count(*) FROM changes") == changes
        assert await connection.fetch("SELECT id, updated_at, last_four FROM provider_keys ORDER BY id") == before


async def test_a_rotation_that_is_cut_off_goes_on_where_it_was(database: Database) -> None:
    await fill(database, Vault([OLD]), 40)
    both = Vault([NEW, OLD])

    def cut_off(progress: BackfillProgress) -> None:
        if progress.rows_done >= 21:
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await run_backfill(database, backfills(both)[-1], PACE, tell=cut_off)
    assert await readable(database, Vault([NEW])) == 21
    assert await readable(database, both) == 40
    progress = await run_backfill(database, backfills(both)[-1], PACE)
    assert (progress.rows_done, progress.rows_written) == (40, 19)
    assert await readable(database, Vault([NEW])) == 40


async def test_what_no_key_reads_is_counted_and_left(database: Database) -> None:
    await fill(database, Vault([b"x" * 32]), 3)
    async with database.acquire() as connection:
        lost = await connection.fetch("SELECT id, ciphertext FROM provider_keys ORDER BY id")
    await fill(database, Vault([OLD]), 5)
    progress, note = await rotate(database, Vault([NEW, OLD]))
    assert (progress.rows_done, progress.rows_written) == (8, 5)
    assert note is not None
    assert note.startswith("3 could be read with none of ENCRYPTION_KEYS")
    ids = [row["id"] for row in lost]
    async with database.acquire() as connection:
        left = await connection.fetch("SELECT id, ciphertext FROM provider_keys WHERE id = ANY($1) ORDER BY id", ids)
    assert left == lost
    assert await readable(database, Vault([NEW, b"x" * 32])) == 8


async def test_a_key_that_is_set_meanwhile_is_not_written_over(database: Database) -> None:
    await fill(database, Vault([OLD]), 1)
    both = Vault([NEW, OLD])
    async with database.acquire() as connection:
        owner_id = await connection.fetchval("SELECT id FROM users")
    async with database.transaction() as writer:
        await ProviderKeys(database, both, tuple).store(writer, owner_id, "openai", "a-newer-key")
        rotation = asyncio.create_task(rotate(database, both))
        async with database.acquire() as watcher, asyncio.timeout(20):
            while not await watcher.fetchval("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"):
                await asyncio.sleep(0.01)
    await rotation
    async with database.acquire() as connection:
        found = await ProviderKeys(database, both, tuple).of(connection, owner_id)
    assert found["openai"].key == "a-newer-key"


async def ask(server: Server, client: Client) -> str | None:
    """The client's key as a turn would use it."""
    async with server.database.acquire() as connection:
        return (await server.provider_keys.of(connection, key_of(client)))["openai"].key


async def test_a_server_is_taken_from_one_key_to_another_and_a_key_that_is_gone_disables_and_no_more(
    database: Database, tmp_path: Path
) -> None:
    url = database.url
    encoded = [base64.b64encode(key).decode() for key in (NEW, OLD)]
    token = None
    # The keys of each start, and what it finds.
    for keys, expected in (
        ((OLD,), None),
        ((NEW, OLD), "set-under-old"),
        ((NEW,), "set-under-old"),
        ((b"z" * 32,), None),
    ):
        if keys == (NEW,):
            output, errors = await run(
                *("backfill", "provider-keys", "--restart"),
                DATABASE_URL=url,
                DATA_DIR=str(tmp_path),
                ENCRYPTION_KEYS=",".join(encoded),
            )
            assert "provider-keys: finished, 1 rows looked at; this run wrote 1." in output
            assert not any(key in output + errors for key in encoded)
        server = Server(test_settings(url, tmp_path, encryption_keys=keys))
        await server.start()
        try:
            async with connect(server.address) as client:
                if token is None:
                    await client.sign_in()
                    await client.run(SET, {"key": "set-under-old"})
                    token, user_id = client.token, client.id
                    continue
                client.token, client.id = token, user_id
                assert await ask(server, client) == expected
                (key,) = (await client.run(LIST))["settings"]["providerKeys"]
                assert key["usable"] == (expected is not None)
                turn = await client.send("Hello", model="scripted-echo")
                assert (await client.finish(turn["assistantMessage"]["id"]))["status"] == "COMPLETE"
        finally:
            await server.drain()
            await server.close()


async def test_without_the_setting_a_key_is_made_once_and_a_damaged_one_stops_the_start(
    database: Database, tmp_path: Path
) -> None:
    server = Server(test_settings(database.url, tmp_path))
    await server.start()
    await server.close()
    key = tmp_path / "encryption.key"
    made = key.read_text()
    assert len(made) == 64
    output, _ = await run("backfill", DATABASE_URL=database.url, DATA_DIR=str(tmp_path))
    assert "provider-keys        never run" in output
    assert key.read_text() == made
    key.write_text("damaged")
    with pytest.raises(SettingsError, match=r"ENCRYPTION_KEYS: it is not set, and encryption\.key in"):
        await Server(test_settings(database.url, tmp_path)).start()
    assert key.read_text() == "damaged"
