"""The models each user can ask, and by whose key: a vendor on a real socket tells who was asked, and with what."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from providers.guard import AllowedEndpoint
from server.runtime import Server
from tests.client import Client, GraphQLErrors, connect
from tests.conftest import make_database, test_settings
from tests.vendor_server import ReceivedRequest, VendorServer, Wire

FILE = """
[providers.openai]
base_url = "{address}/openai"
[providers.openrouter]
base_url = "{address}/openrouter"
[providers.house]
name = "In house"
format = "chat-completions"
base_url = "{address}/house"
needs_key = false

[models.both]
name = "Both"
abilities = ["vision", "effort"]
context_tokens = 4_000
max_output_tokens = 1_000
prices = {{ prompt = 1, cached = 0.5, completion = 2 }}
providers = {{ openrouter = "x/both", openai = "both" }}
[models.routed]
providers = {{ openrouter = "x/routed" }}
[models."house/llama"]
name = "House Llama"
abilities = []
providers = {{ house = "llama" }}
"""
SET_KEY = (
    "mutation($p: String!, $k: String!) { setProviderKey(input: {provider: $p, key: $k}) { providerKey { provider } } }"
)
DELETE_KEY = (
    "mutation($p: String!) { deleteProviderKey(input: {provider: $p}) { settings { providerKeys { provider } } } }"
)
MODELS = "{ models { id name provider ownKey custom abilities contextTokens maxOutputTokens prices { prompt } } }"
SAVE_PROVIDER = "mutation($i: SaveCustomProviderInput!) { saveCustomProvider(input: $i) { customProvider { slug } } }"
SAVE_MODEL = "mutation($i: SaveCustomModelInput!) { saveCustomModel(input: $i) { customModel { modelId } } }"
ENDS = """
subscription($id: ID!) { messageStream(messageId: $id) { ... on MessageEnded { message { model { name } } } } }
"""
USAGE = "{ usage(timeframe: DAY) { totals { requests } byModel { id name totals { requests } } } }"
SHARED = "query($t: String!) { sharedThread(token: $t) { messages { nodes { model { id name provider } } } } }"
TITLES = "subscription { changes { ... on ThreadChanged { thread { title } } } }"
UPDATE = "mutation($i: UpdateSettingsInput!) { updateSettings(input: $i) { settings { defaultModel { id name } } } }"


async def answer(wire: Wire) -> None:
    """Say who was asked, by what name, with which key."""
    asked = wire.request
    key = asked.headers.get("authorization", "no key").removeprefix("Bearer ")
    said = f"{asked.path.split('/')[2]} {asked.json['model']} {key}"
    await wire.head()
    await wire.event({"choices": [{"delta": {"content": said}, "finish_reason": "stop"}]})
    await wire.event({"choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": 5}})
    await wire.send(b"data: [DONE]\n\n")
    await wire.end()


@pytest.fixture(scope="module")
async def vendor() -> AsyncIterator[VendorServer]:
    """Every vendor at one address."""
    async with VendorServer(answer) as vendor:
        yield vendor


@pytest.fixture(scope="module")
async def server(
    postgres_url: str, tmp_path_factory: pytest.TempPathFactory, vendor: VendorServer
) -> AsyncIterator[Server]:
    """A server whose operator has a key for OpenAI and a server in house."""
    folder: Path = tmp_path_factory.mktemp("models")
    models = folder / "models.toml"
    models.write_text(FILE.format(address=vendor.base_url))
    server = Server(
        test_settings(
            await make_database(postgres_url),
            folder,
            models_file=models,
            openai_api_key="operators-key",
            scripted_models=False,
            custom_provider_allow=(AllowedEndpoint.parse(f"127.0.0.1:{vendor.port}"),),
        )
    )
    await server.start()
    try:
        yield server
    finally:
        await server.drain()
        await server.close()


@pytest.fixture
async def client(server: Server) -> AsyncIterator[Client]:
    """A new user of this module's server."""
    async with connect(server.address) as client:
        await client.sign_in()
        yield client


async def set_key(client: Client, provider: str, key: str) -> None:
    await client.run(SET_KEY, {"p": provider, "k": key})


