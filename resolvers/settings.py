"""Root fields about the viewer's settings."""

from __future__ import annotations

from typing import Annotated

import strawberry

from graph.context import Info
from graph.scalars import INPUT
from graph.types.settings import PersonalizationInput, Settings, UpdateSettingsInput, UpdateSettingsPayload
from services.settings import SettingsRecord

_PERSONAL = {"name": "user_name", "traits": "user_traits", "context": "user_context"}


@strawberry.type
class SettingsQuery:
    """Queries."""

    @strawberry.field(description="What the viewer chose for all conversations.")
    async def settings(self, info: Info) -> Settings:
        return await settings_of(info)


@strawberry.type
class SettingsMutation:
    """Mutations."""

    @strawberry.mutation(description="Change the viewer's choices: those that are given, and no other.")
    async def update_settings(self, info: Info, input: Annotated[UpdateSettingsInput, INPUT]) -> UpdateSettingsPayload:  # noqa: A002
        viewer = info.context.viewer
        values: dict[str, str | None] = {}
        if input.default_model_id is not strawberry.UNSET:
            values["default_model"] = input.default_model_id
        if input.title_model_id is not strawberry.UNSET:
            values["title_model"] = input.title_model_id
        if input.personalization is not strawberry.UNSET:
            values |= _personal(input.personalization)
        record = await info.context.services.settings.update(viewer, SettingsRecord(**values), set(values))
        return UpdateSettingsPayload(settings=Settings(record=record))


async def settings_of(info: Info) -> Settings:
    """The viewer's settings as they are now."""
    return Settings(record=await info.context.services.settings.find(info.context.viewer))


def _personal(given: PersonalizationInput | None) -> dict[str, str | None]:
    """The values that were given; for null, all are taken back."""
    if given is None:
        return dict.fromkeys(_PERSONAL.values())
    values = {inside: getattr(given, outside) for outside, inside in _PERSONAL.items()}
    return {name: value for name, value in values.items() if value is not strawberry.UNSET}
