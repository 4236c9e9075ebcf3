"""Several server processes on one database and one Valkey: killed, frozen and drained under their readers."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import orjson
import pytest

from tests.client import Client, connect, text_of
from tests.conftest import make_database
from tests.e2e.test_process import STEADY, read_some, running
from tests.process import ServerProcess
from tests.valkey import ValkeyServer, unbounded

SCRIPTS = {
    "steady": {"wordsPerSecond": 200, "steps": [{"text": STEADY}]},
    "thinking": {"steps": [{"pause": 3}, {"text": "Forty-two."}]},
}


@pytest.fixture
async def nodes(postgres_url: str, tmp_path: Path) -> AsyncIterator[list[ServerProcess]]:
    """Two processes that share everything but their folders."""
    scripts = tmp_path / "scripts.json"
    scripts.write_bytes(orjson.dumps(SCRIPTS))
    async with AsyncExitStack() as stack:
        valkey = await stack.enter_async_context(ValkeyServer())
        environment = {
            "DATABASE_URL": await make_database(postgres_url),
            "BROADCAST_URL": valkey.url,
            "SESSION_SECRET": "s" * 32,
            "SCRIPTED_MODELS_FILE": str(scripts),
            "CHECKPOINT_SECONDS": "1",
        }
        folders = [{"DATA_DIR": str(tmp_path / name)} for name in ("one", "two")]
        yield [await stack.enter_async_context(running(environment, **folder)) for folder in folders]
        # R34: whoever was killed meanwhile has left nothing that stays for ever.
        assert await unbounded(valkey) == []


async def at(stack: AsyncExitStack, nodes: list[ServerProcess]) -> list[Client]:
    """One new user at every node."""
    clients = [await stack.enter_async_context(connect(node.address)) for node in nodes]
    await clients[0].sign_in()
    for client in clients[1:]:
        client.token, client.id = clients[0].token, clients[0].id
    return clients


async def test_two_servers_that_start_at_once_migrate_once(nodes: list[ServerProcess]) -> None:
    async with AsyncExitStack() as stack:
        for client in await at(stack, nodes):
            assert (await client.run("{ viewer { id } }"))["viewer"]["id"] == client.id


async def test_what_a_killed_server_had_shown_is_kept_and_told_by_the_other(nodes: list[ServerProcess]) -> None:
    async with AsyncExitStack() as stack:
        here, there = await at(stack, nodes)
        message_id = (await here.send("go", model="steady"))["assistantMessage"]["id"]
        seen_there = asyncio.create_task(there.read(message_id))
        held, cursor = await read_some(here, message_id, 1_000)
        await nodes[0].end(signal.SIGKILL)
        killed = time.monotonic()
        events = await seen_there
        assert time.monotonic() - killed < 15
        ended = events[-1]["message"]
        assert (ended["status"], ended["error"]["code"]) == ("INTERRUPTED", "SERVER_LOST")
        assert text_of(events) == ended["text"]
        assert STEADY.startswith(ended["text"])
        # Also what a reader at the dead server was shown last, though no checkpoint had it.
        assert ended["text"].startswith(held)
        rest = await there.read(message_id, cursor)
        assert held + text_of(rest) == ended["text"]
        # The thread is free.
        turn = await there.retry(message_id, model="steady")
        await there.stop(turn["assistantMessage"]["id"])


async def test_a_killed_server_whose_model_was_still_thinking_is_replaced_by_another(
    nodes: list[ServerProcess],
) -> None:
    async with AsyncExitStack() as stack:
        here, there = await at(stack, nodes)
        message_id = (await here.send("go", model="thinking"))["assistantMessage"]["id"]
        reading = asyncio.create_task(there.read(message_id))
        async with here.reading(message_id):
            await nodes[0].end(signal.SIGKILL)
        events = await reading
        assert (events[-1]["message"]["status"], text_of(events)) == ("COMPLETE", "Forty-two.")
        assert [event["__typename"] for event in events] == ["MessageDelta", "MessageEnded"]
        report = await there.run("{ usage(timeframe: DAY) { totals { requests } } }")
        assert report["usage"]["totals"]["requests"] == 1


async def test_a_frozen_server_whose_answer_was_begun_anew_elsewhere_leaves_it_alone(
    nodes: list[ServerProcess],
) -> None:
    async with AsyncExitStack() as stack:
        here, there = await at(stack, nodes)
        message_id = (await here.send("go", model="thinking"))["assistantMessage"]["id"]
        nodes[0].process.send_signal(signal.SIGSTOP)
        events = await there.read(message_id)
        assert text_of(events) == events[-1]["message"]["text"] == "Forty-two."
        nodes[0].process.send_signal(signal.SIGCONT)
        # Asked when it is awake, it has what was stored, and nothing of its own.
        assert await here.read(message_id) == await there.read(message_id)
        turn = await here.send("still alive?", model="thinking")
        assert (await here.finish(turn["assistantMessage"]["id"]))["text"] == "Forty-two."
        assert await there.message(message_id) == events[-1]["message"]


async def test_a_frozen_server_that_wakes_can_neither_append_nor_finish(nodes: list[ServerProcess]) -> None:
    async with AsyncExitStack() as stack:
        here, there = await at(stack, nodes)
        message_id = (await here.send("go", model="steady"))["assistantMessage"]["id"]
        reading = asyncio.create_task(there.read(message_id))
        await read_some(there, message_id, 500)
        nodes[0].process.send_signal(signal.SIGSTOP)
        events = await reading
        ended = events[-1]["message"]
        assert (ended["status"], text_of(events)) == ("INTERRUPTED", ended["text"])
        nodes[0].process.send_signal(signal.SIGCONT)
        # Awake and asked: what it says is what was stored, and stays so.
        awake = await here.read(message_id)
        assert text_of(awake) == ended["text"]
        turn = await here.send("still alive?", model="steady")
        await read_some(here, turn["assistantMessage"]["id"], 100)
        await here.stop(turn["assistantMessage"]["id"])
        assert await there.message(message_id) == ended


async def test_what_a_server_cannot_finish_before_it_ends_it_tells_its_readers_first(
    nodes: list[ServerProcess],
) -> None:
    async with AsyncExitStack() as stack:
        (here,) = await at(stack, nodes[:1])
        message_id = (await here.send("go", model="steady"))["assistantMessage"]["id"]
        async with here.reading(message_id) as reading:
            events = [await anext(reading.events())]
            nodes[0].process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(10):
                while "Stopping" not in nodes[0].output:
                    await asyncio.sleep(0.01)
            nodes[0].process.send_signal(signal.SIGTERM)
            events += [event async for event in reading.events()]
        message = events[-1]["message"]
        assert (message["status"], message["error"]["code"]) == ("INTERRUPTED", "SERVER_SHUTDOWN")
        assert text_of(events) == message["text"]


async def test_a_drained_server_sends_its_readers_to_the_other(nodes: list[ServerProcess]) -> None:
    async with AsyncExitStack() as stack:
        here, there = await at(stack, nodes)
        message_id = (await there.send("go", model="steady"))["assistantMessage"]["id"]
        held, cursor, begun = "", None, asyncio.Event()

        async def follow() -> None:
            nonlocal held, cursor
            async with here.reading(message_id) as reading:
                async for event in reading.events():
                    held, cursor = held + event["text"], event["cursor"]
                    begun.set()

        following = asyncio.create_task(follow())
        async with asyncio.timeout(30):
            await begun.wait()
        ending = asyncio.create_task(nodes[0].end(signal.SIGTERM))
        with pytest.raises(ConnectionError, match="1012"):
            await following
        assert await ending == 0
        # The rest at the other one, from where the first was left.
        rest = asyncio.create_task(there.read(message_id, cursor))
        stopped = await there.stop(message_id)
        assert held + text_of(await rest) == stopped["text"]
