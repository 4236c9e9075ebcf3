"""A defect in one place stays there: whatever a server does in the background goes on after an exception in it.

The exceptions are raised where each task asks the database or the log of tokens, and are of a kind that nobody expects.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import server.runtime
import services.backfills.background
import streams.shared_hub
from models.database import Database
from server.graphql_socket import SocketTimes
from server.runtime import Server
from services.sweeper import Sweeper
from streams.channel import BroadcastChannel
from streams.token_log import TokenLog
from streams.valkey import Script
from tests.client import Client, connect, text_of
from tests.conftest import make_database, test_settings
from tests.scripts import SCRIPTS, TextDelta
from tests.valkey import ValkeyServer

# What runs for as long as the server does and asks the database.
ASKING_DATABASE = {
    *("database watch", "wake-ups", "lease renewal", "stream checkpoints", "reaper", "backfills", "sweeper"),
    "socket watch",
}
# These as well where there are several servers, and some that ask Valkey.
ASKING_DATABASE_FOR_OTHERS = {"looking for ends"}
ASKING_VALKEY = {"token log writing", "token log reading", "token log probe", "valkey notices"}
# They ask nobody: they move what is in memory, and call what is tried in tests/contract/test_channel.py.
ASKING_NOBODY = {"channel", "token log keeping", "valkey pub/sub", "event loop lag"}
OFTEN_SECONDS = 0.05


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that is done from time to time is done often."""
    for module, name in (
        (server.runtime, "_REAP_SECONDS"),
        (server.runtime, "_LOOK_SECONDS"),
        (server.runtime, "_SWEEP_SECONDS"),
        (server.runtime, "_WATCH_SECONDS"),
        (services.backfills.background, "_SETTLE_SECONDS"),
        (services.backfills.background, "_LOOK_SECONDS"),
        (streams.shared_hub, "_LOOK_SECONDS"),
        (streams.shared_hub, "_PROBE_SECONDS"),
    ):
        monkeypatch.setattr(module, name, OFTEN_SECONDS)


