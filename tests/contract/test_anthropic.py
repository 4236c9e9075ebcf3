"""What the adapter for Anthropic's Messages API makes of everything a vendor may send, over real sockets.

Every test runs under two guards: whatever fails is checked for the key, the address and the vendor's words, and so is
everything that was logged (tests/adapters.py).
"""

from __future__ import annotations

import asyncio
import gzip
from typing import Any

import aiohttp
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from providers.anthropic import AnthropicProvider, request_body
from providers.base import (
    FailureCode,
    Finish,
    FinishReason,
    GenerationRequest,
    PromptMessage,
    Provider,
    ProviderEvent,
    ReasoningDelta,
    ReasoningSignature,
    TextDelta,
    TokenUsage,
    ToolCall,
)
from providers.http import Deadlines, make_client_session
from tests.adapters import (
    AT_ONCE,
    JSON,
    KEY,
    PATIENT,
    PROMPTLY,
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
from tests.anthropic_wire import (
    MESSAGE_STOP,
    PING,
    answer,
    block_delta,
    block_start,
    block_stop,
    error,
    message_delta,
    message_start,
    text,
    text_block,
    thinking_block,
    tool_block,
)
from tests.vendor_server import Script, VendorServer, Wire

pytestmark = pytest.mark.usefixtures("no_canary_in_logs")

MODEL = "claude-sonnet-5-5"
REQUEST = GenerationRequest(model=MODEL, messages=(PromptMessage.of("user", "Hello"),))
HELLO = answer(text_block("Hel", "lo"))
COUNTED = TokenUsage(prompt=25, completion=15)
HELLO_EVENTS: list[ProviderEvent] = [TextDelta("Hel"), TextDelta("lo"), COUNTED, Finish(FinishReason.STOP)]
# Up to and with the first word, as an answer that is cut has brought it.
BEGUN = [message_start(), block_start(0, {"type": "text", "text": ""}), text("Hel")]
CACHED = {"type": "ephemeral"}


def refusal(
    status: int, kind: str = "api_error", message: str = "", headers: dict[str, str] | None = None, **fields: Any
) -> Script:
    """A script that refuses, and echoes the key as careless gateways do."""
    said = f"{message} {VENDOR_TEXT}: {KEY}"
    body = {"type": "error", "error": {"type": kind, "message": said, **fields}, "request_id": "req_1"}

    async def script(wire: Wire) -> None:
        assert wire.request.headers["x-api-key"] == KEY
        await wire.whole(status, orjson.dumps(body), headers={"X-Echo": KEY, **(headers or {})})

    return script


def provider_for(session: aiohttp.ClientSession, base_url: str, **options: Any) -> AnthropicProvider:
    options = {"api_key": KEY, "deadlines": PATIENT, "retries": AT_ONCE, **options}
    return AnthropicProvider(session=session, base_url=base_url, **options)


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


async def body_of(session: aiohttp.ClientSession, request: GenerationRequest, **options: Any) -> dict[str, Any]:
    """The JSON that goes to the vendor."""
    async with VendorServer(stream_of(*HELLO)) as vendor:
        await outcome_of(provider_for(session, vendor.base_url, **options).stream(request))
    body: dict[str, Any] = vendor.requests[0].json
    return body


def said(*turns: tuple[Any, str]) -> tuple[PromptMessage, ...]:
    return tuple(PromptMessage.of(role, words) for role, words in turns)


def block(words: str, **fields: Any) -> dict[str, Any]:
    return {"type": "text", "text": words, **fields}


# The request


async def test_the_request_says_what_was_asked_and_no_more(session: aiohttp.ClientSession) -> None:
    async with VendorServer(stream_of(*HELLO)) as vendor:
        await outcome_of(provider_for(session, vendor.base_url).stream(REQUEST))
    (request,) = vendor.requests
    assert (request.method, request.path) == ("POST", "/v1/messages")
    assert request.json == {
        "model": MODEL,
        "messages": [{"role": "user", "content": [block("Hello")]}],
        "max_tokens": 16_000,
        "stream": True,
    }
    assert request.headers["x-api-key"] == KEY
    assert request.headers["anthropic-version"] == "2023-06-01"
    assert request.headers["content-type"] == "application/json"
    assert request.headers["accept-encoding"] == "identity"
    assert "authorization" not in request.headers
    assert "cookie" not in request.headers


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/"])
async def test_the_base_address_may_have_its_version_or_not(session: aiohttp.ClientSession, path: str) -> None:
    async with VendorServer(stream_of(*HELLO)) as vendor:
        base_url = f"http://127.0.0.1:{vendor.port}{path}"
        assert (await outcome_of(provider_for(session, base_url).stream(REQUEST))).events == HELLO_EVENTS
    assert vendor.requests[0].path == "/v1/messages"


async def test_a_path_of_the_base_address_stays(session: aiohttp.ClientSession) -> None:
    async with VendorServer(stream_of(*HELLO)) as vendor:
        base_url = f"http://127.0.0.1:{vendor.port}/gateway/anthropic"
        await outcome_of(provider_for(session, base_url).stream(REQUEST))
    assert vendor.requests[0].path == "/gateway/anthropic/v1/messages"


@pytest.mark.parametrize("key", [None, ""])
async def test_without_a_key_there_is_no_header_for_it(session: aiohttp.ClientSession, key: str | None) -> None:
    async with VendorServer(stream_of(*HELLO)) as vendor:
        await outcome_of(provider_for(session, vendor.base_url, api_key=key).stream(REQUEST))
    assert "x-api-key" not in vendor.requests[0].headers


async def test_system_prompts_go_to_the_top_and_the_last_is_cached(session: aiohttp.ClientSession) -> None:
    messages = said(("system", "Be brief."), ("user", "漢 👩‍💻"), ("system", "Rhyme."), ("system", " \n"))
    body = await body_of(session, GenerationRequest(MODEL, messages))
    assert body["system"] == [block("Be brief."), block("Rhyme.", cache_control=CACHED)]
    assert body["messages"] == [{"role": "user", "content": [block("漢 👩‍💻")]}]


async def test_neighbours_of_one_role_become_one_message(session: aiohttp.ClientSession) -> None:
    messages = said(
        ("user", "a"), ("system", "s"), ("user", "b"), ("assistant", "c"), ("assistant", "d"), ("user", "e")
    )
    body = await body_of(session, GenerationRequest(MODEL, messages))
    assert body["messages"] == [
        {"role": "user", "content": [block("a"), block("b", cache_control=CACHED)]},
        {"role": "assistant", "content": [block("c"), block("d")]},
        {"role": "user", "content": [block("e")]},
    ]


async def test_blank_texts_are_left_out_and_a_user_begins(session: aiohttp.ClientSession) -> None:
    messages = said(("assistant", "I am lost"), ("user", " "), ("assistant", "still"), ("user", "a"), ("assistant", ""))
    body = await body_of(session, GenerationRequest(MODEL, messages))
    assert body["messages"] == [{"role": "user", "content": [block("a")]}]


@pytest.mark.parametrize("messages", [(), said(("system", "s")), said(("assistant", "a")), said(("user", " \t"))])
async def test_where_nothing_is_asked_nobody_is_asked(
    session: aiohttp.ClientSession, messages: tuple[PromptMessage, ...]
) -> None:
    async with VendorServer(stream_of(*HELLO)) as vendor:
        request = GenerationRequest(MODEL, messages)
        outcome = await outcome_of(provider_for(session, vendor.base_url).stream(request))
    assert outcome.code is FailureCode.PROVIDER_REJECTED_REQUEST
    assert vendor.connections == 0


ROLES = st.sampled_from(["user", "assistant", "system"])


@given(turns=st.lists(st.tuples(ROLES, st.sampled_from(["", " ", "a", "b\n"])), max_size=9))
def test_whatever_the_history_the_request_is_one_that_is_accepted(turns: list[tuple[Any, str]]) -> None:
    kept = [words for role, words in turns if role != "system" and words.strip()]
    if "user" not in {role for role, words in turns if words.strip()}:
        return
    body = request_body(GenerationRequest(MODEL, said(*turns)), max_text_tokens=5)
    roles = [message["role"] for message in body["messages"]]
    assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"] * (len(roles) % 2)
    sent = [part["text"] for message in body["messages"] for part in message["content"]]
    assert sent == kept[len(kept) - len(sent) :]
    assert all(words.strip() for words in sent)
    marks = orjson.dumps(body).count(b"cache_control")
    assert marks <= 2  # Anthropic takes four


async def test_the_question_before_the_newest_ends_what_is_cached(session: aiohttp.ClientSession) -> None:
    messages = said(("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4"), ("user", "5"))
    body = await body_of(session, GenerationRequest(MODEL, messages))
    marked = [message["content"] for message in body["messages"] if "cache_control" in message["content"][-1]]
    assert marked == [[block("3", cache_control=CACHED)]]


@pytest.mark.parametrize(
    ("effort", "max_tokens"), [("LOW", 18_048), ("MEDIUM", 24_192), ("HIGH", 32_000), (None, 16_000)]
)
async def test_an_effort_is_adaptive_thinking(session: aiohttp.ClientSession, effort: Any, max_tokens: int) -> None:
    body = await body_of(session, GenerationRequest(MODEL, REQUEST.messages, reasoning_effort=effort))
    assert body["max_tokens"] == max_tokens
    assert body.get("thinking") == ({"type": "adaptive", "display": "summarized"} if effort else None)
    assert body.get("output_config") == ({"effort": effort.lower()} if effort else None)
    assert "temperature" not in body


BUDGETED = [
    "claude-3-7-sonnet-20250219",
    "claude-opus-4-0",
    "claude-opus-4-20250514",
    "claude-opus-4-1",
    "claude-opus-4-1@20250805",
    "claude-sonnet-4-5",
    "claude-sonnet-4-5-20250929",
    "claude-haiku-4-5",
    "claude-haiku-4-5-20251001",
    "anthropic/claude-sonnet-4",
    "anthropic/claude-sonnet-4.5",
    "anthropic.claude-opus-4-5-20251101-v1:0",
]
ADAPTIVE = [
    "claude-opus-4-6",
    "claude-sonnet-4-6",
    "anthropic/claude-opus-4.7",
    "claude-opus-4-8",
    "claude-opus-5",
    "claude-haiku-5-5",
    "claude-fable-5-1",
    "claude-mythos-preview",
    "claude-of-next-year",
]


@pytest.mark.parametrize(("effort", "budget"), [("LOW", 2_048), ("MEDIUM", 8_192), ("HIGH", 16_000)])
async def test_models_from_before_adaptive_thinking_get_a_budget(
    session: aiohttp.ClientSession, effort: Any, budget: int
) -> None:
    body = await body_of(session, GenerationRequest("claude-haiku-4-5", REQUEST.messages, reasoning_effort=effort))
    assert body["thinking"] == {"type": "enabled", "budget_tokens": budget}
    assert body["max_tokens"] == 16_000 + budget
    assert "output_config" not in body


@pytest.mark.parametrize(("model", "kind"), [*((m, "enabled") for m in BUDGETED), *((m, "adaptive") for m in ADAPTIVE)])
def test_every_model_gets_the_thinking_that_it_knows(model: str, kind: str) -> None:
    request = GenerationRequest(model, REQUEST.messages, reasoning_effort="LOW")
    body = request_body(request, max_text_tokens=16_000)
    assert body["thinking"]["type"] == kind


@pytest.mark.parametrize(
    ("allowed", "budget"), [(1, None), (2_047, None), (2_048, 1_024), (10_000, 5_000), (100_000, 16_000)]
)
async def test_what_a_request_allows_holds_with_the_thinking_in_it(
    session: aiohttp.ClientSession, allowed: int, budget: int | None
) -> None:
    for model in ("claude-haiku-4-5", MODEL):
        wishes = GenerationRequest(model, REQUEST.messages, reasoning_effort="HIGH", max_output_tokens=allowed)
        body = await body_of(session, wishes)
        assert body["max_tokens"] == allowed
        if model != MODEL:
            assert body.get("thinking", {}).get("budget_tokens") == budget


@pytest.mark.parametrize(("effort", "budget"), [(None, None), ("LOW", 2_048), ("HIGH", 4_096)])
def test_no_limit_is_beyond_what_the_model_can_write(effort: Any, budget: int | None) -> None:
    for model in ("claude-haiku-4-5", MODEL):
        request = GenerationRequest(model, REQUEST.messages, effort, possible_output_tokens=8_192)
        body = request_body(request, max_text_tokens=16_000)
        assert body["max_tokens"] == 8_192
        if model != MODEL:
            assert body.get("thinking", {}).get("budget_tokens") == budget
    ample = GenerationRequest(MODEL, REQUEST.messages, possible_output_tokens=64_000)
    assert request_body(ample, max_text_tokens=16_000)["max_tokens"] == 16_000


async def test_the_limit_of_the_provider_is_for_the_text_alone(session: aiohttp.ClientSession) -> None:
    assert (await body_of(session, REQUEST, max_text_tokens=500))["max_tokens"] == 500
    wishes = GenerationRequest(MODEL, REQUEST.messages, reasoning_effort="LOW")
    assert (await body_of(session, wishes, max_text_tokens=500))["max_tokens"] == 2_548


async def test_the_user_is_told_as_metadata(session: aiohttp.ClientSession) -> None:
    body = await body_of(session, GenerationRequest(MODEL, REQUEST.messages, user="u1"))
    assert body["metadata"] == {"user_id": "u1"}


@pytest.mark.parametrize(
    "base_url",
    ["", "api.example.com", "file:///etc/passwd", "http:///v1", "http://user:pass@api.example.com", "http://a.b/?x=1"],
)
async def test_an_address_that_is_no_plain_http_address_is_refused(
    session: aiohttp.ClientSession, base_url: str
) -> None:
    with pytest.raises(ValueError, match="base address") as refused:
        provider_for(session, base_url)
    assert "example" not in str(refused.value)


@pytest.mark.parametrize("key", [KEY + "\r\nX-Injected: 1", KEY + " ", KEY + "\x00", KEY + "ü"])
async def test_a_key_that_no_header_can_carry_is_refused_without_being_named(
    session: aiohttp.ClientSession, key: str
) -> None:
    with pytest.raises(ValueError, match="API key") as refused:
        provider_for(session, "http://127.0.0.1", api_key=key)
    assert KEY not in repr(refused.value)


async def test_the_key_is_in_no_repr(session: aiohttp.ClientSession) -> None:
    provider: Provider = provider_for(session, "http://127.0.0.1")
    assert KEY not in f"{provider!r} {provider}"


# What an answer brings


async def test_text_arrives_in_order_then_the_usage_then_the_finish(session: aiohttp.ClientSession) -> None:
    assert await ask(session, stream_of(*HELLO)) == Outcome(HELLO_EVENTS)


async def test_events_come_while_the_vendor_is_still_speaking(session: aiohttp.ClientSession) -> None:
    first_was_seen = asyncio.Event()

    async def script(wire: Wire) -> None:
        await wire.head()
        await wire.pieces(BEGUN)
        await first_was_seen.wait()
        await wire.pieces([text("lo"), block_stop(0), message_delta(), MESSAGE_STOP])
        await wire.end()

    async with VendorServer(script) as vendor:
        events = provider_for(session, vendor.base_url).stream(REQUEST)
        assert await anext(events) == TextDelta("Hel")
        first_was_seen.set()
        assert (await outcome_of(events)).text == "lo"


async def test_an_answer_with_everything_in_it_is_told_in_its_order(session: aiohttp.ClientSession) -> None:
    citation = {"type": "web_search_result_location", "cited_text": "c", "url": "https://a", "title": "t"}
    search_result = {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": []}
    pieces = [
        message_start(),
        PING,
        *thinking_block("Let me ", "see.", index=0),
        block_start(1, {"type": "redacted_thinking", "data": "EmwKAhgB"}),
        block_stop(1),
        *tool_block("srvtoolu_1", "web_search", '{"query": ', '"owl"}', index=2, kind="server_tool_use"),
        block_start(3, search_result),
        block_stop(3),
        block_start(4, {"type": "text", "text": "", "citations": []}),
        block_delta(4, {"type": "citations_delta", "citation": citation}),
        text("Grüß ", 4),
        PING,
        text("Gott", 4),
        block_stop(4),
        *tool_block("toolu_1", "weather", "", '{"city": "Bo', 'nn"}', index=5),
        *tool_block("toolu_2", "now", index=6),
        message_delta("tool_use"),
        MESSAGE_STOP,
    ]
    outcome = await ask(session, stream_of(*pieces))
    assert outcome.events == [
        ReasoningDelta("Let me "),
        ReasoningDelta("see."),
        ReasoningSignature("EqQBCgIYAhIM1gbcDa9GJwZA2b3h"),
        ReasoningSignature(None),
        TextDelta("Grüß "),
        TextDelta("Gott"),
        ToolCall("toolu_1", "weather", {"city": "Bonn"}),
        ToolCall("toolu_2", "now", {}),
        COUNTED,
        Finish(FinishReason.TOOL_CALLS),
    ]


async def test_what_a_block_begins_with_counts(session: aiohttp.ClientSession) -> None:
    pieces = [
        block_start(0, {"type": "thinking", "thinking": "hm", "signature": ""}),
        block_start(1, {"type": "text", "text": "Hi"}),
        *tool_block("a", "f", index=2, given={"n": 1}),
    ]
    outcome = await ask(session, stream_of(message_start(), *pieces, message_delta(), MESSAGE_STOP))
    assert outcome.events[:3] == [ReasoningDelta("hm"), TextDelta("Hi"), ToolCall("a", "f", {"n": 1})]


@pytest.mark.parametrize(
    ("block", "told"),
    [
        (thinking_block("hm", signature="EqQ="), [ReasoningDelta("hm"), ReasoningSignature("EqQ=")]),
        # Thinking that is not shown is signed all the same.
        (thinking_block(signature="EqQ="), [ReasoningSignature("EqQ=")]),
        (thinking_block("hm", signature=""), [ReasoningDelta("hm")]),
        (
            [block_start(0, {"type": "thinking", "thinking": "hm", "signature": "EqQ="})],
            [ReasoningDelta("hm"), ReasoningSignature("EqQ=")],
        ),
        # What had to be repaired is not what was signed.
        (thinking_block("h\x00m"), [ReasoningDelta("h\N{REPLACEMENT CHARACTER}m"), ReasoningSignature(None)]),
        (thinking_block("hm", signature="E\x00"), [ReasoningDelta("hm"), ReasoningSignature(None)]),
        (thinking_block("hm", signature="x" * 1_048_577), [ReasoningDelta("hm"), ReasoningSignature(None)]),
        (
            [block_start(0, {"type": "redacted_thinking", "data": "EmwKAhgB"}), block_stop(0)],
            [ReasoningSignature(None)],
        ),
    ],
)
async def test_a_signature_comes_behind_what_it_signs(
    session: aiohttp.ClientSession, block: list[bytes], told: list[ProviderEvent]
) -> None:
    pieces = [*block, *text_block("Hi", index=1)]
    outcome = await ask(session, stream_of(message_start(), *pieces, message_delta(), MESSAGE_STOP))
    events = [event for event in outcome.events if not isinstance(event, TextDelta)]
    assert events[:-2] == told


@pytest.mark.parametrize(
    ("fragments", "told"),
    [
        ([], {}),
        ([""], {}),
        (["[1, null]"], [1, None]),
        (['{"a": '], '{"a": '),
        (["Bonn"], "Bonn"),
        (['"\\u0000\\ud83d"'], "��"),
        (["9" * 30], float("9" * 30)),
        (["[" * 400 + "]" * 400], "[" * 400 + "]" * 400),
        (["[" * 9000], "[" * 9000),
    ],
)
async def test_arguments_that_are_no_json_are_kept_as_text(
    session: aiohttp.ClientSession, fragments: list[str], told: Any
) -> None:
    pieces = answer(tool_block("a", "f", *fragments), stop_reason="tool_use")
    assert (await ask(session, stream_of(*pieces))).events[0] == ToolCall("a", "f", told)


async def test_calls_side_by_side_are_told_apart_by_their_index(session: aiohttp.ClientSession) -> None:
    a, b = tool_block("a", "f", '{"n":', "1}", index=0), tool_block("b", "g", '{"m":', "2}", index=1)
    mixed = [event for pair in zip(a, b, strict=True) for event in pair]
    outcome = await ask(session, stream_of(*answer(mixed, stop_reason="tool_use")))
    assert outcome.events[:2] == [ToolCall("a", "f", {"n": 1}), ToolCall("b", "g", {"m": 2})]


async def test_a_call_without_end_or_id_is_told_all_the_same(session: aiohttp.ClientSession) -> None:
    unended = [block_start(0, {"type": "tool_use", "id": None, "name": "f\x00", "input": None})]
    overwritten = tool_block("b", "g", "1")[:2]
    outcome = await ask(session, stream_of(*answer(unended, overwritten)))
    assert outcome.events[:2] == [ToolCall("call_0", "f�", {}), ToolCall("b", "g", 1)]


async def test_a_call_that_was_cut_is_not_told(session: aiohttp.ClientSession) -> None:
    cut = tool_block("a", "f", "{}", index=1)[:2]
    assert (await ask(session, hung_up_after(*BEGUN, *cut))).events == [TextDelta("Hel")]


async def test_calls_without_number_are_refused(session: aiohttp.ClientSession) -> None:
    outcome = await ask(session, stream_of(*answer(*(tool_block(str(n), "f", index=n) for n in range(300)))))
    assert outcome.code is FailureCode.PROVIDER_PROTOCOL


@pytest.mark.parametrize(
    ("reason", "meaning"),
    [
        ("end_turn", FinishReason.STOP),
        ("stop_sequence", FinishReason.STOP),
        ("pause_turn", FinishReason.STOP),
        ("max_tokens", FinishReason.LENGTH),
        ("model_context_window_exceeded", FinishReason.LENGTH),
        ("tool_use", FinishReason.TOOL_CALLS),
        ("refusal", FinishReason.CONTENT_FILTER),
        ("some_news", FinishReason.STOP),
        (None, FinishReason.STOP),
        (5, FinishReason.STOP),
    ],
)
async def test_a_stop_reason_keeps_its_meaning(
    session: aiohttp.ClientSession, reason: Any, meaning: FinishReason
) -> None:
    assert (await ask(session, stream_of(*answer(stop_reason=reason)))).events[-1] == Finish(meaning)


async def test_what_was_cached_is_a_share_of_the_prompt(session: aiohttp.ClientSession) -> None:
    started = message_start(cache_read_input_tokens=100, cache_creation_input_tokens=7)
    ended = message_delta(output_tokens=40, output_tokens_details={"thinking_tokens": 30}, input_tokens=None)
    outcome = await ask(session, stream_of(started, *text_block("Hi"), ended, MESSAGE_STOP))
    assert outcome.events[1] == TokenUsage(prompt=132, completion=40, reasoning=30, cached=100)


async def test_later_counts_replace_earlier_ones_and_are_told_once(session: aiohttp.ClientSession) -> None:
    first, last = message_delta(None, output_tokens=3), message_delta(output_tokens=9, input_tokens=30)
    outcome = await ask(session, stream_of(message_start(), *text_block("Hi"), first, last, MESSAGE_STOP))
    assert outcome.events[1:] == [TokenUsage(prompt=30, completion=9), Finish(FinishReason.STOP)]


@pytest.mark.parametrize(
    ("counts", "told"),
    [
        ({"input_tokens": "12", "output_tokens": 3}, TokenUsage(completion=3)),
        ({"input_tokens": -1, "output_tokens": True}, None),
        ({"output_tokens": 2**40}, TokenUsage(prompt=25, completion=2**31 - 1)),
        ({"cache_read_input_tokens": 2**40}, TokenUsage(prompt=2**31 - 1, completion=15, cached=2**31 - 1)),
        ({"output_tokens_details": {"thinking_tokens": 99}}, TokenUsage(prompt=25, completion=15, reasoning=15)),
        ({"output_tokens_details": [], "cache_read_input_tokens": None}, TokenUsage(prompt=25, completion=15)),
    ],
)
async def test_usage_of_the_wrong_type_counts_as_nothing(
    session: aiohttp.ClientSession, counts: dict[str, Any], told: TokenUsage | None
) -> None:
    outcome = await ask(session, stream_of(message_start(), *text_block("Hi"), message_delta(**counts), MESSAGE_STOP))
    assert outcome.events == [TextDelta("Hi"), *([told] if told else []), Finish(FinishReason.STOP)]


MESSAGE = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "content": [
        {"type": "thinking", "thinking": "hm", "signature": "s"},
        {"type": "text", "text": "Hello"},
        {"type": "tool_use", "id": "a", "name": "f", "input": {"n": 1}},
    ],
    "stop_reason": "tool_use",
    "usage": {"input_tokens": 3, "output_tokens": 2},
}


@pytest.mark.parametrize("content_type", ["application/json", "Application/JSON; charset=utf-8"])
async def test_a_server_that_does_not_stream_is_understood(session: aiohttp.ClientSession, content_type: str) -> None:
    outcome = await ask(session, whole(orjson.dumps(MESSAGE), content_type))
    assert outcome.events == [
        ReasoningDelta("hm"),
        ReasoningSignature("s"),
        TextDelta("Hello"),
        ToolCall("a", "f", {"n": 1}),
        TokenUsage(prompt=3, completion=2),
        Finish(FinishReason.TOOL_CALLS),
    ]


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b"null", b'"ok"', b'{"content": {}}', b'{"content": [', b"Hello"])
async def test_json_that_is_no_message_is_a_protocol_failure(session: aiohttp.ClientSession, body: bytes) -> None:
    outcome = await ask(session, whole(body))
    assert (outcome.events, outcome.code) == ([], FailureCode.PROVIDER_PROTOCOL)


