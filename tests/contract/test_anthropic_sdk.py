"""The adapter for Anthropic beside Anthropic's own client: fed with the same bytes, both understand the same answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from providers.anthropic import AnthropicProvider, request_body
from providers.base import (
    Finish,
    FinishReason,
    GenerationRequest,
    PromptMessage,
    ReasoningSignature,
    TokenUsage,
    ToolCall,
)
from providers.http import make_client_session
from tests.adapters import AT_ONCE, KEY, PATIENT, Outcome, hung_up_after, outcome_of, stream_of
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
    text_block,
    thinking_block,
    tool_block,
)
from tests.prompts import PROMPTS
from tests.shapes import misfits
from tests.vendor_server import Script, VendorServer, Wire

# The clients themselves are imported where they are used: that takes 1 s of CPU, of each worker.
if TYPE_CHECKING:
    from anthropic.types import Message

MODEL = "claude-sonnet-5-5"
REQUEST = GenerationRequest(MODEL, (PromptMessage.of("user", "Hello"),))
# What each reason of Anthropic's documents means in our terms, written down apart from the adapter.
REASONS = {
    "end_turn": FinishReason.STOP,
    "max_tokens": FinishReason.LENGTH,
    "stop_sequence": FinishReason.STOP,
    "tool_use": FinishReason.TOOL_CALLS,
    "pause_turn": FinishReason.STOP,
    "refusal": FinishReason.CONTENT_FILTER,
    "model_context_window_exceeded": FinishReason.LENGTH,
}


@dataclass
class Understood:
    """What a client made of an answer, in terms that both have."""

    text: str
    thinking: str
    signatures: list[str]
    calls: list[tuple[str, str, Any]]
    prompt: int
    cached: int
    completion: int
    reasoning: int
    stop: FinishReason | None


def by_adapter(outcome: Outcome) -> Understood:
    assert outcome.failure is None
    usage = next((event for event in outcome.events if isinstance(event, TokenUsage)), TokenUsage())
    return Understood(
        outcome.text,
        outcome.reasoning,
        [event.signature for event in outcome.events if isinstance(event, ReasoningSignature) and event.signature],
        [(event.call_id, event.name, event.arguments) for event in outcome.events if isinstance(event, ToolCall)],
        usage.prompt,
        usage.cached,
        usage.completion,
        usage.reasoning,
        next((event.reason for event in outcome.events if isinstance(event, Finish)), None),
    )


def by_sdk(message: Message) -> Understood:
    usage, blocks = message.usage, message.content
    cached = usage.cache_read_input_tokens or 0
    details = usage.output_tokens_details
    return Understood(
        "".join(block.text for block in blocks if block.type == "text"),
        "".join(block.thinking for block in blocks if block.type == "thinking"),
        [block.signature for block in blocks if block.type == "thinking" and block.signature],
        [(block.id, block.name, block.input) for block in blocks if block.type == "tool_use"],
        usage.input_tokens + (usage.cache_creation_input_tokens or 0) + cached,
        cached,
        usage.output_tokens,
        details.thinking_tokens if details else 0,
        REASONS[message.stop_reason] if message.stop_reason else None,
    )


def shape() -> Any:
    """The shape of a request."""
    from anthropic.types.message_create_params import MessageCreateParamsStreaming

    return MessageCreateParamsStreaming


@asynccontextmanager
async def sdk_for(vendor: VendorServer) -> Any:
    import anthropic

    async with anthropic.AsyncAnthropic(
        api_key=KEY, base_url=f"http://127.0.0.1:{vendor.port}", max_retries=0, timeout=5
    ) as client:
        yield client


async def read_by_both(script: Script) -> tuple[Outcome, Message]:
    """The same answer, read by the adapter and by Anthropic's client from the same server."""
    async with VendorServer(script) as vendor, make_client_session() as session, sdk_for(vendor) as client:
        provider = AnthropicProvider(
            session=session, base_url=vendor.base_url, api_key=KEY, deadlines=PATIENT, retries=AT_ONCE
        )
        outcome = await outcome_of(provider.stream(REQUEST))
        body = request_body(REQUEST, max_text_tokens=100)
        del body["stream"]
        async with client.messages.stream(**body) as stream:
            return outcome, await stream.get_final_message()


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=12)
COUNTS = st.integers(0, 10**6)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(-1e6, 1e6) | TEXTS,
    lambda values: st.lists(values, max_size=3) | st.dictionaries(TEXTS, values, max_size=3),
    max_leaves=6,
)
INPUTS = st.dictionaries(TEXTS, VALUES, max_size=3)
CITATION = {
    "type": "web_search_result_location",
    "cited_text": "c",
    "url": "https://a.example",
    "title": None,
    "encrypted_index": "x",
}


