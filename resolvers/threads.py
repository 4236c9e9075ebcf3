"""Root fields about threads."""

from __future__ import annotations

from typing import Annotated

import strawberry

from graph.context import Info
from graph.scalars import INPUT, key_of
from graph.types.thread import (
    After,
    Before,
    DeleteThreadInput,
    DeleteThreadPayload,
    First,
    Last,
    PinThreadInput,
    PinThreadPayload,
    RenameThreadInput,
    RenameThreadPayload,
    Thread,
    ThreadConnection,
)
from models.ids import IdKind
from services.paging import ThreadPosition, page_request

ThreadId = Annotated[strawberry.ID, strawberry.argument(description="Id of a thread.")]


@strawberry.type
class ThreadQuery:
    """Queries."""

    @strawberry.field(description="The viewer's threads: pinned first, then by last activity.")
    async def threads(
        self, info: Info, first: First = None, after: After = None, last: Last = None, before: Before = None
    ) -> ThreadConnection:
        viewer = info.context.viewer
        request = page_request(ThreadPosition.parse, first, after, last, before)
        return ThreadConnection.of(await info.context.services.threads.page(viewer, request))

    @strawberry.field(description="One thread; null where the viewer has none of this id.")
    async def thread(self, info: Info, id: ThreadId) -> Thread | None:  # noqa: A002 - the argument's name in the API
        viewer = info.context.viewer
        record = await info.context.services.threads.find(viewer, key_of(IdKind.THREAD, id, field="id"))
        return None if record is None else Thread.of(record)


@strawberry.type
class ThreadMutation:
    """Mutations."""

    @strawberry.mutation(description="Give a thread a title of the user's own.")
    async def rename_thread(self, info: Info, input: Annotated[RenameThreadInput, INPUT]) -> RenameThreadPayload:  # noqa: A002
        viewer = info.context.viewer
        thread_id = key_of(IdKind.THREAD, input.thread_id, field="threadId")
        record = await info.context.services.threads.rename(viewer, thread_id, input.title)
        return RenameThreadPayload(thread=Thread.of(record))

    @strawberry.mutation(description="Keep a thread at the top of the list, or let it go.")
    async def pin_thread(self, info: Info, input: Annotated[PinThreadInput, INPUT]) -> PinThreadPayload:  # noqa: A002
        viewer = info.context.viewer
        thread_id = key_of(IdKind.THREAD, input.thread_id, field="threadId")
        record = await info.context.services.threads.pin(viewer, thread_id, pinned=input.pinned)
        return PinThreadPayload(thread=Thread.of(record))

    @strawberry.mutation(
        description="Delete a thread with its messages. An answer being written in it is stopped first; usage stays "
        "counted."
    )
    async def delete_thread(self, info: Info, input: Annotated[DeleteThreadInput, INPUT]) -> DeleteThreadPayload:  # noqa: A002
        viewer = info.context.viewer
        thread_id = key_of(IdKind.THREAD, input.thread_id, field="threadId")
        await info.context.services.threads.delete(viewer, thread_id)
        return DeleteThreadPayload(deleted_thread_id=input.thread_id)
