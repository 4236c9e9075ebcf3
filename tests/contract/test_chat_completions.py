"""What the chat-completions adapter makes of everything a vendor may send, over real sockets.

Every test runs under two guards: whatever fails is checked for the key, the address and the vendor's words, and so is
everything that was logged (tests/adapters.py).
"""

from __future__ import annotations

import asyncio
import socket
from datetime import UTC, datetime
from typing import Any

import aiohttp
import orjson
import pytest
from aiohttp.abc import AbstractResolver, ResolveResult
from hypothesis import given, settings
from hypothesis import strategies as st

from providers.base import (
    FailureCode,
    Finish,
    FinishReason,
    GenerationRequest,
    PromptMessage,
    Provider,
    ProviderEvent,
    ReasoningDelta,
    TextDelta,
    TokenUsage,
    ToolCall,
)
from providers.chat_completions import ChatCompletionsProvider
from providers.http import Deadlines, make_client_session, retry_after_seconds
from tests.adapters import (
    AT_ONCE,
    JSON,
    KEY,
    PATIENT,
    PROMPTLY,
    REQUEST,
    SCRIPTS,
    SOON,
    VENDOR_TEXT,
    Outcome,
    endlessly,
    fuzzed,
    hung_up_after,
    outcome_of,
    silent_after,
    stream_of,
    whole,
)
from tests.vendor_server import Script, VendorServer, Wire

pytestmark = pytest.mark.usefixtures("no_canary_in_logs")

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

DONE = b"data: [DONE]\n\n"


def sse(payload: Any) -> bytes:
    return b"data: " + orjson.dumps(payload) + b"\n\n"


def chunk(delta: Any = None, finish_reason: Any = None, **fields: Any) -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1741569952,
        "model": "small-1",
        "choices": [{"index": 0, "delta": {} if delta is None else delta, "finish_reason": finish_reason}],
        **fields,
    }


def text(content: str) -> bytes:
    return sse(chunk({"content": content}))


def finish(reason: Any = "stop") -> bytes:
    return sse(chunk(finish_reason=reason))


def usage(counts: Any) -> bytes:
    return sse(chunk(choices=[], usage=counts))


def calls(*fragments: Any) -> bytes:
    return sse(chunk({"tool_calls": list(fragments)}))


def fragment(index: int, arguments: str | None = None, **fields: Any) -> dict[str, Any]:
    name = fields.pop("name", None)
    function = {key: value for key, value in (("name", name), ("arguments", arguments)) if value is not None}
    return {"index": index, "function": function, **fields}


HELLO = [text("Hel"), text("lo"), finish(), DONE]
HELLO_EVENTS: list[ProviderEvent] = [TextDelta("Hel"), TextDelta("lo"), Finish(FinishReason.STOP)]


def refusal(status: int, error: Any = None, headers: dict[str, str] | None = None) -> Script:
    """A script that refuses, and echoes the key as careless gateways do."""
    body = {"error": {"message": f"{VENDOR_TEXT}: Bearer {KEY}", **(error or {})}}

    async def script(wire: Wire) -> None:
        assert wire.request.headers["authorization"] == f"Bearer {KEY}"
        await wire.whole(status, orjson.dumps(body), headers={"X-Echo": KEY, **(headers or {})})

    return script


def provider_for(session: aiohttp.ClientSession, base_url: str, **options: Any) -> ChatCompletionsProvider:
    options = {"api_key": KEY, "deadlines": PATIENT, "retries": AT_ONCE, **options}
    return ChatCompletionsProvider(session=session, base_url=base_url, **options)


async def ask(
    session: aiohttp.ClientSession, script: Script, request: GenerationRequest = REQUEST, **options: Any
) -> Outcome:
    """The outcome of one request to a vendor who follows the script."""
    async with VendorServer(script) as vendor:
        return await outcome_of(provider_for(session, vendor.base_url, **options).stream(request))


async def ask_until_left(session: aiohttp.ClientSession, script: Script, **options: Any) -> Outcome:
    """As `ask`, for a script that goes on until the client leaves; the client has to leave promptly."""
    async with VendorServer(script) as vendor:
        outcome = await outcome_of(provider_for(session, vendor.base_url, **options).stream(REQUEST))
        await asyncio.wait_for(vendor.client_left.wait(), PROMPTLY)
        return outcome


# The request


