"""`/healthz` says that the process is alive, whatever else is not; `/readyz` says what is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import server.runtime
import streams.shared_hub
from server.runtime import Server
from tests.client import Client, connect
from tests.conftest import make_database, test_settings
from tests.valkey import ValkeyServer

DEADLINE_SECONDS = 30.0


@asynccontextmanager
async def serving(postgres_url: str, folder: Path, **changes: object) -> AsyncIterator[tuple[Server, Client]]:
    """A server with these settings, and somebody who asks it."""
    server = Server(test_settings(await make_database(postgres_url), folder, **changes))
    await server.start()
    try:
        async with connect(server.address) as client:
            yield server, client
    finally:
        await server.drain()
        await server.close()


async def ask(client: Client, path: str) -> tuple[int, dict[str, Any]]:
    async with asyncio.timeout(DEADLINE_SECONDS), client.http.get(client.address + path) as response:
        return response.status, await response.json()


async def until(client: Client, status: int) -> dict[str, Any]:
    """What `/readyz` says when it answers so."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while True:
            found, body = await ask(client, "/readyz")
            if found == status:
                return body
            await asyncio.sleep(0.02)


async def test_a_server_that_takes_turns_is_ready_and_says_of_what(client: Client) -> None:
    assert await ask(client, "/healthz") == (200, {"status": "ok"})
    assert await ask(client, "/readyz") == (200, {"status": "ready", "parts": {"turns": "ok", "database": "ok"}})


async def test_without_a_connection_to_the_database_it_is_alive_and_not_ready(
    postgres_url: str, tmp_path: Path
) -> None:
    changes = {"database_pool_size": 2, "database_timeout_seconds": 0.5}
    async with serving(postgres_url, tmp_path, **changes) as (server, client):
        async with AsyncExitStack() as held:
            for _ in range(2):
                await held.enter_async_context(server.database.acquire())
            body = await until(client, 503)
            assert body == {"status": "not ready", "parts": {"turns": "ok", "database": "out of reach"}}
            assert await ask(client, "/healthz") == (200, {"status": "ok"})
        await until(client, 200)


async def test_a_server_that_drains_is_alive_and_not_ready(postgres_url: str, tmp_path: Path) -> None:
    async with serving(postgres_url, tmp_path) as (server, client):
        await server.generations.drain(0)
        status, body = await ask(client, "/readyz")
        assert (status, body["parts"]["turns"]) == (503, "draining")
        assert await ask(client, "/healthz") == (200, {"status": "ok"})


async def test_a_channel_that_does_not_answer_makes_it_not_ready_until_it_does(
    postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.runtime, "_CHANNEL_PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(streams.shared_hub, "_PROBE_SECONDS", 0.1)
    monkeypatch.setattr(streams.shared_hub, "_PROBE_DEADLINE_SECONDS", 0.4)
    async with (
        ValkeyServer() as valkey,
        serving(postgres_url, tmp_path, broadcast_url=valkey.url) as (_, client),
    ):
        await until(client, 200)
        # Frozen, with its connections open: the case that no error tells of.
        valkey.freeze()
        body = await until(client, 503)
        assert body["parts"] == {"turns": "ok", "database": "ok", "channel": "out of reach"}
        assert await ask(client, "/healthz") == (200, {"status": "ok"})
        valkey.thaw()
        await until(client, 200)
        valkey.kill()
        await until(client, 503)
        await valkey.start()
        await until(client, 200)


async def test_a_short_absence_of_the_channel_is_nobodys_business(postgres_url: str, tmp_path: Path) -> None:
    async with ValkeyServer() as valkey, serving(postgres_url, tmp_path, broadcast_url=valkey.url) as (_, client):
        await until(client, 200)
        valkey.freeze()
        assert (await ask(client, "/readyz"))[0] == 200
        valkey.thaw()
