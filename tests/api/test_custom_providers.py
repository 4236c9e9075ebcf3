"""Endpoints and models of users' own. CHECKLIST S55: a key goes to the host that it was entered for alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from server.runtime import Server
from services.custom_providers import MAX_MODELS, MAX_PROVIDERS, CustomProviders, ModelValues, ProviderValues
from services.errors import BadUserInputError, ForbiddenError
from tests.accounts import key_of, viewer_of
from tests.client import Client, GraphQLErrors

PROVIDER = "slug name baseUrl format lastFour problem models { modelId }"
MODEL = "modelId provider vendorName name abilities contextTokens maxOutputTokens"
SAVE = f"""
mutation($input: SaveCustomProviderInput!) {{
  saveCustomProvider(input: $input) {{ customProvider {{ {PROVIDER} }} keyDropped }}
}}
"""
SAVE_MODEL = (
    f"mutation($input: SaveCustomModelInput!) {{ saveCustomModel(input: $input) {{ customModel {{ {MODEL} }} }} }}"
)
DELETE = "mutation($slug: String!) { deleteCustomProvider(input: {slug: $slug}) { deletedSlug } }"
DELETE_MODEL = "mutation($id: String!) { deleteCustomModel(input: {modelId: $id}) { deletedModelId } }"
LIST = f"{{ settings {{ customProviders {{ {PROVIDER} }} customModels {{ {MODEL} }} }} }}"
KEY = "the-key-of-mine-1234"


@pytest.fixture
async def rows(server: Server) -> AsyncIterator[asyncpg.Connection]:
    """The server's database."""
    connection = await asyncpg.connect(server.database.url)
    yield connection
    await connection.close()


def a_provider(**changes: Any) -> dict[str, Any]:
    return {"slug": "mine", "name": "Mine", "baseUrl": "https://mine.example/v1"} | changes


def a_model(**changes: Any) -> dict[str, Any]:
    return {"provider": "mine", "vendorName": "meta/llama", "name": "Llama"} | changes


async def save(client: Client, **changes: Any) -> tuple[dict[str, Any], bool]:
    """The provider, and whether its key was dropped."""
    saved = (await client.run(SAVE, {"input": a_provider(**changes)}))["saveCustomProvider"]
    return saved["customProvider"], saved["keyDropped"]


async def save_model(client: Client, **changes: Any) -> dict[str, Any]:
    saved = (await client.run(SAVE_MODEL, {"input": a_model(**changes)}))["saveCustomModel"]
    model: dict[str, Any] = saved["customModel"]
    return model


async def listed(client: Client) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    settings = (await client.run(LIST))["settings"]
    return settings["customProviders"], settings["customModels"]


async def key_in_use(server: Server, client: Client, slug: str = "mine") -> str | None:
    """The key that a turn would send to the provider."""
    async with server.database.acquire() as connection:
        own = await server.custom_providers.of(connection, key_of(client))
        keys = await server.provider_keys.of(connection, key_of(client))
    (provider,) = [one for one in own.providers if one.slug == slug]
    assert provider.key == keys.get(f"custom:{slug}")
    return None if provider.key is None else provider.key.key


async def refusal(attempt: Any) -> tuple[str, str | None]:
    with pytest.raises(GraphQLErrors) as refused:
        await attempt
    return refused.value.code, refused.value.extensions.get("field")


