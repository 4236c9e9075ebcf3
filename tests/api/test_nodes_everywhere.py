"""Two servers at every kind of Valkey: what one writes the other reads, and a death among those who serve is no end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass

import pytest

from providers.base import TextDelta
from server.runtime import Server
from tests.api.test_nodes import at_both, driven, question, two_servers
from tests.client import Client, Subscription, text_of
from tests.scripts import SCRIPTS
from tests.valkey import KINDS, SentinelGroup, Valkey, ValkeyCluster

DEADLINE_SECONDS = 60.0


@dataclass
class Pair:
    """One user at two servers."""

    valkey: Valkey
    servers: list[Server]
    here: Client
    there: Client


@pytest.fixture(scope="module", params=["with TLS", "Sentinel with TLS", "cluster with TLS"])
async def shared(
    request: pytest.FixtureRequest, postgres_url: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[Valkey, list[Server]]]:
    """Two servers at a Valkey of each kind, with what there is of passwords and certificates."""
    async with KINDS[request.param]() as valkey, two_servers(valkey, postgres_url, tmp_path_factory) as servers:
        yield valkey, servers


@pytest.fixture
async def pair(shared: tuple[Valkey, list[Server]]) -> AsyncIterator[Pair]:
    """A new user at both servers."""
    async with at_both(shared[1]) as (here, there):
        yield Pair(*shared, here, there)


async def test_an_answer_a_stop_and_the_feed_cross(pair: Pair) -> None:
    asked = question()
    async with (
        pair.there.subscribe("subscription { changes { __typename } }", {}) as changes,
        driven(pair.here, asked) as (message_id, queue),
        pair.there.reading(message_id) as reading,
    ):
        assert await changes.next() is not None
        for word in ("Grüß ", "🦉 ", "Ende"):
            await queue.put(TextDelta(word))
            payload = await reading.next()
            assert payload is not None
            assert payload["data"]["messageStream"]["text"] == word
        stopped = await pair.there.stop(message_id)
        assert (stopped["status"], stopped["text"]) == ("STOPPED", "Grüß 🦉 Ende")
        async with asyncio.timeout(DEADLINE_SECONDS):
            await SCRIPTS.driven.closing(asked).wait()


async def shown(reading: Subscription, so_far: str, whole: str) -> str:
    """Read on until all of it was shown, and nothing twice or out of place."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while len(so_far) < len(whole):
            payload = await reading.next()
            assert payload is not None
            so_far += payload["data"]["messageStream"]["text"]
            assert whole.startswith(so_far)
    return so_far


async def test_who_reads_while_a_server_dies_sees_a_pause_and_then_the_rest(pair: Pair) -> None:
    words = [f"word{n} " for n in range(60)]
    async with driven(pair.here, question()) as (message_id, queue), AsyncExitStack() as stack:
        readings = [await stack.enter_async_context(client.reading(message_id)) for client in (pair.here, pair.there)]
        for word in words[:30]:
            await queue.put(TextDelta(word))
        seen = [await shown(reading, "", "".join(words[:30])) for reading in readings]
        pair.valkey.kill()
        for word in words[30:]:
            await queue.put(TextDelta(word))
        await pair.valkey.start()
        # All of it, and the answer has not ended: it is the log that tells, not the database.
        whole = "".join(words)
        for reading, so_far in zip(readings, seen, strict=True):
            await shown(reading, so_far, whole)
        late = asyncio.create_task(pair.there.read(message_id))
        await queue.put(None)
        assert text_of(await late) == whole


@pytest.fixture
async def group() -> AsyncIterator[SentinelGroup]:
    """A group of its own: it ends otherwise than it began."""
    async with SentinelGroup() as group:
        yield group


async def test_r35_what_a_failover_loses_the_producer_restores(
    group: SentinelGroup, postgres_url: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    words = [f"word{n} " for n in range(60)]
    async with AsyncExitStack() as stack:
        servers = await stack.enter_async_context(two_servers(group, postgres_url, tmp_path_factory))
        here, there = await stack.enter_async_context(at_both(servers))
        message_id, queue = await stack.enter_async_context(driven(here, question()))
        readings = [await stack.enter_async_context(client.reading(message_id)) for client in (here, there)]
        seen = ["", ""]
        for first, end in ((0, 20), (20, 40)):
            for word in words[first:end]:
                await queue.put(TextDelta(word))
            seen = [
                await shown(reading, so_far, "".join(words[:end]))
                for reading, so_far in zip(readings, seen, strict=True)
            ]
            if end == 20:
                # From here on the replica falls behind: what follows is shown, and is lost.
                await group.run("WAIT", 1, 5_000)
                await group.part()
        held = int(str(await group.replica.run("XLEN", f"{{threadgraph}}:stream:{raw(message_id)}:1")))
        assert 0 < held < int(str(await group.run("XLEN", f"{{threadgraph}}:stream:{raw(message_id)}:1")))
        group.kill()
        for word in words[40:]:
            await queue.put(TextDelta(word))
        await group.promoted()
        whole = "".join(words)
        for reading, so_far in zip(readings, seen, strict=True):
            await shown(reading, so_far, whole)
        late = await stack.enter_async_context(there.reading(message_id))
        await shown(late, "", whole)


def raw(message_id: str) -> str:
    """The part of an id that keys have."""
    return message_id.partition("_")[2]


async def test_a_replica_in_a_cluster_takes_over_in_the_middle_of_an_answer(
    postgres_url: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    words = [f"word{n} " for n in range(60)]
    async with AsyncExitStack() as stack:
        cluster = await stack.enter_async_context(ValkeyCluster(with_replica=True))
        servers = await stack.enter_async_context(two_servers(cluster, postgres_url, tmp_path_factory))
        here, there = await stack.enter_async_context(at_both(servers))
        asked = question()
        message_id, queue = await stack.enter_async_context(driven(here, asked))
        reading = await stack.enter_async_context(there.reading(message_id))
        for word in words[:30]:
            await queue.put(TextDelta(word))
        seen = await shown(reading, "", "".join(words[:30]))
        cluster.kill()
        for word in words[30:]:
            await queue.put(TextDelta(word))
        await cluster.promoted()
        await shown(reading, seen, "".join(words))
        # Notices find their way, too.
        assert (await there.stop(message_id))["status"] == "STOPPED"
        async with asyncio.timeout(DEADLINE_SECONDS):
            await SCRIPTS.driven.closing(asked).wait()
