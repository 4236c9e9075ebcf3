"""Turns through the adapter for Anthropic: a vendor on a real socket, behind the whole product."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest

from config import SettingsError
from server.runtime import Server
from tests.anthropic_wire import (
    MESSAGE_STOP,
    PING,
    answer,
    error,
    message_delta,
    message_start,
    text_block,
    thinking_block,
    tool_block,
)
from tests.client import Client, connect, text_of
from tests.conftest import make_database, test_settings
from tests.vendor_server import Script, VendorServer, Wire

KEY = "sk-ant-canary-7c1f"


@asynccontextmanager
async def served(
    postgres_url: str, folder: Path, script: Script, **settings: Any
) -> AsyncIterator[tuple[Client, VendorServer]]:
    """A user of a server whose only models are the vendor's."""
    async with VendorServer(script) as vendor:
        server = Server(
            test_settings(
                await make_database(postgres_url),
                folder,
                anthropic_api_key=KEY,
                anthropic_base_url=f"http://127.0.0.1:{vendor.port}",
                anthropic_models=("claude-test", "claude-haiku-4-5"),
                scripted_models=False,
                **settings,
            )
        )
        await server.start()
        try:
            async with connect(server.address) as client:
                await client.sign_in()
                yield client, vendor
        finally:
            await server.drain()
            await server.close()


async def whole_answer(wire: Wire) -> None:
    await wire.head()
    await wire.pieces(
        [
            message_start(cache_read_input_tokens=100),
            PING,
            *thinking_block("Hm. "),
            *text_block("Grüß ", "Gott 🦉", index=1),
            *tool_block("c1", "search", '{"q": ', '"owl"}', index=2),
            message_delta("tool_use", output_tokens_details={"thinking_tokens": 4}),
            MESSAGE_STOP,
        ]
    )
    await wire.end()


async def test_an_answer_is_streamed_stored_and_counted(postgres_url: str, tmp_path: Path) -> None:
    async with served(postgres_url, tmp_path, whole_answer, anthropic_max_tokens=700) as (client, vendor):
        models = (await client.run("{ models { id provider } }"))["models"]
        assert models == [{"id": name, "provider": "anthropic"} for name in ("claude-test", "claude-haiku-4-5")]
        turn = await client.send("Hello?", model=None, reasoningEffort="LOW")  # type: ignore[arg-type]
        events = await client.read(turn["assistantMessage"]["id"])
        told = events[-1]["message"]
        assert (told["status"], told["text"], text_of(events)) == ("COMPLETE", "Grüß Gott 🦉", "Grüß Gott 🦉")
        assert text_of(events, "REASONING") == "Hm. "
        assert told["parts"][2]["arguments"] == {"q": "owl"}
        assert told["model"] == {"id": "claude-test"}
        assert told["usage"] == {
            "promptTokens": 125,
            "completionTokens": 15,
            "reasoningTokens": 4,
            "cachedTokens": 100,
            "totalTokens": 140,
            "estimated": False,
        }
    (request,) = vendor.requests
    assert (request.path, request.headers["x-api-key"]) == ("/v1/messages", KEY)
    assert request.json["messages"] == [{"role": "user", "content": [{"type": "text", "text": "Hello?"}]}]
    assert (request.json["model"], request.json["max_tokens"]) == ("claude-test", 2_748)
    assert request.json["output_config"] == {"effort": "low"}


@pytest.mark.parametrize(
    ("said", "most"),
    [
        ({"maxOutputTokens": 8_192}, 8_192),
        ({"contextTokens": 8_000}, 7_999),
        ({"contextTokens": 8_000, "maxOutputTokens": 4_096}, 4_096),
        ({"contextTokens": 200_000, "maxOutputTokens": 64_000}, 16_000),
    ],
)
async def test_a_vendor_is_asked_for_no_more_than_the_model_can_write(
    postgres_url: str, tmp_path: Path, said: dict[str, int], most: int
) -> None:
    async with served(postgres_url, tmp_path, whole_answer) as (client, vendor):
        own = {"provider": "anthropic", "key": KEY}
        await client.run("mutation($i: SetProviderKeyInput!) { setProviderKey(input: $i) { __typename } }", {"i": own})
        model = {"provider": "anthropic", "vendorName": "small", "name": "Small", **said}
        await client.run(
            "mutation($i: SaveCustomModelInput!) { saveCustomModel(input: $i) { __typename } }", {"i": model}
        )
        turn = await client.send("Hi", model="custom:anthropic/small")
        assert (await client.finish(turn["assistantMessage"]["id"]))["status"] == "COMPLETE"
    assert vendor.requests[0].json["max_tokens"] == most


