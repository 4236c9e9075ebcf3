"""Settings of the viewer."""

from __future__ import annotations

import strawberry

from graph.context import Info
from graph.types.custom_provider import CustomModel, CustomProvider
from graph.types.model import Model, models_of
from graph.types.provider_key import ProviderKey
from services.settings import SettingsRecord


@strawberry.type(description="What models are told of the viewer, in the viewer's own words.")
class Personalization:
    """How a user wants to be called and answered."""

    name: str | None = strawberry.field(description="What the viewer wants to be called.")
    traits: str | None = strawberry.field(description="How the viewer wants to be answered.")
    context: str | None = strawberry.field(description="What else models should know.")


@strawberry.type(description="What the viewer chose for all conversations.")
class Settings:
    """The viewer's settings."""

    record: strawberry.Private[SettingsRecord]

    @strawberry.field(
        description="The model of turns that name none and whose project names none; null: the server's default."
    )
    async def default_model(self, info: Info) -> Model | None:
        return (await models_of(info.context, [self.record.default_model]))[0]

    @strawberry.field(description="The model that titles new threads; null: the server's choice.")
    async def title_model(self, info: Info) -> Model | None:
        return (await models_of(info.context, [self.record.title_model]))[0]

    @strawberry.field(description="What models are told of the viewer.")
    def personalization(self) -> Personalization:
        told = self.record.personalization
        return Personalization(name=told.name, traits=told.traits, context=told.context)

    @strawberry.field(description="The viewer's own keys, one at most for each provider that the server knows.")
    async def provider_keys(self, info: Info) -> list[ProviderKey]:
        keys = await info.context.services.provider_keys.list(info.context.viewer)
        return [ProviderKey.of(record) for record in keys]

    @strawberry.field(description="The endpoints that the viewer named, at most 20, in the order they were made.")
    async def custom_providers(self, info: Info) -> list[CustomProvider]:
        return CustomProvider.all_of(await info.context.services.custom_providers.find(info.context.viewer))

    @strawberry.field(description="The models that the viewer named, at most 100, in the order they were made.")
    async def custom_models(self, info: Info) -> list[CustomModel]:
        own = await info.context.services.custom_providers.find(info.context.viewer)
        return [CustomModel.of(record) for record in own.models]


@strawberry.input(description="What models are told of the viewer. A field that is left out stays; null takes it back.")
class PersonalizationInput:
    """Part of the input of `updateSettings`."""

    name: str | None = strawberry.field(
        default=strawberry.UNSET,
        description="What the viewer wants to be called, at most 100 characters; white space is folded.",
    )
    traits: str | None = strawberry.field(
        default=strawberry.UNSET, description="How the viewer wants to be answered, at most 1,000 characters."
    )
    context: str | None = strawberry.field(
        default=strawberry.UNSET, description="What else models should know, at most 4,000 characters."
    )


@strawberry.input(description="Choices to make. A field that is left out stays as it is; null takes a choice back.")
class UpdateSettingsInput:
    """Input of `updateSettings`."""

    default_model_id: str | None = strawberry.field(
        default=strawberry.UNSET, description="The model for turns that name none; one of `models`."
    )
    title_model_id: str | None = strawberry.field(
        default=strawberry.UNSET, description="The model that titles new threads; one of `models`."
    )
    personalization: PersonalizationInput | None = strawberry.field(
        default=strawberry.UNSET, description="What models are told of the viewer; null takes all of it back."
    )


@strawberry.type(description="The settings after the change.")
class UpdateSettingsPayload:
    """Payload of `updateSettings`."""

    settings: Settings = strawberry.field(description="As they are now.")
