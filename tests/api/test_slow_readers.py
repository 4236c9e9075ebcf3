"""Clients that do not read, or are gone without a word: they delay nobody, cost a bounded amount, and are let go.

What transports do is told twice: on the event loop of the tests, and on the one of servers, which has others.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import psutil
import pytest
import uvloop

from server.graphql_socket import NOT_READING, SocketTimes
from server.runtime import Server
from tests.client import PROTOCOL, READ, Client, connect, text_of, transport_of
from tests.conftest import make_database, test_settings
from tests.scripts import SCRIPTS, TextDelta

WINDOW = 4_096
# Kilobytes: more than a closed window, the kernel and the server hold together.
ENOUGH = 400


@pytest.fixture
def times(server: Server, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the times of the shared server's sockets for one test."""

    def set_times(**seconds: float) -> None:
        monkeypatch.setattr(server.application.sockets.limits, "times", SocketTimes(**seconds))

    return set_times


@asynccontextmanager
async def narrow(client: Client, window: int = WINDOW) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
    """An acknowledged socket with a small window. It is cut at the end."""

    def make(address: Any) -> socket.socket:
        made = socket.socket(address[0], address[1], address[2])
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
        made.setblocking(False)
        return made

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(socket_factory=make)) as http:
        ws = await http.ws_connect(client.url, protocols=(PROTOCOL,), max_msg_size=0)
        transport = transport_of(ws)
        try:
            await say(ws, {"type": "connection_init", "payload": {"authorization": f"Bearer {client.token}"}})
            assert (await ws.receive_json())["type"] == "connection_ack"
            yield ws
        finally:
            transport.abort()


async def say(ws: aiohttp.ClientWebSocketResponse, message: Any) -> None:
    await ws.send_str(orjson.dumps(message).decode())


async def follow(ws: aiohttp.ClientWebSocketResponse, message_id: str, operation_id: str = "1") -> dict[str, Any]:
    """Subscribe to an answer that has begun; its first event."""
    payload = {"query": READ, "variables": {"id": message_id}}
    await say(ws, {"id": operation_id, "type": "subscribe", "payload": payload})
    event: dict[str, Any] = (await ws.receive_json())["payload"]["data"]["messageStream"]
    return event


async def rest_of(ws: aiohttp.ClientWebSocketResponse, operation_id: str = "1") -> list[dict[str, Any]]:
    """All further events of one operation, until it completes or the socket closes."""
    events = []
    while (frame := await ws.receive()).type is aiohttp.WSMsgType.TEXT:
        message = orjson.loads(frame.data)
        if message["id"] == operation_id:
            if message["type"] == "complete":
                break
            events.append(message["payload"]["data"]["messageStream"])
    return events


