"""Users' own keys for providers. They go in and never come out, but to the provider: here, encrypted, or not at all."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

import asyncpg

from models.database import Database
from models.ids import new_id
from models.text import is_storable
from providers.event_stream import checked_key
from services.encryption import UnreadableKeyError, Vault
from services.errors import BadUserInputError, NotFoundError, UnauthenticatedError
from services.rates import NO_RATE, UserRate
from services.viewer import Viewer

if TYPE_CHECKING:
    from asyncpg import Connection

log = logging.getLogger(__name__)

CUSTOM = "custom:"
"""Begins the name under which the key of a custom provider is kept; its slug follows."""

MAX_KEY_CHARS = 500
# Of a shorter key, four characters would be too much of it.
_SHORTEST_SHOWN = 12
# Of so many unreadable keys it is remembered that the log has them.
_MAX_LOGGED = 4_096

_UNREADABLE = "This key cannot be read any more; enter it again."
_UNKNOWN = "This server has no provider of this name any more."

_COLUMNS = "provider, ciphertext, last_four, created_at, updated_at"
_LIST = f"""
SELECT {_COLUMNS} FROM provider_keys WHERE owner_id = $1 AND NOT starts_with(provider, '{CUSTOM}') ORDER BY provider
"""  # noqa: S608 - names of ours
_OF = "SELECT provider, ciphertext, last_four FROM provider_keys WHERE owner_id = $1"
_SET = f"""
INSERT INTO provider_keys (id, owner_id, provider, ciphertext, last_four) VALUES ($1, $2, $3, $4, $5)
ON CONFLICT (owner_id, provider) DO UPDATE SET
    ciphertext = excluded.ciphertext, last_four = excluded.last_four, updated_at = now()
RETURNING {_COLUMNS}
"""  # noqa: S608
_DELETE = "DELETE FROM provider_keys WHERE owner_id = $1 AND provider = $2 RETURNING true"
# Of a custom provider that stays behind (the user has another one of this slug) the key must not come over: it would be
# sent to the other's endpoint.
_TO_TAKE_OVER = f"""
SELECT id, provider, ciphertext FROM provider_keys theirs
WHERE owner_id = $1
    AND NOT EXISTS (SELECT FROM provider_keys own WHERE own.owner_id = $2 AND own.provider = theirs.provider)
    AND NOT EXISTS (
        SELECT FROM custom_providers left_behind
        WHERE left_behind.owner_id = $1 AND '{CUSTOM}' || left_behind.slug = theirs.provider
    )
ORDER BY id FOR UPDATE
"""  # noqa: S608
_TAKE_OVER = "UPDATE provider_keys SET owner_id = $2, ciphertext = $3 WHERE id = $1"


@dataclass(frozen=True, slots=True)
class OwnKey:
    """A user's key, to be used for them: `key` is None where it cannot be read any more."""

    provider: str
    key: str | None = field(repr=False)
    last_four: str


@dataclass(frozen=True, slots=True)
class ProviderKeyRecord:
    """What a user may see of a key: `problem` is a sentence for them where it is of no use."""

    provider: str
    last_four: str
    problem: str | None
    created_at: datetime
    updated_at: datetime


