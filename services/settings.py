"""What a user chose for all of their conversations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import asyncpg

from models.database import Database
from models.ids import new_id
from services.errors import UnauthenticatedError
from services.models import Models
from services.viewer import Viewer

_FIND = "SELECT default_model FROM settings WHERE owner_id = $1"
# Only the fields that are given are written, in one statement: two devices that change different ones lose neither.
_CHANGE = """
INSERT INTO settings (id, owner_id, default_model) VALUES ($1, $2, $3)
ON CONFLICT (owner_id) DO UPDATE SET
    default_model = CASE WHEN 'default_model' = ANY($4::text[]) THEN $3 ELSE settings.default_model END,
    updated_at = now()
RETURNING default_model
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingsRecord:
    """A user's choices; None: not chosen."""

    default_model: str | None = None

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> SettingsRecord:
        """From a row of `settings`."""
        return cls(default_model=row["default_model"])


class UserSettings:
    """The viewer's settings."""

    def __init__(self, database: Database, models: Models) -> None:
        self._database = database
        self._models = models

    async def find(self, viewer: Viewer) -> SettingsRecord:
        """As they are now; nothing is chosen at first."""
        async with self._database.acquire() as connection:
            row = await connection.fetchrow(_FIND, viewer.id)
        return SettingsRecord() if row is None else SettingsRecord.from_row(row)

    async def update(self, viewer: Viewer, values: SettingsRecord, given: set[str]) -> SettingsRecord:
        """Set the given fields and no other; None takes a choice back.

        Args:
            given: names of the fields of `values` to set.

        Raises:
            ModelUnavailableError: the default model is not offered.
        """
        wanted = values.default_model
        if "default_model" in given:
            await self._models.check(viewer, wanted, field="defaultModelId")
        try:
            async with self._database.acquire() as connection:
                row = await connection.fetchrow(_CHANGE, new_id(), viewer.id, wanted, sorted(given))
        except asyncpg.ForeignKeyViolationError as error:
            raise UnauthenticatedError("The account of this token does not exist any more.") from error
        return SettingsRecord.from_row(row)