# How an answer ends


@pytest.mark.parametrize("framing", ["chunked", "close"])
async def test_only_message_stop_makes_an_answer_whole(session: aiohttp.ClientSession, framing: str) -> None:
    for length in range(len(HELLO)):
        for script in (hung_up_after(*HELLO[:length], framing=framing), stream_of(*HELLO[:length])):
            outcome = await ask(session, script)
            assert not outcome.finished
            assert outcome.failure is None
            assert "Hello".startswith(outcome.text)


async def test_counts_from_before_the_answer_are_not_taken_for_its_usage(session: aiohttp.ClientSession) -> None:
    assert await ask(session, hung_up_after(*BEGUN)) == Outcome([TextDelta("Hel")])


async def test_usage_told_before_a_failure_is_kept(session: aiohttp.ClientSession) -> None:
    outcome = await ask(session, stream_of(*HELLO[:-1], error("api_error", VENDOR_TEXT)))
    assert outcome.events == HELLO_EVENTS[:-1]
    assert outcome.code is FailureCode.PROVIDER_UNAVAILABLE


async def test_a_cut_inside_of_an_event_drops_that_event(session: aiohttp.ClientSession) -> None:
    event = text("lo")
    for cut in range(0, len(event) - 3, 7):
        assert await ask(session, hung_up_after(*BEGUN, event[:cut])) == Outcome([TextDelta("Hel")])


