"""Root fields about who is asking."""

from __future__ import annotations

from datetime import UTC, datetime

import strawberry

from graph.context import Info
from graph.types.viewer import AnonymousSession, Viewer


@strawberry.type
class ViewerQuery:
    """Queries."""

    @strawberry.field(description="The identity that the token stands for.")
    def viewer(self, info: Info) -> Viewer:
        return Viewer.of(info.context.viewer)


@strawberry.type
class ViewerMutation:
    """Mutations."""

    @strawberry.mutation(description="A new identity without sign-in, where the operator allows it. Needs no token.")
    async def start_anonymous_session(self, info: Info) -> AnonymousSession:
        session = await info.context.services.sessions.start_anonymous()
        return AnonymousSession(
            token=session.token,
            expires_at=datetime.fromtimestamp(session.viewer.expires_at, UTC),
            viewer=Viewer.of(session.viewer),
        )
