"""Root fields about the viewer's settings."""

from __future__ import annotations

from typing import Annotated

import strawberry

from graph.context import Info
from graph.scalars import INPUT
from graph.types.settings import Settings, UpdateSettingsInput, UpdateSettingsPayload
from services.settings import SettingsRecord


@strawberry.type
class SettingsQuery:
    """Queries."""

    @strawberry.field(description="What the viewer chose for all conversations.")
    async def settings(self, info: Info) -> Settings:
        return Settings(record=await info.context.services.settings.find(info.context.viewer))


@strawberry.type
class SettingsMutation:
    """Mutations."""

    @strawberry.mutation(description="Change the viewer's choices: those that are given, and no other.")
    async def update_settings(self, info: Info, input: Annotated[UpdateSettingsInput, INPUT]) -> UpdateSettingsPayload:  # noqa: A002
        viewer = info.context.viewer
        values: dict[str, str | None] = {}
        if input.default_model_id is not strawberry.UNSET:
            values["default_model"] = input.default_model_id
        record = await info.context.services.settings.update(viewer, SettingsRecord(**values), set(values))
        return UpdateSettingsPayload(settings=Settings(record=record))
