"""The keys that tokens are verified with: one secret, or the key set that an issuer publishes (JWKS, RFC 7517).

A published set is read in the background, so that verifying a token does not wait for its issuer. What is known stays
good while the issuer is out of reach; a key that is not known is looked for at once, but strangers who make up key ids
cannot make this server ask more than once in a while. Within that while an unknown key is not refused: it may be a new
one. Whoever shows it waits for the next reading.

    a known key, the issuer answers          good
    a known key, the issuer does not answer  good for `stale_seconds` after the last answer
    a key that the set has lost              good for `removed_seconds` more, then refused
    an unknown key id                        the set is read again; `cooldown_seconds` after a reading that was in vain
    a known key that did not sign            refused; the set is read again once in `doubt_seconds`
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import jwt
import orjson

from services.errors import UnauthenticatedError, UnavailableError

log = logging.getLogger(__name__)

# What issuers sign with here, each with the curve or type that belongs to it.
_KINDS = {"EdDSA": ("OKP", "Ed25519"), "ES256": ("EC", "P-256"), "RS256": ("RSA", None)}
PUBLISHED_ALGORITHMS = tuple(_KINDS)
SECRET_ALGORITHMS = ("HS256",)
MAX_KEYS = 100
MAX_KEY_ID_CHARS = 255
# Those who wait for the next reading; more are told to try again.
MAX_WAITING = 100
_FAILURES_A_WARNING = 20
_PUBLIC_MEMBERS = ("kty", "crv", "x", "y", "n", "e", "kid", "alg")


class KeysUnavailableError(Exception):
    """An issuer's keys could not be read; the text says why, for the log."""


Fetch: TypeAlias = Callable[[str], Awaitable[bytes]]
"""Reads the document at a URL, bounded in time and size. Raises KeysUnavailableError."""


class Key:
    """What verifies signatures, until `good_until` on the monotonic clock."""

    __slots__ = ("good_until", "material")

    def __init__(self, material: jwt.PyJWK | str, good_until: float) -> None:
        self.material = material
        self.good_until = good_until


class Keys(Protocol):
    """Where the keys of an issuer come from."""

    @property
    def algorithms(self) -> tuple[str, ...]:
        """The algorithms that tokens of this issuer may name."""

    async def find(self, key_id: str | None, algorithm: str, *, instead_of: Key | None = None) -> Key:
        """The key of a token's header.

        Args:
            instead_of: a key that was found before and did not fit the signature.

        Raises:
            UnauthenticatedError: there is no such key.
            UnavailableError: that cannot be known now.
        """


class SharedSecret:
    """One secret that issuer and server know (HS256)."""

    algorithms = SECRET_ALGORITHMS

    def __init__(self, secret: str) -> None:
        self._key = Key(secret, math.inf)

    async def find(self, key_id: str | None, algorithm: str, *, instead_of: Key | None = None) -> Key:
        """The secret, whatever key id the token names."""
        del key_id, algorithm
        if instead_of is not None:
            raise UnauthenticatedError("The token's signature does not fit.")
        return self._key


@dataclass(frozen=True, slots=True, kw_only=True)
class KeySetTimes:
    """How long what is known of a key set holds, in seconds."""

    refresh_seconds: float = 300.0
    retry_seconds: float = 15.0
    cooldown_seconds: float = 10.0
    doubt_seconds: float = 60.0
    stale_seconds: float = 86_400.0
    removed_seconds: float = 300.0


