"""The account as a whole: taken away as a file, or deleted."""

from __future__ import annotations

from datetime import datetime

import strawberry


@strawberry.input(description="What to export.")
class ExportDataInput:
    """Input of `exportData`."""

    include_attachments: bool = strawberry.field(
        default=True,
        description="Whether the bytes of attachments are in the file, and not only what is known of them.",
    )


@strawberry.type(description="Where to download an export.")
class ExportDataPayload:
    """Payload of `exportData`."""

    url: str = strawberry.field(
        description="A zip with everything the viewer has, as it is when the download begins. Whoever has the link can "
        "read it; it needs no token."
    )
    expires_at: datetime = strawberry.field(
        description="When the link stops being valid; a download that runs goes on."
    )


@strawberry.input(description="The confirmation that everything is to be deleted.")
class DeleteAccountInput:
    """Input of `deleteAccount`."""

    confirmation: str = strawberry.field(description="Exactly `DELETE MY ACCOUNT`.")


@strawberry.type(description="What was deleted.")
class DeleteAccountPayload:
    """Payload of `deleteAccount`."""

    deleted_user_id: strawberry.ID = strawberry.field(description="The id of the identity that is gone.")
