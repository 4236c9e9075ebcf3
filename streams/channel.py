"""The channel between server processes: `broadcaster`, over a backend of ours.

`broadcaster` routes by channel name; what it leaves open is what a backend must be for it to be safe: two first
subscribers at once must both be served, an error in the listener must not end it, a queue must have a bound. So our
backends keep two promises, whatever they talk to: `subscribe` never awaits the network, and `next_published` never
raises. The channel itself makes one subscription per name and process, by one task, and hands messages to handlers.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import orjson
from broadcaster import Broadcast, Event
from broadcaster._backends.base import BroadcastBackend

log = logging.getLogger(__name__)

_WAITING_MESSAGES = 10_000

Handler = Callable[[dict[str, Any]], Awaitable[None]]


class MemoryBackend(BroadcastBackend):
    """`memory://`: what is published is delivered to this process, in order.

    Args:
        limit: most messages that wait for delivery; the oldest is dropped beyond it, as a network would.
    """

    def __init__(self, limit: int = 100_000) -> None:
        self._pending: deque[Event] = deque(maxlen=limit)
        self._arrived = asyncio.Event()
        self._names: set[str] = set()

    async def connect(self) -> None:
        """Nothing to connect to."""

    async def disconnect(self) -> None:
        """Forget what was not delivered."""
        self._pending.clear()

    async def subscribe(self, channel: str) -> None:
        """Deliver this channel's messages from now on."""
        self._names.add(channel)

    async def unsubscribe(self, channel: str) -> None:
        """Deliver none of this channel's messages any more."""
        self._names.discard(channel)

    async def publish(self, channel: str, message: Any) -> None:
        """Deliver a message to the subscribers there are."""
        if channel in self._names:
            self._pending.append(Event(channel, message))
            self._arrived.set()

    async def next_published(self) -> Event:
        """The next message, in order of publishing; waits for one."""
        while not self._pending:
            self._arrived.clear()
            await self._arrived.wait()
        return self._pending.popleft()


class _BoundedBroadcast(Broadcast):
    """`broadcaster` with a bound on what waits for a slow handler; beyond it the oldest is dropped, as by a network."""

    _listener_task: asyncio.Task[None]
    dropped = 0

    async def _listener(self) -> None:
        while True:
            event = await self._backend.next_published()
            for queue in list(self._subscribers.get(event.channel, ())):
                if queue.qsize() >= _WAITING_MESSAGES:
                    queue.get_nowait()
                    self.dropped += 1
                    # At the first, the second, the fourth … : a flood is told of and floods no log.
                    if self.dropped & (self.dropped - 1) == 0:
                        log.warning(
                            "a handler of channel %s is too slow; %d messages were dropped so far",
                            event.channel,
                            self.dropped,
                        )
                queue.put_nowait(event)


class Channel(Protocol):
    """What the rest of the server needs of it."""

    async def publish(self, name: str, message: dict[str, Any]) -> None:
        """Send a message to every process that listens to the name."""
        ...

    async def listen(self, name: str, handler: Handler) -> None:
        """Hand every message of the name to the handler, one after another, until `close`."""
        ...


class BroadcastChannel:
    """A `Channel` over one `Broadcast`. Owned and closed by the composition root."""

    def __init__(self, backend: BroadcastBackend) -> None:
        self._broadcast = _BoundedBroadcast(backend=backend)
        self._listeners: list[asyncio.Task[None]] = []

    @property
    def dropped(self) -> int:
        """How many messages a handler was too slow for."""
        return self._broadcast.dropped

    async def connect(self) -> None:
        """Start to route."""
        await self._broadcast.connect()

    async def close(self) -> None:
        """End every listener, then the routing."""
        for task in self._listeners:
            task.cancel()
        await asyncio.gather(*self._listeners, return_exceptions=True)
        await self._broadcast.disconnect()

    async def publish(self, name: str, message: dict[str, Any]) -> None:
        """Send a message to every process that listens to the name."""
        await self._broadcast.publish(name, orjson.dumps(message).decode())

    async def listen(self, name: str, handler: Handler) -> None:
        """Hand every message of the name to the handler, one after another, until `close`.

        A handler that raises is logged and does not end the listening.
        """
        subscribed = asyncio.Event()
        self._listeners.append(asyncio.create_task(self._listen(name, handler, subscribed), name=f"channel {name}"))
        await subscribed.wait()

    async def _listen(self, name: str, handler: Handler, subscribed: asyncio.Event) -> None:
        async with self._broadcast.subscribe(name) as subscriber:
            subscribed.set()
            while True:
                event = await subscriber.get()
                try:
                    await handler(orjson.loads(event.message))
                except Exception:
                    log.exception("a handler of channel %s failed", name)