class KeySet:
    """The key set that an issuer publishes. Made by the composition root, which starts and stops its refreshing."""

    algorithms = PUBLISHED_ALGORITHMS

    def __init__(
        self, url: str, fetch: Fetch, *, times: KeySetTimes | None = None, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._url = url
        self._fetch = fetch
        self._times = times or KeySetTimes()
        self._now = now
        # By what they are; in `_published` those of the last answer, in `_keys` also those it has lost.
        self._keys: dict[bytes, Key] = {}
        self._published: list[Key] = []
        self._reading: asyncio.Task[bool] | None = None
        self._refreshing: asyncio.Task[None] | None = None
        self._looking: asyncio.Task[None] | None = None
        self._look_again_at = -math.inf
        self._doubt_again_at = -math.inf
        self._waiting = 0
        self._begun = 0
        # Readings that failed since the last that did not.
        self._failures = 0

    def start(self) -> None:
        """Begin to read the set, and to read it again from time to time."""
        self._refreshing = asyncio.create_task(self._refresh(), name="key set")

    async def stop(self) -> None:
        """Read it no more."""
        tasks = [task for task in (self._refreshing, self._looking, self._reading) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def find(self, key_id: str | None, algorithm: str, *, instead_of: Key | None = None) -> Key:
        """The key of this id; without an id the one key of the algorithm, if there is one only. See `Keys`."""
        if instead_of is not None:
            return await self._find_another(key_id, algorithm, instead_of)
        key = self._known(key_id, algorithm)
        if key is not None:
            return key
        if self._waiting >= MAX_WAITING or (self._failures and self._now() < self._look_again_at):
            raise self._unavailable()
        self._waiting += 1
        try:
            begun = self._begun
            await self._look()
            key = self._known(key_id, algorithm)
            if key is None and self._begun == begun and not self._failures:
                # What came was asked for before this token did: its key may be newer.
                await self._look()
                key = self._known(key_id, algorithm)
        finally:
            self._waiting -= 1
        if key is not None:
            self._look_again_at = -math.inf
            return key
        if self._failures:
            raise self._unavailable()
        raise UnauthenticatedError("The token is signed by a key that its issuer does not publish.")

    async def _find_another(self, key_id: str | None, algorithm: str, instead_of: Key) -> Key:
        """The key that has taken the place of one under the same id, or without any."""
        if self._now() >= self._doubt_again_at:
            self._doubt_again_at = self._now() + self._times.doubt_seconds
            await self._read()
        key = self._known(key_id, algorithm)
        if key is None or key is instead_of:
            raise UnauthenticatedError("The token's signature does not fit.")
        self._doubt_again_at = -math.inf
        return key

    def _unavailable(self) -> UnavailableError:
        return UnavailableError("The keys of the token's issuer are out of reach; try again.", retry_after=5)

    def _known(self, key_id: str | None, algorithm: str) -> Key | None:
        now = self._now()
        candidates = self._published if key_id is None else self._keys.values()
        fitting = [
            key
            for key in candidates
            if _of(key).algorithm_name == algorithm
            and (key_id is None or _of(key).key_id == key_id)
            and key.good_until > now
        ]
        if not fitting or (key_id is None and len(fitting) > 1):
            return None
        # That of the last answer: an id may be used again.
        return fitting[-1]

    async def _look(self) -> None:
        """Read the set for a key that is not known, now or when it is time, once for all who wait."""
        if self._looking is None:
            self._looking = asyncio.create_task(self._look_in_time(), name="looking for a key")
        await asyncio.shield(self._looking)

    async def _look_in_time(self) -> None:
        try:
            await asyncio.sleep(max(0.0, self._look_again_at - self._now()))
            if self._reading is None:
                self._look_again_at = self._now() + self._times.cooldown_seconds
            await self._read()
        finally:
            self._looking = None

    async def _refresh(self) -> None:
        while True:
            came = await self._read()
            await asyncio.sleep(self._times.refresh_seconds if came else self._times.retry_seconds)

    async def _read(self) -> bool:
        """Read the set, or wait for the reading that is under way: there is never more than one."""
        if self._reading is None:
            self._begun += 1
            self._reading = asyncio.create_task(self._read_once(), name="reading a key set")
        return await asyncio.shield(self._reading)

    async def _read_once(self) -> bool:
        try:
            self._take(_parsed(await self._fetch(self._url)))
        except KeysUnavailableError as error:
            # Not every time: it may last for hours.
            level = logging.DEBUG if self._failures % _FAILURES_A_WARNING else logging.WARNING
            log.log(level, "the keys at %s cannot be read: %s", self._url, error)
            self._failures += 1
            return False
        except Exception:
            log.exception("reading the keys at %s failed", self._url)
            self._failures += 1
            return False
        finally:
            self._reading = None
        if self._failures:
            log.warning("the keys at %s can be read again", self._url)
        self._failures = 0
        return True

    def _take(self, published: dict[bytes, jwt.PyJWK]) -> None:
        now = self._now()
        before = self._keys
        for identity, key in before.items():
            if identity not in published:
                key.good_until = min(key.good_until, now + self._times.removed_seconds)
        lost = {identity: key for identity, key in before.items() if identity not in published and key.good_until > now}
        current: dict[bytes, Key] = {}
        for identity, material in published.items():
            # The same object where it was known before: tokens that were verified by it stay verified.
            key = before.get(identity) or Key(material, 0)
            key.good_until = now + self._times.stale_seconds
            current[identity] = key
        # Bounded, whatever an issuer does: of those it has lost the last ones.
        self._keys = dict(list(lost.items())[-MAX_KEYS:]) | current
        self._published = list(current.values())


def _of(key: Key) -> jwt.PyJWK:
    assert isinstance(key.material, jwt.PyJWK)
    return key.material


def _parsed(document: bytes) -> dict[bytes, jwt.PyJWK]:
    """The usable keys of a set, by what they are.

    Raises:
        KeysUnavailableError: it is no key set, or has no key that could be used.
    """
    try:
        data = orjson.loads(document)
    except orjson.JSONDecodeError as error:
        raise KeysUnavailableError("not JSON") from error
    members = data.get("keys") if isinstance(data, dict) else None
    if not isinstance(members, list):
        raise KeysUnavailableError("not a key set")
    usable = [member for member in members[:MAX_KEYS] if isinstance(member, dict) and _is_usable(member)]
    found: dict[bytes, jwt.PyJWK] = {}
    for member in usable:
        # One by one: a key that cannot be read must not hide the others.
        try:
            (key,) = jwt.PyJWKSet.from_dict({"keys": [member]}).keys
        except (jwt.PyJWTError, TypeError, ValueError):
            continue
        public = {name: member[name] for name in _PUBLIC_MEMBERS if name in member}
        found[orjson.dumps(public, option=orjson.OPT_SORT_KEYS)] = key
    if not found:
        raise KeysUnavailableError("no key in it can be used; EdDSA (Ed25519), ES256 and RS256 can")
    return found


def _is_usable(member: dict[str, Any]) -> bool:
    """Whether a key is public, for signatures, and of an algorithm that is taken here."""
    operations = member.get("key_ops")
    key_id = member.get("kid")
    named = member.get("alg")
    return (
        (member.get("kty"), member.get("crv")) in _KINDS.values()
        and (named is None or (isinstance(named, str) and _KINDS.get(named) == (member["kty"], member.get("crv"))))
        and member.get("use") in (None, "sig")
        and (operations is None or (isinstance(operations, list) and "verify" in operations))
        and (key_id is None or (isinstance(key_id, str) and len(key_id) <= MAX_KEY_ID_CHARS))
    )
