"""Threads."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

import strawberry

from graph.context import Info
from graph.scalars import Cursor
from graph.types.connection import PageInfo, page_info
from graph.types.message import Message, MessageConnection
from graph.types.node import Node
from models.ids import IdKind, outside_id
from models.records import ThreadRecord
from services.paging import Page, PathPosition, ThreadPosition, page_request

First = Annotated[
    int | None, strawberry.argument(description="Page size forwards, 1 to 100; 25 where nothing is given.")
]
After = Annotated[Cursor | None, strawberry.argument(description="Begin behind this cursor.")]
Last = Annotated[
    int | None, strawberry.argument(description="Page size backwards, 1 to 100; not together with `first`.")
]
Before = Annotated[Cursor | None, strawberry.argument(description="End before this cursor.")]


@strawberry.type(description="A conversation.")
class Thread(Node):
    """A thread."""

    record: strawberry.Private[ThreadRecord]
    title: str = strawberry.field(
        description="From the first question at first, then by a model where one is set, or as its user named it."
    )
    pinned: bool = strawberry.field(description="Whether it stands at the top of the list.")
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
            created_at=record.created_at,
            updated_at=record.updated_at,
        )

    @strawberry.field(description="The active path through the tree of messages, oldest first.")
    async def messages(
        self, info: Info, first: First = None, after: After = None, last: Last = None, before: Before = None
    ) -> MessageConnection:
        request = page_request(PathPosition.parse, first, after, last, before)
        return MessageConnection.of(await info.context.loaders.messages_page(request).load(self.record.id))

    @strawberry.field(description="The answer being written now, on whichever branch; null where none is.")
    async def live_message(self, info: Info) -> Message | None:
        record = await info.context.loaders.live_message.load(self.record.id)
        return None if record is None else Message.of(record)


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


@strawberry.input(description="A thread to delete.")
class DeleteThreadInput:
    """Input of `deleteThread`."""

    thread_id: strawberry.ID = strawberry.field(description="The thread.")


@strawberry.type(description="What was deleted.")
class DeleteThreadPayload:
    """Payload of `deleteThread`."""

    deleted_thread_id: strawberry.ID = strawberry.field(description="The id of the thread that is gone.")
