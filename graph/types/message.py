"""Messages and the parts they are made of."""

from __future__ import annotations

from datetime import datetime
from enum import Enum
from typing import TYPE_CHECKING, Annotated
from uuid import UUID

import strawberry

from graph.context import Info
from graph.scalars import JSON, BigInt, Cursor
from graph.types.attachment import Attachment
from graph.types.connection import PageInfo, page_info
from graph.types.model import Model, model_of
from graph.types.node import Node
from models import parts as stored_parts
from models.ids import IdKind, outside_id
from models.records import MessageFailure, MessageRecord, MessageTokens, ThreadRecord
from services.errors import NotFoundError
from services.paging import Page, PathPosition

if TYPE_CHECKING:
    from graph.types.thread import Thread


@strawberry.enum(description="Who speaks.")
class MessageRole(Enum):
    """The roles of a conversation."""

    USER = strawberry.enum_value("USER", description="The person who asks.")
    ASSISTANT = strawberry.enum_value("ASSISTANT", description="The model.")
    SYSTEM = strawberry.enum_value("SYSTEM", description="Instructions that stand before a conversation.")


@strawberry.enum(description="Where a message stands. Every status but STREAMING is final.")
class MessageStatus(Enum):
    """The states of an answer; a user's message is COMPLETE."""

    STREAMING = strawberry.enum_value("STREAMING", description="Being written: read it with `messageStream`.")
    COMPLETE = strawberry.enum_value("COMPLETE", description="Whole.")
    STOPPED = strawberry.enum_value("STOPPED", description="Stopped by its user; what had come is kept.")
    FAILED = strawberry.enum_value("FAILED", description="The model or its provider failed; `error` says how.")
    INTERRUPTED = strawberry.enum_value(
        "INTERRUPTED", description="Cut off by the server or the provider; what had come is kept, `error` says why."
    )


@strawberry.enum(description="Why an answer is not whole.")
class MessageErrorCode(Enum):
    """The values of `MessageError.code`."""

    PROVIDER_UNAVAILABLE = strawberry.enum_value(
        "PROVIDER_UNAVAILABLE", description="The provider cannot be reached or has a fault; retry later."
    )
    PROVIDER_TIMEOUT = strawberry.enum_value("PROVIDER_TIMEOUT", description="The model was silent for too long.")
    PROVIDER_REJECTED_KEY = strawberry.enum_value(
        "PROVIDER_REJECTED_KEY", description="The provider does not accept the key."
    )
    PROVIDER_REJECTED_REQUEST = strawberry.enum_value(
        "PROVIDER_REJECTED_REQUEST",
        description="The provider does not accept the request, such as for its model or its billing.",
    )
    PROVIDER_PROTOCOL = strawberry.enum_value(
        "PROVIDER_PROTOCOL", description="The provider answered something that is not an answer."
    )
    PROVIDER_HUNG_UP = strawberry.enum_value(
        "PROVIDER_HUNG_UP", description="The provider ended the connection before the answer was whole."
    )
    RATE_LIMITED = strawberry.enum_value(
        "RATE_LIMITED", description="The provider allows no more for now; `retryAfter` says how long where it is known."
    )
    CONTEXT_TOO_LONG = strawberry.enum_value(
        "CONTEXT_TOO_LONG", description="The conversation is longer than the model takes."
    )
    CONTENT_FILTERED = strawberry.enum_value(
        "CONTENT_FILTERED", description="The provider withheld the answer by its content rules."
    )
    EMPTY_ANSWER = strawberry.enum_value("EMPTY_ANSWER", description="The model ended without an answer.")
    OUTPUT_LIMIT = strawberry.enum_value(
        "OUTPUT_LIMIT", description="The answer reached the greatest length this server keeps."
    )
    BUDGET_EXCEEDED = strawberry.enum_value(
        "BUDGET_EXCEEDED", description="The answer reached the length that its user's budget leaves for one answer."
    )
    ATTACHMENT_UNAVAILABLE = strawberry.enum_value(
        "ATTACHMENT_UNAVAILABLE",
        description="A file that was sent along cannot be read right now, or an image of the answer could not be kept; "
        "retry.",
    )
    SERVER_SHUTDOWN = strawberry.enum_value(
        "SERVER_SHUTDOWN", description="The server was shut down while it answered."
    )
    SERVER_LOST = strawberry.enum_value(
        "SERVER_LOST", description="The server that answered was killed; its last moments may be lost."
    )
    INTERNAL_SERVER_ERROR = strawberry.enum_value("INTERNAL_SERVER_ERROR", description="A defect of this server.")