@pytest.mark.parametrize("ends", [b"", b"\n", b"\r\n"])
async def test_a_last_event_without_blank_line_counts(session: aiohttp.ClientSession, ends: bytes) -> None:
    outcome = await ask(session, hung_up_after(*HELLO[:-1], MESSAGE_STOP.strip() + ends))
    assert outcome.events == HELLO_EVENTS


@pytest.mark.parametrize("after", [MESSAGE_STOP, text("more"), error("api_error"), b"data: {\n\n"])
async def test_nothing_behind_message_stop_counts(session: aiohttp.ClientSession, after: bytes) -> None:
    assert (await ask(session, stream_of(*HELLO, after))).events == HELLO_EVENTS
    assert (await ask(session, stream_of(b"".join([*HELLO, after])))).events == HELLO_EVENTS


async def test_a_reset_midway_is_a_failure_that_keeps_the_text_and_is_not_tried_again(
    session: aiohttp.ClientSession,
) -> None:
    was_seen = asyncio.Event()

    async def script(wire: Wire) -> None:
        await wire.head()
        await wire.pieces(BEGUN)
        await was_seen.wait()
        wire.reset()

    async with VendorServer(script) as vendor:
        events = provider_for(session, vendor.base_url).stream(REQUEST)
        assert await anext(events) == TextDelta("Hel")
        was_seen.set()
        assert (await outcome_of(events)).code is FailureCode.PROVIDER_UNAVAILABLE
    assert len(vendor.requests) == 1


