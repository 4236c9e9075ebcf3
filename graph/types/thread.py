"""Threads."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import ClassVar
from uuid import UUID

import strawberry
from graphql import GraphQLError

from graph.batching import Joined, Wanted, batched_field, field_below, unique, wanted_below
from graph.context import Context, Info
from graph.scalars import Cursor
from graph.types.connection import After, Before, First, Last, PageInfo, page_info
from graph.types.message import Message, MessageConnection
from graph.types.node import Needs, Node, RecordView, selected_below
from graph.types.project import Project
from graph.types.share import Share
from graph.types.usage import TokenTotals
from models.ids import IdKind
from models.records import ThreadRecord, time_of
from services.errors import CallerError
from services.paging import WHETHER_MORE, Page, PageRequest, PathPosition, ThreadPosition, page_request
from services.threads import ThreadFilter as ThreadsListed


async def _projects(threads: list[Thread], context: Context) -> list[Project | None]:
    ids = unique([thread.record.project_id for thread in threads if thread.record.project_id is not None])
    if not ids:
        return [None] * len(threads)
    records = await context.services.projects.find_many(context.viewer, ids)
    projects: dict[UUID | None, Project] = {one.id: Project.of(one) for one in records if one is not None}
    return [projects.get(thread.record.project_id) for thread in threads]


def _of_project(below: Wanted) -> Wanted:
    """Those of the project can be read with the thread."""
    return frozenset({"project_id"} if below is None else {"project_id", *(f"project.{name}" for name in below)})


async def _messages(
    threads: list[Thread],
    context: Context,
    first: First = None,
    after: After = None,
    last: Last = None,
    before: Before = None,
    *,
    wanted: Wanted = None,
) -> list[MessageConnection]:
    request = page_request(PathPosition.parse, first, after, last, before)
    pages = context.messages_read.get((request, wanted), {})
    ids = unique([thread.record.id for thread in threads if thread.record.id not in pages])
    if ids:
        read = await context.services.messages.pages(context.viewer, ids, request, wanted)
        pages = pages | dict(zip(ids, read, strict=True))
    return [MessageConnection(page=pages[thread.record.id], thread=thread.record) for thread in threads]


async def thread_page(info: Info, request: PageRequest[ThreadPosition], listed: ThreadsListed) -> Page[ThreadRecord]:
    """A page of the viewer's threads, and of their messages where they are selected and one query can read both.

    Raises:
        CallerError: as `services.threads.Threads.page`.
    """
    context, wanted, below = info.context, wanted_below(info), field_below(info)
    threads = context.services.threads
    if below is not None and listed.project_id is None:
        try:
            path = page_request(PathPosition.parse, **below.arguments())
        except (CallerError, GraphQLError):
            path = None  # It is said where it is asked for.
        if path is not None:
            page, messages = await threads.page_with_messages(
                context.viewer, request, listed, wanted, path, below.wanted
            )
            context.messages_read.setdefault((path, below.wanted), {}).update(messages)
            return page
    return await threads.page(context.viewer, request, listed, wanted)


def _of_messages(below: Wanted) -> Wanted:
    """All where a message may show its thread again, or messages beside it may."""
    return None if below is None or below & {"thread_id", "parent_id"} else frozenset({"id"})


async def _live_messages(threads: list[Thread], context: Context) -> list[Message | None]:
    records = await context.services.messages.live(context.viewer, [thread.record.id for thread in threads])
    return [
        None if record is None else Message.of(record, thread.record)
        for thread, record in zip(threads, records, strict=True)
    ]


async def _shares(threads: list[Thread], context: Context) -> list[list[Share]]:
    ids = unique([thread.record.id for thread in threads])
    found = dict(zip(ids, await context.services.sharing.of_threads(context.viewer, ids), strict=True))
    return [[Share.of(record, thread.record) for record in found[thread.record.id]] for thread in threads]


async def _usage(threads: list[Thread], context: Context) -> list[TokenTotals]:
    found = await context.services.usage.of_threads(context.viewer, [thread.record.id for thread in threads])
    return [TokenTotals.of(totals) for totals in found]


@strawberry.type(description="A conversation.")
class Thread(RecordView, Node):
    """A thread."""

    kind = IdKind.THREAD
    columns = ThreadRecord
    needs: ClassVar[Needs] = {
        **{name: (name,) for name in ("id", "title", "pinned", "archived", "temporary")},
        **{name: (name,) for name in ("expires_at", "created_at", "updated_at")},
        "project": _of_project,
        "messages": _of_messages,
        "usage": ("id",),
    }
    record: strawberry.Private[ThreadRecord]
    title: str = strawberry.field(
        description="From the first question at first, then by a model where one is set, or as its user named it."
    )
    pinned: bool = strawberry.field(description="Whether it stands at the top of the list.")
    archived: bool = strawberry.field(description="Whether it is out of the list.")
    temporary: bool = strawberry.field(description="Whether it is in no list and no search, and always expires.")
    expires_at: datetime | None = strawberry.field(description="When it is deleted with all that hangs on it, if ever.")
    created_at: datetime = strawberry.field(description="When it was begun.")
    updated_at: datetime = strawberry.field(description="Its last activity: a question, or the end of an answer.")

    project: Project | None = batched_field(
        _projects,
        description="The project it is in; null where it is in none.",
        joined=Joined(Project, len(ThreadRecord.columns)),
    )
    messages: MessageConnection = batched_field(
        _messages, description="The active path through the tree of messages, oldest first.", ahead=True
    )
    live_message: Message | None = batched_field(
        _live_messages, description="The answer being written now, on whichever branch; null where none is."
    )
    shares: list[Share] = batched_field(
        _shares, description="The links to snapshots of it that have not expired, newest first. At most 100."
    )
    usage: TokenTotals = batched_field(
        _usage,
        description="What it consumed so far, its title and abandoned branches among it. Nothing for a temporary "
        "thread, whose usage is counted in reports only.",
    )


# What a place in the list is made of.
_PLACE = ("pinned", "updated_at", "id")


@strawberry.type(description="A thread in its place in the list.")
class ThreadEdge:
    """An edge."""

    needs: ClassVar[Needs] = {"cursor": _PLACE, "node": selected_below}
    node: Thread = strawberry.field(description="The thread.")

    @strawberry.field(description="This place.")
    def cursor(self) -> Cursor:
        return Cursor(_place(self.node.record))


@strawberry.type(description="A page of threads: pinned first, then by last activity.")
class ThreadConnection:
    """A connection of threads."""

    needs: ClassVar[Needs] = {"page_info": (*_PLACE, WHETHER_MORE), "edges": selected_below, "nodes": selected_below}
    page: strawberry.Private[Page[ThreadRecord]]

    @strawberry.field(description="The threads with their places.")
    def edges(self) -> list[ThreadEdge]:
        return [ThreadEdge(node=thread) for thread in Thread.of_each(self.page.records)]

    @strawberry.field(description="Where this page lies.")
    def page_info(self) -> PageInfo:
        return page_info(self.page, _place)

    @strawberry.field(description="The threads without their places.")
    def nodes(self) -> Sequence[Thread]:
        return Thread.of_each(self.page.records)


def _place(record: ThreadRecord) -> str:
    return ThreadPosition(record.pinned, time_of(record.updated_at), record.id).cursor()


@strawberry.input(description="Which threads to list.")
class ThreadFilter:
    """Argument of `threads`."""

    archived: bool = strawberry.field(default=False, description="True lists the archived ones, and only them.")
    temporary: bool = strawberry.field(default=False, description="True lists the temporary ones, and only them.")
    pinned: bool | None = strawberry.field(default=None, description="Only those that are pinned, or are not.")
    title: str | None = strawberry.field(default=None, description="Any part of the title, in any case.")
    project_id: strawberry.ID | None = strawberry.field(default=None, description="Only those in this project.")
    in_project: bool | None = strawberry.field(
        default=None, description="Only those in any project (true), or in none (false)."
    )


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


@strawberry.input(description="Whether a thread is archived.")
class ArchiveThreadInput:
    """Input of `archiveThread`."""

    thread_id: strawberry.ID = strawberry.field(description="The thread.")
    archived: bool = strawberry.field(default=True, description="True takes it out of the list, false brings it back.")


@strawberry.type(description="The thread that was archived or brought back.")
class ArchiveThreadPayload:
    """Payload of `archiveThread`."""

    thread: Thread = strawberry.field(description="As it is now.")


@strawberry.input(description="Where a thread is to be.")
class MoveThreadInput:
    """Input of `moveThread`."""

    thread_id: strawberry.ID = strawberry.field(description="The thread.")
    project_id: strawberry.ID | None = strawberry.field(
        default=None, description="The project to move it into; null moves it out of any."
    )


@strawberry.type(description="The thread that was moved.")
class MoveThreadPayload:
    """Payload of `moveThread`."""

    thread: Thread = strawberry.field(description="As it is now.")


@strawberry.input(description="When a thread is to be deleted.")
class SetThreadExpiryInput:
    """Input of `setThreadExpiry`."""

    thread_id: strawberry.ID = strawberry.field(description="The thread.")
    expires_at: datetime | None = strawberry.field(
        default=None,
        description="When: in the future, at most ten years ahead. Null keeps it, unless it is temporary.",
    )


@strawberry.type(description="The thread with its new expiry.")
class SetThreadExpiryPayload:
    """Payload of `setThreadExpiry`."""

    thread: Thread = strawberry.field(description="As it is now.")


@strawberry.input(description="A message whose branch is to become a thread of its own.")
class ForkThreadInput:
    """Input of `forkThread`."""

    message_id: strawberry.ID = strawberry.field(description="The last message to copy, on whichever branch.")
    title: str | None = strawberry.field(
        default=None, description="The new thread's title, at most 800 bytes; null takes the old one's."
    )


@strawberry.type(description="The new thread.")
class ForkThreadPayload:
    """Payload of `forkThread`."""

    thread: Thread = strawberry.field(description="With its copies on the active path.")


@strawberry.input(description="A thread to delete.")
class DeleteThreadInput:
    """Input of `deleteThread`."""

    thread_id: strawberry.ID = strawberry.field(description="The thread.")


@strawberry.type(description="What was deleted.")
class DeleteThreadPayload:
    """Payload of `deleteThread`."""

    deleted_thread_id: strawberry.ID = strawberry.field(description="The id of the thread that is gone.")
