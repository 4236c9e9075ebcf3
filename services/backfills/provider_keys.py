"""Encrypts users' provider keys anew with the first of the operator's keys, so that older ones can be taken away.

Beside writers: a row is locked before it is read, so no key that is set meanwhile is written over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

from services.encryption import UnreadableKeyError, Vault
from services.paging import FIRST_ID

if TYPE_CHECKING:
    from asyncpg import Connection

_COUNT = "SELECT count(*) FROM provider_keys"
_NEXT = """
SELECT id, owner_id, provider, ciphertext FROM provider_keys WHERE id > $1 ORDER BY id LIMIT $2 FOR NO KEY UPDATE
"""
# Nobody's key has changed: the feed is not told.
_QUIET = "SET LOCAL threadgraph.quiet = 'on'"
_UPDATE = """
UPDATE provider_keys SET ciphertext = made.ciphertext
FROM unnest($1::uuid[], $2::bytea[]) AS made (id, ciphertext) WHERE provider_keys.id = made.id
"""


class ProviderKeysBackfill:
    """One run of it, in batches."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault
        # By their ids: a batch may be tried several times.
        self._unreadable: set[UUID] = set()

    async def count(self, connection: Connection) -> int:
        """How many keys there are."""
        return int(await connection.fetchval(_COUNT))

    async def run_batch(self, connection: Connection, position: str | None, limit: int) -> tuple[str | None, int]:
        """Encrypt the next `limit` keys anew, where the first of the operator's keys did not; the rest stays as it is.

        Args:
            position: the id of the last key that was looked at; None at the start.

        Returns:
            The new position, None where no key is left; and how many keys were looked at.
        """
        await connection.execute(_QUIET)
        rows = await connection.fetch(_NEXT, FIRST_ID if position is None else UUID(position), limit)
        ids: list[UUID] = []
        made: list[bytes] = []
        for row in rows:
            if self._vault.is_current(row["ciphertext"]):
                continue
            bound = row["owner_id"], row["provider"]
            try:
                made.append(self._vault.encrypt(*bound, self._vault.decrypt(*bound, row["ciphertext"])))
            except UnreadableKeyError:
                self._unreadable.add(row["id"])
            else:
                ids.append(row["id"])
        await connection.execute(_UPDATE, ids, made)
        return (rows[-1]["id"].hex if len(rows) == limit else None), len(rows)

    def note(self) -> str | None:
        """What else there is to say of this run."""
        if not self._unreadable:
            return None
        return (
            f"{len(self._unreadable):,} could be read with none of ENCRYPTION_KEYS and stay as they are: their users "
            "are told to enter them again."
        )
