"""Leases and checkpoints: what keeps a living answer alive and lets others save a dead one.

One task of a process renews the leases of its streams and, where the channel does not outlive the process, another
saves what each answer grew by: a statement for a hundred streams, none a token. Many streams are kept in turns, spread
over the time that there is: what a thousand answers grew by takes PostgreSQL 50 ms to write, and whatever else it is
asked meanwhile waits for as long.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from itertools import islice
from typing import Any
from uuid import UUID

from models.database import Database, DatabaseUnavailableError
from models.parts import parts_to_json
from streams.buffer import StreamBuffer, parts_of

log = logging.getLogger(__name__)

_AT_ONCE = 100
_MOST_TURNS = 20

# A row that is being deleted by the end of its answer is skipped, not waited for: a tick must not wait for one stream.
_RENEW = """
WITH mine AS (
    SELECT message_id FROM streams WHERE message_id = ANY($1::uuid[]) AND holder = $2 FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE streams SET lease_expires_at = now() + make_interval(secs => $3) FROM mine
WHERE streams.message_id = mine.message_id
"""
_HELD = "SELECT message_id FROM streams WHERE message_id = ANY($1::uuid[]) AND holder = $2"
_CHECKPOINT = """
WITH growth AS (
    SELECT * FROM unnest($1::uuid[], $2::bigint[], $3::jsonb[]) AS growth (message_id, from_offset, parts)
), mine AS (
    SELECT message_id FROM streams WHERE message_id = ANY($1::uuid[]) AND holder = $4 FOR KEY SHARE SKIP LOCKED
)
INSERT INTO stream_checkpoints (stream_id, from_offset, parts)
SELECT message_id, from_offset, parts FROM growth JOIN mine USING (message_id)
-- The same stretch again, perhaps longer: a tick whose commit was not heard of.
ON CONFLICT (stream_id, from_offset) DO UPDATE SET parts = excluded.parts
RETURNING stream_id
"""


class LeaseKeeper:
    """Renews leases and writes checkpoints for the streams of one process, from `start` to `stop`.

    Args:
        holder: this process, in `streams.holder`.
        lease_seconds: how long a lease lasts from each renewal; a third of it passes between renewals.
        checkpoint_seconds: how often growth is saved.
        lost: called for a stream that is held by somebody else now, or deleted.
    """

    def __init__(
        self,
        database: Database,
        *,
        holder: UUID,
        lease_seconds: float,
        checkpoint_seconds: float,
        lost: Callable[[UUID], None],
    ) -> None:
        self._database = database
        self.holder = holder
        self.lease_seconds = lease_seconds
        self._checkpoint_seconds = checkpoint_seconds
        self._lost = lost
        # Whoever was kept longest ago comes first.
        self._saved: OrderedDict[UUID, int] = OrderedDict()
        self._buffers: OrderedDict[UUID, StreamBuffer] = OrderedDict()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to keep."""
        self._tasks = [
            asyncio.create_task(self._keep(self._buffers, self.lease_seconds / 3, self._renew), name="lease renewal"),
            asyncio.create_task(
                self._keep(self._saved, self._checkpoint_seconds, self._checkpoint), name="stream checkpoints"
            ),
        ]

    async def stop(self) -> None:
        """Stop keeping; leases that are left run out."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def keep(self, buffer: StreamBuffer) -> None:
        """Keep this stream's lease and growth from now on."""
        self._buffers[buffer.message_id] = buffer
        self._saved[buffer.message_id] = 0

    def release(self, message_id: UUID) -> None:
        """This stream has ended, or is not ours any more."""
        self._buffers.pop(message_id, None)
        self._saved.pop(message_id, None)

    async def _keep(
        self, streams: OrderedDict[UUID, Any], seconds: float, keep: Callable[[list[UUID]], Awaitable[None]]
    ) -> None:
        """Keep every stream once in so many seconds, some at a time."""
        while True:
            turns = min(_MOST_TURNS, max(1, math.ceil(len(streams) / _AT_ONCE)))
            await asyncio.sleep(seconds / turns)
            try:
                await self._keep_some(streams, turns, keep)
            except DatabaseUnavailableError as error:
                log.warning("leases and checkpoints wait for the database: %s", error)
            except Exception:
                log.exception("keeping streams failed; trying again")

    async def _keep_some(
        self, streams: OrderedDict[UUID, Any], turns: int, keep: Callable[[list[UUID]], Awaitable[None]]
    ) -> None:
        ids = list(islice(streams, math.ceil(len(streams) / turns)))
        for message_id in ids:
            streams.move_to_end(message_id)
        if ids:
            await keep(ids)

    async def _renew(self, ids: list[UUID]) -> None:
        async with self._database.acquire() as connection:
            await connection.execute(_RENEW, ids, self.holder, self.lease_seconds)
            held = {row["message_id"] for row in await connection.fetch(_HELD, ids, self.holder)}
        for message_id in ids:
            if message_id not in held and message_id in self._buffers:
                self._lost(message_id)

    async def _checkpoint(self, ids: list[UUID]) -> None:
        grown: list[tuple[UUID, int, int, str]] = []
        for message_id in ids:
            buffer, saved = self._buffers[message_id], self._saved[message_id]
            if buffer.length > saved:
                try:
                    parts_json = parts_to_json(parts_of(buffer.since(saved)))
                except TypeError:
                    # One answer that cannot be written must not keep all others from being saved.
                    log.exception("an answer cannot be saved", extra={"message_id": str(message_id)})
                    continue
                grown.append((message_id, saved, buffer.length, parts_json))
        if not grown:
            return
        grown_ids, offsets, _, parts = zip(*grown, strict=True)
        async with self._database.acquire() as connection:
            rows = await connection.fetch(_CHECKPOINT, grown_ids, offsets, parts, self.holder)
        written = {row["stream_id"] for row in rows}
        for message_id, _, length, _ in grown:
            # Rows that were locked were left out; they are saved by the next tick, from where they are.
            if message_id in written and message_id in self._saved:
                self._saved[message_id] = length
