"""Root fields about the account as a whole."""

from __future__ import annotations

from typing import Annotated

import strawberry

from graph.context import Info
from graph.scalars import INPUT
from graph.types.account import DeleteAccountInput, DeleteAccountPayload, ExportDataInput, ExportDataPayload
from models.ids import IdKind, outside_id


@strawberry.type
class AccountMutation:
    """Mutations."""

    @strawberry.mutation(
        description="A link to download everything the viewer has, as one file. `POST /import` takes it in again."
    )
    async def export_data(self, info: Info, input: Annotated[ExportDataInput, INPUT]) -> ExportDataPayload:  # noqa: A002
        viewer = info.context.viewer
        link = await info.context.services.exports.link(viewer, include_attachments=input.include_attachments)
        return ExportDataPayload(url=link.url, expires_at=link.expires_at)

    @strawberry.mutation(
        description="Delete the viewer's account with everything in it, for ever. Answers being written are stopped. A "
        "large account is gone some moments after this returns; nothing can be begun in it any more."
    )
    async def delete_account(self, info: Info, input: Annotated[DeleteAccountInput, INPUT]) -> DeleteAccountPayload:  # noqa: A002
        viewer = info.context.viewer
        await info.context.services.accounts.delete(viewer, input.confirmation)
        info.context.services.identities.forget(viewer.id)
        return DeleteAccountPayload(deleted_user_id=strawberry.ID(outside_id(IdKind.USER, viewer.id)))