async def test_the_request_says_what_was_asked_and_no_more(session: aiohttp.ClientSession) -> None:
    async with VendorServer(stream_of(*HELLO)) as vendor:
        await outcome_of(provider_for(session, vendor.base_url).stream(REQUEST))
    (request,) = vendor.requests
    assert (request.method, request.path) == ("POST", "/v1/chat/completions")
    assert request.json == {
        "model": "small-1",
        "messages": [{"role": "user", "content": "Hello"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert request.headers["content-type"] == "application/json"
    assert request.headers["accept-encoding"] == "identity"
    assert "cookie" not in request.headers


async def test_every_wish_is_sent_in_the_vendors_terms(session: aiohttp.ClientSession) -> None:
    messages = (
        PromptMessage.of("system", "Be brief."),
        PromptMessage.of("user", "漢 👩‍💻"),
        PromptMessage.of("assistant", "?"),
    )
    wishes = GenerationRequest("m", messages, reasoning_effort="HIGH", max_output_tokens=7, user="u1")
    async with VendorServer(stream_of(*HELLO)) as vendor:
        await outcome_of(provider_for(session, vendor.base_url).stream(wishes))
        old = provider_for(session, vendor.base_url, output_limit_field="max_tokens")
        await outcome_of(old.stream(wishes))
    body, old_body = (request.json for request in vendor.requests)
    assert [message["content"] for message in body["messages"]] == ["Be brief.", "漢 👩‍💻", "?"]
    assert [message["role"] for message in body["messages"]] == ["system", "user", "assistant"]
    assert (body["reasoning_effort"], body["max_completion_tokens"], body["user"]) == ("high", 7, "u1")
    assert (old_body["max_tokens"], "max_completion_tokens" in old_body) == (7, False)


@pytest.mark.parametrize(("wanted", "possible", "sent"), [(7, None, 7), (7, 5, 5), (7, 9, 7), (None, 5, None)])
async def test_no_limit_is_beyond_what_the_model_can_write_and_none_is_sent_unasked(
    session: aiohttp.ClientSession, wanted: int | None, possible: int | None, sent: int | None
) -> None:
    wishes = GenerationRequest("m", REQUEST.messages, max_output_tokens=wanted, possible_output_tokens=possible)
    async with VendorServer(stream_of(*HELLO)) as vendor:
        await outcome_of(provider_for(session, vendor.base_url).stream(wishes))
    assert vendor.requests[0].json.get("max_completion_tokens") == sent


@pytest.mark.parametrize("key", [None, ""])
async def test_without_a_key_there_is_no_authorization(session: aiohttp.ClientSession, key: str | None) -> None:
    async with VendorServer(stream_of(*HELLO)) as vendor:
        outcome = await outcome_of(provider_for(session, vendor.base_url, api_key=key).stream(REQUEST))
    assert outcome.events == HELLO_EVENTS
    assert "authorization" not in vendor.requests[0].headers


async def test_a_slash_behind_the_base_address_changes_nothing(session: aiohttp.ClientSession) -> None:
    async with VendorServer(stream_of(*HELLO)) as vendor:
        await outcome_of(provider_for(session, vendor.base_url + "/").stream(REQUEST))
    assert vendor.requests[0].path == "/v1/chat/completions"


async def test_the_environments_proxy_is_not_used(
    session: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert (await ask(session, stream_of(*HELLO))).events == HELLO_EVENTS


async def test_a_vendors_cookies_are_not_kept(session: aiohttp.ClientSession) -> None:
    async def script(wire: Wire) -> None:
        await wire.head(headers={"Set-Cookie": "who=you; Path=/"})
        await wire.pieces(HELLO)
        await wire.end()

    async with VendorServer(script) as vendor:
        by_name = vendor.base_url.replace("127.0.0.1", "localhost")  # an ordinary jar keeps none of a bare address
        for _ in range(2):
            await outcome_of(provider_for(session, by_name).stream(REQUEST))
    assert ["cookie" in request.headers for request in vendor.requests] == [False, False]


@pytest.mark.parametrize(
    "base_url",
    [
        "",
        "api.example.com/v1",
        "//api.example.com/v1",
        "file:///etc/passwd",
        "gopher://api.example.com/",
        "unix:///run/model.sock",
        "http:///v1",
        "http://user:pass@api.example.com/v1",
        "http://api.example.com/v1?key=1",
        "http://api.example.com/v1#top",
        "http://api.example.com:99999/v1",
        "http://api.example.com/v1\r\nX-Injected: 1",
        "http://api example.com/v1",
        "http://api.example.com/v1\x00",
    ],
)
async def test_an_address_that_is_no_plain_http_address_is_refused(
    session: aiohttp.ClientSession, base_url: str
) -> None:
    with pytest.raises(ValueError, match="base address") as refused:
        provider_for(session, base_url)
    assert "example" not in str(refused.value)
    assert "passwd" not in str(refused.value)


@pytest.mark.parametrize("key", [KEY + "\r\nX-Injected: 1", KEY + " ", KEY + "\x00", KEY + "ü", "\n" + KEY])
async def test_a_key_that_no_header_can_carry_is_refused_without_being_named(
    session: aiohttp.ClientSession, key: str
) -> None:
    with pytest.raises(ValueError, match="API key") as refused:
        provider_for(session, "http://127.0.0.1/v1", api_key=key)
    assert KEY not in repr(refused.value)


async def test_the_key_is_in_no_repr(session: aiohttp.ClientSession) -> None:
    provider: Provider = provider_for(session, "http://127.0.0.1/v1")
    assert KEY not in f"{provider!r} {provider}"


# What an answer brings


async def test_text_arrives_in_order_and_the_finish_comes_last(session: aiohttp.ClientSession) -> None:
    outcome = await ask(session, stream_of(*HELLO))
    assert outcome.events == HELLO_EVENTS
    assert outcome.failure is None


async def test_events_come_while_the_vendor_is_still_speaking(session: aiohttp.ClientSession) -> None:
    first_was_seen = asyncio.Event()

    async def script(wire: Wire) -> None:
        await wire.head()
        await wire.send(text("first"))
        await first_was_seen.wait()
        await wire.pieces([text("second"), finish(), DONE])
        await wire.end()

    async with VendorServer(script) as vendor:
        events = provider_for(session, vendor.base_url).stream(REQUEST)
        assert await anext(events) == TextDelta("first")
        first_was_seen.set()
        assert (await outcome_of(events)).text == "second"


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
async def test_reasoning_is_told_apart_from_text(session: aiohttp.ClientSession, name: str) -> None:
    both = sse(chunk({name: "so", "content": "A"}))
    outcome = await ask(session, stream_of(sse(chunk({name: "hm", "content": None})), both, finish(), DONE))
    assert outcome.events == [
        ReasoningDelta("hm"),
        ReasoningDelta("so"),
        TextDelta("A"),
        Finish(FinishReason.STOP),
    ]


async def test_reasoning_under_both_names_is_told_once(session: aiohttp.ClientSession) -> None:
    outcome = await ask(session, stream_of(sse(chunk({"reasoning_content": "hm", "reasoning": "hm"})), finish(), DONE))
    assert outcome.events == [ReasoningDelta("hm"), Finish(FinishReason.STOP)]


async def test_a_refusal_of_the_model_is_text(session: aiohttp.ClientSession) -> None:
    outcome = await ask(session, stream_of(sse(chunk({"content": None, "refusal": "I cannot."})), finish(), DONE))
    assert outcome.text == "I cannot."


@pytest.mark.parametrize(
    ("reason", "meaning"),
    [
        ("stop", FinishReason.STOP),
        ("length", FinishReason.LENGTH),
        ("tool_calls", FinishReason.TOOL_CALLS),
        ("function_call", FinishReason.TOOL_CALLS),
        ("content_filter", FinishReason.CONTENT_FILTER),
        ("eos", FinishReason.STOP),
    ],
)
async def test_a_finish_reason_keeps_its_meaning(
    session: aiohttp.ClientSession, reason: str, meaning: FinishReason
) -> None:
    assert (await ask(session, stream_of(finish(reason), DONE))).events == [Finish(meaning)]


async def test_usage_behind_the_finish_reason_is_told_before_the_finish(session: aiohttp.ClientSession) -> None:
    counts = {
        "prompt_tokens": 19,
        "completion_tokens": 10,
        "total_tokens": 29,
        "prompt_tokens_details": {"cached_tokens": 7, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 4, "accepted_prediction_tokens": 0},
    }
    outcome = await ask(session, stream_of(text("Hi"), finish(), usage(counts), DONE))
    assert outcome.events == [
        TextDelta("Hi"),
        TokenUsage(prompt=19, completion=10, reasoning=4, cached=7),
        Finish(FinishReason.STOP),
    ]


async def test_a_vendor_who_counts_along_in_every_chunk_is_quoted_once(session: aiohttp.ClientSession) -> None:
    pieces = [sse(chunk({"content": "a"}, usage={"prompt_tokens": 3, "completion_tokens": n})) for n in (1, 2, 3)]
    outcome = await ask(session, stream_of(*pieces, finish(), DONE))
    assert outcome.events[3:] == [TokenUsage(prompt=3, completion=3), Finish(FinishReason.STOP)]


@pytest.mark.parametrize(
    ("counts", "told"),
    [
        (None, None),
        ({}, None),
        ([], None),
        ("many", None),
        ({"prompt_tokens": None, "completion_tokens": None}, None),
        ({"prompt_tokens": "12", "completion_tokens": 3}, TokenUsage(completion=3)),
        ({"prompt_tokens": 12}, TokenUsage(prompt=12)),
        ({"prompt_tokens": -1, "completion_tokens": True}, None),
        ({"prompt_tokens": 12, "prompt_tokens_details": None, "completion_tokens_details": []}, TokenUsage(prompt=12)),
        ({"prompt_tokens": 12, "prompt_tokens_details": {"cached_tokens": 99}}, TokenUsage(prompt=12, cached=12)),
        ({"completion_tokens": 2**40}, TokenUsage(completion=2**31 - 1)),
    ],
)
async def test_usage_of_the_wrong_type_counts_as_nothing(
    session: aiohttp.ClientSession, counts: Any, told: TokenUsage | None
) -> None:
    outcome = await ask(session, stream_of(text("Hi"), finish(), usage(counts), DONE))
    assert outcome.events == [TextDelta("Hi"), *([told] if told else []), Finish(FinishReason.STOP)]


async def test_interleaved_fragments_become_whole_tool_calls(session: aiohttp.ClientSession) -> None:
    pieces = [
        calls(fragment(0, "", id="call_a", type="function", name="weather")),
        calls(fragment(1, '{"q', id="call_b", type="function", name="search")),
        calls(fragment(0, '{"city":'), fragment(1, '": "漢')),
        calls(fragment(1, '字"}'), fragment(0, ' "Bonn"}')),
    ]
    outcome = await ask(session, stream_of(*pieces, finish("tool_calls"), DONE))
    assert outcome.events == [
        ToolCall("call_a", "weather", {"city": "Bonn"}),
        ToolCall("call_b", "search", {"q": "漢字"}),
        Finish(FinishReason.TOOL_CALLS),
    ]


async def test_a_tool_call_is_told_as_soon_as_the_finish_reason_is_there(session: aiohttp.ClientSession) -> None:
    async with VendorServer(silent_after(calls(fragment(0, "{}", id="a", name="f")), finish("tool_calls"))) as vendor:
        events = provider_for(session, vendor.base_url).stream(REQUEST)
        assert await anext(events) == ToolCall("a", "f", {})
        await events.aclose()


@pytest.mark.parametrize(
    ("fragments", "told"),
    [
        ([fragment(0, "", id="a", name="f")], ToolCall("a", "f", {})),
        ([fragment(0, id="a", name="f")], ToolCall("a", "f", {})),
        ([fragment(0, "[1, null]", id="a", name="f")], ToolCall("a", "f", [1, None])),
        ([fragment(0, '{"a": ', id="a", name="f")], ToolCall("a", "f", '{"a": ')),
        ([fragment(0, "Bonn", id="a", name="f")], ToolCall("a", "f", "Bonn")),
        ([fragment(0, "{}", name="f")], ToolCall("call_0", "f", {})),
        ([fragment(0, "{", id="a", name="f"), fragment(0, "}", id="a", name="f")], ToolCall("a", "f", {})),
        ([fragment(0, "{", name="f"), fragment(0, "}", id="a")], ToolCall("a", "f", {})),
        ([fragment(0, '"\\u0000\\ud83d"', id="a\x00", name="f\x00")], ToolCall("a�", "f�", "��")),
        ([fragment(0, "9" * 30, id="a", name="f")], ToolCall("a", "f", float("9" * 30))),
        ([fragment(0, "[" * 400 + "]" * 400, id="a", name="f")], ToolCall("a", "f", "[" * 400 + "]" * 400)),
        ([fragment(0, "[" * 9000, id="a", name="f")], ToolCall("a", "f", "[" * 9000)),
        ([{"index": 0, "id": "a", "function": {"name": "f", "arguments": {"n": 1}}}], ToolCall("a", "f", {"n": 1})),
        ([{"index": "0", "id": 5, "function": None}], ToolCall("call_0", "", {})),
        ([None, 1, "x", [], fragment(0, "{}", id="a", name="f")], ToolCall("a", "f", {})),
    ],
)
async def test_odd_fragments_still_make_a_call(
    session: aiohttp.ClientSession, fragments: list[Any], told: ToolCall
) -> None:
    outcome = await ask(session, stream_of(*(calls(each) for each in fragments), finish("tool_calls"), DONE))
    assert outcome.events == [told, Finish(FinishReason.TOOL_CALLS)]


async def test_parallel_calls_that_share_an_index_are_told_apart_by_id(session: aiohttp.ClientSession) -> None:
    both = calls(fragment(0, '{"n":1}', id="a", name="f"), fragment(0, '{"n":2}', id="b", name="f"))
    outcome = await ask(session, stream_of(both, finish("tool_calls"), DONE))
    assert outcome.events[:2] == [ToolCall("a", "f", {"n": 1}), ToolCall("b", "f", {"n": 2})]


async def test_calls_without_an_index_begin_with_their_name(session: aiohttp.ClientSession) -> None:
    pieces = [calls({"function": {"name": "f", "arguments": "["}}), calls({"function": {"arguments": "1]"}})]
    outcome = await ask(
        session, stream_of(*pieces, calls({"function": {"name": "g", "arguments": "2"}}), finish(), DONE)
    )
    assert outcome.events[:2] == [ToolCall("call_0", "f", [1]), ToolCall("call_1", "g", 2)]


async def test_tool_calls_of_a_stream_that_was_cut_are_not_told(session: aiohttp.ClientSession) -> None:
    outcome = await ask(session, hung_up_after(text("Hi"), calls(fragment(0, "{}", id="a", name="f"))))
    assert outcome.events == [TextDelta("Hi")]


async def test_calls_without_number_are_refused(session: aiohttp.ClientSession) -> None:
    pieces = [calls(*(fragment(n, "", id=str(n), name="f") for n in range(at, at + 100))) for at in range(0, 400, 100)]
    assert (await ask(session, stream_of(*pieces, finish("tool_calls"), DONE))).code is FailureCode.PROVIDER_PROTOCOL


COMPLETION = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "choices": [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": "Hello",
                "reasoning_content": "hm",
                "tool_calls": [
                    {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"n":1}'}},
                    {"id": "b", "type": "function", "function": {"name": "f", "arguments": '{"n":2}'}},
                ],
            },
            "finish_reason": "tool_calls",
        }
    ],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2},
}


