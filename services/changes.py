"""The viewer's feed: everything of theirs that changes, in order, from any position on.

A change names what changed; what it is like is read when the change is delivered, so an object that changed thrice
while a client was away is sent once, as it is now, and one that is gone by now is left out: its deletion follows. What
a client holds after the last change is what there is.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from operator import itemgetter
from typing import Any, TypeAlias, TypeVar
from uuid import UUID

from models.database import Database
from models.records import MessageRecord, ProjectRecord, ShareRecord, ThreadRecord
from services.errors import CursorAheadError, CursorMismatchError, UnauthenticatedError
from services.messages import Messages
from services.paging import FeedPosition, position_of
from services.projects import Projects
from services.settings import SettingsRecord, UserSettings
from services.sharing import Sharing
from services.threads import Threads
from services.viewer import Viewer
from services.wakeups import Wakeups

Record = TypeVar("Record")
_READ_AT_ONCE = 200
_GONE = "The account of this token does not exist any more."

# No row where the account is gone; one of nulls but for `purged_to` where nothing is new.
_AFTER = """
SELECT u.changes_purged_to AS purged_to, c.id, c.kind, c.object_id
FROM users u LEFT JOIN LATERAL (
    SELECT id, kind, object_id FROM changes WHERE owner_id = u.id AND id > $2 ORDER BY id LIMIT $3
) c ON true
WHERE u.id = $1 AND u.deleted_at IS NULL ORDER BY c.id
"""
# What is purged goes by time, and a long transaction's changes are older than its place in the feed: the last place may
# be purged before one that stands in front of it.
_NEWEST = """
SELECT greatest((SELECT max(id) FROM changes WHERE owner_id = u.id), u.changes_purged_to)
FROM users u WHERE u.id = $1 AND u.deleted_at IS NULL
"""


class ChangeKind(StrEnum):
    """The values of `changes.kind`."""

    THREAD = "THREAD"
    THREAD_DELETED = "THREAD_DELETED"
    MESSAGE_ADDED = "MESSAGE_ADDED"
    MESSAGE_ENDED = "MESSAGE_ENDED"
    MESSAGE_SELECTED = "MESSAGE_SELECTED"
    PROJECT = "PROJECT"
    PROJECT_DELETED = "PROJECT_DELETED"
    SHARE = "SHARE"
    SHARE_REVOKED = "SHARE_REVOKED"
    SETTINGS = "SETTINGS"
    USAGE = "USAGE"
    RESET = "RESET"


class ResetReason(StrEnum):
    """Why a client has to fetch anew what it shows."""

    STARTED = "STARTED"
    EXPIRED = "EXPIRED"
    REPLACED = "REPLACED"


@dataclass(frozen=True, slots=True)
class FeedReset:
    """What comes before is not told: fetch anew, then go on from here."""

    reason: ResetReason


ChangedObject: TypeAlias = (
    ThreadRecord | MessageRecord | ProjectRecord | ShareRecord | SettingsRecord | FeedReset | UUID | None
)


@dataclass(frozen=True, slots=True)
class FeedChange:
    """One change with the position behind it. `changed` is a row, the key of what is gone, or None (usage).

    A message or share comes with its thread, read before the change is told: it may be deleted while it is.
    """

    cursor: str
    kind: ChangeKind
    changed: ChangedObject
    thread: ThreadRecord | None = None


class Changes:
    """Reads the feeds."""

    def __init__(
        self,
        database: Database,
        wakeups: Wakeups,
        threads: Threads,
        messages: Messages,
        projects: Projects,
        sharing: Sharing,
        settings: UserSettings,
    ) -> None:
        self._database = database
        self._wakeups = wakeups
        self._threads = threads
        self._messages = messages
        self._projects = projects
        self._sharing = sharing
        self._settings = settings

    async def read(self, viewer: Viewer, after: str | None) -> AsyncGenerator[FeedChange, None]:
        """The changes behind a cursor, then each new one as it is committed; without end.

        Without a cursor, or with one that is older than what is kept, a `FeedReset` comes first and tells the position
        from which the feed goes on: now.

        Raises:
            CursorInvalidError, CursorMismatchError, CursorAheadError: the cursor is of no, another's, a future place.
            UnauthenticatedError: the account is deleted, also while it is read.
        """
        position = _position(viewer, after)
        with self._wakeups.watch(viewer.id) as watch:
            newest = await self._newest(viewer)
            if position is None:
                position = newest
                yield _reset(viewer, position, ResetReason.STARTED)
            elif position > newest:
                raise CursorAheadError("This cursor is ahead of the feed.", field="after")
            while True:
                async with self._database.acquire() as connection:
                    rows = await connection.fetch(_AFTER, viewer.id, position, _READ_AT_ONCE)
                if not rows:
                    raise UnauthenticatedError(_GONE)
                if position < rows[0]["purged_to"]:
                    position = await self._newest(viewer)
                    yield _reset(viewer, position, ResetReason.EXPIRED)
                elif rows[0]["id"] is None:
                    await watch.wait()
                else:
                    for change in await self._told(viewer, rows):
                        yield change
                    position = rows[-1]["id"]

    async def _newest(self, viewer: Viewer) -> int:
        async with self._database.acquire() as connection:
            newest = await connection.fetchval(_NEWEST, viewer.id)
        if newest is None:
            raise UnauthenticatedError(_GONE)
        return int(newest)

    async def _told(self, viewer: Viewer, rows: Sequence[Mapping[str, Any]]) -> list[FeedChange]:
        """What to tell of these changes: each thing once, as it is now."""
        wanted: dict[ChangeKind, list[UUID]] = {kind: [] for kind in ChangeKind}
        # A choice of a branch is told where it was made last, anything else where it first changed: what is told later
        # may build on it.
        places: dict[tuple[ChangeKind, UUID | None], int] = {}
        for row in rows:
            place = (ChangeKind(row["kind"]), row["object_id"])
            if place not in places and place[1] is not None:
                wanted[place[0]].append(place[1])
            if place not in places or place[0] is ChangeKind.MESSAGE_SELECTED:
                places[place] = row["id"]
        message_ids = [key for kind in _OF_MESSAGES for key in wanted[kind]]
        messages = await _found(self._messages.find_many, viewer, message_ids)
        shares = await _found(self._sharing.find_many, viewer, wanted[ChangeKind.SHARE])
        thread_ids = wanted[ChangeKind.THREAD] + [message.thread_id for message in messages.values()]
        thread_ids += [share.thread_id for share in shares.values()]
        threads = await _found(self._threads.find_many, viewer, thread_ids)
        projects = await _found(self._projects.find_many, viewer, wanted[ChangeKind.PROJECT])
        told: list[FeedChange] = []
        for (kind, key), change_id in sorted(places.items(), key=itemgetter(1)):
            changed: ChangedObject = None
            thread = None
            match kind:
                case ChangeKind.THREAD:
                    changed = threads.get(key)
                case ChangeKind.PROJECT:
                    changed = projects.get(key)
                case ChangeKind.SETTINGS:
                    changed = await self._settings.find(viewer)
                case ChangeKind.RESET:
                    changed = FeedReset(ResetReason.REPLACED)
                case _ if kind in _OF_MESSAGES and (message := messages.get(key)):
                    thread = threads.get(message.thread_id)
                    changed = None if thread is None else message
                case ChangeKind.SHARE if share := shares.get(key):
                    thread = threads.get(share.thread_id)
                    changed = None if thread is None else share
                case ChangeKind.THREAD_DELETED | ChangeKind.PROJECT_DELETED | ChangeKind.SHARE_REVOKED:
                    changed = key
            if changed is not None or kind is ChangeKind.USAGE:
                told.append(FeedChange(_cursor(viewer, change_id), kind, changed, thread))
        return told


_OF_MESSAGES = (ChangeKind.MESSAGE_ADDED, ChangeKind.MESSAGE_ENDED, ChangeKind.MESSAGE_SELECTED)


async def _found(
    find_many: Callable[[Viewer, Sequence[UUID]], Awaitable[list[Record | None]]], viewer: Viewer, keys: list[UUID]
) -> dict[UUID | None, Record]:
    """The rows that there still are, by their keys."""
    if not keys:
        return {}
    wanted = list(dict.fromkeys(keys))
    rows = await find_many(viewer, wanted)
    return {key: row for key, row in zip(wanted, rows, strict=True) if row is not None}


def _reset(viewer: Viewer, position: int, reason: ResetReason) -> FeedChange:
    return FeedChange(_cursor(viewer, position), ChangeKind.RESET, FeedReset(reason))


def _cursor(viewer: Viewer, position: int) -> str:
    return FeedPosition(viewer.id.bytes[8:], position).cursor()


def _position(viewer: Viewer, cursor: str | None) -> int | None:
    place = position_of(FeedPosition.parse, cursor, "after", "the feed")
    if place is None:
        return None
    if place.whose != viewer.id.bytes[8:]:
        raise CursorMismatchError("This cursor belongs to another viewer's feed.", field="after")
    return place.change_id
