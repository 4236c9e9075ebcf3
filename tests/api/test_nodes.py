"""Several servers on one database and one Valkey: any of them serves any reader, and stops any answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from models.ids import IdKind, new_id, parse_id
from providers.base import TextDelta, TokenUsage
from server.runtime import Server
from streams.ending import StreamHold, end_answer
from streams.recovery import AnswerWaitsError
from streams.token_log import Growth, LogName, TokenLog
from tests.client import Client, GraphQLErrors, connect, text_of
from tests.conftest import make_database, test_settings
from tests.scripts import SCRIPTS
from tests.valkey import Valkey, ValkeyServer, unbounded


@dataclass
class Nodes:
    """Two servers, with the same user at both."""

    valkey: ValkeyServer
    servers: list[Server]
    here: Client
    there: Client


Cluster: TypeAlias = tuple[ValkeyServer, list[Server]]


@pytest.fixture(scope="module")
async def cluster(postgres_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """A Valkey and two servers that share it."""
    async with ValkeyServer() as valkey, two_servers(valkey, postgres_url, tmp_path_factory) as servers:
        yield valkey, servers
        # R34: whatever the tests of this module did, no key stays for ever.
        assert await unbounded(valkey) == []


@asynccontextmanager
async def two_servers(
    valkey: Valkey, postgres_url: str, tmp_path_factory: pytest.TempPathFactory, **changes: object
) -> AsyncIterator[list[Server]]:
    """Two servers that share a new database and a Valkey; `changes`: of their settings."""
    database_url = await make_database(postgres_url)
    servers: list[Server] = []
    try:
        for name in ("one", "two"):
            folder: Path = tmp_path_factory.mktemp(name)
            settings = test_settings(database_url, folder, broadcast_url=valkey.url, **changes)
            servers.append(Server(settings, providers=SCRIPTS.models()))
            await servers[-1].start()
        yield servers
    finally:
        for server in servers:
            await server.drain()
            await server.close()


@pytest.fixture
async def nodes(cluster: Cluster) -> AsyncIterator[Nodes]:
    """A new user at both servers."""
    valkey, servers = cluster
    async with at_both(servers) as (here, there):
        yield Nodes(valkey, servers, here, there)


@asynccontextmanager
async def at_both(servers: list[Server]) -> AsyncIterator[tuple[Client, Client]]:
    """A new user at both servers."""
    async with connect(servers[0].address) as here, connect(servers[1].address) as there:
        await here.sign_in()
        there.token, there.id = here.token, here.id
        yield here, there


@asynccontextmanager
async def driven(client: Client, question: str) -> AsyncIterator[tuple[str, asyncio.Queue[Any]]]:
    """An answer that is written word by word; it is ended with the block if it is not before."""
    turn = await client.send(question, model="driven")
    queue = SCRIPTS.driven.queue(question)
    try:
        yield turn["assistantMessage"]["id"], queue
    finally:
        await queue.put(None)


def question() -> str:
    return f"question {time.monotonic_ns()}"


async def test_the_other_server_reads_along_word_by_word(nodes: Nodes) -> None:
    async with driven(nodes.here, question()) as (message_id, queue), nodes.there.reading(message_id) as reading:
        for word in ("Grüß ", "🦉 ", "Ende"):
            await queue.put(TextDelta(word))
            payload = await reading.next()
            assert payload is not None
            assert payload["data"]["messageStream"]["text"] == word
        await queue.put(TokenUsage(3, 3))
        await queue.put(None)
        payload = await reading.next()
        assert payload is not None
        ended = payload["data"]["messageStream"]["message"]
        assert (ended["status"], ended["text"]) == ("COMPLETE", "Grüß 🦉 Ende")
        assert await reading.next() is None


async def test_from_every_cursor_the_other_server_gives_exactly_the_rest(nodes: Nodes) -> None:
    words = [f"w{n}-🦉 " for n in range(12)]
    async with driven(nodes.here, question()) as (message_id, queue):
        cursors: list[str] = []
        async with nodes.here.reading(message_id) as reading:
            for word in words:
                await queue.put(TextDelta(word))
                payload = await reading.next()
                assert payload is not None
                cursors.append(payload["data"]["messageStream"]["cursor"])

        async def rest(client: Client, after: str) -> str:
            return text_of(await client.read(message_id, after))

        reads = [asyncio.create_task(rest(nodes.there, cursor)) for cursor in cursors]
        await asyncio.sleep(0)
        await queue.put(TextDelta("the end"))
        await queue.put(None)
        for place, read in enumerate(reads):
            assert await read == "".join(words[place + 1 :]) + "the end"
    # And the same when it is over.
    for place, cursor in enumerate(cursors):
        assert await rest(nodes.there, cursor) == "".join(words[place + 1 :]) + "the end"


async def test_a_stop_at_one_server_stops_the_other_within_a_second(nodes: Nodes) -> None:
    asked = question()
    async with driven(nodes.here, asked) as (message_id, queue):
        await queue.put(TextDelta("so far"))
        async with nodes.there.reading(message_id) as reading:
            assert await reading.next() is not None
            begun = time.monotonic()
            stopped = await nodes.there.stop(message_id)
            assert time.monotonic() - begun < 5  # a second by the promise; the rest for a busy machine
            assert (stopped["status"], stopped["text"]) == ("STOPPED", "so far")
            payload = await reading.next()
            assert payload is not None
            assert payload["data"]["messageStream"]["message"]["status"] == "STOPPED"
        async with asyncio.timeout(10):
            await SCRIPTS.driven.closing(asked).wait()


@asynccontextmanager
async def dying(monkeypatch: pytest.MonkeyPatch, *, is_stored: bool) -> AsyncIterator[asyncio.Event]:
    """A producer that comes as far as storing an end, before it or behind it, and no further while this lasts."""
    there, awake = asyncio.Event(), asyncio.Event()

    async def die(*arguments: Any) -> Any:
        stored = await end_answer(*arguments) if is_stored else None
        there.set()
        await awake.wait()
        return stored if is_stored else await end_answer(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("services.generation.end_answer", die)
        try:
            yield there
        finally:
            awake.set()


async def test_a_server_that_dies_behind_the_commit_of_an_end_leaves_readers_that_find_it(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with dying(monkeypatch, is_stored=True) as dead, driven(nodes.here, question()) as (message_id, queue):
        await queue.put(TextDelta("all of it"))
        reading = asyncio.create_task(nodes.there.read(message_id))
        await queue.put(None)
        async with asyncio.timeout(10):
            await dead.wait()
            events = await reading
        assert (events[-1]["message"]["status"], text_of(events)) == ("COMPLETE", "all of it")


async def test_a_server_that_dies_before_the_commit_of_an_end_leaves_all_that_came_and_wakes_for_nothing(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with dying(monkeypatch, is_stored=False) as dead:
        async with driven(nodes.here, question()) as (message_id, queue):
            await queue.put(TextDelta("all of it"))
            reading = asyncio.create_task(nodes.there.read(message_id))
        async with asyncio.timeout(10):
            await dead.wait()
        key = parse_id(IdKind.MESSAGE, message_id)
        nodes.servers[0].leases.release(key)
        async with nodes.servers[1].database.acquire() as connection:
            await connection.execute(
                "UPDATE streams SET lease_expires_at = now() - interval '1 s' WHERE message_id = $1", key
            )
        await nodes.servers[1].reaper.reap(only=[key])
        events = await reading
        ended = events[-1]["message"]
        assert (ended["status"], ended["error"]["code"]) == ("INTERRUPTED", "SERVER_LOST")
        assert text_of(events) == ended["text"] == "all of it"
    async with asyncio.timeout(10):
        while len(nodes.servers[0].generations):
            await asyncio.sleep(0.02)
    assert await nodes.here.message(message_id) == ended


async def test_what_is_deleted_at_one_server_is_written_no_more_at_the_other(nodes: Nodes) -> None:
    asked = question()
    turn = await nodes.here.send(asked, model="driven")
    await SCRIPTS.driven.queue(asked).put(TextDelta("so far"))
    async with nodes.there.reading(turn["assistantMessage"]["id"]) as reading:
        assert await reading.next() is not None
        begun = time.monotonic()
        await nodes.there.run(
            "mutation($id: ID!) { deleteThread(input: {threadId: $id}) { deletedThreadId } }",
            {"id": turn["thread"]["id"]},
        )
        # Before it is answered: the provider is let go, and the reader told.
        assert SCRIPTS.driven.closing(asked).is_set()
        assert time.monotonic() - begun < 5
        payload = await reading.next()
        assert payload is not None
        assert payload["data"]["messageStream"]["message"]["status"] == "STOPPED"


async def test_a_thread_is_busy_at_every_server(nodes: Nodes) -> None:
    asked = question()
    turn = await nodes.here.send(asked, model="driven")
    with pytest.raises(GraphQLErrors) as refused:
        await nodes.there.send("And?", threadId=turn["thread"]["id"])
    assert refused.value.code == "THREAD_BUSY"
    await SCRIPTS.driven.queue(asked).put(None)


async def test_equal_sends_at_both_servers_are_one(nodes: Nodes) -> None:
    asked = question()
    sends = (
        client.send(asked, model="two-words", idempotencyKey="the-same") for client in (nodes.here, nodes.there) * 5
    )
    turns = await asyncio.gather(*sends)
    assert len({turn["assistantMessage"]["id"] for turn in turns}) == 1


LOSSES = ["FLUSHALL", "killed and started again", "frozen", "every connection cut"]


@pytest.mark.parametrize("loss", LOSSES)
async def test_what_valkey_loses_no_reader_does(nodes: Nodes, loss: str) -> None:
    """R28 (a restart), R29 and R30 of the checklist, once each."""
    words = [f"word{n} " for n in range(60)]
    async with driven(nodes.here, question()) as (message_id, queue):

        async def write() -> None:
            for place, word in enumerate(words):
                await queue.put(TextDelta(word))
                await asyncio.sleep(0.005)
                if place == 30:
                    await lose(nodes.valkey, loss)
            await queue.put(None)

        reads = [asyncio.create_task(client.read(message_id)) for client in (nodes.here, nodes.there, nodes.there)]
        await write()
        for read in reads:
            events = await read
            assert text_of(events) == events[-1]["message"]["text"] == "".join(words)
            assert events[-1]["message"]["status"] == "COMPLETE"


async def lose(valkey: ValkeyServer, loss: str) -> None:
    if loss == "FLUSHALL":
        await valkey.run("FLUSHALL")
    elif loss == "frozen":
        valkey.freeze()
        asyncio.get_running_loop().call_later(1.0, valkey.thaw)
    elif loss == "every connection cut":
        await valkey.run("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        await valkey.run("CLIENT", "KILL", "TYPE", "pubsub", "SKIPME", "yes")
    else:
        valkey.kill()
        await valkey.start()


async def test_r29_connections_that_are_cut_again_and_again_lose_nothing(nodes: Nodes) -> None:
    words = [f"word{n} " for n in range(200)]
    asked = question()
    async with driven(nodes.here, asked) as (message_id, queue):
        reads = [asyncio.create_task(client.read(message_id)) for client in (nodes.here, nodes.there, nodes.there)]
        for place, word in enumerate(words):
            await queue.put(TextDelta(word))
            await asyncio.sleep(0.01)
            if place % 20 == 10:
                await lose(nodes.valkey, "every connection cut")
        await queue.put(None)
        for read in reads:
            assert text_of(await read) == "".join(words)
    # The channel is whole again, too.
    async with driven(nodes.here, question()) as (message_id, queue):
        assert (await nodes.there.stop(message_id))["status"] == "STOPPED"


async def test_r31_while_valkey_is_frozen_every_request_ends_soon_and_then_readers_get_the_rest(nodes: Nodes) -> None:
    words = [f"word{n} " for n in range(30)]
    async with (
        driven(nodes.here, question()) as (message_id, queue),
        nodes.here.reading(message_id) as own,
        nodes.there.reading(message_id) as other,
    ):
        await queue.put(TextDelta("seen "))
        for reading in (own, other):
            assert await reading.next() is not None
        nodes.valkey.freeze()
        try:
            begun = time.monotonic()
            for word in words:
                await queue.put(TextDelta(word))
            # None of these waits for Valkey.
            turn = await nodes.here.send(question(), model="two-words")
            stopped = await nodes.there.send(question(), model="driven")
            await nodes.there.stop(stopped["assistantMessage"]["id"])
            await nodes.there.message(turn["assistantMessage"]["id"])
            assert time.monotonic() - begun < 4.0
            # Longer than any deadline of ours: connections are given up and made anew, in vain.
            await asyncio.sleep(7.0)
        finally:
            nodes.valkey.thaw()
        for reading in (own, other):
            text = ""
            while len(text) < len("".join(words)):
                payload = await reading.next()
                assert payload is not None
                text += payload["data"]["messageStream"]["text"]
            assert text == "".join(words)


async def test_an_answer_ends_while_valkey_is_gone(nodes: Nodes) -> None:
    async with (
        driven(nodes.here, question()) as (message_id, queue),
        nodes.here.reading(message_id) as own,
        nodes.there.reading(message_id) as other,
    ):
        await queue.put(TextDelta("seen, "))
        for reading in (own, other):
            assert await reading.next() is not None
        nodes.valkey.kill()
        try:
            await queue.put(TextDelta("not seen until the end"))
            await queue.put(None)
            for reading in (own, other):
                events = [event async for event in reading.events()]
                assert text_of(events) == "not seen until the end"
                assert events[-1]["message"]["text"] == "seen, not seen until the end"
        finally:
            await nodes.valkey.start()


async def test_who_read_ahead_of_the_writer_goes_on_at_the_writer(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log has it, and the others read it; its writer has not heard of that yet."""
    answered = asyncio.Event()
    append = TokenLog.append

    async def append_unheard(self: TokenLog, growths: Sequence[Growth], ended: Sequence[LogName]) -> list[int]:
        ends = await append(self, growths, ended)
        await answered.wait()
        return ends

    async with driven(nodes.here, question()) as (message_id, queue):
        async with nodes.there.reading(message_id) as reading:
            with monkeypatch.context() as patch:
                patch.setattr(TokenLog, "append", append_unheard)
                await queue.put(TextDelta("read "))
                payload = await reading.next()
                assert payload is not None
                cursor = payload["data"]["messageStream"]["cursor"]
                rest = asyncio.create_task(nodes.here.read(message_id, cursor))
                await read_by_somebody(nodes.servers[0])
            answered.set()
        await queue.put(TextDelta("ahead"))
        await queue.put(None)
        assert text_of(await rest) == "ahead"