@pytest.mark.parametrize("content_type", ["application/json", "Application/JSON; charset=utf-8"])
async def test_a_server_that_does_not_stream_is_understood(session: aiohttp.ClientSession, content_type: str) -> None:
    outcome = await ask(session, whole(orjson.dumps(COMPLETION), content_type))
    assert outcome.events == [
        ReasoningDelta("hm"),
        TextDelta("Hello"),
        ToolCall("a", "f", {"n": 1}),
        ToolCall("b", "f", {"n": 2}),
        TokenUsage(prompt=3, completion=2),
        Finish(FinishReason.TOOL_CALLS),
    ]


async def test_a_whole_answer_without_finish_reason_is_finished(session: aiohttp.ClientSession) -> None:
    outcome = await ask(session, whole(b'{"choices": [{"message": {"content": "Hi"}}]}'))
    assert outcome.events == [TextDelta("Hi"), Finish(FinishReason.STOP)]


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b"null", b'"ok"', b'{"choices": []}', b'{"choices": [{', b"Hello"])
async def test_json_that_is_no_completion_is_a_protocol_failure(session: aiohttp.ClientSession, body: bytes) -> None:
    outcome = await ask(session, whole(body))
    assert (outcome.events, outcome.code) == ([], FailureCode.PROVIDER_PROTOCOL)


# How an answer ends


@pytest.mark.parametrize("framing", ["chunked", "close"])
async def test_a_cut_without_finish_reason_ends_without_finish(session: aiohttp.ClientSession, framing: str) -> None:
    outcome = await ask(session, hung_up_after(text("Hel"), text("lo"), framing=framing))
    assert outcome == Outcome([TextDelta("Hel"), TextDelta("lo")])


async def test_a_proper_end_of_the_body_without_finish_reason_ends_without_finish(
    session: aiohttp.ClientSession,
) -> None:
    assert await ask(session, stream_of(text("Hel"))) == Outcome([TextDelta("Hel")])


async def test_a_half_closed_connection_ends_without_finish(session: aiohttp.ClientSession) -> None:
    async def script(wire: Wire) -> None:
        await wire.head()
        await wire.send(text("Hel"))
        wire.half_close()
        await wire.gone()

    assert await ask_until_left(session, script) == Outcome([TextDelta("Hel")])


async def test_a_cut_inside_of_an_event_drops_that_event(session: aiohttp.ClientSession) -> None:
    event = text("lo")
    for cut in range(1, len(event) - 3):
        outcome = await ask(session, hung_up_after(text("Hel"), event[:cut]))
        assert outcome == Outcome([TextDelta("Hel")])


@pytest.mark.parametrize("framing", ["chunked", "close"])
async def test_a_cut_behind_the_finish_reason_is_an_ordinary_end(session: aiohttp.ClientSession, framing: str) -> None:
    assert (await ask(session, hung_up_after(*HELLO[:-1], framing=framing))).events == HELLO_EVENTS


