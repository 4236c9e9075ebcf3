"""Root fields that begin an answer."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

import strawberry

from graph.context import Info
from graph.scalars import INPUT, key_of
from graph.types.turn import EditMessageInput, ReasoningEffort, RetryMessageInput, SendMessageInput, TurnPayload
from models.ids import IdKind
from providers import base
from services.attachments import MAX_ATTACHMENTS
from services.errors import BadUserInputError
from services.turns import NewThread, TurnRequest

_EFFORTS: dict[ReasoningEffort, base.ReasoningEffort] = {
    ReasoningEffort.LOW: "LOW",
    ReasoningEffort.MEDIUM: "MEDIUM",
    ReasoningEffort.HIGH: "HIGH",
}


@strawberry.type
class TurnMutation:
    """Mutations."""

    @strawberry.mutation(
        description="Ask a question, in a thread or in a new one. THREAD_BUSY while an answer is written in the thread."
    )
    async def send_message(self, info: Info, input: Annotated[SendMessageInput, INPUT]) -> TurnPayload:  # noqa: A002
        viewer = info.context.viewer
        turn = await info.context.services.turns.send(
            viewer,
            _request(input),
            place=_place(input),
            text=input.text,
            attachment_ids=_attachments(input.attachment_ids) or (),
        )
        return TurnPayload.of(turn)

    @strawberry.mutation(
        description="Ask a user's message in other words: a sibling of it, with an answer of its own, becomes active."
    )
    async def edit_message(self, info: Info, input: Annotated[EditMessageInput, INPUT]) -> TurnPayload:  # noqa: A002
        viewer = info.context.viewer
        message_id = key_of(IdKind.MESSAGE, input.message_id, field="messageId")
        turn = await info.context.services.turns.edit(
            viewer,
            _request(input),
            message_id=message_id,
            text=input.text,
            attachment_ids=_attachments(input.attachment_ids),
        )
        return TurnPayload.of(turn)

    @strawberry.mutation(description="Have an answer written again: another answer beside it becomes active.")
    async def retry_message(self, info: Info, input: Annotated[RetryMessageInput, INPUT]) -> TurnPayload:  # noqa: A002
        viewer = info.context.viewer
        message_id = key_of(IdKind.MESSAGE, input.message_id, field="messageId")
        turn = await info.context.services.turns.retry(viewer, _request(input), message_id=message_id)
        return TurnPayload.of(turn)


def _place(given: SendMessageInput) -> UUID | NewThread:
    if given.thread_id is None:
        project_id = None if given.project_id is None else key_of(IdKind.PROJECT, given.project_id, field="projectId")
        return NewThread(project_id=project_id, temporary=given.temporary)
    if given.project_id is not None:
        raise BadUserInputError("Only a new thread takes a project; moveThread moves others.", field="projectId")
    if given.temporary:
        raise BadUserInputError("Only a new thread can be made temporary.", field="temporary")
    return key_of(IdKind.THREAD, given.thread_id, field="threadId")


def _attachments(ids: list[strawberry.ID] | None) -> tuple[UUID, ...] | None:
    if ids is None:
        return None
    if len(ids) > MAX_ATTACHMENTS:
        raise BadUserInputError(f"A message has at most {MAX_ATTACHMENTS} files.", field="attachmentIds")
    keys = tuple(key_of(IdKind.ATTACHMENT, text, field="attachmentIds") for text in ids)
    if len(set(keys)) < len(keys):
        raise BadUserInputError("A file is sent along once.", field="attachmentIds")
    return keys


def _request(given: SendMessageInput | EditMessageInput | RetryMessageInput) -> TurnRequest:
    return TurnRequest(
        idempotency_key=given.idempotency_key,
        model_id=given.model_id,
        reasoning_effort=_EFFORTS[given.reasoning_effort] if given.reasoning_effort else None,
    )