async def test_a_finished_answer_gives_its_connection_to_the_next(session: aiohttp.ClientSession) -> None:
    async with VendorServer(stream_of(*HELLO)) as vendor:
        for _ in range(3):
            assert (await outcome_of(provider_for(session, vendor.base_url).stream(REQUEST))).events == HELLO_EVENTS
    assert vendor.connections == 1


async def test_a_vendor_who_never_closes_after_message_stop_is_left(session: aiohttp.ClientSession) -> None:
    assert (await ask_until_left(session, silent_after(*HELLO))).events == HELLO_EVENTS


# Characters and line ends


async def test_text_cut_at_any_byte_is_the_same_text(session: aiohttp.ClientSession) -> None:
    delta = b'{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"%b"}}' % SCRIPTS.encode()
    event = b"event: content_block_delta\r\ndata: " + delta + b"\r\n\r\n"
    before, after = b"".join(BEGUN[:2]), block_stop(0) + message_delta() + MESSAGE_STOP
    for cut in range(len(event)):
        outcome = await ask(session, stream_of(before + event[:cut], event[cut:] + after))
        assert outcome == Outcome([TextDelta(SCRIPTS), COUNTED, Finish(FinishReason.STOP)])


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf", b": comment\n\n", b"id: 1\nretry: 5\n"])
async def test_every_legal_form_of_the_stream_is_the_same_answer(
    session: aiohttp.ClientSession, line_end: bytes, start: bytes
) -> None:
    stream = (start + b": between\n\n".join(HELLO)).replace(b"\n", line_end)
    assert (await ask(session, stream_of(stream))).events == HELLO_EVENTS
    assert (await ask(session, stream_of(*(stream[at : at + 1] for at in range(len(stream)))))).events == HELLO_EVENTS


