"""Root fields about threads."""

from __future__ import annotations

from typing import Annotated

import strawberry

from graph.context import Info
from graph.scalars import INPUT, key_of
from graph.types.connection import After, Before, First, Last
from graph.types.thread import (
    ArchiveThreadInput,
    ArchiveThreadPayload,
    DeleteThreadInput,
    DeleteThreadPayload,
    ForkThreadInput,
    ForkThreadPayload,
    MoveThreadInput,
    MoveThreadPayload,
    PinThreadInput,
    PinThreadPayload,
    RenameThreadInput,
    RenameThreadPayload,
    SetThreadExpiryInput,
    SetThreadExpiryPayload,
    Thread,
    ThreadConnection,
    ThreadFilter,
    thread_page,
)
from models.ids import IdKind
from services import threads
from services.paging import ThreadPosition, page_request

ThreadId = Annotated[strawberry.ID, strawberry.argument(description="Id of a thread.")]
Filter = Annotated[
    ThreadFilter | None,
    strawberry.argument(description="Which to list; null: all that are neither archived nor temporary."),
]


@strawberry.type
class ThreadQuery:
    """Queries."""

    @strawberry.field(description="The viewer's threads: pinned first, then by last activity.")
    async def threads(
        self,
        info: Info,
        first: First = None,
        after: After = None,
        last: Last = None,
        before: Before = None,
        filter: Filter = None,  # noqa: A002 - the argument's name in the API
    ) -> ThreadConnection:
        request = page_request(ThreadPosition.parse, first, after, last, before)
        listed = threads.ALL_LISTED if filter is None else _listed(filter)
        return ThreadConnection(page=await thread_page(info, request, listed))

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

    @strawberry.mutation(description="Take a thread out of the list, or bring it back.")
    async def archive_thread(self, info: Info, input: Annotated[ArchiveThreadInput, INPUT]) -> ArchiveThreadPayload:  # noqa: A002
        viewer = info.context.viewer
        thread_id = key_of(IdKind.THREAD, input.thread_id, field="threadId")
        record = await info.context.services.threads.archive(viewer, thread_id, archived=input.archived)
        return ArchiveThreadPayload(thread=Thread.of(record))

    @strawberry.mutation(description="Move a thread into a project, or out of any.")
    async def move_thread(self, info: Info, input: Annotated[MoveThreadInput, INPUT]) -> MoveThreadPayload:  # noqa: A002
        viewer = info.context.viewer
        thread_id = key_of(IdKind.THREAD, input.thread_id, field="threadId")
        project_id = None if input.project_id is None else key_of(IdKind.PROJECT, input.project_id, field="projectId")
        record = await info.context.services.threads.move(viewer, thread_id, project_id)
        return MoveThreadPayload(thread=Thread.of(record))

    @strawberry.mutation(description="Have a thread deleted at a time of the user's choice, or keep it.")
    async def set_thread_expiry(
        self,
        info: Info,
        input: Annotated[SetThreadExpiryInput, INPUT],  # noqa: A002
    ) -> SetThreadExpiryPayload:
        viewer = info.context.viewer
        thread_id = key_of(IdKind.THREAD, input.thread_id, field="threadId")
        record = await info.context.services.threads.set_expiry(viewer, thread_id, input.expires_at)
        return SetThreadExpiryPayload(thread=Thread.of(record))

    @strawberry.mutation(
        description="Copy a message and all that leads to it into a new thread, with new ids; attachments are referred "
        "to, not copied. It stands in the same project and expires when the old one does, but is not pinned. "
        "THREAD_BUSY where the message is being written."
    )
    async def fork_thread(self, info: Info, input: Annotated[ForkThreadInput, INPUT]) -> ForkThreadPayload:  # noqa: A002
        viewer = info.context.viewer
        message_id = key_of(IdKind.MESSAGE, input.message_id, field="messageId")
        record = await info.context.services.forks.fork(viewer, message_id, input.title)
        return ForkThreadPayload(thread=Thread.of(record))

    @strawberry.mutation(
        description="Delete a thread with its messages. An answer being written in it is stopped first; usage stays "
        "counted."
    )
    async def delete_thread(self, info: Info, input: Annotated[DeleteThreadInput, INPUT]) -> DeleteThreadPayload:  # noqa: A002
        viewer = info.context.viewer
        thread_id = key_of(IdKind.THREAD, input.thread_id, field="threadId")
        await info.context.services.threads.delete(viewer, thread_id)
        return DeleteThreadPayload(deleted_thread_id=input.thread_id)


def _listed(given: ThreadFilter) -> threads.ThreadFilter:
    return threads.ThreadFilter(
        archived=given.archived,
        temporary=given.temporary,
        pinned=given.pinned,
        title=given.title,
        project_id=None if given.project_id is None else key_of(IdKind.PROJECT, given.project_id, field="projectId"),
        in_project=given.in_project,
    )
