"""Root fields about attachments."""

from __future__ import annotations

from typing import Annotated

import strawberry

from graph.context import Info
from graph.scalars import INPUT, UploadedFile, key_of
from graph.types.attachment import (
    Attachment,
    AttachmentConnection,
    CompleteUploadInput,
    CompleteUploadPayload,
    CreateUploadInput,
    CreateUploadPayload,
    DeleteAttachmentInput,
    DeleteAttachmentPayload,
    UploadAttachmentInput,
    UploadAttachmentPayload,
)
from graph.types.connection import After, Before, First, Last
from models.ids import IdKind
from services.paging import AttachmentPosition, page_request


@strawberry.type
class AttachmentQuery:
    """Queries."""

    @strawberry.field(description="The viewer's files, newest first.")
    async def attachments(
        self, info: Info, first: First = None, after: After = None, last: Last = None, before: Before = None
    ) -> AttachmentConnection:
        viewer = info.context.viewer
        request = page_request(AttachmentPosition.parse, first, after, last, before)
        return AttachmentConnection(page=await info.context.services.attachments.page(viewer, request))


@strawberry.type
class AttachmentMutation:
    """Mutations."""

    @strawberry.mutation(description="Take in a file of this request. For large ones see `createUpload`.")
    async def upload_attachment(
        self,
        info: Info,
        input: Annotated[UploadAttachmentInput, INPUT],  # noqa: A002
    ) -> UploadAttachmentPayload:
        viewer = info.context.viewer
        file: UploadedFile = input.file
        record = await info.context.services.attachments.upload(
            viewer,
            file.chunks,
            name=file.name if input.name is None else input.name,
            content_type=file.content_type,
        )
        return UploadAttachmentPayload(attachment=Attachment.of(record))

    @strawberry.mutation(
        description="Make room for a file that is sent to the storage directly, by the link in the answer. "
        "`POST /attachments` takes files, too, with the token and the file as the body."
    )
    async def create_upload(self, info: Info, input: Annotated[CreateUploadInput, INPUT]) -> CreateUploadPayload:  # noqa: A002
        viewer = info.context.viewer
        upload = await info.context.services.attachments.reserve(
            viewer, name=input.name, content_type=input.content_type, size=input.size
        )
        return CreateUploadPayload.of(upload)

    @strawberry.mutation(
        description="Take in a file that was sent to the storage: it is looked at, and can be put into messages."
    )
    async def complete_upload(self, info: Info, input: Annotated[CompleteUploadInput, INPUT]) -> CompleteUploadPayload:  # noqa: A002
        viewer = info.context.viewer
        attachment_id = key_of(IdKind.ATTACHMENT, input.attachment_id, field="attachmentId")
        record = await info.context.services.attachments.complete(viewer, attachment_id)
        return CompleteUploadPayload(attachment=Attachment.of(record))

    @strawberry.mutation(
        description="Delete a file. Messages that it was sent with remember its name. Links that show it are snapshots "
        "with a file of their own: revoke them as well."
    )
    async def delete_attachment(
        self,
        info: Info,
        input: Annotated[DeleteAttachmentInput, INPUT],  # noqa: A002
    ) -> DeleteAttachmentPayload:
        viewer = info.context.viewer
        attachment_id = key_of(IdKind.ATTACHMENT, input.attachment_id, field="attachmentId")
        await info.context.services.attachments.delete(viewer, attachment_id)
        return DeleteAttachmentPayload(deleted_attachment_id=input.attachment_id)