@pytest.mark.parametrize("ends", [b"", b"\n", b"\r\n"])
async def test_a_last_event_without_blank_line_counts(session: aiohttp.ClientSession, ends: bytes) -> None:
    for last in (finish(), DONE):
        pieces = [text("Hel"), text("lo"), last.strip() + ends]
        assert (await ask(session, hung_up_after(*pieces))).events == HELLO_EVENTS


async def test_done_without_finish_reason_is_a_finish(session: aiohttp.ClientSession) -> None:
    assert (await ask(session, stream_of(*HELLO[:2], DONE))).events == HELLO_EVENTS
    outcome = await ask(session, stream_of(calls(fragment(0, "{}", id="a", name="f")), DONE))
    assert outcome.events == [ToolCall("a", "f", {}), Finish(FinishReason.TOOL_CALLS)]


@pytest.mark.parametrize("after", [DONE, text("more"), finish("length"), sse({"error": {"code": 500}}), b"data: {\n\n"])
async def test_nothing_behind_done_counts(session: aiohttp.ClientSession, after: bytes) -> None:
    assert (await ask(session, stream_of(*HELLO, after))).events == HELLO_EVENTS
    assert (await ask(session, stream_of(b"".join([*HELLO, after])))).events == HELLO_EVENTS


async def test_a_reset_midway_is_a_failure_that_keeps_the_text(session: aiohttp.ClientSession) -> None:
    for framing in ("chunked", "close"):
        was_seen = asyncio.Event()

        async def script(wire: Wire, framing: Any = framing, was_seen: asyncio.Event = was_seen) -> None:
            await wire.head(framing=framing)
            await wire.send(text("Hel"))
            await was_seen.wait()
            wire.reset()

        async with VendorServer(script) as vendor:
            events = provider_for(session, vendor.base_url).stream(REQUEST)
            assert await anext(events) == TextDelta("Hel")
            was_seen.set()
            assert (await outcome_of(events)).code is FailureCode.PROVIDER_UNAVAILABLE


async def test_a_reset_behind_the_finish_reason_is_an_ordinary_end(session: aiohttp.ClientSession) -> None:
    async def script(wire: Wire) -> None:
        await wire.head()
        await wire.pieces(HELLO[:-1])
        wire.reset()

    assert (await ask(session, script)).events == HELLO_EVENTS


async def test_a_slow_reader_does_not_lose_the_last_words_before_a_cut(session: aiohttp.ClientSession) -> None:
    first_was_seen, is_cut = asyncio.Event(), asyncio.Event()

    async def script(wire: Wire) -> None:
        await wire.head()
        await wire.send(text("first"))
        await first_was_seen.wait()
        await wire.send(text(" last"))
        is_cut.set()

    async with VendorServer(script) as vendor:
        events = provider_for(session, vendor.base_url).stream(REQUEST)
        assert await anext(events) == TextDelta("first")
        first_was_seen.set()
        await is_cut.wait()
        await asyncio.sleep(0.05)  # the adapter is not being read: nothing else tells that the FIN has arrived
        assert await outcome_of(events) == Outcome([TextDelta(" last")])


async def test_a_reset_behind_a_proper_end_of_the_body_is_no_failure(session: aiohttp.ClientSession) -> None:
    first_was_seen, is_reset = asyncio.Event(), asyncio.Event()

    async def script(wire: Wire) -> None:
        await wire.head()
        await wire.send(text("first"))
        await first_was_seen.wait()
        await wire.send(text(" last"))
        await wire.end()
        await wire.be_read()
        wire.reset()
        is_reset.set()

    async with VendorServer(script) as vendor:
        events = provider_for(session, vendor.base_url).stream(REQUEST)
        assert await anext(events) == TextDelta("first")
        first_was_seen.set()
        await is_reset.wait()
        await asyncio.sleep(0.05)  # as above
        assert await outcome_of(events) == Outcome([TextDelta(" last")])


async def test_a_finished_answer_gives_its_connection_to_the_next(session: aiohttp.ClientSession) -> None:
    async with VendorServer(stream_of(*HELLO)) as vendor:
        for _ in range(3):
            outcome = await outcome_of(provider_for(session, vendor.base_url).stream(REQUEST))
            assert outcome.events == HELLO_EVENTS
    assert vendor.connections == 1


async def test_a_vendor_who_never_closes_after_done_is_left(session: aiohttp.ClientSession) -> None:
    assert (await ask_until_left(session, silent_after(*HELLO))).events == HELLO_EVENTS


# Characters and line ends


async def test_text_cut_at_any_byte_is_the_same_text(session: aiohttp.ClientSession) -> None:
    event = b'data: {"choices":[{"delta":{"content":"' + SCRIPTS.encode() + b'"}}]}\n\n'
    for cut in range(len(event)):
        outcome = await ask(session, stream_of(event[:cut], event[cut:], finish(), DONE))
        assert outcome == Outcome([TextDelta(SCRIPTS), Finish(FinishReason.STOP)])


async def test_text_byte_by_byte_is_the_same_text(session: aiohttp.ClientSession) -> None:
    stream = text(SCRIPTS) + finish() + DONE
    outcome = await ask(session, stream_of(*(stream[at : at + 1] for at in range(len(stream)))))
    assert outcome == Outcome([TextDelta(SCRIPTS), Finish(FinishReason.STOP)])


async def test_escaped_text_is_the_same_text(session: aiohttp.ClientSession) -> None:
    event = b'data: {"choices":[{"delta":{"content":"\\ud83d\\udc69\\u200d\\ud83d\\udcbb \\u6f22"}}]}\n\n'
    assert (await ask(session, stream_of(event, finish(), DONE))).text == "👩‍💻 漢"


@pytest.mark.parametrize(
    ("content", "repaired"),
    [
        (b"a\xffb", "a�b"),
        (b"a\xf0\x9f\x91 b", "a� b"),
        (b"\xed\xa0\xbd", "���"),
        (b"a\\ud83db", "a�b"),
        (b"\\udc69\\ud83d", "��"),
        (b"a\\u0000b", "a�b"),
    ],
)
async def test_what_cannot_be_stored_is_replaced(session: aiohttp.ClientSession, content: bytes, repaired: str) -> None:
    event = b'data: {"choices":[{"delta":{"content":"%b","reasoning":"%b"}}]}\n\n' % (content, content)
    outcome = await ask(session, stream_of(event, finish(), DONE))
    assert outcome.events[:2] == [ReasoningDelta(repaired), TextDelta(repaired)]


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf", b": comment\n\n", b"event: message\nid: 1\nretry: 5\n"])
async def test_every_legal_form_of_the_stream_is_the_same_answer(
    session: aiohttp.ClientSession, line_end: bytes, start: bytes
) -> None:
    stream = (start + b": between\n\n".join(HELLO)).replace(b"\n", line_end)
    assert (await ask(session, stream_of(stream))).events == HELLO_EVENTS
    assert (await ask(session, stream_of(*(stream[at : at + 1] for at in range(len(stream)))))).events == HELLO_EVENTS


async def test_an_event_may_span_lines_of_data(session: aiohttp.ClientSession) -> None:
    event = b'data: {"choices":\ndata: [{"delta": {"content":\ndata:"Hi"}}]}\n\n'
    assert (await ask(session, stream_of(event, finish(), DONE))).text == "Hi"


