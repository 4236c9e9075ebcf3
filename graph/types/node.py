"""What every object with an id shares."""

from __future__ import annotations

import strawberry


@strawberry.interface(description="An object with an id of its own, found again by `node`.")
class Node:
    """The Node interface of the GraphQL Global Object Identification specification."""

    id: strawberry.ID = strawberry.field(description="Opaque and unique among all objects.")
