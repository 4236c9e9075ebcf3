"""Whom a token stands for: the issuer that signed it, its claims, and the user of ours that belongs to its subject.

What is fixed here and not told by a token: which issuers count, which keys are theirs, and by which algorithms each may
sign. The unverified `iss` chooses among them and nothing else; `jku`, `x5u` and `jwk` in a header are never looked at.

A token that was verified is remembered by its SHA-256 until it expires, so that a request costs a hash and no signature
(186 µs for EdDSA). What can change meanwhile is looked at again: its key at every request, its user every 30 s.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Any
from uuid import UUID

import jwt

from models.database import Database, DatabaseUnavailableError
from models.ids import new_id
from models.text import is_storable
from services.errors import UnauthenticatedError, UnavailableError
from services.keys import MAX_KEY_ID_CHARS, Key, Keys
from services.viewer import MAX_TOKEN_CHARS, OUR_ISSUER, Sessions, Viewer

# How long a user's deletion can stay unnoticed by a token that was verified before.
RECHECK_SECONDS = 30.0
# Of an issuer and of a subject.
MAX_NAME_CHARS = 255
# Longer than any session here may be; a token for centuries is a mistake or a forgery.
MAX_LIFETIME_SECONDS = 366 * 86_400
_CACHED_TOKENS = 10_000
_NUMERIC_DATES = ("exp", "nbf", "iat")

# A key that is too short for its algorithm is refused, and not only warned of.
_JWT = jwt.PyJWT(options={"enforce_minimum_key_length": True})

_FIND_PERSON = "SELECT id, deleted_at IS NULL AS living FROM users WHERE issuer = $1 AND subject = $2"
_ADD_PERSON = """
INSERT INTO users (id, anonymous, issuer, subject) VALUES ($1, false, $2, $3) ON CONFLICT (issuer, subject) DO NOTHING
"""
_LIVING = "SELECT id FROM users WHERE id = ANY($1::uuid[]) AND deleted_at IS NULL"


@dataclass(frozen=True, slots=True, kw_only=True)
class Issuer:
    """Somebody whose tokens are taken.

    Attributes:
        name: the `iss` of its tokens; None: any but our own (for a shared secret only).
        audience: what `aud` must be or hold; None: whatever it is.
        leeway_seconds: how far its clock may differ from ours.
    """

    name: str | None
    audience: str | None
    keys: Keys
    leeway_seconds: float


class _Verified:
    """A token that was verified."""

    __slots__ = ("checked_at", "key", "viewer")

    def __init__(self, viewer: Viewer, key: Key | None, checked_at: float) -> None:
        self.viewer = viewer
        self.key = key
        self.checked_at = checked_at


class Identities:
    """Verifies tokens, and knows the users behind them.

    Args:
        sessions: reads the tokens of our own anonymous sessions.
        issuers: whose tokens are taken besides; their names differ.
    """

    def __init__(
        self,
        database: Database,
        sessions: Sessions,
        issuers: Sequence[Issuer] = (),
        *,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._sessions = sessions
        self._issuers = {issuer.name: issuer for issuer in issuers}
        self._now = now
        self._verified: OrderedDict[bytes, _Verified] = OrderedDict()
        self._held: set[UUID] = set()
        self._on_gone: list[Callable[[UUID], None]] = []

    async def verify(self, token: str) -> Viewer:
        """Who a token stands for. Waits for nothing where the token was verified before, but for a look every 30 s.

        Raises:
            UnauthenticatedError: not a token that is taken here, expired, or of a user that was deleted.
            UnavailableError: the keys of its issuer are out of reach, or its user is held.
            DatabaseUnavailableError: the database is.
        """
        if len(token) > MAX_TOKEN_CHARS or not token.isascii():
            raise UnauthenticatedError("The token is not valid.")
        digest = sha256(token.encode()).digest()
        known = self._verified.get(digest)
        if known is None or (known.key is not None and known.key.good_until <= self._now()):
            self._verified.pop(digest, None)
            known = self._verified[digest] = await self._admit(token)
            if len(self._verified) > _CACHED_TOKENS:
                self._verified.popitem(last=False)
        if known.viewer.expires_at <= time.time():
            self._verified.pop(digest, None)
            raise UnauthenticatedError("The token has expired.")
        if known.checked_at + RECHECK_SECONDS <= self._now():
            await self._check_again(known)
        if known.viewer.id in self._held:
            raise UnavailableError("What this account owns is being moved; try again.")
        return known.viewer

    async def living(self, user_ids: Collection[UUID]) -> set[UUID]:
        """Those of the users who are there and not being deleted.

        Raises:
            DatabaseUnavailableError: that cannot be known now.
        """
        async with self._database.acquire() as connection:
            return {row["id"] for row in await connection.fetch(_LIVING, list(user_ids))}

    def forget(self, user_id: UUID) -> None:
        """A user is no more: no token of theirs is good, from now on and not only after the next look."""
        for digest in [digest for digest, known in self._verified.items() if known.viewer.id == user_id]:
            del self._verified[digest]
        for tell in self._on_gone:
            tell(user_id)

    @contextmanager
    def holding(self, user_id: UUID) -> Iterator[None]:
        """Let nobody in as this user meanwhile: whoever keeps sending could put off for ever what waits for its end."""
        self._held.add(user_id)
        try:
            yield
        finally:
            self._held.discard(user_id)

    def when_gone(self, tell: Callable[[UUID], None]) -> None:
        """Call this for every user who is found to be no more."""
        self._on_gone.append(tell)

    async def _check_again(self, known: _Verified) -> None:
        # Set before the wait: the requests that come meanwhile go by what was known.
        before, known.checked_at = known.checked_at, self._now()
        try:
            living = await self.living([known.viewer.id])
        except DatabaseUnavailableError:
            known.checked_at = before
            raise
        if not living:
            self.forget(known.viewer.id)
            raise UnauthenticatedError("The account of this token does not exist any more.")

    async def _admit(self, token: str) -> _Verified:
        header, claims = _unverified(token)
        if claims.get("iss") == OUR_ISSUER:
            viewer = self._sessions.read(token)
            if not await self.living([viewer.id]):
                raise UnauthenticatedError("The account of this token does not exist any more.")
            return _Verified(viewer, None, self._now())
        _check_form(claims)
        name: str = claims["iss"]
        issuer = self._issuers.get(name) or self._issuers.get(None)
        if issuer is None:
            raise UnauthenticatedError("The token's issuer is not one that this server takes tokens of.")
        algorithm, key_id = header.get("alg"), header.get("kid")
        if algorithm not in issuer.keys.algorithms or (key_id is not None and len(key_id) > MAX_KEY_ID_CHARS):
            raise UnauthenticatedError("The token is not valid.")
        key = await issuer.keys.find(key_id, algorithm)
        if not _is_signed(token, key, algorithm, issuer, name):
            # Its issuer may have a new key under the same id, or under none.
            key = await issuer.keys.find(key_id, algorithm, instead_of=key)
            if not _is_signed(token, key, algorithm, issuer, name):
                raise UnauthenticatedError("The token's signature does not fit.")
        user_id = await self._person(name, claims["sub"])
        viewer = Viewer(user_id, anonymous=False, expires_at=claims["exp"] + issuer.leeway_seconds)
        return _Verified(viewer, key, self._now())

    async def _person(self, issuer: str, subject: str) -> UUID:
        """The user of a subject, made at first sight."""
        async with self._database.acquire() as connection:
            person = await connection.fetchrow(_FIND_PERSON, issuer, subject)
            if person is None:
                await connection.execute(_ADD_PERSON, new_id(), issuer, subject)
                person = await connection.fetchrow(_FIND_PERSON, issuer, subject)
        if person is None or not person["living"]:
            raise UnauthenticatedError("The account of this token does not exist any more.")
        user_id: UUID = person["id"]
        return user_id


def _unverified(token: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a token says of itself; nobody has signed for it yet."""
    try:
        parts = _JWT.decode_complete(token, options={"verify_signature": False})
    except (jwt.PyJWTError, ValueError) as error:
        raise UnauthenticatedError("The token is not valid.") from error
    return parts["header"], parts["payload"]