async def test_events_are_known_by_their_type_or_by_their_name(session: aiohttp.ClientSession) -> None:
    nameless = [event.split(b"\n", 1)[1] for event in HELLO]
    assert (await ask(session, stream_of(*nameless))).events == HELLO_EVENTS
    typeless = [event.replace(b'{"type":"%b",' % name, b"{") for event in HELLO for name in [event[7:].split(b"\n")[0]]]
    assert typeless[1] != HELLO[1]
    assert (await ask(session, stream_of(*typeless))).events == HELLO_EVENTS


@pytest.mark.parametrize(
    ("content", "repaired"),
    [(b"a\xffb", "a�b"), (b"\xed\xa0\xbd", "���"), (b"a\\ud83db", "a�b"), (b"a\\u0000b", "a�b")],
)
async def test_what_cannot_be_stored_is_replaced(session: aiohttp.ClientSession, content: bytes, repaired: str) -> None:
    deltas = [
        b'data: {"type":"content_block_delta","index":0,"delta":{"type":"%b_delta","%b":"%b"}}\n\n'
        % (kind, kind, content)
        for kind in (b"thinking", b"text")
    ]
    outcome = await ask(session, stream_of(*answer(deltas)))
    assert outcome.events[:2] == [ReasoningDelta(repaired), TextDelta(repaired)]