@st.composite
def cuts(draw: Any, words: str) -> list[str]:
    """A text in pieces."""
    places = sorted(draw(st.lists(st.integers(0, len(words)), max_size=4)))
    return [words[start:end] for start, end in zip([0, *places], [*places, len(words)], strict=True)]


@st.composite
def blocks(draw: Any, index: int) -> list[bytes]:
    """One content block of any kind, as its events."""
    kind = draw(st.sampled_from(["text", "cited", "thinking", "redacted", "tool", "server tool", "result"]))
    if kind == "text":
        return text_block(*draw(st.lists(TEXTS, max_size=5)), index=index)
    if kind == "cited":
        start, *deltas, stop = text_block(*draw(st.lists(TEXTS, max_size=2)), index=index)
        return [start, block_delta(index, {"type": "citations_delta", "citation": CITATION}), *deltas, stop]
    if kind == "thinking":
        signature = draw(st.sampled_from(["", "EqQBCgIYAhIM1gbc", "c2lnbmF0dXJl+/=="]))
        return thinking_block(*draw(st.lists(TEXTS, max_size=5)), index=index, signature=signature)
    if kind == "redacted":
        return [block_start(index, {"type": "redacted_thinking", "data": draw(TEXTS)}), block_stop(index)]
    if kind == "result":
        result = {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": []}
        return [block_start(index, result), block_stop(index)]
    written = orjson.dumps(draw(INPUTS)).decode()
    fragments = [] if written == "{}" and draw(st.booleans()) else draw(cuts(written))
    tool = "tool_use" if kind == "tool" else "server_tool_use"
    return tool_block(f"toolu_{index}", draw(TEXTS.filter(bool)), *fragments, index=index, kind=tool)


@st.composite
def answers(draw: Any) -> list[bytes]:
    """A whole answer as its events, with pings anywhere."""
    cache = st.fixed_dictionaries(
        {}, optional={"cache_read_input_tokens": COUNTS | st.none(), "cache_creation_input_tokens": COUNTS | st.none()}
    )
    thought = draw(st.none() | COUNTS)
    ended = {"output_tokens": (thought or 0) + draw(COUNTS), **draw(cache)}
    if draw(st.booleans()):
        ended["input_tokens"] = draw(COUNTS)
    if thought is not None:
        ended["output_tokens_details"] = {"thinking_tokens": thought}
    events = [message_start(input_tokens=draw(COUNTS), output_tokens=draw(COUNTS), **draw(cache))]
    for index in range(draw(st.integers(0, 5))):
        events += draw(blocks(index))
    events += [message_delta(draw(st.sampled_from(list(REASONS))), **ended), MESSAGE_STOP]
    for place in draw(st.lists(st.integers(0, len(events) - 1), max_size=3)):
        events.insert(place, PING)
    return events


def pieces_of(stream: bytes, places: list[int]) -> Iterator[bytes]:
    edges = [0, *sorted(place % len(stream) for place in places), len(stream)]
    return (stream[start:end] for start, end in pairwise(edges))


@settings(max_examples=60, deadline=None)
@given(events=answers(), places=st.lists(st.integers(0, 10**6), max_size=12), chunked=st.booleans())
async def test_both_understand_the_same_answer(events: list[bytes], places: list[int], chunked: bool) -> None:
    pieces = list(pieces_of(b"".join(events), places))
    outcome, message = await read_by_both(stream_of(*pieces) if chunked else hung_up_after(*pieces, framing="close"))
    understood = by_adapter(outcome)
    assert understood == by_sdk(message)
    assert understood.stop is not None


async def test_both_understand_crlf() -> None:
    stream = b"".join(answer(thinking_block("hm"), text_block("Grüß ", "Gott 🦉", index=1)))
    outcome, message = await read_by_both(stream_of(stream.replace(b"\n", b"\r\n")))
    assert by_adapter(outcome) == by_sdk(message)
    assert outcome.text == "Grüß Gott 🦉"


STATUSES: list[tuple[str, int, str]] = [
    ("invalid_request_error", 400, "BadRequestError"),
    ("authentication_error", 401, "AuthenticationError"),
    ("permission_error", 403, "PermissionDeniedError"),
    ("not_found_error", 404, "NotFoundError"),
    ("rate_limit_error", 429, "RateLimitError"),
    ("api_error", 500, "InternalServerError"),
    ("overloaded_error", 529, "InternalServerError"),
]


@pytest.mark.parametrize(("kind", "status", "raised"), STATUSES, ids=[row[0] for row in STATUSES])
async def test_what_is_a_failure_to_the_one_is_a_failure_to_the_other(kind: str, status: int, raised: str) -> None:
    import anthropic

    async def refused(wire: Wire) -> None:
        await wire.whole(status, orjson.dumps({"type": "error", "error": {"type": kind, "message": "m"}}))

    for script in (refused, stream_of(message_start(), *text_block("Hel")[:2], error(kind, "m"))):
        async with VendorServer(script) as vendor, make_client_session() as session, sdk_for(vendor) as client:
            provider = AnthropicProvider(session=session, base_url=vendor.base_url, api_key=KEY, retries=AT_ONCE)
            outcome = await outcome_of(provider.stream(REQUEST))
            assert outcome.failure is not None
            with pytest.raises(anthropic.APIStatusError) as failed:
                async with client.messages.stream(model=MODEL, max_tokens=9, messages=[]) as stream:
                    await stream.get_final_message()
            assert isinstance(failed.value, getattr(anthropic, raised)) or script is not refused


async def test_both_ask_the_same_at_the_same_address() -> None:
    async with (
        VendorServer(stream_of(*answer(text_block("Hi")))) as vendor,
        make_client_session() as session,
        sdk_for(vendor) as client,
    ):
        request = GenerationRequest(MODEL, REQUEST.messages, reasoning_effort="HIGH", user="u1")
        provider = AnthropicProvider(session=session, base_url=vendor.base_url, api_key=KEY)
        await outcome_of(provider.stream(request))
        body = request_body(request, max_text_tokens=16_000)
        del body["stream"]
        async with client.messages.stream(**body) as stream:
            await stream.get_final_message()
    ours, theirs = vendor.requests
    assert (ours.method, ours.path) == (theirs.method, theirs.path)
    assert ours.json == theirs.json
    # Clients since 2.0 send the key as a bearer token and name the version of October 2026. Ours keeps to the header,
    # which Anthropic's documents show, and to the version that compatible servers know as well.
    assert ours.headers["x-api-key"] == theirs.headers["authorization"].removeprefix("Bearer ")
    assert ours.headers["content-type"] == theirs.headers["content-type"]


@settings(max_examples=60, deadline=None)
@given(PROMPTS, st.sampled_from([None, "LOW", "HIGH"]), st.sampled_from([MODEL, "claude-haiku-4-5"]))
def test_whatever_is_asked_is_of_the_shape_that_the_client_takes(
    messages: tuple[PromptMessage, ...], effort: Any, model: str
) -> None:
    request = GenerationRequest(model, messages, effort, user="u1")
    assert misfits(request_body(request, max_text_tokens=16_000), shape()) == []


def test_a_field_that_the_client_does_not_know_is_found() -> None:
    body = request_body(REQUEST, max_text_tokens=9)
    assert misfits(body | {"max_token": 1}, shape()) == [".max_token: unknown"]
    body["messages"][0]["content"][0]["texts"] = body["messages"][0]["content"][0].pop("text")
    assert misfits(body, shape())