class Defect:
    """Raises in tasks of these names, as long as it is on, and counts in which."""

    def __init__(self, names: set[str]) -> None:
        self.names = names
        self.met: Counter[str] = Counter()
        self.on = True

    def meet(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        if self.on and task.get_name() in self.names:
            self.met[task.get_name()] += 1
            raise RuntimeError(f"a defect in {task.get_name()}")

    def into(self, monkeypatch: pytest.MonkeyPatch, where: Any, name: str) -> None:
        original = getattr(where, name)

        def broken(*args: Any, **named: Any) -> Any:
            self.meet()
            return original(*args, **named)

        monkeypatch.setattr(where, name, broken)

    async def everywhere(self, queue: asyncio.Queue[Any], channel: BroadcastChannel | None = None) -> None:
        """Until every task has met it and has come back for more; an answer grows meanwhile, so that all have work."""
        async with asyncio.timeout(30):
            while any(self.met[name] < 2 for name in self.names):
                queue.put_nowait(TextDelta("x"))
                if channel is not None:
                    await channel.publish("nobody listens", {})
                await asyncio.sleep(0.02)
        self.on = False


@asynccontextmanager
async def serving(postgres_url: str, folder: Path, **changes: object) -> AsyncIterator[tuple[Client, set[str]]]:
    """A new user of a server, and the names of the tasks that the server has from its start on."""
    before = asyncio.all_tasks()
    settings = test_settings(await make_database(postgres_url), folder, lease_seconds=3, **changes)
    own = Server(settings, providers=SCRIPTS.models(), socket_times=SocketTimes(watch_seconds=OFTEN_SECONDS))
    await own.start()
    try:
        names = {task.get_name() for task in asyncio.all_tasks() - before}
        async with connect(own.address) as client:
            await client.sign_in()
            yield client, {name for name in names if not name.startswith("Task-")}
    finally:
        await own.drain()
        await own.close()


def assert_known(names: set[str], known: set[str]) -> None:
    """A task of a new name needs a case here."""
    assert {"channel" if name.startswith("channel ") else name for name in names} <= known | ASKING_NOBODY


@asynccontextmanager
async def following(client: Client) -> AsyncIterator[None]:
    """Somebody for whom the background looks."""
    async with client.subscribe("subscription { changes { __typename } }", {}) as changes:
        await changes.next()
        yield


async def test_what_runs_in_the_background_outlives_any_exception(
    postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    defect = Defect(ASKING_DATABASE)
    defect.into(monkeypatch, Database, "acquire")
    defect.into(monkeypatch, Database, "claim_server")
    defect.into(monkeypatch, Sweeper, "_expired_threads")
    async with serving(postgres_url, tmp_path) as (client, names):
        assert_known(names, ASKING_DATABASE)
        assert names >= ASKING_DATABASE
        question = "Through all of it"
        message_id = (await client.send(question, model="driven"))["assistantMessage"]["id"]
        queue = SCRIPTS.driven.queue(question)
        async with following(client), client.reading(message_id) as reading:
            queue.put_nowait(TextDelta("before "))
            await reading.next()
            await defect.everywhere(queue)
            queue.put_nowait(TextDelta(" after"))
            queue.put_nowait(None)
            events = [event async for event in reading.events()]
        assert events[-1]["message"]["status"] == "COMPLETE"
        assert events[-1]["message"]["text"] == "before " + text_of(events)
        for name in ASKING_DATABASE:
            assert any(
                record.exc_info and f"a defect in {name}" in str(record.exc_info[1]) for record in caplog.records
            )
        assert (await client.finish((await client.send("And then?"))["assistantMessage"]["id"]))["text"]


async def test_what_runs_for_other_servers_outlives_any_exception(
    postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    defect = Defect(ASKING_VALKEY | ASKING_DATABASE_FOR_OTHERS)
    defect.on = False
    defect.into(monkeypatch, server.runtime, "find_written")
    for name in ("append", "wait", "probe"):
        defect.into(monkeypatch, TokenLog, name)
    defect.into(monkeypatch, Script, "run")
    async with ValkeyServer() as valkey:
        url = await make_database(postgres_url)
        servers = [
            Server(
                test_settings(url, tmp_path / name, broadcast_url=valkey.url, session_secret="s" * 32),
                providers=SCRIPTS.models(),
                socket_times=SocketTimes(watch_seconds=OFTEN_SECONDS),
            )
            for name in ("one", "two")
        ]
        before = asyncio.all_tasks()
        for own in servers:
            await own.start()
        try:
            names = {task.get_name() for task in asyncio.all_tasks() - before}
            known = ASKING_DATABASE | ASKING_DATABASE_FOR_OTHERS | ASKING_VALKEY
            assert_known({name for name in names if not name.startswith("Task-")}, known)
            async with connect(servers[0].address) as here, connect(servers[1].address) as there:
                await here.sign_in()
                there.token = here.token
                question = "Through all of it, at two servers"
                message_id = (await here.send(question, model="driven"))["assistantMessage"]["id"]
                queue = SCRIPTS.driven.queue(question)
                async with here.reading(message_id) as own_reading, there.reading(message_id) as reading:
                    queue.put_nowait(TextDelta("before "))
                    for each in (own_reading, reading):
                        await each.next()
                    defect.on = True
                    await defect.everywhere(queue, servers[0].channel)
                    queue.put_nowait(TextDelta(" after"))
                    queue.put_nowait(None)
                    for each in (own_reading, reading):
                        events = [event async for event in each.events()]
                        assert events[-1]["message"]["status"] == "COMPLETE"
                        assert events[-1]["message"]["text"] == "before " + text_of(events)
        finally:
            for own in servers:
                await own.drain()
                await own.close()
