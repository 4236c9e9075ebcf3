"""Settings of the viewer."""

from __future__ import annotations

import strawberry

from graph.context import Info
from graph.types.model import Model, model_of
from services.settings import SettingsRecord


@strawberry.type(description="What the viewer chose for all conversations.")
class Settings:
    """The viewer's settings."""

    record: strawberry.Private[SettingsRecord]

    @strawberry.field(
        description="The model of turns that name none and whose project names none; null: the server's default."
    )
    def default_model(self, info: Info) -> Model | None:
        return model_of(info, self.record.default_model)


@strawberry.input(description="Choices to make. A field that is left out stays as it is; null takes a choice back.")
class UpdateSettingsInput:
    """Input of `updateSettings`."""

    default_model_id: str | None = strawberry.field(
        default=strawberry.UNSET, description="The model for turns that name none; one of `models`."
    )


@strawberry.type(description="The settings after the change.")
class UpdateSettingsPayload:
    """Payload of `updateSettings`."""

    settings: Settings = strawberry.field(description="As they are now.")
