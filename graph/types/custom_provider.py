"""Providers and models that users name themselves."""

from __future__ import annotations

from datetime import datetime
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import strawberry

from graph.types.model import ModelAbility
from services.custom_providers import CustomModelRecord, CustomProviderRecord, OwnProviders

if TYPE_CHECKING:
    from graph.types.settings import Settings


@strawberry.enum(description="What an endpoint speaks.")
class CustomProviderFormat(Enum):
    """The formats."""

    CHAT_COMPLETIONS = strawberry.enum_value(
        "CHAT_COMPLETIONS", description="OpenAI's chat completions, which most servers of models speak."
    )
    ANTHROPIC_MESSAGES = strawberry.enum_value("ANTHROPIC_MESSAGES", description="Anthropic's Messages.")


_FORMATS = dict(CustomProviderFormat.__members__)
_ABILITIES = dict(ModelAbility.__members__)


@strawberry.type(description="A model that the viewer named.")
class CustomModel:
    """A model on a custom provider, or on one that the server knows."""

    model_id: strawberry.ID = strawberry.field(description="What `modelId` arguments take.")
    provider: str = strawberry.field(description="The slug of a custom provider, or a name that the server knows.")
    vendor_name: str = strawberry.field(description="What the provider calls it.")
    name: str = strawberry.field(description="The name to show.")
    abilities: list[ModelAbility] = strawberry.field(description="What it can do.")
    context_tokens: int | None = strawberry.field(
        description="Most tokens that a request and its answer may have together, where it was said."
    )
    max_output_tokens: int | None = strawberry.field(description="Most tokens of one answer, where it was said.")
    created_at: datetime = strawberry.field(description="When it was made.")
    updated_at: datetime = strawberry.field(description="When it was changed last.")

    @classmethod
    def of(cls, record: CustomModelRecord) -> CustomModel:
        """From its row."""
        return cls(
            model_id=strawberry.ID(record.model_id),
            provider=record.provider,
            vendor_name=record.vendor_name,
            name=record.name,
            abilities=[_ABILITIES[ability] for ability in record.abilities],
            context_tokens=record.context_tokens,
            max_output_tokens=record.max_output_tokens,
            created_at=record.created_at,
            updated_at=record.updated_at,
        )


@strawberry.type(description="An endpoint that the viewer named.")
class CustomProvider:
    """A custom provider."""

    slug: str = strawberry.field(description="What it is known by; unique among the viewer's.")
    name: str = strawberry.field(description="The name to show.")
    base_url: str = strawberry.field(description="Where it is.")
    format: CustomProviderFormat = strawberry.field(description="What it speaks.")
    last_four: str | None = strawberry.field(
        description="The last four characters of its key; empty where that is short, null where it has none."
    )
    problem: str | None = strawberry.field(description="Why its key cannot be used, as a sentence for its owner.")
    models: list[CustomModel] = strawberry.field(description="The models named on it, at most 100.")
    created_at: datetime = strawberry.field(description="When it was made.")
    updated_at: datetime = strawberry.field(description="When it was changed last, its key aside.")

    @classmethod
    def of(cls, record: CustomProviderRecord, models: tuple[CustomModelRecord, ...]) -> CustomProvider:
        """From its row and those of all models of its owner."""
        return cls(
            slug=record.slug,
            name=record.name,
            base_url=record.base_url,
            format=_FORMATS[record.format],
            last_four=None if record.key is None else record.key.last_four,
            problem=record.problem,
            models=[CustomModel.of(model) for model in models if model.provider == record.slug],
            created_at=record.created_at,
            updated_at=record.updated_at,
        )

    @classmethod
    def all_of(cls, own: OwnProviders) -> list[CustomProvider]:
        """All of a user."""
        return [cls.of(record, own.models) for record in own.providers]


_SETTINGS = "The settings as they are now."


@strawberry.input(description="A provider to make, or to change: the one of this slug.")
class SaveCustomProviderInput:
    """Input of `saveCustomProvider`."""

    slug: str = strawberry.field(
        description="What it is known by, also in the ids of its models: 1 to 40 lower-case letters, digits and "
        "hyphens, beginning with a letter or digit. It cannot be changed."
    )
    name: str = strawberry.field(description="The name to show, at most 200 bytes; white space is folded.")
    base_url: str = strawberry.field(
        description="Where it is: a URL of http or https, such as https://models.example.com/v1."
    )
    format: CustomProviderFormat = strawberry.field(
        default=CustomProviderFormat.CHAT_COMPLETIONS, description="What it speaks."
    )
    key: str | None = strawberry.field(
        default=strawberry.UNSET,
        description="Its key, as in `setProviderKey`; null takes it away. Left out, the stored one stays, unless "
        "`baseUrl` leads to another scheme, host or port: it is dropped then.",
    )

    def __repr__(self) -> str:
        return f"SaveCustomProviderInput(slug={self.slug!r})"


@strawberry.type(description="The provider that was made or changed.")
class SaveCustomProviderPayload:
    """Payload of `saveCustomProvider`."""

    custom_provider: CustomProvider = strawberry.field(description="As it is now.")
    key_dropped: bool = strawberry.field(
        description="Whether its key was dropped, because it was entered for another scheme, host or port."
    )
    settings: Annotated[Settings, strawberry.lazy("graph.types.settings")] = strawberry.field(description=_SETTINGS)


@strawberry.input(description="A provider to delete, with its models and its key.")
class DeleteCustomProviderInput:
    """Input of `deleteCustomProvider`."""

    slug: str = strawberry.field(description="Which.")


@strawberry.type(description="The provider that is gone.")
class DeleteCustomProviderPayload:
    """Payload of `deleteCustomProvider`."""

    deleted_slug: str = strawberry.field(description="Its slug.")
    settings: Annotated[Settings, strawberry.lazy("graph.types.settings")] = strawberry.field(description=_SETTINGS)


@strawberry.input(description="A model to make, or to change: the one of this provider and vendor's name.")
class SaveCustomModelInput:
    """Input of `saveCustomModel`."""

    provider: str = strawberry.field(description="The slug of a custom provider, or a name that the server knows.")
    vendor_name: str = strawberry.field(description="What the provider calls it, at most 200 bytes.")
    name: str = strawberry.field(description="The name to show, at most 200 bytes; white space is folded.")
    abilities: list[ModelAbility] = strawberry.field(default_factory=list, description="What it can do.")
    context_tokens: int | None = strawberry.field(
        default=None, description="Most tokens that a request and its answer may have together; null: not known."
    )
    max_output_tokens: int | None = strawberry.field(
        default=None, description="Most tokens of one answer; null: not known."
    )


@strawberry.type(description="The model that was made or changed.")
class SaveCustomModelPayload:
    """Payload of `saveCustomModel`."""

    custom_model: CustomModel = strawberry.field(description="As it is now.")
    settings: Annotated[Settings, strawberry.lazy("graph.types.settings")] = strawberry.field(description=_SETTINGS)


@strawberry.input(description="A model of the viewer's own to delete.")
class DeleteCustomModelInput:
    """Input of `deleteCustomModel`."""

    model_id: str = strawberry.field(description="Which: `custom:`, its provider, a slash, and its vendor's name.")


@strawberry.type(description="The model that is gone; messages that it wrote stay.")
class DeleteCustomModelPayload:
    """Payload of `deleteCustomModel`."""

    deleted_model_id: strawberry.ID = strawberry.field(description="Its id.")
    settings: Annotated[Settings, strawberry.lazy("graph.types.settings")] = strawberry.field(description=_SETTINGS)
