"""Requests in a closed loop over keep-alive connections: as many at once as there are connections.

The client is a bare protocol on uvloop that sends bytes made beforehand, so that it costs little beside a server.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import orjson

from bench.cores import Cores, yardstick_ms
from bench.servers import HOST, BenchError, ServerProcess
from bench.window import Usage, Window

_LENGTH = re.compile(rb"\r\nContent-Length: (\d+)", re.IGNORECASE)
_WARM_UP_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class HttpRound:
    """One window of one server under one kind of request."""

    requests: int
    p50_ms: float
    p99_ms: float
    usage: Usage

    @property
    def cpu_ms(self) -> float:
        """CPU of the server a request, in milliseconds."""
        return self.usage.server_seconds / self.requests * 1_000

    @property
    def per_second(self) -> float:
        """Requests answered a second."""
        return self.requests / self.usage.seconds


class HttpConnection(asyncio.Protocol):
    """One keep-alive connection that carries one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._rest = b""
        self._answer: asyncio.Future[bytes] | None = None

    @classmethod
    async def open(cls, port: int) -> HttpConnection:
        """A connection to a server on 127.0.0.1."""
        _, connection = await asyncio.get_running_loop().create_connection(cls, HOST, port)
        return connection

    async def exchange(self, request: bytes) -> bytes:
        """Send a request; the body of the answer.

        Raises:
            BenchError: a status other than 200, or the connection was lost.
        """
        assert self._transport is not None, "open"
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answer

    def close(self) -> None:
        """Hang up."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop."""
        # uvloop's transports are no subclasses of asyncio's.
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Called by the loop."""
        if self._rest:
            data = self._rest + data
        head = data.find(b"\r\n\r\n")
        length = _LENGTH.search(data, 0, head) if head >= 0 else None
        if length is None or len(data) < head + 4 + int(length[1]):
            self._rest = data
            return
        self._rest = b""
        answer, self._answer = self._answer, None
        if answer is None or answer.done():
            return
        if data.startswith(b"HTTP/1.1 200 "):
            answer.set_result(data[head + 4 :])
        else:
            answer.set_exception(BenchError(f"unexpected answer: {data[:500]!r}"))

    def connection_lost(self, error: Exception | None) -> None:
        """Called by the loop."""
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(BenchError(f"the connection was lost: {error}"))


def get_request(path: str, token: str) -> bytes:
    """A GET as bytes."""
    return f"GET {path} HTTP/1.1\r\nHost: {HOST}\r\nAuthorization: Bearer {token}\r\n\r\n".encode()


def graphql_request(query: str, token: str | None = None, variables: dict[str, Any] | None = None) -> bytes:
    """A GraphQL request by POST as bytes."""
    body = orjson.dumps({"query": query, "variables": variables or {}})
    authorization = f"Authorization: Bearer {token}\r\n" if token else ""
    head = (
        f"POST /graphql HTTP/1.1\r\nHost: {HOST}\r\n{authorization}Content-Type: application/json\r\n"
        f"Accept: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def fetch(port: int, request: bytes) -> bytes:
    """The answer to one request over a connection of its own."""
    connection = await HttpConnection.open(port)
    try:
        return await connection.exchange(request)
    finally:
        connection.close()


async def measure_requests(
    server: ServerProcess, cores: Cores, request: bytes, *, connections: int, seconds: float
) -> HttpRound:
    """Keep every connection busy with the same request: warm up, then measure for so many seconds.

    Raises:
        BenchError: an answer differed from the first one.
    """
    pace = yardstick_ms(cores.server)
    expected = await fetch(server.port, request)
    opened = [await HttpConnection.open(server.port) for _ in range(connections)]
    latencies: list[float] = []
    workers = [asyncio.create_task(_keep_busy(connection, request, expected, latencies)) for connection in opened]
    try:
        await _unless_failed(workers, _WARM_UP_SECONDS)
        latencies.clear()
        window = Window(server, cores, pace)
        await _unless_failed(workers, seconds)
        usage = window.close()
        measured = sorted(latencies)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        for connection in opened:
            connection.close()
    if not measured:
        raise BenchError(f"{server.name} answered nothing in {seconds:g} s")
    return HttpRound(len(measured), percentile(measured, 0.5) * 1_000, percentile(measured, 0.99) * 1_000, usage)


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value that this share of an ordered sequence does not exceed."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


async def _keep_busy(connection: HttpConnection, request: bytes, expected: bytes, latencies: list[float]) -> None:
    now = time.perf_counter
    while True:
        began = now()
        body = await connection.exchange(request)
        latencies.append(now() - began)
        if body != expected:
            raise BenchError(f"the answer changed: {body[:500]!r}")


async def _unless_failed(workers: list[asyncio.Task[None]], seconds: float) -> None:
    done, _ = await asyncio.wait(workers, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for worker in done:
        worker.result()
