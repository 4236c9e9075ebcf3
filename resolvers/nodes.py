"""`node` and `nodes`: any object by its id."""

from __future__ import annotations

from typing import Annotated

import strawberry

from graph.context import Context, Info
from graph.types.attachment import Attachment
from graph.types.message import Message
from graph.types.node import Node
from graph.types.project import Project
from graph.types.share import Share
from graph.types.thread import Thread
from models.ids import IdKind, MalformedIdError, parse_any_id
from services.errors import BadUserInputError
from services.paging import MAX_NODES


@strawberry.type
class NodeQuery:
    """Queries."""

    @strawberry.field(description="Any object of the viewer's by its id; null where there is none.")
    async def node(
        self,
        info: Info,
        id: Annotated[strawberry.ID, strawberry.argument(description="Id of any object.")],  # noqa: A002
    ) -> Node | None:
        return (await _find(info.context, [id], field="id"))[0]

    @strawberry.field(description="Objects in the order of their ids, at most 100; null where there is none.")
    async def nodes(
        self,
        info: Info,
        ids: Annotated[list[strawberry.ID], strawberry.argument(description="Ids of any objects.")],
    ) -> list[Node | None]:
        if len(ids) > MAX_NODES:
            raise BadUserInputError(f"At most {MAX_NODES} ids at once.", field="ids")
        return await _find(info.context, ids, field="ids")


async def _find(context: Context, ids: list[strawberry.ID], *, field: str) -> list[Node | None]:
    viewer = context.viewer
    try:
        wanted = [parse_any_id(text) for text in ids]
    except MalformedIdError as error:
        raise BadUserInputError("This is not an id.", field=field) from error
    found: dict[tuple[IdKind, object], Node] = {}
    thread_ids = [key for kind, key in wanted if kind is IdKind.THREAD]
    message_ids = [key for kind, key in wanted if kind is IdKind.MESSAGE]
    if thread_ids:
        for thread in await context.services.threads.find_many(viewer, thread_ids):
            if thread is not None:
                found[IdKind.THREAD, thread.id] = Thread.of(thread)
    if message_ids:
        for message in await context.services.messages.find_many(viewer, message_ids):
            if message is not None:
                found[IdKind.MESSAGE, message.id] = Message.of(message)
    project_ids = [key for kind, key in wanted if kind is IdKind.PROJECT]
    if project_ids:
        for project in await context.services.projects.find_many(viewer, project_ids):
            if project is not None:
                found[IdKind.PROJECT, project.id] = Project.of(project)
    share_ids = [key for kind, key in wanted if kind is IdKind.SHARE]
    if share_ids:
        for share in await context.services.sharing.find_many(viewer, share_ids):
            if share is not None:
                found[IdKind.SHARE, share.id] = Share.of(share)
    attachment_ids = [key for kind, key in wanted if kind is IdKind.ATTACHMENT]
    if attachment_ids:
        for attachment in await context.services.attachments.find_many(viewer, attachment_ids):
            if attachment is not None:
                found[IdKind.ATTACHMENT, attachment.id] = Attachment.of(attachment)
    return [found.get(place) for place in wanted]
