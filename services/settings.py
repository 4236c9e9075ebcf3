"""What a user chose for all of their conversations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import asyncpg

from models.database import Database
from models.ids import new_id
from services.errors import UnauthenticatedError
from services.input import checked_chars
from services.models import Models
from services.personalization import Personalization
from services.viewer import Viewer

MAX_NAME_CHARS = 100
MAX_TRAITS_CHARS = 1_000
MAX_CONTEXT_CHARS = 4_000


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingsRecord:
    """A user's choices by column; None: not chosen."""

    default_model: str | None = None
    title_model: str | None = None
    user_name: str | None = None
    user_traits: str | None = None
    user_context: str | None = None

    @property
    def personalization(self) -> Personalization:
        """What models are told of the user."""
        return Personalization(name=self.user_name, traits=self.user_traits, context=self.user_context)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> SettingsRecord:
        """From a row of `settings`."""
        return cls(**{name: row[name] for name in _VALUES})


_VALUES = tuple(field.name for field in fields(SettingsRecord))
_COLUMNS = ", ".join(_VALUES)
_FIND = f"SELECT {_COLUMNS} FROM settings WHERE owner_id = $1"  # noqa: S608 - names of ours
# Only the fields that are given are written, in one statement: two devices that change different ones lose neither.
_CHANGE = f"""
INSERT INTO settings (id, owner_id, {_COLUMNS})
VALUES ($1, $2, {", ".join(f"${place}" for place, _ in enumerate(_VALUES, 4))})
ON CONFLICT (owner_id) DO UPDATE SET
    {
    ", ".join(
        f"{name} = CASE WHEN '{name}' = ANY($3::text[]) THEN excluded.{name} ELSE settings.{name} END"
        for name in _VALUES
    )
},
    updated_at = now()
RETURNING {_COLUMNS}
"""  # noqa: S608
_MODELS = {"default_model": "defaultModelId", "title_model": "titleModelId"}
_TEXTS = {
    "user_name": ("personalization.name", MAX_NAME_CHARS),
    "user_traits": ("personalization.traits", MAX_TRAITS_CHARS),
    "user_context": ("personalization.context", MAX_CONTEXT_CHARS),
}


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
            ModelUnavailableError: a model is not offered.
            BadUserInputError: a text cannot be stored, or is too long.
        """
        for name in given & _MODELS.keys():
            await self._models.check(viewer, getattr(values, name), field=_MODELS[name])
        checked = {name: self._checked(name, getattr(values, name)) if name in given else None for name in _VALUES}
        try:
            async with self._database.acquire() as connection:
                row = await connection.fetchrow(_CHANGE, new_id(), viewer.id, sorted(given), *checked.values())
        except asyncpg.ForeignKeyViolationError as error:
            raise UnauthenticatedError("The account of this token does not exist any more.") from error
        return SettingsRecord.from_row(row)

    def _checked(self, name: str, value: str | None) -> str | None:
        if value is None or name in _MODELS:
            return value
        field, max_chars = _TEXTS[name]
        if name == "user_name":
            value = " ".join(value.split())
        return checked_chars(value, field=field, max_chars=max_chars)
