"""Valkey (or Redis) as the channel between server processes: connections that come back, and pub/sub for notices.

What is said here once: every command has a deadline, nothing in here retries in silence for longer than that, and
every loop that must go on for ever reconnects with a growing pause. Notices may be lost while the connection is;
whoever needs to know looks into the database too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import socket
import ssl
import time
from collections import deque
from collections.abc import Awaitable, Iterator, Sequence
from hashlib import sha1
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode
from uuid import uuid4

import redis.asyncio as redis
from broadcaster import Event
from broadcaster._backends.base import BroadcastBackend
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.connection import SSLConnection, parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import MasterNotFoundError, Sentinel
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.exceptions import (
    AuthenticationError,
    ClusterDownError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    RedisClusterException,
    RedisError,
    ResponseError,
)

log = logging.getLogger(__name__)

# All keys and channels have one hash tag, and so live on one node of a cluster: one read can wait for all of them.
PREFIX = "{threadgraph}:"
_SLOT = key_slot(PREFIX.encode())
# For one command with its second try, at most.
COMMAND_SECONDS = 5.0
_TRY_SECONDS = COMMAND_SECONDS / 2
_CONNECT_SECONDS = 2.0
# A sentinel knows the answer by heart. One that is frozen must not use up the time in which the next could be asked.
_SENTINEL_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 2.0
# What a lost connection, a restart, a full memory or a node that moved look like. redis-py's error of a cluster that
# none of its nodes can be asked about is none of its others.
LOST = (RedisError, RedisClusterException, OSError, TimeoutError)

_TLS_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
# What a URL may say behind its `?`. The rest of what redis-py takes there is decided here: timeouts, retries, encoding.
_OPTIONS = {
    "client_name",
    "health_check_interval",
    "max_connections",
    "password",
    "protocol",
    "socket_keepalive",
    "ssl_ca_data",
    "ssl_cert_reqs",
    "ssl_check_hostname",
    "ssl_ciphers",
    "ssl_min_version",
    "username",
    *_TLS_FILES,
}
_OPTIONS_OF_KIND = {"": ("db",), "sentinel": ("sentinel_username", "sentinel_password"), "cluster": ()}
_PORTS = {"sentinel": 26_379}


def make_client(url: str, *, waits: float = 0) -> Any:
    """A client for one URL. It connects when it is used; the caller closes it.

    `redis://`, `rediss://` and `unix://` as redis-py takes them; `redis+sentinel://host:port,host:port/name` (and
    `rediss+sentinel://`) asks sentinels for the master of that name; `redis+cluster://host:port,host:port`
    (`rediss+cluster://`) takes any nodes of a cluster.

    Args:
        waits: seconds that a blocking read may wait, on top of what a command may take.

    Raises:
        ValueError: it is not such a URL; the message does not contain it, because it may hold a password.
    """
    options: dict[str, Any] = {
        "socket_timeout": _TRY_SECONDS + waits,
        "socket_connect_timeout": _CONNECT_SECONDS,
        # redis-py would try ten times, five seconds each, before anybody hears of it.
        # Once more at once, for a pooled connection that the server has closed: every command of ours can be repeated.
        "retry": Retry(NoBackoff(), 1),
    }
    scheme, _, rest = url.partition("://")
    protocol, _, kind = scheme.partition("+")
    address, _, query = rest.partition("?")
    asked = dict(parse_qsl(query, keep_blank_values=True))
    _check_options(asked, kind, secure=protocol == "rediss")
    try:
        if not kind:
            client = redis.Redis.from_url(url, **options)
            client.connection_pool.make_connection()  # type: ignore[no-untyped-call]
            return client
        user, at, place = address.rpartition("@")
        hosts, _, path = place.partition("/")
        nodes = [_node(host, _PORTS.get(kind, 6379)) for host in hosts.split(",")]
        known: dict[str, Any] = dict(parse_url(f"{protocol}://{user}{at}host?{query}"))
        options |= {name: value for name, value in known.items() if name in _OPTIONS}
        options["ssl"] = protocol == "rediss"
        if kind == "cluster":
            return _Cluster(nodes, path, options)
        return _sentinel(nodes, path, options, asked)
    except (ValueError, TypeError, RedisError, RedisClusterException):
        raise ValueError("a URL of Valkey or Redis, as docs/operating.md has them") from None


def _check_options(asked: dict[str, str], kind: str, *, secure: bool) -> None:
    """What would else be found out at every connection, and never come right."""
    for name in asked:
        if name not in _OPTIONS and name not in _OPTIONS_OF_KIND.get(kind, ()):
            raise ValueError(f"no option {name[:40]!r} is known")
        if name.startswith("ssl_") and not secure:
            raise ValueError(f"{name} is for TLS, which a URL that begins with rediss asks for")
    for name in _TLS_FILES:
        if name in asked and not Path(asked[name]).is_file():
            raise ValueError(f"{name}: there is no such file")
    if secure:
        try:
            given: dict[str, Any] = dict(parse_url("rediss://host?" + urlencode(asked)))
            tls = {name: value for name, value in given.items() if name.startswith("ssl_")}
            SSLConnection(**tls).ssl_context.get()
        except (ValueError, OSError, RedisError) as error:
            # ssl.SSLError is an OSError.
            raise ValueError(f"the certificates, the key or another option of TLS: {_tls_reason(error)}") from None


def _tls_reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "cannot be used").lower().replace("_", " ")
    return error.strerror or "cannot be read" if isinstance(error, OSError) else "not a value it can have"


class _NothingAsked:
    """In the place of redis-py's table of commands, which it asks a node for, and then for the keys of each XREAD."""

    async def initialize(self, node: ClusterNode | None = None) -> None:
        """Ask nothing: whichever node it were, it could be one that is down."""


