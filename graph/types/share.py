"""Shares as their owners see them."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import strawberry

from graph.batching import batched_field
from graph.types.message import threads_of
from graph.types.node import Node, RecordView
from models.ids import IdKind
from models.records import ShareRecord, ThreadRecord

if TYPE_CHECKING:
    from graph.types.thread import Thread


@strawberry.type(
    description="A link to a snapshot of a thread. Later messages, edits and renames of the thread do not reach it."
)
class Share(RecordView, Node):
    """A share."""

    kind = IdKind.SHARE
    record: strawberry.Private[ShareRecord]
    thread_record: strawberry.Private[ThreadRecord | None]
    token: str = strawberry.field(
        description="What `sharedThread` takes. Whoever has it reads the snapshot: it is the whole secret of the link."
    )
    title: str = strawberry.field(description="What readers see as the title.")
    includes_attachments: bool = strawberry.field(description="Whether readers see the files.")
    expires_at: datetime | None = strawberry.field(description="When the link ends by itself, if ever.")
    created_at: datetime = strawberry.field(description="When the snapshot was made.")
    message_count: int = strawberry.field(description="How many messages readers see.")

    @classmethod
    def of(cls, record: ShareRecord, thread: ThreadRecord | None = None) -> Share:
        """From its row; with its thread's, where that was read with it."""
        view = cls.__new__(cls)
        view.record = record
        view.thread_record = thread
        return view

    thread: Annotated[Thread, strawberry.lazy("graph.types.thread")] = batched_field(
        threads_of, description="The thread that it is a snapshot of."
    )


@strawberry.input(description="A thread to share.")
class ShareThreadInput:
    """Input of `shareThread`."""

    thread_id: strawberry.ID = strawberry.field(description="The thread.")
    title: str | None = strawberry.field(
        default=None, description="What readers see as the title, at most 800 bytes; null takes the thread's."
    )
    include_attachments: bool = strawberry.field(default=False, description="Whether readers see the files.")
    expires_at: datetime | None = strawberry.field(
        default=None, description="When the link ends by itself: in the future, at most ten years ahead; null: never."
    )


@strawberry.type(description="The new link.")
class ShareThreadPayload:
    """Payload of `shareThread`."""

    share: Share = strawberry.field(description="With the token to hand out.")


@strawberry.input(description="A link to revoke.")
class RevokeShareInput:
    """Input of `revokeShare`."""

    share_id: strawberry.ID = strawberry.field(description="The link.")


@strawberry.type(description="The link that was revoked.")
class RevokeSharePayload:
    """Payload of `revokeShare`."""

    revoked_share_id: strawberry.ID = strawberry.field(description="The id of the link that is gone.")
    thread: Annotated[Thread, strawberry.lazy("graph.types.thread")] = strawberry.field(
        description="The thread that it was a snapshot of."
    )
