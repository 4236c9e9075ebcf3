"""Endpoints and models that users name themselves: at most 20 and 100 of a user.

A custom provider's key is kept with the others (services/provider_keys.py) and goes to the host it was entered for
alone: when the endpoint moves to another origin, the key is dropped unless a new one comes with it.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from uuid import UUID

from models.database import Database
from models.ids import new_id
from models.text import is_storable
from services.errors import BadUserInputError, ForbiddenError, NotFoundError, UnauthenticatedError
from services.input import checked_line
from services.provider_keys import CUSTOM, OwnKey, ProviderKeys, checked_provider_key, problem_of
from services.rates import NO_RATE, UserRate
from services.viewer import Viewer

if TYPE_CHECKING:
    from asyncpg import Connection

MAX_PROVIDERS = 20
MAX_MODELS = 100
MAX_NAME_BYTES = 200
MAX_URL_BYTES = 2_000
MAX_VENDOR_NAME_BYTES = 200
MAX_TOKENS = 2**31 - 1
FORMATS = ("CHAT_COMPLETIONS", "ANTHROPIC_MESSAGES")
ABILITIES = ("VISION", "PDF", "REASONING", "EFFORT", "TOOLS", "IMAGE_OUTPUT")
SLUG = re.compile(r"[a-z0-9][a-z0-9-]{0,39}", re.ASCII)

_ORIGIN_PORTS = {"http": 80, "https": 443}

# Saves of one user come one after another, so that none goes past the limits. Like every claim, they lock the user
# before the rows.
_LOCK_USER = "SELECT true FROM users WHERE id = $1 AND deleted_at IS NULL FOR NO KEY UPDATE"
# With their keys in one statement: a key is never read with an endpoint that it was not entered for.
_PROVIDERS = f"""
SELECT p.slug, p.name, p.base_url, p.format, p.created_at, p.updated_at, k.provider AS key_name, k.ciphertext,
    k.last_four
FROM custom_providers p
LEFT JOIN provider_keys k ON k.owner_id = p.owner_id AND k.provider = '{CUSTOM}' || p.slug
WHERE p.owner_id = $1 ORDER BY p.id
"""  # noqa: S608 - names of ours
_FIND_PROVIDER = "SELECT base_url FROM custom_providers WHERE owner_id = $1 AND slug = $2"
_COUNT_PROVIDERS = "SELECT count(*) FROM custom_providers WHERE owner_id = $1"
_SAVE_PROVIDER = """
INSERT INTO custom_providers (id, owner_id, slug, name, base_url, format) VALUES ($1, $2, $3, $4, $5, $6)
ON CONFLICT (owner_id, slug) DO UPDATE SET
    name = excluded.name, base_url = excluded.base_url, format = excluded.format, updated_at = now()
"""
_DELETE_PROVIDER = "DELETE FROM custom_providers WHERE owner_id = $1 AND slug = $2 RETURNING true"
_DELETE_MODELS = "DELETE FROM custom_models WHERE owner_id = $1 AND provider = $2"
_DELETE_KEY = "DELETE FROM provider_keys WHERE owner_id = $1 AND provider = $2 RETURNING true"

_MODEL_COLUMNS = "provider, vendor_name, name, abilities, context_tokens, max_output_tokens, created_at, updated_at"
_MODELS = f"SELECT {_MODEL_COLUMNS} FROM custom_models WHERE owner_id = $1 ORDER BY id"  # noqa: S608
_HAS_MODEL = """
SELECT count(*) AS in_all, count(*) FILTER (WHERE provider = $2 AND vendor_name = $3) AS this_one
FROM custom_models WHERE owner_id = $1
"""
_SAVE_MODEL = f"""
INSERT INTO custom_models
    (id, owner_id, provider, vendor_name, name, abilities, context_tokens, max_output_tokens)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
