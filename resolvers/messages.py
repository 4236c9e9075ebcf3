"""Root fields about messages: found, streamed, stopped, selected."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated

import strawberry

from graph.context import Info
from graph.deltas import delta_follower
from graph.scalars import INPUT, Cursor, key_of
from graph.types.message import Message
from graph.types.stream import MessageStreamEvent, event_of
from graph.types.thread import Thread
from graph.types.turn import SelectMessageInput, SelectMessagePayload, StopMessageInput, StopMessagePayload
from models.ids import IdKind

MessageId = Annotated[strawberry.ID, strawberry.argument(description="Id of a message.")]


@strawberry.type
class MessageQuery:
    """Queries."""

    @strawberry.field(description="One message; null where the viewer has none of this id.")
    async def message(self, info: Info, id: MessageId) -> Message | None:  # noqa: A002 - the argument's name in the API
        viewer = info.context.viewer
        record = await info.context.services.messages.find(viewer, key_of(IdKind.MESSAGE, id, field="id"))
        return None if record is None else Message.of(record)


@strawberry.type
class MessageMutation:
    """Mutations."""

    @strawberry.mutation(
        description="Stop an answer: the model is hung up on, what had come is kept, usage counts once. "
        "Stopping twice or too late is no error: the message is returned as it ended."
    )
    async def stop_message(self, info: Info, input: Annotated[StopMessageInput, INPUT]) -> StopMessagePayload:  # noqa: A002
        viewer = info.context.viewer
        message_id = key_of(IdKind.MESSAGE, input.message_id, field="messageId")
        record = await info.context.services.message_stream.stop(viewer, message_id)
        return StopMessagePayload(message=Message.of(record))

    @strawberry.mutation(description="Lead the thread's active path through this message.")
    async def select_message(self, info: Info, input: Annotated[SelectMessageInput, INPUT]) -> SelectMessagePayload:  # noqa: A002
        viewer = info.context.viewer
        message_id = key_of(IdKind.MESSAGE, input.message_id, field="messageId")
        thread, message = await info.context.services.messages.select(viewer, message_id)
        return SelectMessagePayload(thread=Thread.of(thread), message=Message.of(message))


@strawberry.type
class MessageSubscription:
    """Subscriptions."""

    @strawberry.subscription(
        description="The answer as it is written, from `after` on (from its start when null). "
        "Ends with MessageEnded, then completes. For an answer that has ended it gives the rest at once."
    )
    async def message_stream(
        self,
        info: Info,
        message_id: MessageId,
        after: Annotated[Cursor | None, strawberry.argument(description="The last cursor you saw.")] = None,
    ) -> AsyncGenerator[MessageStreamEvent, None]:
        viewer = info.context.viewer
        key = key_of(IdKind.MESSAGE, message_id, field="messageId")
        async with aclosing(
            info.context.services.message_stream.read(viewer, key, after, delta_follower(info))
        ) as events:
            async for event in events:
                yield event_of(event)
