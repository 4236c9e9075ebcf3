"""Deltas from their buffer onto a socket, without a task: the buffer calls, the frame is made (or is there), and sent.

What a task for each event costs beside the event: waking it, five generators of graphql-core and Strawberry one inside
the other, a result, its dict, and two coroutines of aiohttp. So the operation's task sleeps while deltas are told, and
wakes for whatever is not a delta, for the end, and to wait for a client that does not read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import orjson
from aiohttp import ClientConnectionResetError, web

from graph.deltas import DeltaPlan
from services.message_stream import LiveReading
from streams.buffer import Delta


class DeltaSender:
    """Tells the deltas of one operation on one socket.

    Args:
        transport: of the socket.
        room: waits until the client has taken enough of what it was sent.

    Attributes:
        failure: why it cannot tell any more, if it cannot.
    """

    __slots__ = (
        "_paused",
        "_plan",
        "_protocol",
        "_reading",
        "_room",
        "_start",
        "_transport",
        "_waiting",
        "_ws",
        "failure",
    )

    _reading: LiveReading
    _waiting: asyncio.Future[None]

    def __init__(
        self,
        ws: web.WebSocketResponse,
        protocol: web.RequestHandler,
        transport: asyncio.Transport,
        operation_id: str,
        plan: DeltaPlan,
        room: Callable[[], Awaitable[None]],
    ) -> None:
        self._ws = ws
        self._protocol = protocol
        self._transport = transport
        self._start = orjson.dumps({"id": operation_id})[:-1]
        self._plan = plan
        self._room = room
        self._paused = False
        self.failure: Exception | None = None

    async def follow(self, reading: LiveReading) -> bool:
        """Give all deltas from the offset on, until something else follows or the buffer is closed.

        Returns:
            Whether there is still a reader; `failure` says why not.
        """
        self._reading, buffer = reading, reading.buffer
        loop = asyncio.get_running_loop()
        try:
            while True:
                await self._room()
                self._waiting, self._paused = loop.create_future(), False
                buffer.attach(self._tell)
                try:
                    self._tell()
                    await self._waiting
                finally:
                    buffer.detach(self._tell)
                if not self._paused:
                    return True
        except Exception as error:
            # Not through graphql-core, which would tell the client of it.
            self.failure = error
            return False

    def _tell(self) -> None:
        waiting = self._waiting
        if waiting.done():
            return
        reading = self._reading
        buffer, offset = reading.buffer, reading.offset
        try:
            if offset != buffer.length and ((delta := buffer.delta_since(offset)) is None or not self._send(delta)):
                self._send_some()
            elif buffer.closed:
                waiting.set_result(None)
        except Exception as error:
            waiting.set_exception(error)

    def _send_some(self) -> None:
        """Send the deltas that come before something else, or before the client has to be waited for."""
        reading = self._reading
        for event in reading.buffer.since(reading.offset):
            if type(event) is not Delta or not self._send(event):
                self._waiting.set_result(None)
                return
        if reading.buffer.closed:
            self._waiting.set_result(None)

    def _send(self, delta: Delta) -> bool:
        """Send what is new, unless the client has to be waited for."""
        # Before the frame is made: what a reader that is late has not been told yet is merged, not queued.
        if self._protocol.writing_paused:
            self._paused = True
            return False
        transport = self._transport
        if self._ws.closed or transport.is_closing():
            raise ClientConnectionResetError("Cannot write to closing transport")
        # Past aiohttp, whose coroutines would only add the head; nothing of ours is compressed or cut in pieces.
        transport.write(self._plan.frame(delta, self._start))
        self._reading.gave(delta)
        return True
