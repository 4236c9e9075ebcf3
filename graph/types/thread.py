"""Threads."""

from __future__ import annotations

from datetime import datetime

import strawberry

from graph.context import Info
from graph.scalars import Cursor
from graph.types.connection import After, Before, First, Last, PageInfo, page_info
from graph.types.message import Message, MessageConnection
from graph.types.node import Node
from graph.types.project import Project
from graph.types.share import Share
from graph.types.usage import TokenTotals
from models.ids import IdKind, outside_id
from models.records import ThreadRecord
from services.paging import Page, PathPosition, ThreadPosition, page_request


@strawberry.type(description="A conversation.")
class Thread(Node):
    """A thread."""

    record: strawberry.Private[ThreadRecord]
    title: str = strawberry.field(
        description="From the first question at first, then by a model where one is set, or as its user named it."
    )
    pinned: bool = strawberry.field(description="Whether it stands at the top of the list.")
    archived: bool = strawberry.field(description="Whether it is out of the list.")
    temporary: bool = strawberry.field(description="Whether it is in no list and no search, and always expires.")
    expires_at: datetime | None = strawberry.field(description="When it is deleted with all that hangs on it, if ever.")
    created_at: datetime = strawberry.field(description="When it was begun.")
    updated_at: datetime = strawberry.field(description="Its last activity: a question, or the end of an answer.")

    @classmethod
    def of(cls, record: ThreadRecord) -> Thread:
        """From its row."""
        return cls(
            id=strawberry.ID(outside_id(IdKind.THREAD, record.id)),
            record=record,
            title=record.title,
            pinned=record.pinned,
            archived=record.archived,
            temporary=record.temporary,
            expires_at=record.expires_at,
            created_at=record.created_at,
            updated_at=record.updated_at,
        )

    @strawberry.field(description="The project it is in; null where it is in none.")
    async def project(self, info: Info) -> Project | None:
        if self.record.project_id is None:
            return None
        record = await info.context.loaders.project.load(self.record.project_id)
        return None if record is None else Project.of(record)

    @strawberry.field(description="The active path through the tree of messages, oldest first.")
    async def messages(
        self, info: Info, first: First = None, after: After = None, last: Last = None, before: Before = None
    ) -> MessageConnection:
        request = page_request(PathPosition.parse, first, after, last, before)
        page = await info.context.loaders.messages_page(request).load(self.record.id)
        return MessageConnection.of(page, self.record)

    @strawberry.field(description="The answer being written now, on whichever branch; null where none is.")
    async def live_message(self, info: Info) -> Message | None:
        record = await info.context.loaders.live_message.load(self.record.id)
        return None if record is None else Message.of(record, self.record)

    @strawberry.field(description="The links to snapshots of it that have not expired, newest first. At most 100.")
    async def shares(self, info: Info) -> list[Share]:
        return [Share.of(record, self.record) for record in await info.context.loaders.shares.load(self.record.id)]

    @strawberry.field(
        description="What it consumed so far, its title and abandoned branches among it. Nothing for a temporary "
        "thread, whose usage is counted in reports only."
    )
    async def usage(self, info: Info) -> TokenTotals:
        return TokenTotals.of(await info.context.loaders.thread_usage.load(self.record.id))


@strawberry.type(description="A thread in its place in the list.")
class ThreadEdge:
    """An edge."""

    cursor: Cursor = strawberry.field(description="This place.")
    node: Thread = strawberry.field(description="The thread.")


@strawberry.type(description="A page of threads: pinned first, then by last activity.")
class ThreadConnection:
    """A connection of threads."""

    edges: list[ThreadEdge] = strawberry.field(description="The threads with their places.")
    page_info: PageInfo = strawberry.field(description="Where this page lies.")

    @classmethod
    def of(cls, page: Page[ThreadRecord]) -> ThreadConnection:
        """From a page of rows."""
        cursors = [ThreadPosition(record.pinned, record.updated_at, record.id).cursor() for record in page.records]
        edges = [
            ThreadEdge(cursor=Cursor(cursor), node=Thread.of(record))
            for cursor, record in zip(cursors, page.records, strict=True)
        ]
        return cls(edges=edges, page_info=page_info(page, cursors))

    @strawberry.field(description="The threads without their places.")
    def nodes(self) -> list[Thread]:
        return [edge.node for edge in self.edges]


