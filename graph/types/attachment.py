"""Attachments: files of the viewer."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from enum import Enum

import strawberry

from graph.context import Info
from graph.scalars import Cursor
from graph.scalars import Upload as UploadScalar
from graph.types.connection import PageInfo, page_info
from graph.types.node import Node, RecordView
from models.ids import IdKind
from models.records import AttachmentRecord
from services.attachments import Upload
from services.paging import AttachmentPosition, Page


@strawberry.enum(description="Where an attachment stands.")
class AttachmentState(Enum):
    """The states of an attachment."""

    RESERVED = strawberry.enum_value("RESERVED", description="Its bytes are awaited: send them, then `completeUpload`.")
    STORED = strawberry.enum_value(
        "STORED", description="There, and in no message yet; deleted after a day unless the operator chose otherwise."
    )
    LINKED = strawberry.enum_value("LINKED", description="In a message; deleted with the last one.")


@strawberry.type(description="A file of the viewer's.")
class Attachment(RecordView, Node):
    """An attachment."""

    kind = IdKind.ATTACHMENT
    record: strawberry.Private[AttachmentRecord]
    name: str = strawberry.field(description="Its name, without folders; for people, and told to models.")
    content_type: str = strawberry.field(
        description="What its content was found to be: image/png, image/jpeg, image/gif, image/webp, application/pdf, "
        "text/plain, or application/octet-stream. Of a RESERVED one, what was announced."
    )
    size: int = strawberry.field(description="Bytes.")
    state: AttachmentState = strawberry.field(description="Where it stands.")
    tokens: int | None = strawberry.field(description="About how many tokens a model reads; null where it is no text.")
    pages: int | None = strawberry.field(description="Pages of a PDF; null where they could not be counted.")
    width: int | None = strawberry.field(description="Width of an image in pixels.")
    height: int | None = strawberry.field(description="Height of an image in pixels.")
    created_at: datetime = strawberry.field(description="When its upload was begun.")

    @strawberry.field(
        description="A link to the file that lives for minutes; made anew with every reading. Whoever has it can read "
        "the file. Null while it is RESERVED. `/attachments/<id>` with your token leads there, too."
    )
    async def url(self, info: Info) -> str | None:
        return await info.context.services.attachments.url(self.record)


@strawberry.type(description="An attachment in its place in the list.")
class AttachmentEdge:
    """An edge."""

    node: Attachment = strawberry.field(description="The attachment.")

    @strawberry.field(description="This place.")
    def cursor(self) -> Cursor:
        return Cursor(_place(self.node.record))


@strawberry.type(description="A page of attachments, newest first.")
class AttachmentConnection:
    """A connection of attachments."""

    page: strawberry.Private[Page[AttachmentRecord]]

    @strawberry.field(description="The attachments with their places.")
    def edges(self) -> list[AttachmentEdge]:
        return [AttachmentEdge(node=attachment) for attachment in Attachment.of_each(self.page.records)]

    @strawberry.field(description="Where this page lies.")
    def page_info(self) -> PageInfo:
        return page_info(self.page, _place)

    @strawberry.field(description="The attachments without their places.")
    def nodes(self) -> Sequence[Attachment]:
        return Attachment.of_each(self.page.records)


def _place(record: AttachmentRecord) -> str:
    return AttachmentPosition(record.id).cursor()


@strawberry.input(description="A file in the request itself.")
class UploadAttachmentInput:
    """Input of `uploadAttachment`."""

    file: UploadScalar = strawberry.field(description="The file.")
    name: str | None = strawberry.field(default=None, description="Its name; null takes the one it was sent with.")


@strawberry.type(description="The file that was taken in.")
class UploadAttachmentPayload:
    """Payload of `uploadAttachment`."""

    attachment: Attachment = strawberry.field(description="STORED, with what was found out about it.")


@strawberry.input(description="A file that will be sent to the storage directly.")
class CreateUploadInput:
    """Input of `createUpload`."""

    name: str = strawberry.field(description="Its name. Folders and control characters are left out of it.")
    content_type: str = strawberry.field(
        description="What it is. For an image or a PDF it has to be true; else what the content is counts."
    )
    size: int = strawberry.field(description="Exactly how many bytes it has.")


@strawberry.type(description="A header to send.")
class UploadHeader:
    """A header of the upload."""

    name: str = strawberry.field(description="Its name.")
    value: str = strawberry.field(description="Its value, exactly.")


@strawberry.type(description="Where to send a file: its bytes as the body, with these headers. Then `completeUpload`.")
class CreateUploadPayload:
    """Payload of `createUpload`."""

    attachment: Attachment = strawberry.field(description="RESERVED until `completeUpload`.")
    url: str = strawberry.field(description="Where to.")
    method: str = strawberry.field(description="The HTTP method.")
    headers: list[UploadHeader] = strawberry.field(
        description="One: the content type. Content-Length is sent by itself."
    )
    expires_at: datetime = strawberry.field(description="Until when the upload may begin.")

    @classmethod
    def of(cls, upload: Upload) -> CreateUploadPayload:
        """From the service's upload."""
        return cls(
            attachment=Attachment.of(upload.record),
            url=upload.url,
            method="PUT",
            headers=[UploadHeader(name="Content-Type", value=upload.content_type)],
            expires_at=upload.expires_at,
        )


@strawberry.input(description="A file that was sent to the storage.")
class CompleteUploadInput:
    """Input of `completeUpload`."""

    attachment_id: strawberry.ID = strawberry.field(description="The attachment of `createUpload`.")


@strawberry.type(description="The file that was taken in.")
class CompleteUploadPayload:
    """Payload of `completeUpload`."""

    attachment: Attachment = strawberry.field(description="STORED, with what was found out about it.")


@strawberry.input(description="An attachment to delete.")
class DeleteAttachmentInput:
    """Input of `deleteAttachment`."""

    attachment_id: strawberry.ID = strawberry.field(description="The attachment.")


@strawberry.type(description="What was deleted.")
class DeleteAttachmentPayload:
    """Payload of `deleteAttachment`."""

    deleted_attachment_id: strawberry.ID = strawberry.field(description="The id of the attachment that is gone.")
