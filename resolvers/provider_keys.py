"""Root fields about users' own keys."""

from __future__ import annotations

from typing import Annotated

import strawberry

from graph.context import Info
from graph.scalars import INPUT
from graph.types.provider_key import (
    DeleteProviderKeyInput,
    DeleteProviderKeyPayload,
    ProviderKey,
    SetProviderKeyInput,
    SetProviderKeyPayload,
)
from resolvers.settings import settings_of


@strawberry.type
class ProviderKeyMutation:
    """Mutations."""

    @strawberry.mutation(
        description="Keep a key of the viewer's own for a provider, in the place of one that there is. It is encrypted "
        "for this viewer and provider, and never shown again."
    )
    async def set_provider_key(self, info: Info, input: Annotated[SetProviderKeyInput, INPUT]) -> SetProviderKeyPayload:  # noqa: A002
        record = await info.context.services.provider_keys.set(info.context.viewer, input.provider, input.key)
        return SetProviderKeyPayload(provider_key=ProviderKey.of(record), settings=await settings_of(info))

    @strawberry.mutation(description="Forget the viewer's key for a provider.")
    async def delete_provider_key(
        self,
        info: Info,
        input: Annotated[DeleteProviderKeyInput, INPUT],  # noqa: A002
    ) -> DeleteProviderKeyPayload:
        await info.context.services.provider_keys.delete(info.context.viewer, input.provider)
        return DeleteProviderKeyPayload(deleted_provider=input.provider, settings=await settings_of(info))