async def read_by_somebody(server: Server) -> None:
    async with asyncio.timeout(10):
        while not any(buffer.readers for buffer in server.hub.read_here):
            await asyncio.sleep(0.01)


async def test_who_was_told_the_end_elsewhere_is_not_refused_by_the_writer(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with driven(nodes.here, question()) as (message_id, queue):
        await queue.put(TextDelta("whole"))
        async with dying(monkeypatch, is_stored=True) as stored:
            await queue.put(None)
            events = await nodes.there.read(message_id)
            assert events[-1]["__typename"] == "MessageEnded"
            await stored.wait()
            again = asyncio.create_task(nodes.here.read(message_id, events[-1]["cursor"]))
            await read_by_somebody(nodes.servers[0])
        assert await again == []


async def test_a_cursor_of_the_future_is_refused_at_the_other_server_too(nodes: Nodes) -> None:
    async with driven(nodes.here, question()) as (message_id, queue):
        async with nodes.here.reading(message_id) as reading:
            await queue.put(TextDelta("some"))
            payload = await reading.next()
            assert payload is not None
        cursor = payload["data"]["messageStream"]["cursor"]
        ahead = cursor.rpartition(".")[0] + ".1000"
        read = asyncio.create_task(nodes.there.read(message_id, ahead))
        await queue.put(None)
        with pytest.raises(GraphQLErrors) as refused:
            await read
        assert refused.value.code == "CURSOR_AHEAD"


async def test_what_another_server_writes_stays_its_owners(nodes: Nodes) -> None:
    async with driven(nodes.here, question()) as (message_id, queue):
        await queue.put(TextDelta("secret"))
        async with nodes.there.reading(message_id) as reading:
            assert await reading.next() is not None
            # The buffer is there; it is nobody else's.
            async with connect(nodes.servers[1].address) as stranger:
                await stranger.sign_in()
                with pytest.raises(GraphQLErrors) as refused:
                    await stranger.read(message_id)
                assert refused.value.code == "NOT_FOUND"


async def test_changes_and_usage_are_told_at_the_other_server(nodes: Nodes) -> None:
    async with nodes.there.subscribe("subscription { changes { __typename } }", {}) as changes:
        turn = await nodes.here.send("hello")
        await nodes.here.finish(turn["assistantMessage"]["id"])
        assert await changes.next() is not None


async def test_a_server_that_shuts_down_begins_nothing_anew(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    server = nodes.servers[0]
    async with driven(nodes.there, question()) as (message_id, words):
        # What its own server writes, as it would look to one that believes that one dead.
        hold = StreamHold(parse_id(IdKind.MESSAGE, message_id), new_id(), new_id(), 2, "driven")
        monkeypatch.setattr(server.generations, "draining", True)
        with pytest.raises(AnswerWaitsError):
            await server.turns.restart(hold)
        await words.put(TextDelta("whole"))
        await words.put(None)
        assert (await nodes.there.finish(message_id))["text"] == "whole"


async def test_r39_a_server_that_lacks_connections_keeps_what_it_writes(
    cluster: Cluster, postgres_url: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pool = {"database_pool_size": 2, "lease_seconds": 1.0}
    async with (
        two_servers(cluster[0], postgres_url, tmp_path_factory, **pool) as servers,
        at_both(servers) as (here, there),
        driven(here, question()) as (message_id, words),
    ):
        await words.put(TextDelta("one "))
        async with there.reading(message_id) as reading, AsyncExitStack() as taken:
            events = reading.events()
            assert text_of([await anext(events)]) == "one "
            for _ in range(2):
                await taken.enter_async_context(servers[0].database.acquire())
            for _ in range(3):
                await renewed(servers[1], message_id)
            await words.put(TextDelta("two"))
            assert text_of([await anext(events)]) == "two"
            await words.put(None)
            await taken.aclose()
            end = await anext(events)
        assert end["message"]["status"] == "COMPLETE"


async def renewed(server: Server, message_id: str) -> None:
    """The lease of an answer is another than it was."""
    find, key = "SELECT lease_expires_at FROM streams WHERE message_id = $1", parse_id(IdKind.MESSAGE, message_id)
    async with asyncio.timeout(20), server.database.acquire() as connection:
        before = await connection.fetchval(find, key)
        while before is not None and await connection.fetchval(find, key) == before:
            await asyncio.sleep(0.05)
        assert before is not None


async def test_a_server_for_itself_alone_does_not_start_beside_them(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.runtime._SOLE_PATIENCE_SECONDS", 0.2)
    from config import SettingsError

    alone = Server(test_settings(str(cluster[1][0].settings.database_url), tmp_path))
    with pytest.raises(SettingsError, match="another server uses this database"):
        await alone.start()