@pytest.mark.parametrize(
    "content_type", [None, "text/plain", "text/event-stream; charset=utf-8", "application/octet-stream"]
)
async def test_a_careless_content_type_is_read_as_a_stream(
    session: aiohttp.ClientSession, content_type: str | None
) -> None:
    async def script(wire: Wire) -> None:
        await wire.head(content_type=content_type)
        await wire.pieces(HELLO)
        await wire.end()

    assert (await ask(session, script)).events == HELLO_EVENTS


# What must not cost an answer


@pytest.mark.parametrize(
    "odd",
    [
        {},
        [],
        None,
        "ping",
        0,
        {"choices": None},
        {"choices": []},
        {"choices": {}},
        {"choices": "x"},
        {"choices": [None]},
        {"choices": [[]]},
        {"choices": [{}]},
        {"choices": [{"delta": None}]},
        {"choices": [{"delta": []}]},
        {"choices": [{"delta": "text"}]},
        {"choices": [{"delta": {"content": None, "role": None, "tool_calls": None}}]},
        {"choices": [{"delta": {"content": 5, "reasoning": [], "reasoning_content": {}}}]},
        {"choices": [{"delta": {"content": ""}}]},
        {"choices": [{"delta": {"tool_calls": {}}}]},
        {"choices": [{"delta": {"tool_calls": [None, 1, []]}}]},
        {"choices": [{"delta": {}, "finish_reason": 5}]},
        {"choices": [{"delta": {}, "finish_reason": ""}]},
        {"choices": [{"delta": {}, "logprobs": {}, "unknown": [1, 2]}], "unknown": {"a": 1}},
        {"choices": [], "prompt_filter_results": [{"prompt_index": 0}]},
        {"error": None, "usage": None},
    ],
    ids=lambda odd: orjson.dumps(odd).decode(),
)
async def test_an_odd_chunk_is_skipped(session: aiohttp.ClientSession, odd: Any) -> None:
    outcome = await ask(session, stream_of(text("Hel"), sse(odd), text("lo"), finish(), DONE))
    assert outcome == Outcome(HELLO_EVENTS)


FRAGMENTS = fuzzed(
    index=st.integers(0, 2),
    id=st.text(max_size=3),
    function=fuzzed(name=st.text(max_size=3), arguments=st.text(max_size=9)),
)
DELTAS = fuzzed(content=st.text(), reasoning=st.text(), refusal=st.text(), tool_calls=st.lists(FRAGMENTS, max_size=3))
CHOICES = fuzzed(delta=DELTAS, message=DELTAS, finish_reason=st.sampled_from(["stop", "length", "tool_calls", "error"]))
DETAILS = fuzzed(cached_tokens=st.integers(), reasoning_tokens=st.integers())
COUNTS = fuzzed(
    prompt_tokens=st.integers(),
    completion_tokens=st.integers(),
    prompt_tokens_details=DETAILS,
    completion_tokens_details=DETAILS,
)
CHUNKS = fuzzed(choices=st.lists(CHOICES, max_size=2), usage=COUNTS, error=JSON)


@settings(max_examples=80, deadline=None)
@given(payloads=st.lists(CHUNKS, max_size=5), content_type=st.sampled_from(["text/event-stream", "application/json"]))
async def test_whatever_json_comes_the_outcome_is_a_defined_one(payloads: list[Any], content_type: str) -> None:
    written = [json_of(payload) for payload in payloads]
    is_stream = content_type == "text/event-stream"
    body = b"".join(b"data: " + payload + b"\n\n" for payload in written) if is_stream else b"".join(written[:1])
    async with make_client_session() as session:
        outcome = await ask(session, whole(body, content_type))
    for event in outcome.events:
        if isinstance(event, TokenUsage):
            assert 0 <= event.cached <= event.prompt < 2**31
            assert 0 <= event.reasoning <= event.completion < 2**31
        if isinstance(event, ToolCall):
            orjson.dumps(event.arguments)
        if isinstance(event, TextDelta | ReasoningDelta):
            assert "\x00" not in event.text
            event.text.encode()
    assert not (outcome.finished and outcome.failure)
    assert not outcome.finished or isinstance(outcome.events[-1], Finish)


def json_of(value: Any) -> bytes:
    try:
        return orjson.dumps(value)
    except TypeError:  # integers beyond 64 bits
        return b'{"choices":[{"delta":{"content":123456789012345678901234567890}}]}'


# Failures


async def reset_at_once(wire: Wire) -> None:
    wire.reset()


async def closes_at_once(wire: Wire) -> None:
    await wire.be_read()


async def speaks_no_http(wire: Wire) -> None:
    await wire.raw(b"220 mail.example.com ESMTP\r\n\r\n")


async def sends_too_long_a_header(wire: Wire) -> None:
    await wire.raw(b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 100_000 + b"\r\n\r\n")


async def breaks_the_chunked_coding(wire: Wire) -> None:
    await wire.head()
    await wire.raw(b"not a chunk size\r\n")


PAGE = whole(f"<html>{VENDOR_TEXT} {KEY}</html>".encode(), "text/html; charset=utf-8")
GZIPPED = whole(b"\x1f\x8b\x08", "text/event-stream", {"Content-Encoding": "gzip"})
NO_JSON = stream_of(b'data: {"choices": [' + KEY.encode() + b"\n\n")

FAILURES: dict[str, tuple[Script, FailureCode]] = {
    "400": (refusal(400), FailureCode.PROVIDER_REJECTED_REQUEST),
    "400 unknown parameter": (
        refusal(400, {"type": "invalid_request_error", "code": "unsupported_parameter", "param": "x"}),
        FailureCode.PROVIDER_REJECTED_REQUEST,
    ),
    "400 too long": (refusal(400, {"code": "context_length_exceeded"}), FailureCode.CONTEXT_TOO_LONG),
    "400 too long, llama.cpp": (
        refusal(400, {"code": 400, "type": "exceed_context_size_error"}),
        FailureCode.CONTEXT_TOO_LONG,
    ),
    "400 too long, vLLM": (
        refusal(400, {"code": 400, "message": f"This model's maximum context length is 8. {VENDOR_TEXT}"}),
        FailureCode.CONTEXT_TOO_LONG,
    ),
    "400 content filter, Azure": (refusal(400, {"code": "content_filter"}), FailureCode.CONTENT_FILTERED),
    "400 wrong key, Gemini": (
        refusal(400, {"code": 400, "message": f"API key not valid. {VENDOR_TEXT}", "status": "INVALID_ARGUMENT"}),
        FailureCode.PROVIDER_REJECTED_KEY,
    ),
    "401": (refusal(401, {"code": "invalid_api_key"}), FailureCode.PROVIDER_REJECTED_KEY),
    "402": (refusal(402), FailureCode.PROVIDER_REJECTED_REQUEST),
    "403": (refusal(403), FailureCode.PROVIDER_REJECTED_KEY),
    "404": (refusal(404, {"code": "model_not_found"}), FailureCode.PROVIDER_REJECTED_REQUEST),
    "408": (refusal(408), FailureCode.PROVIDER_TIMEOUT),
    "413": (refusal(413, {"code": "rate_limit_exceeded"}), FailureCode.CONTEXT_TOO_LONG),
    "422": (refusal(422), FailureCode.PROVIDER_REJECTED_REQUEST),
    "429": (refusal(429), FailureCode.RATE_LIMITED),
    "429 without credit": (refusal(429, {"code": "insufficient_quota"}), FailureCode.PROVIDER_REJECTED_REQUEST),
    "500": (refusal(500), FailureCode.PROVIDER_UNAVAILABLE),
    "502": (refusal(502), FailureCode.PROVIDER_UNAVAILABLE),
    "503": (refusal(503), FailureCode.PROVIDER_UNAVAILABLE),
    "504": (refusal(504), FailureCode.PROVIDER_TIMEOUT),
    "529": (refusal(529), FailureCode.PROVIDER_UNAVAILABLE),
    "204": (refusal(204), FailureCode.PROVIDER_PROTOCOL),
    "201": (refusal(201), FailureCode.PROVIDER_PROTOCOL),
    "304": (refusal(304), FailureCode.PROVIDER_PROTOCOL),
    "666": (refusal(666), FailureCode.PROVIDER_PROTOCOL),
    "a page with 200": (PAGE, FailureCode.PROVIDER_PROTOCOL),
    "compressed without being asked": (GZIPPED, FailureCode.PROVIDER_PROTOCOL),
    "no JSON": (NO_JSON, FailureCode.PROVIDER_PROTOCOL),
    "JSON cut in the middle": (stream_of(b'data: {"choices": [\n\n'), FailureCode.PROVIDER_PROTOCOL),
    "JSON nested without end": (stream_of(b"data: " + b"[" * 100_000 + b"\n\n"), FailureCode.PROVIDER_PROTOCOL),
    "no HTTP": (speaks_no_http, FailureCode.PROVIDER_PROTOCOL),
    "a header beyond measure": (sends_too_long_a_header, FailureCode.PROVIDER_PROTOCOL),
    "closed before the head": (closes_at_once, FailureCode.PROVIDER_UNAVAILABLE),
    "reset before the head": (reset_at_once, FailureCode.PROVIDER_UNAVAILABLE),
}


