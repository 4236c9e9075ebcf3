"""One of two servers is cut off from Valkey, and a log is gone when its answer has ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from server.runtime import Server
from tests.client import Client, connect, text_of
from tests.conftest import make_database, test_settings
from tests.scripts import SCRIPTS, TextDelta
from tests.valkey import ValkeyServer


class Cable:
    """What leads from one server to a port: it can be cut with a word, or without one.

    Attributes:
        port: where the server connects to.
    """

    def __init__(self, to: int) -> None:
        self._to = to
        self._whole = asyncio.Event()
        self._whole.set()
        self._refuses = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = 0

    @asynccontextmanager
    async def laid(self) -> AsyncIterator[Cable]:
        async with await asyncio.start_server(self._connect, "127.0.0.1", 0) as server:
            self.port = server.sockets[0].getsockname()[1]
            try:
                yield self
            finally:
                tasks = list(self._tasks)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def cut(self, *, silently: bool) -> None:
        """Nothing passes any more; whoever is connected, and whoever connects, is told so or waits."""
        self._whole.clear()
        self._refuses = not silently
        if not silently:
            self._abort()

    def mend(self) -> None:
        """All passes, also what was held back."""
        self._refuses = False
        self._whole.set()

    def _abort(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        writers = [writer]
        try:
            if not self._refuses:
                await self._whole.wait()
                far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._to)
                writers.append(far_writer)
                self._writers.update(writers)
                await asyncio.gather(self._carry(reader, far_writer), self._carry(far_reader, writer))
        except OSError:
            pass
        finally:
            for each in writers:
                each.transport.abort()
                self._writers.discard(each)
                with suppress(OSError):
                    await each.wait_closed()
            self._tasks.discard(task)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            await self._whole.wait()
            writer.write(data)
            await writer.drain()
        # Whoever hangs up has both ends of it gone.
        writer.transport.abort()


@dataclass
class Pair:
    """Two servers, the first of which has its Valkey at the end of a cable; and one user at both."""

    valkey: ValkeyServer
    cable: Cable
    here: Client
    there: Client


@pytest.fixture
async def pair(postgres_url: str, tmp_path: Path) -> AsyncIterator[Pair]:
    url = await make_database(postgres_url)
    async with AsyncExitStack() as stack:
        valkey = await stack.enter_async_context(ValkeyServer())
        cable = await stack.enter_async_context(Cable(valkey.port).laid())
        clients = []
        for name, port in (("one", cable.port), ("two", valkey.port)):
            settings = test_settings(url, tmp_path / name, broadcast_url=f"redis://127.0.0.1:{port}/0")
            server = Server(settings, providers=SCRIPTS.models())
            await server.start()
            stack.push_async_callback(server.close)
            stack.push_async_callback(server.drain)
            clients.append(await stack.enter_async_context(connect(server.address)))
        here, there = clients
        await here.sign_in()
        there.token, there.id = here.token, here.id
        yield Pair(valkey, cable, here, there)


@pytest.mark.parametrize("silently", [True, False], ids=["silently", "with a refusal"])
async def test_what_a_server_writes_that_is_cut_off_is_stored_and_told_everywhere(pair: Pair, silently: bool) -> None:
    question = f"Cut off {silently}"
    message_id = (await pair.here.send(question, model="driven"))["assistantMessage"]["id"]
    queue = SCRIPTS.driven.queue(question)
    async with pair.here.reading(message_id) as own, pair.there.reading(message_id) as other:
        queue.put_nowait(TextDelta("before, "))
        for reading in (own, other):
            assert await reading.next() is not None
        pair.cable.cut(silently=silently)
        queue.put_nowait(TextDelta("while it was cut off"))
        queue.put_nowait(None)
        for reading in (own, other):
            events = [event async for event in reading.events()]
            assert text_of(events) == "while it was cut off"
            ended = events[-1]["message"]
            assert (ended["status"], ended["text"]) == ("COMPLETE", "before, while it was cut off")
    # The other server is not disturbed meanwhile, and this one serves what the database has.
    turn = await pair.there.send("Are you well?")
    assert (await pair.there.finish(turn["assistantMessage"]["id"]))["status"] == "COMPLETE"
    assert (await pair.here.message(turn["assistantMessage"]["id"]))["status"] == "COMPLETE"
    pair.cable.mend()
    question = f"Back {silently}"
    message_id = (await pair.here.send(question, model="driven"))["assistantMessage"]["id"]
    async with pair.there.reading(message_id) as reading:
        SCRIPTS.driven.queue(question).put_nowait(TextDelta("word by word"))
        payload = await reading.next()
        assert payload is not None
        assert payload["data"]["messageStream"]["text"] == "word by word"
        SCRIPTS.driven.queue(question).put_nowait(None)
        assert [event async for event in reading.events()][-1]["message"]["status"] == "COMPLETE"


async def test_an_answer_that_has_ended_is_read_at_every_server_without_its_log(pair: Pair) -> None:
    question = "Ended, and its log is gone"
    message_id = (await pair.here.send(question, model="driven"))["assistantMessage"]["id"]
    queue = SCRIPTS.driven.queue(question)
    cursors: list[str] = []
    words = [f"w{n} " for n in range(6)]
    async with pair.there.reading(message_id) as reading:
        for word in words:
            queue.put_nowait(TextDelta(word))
            payload = await reading.next()
            assert payload is not None
            cursors.append(payload["data"]["messageStream"]["cursor"])
        queue.put_nowait(None)
        assert [event async for event in reading.events()][-1]["message"]["status"] == "COMPLETE"
    await pair.valkey.run("FLUSHALL")
    for client in (pair.here, pair.there):
        assert text_of(await client.read(message_id)) == "".join(words)
        for place, cursor in enumerate(cursors):
            events = await client.read(message_id, cursor)
            assert text_of(events) == "".join(words[place + 1 :])
            assert events[-1]["message"]["text"] == "".join(words)