async def until(reached: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not reached():
            await asyncio.sleep(0.01)


def served(server: Server, port: int) -> bool:
    """Whether the server has a descriptor of the connection from this port."""
    own = int(server.address.rsplit(":", 1)[1])
    return any(
        one.laddr.port == own and one.raddr and one.raddr.port == port
        for one in psutil.Process().net_connections("tcp4")
    )


def port_of(ws: aiohttp.ClientWebSocketResponse) -> int:
    port: int = transport_of(ws).get_extra_info("sockname")[1]
    return port


def of_sockets() -> set[str]:
    """The tasks that sockets have at this moment, by name."""
    return {task.get_name() for task in asyncio.all_tasks()} & {"socket operation", "socket drain", "closing socket"}


class Answer:
    """An answer that the test writes, a thousand characters at a time."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.question = f"Slow {uuid.uuid4()}"
        self.queue = SCRIPTS.driven.queue(self.question)
        self.text = ""
        self.id = ""

    async def begin(self) -> Answer:
        turn = await self.client.send(self.question, model="driven")
        self.id = turn["assistantMessage"]["id"]
        self.say("Well, ")
        return self

    def say(self, text: str) -> None:
        self.text += text
        self.queue.put_nowait(TextDelta(text))

    async def go_on(self) -> None:
        for number in range(ENOUGH):
            self.say(f"{number:06} ".ljust(1_000, "x"))
            await asyncio.sleep(0.001)

    def end(self) -> None:
        self.queue.put_nowait(None)


async def closed_window(server: Server, client: Client, caplog: pytest.LogCaptureFixture) -> None:
    """One of eleven readers stops, is let go, reads what it was sent, and resumes."""
    sockets = server.application.sockets
    already, running = sockets.let_go["unread"], sockets.running
    answer = await Answer(client).begin()
    fast = [asyncio.create_task(client.read(answer.id)) for _ in range(10)]
    async with narrow(client) as slow:
        first = await follow(slow, answer.id)
        await until(lambda: sockets.running == running + 11)
        transport_of(slow).pause_reading()
        await answer.go_on()
        await until(lambda: sockets.let_go["unread"] == already + 1 and sockets.running == running + 10)
        (told,) = [record for record in caplog.records if hasattr(record, "bytes_waiting")]
        assert told.bytes_waiting < 65_536 + 50_000, "what is full, and the message that filled it"
        # It reads on in time: all that was sent is there, and the code.
        transport_of(slow).resume_reading()
        events = [first, *await rest_of(slow)]
        assert slow.close_code == NOT_READING
    held = text_of(events)
    assert answer.text.startswith(held)
    assert len(held) < len(answer.text)
    answer.end()
    for whole in await asyncio.gather(*fast):
        assert text_of(whole) == answer.text
    rest = await client.read(answer.id, events[-1]["cursor"])
    assert held + text_of(rest) == answer.text
    await until(lambda: not of_sockets())


async def never_again(server: Server, client: Client) -> None:
    """A reader stops for good: its connection is cut, and everything of it is freed."""
    sockets = server.application.sockets
    already, running = sockets.let_go["unread"], sockets.running
    answer = await Answer(client).begin()
    async with narrow(client) as slow:
        first = await follow(slow, answer.id)
        port = port_of(slow)
        assert served(server, port)
        transport_of(slow).pause_reading()
        await answer.go_on()
        await until(lambda: not served(server, port))
        assert (sockets.let_go["unread"], sockets.running) == (already + 1, running)
        await until(lambda: not of_sockets())
    answer.end()
    assert first["text"] + text_of(await client.read(answer.id, first["cursor"])) == answer.text


async def stop(server: Server, client: Client) -> None:
    """The server stops while a reader takes nothing, long before it would be let go."""
    answer = await Answer(client).begin()
    async with narrow(client) as slow:
        await follow(slow, answer.id)
        transport_of(slow).pause_reading()
        await answer.go_on()
        answer.end()
        port = port_of(slow)
        async with asyncio.timeout(5):
            await server.drain()
            await until(lambda: not served(server, port))


async def test_a_reader_with_a_closed_window_is_let_go_with_a_code_beside_ten_that_read_all(
    server: Server, client: Client, caplog: pytest.LogCaptureFixture, times: Callable[..., None]
) -> None:
    caplog.set_level(logging.INFO, "server.graphql_socket")
    times(stall_seconds=0.4)
    await closed_window(server, client, caplog)


async def test_nothing_is_left_of_a_reader_that_never_reads_again(
    server: Server, client: Client, times: Callable[..., None]
) -> None:
    times(stall_seconds=0.2, close_seconds=0.2)
    await never_again(server, client)


def test_so_it_is_on_the_event_loop_of_servers_and_one_stops_in_time_though_a_client_does_not_read(
    postgres_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "server.graphql_socket")

    async def story() -> None:
        settings = test_settings(await make_database(postgres_url), tmp_path, log_level="INFO")
        server = Server(settings, providers=SCRIPTS.models(), socket_times=SocketTimes(stall_seconds=0.4))
        await server.start()
        limits = server.application.sockets.limits
        try:
            async with connect(server.address) as client:
                await client.sign_in()
                await closed_window(server, client, caplog)
                limits.times = SocketTimes(stall_seconds=0.2, close_seconds=0.2)
                await never_again(server, client)
                limits.times = SocketTimes(close_seconds=0.2)
                await stop(server, client)
        finally:
            await server.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(story(), 60))


async def test_a_reader_that_takes_a_little_now_and_then_is_kept(
    server: Server, client: Client, times: Callable[..., None]
) -> None:
    times(stall_seconds=0.3)
    already = server.application.sockets.let_go["unread"]
    answer = await Answer(client).begin()
    async with narrow(client, 32_768) as slow:
        first = await follow(slow, answer.id)
        reading, transport = asyncio.create_task(rest_of(slow)), transport_of(slow)
        writing = asyncio.create_task(answer.go_on())
        writing.add_done_callback(lambda _: answer.end())
        async with asyncio.timeout(60):
            while not reading.done():
                transport.pause_reading()
                await asyncio.sleep(0.05)
                transport.resume_reading()
                await asyncio.sleep(0.001)
        await writing
        assert first["text"] + text_of(reading.result()) == answer.text
    assert server.application.sockets.let_go["unread"] == already


async def test_an_operation_that_is_completed_while_its_socket_is_full_takes_no_other_with_it(
    server: Server, client: Client
) -> None:
    running = server.application.sockets.running
    answer = await Answer(client).begin()
    async with narrow(client) as slow:
        firsts = {name: await follow(slow, answer.id, name) for name in ("stays", "goes")}
        transport_of(slow).pause_reading()
        await answer.go_on()
        await say(slow, {"id": "goes", "type": "complete"})
        await until(lambda: server.application.sockets.running == running + 1)
        answer.end()
        transport_of(slow).resume_reading()
        assert firsts["stays"]["text"] + text_of(await rest_of(slow, "stays")) == answer.text


_GONE = """
import asyncio, sys, aiohttp
async def main(url, token):
    async with aiohttp.ClientSession() as http, http.ws_connect(url, protocols=["graphql-transport-ws"]) as ws:
        await ws.send_json({"type": "connection_init", "payload": {"authorization": f"Bearer {token}"}})
        await ws.receive()
        query = "subscription { changes { __typename } }"
        await ws.send_json({"id": "1", "type": "subscribe", "payload": {"query": query}})
        await ws.receive()
        print(ws.get_extra_info("sockname")[1], flush=True)
        async for _ in ws:
            pass
asyncio.run(main(*sys.argv[1:]))
"""


async def test_a_stopped_process_is_found_by_the_pings_and_freed(
    server: Server, client: Client, times: Callable[..., None]
) -> None:
    times(heartbeat_seconds=0.4)
    sockets = server.application.sockets
    already, running = sockets.let_go["silent"], sockets.running
    gone = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _GONE, client.url, str(client.token), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert gone.stdout is not None
        port = int(await gone.stdout.readline())
        async with client.subscribe("subscription { changes { __typename } }", {}) as stays:
            await stays.next()
            # Reads, and so answers pings, for as long as the test goes on.
            reading = asyncio.create_task(stays.next())
            assert sockets.running == running + 2
            gone.send_signal(signal.SIGSTOP)
            await until(lambda: not served(server, port) and sockets.running == running + 1)
            assert sockets.let_go["silent"] == already + 1
            assert not reading.done()
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
    finally:
        gone.kill()
        await gone.wait()