# What must not cost an answer


@pytest.mark.parametrize(
    "odd",
    [
        {},
        [],
        None,
        "ping",
        0,
        {"type": None},
        {"type": ["error"]},
        {"type": "ping"},
        {"type": "content_block_news", "index": 0},
        {"type": "message_start"},
        {"type": "message_start", "message": []},
        {"type": "message_start", "message": {"usage": 5}},
        {"type": "message_delta"},
        {"type": "message_delta", "delta": None, "usage": None},
        {"type": "message_delta", "delta": {"stop_reason": []}, "usage": []},
        {"type": "content_block_start"},
        {"type": "content_block_start", "index": [], "content_block": {"type": "tool_use"}},
        {"type": "content_block_start", "index": 9, "content_block": {"type": {}, "text": "x"}},
        {"type": "content_block_start", "index": 9, "content_block": {"type": "text", "text": None}},
        {"type": "content_block_start", "index": 9, "content_block": {"type": "a_new_kind", "text": "x"}},
        {"type": "content_block_delta"},
        {"type": "content_block_delta", "index": 0, "delta": []},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": None}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "a_new_delta", "text": "x"}},
        {"type": "content_block_delta", "index": [], "delta": {"type": "input_json_delta", "partial_json": "{"}},
        {"type": "content_block_delta", "index": 9, "delta": {"type": "input_json_delta", "partial_json": "{"}},
        {"type": "content_block_stop"},
        {"type": "content_block_stop", "index": {}},
        {"error": None},
    ],
    ids=lambda odd: orjson.dumps(odd).decode(),
)
async def test_an_odd_event_is_skipped(session: aiohttp.ClientSession, odd: Any) -> None:
    named = f"event: {odd['type']}\n".encode() if isinstance(odd, dict) and isinstance(odd.get("type"), str) else b""
    event = named + b"data: " + orjson.dumps(odd) + b"\n\n"
    assert await ask(session, stream_of(*HELLO[:3], event, *HELLO[3:])) == Outcome(HELLO_EVENTS)


KINDS = st.sampled_from(["text", "thinking", "tool_use", "server_tool_use", "redacted_thinking"])
BLOCKS = fuzzed(
    type=KINDS,
    text=st.text(),
    thinking=st.text(),
    signature=st.text(max_size=3),
    id=st.text(max_size=3),
    name=st.text(max_size=3),
    input=JSON,
)
DELTAS = fuzzed(
    type=st.sampled_from(["text_delta", "thinking_delta", "signature_delta", "input_json_delta"]),
    text=st.text(),
    thinking=st.text(),
    signature=st.text(max_size=3),
    partial_json=st.text(max_size=9),
    stop_reason=st.sampled_from(["end_turn", "max_tokens", "tool_use"]),
)
COUNTS = fuzzed(
    input_tokens=st.integers(),
    output_tokens=st.integers(),
    cache_read_input_tokens=st.integers(),
    cache_creation_input_tokens=st.integers(),
    output_tokens_details=fuzzed(thinking_tokens=st.integers()),
)
EVENTS = fuzzed(
    type=st.sampled_from(
        [
            "message_start",
            "content_block_start",
            "content_block_delta",
            "content_block_stop",
            "message_delta",
            "message_stop",
            "error",
            "ping",
        ]
    ),
    index=st.integers(0, 2),
    content_block=BLOCKS,
    delta=DELTAS,
    usage=COUNTS,
    message=fuzzed(usage=COUNTS),
    error=JSON,
    content=st.lists(BLOCKS, max_size=3),
)