async def test_a_provider_is_made_changed_and_deleted_with_its_models_and_its_key(
    server: Server, client: Client, other: Client, rows: asyncpg.Connection
) -> None:
    made, _ = await save(client, key=KEY)
    assert made == {
        "slug": "mine",
        "name": "Mine",
        "baseUrl": "https://mine.example/v1",
        "format": "CHAT_COMPLETIONS",
        "lastFour": "1234",
        "problem": None,
        "models": [],
    }
    changed, dropped = await save(client, name="Mine still", format="ANTHROPIC_MESSAGES")
    assert (changed, dropped) == (made | {"name": "Mine still", "format": "ANTHROPIC_MESSAGES"}, False)
    assert await key_in_use(server, client) == KEY
    await save_model(client)
    await save_model(client, provider="openai", vendorName="ft:mine")
    providers, models = await listed(client)
    assert providers == [changed | {"models": [{"modelId": "custom:mine/meta/llama"}]}]
    assert [model["modelId"] for model in models] == ["custom:mine/meta/llama", "custom:openai/ft:mine"]
    assert await listed(other) == ([], [])
    # It is no provider that everybody has, and not among the keys for those.
    assert (await client.run("{ settings { providerKeys { provider } } }"))["settings"]["providerKeys"] == []
    await client.run(DELETE, {"slug": "mine"})
    assert await listed(client) == ([], [models[1]])
    assert await rows.fetchval("SELECT count(*) FROM provider_keys WHERE owner_id = $1", key_of(client)) == 0
    assert await refusal(client.run(DELETE, {"slug": "mine"})) == ("NOT_FOUND", "slug")


async def test_a_key_that_is_null_is_taken_away_and_one_that_is_left_out_stays(server: Server, client: Client) -> None:
    assert (await save(client))[0]["lastFour"] is None
    assert await key_in_use(server, client) is None
    assert (await save(client, key=KEY))[0]["lastFour"] == "1234"
    assert (await save(client, name="Other"))[0]["lastFour"] == "1234"
    provider, dropped = await save(client, key=None)
    assert (provider["lastFour"], dropped) == (None, False)
    assert await key_in_use(server, client) is None


MOVES = {
    "another host": ("https://evil.example/v1", True),
    "a host below it": ("https://sub.mine.example/v1", True),
    "another port": ("https://mine.example:8443/v1", True),
    "another scheme": ("http://mine.example/v1", True),
    "the same port, said": ("https://mine.example:443/v1", False),
    "the same host in capitals": ("https://MINE.example/v1", False),
    "another path": ("https://mine.example/v2", False),
}


@pytest.mark.parametrize("how", MOVES)
async def test_a_key_is_dropped_where_the_endpoint_moves_to_another_origin(
    server: Server, client: Client, how: str
) -> None:
    base_url, drops = MOVES[how]
    await save(client, key=KEY)
    provider, dropped = await save(client, baseUrl=base_url)
    normal = base_url.lower().replace(":443", "")
    assert (provider["baseUrl"], dropped) == (normal, drops)
    assert provider["lastFour"] == (None if drops else "1234")
    assert await key_in_use(server, client) == (None if drops else KEY)
    # And it is not brought back by going back.
    _, dropped = await save(client)
    assert not dropped
    assert await key_in_use(server, client) == (None if drops else KEY)


async def test_a_key_that_comes_with_a_new_origin_is_kept(server: Server, client: Client) -> None:
    await save(client, key=KEY)
    provider, dropped = await save(client, baseUrl="https://other.example", key="another-key-5678")
    assert (provider["lastFour"], dropped) == ("5678", False)
    assert await key_in_use(server, client) == "another-key-5678"


async def test_a_moved_endpoint_without_a_key_drops_none(client: Client) -> None:
    await save(client)
    assert (await save(client, baseUrl="https://other.example"))[1] is False


async def test_a_new_provider_in_the_place_of_a_deleted_one_has_not_its_key(server: Server, client: Client) -> None:
    await save(client, key=KEY)
    await client.run(DELETE, {"slug": "mine"})
    await save(client)
    assert await key_in_use(server, client) is None