class _Cluster(RedisCluster):
    """A client of a cluster for keys of ours only. It knows the nodes of its URL for ever.

    redis-py forgets them for the addresses that they told; those of a cluster that has moved as a whole are others. It
    also asks one node where the keys of an XREAD are, and goes on to ask that one when it is dead (8.1): what it would
    be told is known here.
    """

    def __init__(self, nodes: list[tuple[str, int]], path: str, options: dict[str, Any]) -> None:
        if path.strip("/") not in ("", "0"):
            raise ValueError("a cluster has one database")
        self._nodes = nodes
        seeds = [ClusterNode(host, port) for host, port in nodes]
        super().__init__(startup_nodes=seeds, require_full_coverage=False, **options)
        self.commands_parser: Any = _NothingAsked()

    async def _determine_slot(self, command: str, *args: Any) -> int:
        return _SLOT

    async def initialize(
        self,
        additional_startup_nodes_info: list[tuple[str, int]] | None = None,
        last_failed_node_name: str | None = None,
    ) -> RedisCluster:
        """Ask the nodes that were known last, and those of the URL."""
        if self._initialize:
            known = self.nodes_manager.startup_nodes
            for host, port in self._nodes:
                if f"{host}:{port}" not in known:
                    known[f"{host}:{port}"] = ClusterNode(host, port, **self.connection_kwargs)
        return await super().initialize(additional_startup_nodes_info, last_failed_node_name)


class _Master(redis.Redis):
    """A client of whoever is the master now. It closes the connections to the sentinels with its own."""

    sentinels: Sentinel

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        """Close the connections."""
        await super().aclose(close_connection_pool)
        await self.sentinels.aclose()


def _sentinel(nodes: list[tuple[str, int]], path: str, options: dict[str, Any], asked: dict[str, str]) -> Any:
    name, _, number = path.strip("/").partition("/")
    if not name:
        raise ValueError("no name of a master")
    quick = {"socket_timeout": _SENTINEL_SECONDS, "socket_connect_timeout": _SENTINEL_SECONDS}
    sentinels = options | quick | {"retry": Retry(NoBackoff(), 0)}
    sentinels |= {name: asked.get(f"sentinel_{name}") for name in ("username", "password")}
    sentinel = Sentinel(nodes, sentinel_kwargs=sentinels, **options, db=int(number or 0))  # type: ignore[no-untyped-call]
    client: _Master = sentinel.master_for(unquote(name), redis_class=_Master)
    client.sentinels = sentinel
    return client


def _node(text: str, default_port: int) -> tuple[str, int]:
    """A host and its port; an address of IPv6 stands in brackets."""
    host, _, port = text.rpartition(":") if text.rpartition(":")[2].isdigit() else (text, "", str(default_port))
    host = host.removeprefix("[").removesuffix("]")
    if not host or (":" in host and not text.startswith("[")) or not 0 < int(port) < 65_536:
        raise ValueError("no host")
    return host, int(port)


