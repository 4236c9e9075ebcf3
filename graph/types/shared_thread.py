"""Shared threads, as anybody with the token of a link sees them.

Nothing here is a Node, and nothing leads to one: no id that another field takes, no thread, no owner. The parts are a
union of their own, so that a part which names something of its owner's cannot come in by being added to messages.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

import strawberry

from graph.context import Info
from graph.scalars import Cursor
from graph.types.connection import After, Before, First, Last, PageInfo, page_info
from graph.types.message import (
    MESSAGE_ROLES,
    MESSAGE_STATUSES,
    MessageRole,
    MessageStatus,
    ReasoningPart,
    SourcePart,
    TextPart,
    ToolPart,
)
from graph.types.model import Model, shared_model_of
from graph.types.thread import Thread
from models import parts as stored_parts
from models.records import SharedMessageRecord, SharedThreadRecord
from services.paging import Page, SharedPosition, page_request


@strawberry.type(description="A file of a shared thread.")
class SharedFilePart:
    """A file; it has no id."""

    name: str = strawberry.field(description="Its name.")
    content_type: str = strawberry.field(description="What it is, by its content.")
    size: int = strawberry.field(description="Its bytes.")
    path: str = strawberry.field(
        description="Where it is on this server: a GET leads to the file for as long as the link of the thread works."
    )


SharedMessagePart = Annotated[
    TextPart | ReasoningPart | ToolPart | SourcePart | SharedFilePart,
    strawberry.union("SharedMessagePart", description="One part of a shared message."),
]


@strawberry.type(description="A copy of a message as it was when its thread was shared. It has no id.")
class SharedMessage:
    """A message of a shared thread."""

    record: strawberry.Private[SharedMessageRecord]
    token: strawberry.Private[str]
    position: int = strawberry.field(description="Its place in the snapshot, from 0.")
    role: MessageRole = strawberry.field(description="Who speaks.")
    status: MessageStatus = strawberry.field(description="How it ended; never STREAMING.")
    created_at: datetime = strawberry.field(description="When it was begun.")

    @classmethod
    def of(cls, record: SharedMessageRecord, token: str) -> SharedMessage:
        """From its row and the token by which it is read."""
        return cls(
            record=record,
            token=token,
            position=record.position,
            role=MESSAGE_ROLES[record.role.value],
            status=MESSAGE_STATUSES[record.status.value],
            created_at=record.created_at,
        )

    @strawberry.field(description="What it is made of, in order: text, reasoning, tool calls and sources as shown.")
    def parts(self) -> list[SharedMessagePart]:
        return [_part_of(part, self.token) for part in self.record.parts]

    @strawberry.field(description="Its text parts, joined.")
    def text(self) -> str:
        return "".join(part.text for part in self.record.parts if isinstance(part, stored_parts.TextPart))

    @strawberry.field(description="The model that wrote it; null for a user's message.")
    def model(self, info: Info) -> Model | None:
        return shared_model_of(info, self.record.model)


def _part_of(
    part: stored_parts.SharedPart, token: str
) -> TextPart | ReasoningPart | ToolPart | SourcePart | SharedFilePart:
    match part:
        case stored_parts.SharedFilePart(position, name, content_type, size):
            path = f"/shared/{token}/files/{position}"
            return SharedFilePart(name=name, content_type=content_type, size=size, path=path)
        case stored_parts.TextPart(text):
            return TextPart(text=text)
        case stored_parts.ReasoningPart(text):
            return ReasoningPart(text=text)
        case stored_parts.ToolPart(call_id, name, arguments, result):
            return ToolPart(call_id=call_id, name=name, arguments=arguments, result=result)
        case stored_parts.SourcePart(url, title):
            return SourcePart(url=url, title=title)


@strawberry.type(description="A shared message in its place.")
class SharedMessageEdge:
    """An edge."""

    node: SharedMessage = strawberry.field(description="The message.")

    @strawberry.field(description="This place.")
    def cursor(self) -> Cursor:
        return Cursor(_place(self.node.record))


@strawberry.type(description="A page of a shared thread, oldest first.")
class SharedMessageConnection:
    """A connection of shared messages."""

    page: strawberry.Private[Page[SharedMessageRecord]]
    token: strawberry.Private[str]

    @strawberry.field(description="The messages with their places.")
    def edges(self) -> list[SharedMessageEdge]:
        return [SharedMessageEdge(node=SharedMessage.of(record, self.token)) for record in self.page.records]

    @strawberry.field(description="Where this page lies.")
    def page_info(self) -> PageInfo:
        return page_info(self.page, _place)

    @strawberry.field(description="The messages without their places.")
    def nodes(self) -> list[SharedMessage]:
        return [SharedMessage.of(record, self.token) for record in self.page.records]


def _place(record: SharedMessageRecord) -> str:
    return SharedPosition(record.position).cursor()


@strawberry.type(description="A snapshot of somebody's thread, for whoever has the token of its link.")
class SharedThread:
    """A shared thread."""

    record: strawberry.Private[SharedThreadRecord]
    title: str = strawberry.field(description="As its sharer named it.")
    includes_attachments: bool = strawberry.field(description="Whether its files are shown.")
    expires_at: datetime | None = strawberry.field(description="When the link ends by itself, if ever.")
    created_at: datetime = strawberry.field(description="When the snapshot was made.")

    @classmethod
    def of(cls, record: SharedThreadRecord) -> SharedThread:
        """From its row."""
        return cls(
            record=record,
            title=record.title,
            includes_attachments=record.includes_attachments,
            expires_at=record.expires_at,
            created_at=record.created_at,
        )

    @strawberry.field(
        description="Its messages, oldest first. Each page asks anew whether the link is still good: NOT_FOUND where "
        "it was revoked meanwhile."
    )
    async def messages(
        self, info: Info, first: First = None, after: After = None, last: Last = None, before: Before = None
    ) -> SharedMessageConnection:
        request = page_request(SharedPosition.parse, first, after, last, before)
        page = await info.context.services.sharing.page(self.record, request)
        return SharedMessageConnection(page=page, token=self.record.token)


@strawberry.input(description="A shared thread to go on with.")
class ForkSharedThreadInput:
    """Input of `forkSharedThread`."""

    token: str = strawberry.field(description="The token of the link.")


@strawberry.type(description="The viewer's own copy of a shared thread.")
class ForkSharedThreadPayload:
    """Payload of `forkSharedThread`."""

    thread: Thread = strawberry.field(description="The new thread.")
