"""The events of a message's stream."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import strawberry

from graph.scalars import Cursor
from graph.types.message import Message, MessagePart, part_of
from streams import buffer as streams

_CURSOR = "The position behind this event: what to send as `after` to go on from here."


@strawberry.enum(description="What kind of part a delta belongs to.")
class DeltaKind(Enum):
    """The parts that grow."""

    TEXT = strawberry.enum_value("TEXT", description="A TextPart.")
    REASONING = strawberry.enum_value("REASONING", description="A ReasoningPart.")


@strawberry.type(description="The next characters of a part. The first delta of an index begins the part.")
class MessageDelta:
    """A delta."""

    cursor: Cursor = strawberry.field(description=_CURSOR)
    part_index: int = strawberry.field(description="Which part of the message grows.")
    kind: DeltaKind = strawberry.field(description="What kind of part it is.")
    text: str = strawberry.field(description="The characters to add; whole Unicode code points, never empty.")


@strawberry.type(description="A part that appears whole, such as a tool call.")
class MessagePartAdded:
    """A whole part."""

    cursor: Cursor = strawberry.field(description=_CURSOR)
    part_index: int = strawberry.field(description="Its place in the message.")
    part: MessagePart = strawberry.field(description="The part.")


@strawberry.type(
    description="Text that you hold was lost with a server. Replace all of it by this message; what follows goes on "
    "from it."
)
class MessageReset:
    """A reset."""

    cursor: Cursor = strawberry.field(description=_CURSOR)
    message: Message = strawberry.field(description="What there is.")


@strawberry.type(description="The end. The subscription completes after it.")
class MessageEnded:
    """The terminal event."""

    cursor: Cursor = strawberry.field(description=_CURSOR)
    message: Message = strawberry.field(description="The message as it is stored: final parts, status and usage.")


MessageStreamEvent = Annotated[
    MessageDelta | MessagePartAdded | MessageReset | MessageEnded,
    strawberry.union("MessageStreamEvent", description="One event of a message's stream."),
]

_KINDS = {"TEXT": DeltaKind.TEXT, "REASONING": DeltaKind.REASONING}


def event_of(event: streams.StreamEvent) -> MessageDelta | MessagePartAdded | MessageReset | MessageEnded:
    """The schema's type of a stream event."""
    match event:
        case streams.Delta(cursor, part_index, kind, text):
            return MessageDelta(cursor=Cursor(cursor), part_index=part_index, kind=_KINDS[kind], text=text)
        case streams.PartAdded(cursor, part_index, part):
            return MessagePartAdded(cursor=Cursor(cursor), part_index=part_index, part=part_of(part))
        case streams.Reset(cursor, message):
            return MessageReset(cursor=Cursor(cursor), message=Message.of(message))
        case streams.Ended(cursor, message):
            return MessageEnded(cursor=Cursor(cursor), message=Message.of(message))