@strawberry.type(description="Why an answer is not whole.")
class MessageError:
    """The failure of an answer."""

    code: MessageErrorCode = strawberry.field(description="For programs.")
    message: str = strawberry.field(description="One sentence that a person can act on.")
    retry_after: int | None = strawberry.field(description="Seconds after which a retry makes sense, where known.")

    @classmethod
    def of(cls, failure: MessageFailure) -> MessageError:
        """From the stored failure."""
        return cls(code=_CODES[failure.code], message=failure.message, retry_after=failure.retry_after)


@strawberry.type(description="What one answer consumed, in tokens.")
class MessageUsage:
    """The tokens of a message."""

    message_id: strawberry.Private[UUID]
    prompt_tokens: int = strawberry.field(description="Tokens of the history that was sent.")
    completion_tokens: int = strawberry.field(description="Tokens the model wrote, its reasoning among them.")
    reasoning_tokens: int = strawberry.field(description="Share of `completionTokens` that was reasoning.")
    cached_tokens: int = strawberry.field(description="Share of `promptTokens` that the provider had in its cache.")
    total_tokens: int = strawberry.field(description="Prompt and completion together.")
    estimated: bool = strawberry.field(description="Whether the provider reported nothing and this is an estimate.")

    @classmethod
    def of(cls, message_id: UUID, tokens: MessageTokens) -> MessageUsage:
        """From the stored counts of a message."""
        return cls(
            message_id=message_id,
            prompt_tokens=tokens.prompt,
            completion_tokens=tokens.completion,
            reasoning_tokens=tokens.reasoning,
            cached_tokens=tokens.cached,
            total_tokens=tokens.prompt + tokens.completion,
            estimated=tokens.estimated,
        )

    @strawberry.field(
        description="What it cost by the prices of its time, in millionths of the operator's currency; null where they "
        "were not known."
    )
    async def cost_micros(self, info: Info) -> BigInt | None:
        cost = await info.context.loaders.answer_cost.load(self.message_id)
        return None if cost is None else BigInt(cost)


@strawberry.type(description="What the model says, or what the user wrote. Markdown, as it came.")
class TextPart:
    """A text."""

    text: str = strawberry.field(description="Never empty.")


@strawberry.type(description="What the model thought, where the provider shows it.")
class ReasoningPart:
    """Reasoning."""

    text: str = strawberry.field(description="Never empty.")


@strawberry.type(description="A tool that the model asked for.")
class ToolPart:
    """A tool call."""

    call_id: str = strawberry.field(description="The provider's id of the call.")
    name: str = strawberry.field(description="The tool's name.")
    arguments: JSON | None = strawberry.field(description="What the tool was asked with.")
    result: JSON | None = strawberry.field(description="What it answered; null while there is no answer.")


@strawberry.type(description="A page or document that the answer draws on.")
class SourcePart:
    """A source."""

    url: str = strawberry.field(description="Where it is. As the provider sent it: check it before you make a link.")
    title: str | None = strawberry.field(description="Its title, where known.")


@strawberry.type(
    description="A file that the user sent along, which stands before the text, or an image that the model made."
)
class FilePart:
    """A file."""

    attachment_id: strawberry.Private[UUID]
    name: str = strawberry.field(description="Its name.")
    content_type: str = strawberry.field(description="What its content was found to be.")
    size: int = strawberry.field(description="Bytes.")

    @strawberry.field(description="The file; null when it was deleted.")
    async def attachment(self, info: Info) -> Attachment | None:
        record = await info.context.loaders.attachment.load(self.attachment_id)
        return None if record is None else Attachment.of(record)


MessagePart = Annotated[
    TextPart | ReasoningPart | ToolPart | SourcePart | FilePart,
    strawberry.union("MessagePart", description="One part of a message. Parts keep their index once they appear."),
]


def part_of(part: stored_parts.Part) -> TextPart | ReasoningPart | ToolPart | SourcePart | FilePart:
    """The schema's type of a stored part."""
    match part:
        case stored_parts.TextPart(text):
            return TextPart(text=text)
        case stored_parts.ReasoningPart(text):
            return ReasoningPart(text=text)
        case stored_parts.ToolPart(call_id, name, arguments, result):
            return ToolPart(call_id=call_id, name=name, arguments=arguments, result=result)
        case stored_parts.SourcePart(url, title):
            return SourcePart(url=url, title=title)
        case stored_parts.FilePart(attachment_id, name, content_type, size):
            return FilePart(attachment_id=attachment_id, name=name, content_type=content_type, size=size)


