"""Who waits for changes of which user, and waking them: at once over the channel, and by a slow look that misses none.

A wake-up carries nothing: whoever is woken reads the database, which is what is true. So one that is lost, late,
doubled or for nothing does no harm; the look every few seconds finds what no wake-up told of.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

from models.database import Database, DatabaseUnavailableError
from streams.channel import Channel

log = logging.getLogger(__name__)

_CHANNEL = "changes"
# The newest change of each user that is watched: one index probe each.
_NEWEST = """
SELECT watched.id, (SELECT max(id) FROM changes WHERE owner_id = watched.id) AS newest
FROM unnest($1::uuid[]) AS watched (id)
"""


class Watch:
    """One subscription's wait for the changes of one user. Made by `Wakeups.watch`."""

    def __init__(self) -> None:
        self._woken = asyncio.Event()

    def wake(self) -> None:
        """There may be something new."""
        self._woken.set()

    async def wait(self, at_most_seconds: float | None = None) -> None:
        """Wait until woken, or for so long; a wake-up since the last wait counts. Look before the first wait."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(at_most_seconds):
                await self._woken.wait()
        self._woken.clear()


class Wakeups:
    """The watches of one process, from `start` to `stop`.

    Args:
        look_seconds: how long a change can stay unnoticed whose wake-up was lost.
    """

    def __init__(self, database: Database, channel: Channel, *, look_seconds: float) -> None:
        self._database = database
        self._channel = channel
        self._look_seconds = look_seconds
        self._watches: dict[UUID, set[Watch]] = {}
        self._newest: dict[UUID, int | None] = {}
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to listen and to look."""
        await self._channel.listen(_CHANNEL, self._on_ring)
        self._task = asyncio.create_task(self._look_again_and_again(), name="wake-ups")

    async def stop(self) -> None:
        """Stop looking."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def ring(self, user_id: UUID) -> None:
        """Wake every subscription of this user, in every process. Call it after the commit. Never fails."""
        try:
            await self._channel.publish(_CHANNEL, {"userId": user_id.hex})
        except Exception:
            log.warning("the feeds wait for their slow look", exc_info=True)

    @contextmanager
    def watch(self, user_id: UUID) -> Iterator[Watch]:
        """A watch for as long as the block lasts."""
        watch = Watch()
        self._watches.setdefault(user_id, set()).add(watch)
        try:
            yield watch
        finally:
            watches = self._watches[user_id]
            watches.discard(watch)
            if not watches:
                del self._watches[user_id]
                self._newest.pop(user_id, None)

    async def _on_ring(self, message: dict[str, Any]) -> None:
        self._wake(UUID(hex=message["userId"]))

    def _wake(self, user_id: UUID) -> None:
        for watch in self._watches.get(user_id, ()):
            watch.wake()

    async def _look_again_and_again(self) -> None:
        while True:
            await asyncio.sleep(self._look_seconds)
            try:
                await self._look()
            except DatabaseUnavailableError as error:
                log.warning("the feeds wait for the database: %s", error)
            except Exception:
                log.exception("looking for changes failed; trying again")

    async def _look(self) -> None:
        watched = list(self._watches)
        if not watched:
            return
        async with self._database.acquire() as connection:
            rows = await connection.fetch(_NEWEST, watched)
        for user_id, newest in rows:
            if user_id in self._watches and self._newest.get(user_id, -1) != newest:
                self._newest[user_id] = newest
                self._wake(user_id)