async def test_a_key_that_cannot_be_read_disables_its_provider_alone(
    server: Server, client: Client, rows: asyncpg.Connection
) -> None:
    await save(client, key=KEY)
    await save(client, slug="second", key="another-key-5678")
    await rows.execute(
        "UPDATE provider_keys SET ciphertext = '' WHERE owner_id = $1 AND provider = 'custom:mine'", key_of(client)
    )
    mine, second = (await listed(client))[0]
    assert (mine["problem"], second["problem"]) == ("This key cannot be read any more; enter it again.", None)
    assert await key_in_use(server, client) is None
    assert await key_in_use(server, client, "second") == "another-key-5678"
    assert (await save(client, key=KEY))[0]["problem"] is None


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no slug": ({"slug": ""}, "slug"),
    "capitals": ({"slug": "Mine"}, "slug"),
    "a hyphen first": ({"slug": "-a"}, "slug"),
    "a slash": ({"slug": "a/b"}, "slug"),
    "a line end": ({"slug": "a\n"}, "slug"),
    "a long slug": ({"slug": "a" * 41}, "slug"),
    "a provider of the server": ({"slug": "openai"}, "slug"),
    "no name": ({"name": " "}, "name"),
    "a long name": ({"name": "x" * 201}, "name"),
    "no address": ({"baseUrl": ""}, "baseUrl"),
    "another scheme": ({"baseUrl": "file:///etc/passwd"}, "baseUrl"),
    "a long address": ({"baseUrl": "https://a.example/" + "x" * 2_000}, "baseUrl"),
    "an empty key": ({"key": ""}, "key"),
    "a blank key": ({"key": "\t"}, "key"),
    "a key with a line end": ({"key": "a\r\nb"}, "key"),
}


@pytest.mark.parametrize("how", REFUSED)
async def test_what_cannot_be_a_provider_is_refused_and_changes_nothing(
    server: Server, client: Client, how: str
) -> None:
    await save(client, key=KEY)
    before = await listed(client)
    changes, field = REFUSED[how]
    code, at = await refusal(save(client, **{"name": "Changed"} | changes))
    assert code in ("BAD_USER_INPUT", "PAYLOAD_TOO_LARGE")
    assert at == field
    assert await listed(client) == before
    assert await key_in_use(server, client) == KEY


REFUSED_MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "no provider": ({"provider": ""}, "provider"),
    "an unknown provider": ({"provider": "nobody"}, "provider"),
    "a provider that is none": ({"provider": "a\0b"}, "provider"),
    "no vendor's name": ({"vendorName": ""}, "vendorName"),
    "a long vendor's name": ({"vendorName": "x" * 201}, "vendorName"),
    "no name": ({"name": ""}, "name"),
    "no context": ({"contextTokens": 0}, "contextTokens"),
    "less than no output": ({"maxOutputTokens": -1}, "maxOutputTokens"),
}


@pytest.mark.parametrize("how", REFUSED_MODELS)
async def test_what_cannot_be_a_model_is_refused_and_changes_nothing(client: Client, how: str) -> None:
    await save(client)
    before = await listed(client)
    changes, field = REFUSED_MODELS[how]
    code, at = await refusal(save_model(client, **changes))
    assert code in ("BAD_USER_INPUT", "PAYLOAD_TOO_LARGE")
    assert at == field
    assert await listed(client) == before


async def test_a_model_is_changed_by_its_provider_and_vendors_name_and_deleted_by_its_id(client: Client) -> None:
    await save(client)
    made = await save_model(client, abilities=["TOOLS", "VISION", "TOOLS"], contextTokens=128_000)
    assert made == {
        "modelId": "custom:mine/meta/llama",
        "provider": "mine",
        "vendorName": "meta/llama",
        "name": "Llama",
        "abilities": ["VISION", "TOOLS"],
        "contextTokens": 128_000,
        "maxOutputTokens": None,
    }
    changed = await save_model(client, name="Llama 2", maxOutputTokens=1)
    assert changed == made | {"name": "Llama 2", "abilities": [], "contextTokens": None, "maxOutputTokens": 1}
    assert (await listed(client))[1] == [changed]
    data = await client.run(DELETE_MODEL, {"id": "custom:mine/meta/llama"})
    assert data["deleteCustomModel"] == {"deletedModelId": "custom:mine/meta/llama"}
    assert (await listed(client))[1] == []
    for gone in ("custom:mine/meta/llama", "mine/meta/llama", "custom:", "two-words", ""):
        assert await refusal(client.run(DELETE_MODEL, {"id": gone})) == ("NOT_FOUND", "modelId")


