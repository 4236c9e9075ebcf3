"""Models."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import strawberry

from graph.batching import unique
from graph.context import Context, Info
from graph.scalars import BigInt
from models.prices import ModelPrices as StoredPrices
from providers.catalog import Ability
from providers.registry import CUSTOM, ModelRecord


@strawberry.enum(description="What a model can do beyond answering text with text.")
class ModelAbility(Enum):
    """The abilities of models."""

    VISION = strawberry.enum_value("VISION", description="It sees images that are sent along.")
    PDF = strawberry.enum_value("PDF", description="It reads PDF files that are sent along.")
    REASONING = strawberry.enum_value("REASONING", description="It may think before it answers, and show it.")
    EFFORT = strawberry.enum_value("EFFORT", description="How much it thinks can be chosen by `reasoningEffort`.")
    TOOLS = strawberry.enum_value("TOOLS", description="It can call tools.")
    IMAGE_OUTPUT = strawberry.enum_value("IMAGE_OUTPUT", description="It answers with images, too.")


_ABILITIES = {ability: ModelAbility[ability.name] for ability in Ability}


@strawberry.type(description="What a model costs, in millionths of the operator's currency for a million tokens.")
class ModelPrices:
    """Prices."""

    prompt: BigInt = strawberry.field(description="Tokens of the history that is sent.")
    cached: BigInt = strawberry.field(description="Those of them that the provider has in its cache.")
    completion: BigInt = strawberry.field(description="Tokens that the model writes, its reasoning among them.")

    @classmethod
    def of(cls, prices: StoredPrices) -> ModelPrices:
        """From the registry's."""
        return cls(prompt=BigInt(prices.prompt), cached=BigInt(prices.cached), completion=BigInt(prices.completion))


@strawberry.type(description="A model that answers.")
class Model:
    """A model of the registry or of a user, or one that wrote an answer and is not offered any more."""

    id: strawberry.ID = strawberry.field(description="What `modelId` arguments take.")
    name: str = strawberry.field(description="The name to show.")
    provider: str = strawberry.field(
        description="Through which provider it is asked: in `models` the one that the viewer's keys lead to, elsewhere "
        "the first that has it. Empty where it is gone."
    )
    own_key: bool = strawberry.field(description="Whether a key of the viewer's own leads to it; told by `models`.")
    custom: bool = strawberry.field(description="Whether the viewer made it.")
    abilities: list[ModelAbility] | None = strawberry.field(description="What it can do; null where nobody said.")
    context_tokens: int | None = strawberry.field(
        description="Most tokens that a request and its answer may have together, where it is known."
    )
    max_output_tokens: int | None = strawberry.field(description="Most tokens of one answer, where it is known.")
    prices: ModelPrices | None = strawberry.field(description="What it costs, where it is known.")

    @classmethod
    def of(cls, record: ModelRecord) -> Model:
        """From the registry."""
        abilities = record.abilities
        return cls(
            id=strawberry.ID(record.id),
            name=record.name,
            provider=record.provider,
            own_key=record.own_key,
            custom=record.custom,
            abilities=None
            if abilities is None
            else [_ABILITIES[ability] for ability in Ability if ability in abilities],
            context_tokens=record.context_tokens,
            max_output_tokens=record.max_output_tokens,
            prices=None if record.prices is None else ModelPrices.of(record.prices),
        )

    @classmethod
    def gone(cls, model_id: str) -> Model:
        """A model that nobody knows any more, or that somebody else made."""
        return cls(
            id=strawberry.ID(model_id),
            name=gone_name(model_id),
            provider="",
            own_key=False,
            custom=model_id.startswith(CUSTOM),
            abilities=None,
            context_tokens=None,
            max_output_tokens=None,
            prices=None,
        )


def gone_name(model_id: str) -> str:
    """The name of a model that nobody knows any more: what its provider called it."""
    return model_id.partition("/")[2] if model_id.startswith(CUSTOM) else model_id


async def models_of(context: Context, ids: Sequence[str | None]) -> list[Model | None]:
    """The models of these ids, offered or gone; None for no id. Only those that a viewer made take a query."""
    own = unique([model_id for model_id in ids if model_id is not None and model_id.startswith(CUSTOM)])
    found: dict[str | None, Model | None] = {None: None}
    if own and context.viewer_or_none is not None:
        records = await context.services.models.describe_many(context.viewer, own)
        found |= {key: None if one is None else Model.of(one) for key, one in zip(own, records, strict=True)}
    registry = context.services.models.registry
    for model_id in ids:
        if model_id is not None and found.get(model_id) is None:
            offered = None if model_id.startswith(CUSTOM) else registry.find(model_id)
            found[model_id] = Model.of(offered) if offered else Model.gone(model_id)
    return [found[model_id] for model_id in ids]


def shared_model_of(info: Info, model_id: str | None) -> Model | None:
    """The model of a message in a share: of one that its owner made, no more than what its provider calls it."""
    if model_id is None:
        return None
    record = info.context.services.models.registry.find(model_id)
    return Model.of(record) if record else Model.gone(gone_name(model_id))