@pytest.mark.parametrize(("script", "code"), [pytest.param(*case, id=name) for name, case in FAILURES.items()])
async def test_a_failure_has_its_code_and_betrays_nothing(
    session: aiohttp.ClientSession, script: Script, code: FailureCode
) -> None:
    outcome = await ask(session, script)
    assert (outcome.events, outcome.code) == ([], code)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        ({}, None),
        ({"message": VENDOR_TEXT}, FailureCode.PROVIDER_UNAVAILABLE),
        (VENDOR_TEXT, FailureCode.PROVIDER_UNAVAILABLE),
        ([VENDOR_TEXT], FailureCode.PROVIDER_UNAVAILABLE),
        (True, FailureCode.PROVIDER_UNAVAILABLE),
        ({"code": 502, "message": VENDOR_TEXT}, FailureCode.PROVIDER_UNAVAILABLE),
        ({"code": "429"}, FailureCode.RATE_LIMITED),
        ({"code": 400, "type": "BadRequestError"}, FailureCode.PROVIDER_REJECTED_REQUEST),
        ({"code": 200}, FailureCode.PROVIDER_UNAVAILABLE),
        ({"code": None, "type": "rate_limit_exceeded"}, FailureCode.RATE_LIMITED),
        ({"type": "invalid_request_error", "code": "context_length_exceeded"}, FailureCode.CONTEXT_TOO_LONG),
        ({"type": "insufficient_quota"}, FailureCode.PROVIDER_REJECTED_REQUEST),
        ({"type": "authentication_error"}, FailureCode.PROVIDER_REJECTED_KEY),
        ({"type": "timeout"}, FailureCode.PROVIDER_TIMEOUT),
        ({"type": "server_error"}, FailureCode.PROVIDER_UNAVAILABLE),
        ({"code": [], "type": {}, "message": 5}, FailureCode.PROVIDER_UNAVAILABLE),
    ],
)
async def test_an_error_inside_of_an_answer_is_a_failure(
    session: aiohttp.ClientSession, error: Any, code: FailureCode | None
) -> None:
    outcome = await ask(session, stream_of(text("Hel"), sse({"error": error}), finish()))
    assert outcome.text == "Hel"
    assert outcome.code is code
    assert outcome.finished == (code is None)


async def test_an_error_in_a_whole_answer_is_a_failure(session: aiohttp.ClientSession) -> None:
    outcome = await ask(session, whole(orjson.dumps({"error": {"code": "rate_limit_exceeded"}})))
    assert outcome.code is FailureCode.RATE_LIMITED


@pytest.mark.parametrize(
    "event",
    [
        b"event: error\n" + sse({"error": {"message": VENDOR_TEXT}}),
        b"event: error\n" + sse({"message": VENDOR_TEXT}),
        sse(chunk(finish_reason="error")),
        sse(chunk(finish_reason="error", error={"code": 502, "message": VENDOR_TEXT})),
    ],
)
async def test_an_error_may_be_told_by_event_name_or_finish_reason(
    session: aiohttp.ClientSession, event: bytes
) -> None:
    outcome = await ask(session, stream_of(text("Hel"), event, DONE))
    assert (outcome.text, outcome.code) == ("Hel", FailureCode.PROVIDER_UNAVAILABLE)


async def test_events_before_a_failure_in_the_same_packet_are_told(session: aiohttp.ClientSession) -> None:
    for bad in (b"data: {\n\n", sse({"error": {"code": 500}})):
        outcome = await ask(session, stream_of(text("Hel") + text("lo") + bad))
        assert outcome.text == "Hello"
        assert outcome.failure is not None


async def test_usage_told_before_a_failure_is_kept(session: aiohttp.ClientSession) -> None:
    counted = sse(chunk({"content": "Hel"}, usage={"prompt_tokens": 3, "completion_tokens": 1}))
    outcome = await ask(session, stream_of(counted, b"data: {\n\n"))
    assert outcome.events == [TextDelta("Hel"), TokenUsage(prompt=3, completion=1)]
    assert outcome.code is FailureCode.PROVIDER_PROTOCOL


async def test_a_broken_chunked_coding_keeps_what_was_read(session: aiohttp.ClientSession) -> None:
    outcome = await ask(session, breaks_the_chunked_coding)
    assert not outcome.finished


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_not_followed(session: aiohttp.ClientSession, status: int) -> None:
    async with VendorServer(stream_of(*HELLO)) as elsewhere:
        location = {"Location": f"{elsewhere.base_url}/chat/completions?key={KEY}"}
        outcome = await ask(session, refusal(status, headers=location))
    assert (outcome.events, outcome.code) == ([], FailureCode.PROVIDER_PROTOCOL)
    assert elsewhere.connections == 0


async def test_a_refused_connection_is_unavailable(session: aiohttp.ClientSession) -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))  # bound, but not listening
        base_url = f"http://127.0.0.1:{unheard.getsockname()[1]}/v1"
        outcome = await outcome_of(provider_for(session, base_url).stream(REQUEST))
    assert (outcome.events, outcome.code) == ([], FailureCode.PROVIDER_UNAVAILABLE)


