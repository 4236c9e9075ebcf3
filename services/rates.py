"""How often somebody may ask: token buckets, for addresses (one each, and one for all of them together) and for users.

They are in the memory of this process and known to no other: of N servers each lets as much pass.
"""

from __future__ import annotations

import ipaddress
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar
from uuid import UUID

from services.errors import RateLimitedError

T = TypeVar("T", bound=Hashable)
_MAX_NAMES = 10_000
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
        self._total = _Bucket(total, now())
        self._now = now
        self._buckets: _Buckets[str] = _Buckets(each)

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, address: str | None) -> int:
        """0 where one more request is taken; else the seconds after which it would be."""
        now = self._now()
        # Not counted for everybody where it is refused anyway: one address must not use up what is for all.
        return self._buckets.take(_name(address), now) or self._total.take(now)


class UserRate:
    """How often each user may do something in a minute; a minute's worth may come at once.

    Args:
        per_minute: 0: as often as they like.
        what: what is done too often, for the message.
        now: a clock in seconds that never goes back.
    """

    def __init__(self, per_minute: int, what: str, *, now: Callable[[], float] = time.monotonic) -> None:
        self._what = what
        self._now = now
        self._buckets: _Buckets[UUID] | None = _Buckets(per_minute) if per_minute else None

    def __len__(self) -> int:
        return len(self._buckets or ())

    def take(self, user_id: UUID) -> int:
        """0 where the user may do it once more, which is counted; else the seconds after which they may."""
        return 0 if self._buckets is None else self._buckets.take(user_id, self._now())

    def refusal(self, wait: int) -> RateLimitedError:
        """What whoever has to wait so many seconds is told."""
        return RateLimitedError(f"Too many {self._what} in a short time; try again later.", retry_after=wait)

    def check(self, user_id: UUID) -> None:
        """Count it once more.

        Raises:
            RateLimitedError: the user did it too often.
        """
        if wait := self.take(user_id):
            raise self.refusal(wait)


NO_RATE = UserRate(0, "")


class _Buckets(Generic[T]):
    """A bucket for each name that was heard of lately."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._buckets: OrderedDict[T, _Bucket] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, name: T, now: float) -> int:
        bucket = self._buckets.get(name)
        if bucket is None:
            bucket = self._buckets[name] = _Bucket(self._size, now)
            # The one that was silent the longest. Who comes from more addresses than that meets the total; who comes as
            # more users has begun them at a rate of their own.
            if len(self._buckets) > _MAX_NAMES:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(name)
        return bucket.take(now)


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
