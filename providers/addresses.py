"""Which internet addresses anybody may be sent to, which nobody ever is, and how a host is written.

Nothing here opens a socket or asks a name server; `providers/guard.py` does, and decides by these rules.

The tables are those of IANA, as of November 2026:

    https://www.iana.org/assignments/iana-ipv4-special-registry
    https://www.iana.org/assignments/iana-ipv6-special-registry
    https://www.iana.org/assignments/multicast-addresses
    https://www.iana.org/assignments/ipv6-address-space

Everything in them is refused, also what they call globally reachable: those are services of the network, such as the
DNS sinks of AS112, and no place for a model. `ipaddress.is_global` is not asked: which ranges it knows changes from one
Python to the next, and it takes multicast, 6to4, NAT64 and site-local addresses for global.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import TypeAlias

IPAddress: TypeAlias = IPv4Address | IPv6Address
IPNetwork: TypeAlias = IPv4Network | IPv6Network


# Of the endpoints that users may name, where the operator has set no others: the ports of web servers.
DEFAULT_PORTS = (80, 443, 8080, 8443)


def _networks(*texts: str) -> tuple[IPNetwork, ...]:
    return tuple(map(ip_network, texts))


_SPECIAL_V4 = _networks(
    "0.0.0.0/8",  # "this network" (RFC 791); Linux connects 0.0.0.0 to itself
    "10.0.0.0/8",  # private use (RFC 1918)
    "100.64.0.0/10",  # shared address space of carriers (RFC 6598)
    "127.0.0.0/8",  # loopback (RFC 1122)
    "169.254.0.0/16",  # link-local (RFC 3927), and the metadata services of most clouds
    "172.16.0.0/12",  # private use (RFC 1918)
    "192.0.0.0/24",  # protocol assignments (RFC 6890)
    "192.0.2.0/24",  # documentation (RFC 5737)
    "192.31.196.0/24",  # AS112-v4 (RFC 7535)
    "192.52.193.0/24",  # AMT (RFC 7450)
    "192.88.99.0/24",  # 6to4 relays, deprecated (RFC 7526)
    "192.168.0.0/16",  # private use (RFC 1918)
    "192.175.48.0/24",  # AS112 (RFC 7534)
    "198.18.0.0/15",  # benchmarking (RFC 2544)
    "198.51.100.0/24",  # documentation (RFC 5737)
    "203.0.113.0/24",  # documentation (RFC 5737)
    "224.0.0.0/4",  # multicast (RFC 5771)
    "240.0.0.0/4",  # reserved (RFC 1112), and the limited broadcast (RFC 8190)
)
# All that is global unicast. Outside of it are, among others, ::, ::1, IPv4-mapped ::ffff:0:0/96 and IPv4-compatible
# ::/96 addresses, NAT64 64:ff9b::/96 and 64:ff9b:1::/48, discard-only 100::/64, segment routing 5f00::/16, unique local
# fc00::/7, link-local fe80::/10, site-local fec0::/10 and multicast ff00::/8.
_GLOBAL_UNICAST_V6 = IPv6Network("2000::/3")
_SPECIAL_V6 = _networks(
    "2001::/23",  # protocol assignments (RFC 2928): Teredo 2001::/32, benchmarking 2001:2::/48, ORCHID and more
    "2001:db8::/32",  # documentation (RFC 3849)
    "2002::/16",  # 6to4 (RFC 3056): an IPv4 address is in it, which the relay connects to
    "2620:4f:8000::/48",  # AS112 (RFC 7534)
    "3fff::/20",  # documentation (RFC 9637)
)
_NAT64 = IPv6Network("64:ff9b::/96")
_METADATA = _networks(
    "169.254.0.0/16",  # link-local: AWS, Azure, Google, Oracle, DigitalOcean, OpenStack and others
    "100.100.100.200/32",  # Alibaba
    "168.63.129.16/32",  # Azure's host: it looks public, and is only seen by Azure's machines
    "192.0.0.192/32",  # Oracle Classic
    "fe80::/10",  # link-local
    "fd00:ec2::/32",  # AWS: metadata at ::254, the credentials of pods at ::23
    "fd20:ce::254/128",  # Google
    "fd00:42::42/128",  # Scaleway
)
_METADATA_NAMES = frozenset({"metadata.google.internal", "metadata.goog"})
_NOBODYS = _networks(
    "0.0.0.0/8",
    "224.0.0.0/4",
    "240.0.0.0/4",
    "::/96",  # unspecified, IPv4-compatible; loopback is excepted below
    "::ffff:0:0/96",  # IPv4-mapped: the IPv4 address is to be written
    "64:ff9b:1::/48",  # NAT64 by a prefix of one's own, which may stand for any IPv4 address
    "2001::/32",  # Teredo
    "2002::/16",  # 6to4
    "fec0::/10",  # site-local, deprecated
    "ff00::/8",  # multicast
)
_LOOPBACK_V6 = IPv6Address("::1")

# Labels as the DNS has them (RFC 1035, 2.3.1), with the underscore that names inside a company have. No dot at the end.
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*", re.ASCII)
# What resolvers may take for a number of an IPv4 address: 127.1, 0x7f.1, 0177.0.0.1, 2130706433 all are 127.0.0.1.
# It is the last label that decides (url.spec.whatwg.org, "ends in a number checker").
_NUMBER = re.compile(r"(?:[0-9]+|0x[0-9a-f]*)", re.ASCII)
_MAX_NAME_CHARS = 253


def is_public(address: IPAddress) -> bool:
    """Whether this is a unicast address on the public internet, by the registries of IANA."""
    if isinstance(address, IPv4Address):
        return not _is_in(address, _SPECIAL_V4 + _METADATA)
    return address.scope_id is None and address in _GLOBAL_UNICAST_V6 and not _is_in(address, _SPECIAL_V6)


def is_never_opened(address: IPAddress) -> bool:
    """Whether no setting opens this address: services that hand out credentials to whoever asks from inside, and
    addresses that belong to nobody or stand for another one.
    """
    if isinstance(address, IPv6Address):
        if address.scope_id is not None:
            return True
        if address == _LOOPBACK_V6:
            return False
        if address in _NAT64:
            return is_never_opened(IPv4Address(address.packed[-4:]))
    return _is_in(address, _METADATA + _NOBODYS)


def is_never_opened_name(name: str) -> bool:
    """Whether no setting opens this host name, whatever it leads to."""
    return name in _METADATA_NAMES


def parse_host(text: str) -> IPAddress | str | None:
    """A host as it stands in a URL: an IPv4 address of four plain numbers, an IPv6 address (without its brackets and
    without a zone), or a host name in ASCII, in lower case. None: anything else.
    """
    if not text.isascii():
        return None
    text = text.lower()
    if ":" in text or _NUMBER.fullmatch(text.rpartition(".")[2]):
        if "%" in text:
            return None
        try:
            return ip_address(text)
        except ValueError:
            return None
    return text if len(text) <= _MAX_NAME_CHARS and _NAME.fullmatch(text) else None


@dataclass(slots=True, frozen=True)
class AllowedEndpoint:
    """Where custom endpoints may lead although it is not public.

    Attributes:
        where: addresses, or a host name in lower case, whatever addresses it has.
        port: the one port that is opened there; None: those that are open everywhere.
    """

    where: IPNetwork | str
    port: int | None = None

    @classmethod
    def parse(cls, text: str) -> AllowedEndpoint:
        """From `10.0.0.0/8`, `192.168.1.5:11434`, `[fd12::5]:11434`, `fd12::/16` or `ollama.internal:11434`.

        Raises:
            ValueError: it is nothing of the kind, or is never opened.
        """
        bracketed = re.fullmatch(r"\[([^\[\]]+)\](?::([0-9]{1,5}))?", text, re.ASCII)
        plain = re.fullmatch(r"([^:\[\]]+)(?::([0-9]{1,5}))?", text, re.ASCII)
        match = bracketed or plain
        place, port = (match[1], match[2]) if match else (text, None)
        if port is not None and not 1 <= int(port) <= 65_535:
            raise ValueError("the port is out of range")
        if bracketed and ":" not in place:
            raise ValueError("only an IPv6 address has brackets")
        return cls(_place(place), None if port is None else int(port))


def _place(text: str) -> IPNetwork | str:
    if "/" in text:
        host, _, length = text.partition("/")
        address = parse_host(host)
        # Not by ip_network() alone: it takes masks of the form 255.0.0.0 and 0.0.0.255 for lengths.
        if address is None or isinstance(address, str) or not re.fullmatch(r"[0-9]{1,3}", length, re.ASCII):
            raise ValueError("no network")
        network = ip_network(f"{address}/{length}")
    else:
        place = parse_host(text)
        if place is None or (isinstance(place, str) and is_never_opened_name(place)):
            raise ValueError("no host, or one that is never opened")
        if isinstance(place, str):
            return place
        network = ip_network(place)
    if _is_within_never_opened(network):
        raise ValueError("never opened")
    return network


def _is_within_never_opened(network: IPNetwork) -> bool:
    if network.num_addresses == 1:
        return is_never_opened(network[0])
    if isinstance(network, IPv4Network):
        return any(isinstance(other, IPv4Network) and network.subnet_of(other) for other in _METADATA + _NOBODYS)
    return any(isinstance(other, IPv6Network) and network.subnet_of(other) for other in _METADATA + _NOBODYS)


def _is_in(address: IPAddress, networks: Iterable[IPNetwork]) -> bool:
    return any(address in network for network in networks)