class ProviderKeys:
    """The keys of users.

    Args:
        names: the names of the providers that take a user's key.
        rate: how often a user may change them.
    """

    def __init__(
        self, database: Database, vault: Vault, names: Callable[[], Collection[str]], rate: UserRate = NO_RATE
    ) -> None:
        self._database = database
        self._vault = vault
        self._names = names
        self._logged: OrderedDict[int, None] = OrderedDict()
        self._rate = rate

    async def list(self, viewer: Viewer) -> Sequence[ProviderKeyRecord]:
        """The viewer's keys for providers that the server knows, or knew, by name. Not those of custom providers."""
        async with self._database.acquire() as connection:
            rows = await connection.fetch(_LIST, viewer.id)
        return [self._record(viewer.id, row) for row in rows]

    async def set(self, viewer: Viewer, provider: str, key: str) -> ProviderKeyRecord:
        """Keep a key, in the place of one that there is.

        Raises:
            BadUserInputError: there is no such provider, or this can be no key.
            RateLimitedError: the viewer has changed keys or endpoints too often a moment ago.
        """
        if provider not in self._names():
            raise BadUserInputError("There is no provider of this name that takes a key.", field="provider")
        key = checked_provider_key(key)
        self._rate.check(viewer.id)
        try:
            async with self._database.acquire() as connection:
                row = await self.store(connection, viewer.id, provider, key)
        except asyncpg.ForeignKeyViolationError as error:
            raise UnauthenticatedError("The account of this token does not exist any more.") from error
        return self._record(viewer.id, row)

    async def delete(self, viewer: Viewer, provider: str) -> None:
        """Forget a key.

        Raises:
            NotFoundError: there is none.
        """
        deleted = None
        if not provider.startswith(CUSTOM) and is_storable(provider):
            async with self._database.acquire() as connection:
                deleted = await connection.fetchval(_DELETE, viewer.id, provider)
        if deleted is None:
            raise NotFoundError("key", field="provider")

    async def of(self, connection: Connection, owner_id: UUID) -> dict[str, OwnKey]:
        """All keys of a user, those of custom providers too, by the names they are kept under."""
        rows = await connection.fetch(_OF, owner_id)
        return {
            row["provider"]: self.opened(owner_id, row["provider"], row["ciphertext"], row["last_four"]) for row in rows
        }

    def opened(self, owner_id: UUID, provider: str, ciphertext: bytes, last_four: str) -> OwnKey:
        """A stored key. One that cannot be read is no failure of anything else: logged once, and its `key` is None."""
        try:
            return OwnKey(provider, self._vault.decrypt(owner_id, provider, ciphertext), last_four)
        except UnreadableKeyError as error:
            self._log_once(hash((owner_id, provider, ciphertext)), error, owner_id, provider)
            return OwnKey(provider, None, last_four)

    def _log_once(self, stored: int, error: UnreadableKeyError, owner_id: UUID, provider: str) -> None:
        # It is read with every turn and every look at the settings. One that is entered again is another one.
        if stored in self._logged:
            return
        self._logged[stored] = None
        if len(self._logged) > _MAX_LOGGED:
            self._logged.popitem(last=False)
        log.warning("a user's key cannot be read: %s", error, extra={"owner_id": owner_id, "provider": provider})

    async def store(self, connection: Connection, owner_id: UUID, provider: str, key: str) -> Mapping[str, Any]:
        """Write a checked key; its row."""
        ciphertext = self._vault.encrypt(owner_id, provider, key)
        row: Mapping[str, Any] = await connection.fetchrow(
            _SET, new_id(), owner_id, provider, ciphertext, _last_four(key)
        )
        return row

    async def take_over(self, connection: Connection, from_id: UUID, to_id: UUID) -> None:
        """Make a user's keys another's, encrypted anew for them; where the other has one, that stays.

        What cannot be read comes over as it is: its new owner is told to enter it again.
        """
        for row in await connection.fetch(_TO_TAKE_OVER, from_id, to_id):
            ciphertext = row["ciphertext"]
            key = self.opened(from_id, row["provider"], ciphertext, "").key
            if key is not None:
                ciphertext = self._vault.encrypt(to_id, row["provider"], key)
            await connection.execute(_TAKE_OVER, row["id"], to_id, ciphertext)

    def _record(self, owner_id: UUID, row: Mapping[str, Any]) -> ProviderKeyRecord:
        problem = None
        if row["provider"] not in self._names():
            problem = _UNKNOWN
        elif self.opened(owner_id, row["provider"], row["ciphertext"], "").key is None:
            problem = _UNREADABLE
        return ProviderKeyRecord(
            provider=row["provider"],
            last_four=row["last_four"],
            problem=problem,
            created_at=row["created_at"],
            updated_at=row["updated_at"],
        )


def checked_provider_key(key: str, *, field: str = "key") -> str:
    """A key without blanks around it, fit for a header. What is refused is not repeated.

    Raises:
        BadUserInputError: it is empty, too long, or holds what a header cannot carry.
    """
    key = key.strip()
    if not key:
        raise BadUserInputError("The key is empty.", field=field)
    if len(key) > MAX_KEY_CHARS:
        raise BadUserInputError(f"A key is at most {MAX_KEY_CHARS} characters long.", field=field)
    try:
        return checked_key(key)
    except ValueError as error:
        raise BadUserInputError("A key consists of visible ASCII characters alone.", field=field) from error


def problem_of(key: OwnKey | None) -> str | None:
    """A sentence for the owner of a key that cannot be used; None where it can, or where there is none."""
    return _UNREADABLE if key is not None and key.key is None else None


def _last_four(key: str) -> str:
    return key[-4:] if len(key) >= _SHORTEST_SHOWN else ""
