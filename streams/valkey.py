"""Valkey (or Redis) as the channel between server processes: connections that come back, and pub/sub for notices.

What is said here once: every command has a deadline, nothing in here retries in silence for longer than that, and
every loop that must go on for ever reconnects with a growing pause. Notices may be lost while the connection is;
whoever needs to know looks into the database too.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import redis.asyncio as redis
from broadcaster import Event
from broadcaster._backends.base import BroadcastBackend
from redis.asyncio.cluster import RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

log = logging.getLogger(__name__)

# All keys and channels have one hash tag, and so live on one node of a cluster: one read can wait for all of them.
PREFIX = "{threadgraph}:"
COMMAND_SECONDS = 5.0
_CONNECT_SECONDS = 2.0
_LONGEST_PAUSE_SECONDS = 2.0
# What a lost connection, a restart, a full memory or a node that moved look like.
LOST = (RedisError, OSError, TimeoutError)


def make_client(url: str, *, timeout: float = COMMAND_SECONDS) -> Any:
    """A client for one URL. It connects when it is used; the caller closes it.

    `redis://`, `rediss://` and `unix://` as redis-py takes them; `redis+sentinel://host:port,host:port/name` (and
    `rediss+sentinel://`) asks sentinels for the master of that name; `redis+cluster://` (`rediss+cluster://`) takes any
    node of a cluster.

    Args:
        timeout: seconds that one command, or one blocking read on top of its own wait, may take.

    Raises:
        ValueError: it is not such a URL; the message does not contain it, because it may hold a password.
    """
    options: dict[str, Any] = {
        "socket_timeout": timeout,
        "socket_connect_timeout": _CONNECT_SECONDS,
        # redis-py would try ten times, five seconds each, before anybody hears of it.
        # Once more at once, for a pooled connection that the server has closed: every command of ours can be repeated.
        "retry": Retry(NoBackoff(), 1),
    }
    scheme, _, rest = url.partition("://")
    kind = scheme.partition("+")[2]
    secure = scheme.startswith("rediss")
    try:
        if kind == "cluster":
            return RedisCluster.from_url(f"{'rediss' if secure else 'redis'}://{rest}", **options)
        if kind == "sentinel":
            return _sentinel(url, secure=secure, options=options)
        return redis.Redis.from_url(url, **options)
    except (ValueError, TypeError):
        raise ValueError("a URL of Valkey or Redis, as redis-py takes them") from None


def _sentinel(url: str, *, secure: bool, options: dict[str, Any]) -> Any:
    parts = urlsplit(url)
    at = parts.netloc.rpartition("@")
    nodes = [_node(node) for node in at[2].split(",")]
    name, _, number = parts.path.strip("/").partition("/")
    if not name:
        raise ValueError("no name of a master")
    user, _, password = at[0].partition(":")
    known = {"ssl": secure, "username": user or None, "password": password or None, "db": int(number or 0)}
    asked = dict(parse_qsl(parts.query))
    sentinels = {**options, "ssl": secure, "password": asked.get("sentinel_password")}
    return Sentinel(  # type: ignore[no-untyped-call]
        nodes, sentinel_kwargs=sentinels, **options, **known
    ).master_for(name)


def _node(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":") if ":" in text else (text, "", "26379")
    return host, int(port)


def heed_cancellation() -> None:
    """Raise the cancellation that redis-py may have swallowed (8.1 does while it closes a connection)."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


class Pause:
    """A growing pause between tries for ever; `reset` after one that worked."""

    def __init__(self) -> None:
        self._tries = 0

    def reset(self) -> bool:
        """It works; whether it had not before."""
        failed, self._tries = self._tries > 0, 0
        return failed

    @property
    def tries(self) -> int:
        """How many in a row did not work."""
        return self._tries

    async def rest(self) -> None:
        """Wait before the next try.

        Raises:
            CancelledError: also where the client turned a cancellation into an error of its own.
        """
        heed_cancellation()
        self._tries += 1
        longest = min(_LONGEST_PAUSE_SECONDS, 0.05 * 2.0 ** min(self._tries, 10))
        await asyncio.sleep(longest * random.uniform(0.5, 1))  # noqa: S311 - spreads load, guards nothing


class ValkeyBackend(BroadcastBackend):
    """Notices between processes by pub/sub. `subscribe` never awaits the network, `next_published` never raises.

    While the connection is lost, what others publish is lost too; it is made again, for ever.

    Args:
        limit: most notices that wait for delivery; the oldest is dropped beyond it.
    """

    def __init__(self, url: str, limit: int = 100_000) -> None:
        self._client = make_client(url)
        self._pending: deque[Event] = deque(maxlen=limit)
        self._arrived = asyncio.Event()
        self._names: set[str] = set()
        self._changed = asyncio.Event()
        self._listening: asyncio.Task[None] | None = None
        self.connected = asyncio.Event()
        # For metrics: how often the connection came back, and how many notices could not be sent.
        self.returns = 0
        self.unsent = 0

    async def connect(self) -> None:
        """Begin to listen, in a task; returns at once."""
        self._listening = asyncio.create_task(self._listen(), name="valkey pub/sub")

    async def disconnect(self) -> None:
        """Stop listening and close the connections."""
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.gather(self._listening, return_exceptions=True)
        await self._client.aclose()
        self._pending.clear()

    async def subscribe(self, channel: str) -> None:
        """Deliver this channel's notices soon."""
        self._names.add(channel)
        self._changed.set()

    async def unsubscribe(self, channel: str) -> None:
        """Deliver none of this channel's notices any more."""
        self._names.discard(channel)
        self._changed.set()

    async def publish(self, channel: str, message: Any) -> None:
        """Send a notice; one that cannot be sent is dropped, and that is logged."""
        try:
            await self._client.publish(PREFIX + channel, message)
        except LOST as error:
            self.unsent += 1
            log.warning("a notice on channel %s was not sent: %s", channel, type(error).__name__)

    async def next_published(self) -> Event:
        """The next notice; waits for one, and reconnects meanwhile."""
        while not self._pending:
            self._arrived.clear()
            await self._arrived.wait()
        return self._pending.popleft()

    async def _listen(self) -> None:
        pause = Pause()
        while True:
            try:
                async with self._client.pubsub(ignore_subscribe_messages=True) as listener:
                    await self._deliver(listener, pause)
            except LOST as error:
                self.connected.clear()
                if pause.tries == 0:
                    log.warning("the channel is out of reach: %s; trying again", type(error).__name__)
                await pause.rest()
            except Exception:
                self.connected.clear()
                log.exception("listening to the channel failed; trying again")
                await pause.rest()

    async def _deliver(self, listener: Any, pause: Pause) -> None:
        subscribed: set[str] = set()
        while True:
            self._changed.clear()
            wanted = set(self._names)
            if new := wanted - subscribed:
                await listener.subscribe(*(PREFIX + name for name in new))
            if old := subscribed - wanted:
                await listener.unsubscribe(*(PREFIX + name for name in old))
            subscribed = wanted
            if not subscribed:
                await self._changed.wait()
                continue
            if not self.connected.is_set():
                await listener.ping()
                self.connected.set()
                if pause.reset():
                    self.returns += 1
                    log.info("the channel is back")
            while not self._changed.is_set():
                heed_cancellation()
                # A second at most, so that a new name is soon subscribed to.
                message = await listener.get_message(timeout=_LISTEN_SECONDS)
                if message is not None and message["type"] == "message":
                    name = message["channel"].decode().removeprefix(PREFIX)
                    self._pending.append(Event(name, message["data"].decode()))
                    self._arrived.set()


_LISTEN_SECONDS = 1.0