async def answered(client: Client, model: str | None, **more: Any) -> str:
    """Who answered a question in a new thread: provider, name, key."""
    turn = await client.send("Who are you?", model=model, **more)  # type: ignore[arg-type]
    ended = await client.finish(turn["assistantMessage"]["id"])
    assert ended["status"] == "COMPLETE", ended
    return str(ended["text"])


def last_request(vendor: VendorServer) -> ReceivedRequest:
    return vendor.requests[-1]


async def listed(client: Client) -> dict[str, dict[str, Any]]:
    return {model["id"]: model for model in (await client.run(MODELS))["models"]}


async def test_the_users_key_comes_first_then_their_openrouter_key_then_the_operators(client: Client) -> None:
    assert await answered(client, "both") == "openai both operators-key"
    await set_key(client, "openrouter", "my-openrouter-key")
    assert await answered(client, "both") == "openrouter x/both my-openrouter-key"
    await set_key(client, "openai", "my-openai-key")
    assert await answered(client, "both") == "openai both my-openai-key"
    await client.run(DELETE_KEY, {"p": "openai"})
    await client.run(DELETE_KEY, {"p": "openrouter"})
    assert await answered(client, "both") == "openai both operators-key"


async def test_the_list_tells_what_can_be_used_and_through_whom(client: Client) -> None:
    models = await listed(client)
    assert models["both"] == {
        "id": "both",
        "name": "Both",
        "provider": "openai",
        "ownKey": False,
        "custom": False,
        "abilities": ["VISION", "EFFORT"],
        "contextTokens": 4_000,
        "maxOutputTokens": 1_000,
        "prices": {"prompt": 1_000_000},
    }
    assert models["house/llama"]["provider"] == "house"
    assert "routed" not in models
    assert "claude-sonnet-5-5" not in models
    await set_key(client, "openrouter", "my-openrouter-key")
    models = await listed(client)
    assert (models["both"]["provider"], models["both"]["ownKey"]) == ("openrouter", True)
    assert models["routed"]["abilities"] is None
    # Also what the server knows of its own: OpenRouter has it.
    assert models["claude-sonnet-5-5"]["provider"] == "openrouter"


async def test_a_server_in_house_is_asked_without_a_key(client: Client) -> None:
    assert await answered(client, "house/llama") == "house llama no key"


async def test_a_model_that_no_key_leads_to_is_refused_before_anything_is_written(client: Client) -> None:
    with pytest.raises(GraphQLErrors) as refused:
        await client.send("Hello", model="claude-sonnet-5-5")
    assert refused.value.code == "PROVIDER_KEY_MISSING"
    assert refused.value.extensions["field"] == "modelId"
    assert "Anthropic or OpenRouter" in refused.value.errors[0]["message"]
    with pytest.raises(GraphQLErrors) as refused:
        await client.send("Hello", model="no-such-model")
    assert refused.value.code == "MODEL_UNAVAILABLE"
    assert (await client.run("{ threads { nodes { id } } }"))["threads"]["nodes"] == []


async def test_a_default_that_cannot_be_asked_says_whose_it_is_and_how_to_go_on(client: Client, server: Server) -> None:
    async def refused(model: str | None = None, **more: Any) -> tuple[str, str, str | None]:
        with pytest.raises(GraphQLErrors) as caught:
            await client.send("Hello", model=model, **more)  # type: ignore[arg-type]
        return caught.value.code, caught.value.errors[0]["message"], caught.value.extensions.get("field")

    await client.run(UPDATE, {"i": {"defaultModelId": "routed"}})
    create = "mutation($i: CreateProjectInput!) { createProject(input: $i) { project { id } } }"
    made = await client.run(create, {"i": {"name": "P", "defaultModelId": "both"}})
    project = made["createProject"]["project"]["id"]
    code, told, field = await refused()
    assert (code, field) == ("PROVIDER_KEY_MISSING", None)
    assert told.startswith("The default model of your settings needs a key of yours for OpenRouter; ")
    await set_key(client, "openrouter", "my-openrouter-key")
    turn = await client.send("Hello", model=None, projectId=project)  # type: ignore[arg-type]
    await client.finish(turn["assistantMessage"]["id"])
    # As if the operator's file had lost them.
    async with server.database.acquire() as connection:
        await connection.execute("UPDATE settings SET default_model = 'gone' WHERE default_model = 'routed'")
        await connection.execute("UPDATE projects SET default_model = 'gone' WHERE default_model = 'both'")
    for more, whose in (
        ({}, "your settings"),
        ({"projectId": project}, "the project"),
        ({"threadId": turn["thread"]["id"]}, "the project"),
    ):
        code, told, field = await refused(**more)
        assert (code, field) == ("MODEL_UNAVAILABLE", None)
        assert told.startswith(f"The default model of {whose} is not available any more; ")
        assert "`modelId`" in told
        # Whoever names a model is told of that.
        code, told, field = await refused("gone", **more)
        assert (code, field) == ("MODEL_UNAVAILABLE", "modelId")
        assert told.startswith("This model is not available")
    assert await answered(client, "both", projectId=project) == "openrouter x/both my-openrouter-key"


