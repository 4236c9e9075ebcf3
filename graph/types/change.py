"""The events of the viewer's feed."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, TypeAlias

import strawberry

from graph.scalars import Cursor
from graph.types.message import Message
from graph.types.project import Project
from graph.types.settings import Settings
from graph.types.share import Share
from graph.types.thread import Thread
from models.ids import IdKind, outside_id
from models.records import MessageRecord, ProjectRecord, ShareRecord, ThreadRecord
from services import changes
from services.changes import ChangeKind, FeedReset
from services.settings import SettingsRecord

_CURSOR = "The position behind this event: what to send as `after` to go on from here."


@strawberry.enum(description="Why what a client shows is to be fetched anew.")
class ChangesResetReason(Enum):
    """The values of `ChangesReset.reason`."""

    STARTED = strawberry.enum_value("STARTED", description="The subscription began without `after`.")
    EXPIRED = strawberry.enum_value("EXPIRED", description="`after` is older than the feed is kept.")
    REPLACED = strawberry.enum_value(
        "REPLACED",
        description="So much changed at once, by an import, a claim, a fork or the end of a project, that it is not "
        "told one by one.",
    )


@strawberry.type(
    description="Fetch anew what you show; the feed goes on from here. What you fetch after this event may hold "
    "changes that are told once more: they are told as the object is, so applying one twice does no harm."
)
class ChangesReset:
    """A reset."""

    cursor: Cursor = strawberry.field(description=_CURSOR)
    reason: ChangesResetReason = strawberry.field(description="Why.")


@strawberry.type(description="A thread was made, renamed, pinned, archived, moved, or there was a turn in it.")
class ThreadChanged:
    """A thread as it is now."""

    cursor: Cursor = strawberry.field(description=_CURSOR)
    thread: Thread = strawberry.field(description="As it is now.")


@strawberry.type(description="A thread is gone, with its messages and shares.")
class ThreadDeleted:
    """A thread's end."""

    cursor: Cursor = strawberry.field(description=_CURSOR)
    thread_id: strawberry.ID = strawberry.field(description="Its id.")


@strawberry.type(
    description="A message was added; the thread's active path leads through it. An answer is STREAMING at first: read "
    "it with `messageStream`."
)
class MessageAdded:
    """A new message."""

    cursor: Cursor = strawberry.field(description=_CURSOR)
    message: Message = strawberry.field(description="As it is now.")


@strawberry.type(description="An answer has ended: whole, stopped, failed or interrupted.")
class MessageFinished:
    """An answer's end."""

    cursor: Cursor = strawberry.field(description=_CURSOR)
    message: Message = strawberry.field(description="As it is stored.")


@strawberry.type(description="Another branch of a thread was made active.")
class MessageSelected:
    """A new active path."""

    cursor: Cursor = strawberry.field(description=_CURSOR)
    message: Message = strawberry.field(description="The last message of the active path.")


@strawberry.type(description="A project was made or changed, or its number of threads was.")
class ProjectChanged:
    """A project as it is now."""

    cursor: Cursor = strawberry.field(description=_CURSOR)
    project: Project = strawberry.field(description="As it is now.")


@strawberry.type(description="A project is gone; what became of its threads is told of each.")
class ProjectDeleted:
    """A project's end."""

    cursor: Cursor = strawberry.field(description=_CURSOR)
    project_id: strawberry.ID = strawberry.field(description="Its id.")


@strawberry.type(description="A link to a snapshot of a thread was made.")
class ShareChanged:
    """A link as it is now."""

    cursor: Cursor = strawberry.field(description=_CURSOR)
    share: Share = strawberry.field(description="As it is now.")


@strawberry.type(description="A link was revoked, or removed after it had expired.")
class ShareRevoked:
    """A link's end."""

    cursor: Cursor = strawberry.field(description=_CURSOR)
    share_id: strawberry.ID = strawberry.field(description="Its id.")


@strawberry.type(description="The viewer's settings were changed.")
class SettingsChanged:
    """Settings as they are now."""

    cursor: Cursor = strawberry.field(description=_CURSOR)
    settings: Settings = strawberry.field(description="As they are now.")


@strawberry.type(description="Something was consumed: reports of usage are to be asked for anew.")
class UsageChanged:
    """New usage."""

    cursor: Cursor = strawberry.field(description=_CURSOR)


Event: TypeAlias = (
    ChangesReset
    | ThreadChanged
    | ThreadDeleted
    | MessageAdded
    | MessageFinished
    | MessageSelected
    | ProjectChanged
    | ProjectDeleted
    | ShareChanged
    | ShareRevoked
    | SettingsChanged
    | UsageChanged
)
Change = Annotated[Event, strawberry.union("Change", description="One event of the viewer's feed.")]

_REASONS = dict(ChangesResetReason.__members__)
_OF_MESSAGES: dict[ChangeKind, type[MessageAdded | MessageFinished | MessageSelected]] = {
    ChangeKind.MESSAGE_ADDED: MessageAdded,
    ChangeKind.MESSAGE_ENDED: MessageFinished,
    ChangeKind.MESSAGE_SELECTED: MessageSelected,
}


def change_of(change: changes.FeedChange) -> Event:
    """The schema's type of a change."""
    cursor, changed = Cursor(change.cursor), change.changed
    match changed:
        case FeedReset(reason):
            return ChangesReset(cursor=cursor, reason=_REASONS[reason.value])
        case ThreadRecord():
            return ThreadChanged(cursor=cursor, thread=Thread.of(changed))
        case MessageRecord():
            return _OF_MESSAGES[change.kind](cursor=cursor, message=Message.of(changed, change.thread))
        case ProjectRecord():
            return ProjectChanged(cursor=cursor, project=Project.of(changed))
        case ShareRecord():
            return ShareChanged(cursor=cursor, share=Share.of(changed, change.thread))
        case SettingsRecord():
            return SettingsChanged(cursor=cursor, settings=Settings(record=changed))
        case None:
            return UsageChanged(cursor=cursor)
    if change.kind is ChangeKind.SHARE_REVOKED:
        return ShareRevoked(cursor=cursor, share_id=strawberry.ID(outside_id(IdKind.SHARE, changed)))
    if change.kind is ChangeKind.THREAD_DELETED:
        return ThreadDeleted(cursor=cursor, thread_id=strawberry.ID(outside_id(IdKind.THREAD, changed)))
    return ProjectDeleted(cursor=cursor, project_id=strawberry.ID(outside_id(IdKind.PROJECT, changed)))
