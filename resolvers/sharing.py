"""Root fields about sharing."""

from __future__ import annotations

from typing import Annotated

import strawberry

from graph.context import Info
from graph.scalars import INPUT, key_of
from graph.types.share import RevokeShareInput, RevokeSharePayload, Share, ShareThreadInput, ShareThreadPayload
from graph.types.shared_thread import ForkSharedThreadInput, ForkSharedThreadPayload, SharedThread
from graph.types.thread import Thread
from models.ids import IdKind

Token = Annotated[str, strawberry.argument(description="The token of a link.")]


@strawberry.type
class SharingQuery:
    """Queries."""

    @strawberry.field(
        description="What a link shows. Needs no sign-in; null where the token is unknown, revoked or expired, all "
        "alike."
    )
    async def shared_thread(self, info: Info, token: Token) -> SharedThread | None:
        record = await info.context.services.sharing.read(token)
        return None if record is None else SharedThread.of(record)


@strawberry.type
class SharingMutation:
    """Mutations."""

    @strawberry.mutation(
        description="Make a link to a snapshot of the thread's active path as it is now; an answer that is being "
        "written is left out. A thread has at most 100 links."
    )
    async def share_thread(self, info: Info, input: Annotated[ShareThreadInput, INPUT]) -> ShareThreadPayload:  # noqa: A002
        viewer = info.context.viewer
        record = await info.context.services.sharing.share(
            viewer,
            key_of(IdKind.THREAD, input.thread_id, field="threadId"),
            title=input.title,
            include_attachments=input.include_attachments,
            expires_at=input.expires_at,
        )
        return ShareThreadPayload(share=Share.of(record))

    @strawberry.mutation(description="Revoke a link: at once, for readers in the middle of it too.")
    async def revoke_share(self, info: Info, input: Annotated[RevokeShareInput, INPUT]) -> RevokeSharePayload:  # noqa: A002
        viewer = info.context.viewer
        share_id = key_of(IdKind.SHARE, input.share_id, field="shareId")
        record = await info.context.services.sharing.revoke(viewer, share_id)
        return RevokeSharePayload(revoked_share_id=input.share_id, thread=Thread.of(record))

    @strawberry.mutation(
        description="Copy a shared thread into a thread of the viewer's own, with new ids and the files that the link "
        "shows, and go on with it."
    )
    async def fork_shared_thread(
        self,
        info: Info,
        input: Annotated[ForkSharedThreadInput, INPUT],  # noqa: A002
    ) -> ForkSharedThreadPayload:
        viewer = info.context.viewer
        record = await info.context.services.sharing.fork(viewer, input.token)
        return ForkSharedThreadPayload(thread=Thread.of(record))