async def test_a_tls_failure_is_unavailable(session: aiohttp.ClientSession) -> None:
    def speak_no_tls(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(speak_no_tls, "127.0.0.1", 0) as server:
        base_url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        outcome = await outcome_of(provider_for(session, base_url).stream(REQUEST))
    assert (outcome.events, outcome.code) == ([], FailureCode.PROVIDER_UNAVAILABLE)


class BrokenResolver(AbstractResolver):
    """A DNS that fails, or never answers."""

    def __init__(self, *, answers: bool) -> None:
        self._answers = answers

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        if not self._answers:
            await asyncio.Event().wait()
        raise OSError(f"cannot resolve {host}")

    async def close(self) -> None:
        return None


@pytest.mark.parametrize(
    ("answers", "code"), [(True, FailureCode.PROVIDER_UNAVAILABLE), (False, FailureCode.PROVIDER_TIMEOUT)]
)
async def test_a_dns_failure_is_unavailable_and_a_silent_dns_a_timeout(answers: bool, code: FailureCode) -> None:
    connector = aiohttp.TCPConnector(resolver=BrokenResolver(answers=answers))
    async with aiohttp.ClientSession(connector=connector) as session:
        provider = provider_for(session, "http://models.invalid/v1", deadlines=Deadlines(connect_seconds=SOON))
        outcome = await outcome_of(provider.stream(REQUEST))
    assert (outcome.events, outcome.code) == ([], code)
    assert "models.invalid" not in repr(outcome.failure)


@pytest.mark.parametrize("host", ["a" * 300, "a..b", "xn--\u0131", "."])
async def test_a_host_name_that_dns_cannot_carry_is_a_defined_failure(
    session: aiohttp.ClientSession, host: str
) -> None:
    try:
        provider = provider_for(session, f"http://{host}/v1")
    except ValueError:
        return
    outcome = await outcome_of(provider.stream(REQUEST))
    assert outcome.code in (FailureCode.PROVIDER_UNAVAILABLE, FailureCode.PROVIDER_PROTOCOL)


# Retry-After

NOW = datetime(2026, 10, 21, 7, 28, tzinfo=UTC)
RETRY_AFTER: list[tuple[str | None, int | None]] = [
    (None, None),
    ("", None),
    ("0", 0),
    ("7", 7),
    (" 7 ", 7),
    ("7.2", 8),
    ("3600", 3600),
    ("3601", 3600),
    ("1000000000", 3600),
    ("9" * 5000, 3600),
    ("1e9", None),
    ("-1", None),
    ("+7", None),
    ("٧", None),
    ("7 seconds", None),
    ("nan", None),
    ("inf", None),
    ("soon", None),
    ("Wed, 21 Oct 2026 07:28:30 GMT", 30),
    ("Wed, 21 Oct 2026 09:28:30 +0200", 30),
    ("Wednesday, 21-Oct-26 07:28:30 GMT", 30),
    ("Wed Oct 21 07:28:30 2026", 30),
    ("Wed, 21 Oct 2026 07:28:30 -0000", 30),
    ("Wed, 21 Oct 2026 07:27:00 GMT", 0),
    ("Thu, 22 Oct 2026 07:28:00 GMT", 3600),
    ("Wed, 99 Oct 2026 07:28:00 GMT", None),
    ("Wed, 21 Oct 99999999999 07:28:00 GMT", None),
]


@pytest.mark.parametrize(("header", "seconds"), RETRY_AFTER)
def test_retry_after_is_seconds_or_a_date_or_nothing(header: str | None, seconds: int | None) -> None:
    assert retry_after_seconds(header, NOW) == seconds


@given(header=st.text() | st.from_regex(r"[A-Z][a-z]{2}, [0-9]{1,12} Oct [0-9]{1,12} [0-9:]{1,9} [+-]?[A-Z0-9]{1,9}"))
def test_no_header_is_too_odd_for_retry_after(header: str) -> None:
    seconds = retry_after_seconds(header, NOW)
    assert seconds is None or 0 <= seconds <= 3600


@pytest.mark.parametrize(("header", "seconds"), [("7", 7), ("1000000000", 3600), ("-1", None), ("garbage", None)])
@pytest.mark.parametrize("status", [429, 503, 529])
async def test_retry_after_is_handed_on(
    session: aiohttp.ClientSession, status: int, header: str, seconds: int | None
) -> None:
    outcome = await ask(session, refusal(status, headers={"Retry-After": header}))
    assert outcome.failure is not None
    assert outcome.failure.retry_after == seconds


async def test_a_retry_after_date_is_counted_from_now(session: aiohttp.ClientSession) -> None:
    outcome = await ask(session, refusal(429, headers={"Retry-After": "Fri, 31 Dec 2100 23:59:59 GMT"}))
    assert outcome.failure is not None
    assert outcome.failure.retry_after == 3600


# Deadlines


async def test_a_vendor_who_never_answers_times_out(session: aiohttp.ClientSession) -> None:
    async def script(wire: Wire) -> None:
        await wire.gone()

    outcome = await ask_until_left(session, script, deadlines=Deadlines(first_event_seconds=SOON))
    assert (outcome.events, outcome.code) == ([], FailureCode.PROVIDER_TIMEOUT)


SILENCES = {
    "nothing": silent_after(),
    "half an event": silent_after(b'data: {"choices": ['),
    "comments for ever": endlessly(b": keep-alive\n\n", pause=0.005),
    "empty events for ever": endlessly(b"data:\n\n", pause=0.005),
    "one event byte by byte for ever": endlessly(b" ", b"data: ", pause=0.005),
}


@pytest.mark.parametrize("name", SILENCES)
async def test_without_a_first_event_the_answer_times_out(session: aiohttp.ClientSession, name: str) -> None:
    outcome = await ask_until_left(session, SILENCES[name], deadlines=Deadlines(first_event_seconds=SOON))
    assert (outcome.events, outcome.code) == ([], FailureCode.PROVIDER_TIMEOUT)


@pytest.mark.parametrize(
    "script",
    [
        silent_after(text("Hel")),
        silent_after(text("Hel"), b'data: {"choices": ['),
        endlessly(b": keep-alive\n\n", text("Hel"), pause=0.005),
        endlessly(b"data:\n\n", text("Hel"), pause=0.005),
        endlessly(b" ", text("Hel"), b"data: ", pause=0.005),
    ],
    ids=["nothing", "half an event", "comments for ever", "empty events for ever", "byte by byte for ever"],
)
async def test_a_stall_midway_times_out_and_keeps_the_text(session: aiohttp.ClientSession, script: Script) -> None:
    outcome = await ask_until_left(session, script, deadlines=Deadlines(idle_seconds=SOON))
    assert (outcome.events, outcome.code) == ([TextDelta("Hel")], FailureCode.PROVIDER_TIMEOUT)


async def test_every_event_renews_the_idle_deadline(session: aiohttp.ClientSession) -> None:
    async def script(wire: Wire) -> None:
        await wire.head()
        for _ in range(12):
            await wire.send(text("a"))
            await asyncio.sleep(0.05)
        await wire.pieces([finish(), DONE])
        await wire.end()

    outcome = await ask(session, script, deadlines=Deadlines(first_event_seconds=0.3, idle_seconds=0.3))
    assert outcome.text == "a" * 12
    assert outcome.finished


async def test_an_answer_without_end_stops_at_the_total_deadline(session: aiohttp.ClientSession) -> None:
    for pause in (0.0, 0.01):
        outcome = await ask_until_left(
            session, endlessly(text("a"), pause=pause), deadlines=Deadlines(total_seconds=2 * SOON)
        )
        assert set(outcome.events) == {TextDelta("a")}
        assert outcome.code is FailureCode.PROVIDER_TIMEOUT


async def test_silence_behind_the_finish_reason_is_an_ordinary_end(session: aiohttp.ClientSession) -> None:
    for deadlines in (Deadlines(idle_seconds=SOON), Deadlines(trailer_seconds=SOON), Deadlines(total_seconds=3 * SOON)):
        outcome = await ask_until_left(session, silent_after(*HELLO[:-1]), deadlines=deadlines)
        assert outcome == Outcome(HELLO_EVENTS)


async def test_a_refusal_whose_body_never_comes_is_judged_by_its_status(session: aiohttp.ClientSession) -> None:
    async def script(wire: Wire) -> None:
        await wire.head(429, headers={"Retry-After": "7"})
        await wire.gone()

    outcome = await ask_until_left(session, script, deadlines=Deadlines(total_seconds=SOON))
    assert outcome.code is FailureCode.RATE_LIMITED
    assert outcome.failure is not None
    assert outcome.failure.retry_after == 7


async def test_a_slow_reader_is_no_reason_for_a_timeout(session: aiohttp.ClientSession) -> None:
    is_wanted = asyncio.Semaphore(1)

    async def script(wire: Wire) -> None:
        await wire.head()
        for piece in HELLO:
            await is_wanted.acquire()
            await wire.send(piece)
        await wire.end()

    async with VendorServer(script) as vendor:
        events = provider_for(session, vendor.base_url, deadlines=Deadlines(idle_seconds=SOON)).stream(REQUEST)
        told = []
        async for event in events:
            told.append(event)
            await asyncio.sleep(1.5 * SOON)
            is_wanted.release()
            if len(told) == 2:
                is_wanted.release()  # [DONE] follows the finish_reason, which shows no event of its own
    assert told == HELLO_EVENTS


async def test_the_total_deadline_covers_a_slow_reader_too(session: aiohttp.ClientSession) -> None:
    async with VendorServer(silent_after(text("Hel"), text("lo"))) as vendor:
        events = provider_for(session, vendor.base_url, deadlines=Deadlines(total_seconds=SOON)).stream(REQUEST)
        await anext(events)
        await asyncio.sleep(1.5 * SOON)
        assert (await outcome_of(events)).code is FailureCode.PROVIDER_TIMEOUT
        await asyncio.wait_for(vendor.client_left.wait(), PROMPTLY)


# Bounds


@pytest.mark.parametrize("piece", [b"x" * 65536, b"data: " + b"x" * 65536, b":" + b"x" * 65536, b"data: x\n" * 8192])
async def test_an_event_without_end_is_cut(session: aiohttp.ClientSession, piece: bytes) -> None:
    wires = []

    async def script(wire: Wire) -> None:
        wires.append(wire)
        await wire.head()
        await wire.send(text("Hel"))
        while True:
            await wire.send(piece)

    outcome = await ask_until_left(session, script, max_event_bytes=256 * 1024)
    assert (outcome.events, outcome.code) == ([TextDelta("Hel")], FailureCode.PROVIDER_PROTOCOL)
    assert wires[0].sent < 16 * 1024 * 1024  # the bound, four times that in tiny lines, and what sockets hold


async def test_a_line_of_ten_megabytes_is_cut(session: aiohttp.ClientSession) -> None:
    outcome = await ask(session, stream_of(text("Hel"), text("x" * 10_000_000), finish(), DONE))
    assert (outcome.events, outcome.code) == ([TextDelta("Hel")], FailureCode.PROVIDER_PROTOCOL)


async def test_a_line_of_two_megabytes_is_an_ordinary_event(session: aiohttp.ClientSession) -> None:
    outcome = await ask(session, stream_of(text("x" * 2_000_000), finish(), DONE))
    assert (len(outcome.text), outcome.finished) == (2_000_000, True)


async def test_an_answer_beyond_the_bound_is_cut_and_keeps_its_text(session: aiohttp.ClientSession) -> None:
    outcome = await ask_until_left(session, endlessly(text("a" * 100)), max_answer_bytes=10_000)
    assert outcome.code is FailureCode.PROVIDER_PROTOCOL
    assert 1000 <= len(outcome.text) <= 10_000


async def test_a_whole_answer_beyond_the_bound_is_refused(session: aiohttp.ClientSession) -> None:
    outcome = await ask(session, whole(orjson.dumps(COMPLETION)), max_event_bytes=100)
    assert (outcome.events, outcome.code) == ([], FailureCode.PROVIDER_PROTOCOL)


async def test_the_body_of_a_refusal_is_not_read_to_its_end(session: aiohttp.ClientSession) -> None:
    wires = []

    async def script(wire: Wire) -> None:
        wires.append(wire)
        await wire.head(500)
        while True:
            await wire.send(b"x" * 65536)

    assert (await ask_until_left(session, script)).code is FailureCode.PROVIDER_UNAVAILABLE
    assert wires[0].sent < 16 * 1024 * 1024


# Leaving


async def test_closing_the_generator_closes_the_connection(session: aiohttp.ClientSession) -> None:
    async with VendorServer(silent_after(text("Hel"))) as vendor:
        events = provider_for(session, vendor.base_url).stream(REQUEST)
        assert await anext(events) == TextDelta("Hel")
        await events.aclose()
        await asyncio.wait_for(vendor.client_left.wait(), PROMPTLY)


async def test_closing_the_generator_stops_a_vendor_who_keeps_talking(session: aiohttp.ClientSession) -> None:
    async with VendorServer(endlessly(text("a"))) as vendor:
        events = provider_for(session, vendor.base_url).stream(REQUEST)
        await anext(events)
        await events.aclose()
        await asyncio.wait_for(vendor.client_left.wait(), PROMPTLY)


@pytest.mark.parametrize("with_head", [True, False])
async def test_cancelling_closes_the_connection(session: aiohttp.ClientSession, with_head: bool) -> None:
    is_asked = asyncio.Event()

    async def script(wire: Wire) -> None:
        if with_head:
            await wire.head()
            await wire.send(b": keep-alive\n\n")
            await wire.be_read()
        is_asked.set()
        await wire.gone()

    async with VendorServer(script) as vendor:
        task = asyncio.create_task(outcome_of(provider_for(session, vendor.base_url).stream(REQUEST)))
        await is_asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(vendor.client_left.wait(), PROMPTLY)


async def test_a_generator_that_was_never_started_asks_nothing(session: aiohttp.ClientSession) -> None:
    async with VendorServer(stream_of(*HELLO)) as vendor:
        await provider_for(session, vendor.base_url).stream(REQUEST).aclose()
    assert vendor.connections == 0


@pytest.mark.parametrize("with_head", [True, False])
async def test_closing_the_provider_fails_its_streams_and_leaves_the_session_open(
    session: aiohttp.ClientSession, with_head: bool
) -> None:
    is_asked = asyncio.Event()

    async def script(wire: Wire) -> None:
        if with_head:
            await wire.head()
            await wire.send(text("Hel"))
            await wire.be_read()
        is_asked.set()
        await wire.gone()

    async with VendorServer(script) as vendor:
        provider = provider_for(session, vendor.base_url)
        task = asyncio.create_task(outcome_of(provider.stream(REQUEST)))
        await is_asked.wait()
        await provider.close()
        outcome = await asyncio.wait_for(task, PROMPTLY)
        await asyncio.wait_for(vendor.client_left.wait(), PROMPTLY)
        later = await outcome_of(provider.stream(REQUEST))
    assert (outcome.text, outcome.code) == ("Hel" if with_head else "", FailureCode.PROVIDER_UNAVAILABLE)
    assert later.code is FailureCode.PROVIDER_UNAVAILABLE
    assert (vendor.connections, session.closed) == (1, False)


async def test_many_streams_of_one_provider_do_not_disturb_each_other(session: aiohttp.ClientSession) -> None:
    async def script(wire: Wire) -> None:
        name = wire.request.json["model"]
        await wire.head()
        await wire.pieces([text(f"{name}:{n} ") for n in range(20)] + [finish(), DONE])
        await wire.end()

    async with VendorServer(script) as vendor:
        provider = provider_for(session, vendor.base_url)
        requests = [GenerationRequest(f"m{n}", REQUEST.messages) for n in range(200)]
        outcomes = await asyncio.gather(*(outcome_of(provider.stream(request)) for request in requests))
    for request, outcome in zip(requests, outcomes, strict=True):
        assert outcome.text == "".join(f"{request.model}:{n} " for n in range(20))
        assert outcome.finished
