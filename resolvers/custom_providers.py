"""Root fields about providers and models that users name themselves."""

from __future__ import annotations

from typing import Annotated

import strawberry

from graph.context import Info
from graph.scalars import INPUT
from graph.types.custom_provider import (
    CustomModel,
    CustomProvider,
    DeleteCustomModelInput,
    DeleteCustomModelPayload,
    DeleteCustomProviderInput,
    DeleteCustomProviderPayload,
    SaveCustomModelInput,
    SaveCustomModelPayload,
    SaveCustomProviderInput,
    SaveCustomProviderPayload,
)
from resolvers.settings import settings_of
from services.custom_providers import ModelValues, ProviderValues


@strawberry.type
class CustomProviderMutation:
    """Mutations."""

    @strawberry.mutation(
        description="Make an endpoint of the viewer's own a provider, or change the one of this slug. A viewer has at "
        "most 20."
    )
    async def save_custom_provider(
        self,
        info: Info,
        input: Annotated[SaveCustomProviderInput, INPUT],  # noqa: A002
    ) -> SaveCustomProviderPayload:
        values = ProviderValues(
            slug=input.slug,
            name=input.name,
            base_url=input.base_url,
            format=input.format.name,
            key=None if input.key is strawberry.UNSET else input.key,
            key_given=input.key is not strawberry.UNSET,
        )
        service, viewer = info.context.services.custom_providers, info.context.viewer
        saved = await service.save_provider(viewer, values)
        return SaveCustomProviderPayload(
            custom_provider=CustomProvider.of(saved.record, (await service.find(viewer)).models),
            key_dropped=saved.key_dropped,
            settings=await settings_of(info),
        )

    @strawberry.mutation(description="Delete a provider of the viewer's own, with its models and its key.")
    async def delete_custom_provider(
        self,
        info: Info,
        input: Annotated[DeleteCustomProviderInput, INPUT],  # noqa: A002
    ) -> DeleteCustomProviderPayload:
        await info.context.services.custom_providers.delete_provider(info.context.viewer, input.slug)
        return DeleteCustomProviderPayload(deleted_slug=input.slug, settings=await settings_of(info))

    @strawberry.mutation(
        description="Add a model to a provider, the viewer's own or one that the server knows, or change the one of "
        "this provider and vendor's name. A viewer has at most 100."
    )
    async def save_custom_model(
        self,
        info: Info,
        input: Annotated[SaveCustomModelInput, INPUT],  # noqa: A002
    ) -> SaveCustomModelPayload:
        values = ModelValues(
            provider=input.provider,
            vendor_name=input.vendor_name,
            name=input.name,
            abilities={ability.name for ability in input.abilities},
            context_tokens=input.context_tokens,
            max_output_tokens=input.max_output_tokens,
        )
        record = await info.context.services.custom_providers.save_model(info.context.viewer, values)
        return SaveCustomModelPayload(custom_model=CustomModel.of(record), settings=await settings_of(info))

    @strawberry.mutation(description="Delete a model of the viewer's own.")
    async def delete_custom_model(
        self,
        info: Info,
        input: Annotated[DeleteCustomModelInput, INPUT],  # noqa: A002
    ) -> DeleteCustomModelPayload:
        await info.context.services.custom_providers.delete_model(info.context.viewer, input.model_id)
        return DeleteCustomModelPayload(
            deleted_model_id=strawberry.ID(input.model_id), settings=await settings_of(info)
        )
