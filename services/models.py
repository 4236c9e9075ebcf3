"""The models a viewer can use: what the registry has, reached by the viewer's own keys, endpoints and models too."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, TypeAlias
from uuid import UUID

from models.database import Database
from providers.base import Provider
from providers.registry import (
    CUSTOM,
    NOTHING_OWN,
    MissingKeyError,
    ModelRecord,
    ModelRegistry,
    OwnAccess,
    UnknownModelError,
)
from services.errors import ModelUnavailableError, ProviderKeyMissingError
from services.viewer import Viewer

if TYPE_CHECKING:
    from asyncpg import Connection

ReadOwn: TypeAlias = "Callable[[Connection, UUID], Awaitable[OwnAccess]]"


class DefaultOf(StrEnum):
    """What a model that nobody named is the default of, as its user is told."""

    PROJECT = "the project"
    SETTINGS = "your settings"


class Models:
    """The models as each viewer has them.

    Args:
        registry: all models, and how they are chosen.
        read_own: reads what a user brought along, on a connection that is at hand.
    """

    def __init__(self, database: Database, registry: ModelRegistry, read_own: ReadOwn) -> None:
        self._database = database
        self._read_own = read_own
        self.registry = registry

    async def available(self, viewer: Viewer) -> list[ModelRecord]:
        """Every model that the viewer can use now: the operator's, and the viewer's own at their head."""
        return self.registry.available(await self._own(viewer))

    async def describe_many(self, viewer: Viewer, model_ids: Sequence[str]) -> list[ModelRecord | None]:
        """Models in the order of the ids, usable or not; None where there is none, or not any more."""
        own = await self._own(viewer) if any(map(_may_be_own, model_ids)) else NOTHING_OWN
        return [self.registry.describe(model_id, own) for model_id in model_ids]

    async def check(self, viewer: Viewer, model_id: str | None, *, field: str) -> None:
        """Whether this can be chosen for turns to come; None can.

        Raises:
            ModelUnavailableError: there is no such model; that no key leads to it yet is no reason.
        """
        if model_id is not None and (await self.describe_many(viewer, [model_id]))[0] is None:
            raise ModelUnavailableError(field=field)

    def of_operator(self, model_id: str | None) -> tuple[ModelRecord, Provider] | None:
        """As `resolve`, for a viewer who brought along nothing; None where it fails."""
        try:
            return self.registry.resolve(model_id, NOTHING_OWN)
        except (UnknownModelError, MissingKeyError):
            return None

    async def resolve(
        self,
        connection: Connection,
        viewer: Viewer,
        model_id: str | None,
        *,
        default_of: DefaultOf | None = None,
        has_own: bool = True,
    ) -> tuple[ModelRecord, Provider]:
        """The model to ask, and through what; None asks the server's default.

        Args:
            default_of: whose default it is, where the viewer did not name it: a failure says so, and blames no input.
            has_own: False where the viewer is known to have brought along nothing, so that it need not be read.

        Raises:
            ModelUnavailableError: it is not offered, or no model is.
            ProviderKeyMissingError: it is, but no key leads to it.
        """
        return await self.resolve_for(connection, viewer.id, model_id, default_of=default_of, has_own=has_own)

    async def resolve_for(
        self,
        connection: Connection,
        owner_id: UUID,
        model_id: str | None,
        *,
        default_of: DefaultOf | None = None,
        has_own: bool = True,
    ) -> tuple[ModelRecord, Provider]:
        """As `resolve`, for a user who is not asking now."""
        own = await self._read_own(connection, owner_id) if has_own else NOTHING_OWN
        try:
            return self.registry.resolve(model_id, own)
        except UnknownModelError as error:
            if default_of is None:
                raise ModelUnavailableError(field="modelId") from error
            raise ModelUnavailableError(_gone(default_of), field=None) from error
        except MissingKeyError as error:
            field = "modelId" if default_of is None else None
            raise ProviderKeyMissingError(_missing(error, default_of), field=field) from error

    async def _own(self, viewer: Viewer) -> OwnAccess:
        async with self._database.acquire() as connection:
            return await self._read_own(connection, viewer.id)


def _may_be_own(model_id: str) -> bool:
    return model_id.startswith(CUSTOM)


def _gone(default_of: DefaultOf) -> str:
    return (
        f"The default model of {default_of} is not available any more; choose another there, or name a model with "
        "`modelId`. `models` lists those that are available."
    )


def _missing(error: MissingKeyError, default_of: DefaultOf | None) -> str:
    if error.unreadable is not None:
        lacks, mend = f"Your key for {error.unreadable} cannot be read any more", "enter it again"
        if default_of is not None:
            lacks += f", and the default model of {default_of} needs it"
    else:
        model = "This model" if default_of is None else f"The default model of {default_of}"
        lacks, mend = f"{model} needs a key of yours for {' or '.join(error.providers)}", "add one"
    if default_of is None:
        return f"{lacks}; {mend}, or choose another model."
    return f"{lacks}; {mend}, choose another model there, or name one with `modelId`."
