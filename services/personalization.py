"""What models are told of the user, in the user's own words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

if TYPE_CHECKING:
    from asyncpg import Connection

PERSONALIZATION_COLUMNS = "user_name, user_traits, user_context"
_OF = f"SELECT {PERSONALIZATION_COLUMNS} FROM settings WHERE owner_id = $1"  # noqa: S608 - names of ours


@dataclass(frozen=True, slots=True, kw_only=True)
class Personalization:
    """How a user wants to be called and answered, and what models should know; None: not said."""

    name: str | None = None
    traits: str | None = None
    context: str | None = None

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Personalization:
        """From a row selected with `PERSONALIZATION_COLUMNS`."""
        return cls(name=row["user_name"], traits=row["user_traits"], context=row["user_context"])


async def of(connection: Connection, owner_id: UUID) -> Personalization:
    """What a user has said."""
    row = await connection.fetchrow(_OF, owner_id)
    return Personalization() if row is None else Personalization.from_row(row)


def instruction(personalization: Personalization) -> str | None:
    """What a model is told before a conversation; None where the user has said nothing.

    Each text stands between marks of its own, and none can hold its own end: what a user writes into one field cannot
    pass for another, nor for an instruction of the project or the server.
    """
    told = [
        f"{what}:\n<{mark}>\n{text.replace(f'</{mark}', f'< /{mark}')}\n</{mark}>"
        for what, mark, text in (
            ("The user's name", "user-name", personalization.name),
            ("How the user wants to be answered", "user-traits", personalization.traits),
            ("What the user wants you to know", "user-context", personalization.context),
        )
        if text
    ]
    return "\n\n".join(["What the user has said of themselves, in their own words:", *told]) if told else None
