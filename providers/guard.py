"""The guard of endpoints that users name: they lead to public servers, and nowhere inside.

Whoever may choose an address that this server connects to can otherwise ask in its name: its database, its neighbours,
the metadata service of its cloud. What is looked at, and when:

    `check`, when an endpoint is saved     how the address is written, its port, and all that its name leads to
    the resolver of `make_session`         all that the name leads to now: names change, after the check or between two
                                           questions
    the socket factory of `make_session`   the very address and port that the kernel is told to connect to

The last one is the wall; the others make refusals early and alike. aiohttp asks no resolver for an address that is
written as numbers, but it opens no TCP connection without the socket factory: one address or several at once (happy
eyeballs), the first request or a redirect, direct or towards a proxy. It is called for each socket, with the address in
the form in which `connect` gets it, and nothing looks up anything in between.

What users learn of a refusal is one sentence for all that is refused for where it leads: it does not exist, it is
private, the name server was silent. To a reader of an answer, a refused connection is an unreachable provider.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import re
import socket
import threading
from collections.abc import Awaitable, Callable, Collection, Sequence
from ipaddress import IPv6Address, ip_address
from typing import TypeAlias

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from providers.addresses import (
    DEFAULT_PORTS,
    AllowedEndpoint,
    IPAddress,
    is_never_opened,
    is_never_opened_name,
    is_public,
    parse_host,
)
from providers.http import make_client_session

__all__ = ["AllowedEndpoint", "EndpointGuard", "EndpointRefusedError", "is_public"]

_logger = logging.getLogger(__name__)

MAX_URL_CHARS = 2_000

Resolve: TypeAlias = Callable[[str, int], Awaitable[Sequence[str]]]
"""Asks for the addresses of a host name, for a port; raises OSError where there are none."""

_MALFORMED = (
    "The base address must be http:// or https:// with a host, at most a port and a path behind it, in plain ASCII "
    f"(an international name in its xn-- form) and at most {MAX_URL_CHARS:,} characters."
)
_UNREACHABLE = "The base address must lead to a server on the public internet; check its host name."

# Only what is listed is taken, and nothing is repaired: two readers that repair differently are how a check is passed
# with one address and another one is connected to. So there is no % and no other letter than those of ASCII.
_URL = re.compile(
    r"(?P<scheme>https?)://(?:\[(?P<v6>[0-9a-f:.]+)\]|(?P<host>[a-z0-9._-]+))(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<path>(?:/[a-z0-9._~!$&'()*+,;=:@-]*)*)",
    re.ASCII | re.IGNORECASE,
)
_DEFAULT_PORTS = {"http": 80, "https": 443}

_LOOKUP_SECONDS = 5.0
# Lookups in threads that may each hang for as long as the name server does; a user can see to that.
_LOOKUPS = 16
# A refusal takes this long from the question on, so that its time does not tell a name that the inner name server knew
# from one that it had to ask for.
_REFUSAL_SECONDS = 1.0
# More addresses than this are not tried: each try is a packet to a host of a user's choice.
_MOST_ADDRESSES = 8
_CONNECTIONS = 1024
_CONNECTIONS_PER_HOST = 256


class EndpointRefusedError(Exception):
    """The address is none that a custom endpoint may have.

    Attributes:
        message: one sentence for the user, which tells nothing of what the address leads to.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class EndpointGuard:
    """Which endpoints users may name, and the sessions that reach no others.

    Args:
        allowed: what the operator opens although it is not public, or on another port.
        ports: the ports that are open everywhere else.
        resolve: asks for the addresses of a name; None: the system's name server.
        refusal_seconds: how long a lookup takes at least that is answered by a refusal.
    """

    def __init__(
        self,
        *,
        allowed: Sequence[AllowedEndpoint] = (),
        ports: Collection[int] = DEFAULT_PORTS,
        resolve: Resolve | None = None,
        refusal_seconds: float = _REFUSAL_SECONDS,
    ) -> None:
        self._allowed = tuple(allowed)
        self._ports = frozenset(ports)
        self._resolve = resolve or _Lookups().resolve
        self._refusal_seconds = refusal_seconds

    async def check(self, base_url: str, *, look_up: bool = True) -> str:
        """The base address in its one normal form, if it may be saved.

        Args:
            look_up: whether a name must have addresses that are open, now; for an endpoint out of an account's own file
                that is no question, since it is looked at again before every connection.

        Scheme and host are in lower case there, the address is in its shortest form, a default port and the slash at
        the end of the path are left out. Passing this is no promise: names change, and every connection is looked at
        again.

        Raises:
            EndpointRefusedError: it may not.
        """
        match = _URL.fullmatch(base_url) if len(base_url) <= MAX_URL_CHARS else None
        if match is None:
            raise EndpointRefusedError(_MALFORMED)
        scheme = match["scheme"].lower()
        host = parse_host(match["v6"] or match["host"])
        port = int(match["port"] or _DEFAULT_PORTS[scheme])
        segments = match["path"].split("/")
        if host is None or isinstance(host, IPv6Address) != bool(match["v6"]) or {".", ".."} & {*segments}:
            raise EndpointRefusedError(_MALFORMED)
        if not self._is_port_open_somewhere(port):
            ports = ", ".join(map(str, sorted(self._ports)))
            raise EndpointRefusedError(f"The base address must have a port that is open for endpoints: {ports}.")
        if isinstance(host, str):
            open_ = bool(await self._addresses(host, port)) if look_up else not is_never_opened_name(host)
        else:
            open_ = self._may_reach(host, port)
        if not open_:
            raise EndpointRefusedError(_UNREACHABLE)
        shown = f"[{host}]" if isinstance(host, IPv6Address) else str(host)
        suffix = "" if port == _DEFAULT_PORTS[scheme] else f":{port}"
        return f"{scheme}://{shown}{suffix}{match['path'].rstrip('/')}"

    def make_session(self) -> aiohttp.ClientSession:
        """A session that reaches nothing but what this guard lets through. Call it in the running loop; the caller
        closes it.

        It is like `providers.http.make_client_session` otherwise: no cookies, no proxy, no total timeout. What is
        refused fails as an unreachable host does, with `aiohttp.ClientConnectorError`.
        """
        connector = aiohttp.TCPConnector(
            limit=_CONNECTIONS,
            # One slow host must not take all the places.
            limit_per_host=_CONNECTIONS_PER_HOST,
            resolver=_GuardedResolver(self),
            socket_factory=self._open_socket,
        )
        return make_client_session(connector)

    def _is_port_open_somewhere(self, port: int) -> bool:
        return port in self._ports or any(entry.port == port for entry in self._allowed)

    async def _addresses(self, host: str, port: int) -> list[str]:
        """The addresses of a name, each of which may be connected to; none where a single one may not.

        All of them, because who answers with a public and a private address may answer with the private one alone.
        """
        loop = asyncio.get_running_loop()
        asked = loop.time()
        answers: Sequence[str] = ()
        if not is_never_opened_name(host):
            try:
                async with asyncio.timeout(_LOOKUP_SECONDS):
                    answers = await self._resolve(host, port)
            except (OSError, UnicodeError):  # TimeoutError is an OSError; UnicodeError: a name DNS cannot encode
                pass
        is_allowed = self._is_name_allowed(host, port)
        addresses = [_parse_address(answer) for answer in answers]
        if addresses and all(address and self._may_reach(address, port, is_allowed) for address in addresses):
            kind = _Vouched if is_allowed else str
            return [kind(address) for address in addresses[:_MOST_ADDRESSES]]
        await asyncio.sleep(asked + self._refusal_seconds - loop.time())
        return []

    def _is_name_allowed(self, host: str, port: int) -> bool:
        return any(entry.where == host and self._is_port_of(entry, port) for entry in self._allowed)

    def _is_port_of(self, entry: AllowedEndpoint, port: int) -> bool:
        return port in self._ports if entry.port is None else port == entry.port

    def _may_reach(self, address: IPAddress, port: int, by_name: bool = False) -> bool:
        if is_never_opened(address):
            return False
        if by_name or any(
            not isinstance(entry.where, str) and address in entry.where and self._is_port_of(entry, port)
            for entry in self._allowed
        ):
            return True
        return port in self._ports and is_public(address) and not _is_of_this_machine(address)

    def _open_socket(self, info: aiohttp.AddrInfoType) -> socket.socket:
        """The socket for one connection, made right before it is connected.

        Raises:
            ConnectionRefusedError: the address may not be connected to.
        """
        family, kind, protocol, _, target = info
        host, port = target[0], target[1]
        address = _parse_address(host) if isinstance(host, str) else None
        if (
            family not in (socket.AF_INET, socket.AF_INET6)
            or not isinstance(port, int)
            or address is None
            or not self._may_reach(address, port, isinstance(host, _Vouched))
        ):
            # Not which one: logs name no hosts of users.
            _logger.info("an endpoint of a user's led to an address that is not open, and was not connected to")
            raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
        return socket.socket(family=family, type=kind, proto=protocol)


