"""Messages and the parts they are made of."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar
from uuid import UUID

import strawberry

from graph.batching import batched_field, unique
from graph.context import Context
from graph.scalars import JSON, BigInt, Cursor
from graph.types.attachment import Attachment
from graph.types.connection import PageInfo, page_info
from graph.types.model import Model, models_of
from graph.types.node import Needs, Node, RecordView, Views, selected_below
from models import parts as stored_parts
from models.ids import IdKind
from models.records import MessageFailure, MessageRecord, MessageTokens, ThreadRecord
from services.errors import NotFoundError
from services.paging import WHETHER_MORE, Page, PathPosition

if TYPE_CHECKING:
    from graph.types.share import Share
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


async def _costs(usages: list[MessageUsage], context: Context) -> list[BigInt | None]:
    found = await context.services.usage.costs_of_answers(context.viewer, [usage.message_id for usage in usages])
    return [None if cost is None else BigInt(cost) for cost in found]


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

    cost_micros: BigInt | None = batched_field(
        _costs,
        description="What it cost by the prices of its time, in millionths of the operator's currency; null where they "
        "were not known.",
    )


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


async def _attachments(files: list[FilePart], context: Context) -> list[Attachment | None]:
    ids = unique([file.attachment_id for file in files])
    records = await context.services.attachments.find_many(context.viewer, ids)
    found = {key: None if record is None else Attachment.of(record) for key, record in zip(ids, records, strict=True)}
    return [found[file.attachment_id] for file in files]


@strawberry.type(
    description="A file that the user sent along, which stands before the text, or an image that the model made."
)
class FilePart:
    """A file."""

    attachment_id: strawberry.Private[UUID]
    name: str = strawberry.field(description="Its name.")
    content_type: str = strawberry.field(description="What its content was found to be.")
    size: int = strawberry.field(description="Bytes.")

    attachment: Attachment | None = batched_field(_attachments, description="The file; null when it was deleted.")


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


async def threads_of(
    parts: Sequence[Message | Share], context: Context
) -> list[Annotated[Thread, strawberry.lazy("graph.types.thread")]]:
    """The threads of what belongs to one; an exception for what has lost it meanwhile."""
    from graph.types.thread import Thread

    ids = unique([part.record.thread_id for part in parts if part.thread_record is None])
    records = await context.services.threads.find_many(context.viewer, ids) if ids else []
    found = dict(zip(ids, records, strict=True))
    threads = [part.thread_record or found[part.record.thread_id] for part in parts]
    return [NotFoundError("thread") if record is None else Thread.of(record) for record in threads]  # type: ignore[misc]


async def _parents(messages: list[Message], context: Context) -> list[Message | None]:
    ids = unique([message.record.parent_id for message in messages if message.record.parent_id is not None])
    records = await context.services.messages.find_many(context.viewer, ids) if ids else []
    found = {record.id: record for record in records if record is not None}
    parents = [None if one.record.parent_id is None else found.get(one.record.parent_id) for one in messages]
    return [
        None if parent is None else Message.of(parent, message.thread_record)
        for message, parent in zip(messages, parents, strict=True)
    ]


async def _siblings(messages: list[Message], context: Context) -> list[list[Message]]:
    places = [(message.record.thread_id, message.record.parent_id) for message in messages]
    found = await context.services.messages.siblings(context.viewer, places)
    return [
        [Message.of(record, message.thread_record) for record in records]
        for message, records in zip(messages, found, strict=True)
    ]


async def _models(messages: list[Message], context: Context) -> list[Model | None]:
    return await models_of(context, [message.record.model for message in messages])


@strawberry.type(
    description="A node in a thread's tree of messages. Editing and retrying add siblings; nothing is overwritten."
)
class Message(RecordView, Node):
    """A message."""

    kind = IdKind.MESSAGE
    columns = MessageRecord
    needs: ClassVar[Needs] = {
        **{name: (name,) for name in ("id", "model", "created_at", "updated_at", "duration_ms")},
        "role": ("role_name",),
        "status": ("status_name",),
        "text": ("read_text",),
        "parts": ("parts_json",),
        "thread": ("thread_id",),
        "parent": ("parent_id",),
        "siblings": ("thread_id", "parent_id"),
    }
    written = {"role": "role_name", "status": "status_name"}  # noqa: RUF012 - declared where it is inherited from
    made_of = {"text": ("read_text", "parts_json", stored_parts.text_from_json)}  # noqa: RUF012
    record: strawberry.Private[MessageRecord]
    thread_record: strawberry.Private[ThreadRecord | None]
    role: MessageRole = strawberry.field(description="Who speaks.")
    status: MessageStatus = strawberry.field(description="Where it stands.")
    created_at: datetime = strawberry.field(description="When it was begun.")
    updated_at: datetime = strawberry.field(description="When it was ended, else when it was begun.")

    @classmethod
    def of(cls, record: MessageRecord, thread: ThreadRecord | None = None) -> Message:
        """From its row; with its thread's, where that was read with it."""
        view = cls.__new__(cls)
        view.record = record
        view.thread_record = thread
        return view

    thread: Annotated[Thread, strawberry.lazy("graph.types.thread")] = batched_field(
        threads_of, description="The thread it belongs to."
    )
    parent: Message | None = batched_field(
        _parents, description="The message it answers or follows; null for the first of a thread."
    )
    siblings: list[Message] = batched_field(
        _siblings,
        description="All versions at this place of the tree, oldest first, this one among them. At most 100.",
    )

    @strawberry.field(description="What it is made of, in order. Empty while it is STREAMING: read `messageStream`.")
    def parts(self) -> list[MessagePart]:
        return [part_of(part) for part in self.record.parts]

    text: str = strawberry.field(
        description="Its text parts, joined. Empty while it is STREAMING: read `messageStream`."
    )
    model: Model | None = batched_field(_models, description="The model that wrote it; null for a user's message.")

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

    duration_ms: int | None = strawberry.field(
        description="Milliseconds from its beginning to its end; null for a user's message and in a copy of a share."
    )


# Enum(value) is a Python call; a dict of the few values is not.
MESSAGE_ROLES = dict(MessageRole.__members__)
MESSAGE_STATUSES = dict(MessageStatus.__members__)
_CODES = dict(MessageErrorCode.__members__)


@strawberry.type(description="A message in its place on the active path.")
class MessageEdge:
    """An edge."""

    needs: ClassVar[Needs] = {"cursor": ("depth",), "node": selected_below}
    node: Message = strawberry.field(description="The message.")

    @strawberry.field(description="This place.")
    def cursor(self) -> Cursor:
        return Cursor(_place(self.node.record))


@strawberry.type(description="A page of a thread's active path, oldest first.")
class MessageConnection:
    """A connection of messages."""

    needs: ClassVar[Needs] = {"page_info": ("depth", WHETHER_MORE), "edges": selected_below, "nodes": selected_below}
    page: strawberry.Private[Page[MessageRecord]]
    thread: strawberry.Private[ThreadRecord]

    @strawberry.field(description="The messages with their places.")
    def edges(self) -> list[MessageEdge]:
        return [MessageEdge(node=Message.of(record, self.thread)) for record in self.page.records]

    @strawberry.field(description="Where this page lies.")
    def page_info(self) -> PageInfo:
        return page_info(self.page, _place)

    @strawberry.field(description="The messages without their places.")
    def nodes(self) -> Sequence[Message]:
        return Views(partial(Message.of, thread=self.thread), self.page.records)


def _place(record: MessageRecord) -> str:
    return PathPosition(record.depth).cursor()
