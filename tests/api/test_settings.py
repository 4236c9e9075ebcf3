"""updateSettings: what is given is changed and nothing else, whoever changes what else at the same time."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from models.ids import new_id
from server.runtime import Server
from services import personalization
from tests.accounts import key_of
from tests.client import Client, GraphQLErrors

SETTINGS = "defaultModel { id } titleModel { id } personalization { name traits context }"
UPDATE = f"mutation($input: UpdateSettingsInput!) {{ updateSettings(input: $input) {{ settings {{ {SETTINGS} }} }} }}"
NOTHING = {
    "defaultModel": None,
    "titleModel": None,
    "personalization": {"name": None, "traits": None, "context": None},
}


async def update(client: Client, **given: Any) -> dict[str, Any]:
    settings: dict[str, Any] = (await client.run(UPDATE, {"input": given}))["updateSettings"]["settings"]
    return settings


async def settings_of(client: Client) -> dict[str, Any]:
    settings: dict[str, Any] = (await client.run(f"{{ settings {{ {SETTINGS} }} }}"))["settings"]
    return settings


async def test_at_first_nothing_is_chosen_and_choosing_nothing_changes_nothing(client: Client) -> None:
    assert await settings_of(client) == NOTHING
    assert await update(client) == NOTHING
    assert await update(client, personalization={}) == NOTHING


async def test_what_is_given_is_set_what_is_left_out_stays_and_null_takes_back(client: Client, other: Client) -> None:
    await update(client, defaultModelId="two-words", personalization={"name": "  Ada  Lovelace ", "traits": "Brief."})
    chosen = await update(client, titleModelId="title-maker", personalization={"context": "COBOL\nand more"})
    assert chosen == {
        "defaultModel": {"id": "two-words"},
        "titleModel": {"id": "title-maker"},
        "personalization": {"name": "Ada Lovelace", "traits": "Brief.", "context": "COBOL\nand more"},
    }
    assert await settings_of(client) == chosen
    assert await settings_of(other) == NOTHING
    chosen = await update(client, titleModelId=None, personalization={"name": None})
    assert chosen["titleModel"] is None
    assert chosen["personalization"] == {"name": None, "traits": "Brief.", "context": "COBOL\nand more"}
    chosen = await update(client, personalization=None)
    assert chosen == NOTHING | {"defaultModel": {"id": "two-words"}}


FIELDS: dict[str, list[Any]] = {
    "defaultModelId": ["two-words", "slow", None],
    "titleModelId": ["title-maker", "two-words", None],
    "name": ["Ada", "Grace", None],
    "traits": ["Brief.", "Long.", None],
    "context": ["COBOL", "Ada", None],
}


@pytest.mark.parametrize("seed", range(3))
async def test_devices_that_change_different_fields_at_once_lose_nothing(client: Client, seed: int) -> None:
    """Each field has one writer, which knows what it wrote last: the others have not touched it."""
    chance = random.Random(seed)
    last: dict[str, Any] = {}

    async def device(field: str) -> None:
        for _ in range(8):
            value = last[field] = chance.choice(FIELDS[field])
            given = {field: value} if field.endswith("Id") else {"personalization": {field: value}}
            settings = await update(client, **given)
            assert shown(settings)[field] == value

    def shown(settings: dict[str, Any]) -> dict[str, Any]:
        models = {"defaultModelId": settings["defaultModel"], "titleModelId": settings["titleModel"]}
        return {**{name: model and model["id"] for name, model in models.items()}, **settings["personalization"]}

    async with asyncio.TaskGroup() as devices:
        for field in FIELDS:
            devices.create_task(device(field))
    assert shown(await settings_of(client)) == last


REFUSED: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "a model that is none": ({"titleModelId": "nope"}, "MODEL_UNAVAILABLE", "titleModelId"),
    "a default that is none": ({"defaultModelId": ""}, "MODEL_UNAVAILABLE", "defaultModelId"),
    "a long name": ({"personalization": {"name": "x" * 101}}, "PAYLOAD_TOO_LARGE", "personalization.name"),
    "long traits": ({"personalization": {"traits": "x" * 1_001}}, "PAYLOAD_TOO_LARGE", "personalization.traits"),
    "a long context": ({"personalization": {"context": "x" * 4_001}}, "PAYLOAD_TOO_LARGE", "personalization.context"),
    "a blank name": ({"personalization": {"name": " \n"}}, "BAD_USER_INPUT", "personalization.name"),
    "a NUL": ({"personalization": {"traits": "a\0b"}}, "BAD_USER_INPUT", "personalization.traits"),
    "an unknown field": ({"theme": "dark"}, "BAD_USER_INPUT", None),
    "an unknown field below": ({"personalization": {"age": 3}}, "BAD_USER_INPUT", None),
    "whose they are": ({"userId": "user_" + "0" * 32}, "BAD_USER_INPUT", None),
    "a number for a name": ({"personalization": {"name": 5}}, "BAD_USER_INPUT", None),
    "a list for an object": ({"personalization": ["x", "y"]}, "BAD_USER_INPUT", None),
}


@pytest.mark.parametrize("how", REFUSED)
async def test_what_cannot_be_chosen_is_refused_with_its_field_and_changes_nothing(client: Client, how: str) -> None:
    before = await update(client, defaultModelId="two-words", personalization={"name": "Ada", "context": "COBOL"})
    given, code, field = REFUSED[how]
    good = {"name": "Grace"} if "personalization" not in given else {}
    with pytest.raises(GraphQLErrors) as refused:
        await update(client, **({"personalization": good} | given))
    assert (refused.value.code, refused.value.extensions.get("field")) == (code, field)
    assert await settings_of(client) == before


async def test_an_unknown_field_in_the_document_is_refused(client: Client) -> None:
    with pytest.raises(GraphQLErrors) as refused:
        await client.run('mutation { updateSettings(input: {theme: "dark"}) { settings { __typename } } }')
    assert refused.value.code == "GRAPHQL_VALIDATION_FAILED"


async def test_limits_count_characters_of_any_script(client: Client) -> None:
    longest = {"name": "🦉" * 100, "traits": "ñ" * 1_000, "context": "語" * 4_000}
    assert (await update(client, personalization=longest))["personalization"] == longest


async def test_what_is_told_of_a_user_is_read_by_their_id(server: Server, client: Client) -> None:
    async with server.database.acquire() as connection:
        assert personalization.instruction(await personalization.of(connection, new_id())) is None
        assert personalization.instruction(await personalization.of(connection, key_of(client))) is None
    await update(client, personalization={"name": "Ada"})
    async with server.database.acquire() as connection:
        told = personalization.instruction(await personalization.of(connection, key_of(client)))
    assert told is not None
    assert "<user-name>\nAda\n</user-name>" in told
