"""Root fields about models."""

from __future__ import annotations

import strawberry

from graph.context import Info
from graph.types.model import Model


@strawberry.type
class ModelQuery:
    """Queries."""

    @strawberry.field(
        description="The models this viewer can ask. Turns that name none ask the first, unless the operator chose."
    )
    def models(self, info: Info) -> list[Model]:
        assert info.context.viewer
        return [Model.of(record) for record in info.context.services.models.models]
