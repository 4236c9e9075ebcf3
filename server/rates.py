"""How often somebody may ask: token buckets, one for each address and one for all of them together."""

from __future__ import annotations

import ipaddress
import math
import time
from collections import OrderedDict
from collections.abc import Callable

_MAX_ADDRESSES = 10_000
_SECONDS = 60.0
# Who has an IPv6 address has all of the last 64 bits.
_IPV6_PREFIX = 64


class Rates:
    """Requests a minute; a minute's worth may come at once.

    Args:
        each: from one address; an IPv6 network of 64 bits is one.
        total: from everybody.
        now: a clock in seconds that never goes back.
    """

    def __init__(self, *, each: int, total: int, now: Callable[[], float] = time.monotonic) -> None:
        self._each = each
        self._total = _Bucket(total, now())
        self._now = now
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, address: str | None) -> int:
        """0 where one more request is taken; else the seconds after which it would be."""
        now = self._now()
        name = _name(address)
        bucket = self._buckets.get(name)
        if bucket is None:
            bucket = self._buckets[name] = _Bucket(self._each, now)
            # The one that was silent the longest. Who comes from more addresses than that meets the total.
            if len(self._buckets) > _MAX_ADDRESSES:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(name)
        # Not counted for everybody where it is refused anyway: one address must not use up what is for all.
        return bucket.take(now) or self._total.take(now)


class _Bucket:
    __slots__ = ("_at", "_left", "_size")

    def __init__(self, size: int, now: float) -> None:
        self._size = size
        self._left = float(size)
        self._at = now

    def take(self, now: float) -> int:
        speed = self._size / _SECONDS
        self._left = min(self._size, self._left + (now - self._at) * speed)
        self._at = now
        if self._left < 1:
            return max(1, math.ceil((1 - self._left) / speed))
        self._left -= 1
        return 0


def _name(address: str | None) -> str:
    try:
        parsed = ipaddress.ip_address((address or "").partition("%")[0])
    except ValueError:
        return ""
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, _IPV6_PREFIX), strict=False))
    return str(parsed)
