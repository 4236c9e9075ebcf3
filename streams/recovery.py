"""Takes over the answers of dead servers, found by their lease: ended once with what was saved, or begun anew."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection
from datetime import datetime
from typing import TypeAlias
from uuid import UUID, uuid4

from models.database import Database, DatabaseUnavailableError
from models.parts import Part, parts_from_json, parts_length
from models.prices import ModelPrices
from models.records import MessageFailure, MessageRecord, MessageStatus
from streams.buffer import join_parts
from streams.ending import AnswerEnd, StreamHold, end_answer
from streams.tokens import estimate

log = logging.getLogger(__name__)

SERVER_LOST = MessageFailure("SERVER_LOST", "The server that wrote this answer stopped. Retry to get a whole answer.")
Sealed: TypeAlias = Callable[[UUID, int], Awaitable[list[Part]]]
Restart: TypeAlias = Callable[[StreamHold], Awaitable[bool]]
_BATCH = 100
_LOOKED_AT = 10_000
_SEALING_TRIES = 3
# In all. A question that takes every server down that answers it must not take down all of them.
MAX_ATTEMPTS = 3
# Of an older question, nobody waits for the answer any more.
_RESTARTED_SECONDS = 600

# Raising the epoch fences the old producer: should it wake, its end finds no stream of its epoch.
_TAKE_OVER = """
UPDATE streams SET epoch = streams.epoch + 1, holder = $5, lease_expires_at = now() + make_interval(secs => $2)
FROM messages
WHERE streams.message_id IN (
    SELECT message_id FROM streams
    WHERE (lease_expires_at < now() OR $3) AND message_id <> ALL($1::uuid[])
        AND ($6::uuid[] IS NULL OR message_id = ANY($6::uuid[]))
    ORDER BY lease_expires_at LIMIT $4 FOR UPDATE SKIP LOCKED
) AND messages.id = streams.message_id
RETURNING streams.message_id, streams.owner_id, streams.epoch, messages.thread_id, messages.model, messages.attempt,
    messages.attempt < $7 AND messages.created_at > now() - make_interval(secs => $8) AS can_restart
