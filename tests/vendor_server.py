"""A model vendor for tests: a real socket on 127.0.0.1 that sends, byte by byte, what each test scripts.

    async def script(wire: Wire) -> None:
        await wire.head()
        await wire.event({"choices": [{"delta": {"content": "Hello"}}]})
        wire.reset()

    async with VendorServer(script) as vendor:
        ...  # vendor.base_url, vendor.requests, vendor.connections

The script runs once for every request. It writes HTTP by hand on purpose: an HTTP library would repair or refuse most
of what the tests are about. When it returns, the connection is closed, unless the answer had a frame and `end` finished
it: then the next request on the connection is awaited.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias

import orjson

Framing: TypeAlias = Literal["chunked", "close"]

# The client lives in the same loop: after so many turns it has read what was written before.
_TURNS_TO_BE_READ = 6


@dataclass(slots=True, frozen=True)
class ReceivedRequest:
    """One request as it came over the wire; header names in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return orjson.loads(self.body)


class Wire:
    """The server's end of one connection while one request is answered."""

    def __init__(
        self,
        request: ReceivedRequest,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        client_left: asyncio.Event,
    ) -> None:
        self.request = request
        self.sent = 0
        self.reusable = False
        self._reader = reader
        self._writer = writer
        self._client_left = client_left
        self._chunked = False

    async def head(
        self,
        status: int = 200,
        *,
        content_type: str | None = "text/event-stream",
        framing: Framing = "chunked",
        headers: dict[str, str] | None = None,
    ) -> None:
        """Send the status line and the headers; from here on `send` frames what it sends."""
        self._chunked = framing == "chunked"
        lines = [f"HTTP/1.1 {status} Scripted"]
        lines += [f"Content-Type: {content_type}"] if content_type else []
        lines += ["Transfer-Encoding: chunked" if self._chunked else "Connection: close"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        await self.raw("\r\n".join([*lines, "", ""]).encode())

    async def raw(self, data: bytes) -> None:
        """Send bytes as they are; returns when the socket took them."""
        self._writer.write(data)
        self.sent += len(data)
        await self._writer.drain()

    async def send(self, data: bytes) -> None:
        """Send bytes of the body."""
        if data:
            await self.raw(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    async def event(self, payload: Any) -> None:
        """Send one whole event with a JSON payload."""
        await self.send(b"data: " + orjson.dumps(payload) + b"\n\n")

    async def pieces(self, pieces: Iterable[bytes]) -> None:
        """Send bytes of the body so that the client reads each piece before the next one is written."""
        for piece in pieces:
            await self.send(piece)
            await self.be_read()

    async def be_read(self) -> None:
        """Let the client read what was sent."""
        for _ in range(_TURNS_TO_BE_READ):
            await asyncio.sleep(0)

    async def end(self) -> None:
        """Finish the body properly."""
        if self._chunked:
            await self.raw(b"0\r\n\r\n")
        self.reusable = self._chunked

    async def whole(
        self, status: int, body: bytes, *, content_type: str = "application/json", headers: dict[str, str] | None = None
    ) -> None:
        """Send an answer of one piece."""
        await self.head(status, content_type=content_type, headers=headers)
        await self.send(body)
        await self.end()

    def reset(self) -> None:
        """Break the connection with a TCP reset."""
        self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    def half_close(self) -> None:
        """Send FIN, but stay able to read."""
        self._writer.write_eof()

    async def gone(self) -> None:
        """Wait until the client has closed or reset the connection."""
        with contextlib.suppress(ConnectionError):
            while await self._reader.read(65536):
                pass
        self._client_left.set()


Script: TypeAlias = Callable[[Wire], Awaitable[None]]


class VendorServer:
    """The vendor. Leaving it ends its connections, and raises what a script raised other than a lost connection.

    `client_left` is set once a script has seen the client go, in `Wire.gone` or by a failing write.
    """

    def __init__(self, script: Script) -> None:
        self.requests: list[ReceivedRequest] = []
        self.connections = 0
        self.client_left = asyncio.Event()
        self.port = 0
        self._script = script
        self._tasks: set[asyncio.Task[None]] = set()
        self._errors: list[BaseException] = []
        self._server: asyncio.Server | None = None

    @property
    def base_url(self) -> str:
        """The address before `/chat/completions`."""
        return f"http://127.0.0.1:{self.port}/v1"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()
        if self._errors and error is None:
            raise self._errors[0]

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                request = await _read_request(reader)
                self.requests.append(request)
                wire = Wire(request, reader, writer, self.client_left)
                await self._script(wire)
                if not wire.reusable:
                    return
        except (ConnectionError, asyncio.IncompleteReadError):
            self.client_left.set()  # which many scripts are about
        except asyncio.CancelledError:
            writer.transport.abort()  # a client that does not read would keep close() waiting
            raise
        except Exception as error:
            self._errors.append(error)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


async def _read_request(reader: asyncio.StreamReader) -> ReceivedRequest:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.strip().split("\r\n")
    method, path, _ = first.split(" ")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return ReceivedRequest(method, path, headers, body)