class _Vouched(str):
    """An address that is connected to because the operator has allowed the name, and the port, that led to it.

    It goes from the resolver through aiohttp to the socket factory as it is. Should it be copied on the way some day,
    then such endpoints are refused.
    """

    __slots__ = ()


class _GuardedResolver(AbstractResolver):
    """What aiohttp asks for the addresses of a name."""

    def __init__(self, guard: EndpointGuard) -> None:
        self._guard = guard

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        name = parse_host(host.removesuffix("."))
        addresses = await self._guard._addresses(name, port) if isinstance(name, str) else []  # noqa: SLF001
        if not addresses:
            raise OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH))
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in addresses
        ]

    async def close(self) -> None:
        """Nothing is held."""


class _Lookups:
    """Asks the system's name server, in a bounded number of threads of its own.

    The loop's own threads are for files and the like; names whose servers never answer would occupy all of them. These
    are daemons: the process does not wait for a lookup when it ends.
    """

    def __init__(self) -> None:
        self._places = asyncio.Semaphore(_LOOKUPS)

    async def resolve(self, host: str, port: int) -> list[str]:
        """The addresses of a name.

        Raises:
            OSError, UnicodeError: there are none.
        """
        await self._places.acquire()
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[list[str]] = loop.create_future()

        def finish(addresses: list[str], error: Exception | None) -> None:
            # The place is free when the thread is, whether or not somebody still waits.
            self._places.release()
            if answer.done():
                return
            if error is None:
                answer.set_result(addresses)
            else:
                answer.set_exception(error)

        def look_up() -> None:
            addresses: list[str] = []
            failure: Exception | None = None
            try:
                infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
                addresses = [_with_zone(info[4]) for info in infos]
            except (OSError, UnicodeError) as error:
                failure = error
            try:
                loop.call_soon_threadsafe(finish, addresses, failure)
            except RuntimeError:
                return  # the loop was closed meanwhile

        try:
            threading.Thread(target=look_up, name="endpoint lookup", daemon=True).start()
        except RuntimeError as error:  # the machine has no thread left
            self._places.release()
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from error
        return await answer


def _with_zone(target: Sequence[object]) -> str:
    zone = target[3] if len(target) > 3 else 0
    return f"{target[0]}%{zone}" if zone and "%" not in str(target[0]) else str(target[0])


def _parse_address(text: str) -> IPAddress | None:
    try:
        return ip_address(text)
    except ValueError:
        return None


def _is_of_this_machine(address: IPAddress) -> bool:
    """Whether packets to the address would stay on this machine, although it may be a public one.

    What listens on all interfaces is often closed to the outside by a firewall, which connections from within do not
    pass. Connecting a datagram socket sends nothing; the kernel chooses the source address, and that is the address
    itself where it is its own.
    """
    family = socket.AF_INET6 if isinstance(address, IPv6Address) else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((str(address), 9))
            source: str = probe.getsockname()[0]
    except OSError:
        return False  # there is no way there, so the connection will fail too
    return _parse_address(source) == address