ON CONFLICT (owner_id, provider, vendor_name) DO UPDATE SET
    name = excluded.name, abilities = excluded.abilities, context_tokens = excluded.context_tokens,
    max_output_tokens = excluded.max_output_tokens, updated_at = now()
RETURNING {_MODEL_COLUMNS}
"""  # noqa: S608
_DELETE_MODEL = """
DELETE FROM custom_models WHERE owner_id = $1 AND provider = $2 AND vendor_name = $3 RETURNING true
"""

# What there is already stays, and so does the limit.
_ADD_PROVIDER = f"""
INSERT INTO custom_providers (id, owner_id, slug, name, base_url, format, created_at, updated_at)
SELECT $1, $2, $3, $4, $5, $6, $7, $8
WHERE (SELECT count(*) FROM custom_providers WHERE owner_id = $2) < {MAX_PROVIDERS}
ON CONFLICT (owner_id, slug) DO NOTHING RETURNING true
"""  # noqa: S608
_ADD_MODEL = f"""
INSERT INTO custom_models (id, owner_id, {_MODEL_COLUMNS})
SELECT $1, $2, $3, $4, $5, $6, $7, $8, $9, $10
WHERE (SELECT count(*) FROM custom_models WHERE owner_id = $2) < {MAX_MODELS}
ON CONFLICT (owner_id, provider, vendor_name) DO NOTHING RETURNING true
"""  # noqa: S608

# $1 becomes $2's. What $2 has under the same name stays, and so does what there is no room for: the oldest come first.
_TAKE_OVER_PROVIDERS = f"""
UPDATE custom_providers SET owner_id = $2 WHERE id IN (
    SELECT id FROM custom_providers theirs
    WHERE owner_id = $1
        AND NOT EXISTS (SELECT FROM custom_providers own WHERE own.owner_id = $2 AND own.slug = theirs.slug)
    ORDER BY id LIMIT greatest(0, {MAX_PROVIDERS} - (SELECT count(*) FROM custom_providers WHERE owner_id = $2))
)
"""  # noqa: S608
# Models of a provider that was left behind are not models of the user's own provider of that slug.
_TAKE_OVER_MODELS = f"""
UPDATE custom_models SET owner_id = $2 WHERE id IN (
    SELECT id FROM custom_models theirs
    WHERE owner_id = $1
        AND NOT EXISTS (
            SELECT FROM custom_providers left_behind WHERE left_behind.owner_id = $1 AND slug = theirs.provider
        )
        AND NOT EXISTS (
            SELECT FROM custom_models own
            WHERE own.owner_id = $2 AND own.provider = theirs.provider AND own.vendor_name = theirs.vendor_name
        )
    ORDER BY id LIMIT greatest(0, {MAX_MODELS} - (SELECT count(*) FROM custom_models WHERE owner_id = $2))
)
"""  # noqa: S608


@dataclass(frozen=True, slots=True)
class CustomProviderRecord:
    """A row of `custom_providers` with its key, if it has one. `format` is one of `FORMATS`."""

    slug: str
    name: str
    base_url: str
    format: str
    key: OwnKey | None
    created_at: datetime
    updated_at: datetime

    @property
    def problem(self) -> str | None:
        """A sentence for the user where the key cannot be used."""
        return problem_of(self.key)


@dataclass(frozen=True, slots=True)
class CustomModelRecord:
    """A row of `custom_models`. `abilities` are among `ABILITIES`, in their order."""

    provider: str
    vendor_name: str
    name: str
    abilities: tuple[str, ...]
    context_tokens: int | None
    max_output_tokens: int | None
    created_at: datetime
    updated_at: datetime

    @property
    def model_id(self) -> str:
        """What `modelId` arguments take."""
        return f"{CUSTOM}{self.provider}/{self.vendor_name}"

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> CustomModelRecord:
        """From a row with columns of these names."""
        return cls(
            row["provider"],
            row["vendor_name"],
            row["name"],
            tuple(row["abilities"]),
            row["context_tokens"],
            row["max_output_tokens"],
            row["created_at"],
            row["updated_at"],
        )


@dataclass(frozen=True, slots=True)
class OwnProviders:
    """What a user has named themselves, in the order in which it was made."""

    providers: tuple[CustomProviderRecord, ...] = ()
    models: tuple[CustomModelRecord, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderValues:
    """What a user says of a provider. `key` counts only where `key_given`; None takes it away."""

    slug: str
    name: str
    base_url: str
    format: str
    key: str | None = field(default=None, repr=False)
    key_given: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelValues:
    """What a user says of a model."""

    provider: str
    vendor_name: str
    name: str
    abilities: Collection[str] = ()
    context_tokens: int | None = None
    max_output_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class SavedProvider:
    """A provider as it is now, and whether its key was dropped because its endpoint has moved."""

    record: CustomProviderRecord
    key_dropped: bool


class CustomProviders:
    """The providers and models that users name.

    Args:
        keys: keeps the keys of the providers.
        names: the names of the providers that the server knows; a slug is none of them.
        check_endpoint: the base address in its normal form, if users may name it; raises ValueError with a sentence for
            them. The second argument says whether its name has to lead somewhere now.
        allowed: whether users may add endpoints; those that there are lead nowhere meanwhile.
        rate: how often a user may save one.
    """

    def __init__(
        self,
        database: Database,
        keys: ProviderKeys,
        names: Callable[[], Collection[str]],
        *,
        check_endpoint: Callable[[str, bool], Awaitable[str]],
        allowed: bool,
        rate: UserRate = NO_RATE,
    ) -> None:
        self._database = database
        self._keys = keys
        self._names = names
        self._check_endpoint = check_endpoint
        self._allowed = allowed
        self._rate = rate

    async def find(self, viewer: Viewer) -> OwnProviders:
        """The viewer's, usable or not."""
        async with self._database.acquire() as connection:
            return OwnProviders(await self._providers(connection, viewer.id), await _models(connection, viewer.id))

    async def of(self, connection: Connection, owner_id: UUID) -> OwnProviders:
        """What a user may use: without endpoints, and the models on them, where the operator does not allow those."""
        models = await _models(connection, owner_id)
        if not self._allowed:
            known = self._names()
            return OwnProviders((), tuple(model for model in models if model.provider in known))
        return OwnProviders(await self._providers(connection, owner_id), models)

    async def save_provider(self, viewer: Viewer, values: ProviderValues) -> SavedProvider:
        """Make a provider, or change the one of this slug.

        Raises:
            ForbiddenError: the operator does not allow endpoints of users.
            BadUserInputError: a value cannot be accepted, or there are too many.
            RateLimitedError: the viewer has changed keys or endpoints too often a moment ago.
        """
        if not self._allowed:
            raise ForbiddenError("This server does not let users add endpoints of their own.")
        self._check_slug(values.slug)
        name = checked_line(values.name, field="name", max_bytes=MAX_NAME_BYTES)
        key = checked_provider_key(values.key) if values.key_given and values.key is not None else None
        self._rate.check(viewer.id)
        base_url = await self._checked_url(values.base_url)
        async with self._database.transaction() as connection:
            await _lock(connection, viewer)
            before = await connection.fetchval(_FIND_PROVIDER, viewer.id, values.slug)
            if before is None and await connection.fetchval(_COUNT_PROVIDERS, viewer.id) >= MAX_PROVIDERS:
                raise BadUserInputError(f"A user has at most {MAX_PROVIDERS} providers.", field="slug")
            await connection.execute(_SAVE_PROVIDER, new_id(), viewer.id, values.slug, name, base_url, values.format)
            dropped = False
            moved = before is not None and _origin(before) != _origin(base_url)
            if key is not None:
                await self._keys.store(connection, viewer.id, CUSTOM + values.slug, key)
            elif values.key_given or moved:
                deleted = await connection.fetchval(_DELETE_KEY, viewer.id, CUSTOM + values.slug)
                dropped = deleted is not None and not values.key_given
            providers = await self._providers(connection, viewer.id)
        return SavedProvider(next(one for one in providers if one.slug == values.slug), dropped)

    async def delete_provider(self, viewer: Viewer, slug: str) -> None:
        """Delete a provider with its models and its key.

        Raises:
            NotFoundError: there is none.
        """
        if SLUG.fullmatch(slug) is None:
            raise NotFoundError("provider", field="slug")
        async with self._database.transaction() as connection:
            await _lock(connection, viewer)
            if await connection.fetchval(_DELETE_PROVIDER, viewer.id, slug) is None:
                raise NotFoundError("provider", field="slug")
            await connection.execute(_DELETE_MODELS, viewer.id, slug)
            await connection.execute(_DELETE_KEY, viewer.id, CUSTOM + slug)

    async def save_model(self, viewer: Viewer, values: ModelValues) -> CustomModelRecord:
        """Make a model, or change the one of this provider and name.

        Raises:
            ForbiddenError: the operator does not allow endpoints of users, and this is one's.
            BadUserInputError: a value cannot be accepted, there is no such provider, or there are too many models.
        """
        known = values.provider in self._names()
        if not known and not self._allowed:
            raise ForbiddenError("This server does not let users add endpoints of their own.")
        if not known and SLUG.fullmatch(values.provider) is None:
            raise _no_provider()
        vendor_name = checked_line(values.vendor_name, field="vendorName", max_bytes=MAX_VENDOR_NAME_BYTES)
        name = checked_line(values.name, field="name", max_bytes=MAX_NAME_BYTES)
        for tokens, its_field in (
            (values.context_tokens, "contextTokens"),
            (values.max_output_tokens, "maxOutputTokens"),
        ):
            if tokens is not None and not 1 <= tokens <= MAX_TOKENS:
                raise BadUserInputError("A number of tokens is 1 at least.", field=its_field)
        async with self._database.transaction() as connection:
            await _lock(connection, viewer)
            if not known and await connection.fetchval(_FIND_PROVIDER, viewer.id, values.provider) is None:
                raise _no_provider()
            counts = await connection.fetchrow(_HAS_MODEL, viewer.id, values.provider, vendor_name)
            if not counts["this_one"] and counts["in_all"] >= MAX_MODELS:
                raise BadUserInputError(f"A user has at most {MAX_MODELS} models.", field="vendorName")
            row = await connection.fetchrow(
                _SAVE_MODEL,
                new_id(),
                viewer.id,
                values.provider,
                vendor_name,
                name,
                [ability for ability in ABILITIES if ability in values.abilities],
                values.context_tokens,
                values.max_output_tokens,
            )
        return CustomModelRecord.from_row(row)

    async def delete_model(self, viewer: Viewer, model_id: str) -> None:
        """Delete a model.

        Raises:
            NotFoundError: there is none.
        """
        provider, _, vendor_name = model_id.removeprefix(CUSTOM).partition("/")
        deleted = None
        if model_id.startswith(CUSTOM) and is_storable(model_id):
            async with self._database.acquire() as connection:
                deleted = await connection.fetchval(_DELETE_MODEL, viewer.id, provider, vendor_name)
        if deleted is None:
            raise NotFoundError("model of yours", field="modelId")

    async def take_over(self, connection: Connection, from_id: UUID, to_id: UUID) -> None:
        """Make a user's providers and models another's, as far as there is room; their keys are to follow."""
        await connection.execute(_TAKE_OVER_PROVIDERS, from_id, to_id)
        await connection.execute(_TAKE_OVER_MODELS, from_id, to_id)

    async def acceptable(self, providers: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Of rows out of a file those that could be saved now, with their base addresses in the normal form."""
        if not self._allowed:
            return []
        outcomes = await asyncio.gather(*(self._accepted(row) for row in providers))
        return [row for row in outcomes if row is not None]

    async def add(
        self,
        connection: Connection,
        owner_id: UUID,
        providers: Sequence[Mapping[str, Any]],
        models: Sequence[Mapping[str, Any]],
    ) -> tuple[int, int]:
        """Add rows out of a file to what a user has, which stays as it is, as far as there is room.

        Args:
            providers: those that `acceptable` gave.
            models: added if they are of a provider that the server knows, or of one of those that were added now.

        Returns:
            How many providers and models were added.
        """
        await connection.fetchval(_LOCK_USER, owner_id)
        # In the order of the file, which is that of the lists.
        ids = iter(sorted(new_id() for _ in range(len(providers) + len(models))))
        added: set[str] = set()
        for row in providers:
            values = (row["slug"], row["name"], row["base_url"], row["format"], row["created_at"], row["updated_at"])
            if await connection.fetchval(_ADD_PROVIDER, next(ids), owner_id, *values):
                added.add(row["slug"])
        count = 0
        for row in models:
            if row["provider"] in added or row["provider"] in self._names():
                values = tuple(row[column] for column in _MODEL_COLUMNS.split(", "))
                count += bool(await connection.fetchval(_ADD_MODEL, next(ids), owner_id, *values))
        return len(added), count

    async def _accepted(self, row: Mapping[str, Any]) -> Mapping[str, Any] | None:
        try:
            self._check_slug(row["slug"])
            # Also while its name cannot be looked up: it was somebody's, and is to be again.
            return {**row, "base_url": await self._checked_url(row["base_url"], look_up=False)}
        except BadUserInputError:
            return None

    def _check_slug(self, slug: str) -> None:
        if SLUG.fullmatch(slug) is None:
            raise BadUserInputError(
                "A slug is 1 to 40 lower-case letters, digits and hyphens, and begins with a letter or digit.",
                field="slug",
            )
        if slug in self._names():
            raise BadUserInputError("This server has a provider of this name; choose another slug.", field="slug")

    async def _checked_url(self, base_url: str, *, look_up: bool = True) -> str:
        base_url = checked_line(base_url, field="baseUrl", max_bytes=MAX_URL_BYTES)
        try:
            return await self._check_endpoint(base_url, look_up)
        except ValueError as refused:
            raise BadUserInputError(str(refused), field="baseUrl") from refused

    async def _providers(self, connection: Connection, owner_id: UUID) -> tuple[CustomProviderRecord, ...]:
        return tuple(
            CustomProviderRecord(
                slug=row["slug"],
                name=row["name"],
                base_url=row["base_url"],
                format=row["format"],
                key=None
                if row["key_name"] is None
                else self._keys.opened(owner_id, row["key_name"], row["ciphertext"], row["last_four"]),
                created_at=row["created_at"],
                updated_at=row["updated_at"],
            )
            for row in await connection.fetch(_PROVIDERS, owner_id)
        )


async def _models(connection: Connection, owner_id: UUID) -> tuple[CustomModelRecord, ...]:
    return tuple(CustomModelRecord.from_row(row) for row in await connection.fetch(_MODELS, owner_id))


async def _lock(connection: Connection, viewer: Viewer) -> None:
    if await connection.fetchval(_LOCK_USER, viewer.id) is None:
        raise UnauthenticatedError("The account of this token does not exist any more.")


def _no_provider() -> BadUserInputError:
    return BadUserInputError("There is no provider of this name, of yours or of the server.", field="provider")


def _origin(base_url: str) -> tuple[str, str | None, int | None]:
    """What a key is bound to: scheme, host and port."""
    parts = urlsplit(base_url)
    return parts.scheme, parts.hostname, parts.port or _ORIGIN_PORTS.get(parts.scheme)