async def test_there_are_at_most_so_many_also_when_they_come_at_once(
    server: Server, client: Client, rows: asyncpg.Connection
) -> None:
    service, viewer = server.custom_providers, viewer_of(client)
    attempts = [
        service.save_provider(
            viewer, ProviderValues(slug=f"p{n}", name="x", base_url="https://a.example", format="CHAT_COMPLETIONS")
        )
        for n in range(MAX_PROVIDERS + 3)
    ]
    outcomes = await asyncio.gather(*attempts, return_exceptions=True)
    refused = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    assert [type(outcome) for outcome in refused] == [BadUserInputError] * 3
    providers, _ = await listed(client)
    assert len(providers) == MAX_PROVIDERS
    assert (await save(client, slug=providers[0]["slug"], name="Still changed"))[0]["name"] == "Still changed"
    await rows.execute(
        "INSERT INTO custom_models (id, owner_id, provider, vendor_name, name, abilities) "
        "SELECT gen_random_uuid(), $1, 'openai', 'm' || n, 'x', '{}' FROM generate_series(3, $2::int) n",
        key_of(client),
        MAX_MODELS,
    )
    models = [
        service.save_model(viewer, ModelValues(provider="openai", vendor_name=f"m{n}", name="x")) for n in range(5)
    ]
    saved = await asyncio.gather(*models, return_exceptions=True)
    assert len((await listed(client))[1]) == MAX_MODELS
    # Two of them were there already.
    assert sum(isinstance(outcome, BadUserInputError) for outcome in saved) == 1
    await save_model(client, provider="openai", vendorName="m50", name="Changed")


async def test_the_same_provider_made_by_two_devices_at_once_is_one(client: Client) -> None:
    saved = await asyncio.gather(*(save(client, name=f"Device {n}", key=f"key-of-device-{n}") for n in range(6)))
    (provider,), _ = await listed(client)
    assert provider in [one for one, _ in saved]


async def test_where_the_operator_does_not_allow_them_nothing_of_theirs_is_used_and_all_can_be_deleted(
    server: Server, client: Client
) -> None:
    await save(client, key=KEY)
    await save_model(client)
    await save_model(client, provider="openai", vendorName="ft:mine")

    async def check(url: str, look_up: bool) -> str:
        return url

    closed = CustomProviders(
        server.database, server.provider_keys, lambda: ("openai",), check_endpoint=check, allowed=False
    )
    viewer = viewer_of(client)
    with pytest.raises(ForbiddenError):
        await closed.save_provider(
            viewer, ProviderValues(slug="mine", name="x", base_url="https://a.example", format="CHAT_COMPLETIONS")
        )
    with pytest.raises(ForbiddenError):
        await closed.save_model(viewer, ModelValues(provider="mine", vendor_name="y", name="x"))
    async with server.database.acquire() as connection:
        own = await closed.of(connection, viewer.id)
    assert own.providers == ()
    assert [model.model_id for model in own.models] == ["custom:openai/ft:mine"]
    assert len((await closed.find(viewer)).providers) == 1
    await closed.delete_model(viewer, "custom:mine/meta/llama")
    await closed.delete_provider(viewer, "mine")
    assert (await listed(client))[0] == []


async def test_the_address_is_kept_as_the_check_gives_it_and_refused_in_its_words(
    server: Server, client: Client
) -> None:
    async def check(url: str, look_up: bool) -> str:
        if "inside" in url:
            raise ValueError("The base address must lead to a server on the public internet.")
        return url.lower().rstrip("/")

    service = CustomProviders(server.database, server.provider_keys, tuple, check_endpoint=check, allowed=True)

    def values(base_url: str) -> ProviderValues:
        return ProviderValues(slug="mine", name="x", base_url=base_url, format="CHAT_COMPLETIONS")

    saved = await service.save_provider(viewer_of(client), values("https://A.example/"))
    assert saved.record.base_url == "https://a.example"
    with pytest.raises(BadUserInputError) as refused:
        await service.save_provider(viewer_of(client), values("https://inside.example"))
    assert refused.value.field == "baseUrl"
    assert refused.value.message == "The base address must lead to a server on the public internet."