async def test_one_users_key_is_nobody_elses(client: Client, server: Server) -> None:
    await set_key(client, "openai", "my-openai-key")
    async with connect(server.address) as other:
        await other.sign_in()
        assert await answered(other, "both") == "openai both operators-key"


async def test_a_key_that_cannot_be_read_costs_its_provider_alone_and_says_so(client: Client, server: Server) -> None:
    await set_key(client, "openai", "my-openai-key")
    async with server.database.acquire() as connection:
        await connection.execute(
            "UPDATE provider_keys SET ciphertext = set_byte(ciphertext, length(ciphertext) - 1, "
            "(get_byte(ciphertext, length(ciphertext) - 1) + 1) % 256) "
            "WHERE owner_id = (SELECT id FROM users WHERE replace(id::text, '-', '') = $1)",
            client.id.partition("_")[2],
        )
    models = await listed(client)
    assert "both" not in models
    assert "house/llama" in models
    assert await answered(client, "house/llama") == "house llama no key"
    with pytest.raises(GraphQLErrors) as refused:
        await client.send("Hello", model="both")
    assert refused.value.code == "PROVIDER_KEY_MISSING"
    assert "Your key for OpenAI cannot be read" in refused.value.errors[0]["message"]
    keys = (await client.run("{ settings { providerKeys { provider usable problem } } }"))["settings"]["providerKeys"]
    assert [(key["provider"], key["usable"]) for key in keys] == [("openai", False)]
    assert keys[0]["problem"]
    # Entered again, everything is as it was.
    await set_key(client, "openai", "my-new-key")
    assert await answered(client, "both") == "openai both my-new-key"


async def test_an_endpoint_of_the_users_own_is_asked_with_its_own_key(client: Client, vendor: VendorServer) -> None:
    home = {
        "slug": "home",
        "name": "Home",
        "baseUrl": f"http://127.0.0.1:{vendor.port}/v1/home",
        "key": "home-key-123456",
    }
    await client.run(SAVE_PROVIDER, {"i": home})
    model = {"provider": "home", "vendorName": "llama3.1:8b", "name": "My Llama"}
    saved = await client.run(SAVE_MODEL, {"i": model})
    model_id = saved["saveCustomModel"]["customModel"]["modelId"]
    assert model_id == "custom:home/llama3.1:8b"
    assert await answered(client, model_id) == "home llama3.1:8b home-key-123456"
    shown = (await listed(client))[model_id]
    assert (shown["name"], shown["provider"], shown["custom"], shown["ownKey"]) == ("My Llama", "home", True, True)
    # It can be the default; answers, usage and the stream name it.
    chosen = await client.run(UPDATE, {"i": {"defaultModelId": model_id}})
    assert chosen["updateSettings"]["settings"]["defaultModel"] == {"id": model_id, "name": "My Llama"}
    turn = await client.send("Hello", model=None)  # type: ignore[arg-type]
    async with client.subscribe(ENDS, {"id": turn["assistantMessage"]["id"]}) as reading:
        ended: dict[str, Any] = {}
        while (payload := await reading.next()) is not None:
            ended = payload["data"]["messageStream"]
    assert ended["message"]["model"] == {"name": "My Llama"}
    usage = await client.run(
        "{ usage(timeframe: DAY) { totals { requests } byModel { id name totals { requests } } } }"
    )
    assert usage["usage"]["byModel"] == [{"id": model_id, "name": "My Llama", "totals": {"requests": 2}}]
    assert usage["usage"]["totals"] == {"requests": 2}


