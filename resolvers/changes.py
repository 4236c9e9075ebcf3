"""The viewer's feed."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated

import strawberry

from graph.context import Info
from graph.scalars import Cursor
from graph.types.change import Change, change_of


@strawberry.type
class ChangeSubscription:
    """Subscriptions."""

    @strawberry.subscription(
        description="Everything of the viewer's that changes, in order, from `after` on. Without `after`, or with one "
        "that is older than the feed is kept, it begins with ChangesReset and goes on from now. One feed serves all "
        "tabs and devices; it never ends by itself."
    )
    async def changes(
        self,
        info: Info,
        after: Annotated[Cursor | None, strawberry.argument(description="The last cursor you saw.")] = None,
    ) -> AsyncGenerator[Change, None]:
        async with aclosing(info.context.services.changes.read(info.context.viewer, after)) as changes:
            async for change in changes:
                yield change_of(change)
