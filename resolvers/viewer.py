"""Root fields about who is asking."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import strawberry

from graph.context import Info
from graph.scalars import INPUT
from graph.types.viewer import AnonymousSession, ClaimAnonymousDataInput, ClaimAnonymousDataPayload, Viewer


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
        session = await info.context.services.sessions.start_anonymous(info.context.address)
        return AnonymousSession(
            token=session.token,
            expires_at=datetime.fromtimestamp(session.viewer.expires_at, UTC),
            viewer=Viewer.of(session.viewer),
        )

    @strawberry.mutation(
        description="Make what an anonymous session owns the signed-in viewer's, once: threads, projects, shares and "
        "usage. Answers being written in it are stopped first, and its token is good no more. An anonymous session "
        "cannot claim."
    )
    async def claim_anonymous_data(
        self,
        info: Info,
        input: Annotated[ClaimAnonymousDataInput, INPUT],  # noqa: A002
    ) -> ClaimAnonymousDataPayload:
        viewer = info.context.viewer
        claimed = await info.context.services.claims.claim(viewer, input.token)
        return ClaimAnonymousDataPayload(viewer=Viewer.of(viewer), thread_count=claimed.threads)