async def test_a_share_tells_no_more_of_a_users_model_than_what_its_provider_calls_it(
    client: Client, server: Server, vendor: VendorServer
) -> None:
    home = {"slug": "secret-project", "name": "x", "baseUrl": f"http://127.0.0.1:{vendor.port}/v1/home"}
    await client.run(SAVE_PROVIDER, {"i": home})
    await client.run(SAVE_MODEL, {"i": {"provider": "secret-project", "vendorName": "llama", "name": "Secret"}})
    turn = await client.send("Hello", model="custom:secret-project/llama")
    await client.finish(turn["assistantMessage"]["id"])
    share = "mutation($id: ID!) { shareThread(input: {threadId: $id}) { share { token } } }"
    token = (await client.run(share, {"id": turn["thread"]["id"]}))["shareThread"]["share"]["token"]
    async with connect(server.address) as stranger:
        shared = await stranger.run(SHARED, {"t": token})
    assert "secret" not in str(shared).lower()
    assert shared["sharedThread"]["messages"]["nodes"][1]["model"]["name"] == "llama"


async def test_a_users_endpoint_that_leads_inside_is_refused_when_it_is_saved(client: Client) -> None:
    for inside in ("http://127.0.0.1:1/v1", "http://169.254.169.254/latest", "http://[::1]/v1", "file:///etc/passwd"):
        with pytest.raises(GraphQLErrors) as refused:
            await client.run(SAVE_PROVIDER, {"i": {"slug": "inside", "name": "x", "baseUrl": inside}})
        assert (refused.value.code, refused.value.extensions["field"]) == ("BAD_USER_INPUT", "baseUrl")
    assert (await client.run("{ settings { customProviders { slug } } }"))["settings"]["customProviders"] == []


async def test_an_effort_is_sent_to_models_that_know_it(client: Client, vendor: VendorServer) -> None:
    await answered(client, "both", reasoningEffort="HIGH")
    assert last_request(vendor).json["reasoning_effort"] == "high"
    await answered(client, "house/llama", reasoningEffort="HIGH")
    assert "reasoning_effort" not in last_request(vendor).json


async def test_the_oldest_is_left_out_where_the_models_context_is_full(client: Client, vendor: VendorServer) -> None:
    turn = await client.send("first " + "x" * 9_000, model="both")
    await client.finish(turn["assistantMessage"]["id"])
    for text in ("second " + "y" * 6_000, "third " + "z" * 3_000):
        last = await client.send(text, model="both", threadId=turn["thread"]["id"])
        await client.finish(last["assistantMessage"]["id"])
    sent = [message["content"] for message in last_request(vendor).json["messages"]]
    # Room for 3,000 tokens of prompt: the last question and the one before it, but not the first.
    assert [text.split(" ")[0] for text in sent] == ["second", "openai", "third"]


async def test_what_a_user_says_of_themselves_is_told_to_the_model(client: Client, vendor: VendorServer) -> None:
    told = {"name": "Ada", "traits": "Be brief.", "context": "I keep owls. 🦉"}
    await client.run(UPDATE, {"i": {"personalization": told}})
    await answered(client, "both")
    first = last_request(vendor).json["messages"][0]
    assert first["role"] == "system"
    for text in told.values():
        assert text in first["content"]


async def test_the_users_title_model_names_their_threads(client: Client, vendor: VendorServer) -> None:
    await set_key(client, "openrouter", "my-openrouter-key")
    await client.run(UPDATE, {"i": {"titleModelId": "routed"}})
    async with client.subscribe(
        "subscription { changes { ... on ThreadChanged { thread { title } } } }", {}
    ) as changes:
        await client.send("Who are you?", model="house/llama")
        titles: list[str] = []
        while "openrouter x/routed my-openrouter-key" not in titles:
            payload = await changes.next()
            assert payload is not None
            titles.append(payload["data"]["changes"].get("thread", {}).get("title", ""))
