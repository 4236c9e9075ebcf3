"""Readers over WebSocket (RFC 6455), as lean as Python allows.

The one of a token stream counts frames and tokens and decodes nothing: a token is a word that occurs nowhere else in an
event, so counting the word in the received bytes counts tokens, whether an event carries one of them or a merged delta
carries many.
"""

from __future__ import annotations

import asyncio
import os
import select
import time
from array import array
from base64 import b64encode
from collections.abc import Sequence
from typing import cast

from bench.servers import HOST, BenchError

TOKEN = b" word"
_KEY = b64encode(bytes(16)).decode()
_TEXT_FRAME = 0x81
_PING, _PONG = 0x89, 0x8A
_TEXT_SECONDS = 60.0
_READ_BYTES = 262_144


class SocketClient(asyncio.Protocol):
    """One socket: the handshake, what is said first, and the frames.

    Args:
        path: where the socket is opened, with its query.
        headers: further lines of the handshake, each with its end.
        opening: texts to send: the first after the handshake, each other one after the next text that comes in.

    Attributes:
        problems: what came and was not expected, shortened.
        closed: whether the server hung up.
    """

    def __init__(self, path: str, headers: str, opening: list[str]) -> None:
        self.problems: list[str] = []
        self.closed = False
        self._handshake = (
            f"GET {path} HTTP/1.1\r\nHost: {HOST}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {_KEY}\r\n{headers}\r\n"
        ).encode()
        self._opening = opening
        self._upgraded = False
        self._rest = b""
        self._transport: asyncio.Transport | None = None
        self._descriptor: int | None = None

    async def open(self, port: int) -> None:
        """Connect and begin the handshake."""
        await asyncio.get_running_loop().create_connection(lambda: self, HOST, port)

    def close(self) -> None:
        """Hang up without a close frame."""
        if self._transport is not None:
            self._transport.abort()

    def take_over(self) -> int:
        """Read no more by the loop; a descriptor of the same socket, of the caller's until `give_back`."""
        assert self._transport is not None
        self._transport.pause_reading()
        self._descriptor = os.dup(self._transport.get_extra_info("socket").fileno())
        return self._descriptor

    def give_back(self) -> None:
        """Read by the loop again."""
        assert self._transport is not None
        assert self._descriptor is not None
        os.close(self._descriptor)
        self._descriptor = None
        if not self.closed:
            self._transport.resume_reading()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop."""
        # uvloop's transports are no subclasses of asyncio's.
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(self._handshake)

    def connection_lost(self, error: Exception | None) -> None:
        """Called by the loop."""
        self.closed = True

    def data_received(self, data: bytes) -> None:
        """Called by the loop."""
        if self._rest:
            data, self._rest = self._rest + data, b""
        if not self._upgraded:
            head = data.find(b"\r\n\r\n")
            if head < 0:
                self._rest = data
                return
            if not data.startswith(b"HTTP/1.1 101 "):
                self._complain(data)
                return
            self._upgraded = True
            self._say_next()
            data = data[head + 4 :]
        now = time.perf_counter()
        position, size = 0, len(data)
        while size - position >= 2:
            # A server's frames are not masked.
            length, start = data[position + 1], position + 2
            if length == 126:
                length, start = int.from_bytes(data[position + 2 : position + 4]), position + 4
            elif length == 127:
                length, start = int.from_bytes(data[position + 2 : position + 10]), position + 10
            end = start + length
            if end > size:
                break
            self._take(data[position], data, start, end, now)
            position = end
        if position < size:
            self._rest = data[position:]

    def _take(self, kind: int, data: bytes, start: int, end: int, now: float) -> None:
        if kind == _PING:
            self._send(_PONG, data[start:end])
        elif kind == _TEXT_FRAME and self._opening:
            self._say_next()
        else:
            self._take_frame(kind, data, start, end, now)

    def _take_frame(self, kind: int, data: bytes, start: int, end: int, now: float) -> None:
        """What came after the opening, and is no ping."""
        del kind, now
        self._complain(data[start:end])

    def say(self, text: str) -> None:
        """Send a text."""
        self._send(_TEXT_FRAME, text.encode())

    def _say_next(self) -> None:
        if self._opening:
            self.say(self._opening.pop(0))

    def _send(self, kind: int, payload: bytes) -> None:
        # A client must mask; the key 0 leaves the payload as it is, and on 127.0.0.1 there is no proxy to protect.
        size = len(payload)
        length = bytes([0x80 | size]) if size < 126 else bytes([0x80 | 126]) + size.to_bytes(2)
        frame = bytes([kind]) + length + bytes(4) + payload
        if self._descriptor is not None:
            os.write(self._descriptor, frame)
        elif self._transport is not None:
            self._transport.write(frame)

    def _complain(self, data: bytes) -> None:
        if len(self.problems) < 3:
            self.problems.append(data[:300].decode(errors="replace"))


class StreamReader(SocketClient):
    """A reader of one token stream that counts.

    Args:
        rate: tokens a second that the server's producer makes; lags are measured against that beat.

    Attributes:
        running: set once the first token is here.
        events: text frames with tokens, since the start.
        tokens: tokens in them.
        best: the time at which token 0 would have come, had all come as promptly as the promptest did. The producers'
            due times lie on the beat, so what a token comes later than that is its lag.
        arrivals: while `recording`, of each event: when its oldest token came, less that token's place in the beat.
    """

    def __init__(self, path: str, headers: str, opening: list[str], rate: float) -> None:
        super().__init__(path, headers, opening)
        self.running = asyncio.Event()
        self.events = 0
        self.tokens = 0
        self.best = float("inf")
        self.recording = False
        self.arrivals = array("d")
        self._beat = 1 / rate

    def take(self, data: bytes, now: float) -> None:
        """What a read brought: nearly always one frame, which takes less than the general way."""
        size = len(data)
        if size < 4 or data[0] != _TEXT_FRAME or self._rest:
            self.data_received(data)
        elif size == data[1] + 2 if data[1] < 126 else data[1] == 126 and size == (data[2] << 8 | data[3]) + 4:
            self._take_frame(_TEXT_FRAME, data, 0, size, now)
        else:
            self.data_received(data)

    def _take_frame(self, kind: int, data: bytes, start: int, end: int, now: float) -> None:
        tokens = data.count(TOKEN, start, end)
        if kind != _TEXT_FRAME or not tokens:
            return self._complain(data[start:end])
        self.events += 1
        if self.recording:
            self.arrivals.append(now - (self.tokens + 1) * self._beat)
        self.tokens += tokens
        self.best = min(self.best, now - self.tokens * self._beat)
        if self.events == 1:
            self.running.set()
        return None


def read_all(readers: Sequence[StreamReader], seconds: float) -> None:
    """Read all of them for so many seconds, and do nothing else in this thread.

    The loop's transports, protocols and callbacks take more of the generator's core than what is to be read: at 1,000
    streams the generator, and not the server, was what made tokens late.
    """
    poller = select.epoll()
    by_descriptor = {}
    for reader in readers:
        descriptor = reader.take_over()
        by_descriptor[descriptor] = reader
        poller.register(descriptor, select.EPOLLIN)
    clock = time.perf_counter
    room = memoryview(bytearray(_READ_BYTES))
    until = clock() + seconds
    try:
        while (left := until - clock()) > 0:
            for descriptor, _ in poller.poll(left, 64):
                reader = by_descriptor[descriptor]
                try:
                    # Not os.read: for so much room malloc maps memory, and unmaps it, with every token.
                    data = bytes(room[: os.readv(descriptor, (room,))])
                except ConnectionResetError:
                    data = b""
                if data:
                    reader.take(data, clock())
                else:
                    reader.closed = True
                    poller.unregister(descriptor)
    finally:
        poller.close()
        for reader in readers:
            reader.give_back()


class TextReader(SocketClient):
    """A reader that keeps what it is sent after the opening, and when it came, until it is taken."""

    def __init__(self, path: str, headers: str, opening: list[str]) -> None:
        super().__init__(path, headers, opening)
        self._texts: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

    async def next(self) -> tuple[float, bytes]:
        """When the next text came, and the text.

        Raises:
            BenchError: none comes in time.
        """
        try:
            return await asyncio.wait_for(self._texts.get(), _TEXT_SECONDS)
        except TimeoutError:
            raise BenchError(f"a socket was told nothing; {'closed; ' * self.closed}{self.problems}") from None

    def _take_frame(self, kind: int, data: bytes, start: int, end: int, now: float) -> None:
        if kind == _TEXT_FRAME:
            self._texts.put_nowait((now, data[start:end]))
        else:
            self._complain(data[start:end])