def reason(error: BaseException) -> str:
    """What is wrong, for the operator: in words of ours, because those of others may repeat what was sent."""
    for cause in _causes(error):
        if isinstance(cause, AuthenticationError):
            return "the user name or the password was refused"
        if isinstance(cause, NoPermissionError):
            return "this user may not do what is needed"
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"its certificate was refused: {cause.verify_message}"
        if isinstance(cause, ssl.SSLError):
            return f"TLS failed: {(cause.reason or type(cause).__name__).lower().replace('_', ' ')}"
        if isinstance(cause, socket.gaierror):
            return "its host name cannot be resolved"
        if isinstance(cause, ConnectionRefusedError):
            return "the connection was refused"
        if isinstance(cause, OutOfMemoryError):
            return "its memory is full"
        if isinstance(cause, ClusterDownError):
            return "its cluster is down"
        if isinstance(cause, MasterNotFoundError):
            return _sentinel_reason(cause)
        if isinstance(cause, TimeoutError | redis.TimeoutError):
            return "it did not answer in time"
        if isinstance(cause, ConnectionError):
            return "the connection was lost"
    if isinstance(error, RedisClusterException):
        return "it is no cluster, or lacks nodes"
    if type(error) is redis.ConnectionError:
        return "the connection was lost"
    # The first word of a server's refusal is its code.
    code = str(error).partition(" ")[0]
    shown = f" ({code})" if isinstance(error, ResponseError) and code.isalpha() and code.isupper() else ""
    return f"{type(error).__name__}{shown}"


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _sentinel_reason(error: MasterNotFoundError) -> str:
    # redis-py has only the texts of what each sentinel answered.
    text = str(error)
    if "AuthenticationError" in text:
        return "a sentinel refused sentinel_password"
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return "the certificate of a sentinel was refused"
    return "no sentinel that can be reached knows a living master of this name"


class Script:
    """A script for the server, which remembers it by its digest."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._digest = sha1(text.encode(), usedforsecurity=False).hexdigest()

    async def run(self, client: Any, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        """What the script answers; in the time of one command."""
        # Not by redis-py's own way, which lets every node of a cluster load what one node lacks: one that is down
        # would keep us from one that is not.
        try:
            return await soon(client.evalsha(self._digest, len(keys), *keys, *arguments))
        except NoScriptError:
            return await soon(client.eval(self._text, len(keys), *keys, *arguments))


async def soon(answer: Awaitable[Any], *, waits: float = 0) -> Any:
    """The answer, or an error by then: redis-py's own timeouts are one for each of its tries and each node it asks."""
    async with asyncio.timeout(COMMAND_SECONDS + 2 * waits):
        return await answer


