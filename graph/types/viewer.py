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
