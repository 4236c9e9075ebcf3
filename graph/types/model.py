"""Models."""

from __future__ import annotations

import strawberry

from providers.registry import ModelRecord, ModelRegistry


@strawberry.type(description="A model that answers.")
class Model:
    """A model of the registry, or one that wrote an answer and is not offered any more."""

    id: strawberry.ID = strawberry.field(description="What `modelId` arguments take.")
    name: str = strawberry.field(description="The name to show.")
    provider: str = strawberry.field(description="Through which provider it is asked; empty where it is gone.")

    @classmethod
    def of(cls, record: ModelRecord) -> Model:
        """From the registry."""
        return cls(id=strawberry.ID(record.id), name=record.name, provider=record.provider)

    @classmethod
    def gone(cls, model_id: str) -> Model:
        """A model that the registry does not know any more."""
        return cls(id=strawberry.ID(model_id), name=model_id, provider="")


def model_of(models: ModelRegistry, model_id: str | None) -> Model | None:
    """The model of this id, offered or gone; None for no id."""
    if model_id is None:
        return None
    record = models.find(model_id)
    return Model.of(record) if record else Model.gone(model_id)