async def test_a_second_turn_sends_the_history_with_its_mark_for_the_cache(postgres_url: str, tmp_path: Path) -> None:
    async def script(wire: Wire) -> None:
        await wire.head()
        await wire.pieces(answer(text_block("Yes.")))
        await wire.end()

    async with served(postgres_url, tmp_path, script) as (client, vendor):
        first = await client.send("One?", model="claude-test")
        await client.finish(first["assistantMessage"]["id"])
        second = await client.send("Two?", model="claude-test", threadId=first["thread"]["id"])
        assert (await client.finish(second["assistantMessage"]["id"]))["status"] == "COMPLETE"
    cached = {"cache_control": {"type": "ephemeral"}}
    assert vendor.requests[1].json["messages"] == [
        {"role": "user", "content": [{"type": "text", "text": "One?", **cached}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
        {"role": "user", "content": [{"type": "text", "text": "Two?"}]},
    ]


async def test_a_stop_hangs_up_on_the_vendor(postgres_url: str, tmp_path: Path) -> None:
    hung_up = asyncio.Event()

    async def endless(wire: Wire) -> None:
        await wire.head()
        await wire.pieces([message_start(), *text_block("one ")[:2]])
        await wire.gone()
        hung_up.set()

    async with served(postgres_url, tmp_path, endless) as (client, _):
        turn = await client.send("Stop me", model="claude-test")
        async with client.reading(turn["assistantMessage"]["id"]) as subscription:
            await subscription.next()
            stopped = await client.stop(turn["assistantMessage"]["id"])
        assert (stopped["status"], stopped["text"]) == ("STOPPED", "one ")
        assert stopped["usage"]["estimated"] is True
        await asyncio.wait_for(hung_up.wait(), 5)


def refusal(status: int, kind: str, **headers: str) -> Script:
    async def script(wire: Wire) -> None:
        body = {"type": "error", "error": {"type": kind, "message": f"invalid x-api-key: {KEY}"}}
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        await wire.whole(status, orjson.dumps(body), headers=sent)

    return script


REFUSALS = [
    (refusal(401, "authentication_error"), "PROVIDER_REJECTED_KEY", None, 1),
    (refusal(429, "rate_limit_error", retry_after="9"), "RATE_LIMITED", 9, 1),
    (refusal(529, "overloaded_error"), "PROVIDER_UNAVAILABLE", None, 3),
]


@pytest.mark.parametrize(("script", "code", "retry_after", "requests"), REFUSALS, ids=[row[1] for row in REFUSALS])
async def test_a_refusal_is_typed_tried_again_where_it_passes_and_never_shows_the_key(
    postgres_url: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    script: Script,
    code: str,
    retry_after: int | None,
    requests: int,
) -> None:
    caplog.set_level(logging.DEBUG)
    async with served(postgres_url, tmp_path, script) as (client, vendor):
        turn = await client.send("Refuse me", model="claude-test")
        told = await client.finish(turn["assistantMessage"]["id"])
    assert told["status"] == "FAILED"
    assert (told["error"]["code"], told["error"]["retryAfter"]) == (code, retry_after)
    assert len(vendor.requests) == requests
    assert KEY not in str(told)
    assert KEY not in caplog.text


CUTS = [
    ([error("overloaded_error")], "FAILED", "PROVIDER_UNAVAILABLE"),
    ([PING], "INTERRUPTED", "PROVIDER_HUNG_UP"),
]


@pytest.mark.parametrize(("rest", "status", "code"), CUTS, ids=[row[1] for row in CUTS])
async def test_an_answer_that_breaks_off_keeps_what_had_come(
    postgres_url: str, tmp_path: Path, rest: list[bytes], status: str, code: str
) -> None:
    async def script(wire: Wire) -> None:
        await wire.head()
        await wire.pieces([message_start(), *text_block("half ")[:2], *rest])

    async with served(postgres_url, tmp_path, script) as (client, vendor):
        turn = await client.send("Break off", model="claude-test")
        told = await client.finish(turn["assistantMessage"]["id"])
    assert (told["status"], told["text"], told["error"]["code"]) == (status, "half ", code)
    assert len(vendor.requests) == 1


UNUSABLE: list[tuple[dict[str, Any], str]] = [
    ({"anthropic_api_key": "sk ant"}, "ANTHROPIC_API_KEY"),
    ({"anthropic_base_url": "http://127.0.0.1:1/?x=1"}, "ANTHROPIC_BASE_URL"),
    (
        {"anthropic_api_key": "a", "openai_api_key": "b", "openai_models": ("x",), "anthropic_models": ("y", "x")},
        "ANTHROPIC_MODELS: 'x' is the id of a model of openai",
    ),
]


async def test_settings_that_cannot_be_used_stop_the_start(postgres_url: str, tmp_path: Path) -> None:
    database_url = await make_database(postgres_url)
    for settings, named in UNUSABLE:
        with pytest.raises(SettingsError, match=named) as refused:
            await Server(test_settings(database_url, tmp_path, **settings)).start()
        assert "sk ant" not in str(refused.value)