@settings(max_examples=80, deadline=None)
@given(payloads=st.lists(EVENTS, max_size=6), content_type=st.sampled_from(["text/event-stream", "application/json"]))
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
        if isinstance(event, ReasoningSignature) and event.signature is not None:
            assert event.signature.isprintable()
            assert event.signature.isascii()
    assert not (outcome.finished and outcome.failure)
    assert not outcome.finished or isinstance(outcome.events[-1], Finish)


def json_of(value: Any) -> bytes:
    try:
        return orjson.dumps(value)
    except TypeError:  # integers beyond 64 bits
        return b'{"type":"content_block_delta","delta":{"type":"text_delta","text":123456789012345678901234567890}}'


# Failures


PAGE = whole(f"<html>{VENDOR_TEXT} {KEY}</html>".encode(), "text/html; charset=utf-8")
BOMB = whole(gzip.compress(b"data: " + b"x" * 50_000_000, mtime=0), "text/event-stream", {"Content-Encoding": "gzip"})
INVALID = "invalid_request_error"

FAILURES: dict[str, tuple[Script, FailureCode]] = {
    "400": (refusal(400, INVALID, "max_tokens: Field required"), FailureCode.PROVIDER_REJECTED_REQUEST),
    "400 too long": (
        refusal(400, INVALID, "prompt is too long: 205547 tokens > 200000 maximum"),
        FailureCode.CONTEXT_TOO_LONG,
    ),
    "400 too long with the answer": (
        refusal(400, INVALID, "input length and `max_tokens` exceed context limit: 190000 + 32000 > 200000"),
        FailureCode.CONTEXT_TOO_LONG,
    ),
    "400 without credit": (
        refusal(400, INVALID, "Your credit balance is too low to access the Anthropic API."),
        FailureCode.PROVIDER_REJECTED_REQUEST,
    ),
    "400 filtered": (
        refusal(400, INVALID, "Output blocked by content filtering policy"),
        FailureCode.CONTENT_FILTERED,
    ),
    "401": (refusal(401, "authentication_error", "invalid x-api-key"), FailureCode.PROVIDER_REJECTED_KEY),
    "402": (refusal(402, "billing_error"), FailureCode.PROVIDER_REJECTED_REQUEST),
    "403": (refusal(403, "permission_error"), FailureCode.PROVIDER_REJECTED_KEY),
    "404 model": (refusal(404, "not_found_error", "model: claude-9"), FailureCode.PROVIDER_REJECTED_REQUEST),
    "413": (refusal(413, "request_too_large"), FailureCode.CONTEXT_TOO_LONG),
    "429": (refusal(429, "rate_limit_error"), FailureCode.RATE_LIMITED),
    "429 spend limit": (
        refusal(429, "rate_limit_error", details={"error_code": "enforced_spend_limit_reached"}),
        FailureCode.PROVIDER_REJECTED_REQUEST,
    ),
    "500": (refusal(500, "api_error"), FailureCode.PROVIDER_UNAVAILABLE),
    "504": (refusal(504, "timeout_error"), FailureCode.PROVIDER_TIMEOUT),
    "529": (refusal(529, "overloaded_error"), FailureCode.PROVIDER_UNAVAILABLE),
    "a page with 200": (PAGE, FailureCode.PROVIDER_PROTOCOL),
    "a gzip bomb": (BOMB, FailureCode.PROVIDER_PROTOCOL),
    "no JSON": (stream_of(b'data: {"type": [' + KEY.encode() + b"\n\n"), FailureCode.PROVIDER_PROTOCOL),
    "JSON nested without end": (stream_of(b"data: " + b"[" * 100_000 + b"\n\n"), FailureCode.PROVIDER_PROTOCOL),
}


@pytest.mark.parametrize(("script", "code"), [pytest.param(*case, id=name) for name, case in FAILURES.items()])
async def test_a_failure_has_its_code_and_betrays_nothing(
    session: aiohttp.ClientSession, script: Script, code: FailureCode
) -> None:
    outcome = await ask(session, script)
    assert (outcome.events, outcome.code) == ([], code)


async def test_a_lack_of_credit_is_told_as_such(session: aiohttp.ClientSession) -> None:
    for name in ("400 without credit", "402", "429 spend limit"):
        failure = (await ask(session, FAILURES[name][0])).failure
        assert failure is not None
        assert "credit" in failure.message


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("overloaded_error", FailureCode.PROVIDER_UNAVAILABLE),
        ("api_error", FailureCode.PROVIDER_UNAVAILABLE),
        ("rate_limit_error", FailureCode.RATE_LIMITED),
        ("authentication_error", FailureCode.PROVIDER_REJECTED_KEY),
        ("permission_error", FailureCode.PROVIDER_REJECTED_KEY),
        ("invalid_request_error", FailureCode.PROVIDER_REJECTED_REQUEST),
        ("not_found_error", FailureCode.PROVIDER_REJECTED_REQUEST),
        ("billing_error", FailureCode.PROVIDER_REJECTED_REQUEST),
        ("request_too_large", FailureCode.CONTEXT_TOO_LONG),
        ("timeout_error", FailureCode.PROVIDER_TIMEOUT),
        ("an_error_of_next_year", FailureCode.PROVIDER_UNAVAILABLE),
    ],
)
async def test_an_error_inside_of_an_answer_is_a_failure_that_keeps_the_text(
    session: aiohttp.ClientSession, kind: str, code: FailureCode
) -> None:
    outcome = await ask(session, stream_of(*BEGUN, error(kind, f"{VENDOR_TEXT} {KEY}"), *HELLO[3:]))
    assert (outcome.events, outcome.code) == ([TextDelta("Hel")], code)


