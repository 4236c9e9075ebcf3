"""Who is asking."""

from __future__ import annotations

from datetime import datetime

import strawberry

from models.ids import IdKind, outside_id
from services.viewer import Viewer as ViewerIdentity


@strawberry.type(description="The identity that the request's token stands for.")
class Viewer:
    """The viewer."""

    id: strawberry.ID = strawberry.field(description="The viewer's own id.")
    anonymous: bool = strawberry.field(description="Whether this is an anonymous session.")

    @classmethod
    def of(cls, viewer: ViewerIdentity) -> Viewer:
        """From a verified token."""
        return cls(id=strawberry.ID(outside_id(IdKind.USER, viewer.id)), anonymous=viewer.anonymous)


@strawberry.type(description="A new identity without sign-in.")
class AnonymousSession:
    """What `startAnonymousSession` hands out."""

    token: str = strawberry.field(
        description="Send it as `Authorization: Bearer <token>`. Whoever has it is the viewer."
    )
    expires_at: datetime = strawberry.field(description="When the token stops being valid.")
    viewer: Viewer = strawberry.field(description="The new identity.")


@strawberry.input(description="Whose data to claim.")
class ClaimAnonymousDataInput:
    """The input of `claimAnonymousData`."""

    token: str = strawberry.field(description="The token of the anonymous session, as it was handed out.")


@strawberry.type(description="What was claimed.")
class ClaimAnonymousDataPayload:
    """The result of `claimAnonymousData`."""

    viewer: Viewer = strawberry.field(description="The signed-in viewer, who owns it now.")
    thread_count: int = strawberry.field(description="How many threads came over.")
