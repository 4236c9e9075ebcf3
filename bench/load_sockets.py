"""Many sockets at once: what idle ones cost, what they leave behind, and what ones that are read from cost."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import orjson

from bench.cores import Cores, yardstick_ms
from bench.load_http import HttpConnection, graphql_request
from bench.load_streams import RATE, READ, OpenStream, ask, model_name, product_socket
from bench.servers import BenchError, ServerProcess
from bench.websocket import StreamReader, TextReader
from bench.window import Usage, Window

SESSION = "mutation { startAnonymousSession { token viewer { id } } }"
_CHANGES = "subscription { changes { __typename } }"
_AT_ONCE = 16
_WARM_UP = 200
_SETTLE_SECONDS = 3.0
_FREED_SECONDS = 30.0
# Connections to the database come and go meanwhile.
_MOST_LEFT = 8


@dataclass(frozen=True, slots=True)
class IdleRound:
    """So many sockets, opened, left alone, and closed.

    Attributes:
        sockets: how many.
        open_seconds: until the last one had its first event.
        before_mib: memory of the server before the first.
        open_mib: with all of them open.
        after_mib: when all are gone.
        descriptors: of the server: before, open and after.
        usage: of the time in which nothing happened.
    """

    sockets: int
    open_seconds: float
    before_mib: float
    open_mib: float
    after_mib: float
    descriptors: tuple[int, int, int]
    usage: Usage

    @property
    def kib_each(self) -> float:
        """Memory of the server for each of them."""
        return (self.open_mib - self.before_mib) * 1_024 / self.sockets


async def sessions(server: ServerProcess, count: int) -> list[str]:
    """The tokens of so many new users."""
    tokens: list[str] = []

    async def make(connection: HttpConnection) -> None:
        answer: dict[str, Any] = orjson.loads(await connection.exchange(graphql_request(SESSION)))
        tokens.append(answer["data"]["startAnonymousSession"]["token"])

    await _each(server, count, make)
    return tokens


async def measure_idle(server: ServerProcess, cores: Cores, tokens: list[str], seconds: float) -> IdleRound:
    """A socket for each user, with a subscription to what changes for them; nothing does.

    Raises:
        BenchError: not all of them are answered, or not all are freed in time.
    """
    # What the first sockets make a server allocate for good is not theirs.
    unused = server.descriptors()
    await _close(server, await _open(server, tokens[:_WARM_UP]), unused)
    pace = yardstick_ms(cores.server)
    before = server.descriptors(), server.resident_mib()
    loop = asyncio.get_running_loop()
    began = loop.time()
    readers = await _open(server, tokens)
    took = loop.time() - began
    try:
        await asyncio.sleep(_SETTLE_SECONDS)
        window = Window(server, cores, pace)
        await asyncio.sleep(seconds)
        usage = window.close()
        opened = server.descriptors(), server.resident_mib()
        if lost := sum(reader.closed for reader in readers):
            raise BenchError(f"{lost} of {len(readers)} idle sockets were closed by the server")
    finally:
        await _close(server, readers, before[0])
    await asyncio.sleep(_SETTLE_SECONDS)
    after = server.descriptors(), server.resident_mib()
    return IdleRound(
        sockets=len(tokens),
        open_seconds=took,
        before_mib=before[1],
        open_mib=opened[1],
        after_mib=after[1],
        descriptors=(before[0], opened[0], after[0]),
        usage=usage,
    )


def sharing(answers: int) -> OpenStream:
    """Opens streams that share so many answers, each read by as many."""
    asked: list[asyncio.Task[str]] = []
    opened = 0

    async def open_stream(server: ServerProcess, connection: HttpConnection, token: str, streams: int) -> StreamReader:
        nonlocal opened
        number, opened = opened, opened + 1
        if number < answers:
            # On the connection of whoever comes first, who waits for it.
            asked.append(asyncio.ensure_future(ask(connection, token, model_name(streams))))
            await asked[number]
        message_id = await asked[number % answers]
        reader = StreamReader(*product_socket(token, READ, {"messageId": message_id}), RATE)
        await reader.open(server.port)
        return reader

    return open_stream


async def _open(server: ServerProcess, tokens: list[str]) -> list[TextReader]:
    readers = [TextReader(*product_socket(token, _CHANGES, {})) for token in tokens]
    waiting = iter(readers)

    async def opener() -> None:
        for reader in waiting:
            await reader.open(server.port)
            _, text = await reader.next()
            if b'"ChangesReset"' not in text:
                raise BenchError(f"a feed began with {text[:300]!r}")

    async with asyncio.TaskGroup() as group:
        for _ in range(_AT_ONCE):
            group.create_task(opener())
    gc.collect()
    return readers


async def _close(server: ServerProcess, readers: list[TextReader], descriptors: int) -> None:
    for reader in readers:
        reader.close()
    try:
        async with asyncio.timeout(_FREED_SECONDS):
            while server.descriptors() > descriptors + _MOST_LEFT:
                await asyncio.sleep(0.1)
    except TimeoutError:
        left = server.descriptors() - descriptors
        raise BenchError(f"{left} descriptors of {len(readers)} closed sockets are still open") from None


async def _each(server: ServerProcess, count: int, do: Callable[[HttpConnection], Awaitable[None]]) -> None:
    numbers = iter(range(count))

    async def worker() -> None:
        connection = await HttpConnection.open(server.port)
        try:
            for _ in numbers:
                await do(connection)
        finally:
            connection.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(_AT_ONCE):
            group.create_task(worker())
