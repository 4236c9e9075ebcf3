"""Root fields about models."""

from __future__ import annotations

import strawberry

from graph.context import Info
from graph.types.model import Model


@strawberry.type
class ModelQuery:
    """Queries."""

    @strawberry.field(
        description="The models this viewer can ask, each through the first of these: a key of the viewer's own for a "
        "provider that has it, their key for OpenRouter, a key of the operator's. The viewer's own models come first; "
        "turns that name none ask the first of the others, unless somebody chose another."
    )
    async def models(self, info: Info) -> list[Model]:
        return [Model.of(record) for record in await info.context.services.models.available(info.context.viewer)]
