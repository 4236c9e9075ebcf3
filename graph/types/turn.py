"""Turns: a question with its answer."""

from __future__ import annotations

from enum import Enum

import strawberry

from graph.types.message import Message
from graph.types.thread import Thread
from services.turns import Turn

_KEY = (
    "Your own name for this request, 1 to 200 visible ASCII characters, such as a new UUID. "
    "Sent again with the same input it returns the first result; with other input it is a CONFLICT."
)
_MODEL = "The model to ask; null asks the project's default, else the viewer's, else the server's. `models` lists them."
_ATTACHMENTS = "Files to send along, each once, at most 20, in this order. They must have been taken in."
_EFFORT = "How hard a reasoning model should think; ignored by others."


@strawberry.enum(description="How hard a reasoning model should think.")
class ReasoningEffort(Enum):
    """The common steps of vendors."""

    LOW = strawberry.enum_value("LOW", description="Answer soon.")
    MEDIUM = strawberry.enum_value("MEDIUM", description="The vendor's usual.")
    HIGH = strawberry.enum_value("HIGH", description="Think long.")


@strawberry.input(description="A question.")
class SendMessageInput:
    """Input of `sendMessage`."""

    idempotency_key: str = strawberry.field(description=_KEY)
    text: str = strawberry.field(description="The question, not blank; by default at most 262,144 bytes of UTF-8.")
    thread_id: strawberry.ID | None = strawberry.field(default=None, description="The thread; null makes a new one.")
    project_id: strawberry.ID | None = strawberry.field(
        default=None, description="The project of a new thread; not together with `threadId`."
    )
    temporary: bool = strawberry.field(
        default=False,
        description="Whether a new thread is in no list and no search, and is deleted some time after its last turn.",
    )
    attachment_ids: list[strawberry.ID] | None = strawberry.field(default=None, description=_ATTACHMENTS)
    model_id: str | None = strawberry.field(default=None, description=_MODEL)
    reasoning_effort: ReasoningEffort | None = strawberry.field(default=None, description=_EFFORT)


@strawberry.input(description="A user's message in other words.")
class EditMessageInput:
    """Input of `editMessage`."""

    idempotency_key: str = strawberry.field(description=_KEY)
    message_id: strawberry.ID = strawberry.field(description="The user's message to ask anew.")
    text: str = strawberry.field(description="The new words, not blank; by default at most 262,144 bytes of UTF-8.")
    attachment_ids: list[strawberry.ID] | None = strawberry.field(
        default=None, description=_ATTACHMENTS + " Null keeps those of the message."
    )
    model_id: str | None = strawberry.field(default=None, description=_MODEL)
    reasoning_effort: ReasoningEffort | None = strawberry.field(default=None, description=_EFFORT)


@strawberry.input(description="An answer to write again.")
class RetryMessageInput:
    """Input of `retryMessage`."""

    idempotency_key: str = strawberry.field(description=_KEY)
    message_id: strawberry.ID = strawberry.field(description="The answer.")
    model_id: str | None = strawberry.field(default=None, description=_MODEL)
    reasoning_effort: ReasoningEffort | None = strawberry.field(default=None, description=_EFFORT)


@strawberry.type(description="A question and its answer, which is being written: read it with `messageStream`.")
class TurnPayload:
    """Payload of `sendMessage`, `editMessage` and `retryMessage`."""

    thread: Thread = strawberry.field(description="The thread.")
    user_message: Message = strawberry.field(description="The question.")
    assistant_message: Message = strawberry.field(description="The answer.")

    @classmethod
    def of(cls, turn: Turn) -> TurnPayload:
        """From the service's turn."""
        return cls(
            thread=Thread.of(turn.thread),
            user_message=Message.of(turn.user_message),
            assistant_message=Message.of(turn.assistant_message),
        )


@strawberry.input(description="An answer to stop.")
class StopMessageInput:
    """Input of `stopMessage`."""

    message_id: strawberry.ID = strawberry.field(description="The answer.")


@strawberry.type(description="The answer as it is stored after the stop.")
class StopMessagePayload:
    """Payload of `stopMessage`."""

    message: Message = strawberry.field(description="STOPPED with what had come, or as it had ended before.")


@strawberry.input(description="A message whose branch is to be the active one.")
class SelectMessageInput:
    """Input of `selectMessage`."""

    message_id: strawberry.ID = strawberry.field(description="The message; its last active branch below it comes back.")


@strawberry.type(description="The thread with another active path.")
class SelectMessagePayload:
    """Payload of `selectMessage`."""

    thread: Thread = strawberry.field(description="The thread.")
    message: Message = strawberry.field(description="The message that was selected.")