def heed_cancellation() -> None:
    """Raise the cancellation that redis-py may have swallowed (8.1 does while it closes a connection)."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


class Pause:
    """A growing pause between tries for ever; `reset` after one that worked."""

    def __init__(self) -> None:
        self._tries = 0
        self._told: set[str] = set()

    def reset(self) -> bool:
        """It works; whether it had not before."""
        failed, self._tries = self._tries > 0, 0
        self._told.clear()
        return failed

    def is_news(self, why: str) -> bool:
        """Whether this reason was not told yet since it last worked."""
        news = why not in self._told
        self._told.add(why)
        return news

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
    """Notices between processes by pub/sub. Only tasks of its own await the network; `next_published` never raises.

    While the connection is lost, what is published is lost too; it is made again, for ever. So that a connection that
    is dead without a word is found, and one to a server that is not the others' any more, this process tells itself
    something now and then, on the way that every notice takes.

    Args:
        limit: most notices that wait for delivery, and most that wait to be sent; the oldest is dropped beyond it.
    """

    def __init__(self, url: str, limit: int = 100_000) -> None:
        self._client = make_client(url)
        # Of its own, so that it can be closed to forget all that it knew of sentinels and clusters.
        self._hearing = make_client(url)
        self._pending: deque[Event] = deque(maxlen=limit)
        self._arrived = asyncio.Event()
        self._names: set[str] = set()
        self._changed = asyncio.Event()
        self._outgoing: deque[tuple[str, str]] = deque(maxlen=limit)
        self._to_send = asyncio.Event()
        self._all_sent = asyncio.Event()
        self._all_sent.set()
        self._tasks: list[asyncio.Task[None]] = []
        self._own_name = f"{PREFIX}hears:{uuid4().hex}"
        self.connected = asyncio.Event()
        # For metrics: how often the connection came back, and how many notices could not be sent.
        self.returns = 0
        self.unsent = 0

    async def connect(self) -> None:
        """Begin to listen and to send, in tasks; returns at once."""
        self._tasks = [
            asyncio.create_task(self._listen(), name="valkey pub/sub"),
            asyncio.create_task(self._send_on(), name="valkey notices"),
        ]

    async def disconnect(self) -> None:
        """Stop, and close the connections; notices that wait to be sent are given a moment."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_SECONDS if self.connected.is_set() else 0):
                await self._all_sent.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.aclose()
        await self._hearing.aclose()
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
        """Send a notice soon; one that cannot be sent is dropped, and that is logged."""
        if len(self._outgoing) == self._outgoing.maxlen:
            self.unsent += 1
        self._outgoing.append((PREFIX + channel, message))
        self._all_sent.clear()
        self._to_send.set()

    async def next_published(self) -> Event:
        """The next notice; waits for one, and reconnects meanwhile."""
        while not self._pending:
            self._arrived.clear()
            await self._arrived.wait()
        return self._pending.popleft()

    async def _send_on(self) -> None:
        told: set[str] = set()
        while True:
            await self._to_send.wait()
            self._to_send.clear()
            while self._outgoing:
                some = [self._outgoing.popleft() for _ in range(min(len(self._outgoing), _NOTICES_AT_ONCE))]
                try:
                    await _PUBLISH.run(self._client, (), list(chain.from_iterable(some)))
                    told.clear()
                except LOST as error:
                    heed_cancellation()
                    # What waited behind it is as old by now. Who needs to know looks into the database.
                    lost = len(some) + len(self._outgoing)
                    self._outgoing.clear()
                    self.unsent += lost
                    if (why := reason(error)) not in told:
                        told.add(why)
                        log.warning("notices to other servers are not sent (%d now): %s", lost, why)
                except Exception:
                    self.unsent += len(some)
                    log.exception("%d notices could not be sent", len(some))
                heed_cancellation()
            self._all_sent.set()
            # What comes meanwhile shares a command.
            await asyncio.sleep(_TICK_SECONDS)

    async def _listen(self) -> None:
        pause = Pause()
        while True:
            try:
                async with asyncio.timeout(COMMAND_SECONDS):
                    # A cluster's client must know the nodes before it can listen to one, and does not ask by itself.
                    await self._hearing.initialize()
                async with self._hearing.pubsub(ignore_subscribe_messages=True) as listener:
                    await self._deliver(listener, pause)
            except LOST as error:
                self.connected.clear()
                if pause.is_news(why := reason(error)):
                    log.warning("the channel is out of reach: %s; trying again", why)
            except Exception:
                self.connected.clear()
                log.exception("listening to the channel failed; trying again")
            await pause.rest()
            # Whom it knew may be whom it should not listen to any more.
            await self._forget()

    async def _forget(self) -> None:
        try:
            await self._hearing.aclose()
        except LOST as error:
            log.debug("a connection was not closed: %s", type(error).__name__)
        heed_cancellation()

    async def _deliver(self, listener: Any, pause: Pause) -> None:
        await listener.subscribe(self._own_name)
        # Until it is confirmed, so that what is told next is heard.
        await listener.get_message(timeout=_LISTEN_SECONDS)
        subscribed: set[str] = set()
        told = heard = 0.0
        opened = time.monotonic()
        while True:
            self._changed.clear()
            wanted = set(self._names)
            if new := wanted - subscribed:
                await listener.subscribe(*(PREFIX + name for name in new))
            if old := subscribed - wanted:
                await listener.unsubscribe(*(PREFIX + name for name in old))
            subscribed = wanted
            while not self._changed.is_set():
                heed_cancellation()
                now = time.monotonic()
                if now - told >= (_TELL_SECONDS if self.connected.is_set() else _LISTEN_SECONDS):
                    told = now
                    await soon(self._client.publish(self._own_name, ""))
                if now - max(heard, opened) > _SILENCE_SECONDS:
                    raise TimeoutError
                # A second at most, so that a new name is soon subscribed to.
                message = await listener.get_message(timeout=_LISTEN_SECONDS)
                if message is None or message["type"] != "message":
                    continue
                heard = time.monotonic()
                name = message["channel"].decode()
                if name == self._own_name:
                    self._hears(pause)
                else:
                    self._pending.append(Event(name.removeprefix(PREFIX), message["data"].decode()))
                    self._arrived.set()

    def _hears(self, pause: Pause) -> None:
        self.connected.set()
        if pause.reset():
            self.returns += 1
            log.info("the channel is back")


# Between two commands that send notices, and how many one sends at most.
_TICK_SECONDS = 0.01
_NOTICES_AT_ONCE = 500
# ARGV: for each notice its channel and its text. One by one, each is a command.
_PUBLISH = Script("""
for at = 1, #ARGV, 2 do redis.call('PUBLISH', ARGV[at], ARGV[at + 1]) end
return 1
""")
_LISTEN_SECONDS = 1.0
_LAST_SECONDS = 1.0
_TELL_SECONDS = 5.0
_SILENCE_SECONDS = 12.0
