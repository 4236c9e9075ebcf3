"""What an anonymous session owns, made the signed-in user's: once, in one transaction, all or nothing.

The anonymous user is gone afterwards, and so is its token. Whatever else writes for one of the two users meanwhile
holds its locks in another order than this does (a send: user, thread; a rename: thread, and at its commit the user). So
the claim waits for no lock as long as PostgreSQL waits before it looks for deadlocks; it lets all go and tries again.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

import asyncpg

from models.database import Database, DatabaseConflictError
from services.errors import (
    BadUserInputError,
    ForbiddenError,
    NotFoundError,
    UnauthenticatedError,
    UnavailableError,
)
from services.identity import Identities
from services.viewer import Sessions, Viewer

if TYPE_CHECKING:
    from asyncpg import Connection

    TakeOver = Callable[[Connection, UUID, UUID], Awaitable[None]]

_DEADLINE_SECONDS = 60.0
# One statement may move the messages of years.
_STATEMENT_SECONDS = 50.0
_PAUSE_SECONDS = 0.2

# How the rows of every table with an owner come over: $1 is the anonymous user, $2 the one who claims. A test compares
# this with the tables there are.
_TAKE_OVER = "UPDATE {table} SET owner_id = $2 WHERE owner_id = $1"
MOVED = ("projects", "threads", "messages", "shares", "attachments", "usage_events", "turns")
# Before the move: what the user has already under the same key stays, the anonymous one's goes.
_BEFORE = {
    "turns": """
        DELETE FROM turns anonymous USING turns own
        WHERE anonymous.owner_id = $1 AND own.owner_id = $2 AND own.idempotency_key = anonymous.idempotency_key
    """,
}
MERGED = {
    "usage_quarters": """
        INSERT INTO usage_quarters AS own (owner_id, began_at, model, requests, prompt_tokens, completion_tokens,
            reasoning_tokens, cached_tokens, priced_requests, cost_micros)
        SELECT $2, began_at, model, requests, prompt_tokens, completion_tokens, reasoning_tokens, cached_tokens,
            priced_requests, cost_micros
        FROM usage_quarters WHERE owner_id = $1 ORDER BY began_at, model
        ON CONFLICT (owner_id, began_at, model) DO UPDATE SET
            requests = own.requests + excluded.requests,
            prompt_tokens = own.prompt_tokens + excluded.prompt_tokens,
            completion_tokens = own.completion_tokens + excluded.completion_tokens,
            reasoning_tokens = own.reasoning_tokens + excluded.reasoning_tokens,
            cached_tokens = own.cached_tokens + excluded.cached_tokens,
            priced_requests = own.priced_requests + excluded.priced_requests,
            cost_micros = own.cost_micros + excluded.cost_micros
    """,
    # Field by field: what was chosen in the session alone is not lost.
    "settings": """
        WITH filled AS (
            UPDATE settings own SET default_model = coalesce(own.default_model, theirs.default_model),
                title_model = coalesce(own.title_model, theirs.title_model),
                user_name = coalesce(own.user_name, theirs.user_name),
                user_traits = coalesce(own.user_traits, theirs.user_traits),
                user_context = coalesce(own.user_context, theirs.user_context)
            FROM settings theirs WHERE own.owner_id = $2 AND theirs.owner_id = $1
        )
        UPDATE settings SET owner_id = $2
        WHERE owner_id = $1 AND NOT EXISTS (SELECT FROM settings own WHERE own.owner_id = $2)
    """,
}
# These are encrypted for their owner, or go by rules of their own: their services know how.
BY_SERVICES = ("custom_providers", "custom_models", "provider_keys")
# These go with the anonymous user: no answer of theirs is being written any more, and their feed was theirs.
LEFT = ("streams", "changes")
# These come along with the rows that they are of, by triggers.
FOLLOWING = ("search_documents",)

_LIVE_THREADS = """
SELECT messages.thread_id FROM streams JOIN messages ON messages.id = streams.message_id WHERE streams.owner_id = $1
"""
_LOCK_USERS = """
SELECT id, anonymous, deleted_at IS NULL AS living FROM users WHERE id = ANY($1::uuid[]) ORDER BY id FOR UPDATE
"""
_IS_LIVE = "SELECT EXISTS (SELECT FROM streams WHERE owner_id = $1)"


@dataclass(frozen=True, slots=True)
class Claimed:
    """What came over."""

    threads: int


class _BusyError(Exception):
    """Somebody else is at work on one of the users; try again."""


class Claims:
    """Claims of anonymous sessions' data.

    Args:
        end_live: ends the answer that is being written in a thread, waiting for its end (see `Generations`).
        take_overs: make what is not moved by a statement of this file another user's: called in the transaction with
            the anonymous user and the one who claims, in this order.
    """

    def __init__(
        self,
        database: Database,
        sessions: Sessions,
        *,
        end_live: Callable[[UUID], Awaitable[None]],
        identities: Identities,
        take_overs: Sequence[TakeOver],
    ) -> None:
        self._database = database
        self._sessions = sessions
        self._end_live = end_live
        self._identities = identities
        self._take_overs = take_overs

    async def claim(self, viewer: Viewer, token: str) -> Claimed:
        """Make everything of an anonymous session the viewer's.

        Raises:
            ForbiddenError: the viewer is an anonymous session.
            BadUserInputError: the token is none of an anonymous session, or has expired.
            NotFoundError: the session was claimed before, or its account deleted.
            UnavailableError: others are at work on it without end.
        """
        if viewer.anonymous:
            raise ForbiddenError("Sign in first: an anonymous session cannot claim another one's data.")
        try:
            anonymous_id = self._sessions.read(token).id
        except UnauthenticatedError as error:
            raise BadUserInputError(
                "This is no token of an anonymous session, or it has expired.", field="token"
            ) from error
        try:
            with self._identities.holding(anonymous_id):
                async with asyncio.timeout(_DEADLINE_SECONDS):
                    claimed = await self._claim_when_idle(viewer.id, anonymous_id)
        except TimeoutError:
            raise UnavailableError("The anonymous session is busy; try again.", retry_after=5) from None
        self._identities.forget(anonymous_id)
        return claimed

    async def _claim_when_idle(self, user_id: UUID, anonymous_id: UUID) -> Claimed:
        while True:
            async with self._database.acquire() as connection:
                live = await connection.fetch(_LIVE_THREADS, anonymous_id)
            for row in live:
                await self._end_live(row["thread_id"])
            try:
                async with self._database.transaction() as connection:
                    return await self._move(connection, user_id, anonymous_id)
            except (_BusyError, asyncpg.LockNotAvailableError, DatabaseConflictError):
                await asyncio.sleep(_PAUSE_SECONDS * random.uniform(0.5, 1))  # noqa: S311

    async def _move(self, connection: Connection, user_id: UUID, anonymous_id: UUID) -> Claimed:
        # Below the 1 s after which PostgreSQL looks for a deadlock and ends somebody's transaction, perhaps not ours.
        await connection.execute("SET LOCAL lock_timeout = '500ms'; SET LOCAL threadgraph.quiet = 'on'")
        users = {row["id"]: row for row in await connection.fetch(_LOCK_USERS, [user_id, anonymous_id])}
        if user_id not in users or not users[user_id]["living"]:
            raise UnauthenticatedError("The account of this token does not exist any more.")
        anonymous = users.get(anonymous_id)
        if anonymous is None or not anonymous["living"] or not anonymous["anonymous"]:
            raise NotFoundError("anonymous session: its data was claimed or deleted before", field="token")
        # Nothing new can begin from here on: a send would wait for the lock of its user.
        if await connection.fetchval(_IS_LIVE, anonymous_id):
            raise _BusyError
        counts = {}
        for table in MOVED:
            if table in _BEFORE:
                await connection.execute(_BEFORE[table], anonymous_id, user_id, timeout=_STATEMENT_SECONDS)
            done = await connection.execute(
                _TAKE_OVER.format(table=table), anonymous_id, user_id, timeout=_STATEMENT_SECONDS
            )
            counts[table] = int(done.rpartition(" ")[2])
        for merge in MERGED.values():
            await connection.execute(merge, anonymous_id, user_id)
        for take_over in self._take_overs:
            await take_over(connection, anonymous_id, user_id)
        await connection.execute("DELETE FROM users WHERE id = $1", anonymous_id, timeout=_STATEMENT_SECONDS)
        # The triggers that would tell of every row run now, while it is quiet, and not at the commit. One change tells
        # of all: what the viewer has is to be read anew.
        await connection.execute("SET CONSTRAINTS ALL IMMEDIATE", timeout=_STATEMENT_SECONDS)
        await connection.execute("SET LOCAL threadgraph.quiet = 'off'")
        await connection.execute("SELECT record_change($1, 'RESET', NULL)", user_id)
        return Claimed(threads=counts["threads"])