"""
_EXPIRED = """
SELECT message_id, lease_expires_at FROM streams WHERE lease_expires_at < now() ORDER BY lease_expires_at LIMIT $1
"""
_CHECKPOINTS = "SELECT parts FROM stream_checkpoints WHERE stream_id = $1 ORDER BY from_offset"


class AnswerWaitsError(Exception):
    """The answer of a lost server is left live, for another server or a later try; the text says why."""


class LogUnavailableError(AnswerWaitsError):
    """The log of an answer is out of reach for now."""


class Reaper:
    """Looks for expired leases from `start` to `stop`.

    Args:
        living: the messages that this process writes; they are not reaped by itself, however late their leases are.
        every_seconds: pause between two looks.
        lease_seconds: how long a stream that was taken over is this process's to finish.
        prices_of: what a model costs now. An answer whose server died is billed by the prices of the server that ends
            it: they are the operator's at most a lease and a start later, and the stream need not carry them.
        used: told the user after each end that is stored; must not fail.
        sealed: what the shared token log has of an attempt at an answer that was taken over, after which its writer can
            append no more; raises LogUnavailableError. None where streams are not shared.
        log_away: whether that log is out of reach of this process now.
        restart: begins an answer anew of which nothing had come; whether it did. Raises AnswerWaitsError where another
            server can.
    """

    def __init__(
        self,
        database: Database,
        *,
        living: Callable[[], list[UUID]],
        every_seconds: float,
        lease_seconds: float,
        prices_of: Callable[[str], ModelPrices | None],
        used: Callable[[UUID], Awaitable[None]],
        sealed: Sealed | None = None,
        log_away: Callable[[], bool] = lambda: False,
        restart: Restart | None = None,
    ) -> None:
        self._database = database
        self._living = living
        self._taker = uuid4()
        self._every_seconds = every_seconds
        self._lease_seconds = lease_seconds
        self._prices_of = prices_of
        self._used = used
        self._sealed = sealed
        self._log_away = log_away
        self._restart = restart
        self._task: asyncio.Task[None] | None = None
        self._expired: dict[UUID, tuple[datetime, float]] = {}
        # For metrics: streams that were taken over, answers begun anew, ended, and those that could not be.
        self.taken_over = 0
        self.restarted = 0
        self.ended = 0
        self.failed = 0

    def start(self) -> None:
        """Begin to look."""
        self._task = asyncio.create_task(self._run(), name="reaper")

    async def stop(self) -> None:
        """Stop looking; what was taken over and not finished is found again by its lease."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def reap(self, *, all_others: bool = False, only: Collection[UUID] | None = None) -> list[MessageRecord]:
        """End every answer whose lease has run out, as INTERRUPTED with what was saved of it; begin anew what had none.

        Args:
            all_others: end those of every other process too, expired or not: right where no other can be alive.
            only: of these messages alone.

        Returns:
            The messages that were ended.
        """
        ended: list[MessageRecord] = []
        failed: list[UUID] = []
        while True:
            async with self._database.acquire() as connection:
                rows = await connection.fetch(
                    _TAKE_OVER,
                    *([*self._living(), *failed], self._lease_seconds, all_others, _BATCH, self._taker, only),
                    *(MAX_ATTEMPTS, _RESTARTED_SECONDS),
                )
            self.taken_over += len(rows)
            for row in rows:
                hold = StreamHold(
                    *(row["message_id"], row["thread_id"], row["owner_id"], row["epoch"], row["model"]),
                    prices=self._prices_of(row["model"]),
                    attempt=row["attempt"],
                )
                try:
                    record = await self._finish(hold, can_restart=row["can_restart"])
                except DatabaseUnavailableError:
                    raise
                except Exception as error:
                    # One answer that cannot be ended must not keep all others live; its lease brings it back.
                    place = {"message_id": str(hold.message_id)}
                    if isinstance(error, AnswerWaitsError):
                        log.warning("a lost server's answer waits: %s", error, extra=place)
                    else:
                        log.exception("an answer could not be ended", extra=place)
                    self.failed += 1
                    failed.append(hold.message_id)
                    continue
                if record is not None:
                    ended.append(record)
            if len(rows) < _BATCH:
                return ended

    async def _finish(self, hold: StreamHold, *, can_restart: bool) -> MessageRecord | None:
        async with self._database.acquire() as connection:
            rows = await connection.fetch(_CHECKPOINTS, hold.message_id)
        parts = join_parts([parts_from_json(row["parts"]) for row in rows])
        if self._sealed is not None:
            # Sealed first and read then: what a reader was shown is in it. Checkpoints are for a log that was lost.
            try:
                parts = max(await self._sealed(hold.message_id, hold.attempt), parts, key=parts_length)
            except Exception as error:
                # Each try raises the epoch. An answer ends though the log stays away; readers of more are told.
                # Where it is away from this process altogether, others that reach it have had their time.
                if hold.epoch <= _SEALING_TRIES and not self._log_away():
                    raise
                log.warning("an answer ends without its log: %s", type(error).__name__)
        if not parts and can_restart and self._restart is not None and await self._restart(hold):
            self.restarted += 1
            log.warning("began an answer anew whose server was lost", extra={"message_id": str(hold.message_id)})
            return None
        end = AnswerEnd(MessageStatus.INTERRUPTED, parts, SERVER_LOST, estimate(0, parts))
        record = await end_answer(self._database, hold, end)
        await self._used(hold.owner_id)
        if record is not None:
            self.ended += 1
            log.warning("ended an answer whose server was lost", extra={"message_id": str(hold.message_id)})
        return record

    async def _dead(self) -> list[UUID]:
        """Those whose lease ran out and was not renewed since, for longer than living writers let pass.

        One look is not enough: after the database was out of reach every lease has run out, and who looks first must
        not end what the others write. A living writer renews three times a lease.
        """
        now = asyncio.get_running_loop().time()
        async with self._database.acquire() as connection:
            rows = await connection.fetch(_EXPIRED, _LOOKED_AT)
        seen: dict[UUID, tuple[datetime, float]] = {}
        for row in rows:
            before = self._expired.get(row["message_id"])
            is_same = before is not None and before[0] == row["lease_expires_at"]
            seen[row["message_id"]] = before if before is not None and is_same else (row["lease_expires_at"], now)
        self._expired = seen
        # Who does not reach the log leaves the dead to those who do, for as long as there may be any.
        patience = self._lease_seconds * (2 if self._log_away() else 0.5)
        return [key for key, (_, since) in seen.items() if now - since >= patience]

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._every_seconds)
            try:
                if dead := await self._dead():
                    await self.reap(only=dead)
            except DatabaseUnavailableError as error:
                log.warning("the reaper waits for the database: %s", error)
            except Exception:
                log.exception("reaping failed; trying again")