@strawberry.input(description="Which threads to list.")
class ThreadFilter:
    """Argument of `threads`."""

    archived: bool = strawberry.field(default=False, description="True lists the archived ones, and only them.")
    temporary: bool = strawberry.field(default=False, description="True lists the temporary ones, and only them.")
    pinned: bool | None = strawberry.field(default=None, description="Only those that are pinned, or are not.")
    title: str | None = strawberry.field(default=None, description="Any part of the title, in any case.")
    project_id: strawberry.ID | None = strawberry.field(default=None, description="Only those in this project.")
    in_project: bool | None = strawberry.field(
        default=None, description="Only those in any project (true), or in none (false)."
    )


@strawberry.input(description="A new title for a thread.")
class RenameThreadInput:
    """Input of `renameThread`."""

    thread_id: strawberry.ID = strawberry.field(description="The thread.")
    title: str = strawberry.field(description="The title, at most 800 bytes; white space is folded.")


@strawberry.type(description="The renamed thread.")
class RenameThreadPayload:
    """Payload of `renameThread`."""

    thread: Thread = strawberry.field(description="As it is now.")


@strawberry.input(description="Whether a thread is pinned.")
class PinThreadInput:
    """Input of `pinThread`."""

    thread_id: strawberry.ID = strawberry.field(description="The thread.")
    pinned: bool = strawberry.field(description="True to pin it, false to let it go.")


@strawberry.type(description="The thread that was pinned or let go.")
class PinThreadPayload:
    """Payload of `pinThread`."""

    thread: Thread = strawberry.field(description="As it is now.")


@strawberry.input(description="Whether a thread is archived.")
class ArchiveThreadInput:
    """Input of `archiveThread`."""

    thread_id: strawberry.ID = strawberry.field(description="The thread.")
    archived: bool = strawberry.field(default=True, description="True takes it out of the list, false brings it back.")


@strawberry.type(description="The thread that was archived or brought back.")
class ArchiveThreadPayload:
    """Payload of `archiveThread`."""

    thread: Thread = strawberry.field(description="As it is now.")


@strawberry.input(description="Where a thread is to be.")
class MoveThreadInput:
    """Input of `moveThread`."""

    thread_id: strawberry.ID = strawberry.field(description="The thread.")
    project_id: strawberry.ID | None = strawberry.field(
        default=None, description="The project to move it into; null moves it out of any."
    )


@strawberry.type(description="The thread that was moved.")
class MoveThreadPayload:
    """Payload of `moveThread`."""

    thread: Thread = strawberry.field(description="As it is now.")


@strawberry.input(description="When a thread is to be deleted.")
class SetThreadExpiryInput:
    """Input of `setThreadExpiry`."""

    thread_id: strawberry.ID = strawberry.field(description="The thread.")
    expires_at: datetime | None = strawberry.field(
        default=None,
        description="When: in the future, at most ten years ahead. Null keeps it, unless it is temporary.",
    )


@strawberry.type(description="The thread with its new expiry.")
class SetThreadExpiryPayload:
    """Payload of `setThreadExpiry`."""

    thread: Thread = strawberry.field(description="As it is now.")


@strawberry.input(description="A message whose branch is to become a thread of its own.")
class ForkThreadInput:
    """Input of `forkThread`."""

    message_id: strawberry.ID = strawberry.field(description="The last message to copy, on whichever branch.")
    title: str | None = strawberry.field(
        default=None, description="The new thread's title, at most 800 bytes; null takes the old one's."
    )


@strawberry.type(description="The new thread.")
class ForkThreadPayload:
    """Payload of `forkThread`."""

    thread: Thread = strawberry.field(description="With its copies on the active path.")


@strawberry.input(description="A thread to delete.")
class DeleteThreadInput:
    """Input of `deleteThread`."""

    thread_id: strawberry.ID = strawberry.field(description="The thread.")


@strawberry.type(description="What was deleted.")
class DeleteThreadPayload:
    """Payload of `deleteThread`."""

    deleted_thread_id: strawberry.ID = strawberry.field(description="The id of the thread that is gone.")