def _check_form(claims: dict[str, Any]) -> None:
    """What PyJWT leaves to us: it would take times in quotes and in fractions, and any subject that is a string."""
    for name in _NUMERIC_DATES:
        # `type`, because True is an int.
        if name in claims and type(claims[name]) is not int:
            raise UnauthenticatedError(f"The token's {name} is not a whole number of seconds.")
    if "exp" not in claims or claims["exp"] > time.time() + MAX_LIFETIME_SECONDS:
        raise UnauthenticatedError("The token does not expire within a year.")
    for name in ("iss", "sub"):
        value = claims.get(name)
        if not isinstance(value, str) or not 1 <= len(value) <= MAX_NAME_CHARS or not is_storable(value):
            raise UnauthenticatedError(f"The token's {name} is not a text of 1 to {MAX_NAME_CHARS} characters.")


def _is_signed(token: str, key: Key, algorithm: str, issuer: Issuer, name: str) -> bool:
    """Whether this key signed the token.

    Raises:
        UnauthenticatedError: it did, and the claims are wrong; or the signature cannot be checked at all.
    """
    try:
        _JWT.decode(
            token,
            key.material,
            algorithms=[algorithm],
            issuer=name,
            audience=issuer.audience,
            leeway=issuer.leeway_seconds,
            options={"require": ["exp", "sub", "iss"], "verify_aud": issuer.audience is not None},
        )
    except jwt.InvalidSignatureError:
        return False
    except jwt.ExpiredSignatureError as error:
        raise UnauthenticatedError("The token has expired.") from error
    except jwt.InvalidAudienceError as error:
        raise UnauthenticatedError("The token is not for this server (aud).") from error
    except (jwt.PyJWTError, TypeError, ValueError) as error:
        raise UnauthenticatedError("The token is not valid.") from error
    return True