@pytest.mark.parametrize(
    "event",
    [
        b'event: error\ndata: {"type":"overloaded_error","message":"m"}\n\n',
        b'event: error\ndata: {"message":"m"}\n\n',
        b'data: {"type":"error","error":{"type":"overloaded_error"}}\n\n',
        b'data: {"error":{"type":"overloaded_error"}}\n\n',
        b'data: {"type":"error","error":"m"}\n\n',
        b'data: {"type":"error"}\n\n',
    ],
)
async def test_an_error_is_known_in_every_form(session: aiohttp.ClientSession, event: bytes) -> None:
    outcome = await ask(session, stream_of(*BEGUN, event, *HELLO[3:]))
    assert (outcome.text, outcome.code) == ("Hel", FailureCode.PROVIDER_UNAVAILABLE)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_not_followed(session: aiohttp.ClientSession, status: int) -> None:
    async with VendorServer(stream_of(*HELLO)) as elsewhere:
        outcome = await ask(session, refusal(status, headers={"Location": f"{elsewhere.base_url}/messages"}))
    assert (outcome.events, outcome.code) == ([], FailureCode.PROVIDER_PROTOCOL)
    assert elsewhere.connections == 0


# Deadlines and bounds


SILENCES = {
    "nothing": silent_after(),
    "half an event": silent_after(b'event: message_start\ndata: {"type":'),
    "pings for ever": endlessly(PING, pause=0.005),
    "nameless pings for ever": endlessly(b'data: {"type": "ping"}\n\n', pause=0.005),
    "comments for ever": endlessly(b": keep-alive\n\n", pause=0.005),
    "one event byte by byte for ever": endlessly(b" ", b"data: ", pause=0.005),
}


@pytest.mark.parametrize("name", SILENCES)
async def test_without_a_first_event_the_answer_times_out(session: aiohttp.ClientSession, name: str) -> None:
    outcome = await ask_until_left(session, SILENCES[name], deadlines=Deadlines(first_event_seconds=SOON))
    assert (outcome.events, outcome.code) == ([], FailureCode.PROVIDER_TIMEOUT)


@pytest.mark.parametrize("pings", [False, True])
async def test_a_stall_midway_times_out_whether_pings_come_or_not(session: aiohttp.ClientSession, pings: bool) -> None:
    script = endlessly(PING, *BEGUN, pause=0.005) if pings else silent_after(*BEGUN)
    outcome = await ask_until_left(session, script, deadlines=Deadlines(idle_seconds=SOON))
    assert (outcome.events, outcome.code) == ([TextDelta("Hel")], FailureCode.PROVIDER_TIMEOUT)


async def test_pings_between_words_cost_nothing(session: aiohttp.ClientSession) -> None:
    pieces = [piece for event in HELLO for piece in (event, PING)]
    assert (await ask(session, stream_of(*pieces))).events == HELLO_EVENTS


async def test_endless_words_end_by_the_total_deadline(session: aiohttp.ClientSession) -> None:
    script = endlessly(text("a"), *BEGUN, pause=0.01)
    outcome = await ask_until_left(session, script, deadlines=Deadlines(total_seconds=2 * SOON))
    assert outcome.text.startswith("Hela")
    assert outcome.code is FailureCode.PROVIDER_TIMEOUT


async def test_a_line_of_ten_megabytes_is_cut_and_one_of_two_is_not(session: aiohttp.ClientSession) -> None:
    outcome = await ask(session, stream_of(*BEGUN, text("x" * 10_000_000)))
    assert (outcome.events, outcome.code) == ([TextDelta("Hel")], FailureCode.PROVIDER_PROTOCOL)
    outcome = await ask(session, stream_of(*BEGUN, text("x" * 2_000_000), *HELLO[4:]))
    assert (len(outcome.text), outcome.finished) == (2_000_003, True)


async def test_an_answer_beyond_the_bound_is_cut_and_keeps_its_text(session: aiohttp.ClientSession) -> None:
    outcome = await ask_until_left(session, endlessly(text("a" * 100)), max_answer_bytes=20_000)
    assert outcome.code is FailureCode.PROVIDER_PROTOCOL
    assert 1000 <= len(outcome.text) <= 20_000


# Leaving


async def test_closing_the_generator_closes_the_connection(session: aiohttp.ClientSession) -> None:
    async with VendorServer(silent_after(*BEGUN)) as vendor:
        events = provider_for(session, vendor.base_url).stream(REQUEST)
        assert await anext(events) == TextDelta("Hel")
        await events.aclose()
        await asyncio.wait_for(vendor.client_left.wait(), PROMPTLY)


async def test_many_streams_of_one_provider_do_not_disturb_each_other(session: aiohttp.ClientSession) -> None:
    async def script(wire: Wire) -> None:
        name = wire.request.json["model"]
        await wire.head()
        await wire.pieces(answer(text_block(*(f"{name}:{n} " for n in range(20)))))
        await wire.end()

    async with VendorServer(script) as vendor:
        provider = provider_for(session, vendor.base_url)
        requests = [GenerationRequest(f"m{n}", REQUEST.messages) for n in range(100)]
        outcomes = await asyncio.gather(*(outcome_of(provider.stream(request)) for request in requests))
    for request, outcome in zip(requests, outcomes, strict=True):
        assert outcome.text == "".join(f"{request.model}:{n} " for n in range(20))
        assert outcome.finished