@strawberry.type(
    description="A node in a thread's tree of messages. Editing and retrying add siblings; nothing is overwritten."
)
class Message(Node):
    """A message."""

    record: strawberry.Private[MessageRecord]
    thread_record: strawberry.Private[ThreadRecord | None]
    role: MessageRole = strawberry.field(description="Who speaks.")
    status: MessageStatus = strawberry.field(description="Where it stands.")
    created_at: datetime = strawberry.field(description="When it was begun.")
    updated_at: datetime = strawberry.field(description="When it was ended, else when it was begun.")

    @classmethod
    def of(cls, record: MessageRecord, thread: ThreadRecord | None = None) -> Message:
        """From its row; with its thread's, where that was read with it."""
        return cls(
            id=strawberry.ID(outside_id(IdKind.MESSAGE, record.id)),
            record=record,
            thread_record=thread,
            role=MESSAGE_ROLES[record.role.value],
            status=MESSAGE_STATUSES[record.status.value],
            created_at=record.created_at,
            updated_at=record.updated_at,
        )

    @strawberry.field(description="The thread it belongs to.")
    async def thread(self, info: Info) -> Annotated[Thread, strawberry.lazy("graph.types.thread")]:
        from graph.types.thread import Thread

        record = self.thread_record or await info.context.loaders.thread.load(self.record.thread_id)
        if record is None:
            raise NotFoundError("thread")
        return Thread.of(record)

    @strawberry.field(description="The message it answers or follows; null for the first of a thread.")
    async def parent(self, info: Info) -> Message | None:
        if self.record.parent_id is None:
            return None
        record = await info.context.loaders.message.load(self.record.parent_id)
        return None if record is None else Message.of(record, self.thread_record)

    @strawberry.field(
        description="All versions at this place of the tree, oldest first, this one among them. At most 100."
    )
    async def siblings(self, info: Info) -> list[Message]:
        place = (self.record.thread_id, self.record.parent_id)
        siblings = await info.context.loaders.siblings.load(place)
        return [Message.of(record, self.thread_record) for record in siblings]

    @strawberry.field(description="What it is made of, in order. Empty while it is STREAMING: read `messageStream`.")
    def parts(self) -> list[MessagePart]:
        return [part_of(part) for part in self.record.parts]

    @strawberry.field(description="Its text parts, joined. Empty while it is STREAMING: read `messageStream`.")
    def text(self) -> str:
        return self.record.text

    @strawberry.field(description="The model that wrote it; null for a user's message.")
    def model(self, info: Info) -> Model | None:
        return model_of(info, self.record.model)

    @strawberry.field(
        description="What it consumed; null for a user's message, while it is STREAMING, and in a copy of a share."
    )
    def usage(self) -> MessageUsage | None:
        return None if self.record.tokens is None else MessageUsage.of(self.record.id, self.record.tokens)

    @strawberry.field(
        description="Why it is not whole; null where it is, where its user stopped it, and in a copy of a share."
    )
    def error(self) -> MessageError | None:
        return None if self.record.failure is None else MessageError.of(self.record.failure)

    @strawberry.field(
        description="Milliseconds from its beginning to its end; null for a user's message and in a copy of a share."
    )
    def duration_ms(self) -> int | None:
        return self.record.duration_ms


# Enum(value) is a Python call; a dict of the few values is not.
MESSAGE_ROLES = dict(MessageRole.__members__)
MESSAGE_STATUSES = dict(MessageStatus.__members__)
_CODES = dict(MessageErrorCode.__members__)


@strawberry.type(description="A message in its place on the active path.")
class MessageEdge:
    """An edge."""

    cursor: Cursor = strawberry.field(description="This place.")
    node: Message = strawberry.field(description="The message.")


@strawberry.type(description="A page of a thread's active path, oldest first.")
class MessageConnection:
    """A connection of messages."""

    edges: list[MessageEdge] = strawberry.field(description="The messages with their places.")
    page_info: PageInfo = strawberry.field(description="Where this page lies.")

    @classmethod
    def of(cls, page: Page[MessageRecord], thread: ThreadRecord) -> MessageConnection:
        """From a page of rows of a thread."""
        cursors = [PathPosition(record.depth).cursor() for record in page.records]
        edges = [
            MessageEdge(cursor=Cursor(cursor), node=Message.of(record, thread))
            for cursor, record in zip(cursors, page.records, strict=True)
        ]
        return cls(edges=edges, page_info=page_info(page, cursors))

    @strawberry.field(description="The messages without their places.")
    def nodes(self) -> list[Message]:
        return [edge.node for edge in self.edges]
