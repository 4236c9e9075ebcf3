"""Turns through the chat-completions adapter: a vendor on a real socket, behind the whole product."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from server.runtime import Server
from tests.client import Client, connect, text_of
from tests.conftest import make_database, test_settings
from tests.vendor_server import VendorServer, Wire

KEY = "sk-canary-7c1f"
USAGE = {
    "prompt_tokens": 12,
    "completion_tokens": 5,
    "prompt_tokens_details": {"cached_tokens": 4},
    "completion_tokens_details": {"reasoning_tokens": 2},
}


def said(finish: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


@asynccontextmanager
async def served(
    postgres_url: str, folder: Path, script: Callable[[Wire], Awaitable[None]], **settings: Any
) -> AsyncIterator[tuple[Client, VendorServer]]:
    """A user of a server whose only models are the vendor's."""
    models = folder / "models.toml"
    models.write_text(
        '[models.gpt-test]\nabilities = ["vision", "pdf", "effort"]\nproviders = { openai = "gpt-test" }\n'
    )
    async with VendorServer(script) as vendor:
        server = Server(
            test_settings(
                await make_database(postgres_url),
                folder,
                openai_api_key=KEY,
                openai_base_url=vendor.base_url,
                openai_models=("gpt-test", "gpt-title"),
                models_file=models,
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
    await wire.event(said(reasoning_content="Hm. "))
    await wire.event(said(content="Grüß "))
    await wire.event(said(content="Gott 🦉"))
    call = {"index": 0, "id": "c1", "function": {"name": "search", "arguments": '{"q": '}}
    await wire.event(said(tool_calls=[call]))
    await wire.event(said(tool_calls=[{"index": 0, "function": {"arguments": '"owl"}'}}]))
    await wire.event(said(finish="tool_calls"))
    await wire.event({"choices": [], "usage": USAGE})
    await wire.send(b"data: [DONE]\n\n")
    await wire.end()


async def test_an_answer_of_a_vendor_is_streamed_stored_and_counted(postgres_url: str, tmp_path: Path) -> None:
    async with served(postgres_url, tmp_path, whole_answer) as (client, vendor):
        models = (await client.run("{ models { id provider } }"))["models"]
        assert models == [{"id": "gpt-test", "provider": "openai"}, {"id": "gpt-title", "provider": "openai"}]
        turn = await client.send("Hello?", model=None, reasoningEffort="LOW")  # type: ignore[arg-type]
        events = await client.read(turn["assistantMessage"]["id"])
        answer = events[-1]["message"]
        assert (answer["status"], answer["text"], text_of(events)) == ("COMPLETE", "Grüß Gott 🦉", "Grüß Gott 🦉")
        assert text_of(events, "REASONING") == "Hm. "
        assert answer["parts"][2]["arguments"] == {"q": "owl"}
        assert answer["model"] == {"id": "gpt-test"}
        assert answer["usage"] == {
            "promptTokens": 12,
            "completionTokens": 5,
            "reasoningTokens": 2,
            "cachedTokens": 4,
            "totalTokens": 17,
            "estimated": False,
        }
        request = vendor.requests[0]
        assert request.headers["authorization"] == f"Bearer {KEY}"
        assert request.json["messages"] == [{"role": "user", "content": "Hello?"}]
        assert (request.json["model"], request.json["reasoning_effort"]) == ("gpt-test", "low")


async def test_a_stop_hangs_up_on_the_vendor(postgres_url: str, tmp_path: Path) -> None:
    hung_up = asyncio.Event()

    async def endless(wire: Wire) -> None:
        await wire.head()
        await wire.event(said(content="one "))
        await wire.gone()
        hung_up.set()

    async with served(postgres_url, tmp_path, endless) as (client, _):
        turn = await client.send("Stop me", model="gpt-test")
        async with client.reading(turn["assistantMessage"]["id"]) as subscription:
            await subscription.next()
            stopped = await client.stop(turn["assistantMessage"]["id"])
        assert (stopped["status"], stopped["text"]) == ("STOPPED", "one ")
        await asyncio.wait_for(hung_up.wait(), 5)


async def refuse(wire: Wire, status: str, headers: str = "") -> None:
    body = f'{{"error": {{"message": "Incorrect API key provided: {KEY}", "code": "x"}}}}'
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{headers}"
    await wire.raw(f"{head}\r\n{body}".encode())


REFUSALS = [
    ("401 Unauthorized", "", "PROVIDER_REJECTED_KEY", None),
    ("429 Too Many Requests", "Retry-After: 9\r\n", "RATE_LIMITED", 9),
    ("500 Internal Server Error", "", "PROVIDER_UNAVAILABLE", None),
]


@pytest.mark.parametrize(("status", "headers", "code", "retry_after"), REFUSALS, ids=[row[2] for row in REFUSALS])
async def test_a_vendors_refusal_is_typed_and_never_shows_the_key(
    postgres_url: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    status: str,
    headers: str,
    code: str,
    retry_after: int | None,
) -> None:
    caplog.set_level(logging.DEBUG)
    async with served(postgres_url, tmp_path, lambda wire: refuse(wire, status, headers)) as (client, _):
        turn = await client.send("Refuse me", model="gpt-test")
        answer = await client.finish(turn["assistantMessage"]["id"])
    assert answer["status"] == "FAILED"
    assert (answer["error"]["code"], answer["error"]["retryAfter"]) == (code, retry_after)
    assert KEY not in str(answer)
    assert KEY not in caplog.text


async def test_a_vendor_that_falls_silent_ends_the_answer_by_its_deadline(postgres_url: str, tmp_path: Path) -> None:
    async def silent(wire: Wire) -> None:
        await wire.head()
        await wire.event(said(content="half "))
        await wire.gone()

    async with served(postgres_url, tmp_path, silent, provider_idle_seconds=0.3) as (client, _):
        turn = await client.send("Silence", model="gpt-test")
        answer = await client.finish(turn["assistantMessage"]["id"])
    assert (answer["status"], answer["text"], answer["error"]["code"]) == ("FAILED", "half ", "PROVIDER_TIMEOUT")
