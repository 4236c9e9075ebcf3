"""The adapter for chat completions beside OpenAI's own client: fed with the same bytes, both understand the same.

And the other way: what the adapter asks is of the shape that the client takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from providers.base import (
    Finish,
    FinishReason,
    GenerationRequest,
    PromptMessage,
    TokenUsage,
    ToolCall,
)
from providers.chat_completions import ChatCompletionsProvider, request_body
from providers.http import make_client_session
from tests.adapters import AT_ONCE, KEY, PATIENT, Outcome, hung_up_after, outcome_of, stream_of, whole
from tests.prompts import PROMPTS
from tests.shapes import misfits
from tests.vendor_server import Script, VendorServer, Wire

# The clients themselves are imported where they are used: that takes 1 s of CPU, of each worker.
if TYPE_CHECKING:
    from openai.types.chat import ChatCompletionChunk

REQUEST = GenerationRequest("gpt-5-mini", (PromptMessage.of("user", "Hello"),))
# What each reason of OpenAI's documents means in our terms, written down apart from the adapter.
REASONS = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "tool_calls": FinishReason.TOOL_CALLS,
    "content_filter": FinishReason.CONTENT_FILTER,
}


@dataclass
class Understood:
    """What a client made of an answer, in terms that both have."""

    text: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str, Any]] = field(default_factory=list)
    prompt: int = 0
    cached: int = 0
    completion: int = 0
    thought: int = 0
    stop: FinishReason | None = None


def by_adapter(outcome: Outcome) -> Understood:
    assert outcome.failure is None
    usage = next((event for event in outcome.events if isinstance(event, TokenUsage)), TokenUsage())
    return Understood(
        outcome.text,
        outcome.reasoning,
        [(event.call_id, event.name, event.arguments) for event in outcome.events if isinstance(event, ToolCall)],
        usage.prompt,
        usage.cached,
        usage.completion,
        usage.reasoning,
        next((event.reason for event in outcome.events if isinstance(event, Finish)), None),
    )


def by_sdk(chunks: list[ChatCompletionChunk]) -> Understood:
    """The chunks as OpenAI's documents say to put them together."""
    understood, calls = Understood(), dict[int, list[str]]()
    for chunk in chunks:
        if chunk.usage is not None:
            understood.prompt, understood.completion = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
            if details := chunk.usage.prompt_tokens_details:
                understood.cached = details.cached_tokens or 0
            if spent := chunk.usage.completion_tokens_details:
                understood.thought = spent.reasoning_tokens or 0
        for choice in chunk.choices:
            understood.text += choice.delta.content or ""
            # Not OpenAI's, but kept by its client.
            understood.reasoning += getattr(choice.delta, "reasoning_content", None) or ""
            for part in choice.delta.tool_calls or []:
                call = calls.setdefault(part.index, ["", "", ""])
                call[0] += part.id or ""
                if part.function is not None:
                    call[1] += part.function.name or ""
                    call[2] += part.function.arguments or ""
            if choice.finish_reason is not None:
                understood.stop = REASONS[choice.finish_reason]
    understood.calls = [(call_id, name, orjson.loads(written or "{}")) for call_id, name, written in calls.values()]
    return understood


def shape() -> Any:
    """The shape of a request."""
    from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming

    return CompletionCreateParamsStreaming


@asynccontextmanager
async def sdk_for(vendor: VendorServer) -> Any:
    import openai

    async with openai.AsyncOpenAI(api_key=KEY, base_url=vendor.base_url, max_retries=0, timeout=5) as client:
        yield client


async def read_by_both(script: Script) -> tuple[Outcome, list[ChatCompletionChunk]]:
    """The same answer, read by the adapter and by OpenAI's client from the same server."""
    async with VendorServer(script) as vendor, make_client_session() as session, sdk_for(vendor) as client:
        provider = ChatCompletionsProvider(
            session=session, base_url=vendor.base_url, api_key=KEY, deadlines=PATIENT, retries=AT_ONCE
        )
        outcome = await outcome_of(provider.stream(REQUEST))
        chunks = await client.chat.completions.create(**request_body(REQUEST))
        return outcome, [chunk async for chunk in chunks]


def sse(**fields: Any) -> bytes:
    chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1741569952, "model": "gpt-5-mini"}
    return b"data: " + orjson.dumps(chunk | {"choices": []} | fields) + b"\n\n"


def delta(reason: str | None = None, **fields: Any) -> bytes:
    return sse(choices=[{"index": 0, "delta": fields, "logprobs": None, "finish_reason": reason}])


DONE = b"data: [DONE]\n\n"
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=12)
COUNTS = st.integers(0, 10**6)
INPUTS = st.dictionaries(TEXTS, st.none() | st.booleans() | st.integers(-(2**53), 2**53) | TEXTS, max_size=3)


@st.composite
def pieces_of_calls(draw: Any) -> list[bytes]:
    """Some calls, each in pieces, as OpenAI sends them: one behind the other, each with its index."""
    pieces: list[bytes] = []
    for index in range(draw(st.integers(0, 3))):
        written = orjson.dumps(draw(INPUTS)).decode()
        places = sorted(draw(st.lists(st.integers(0, len(written)), max_size=3)))
        function = {"name": draw(TEXTS.filter(bool)), "arguments": ""}
        pieces.append(
            delta(tool_calls=[{"index": index, "id": f"call_{index}", "type": "function", "function": function}])
        )
        pieces += [
            delta(tool_calls=[{"index": index, "function": {"arguments": written[start:end]}}])
            for start, end in pairwise([0, *places, len(written)])
        ]
    return pieces


@st.composite
def answers(draw: Any) -> list[bytes]:
    """A whole answer as its events."""
    events = [delta(role="assistant", content="", refusal=None)]
    kinds = st.sampled_from(["content", "reasoning_content"])
    events += [delta(**{kind: said}) for kind, said in draw(st.lists(st.tuples(kinds, TEXTS), max_size=8))]
    events += draw(pieces_of_calls())
    events.append(delta(draw(st.sampled_from(list(REASONS)))))
    if draw(st.booleans()):
        prompt, completion = draw(COUNTS), draw(COUNTS)
        cached, thought = draw(st.integers(0, prompt)), draw(st.integers(0, completion))
        events.append(
            sse(
                usage={
                    "prompt_tokens": prompt,
                    "completion_tokens": completion,
                    "total_tokens": prompt + completion,
                    "prompt_tokens_details": {"cached_tokens": cached, "audio_tokens": 0},
                    "completion_tokens_details": {"reasoning_tokens": thought, "audio_tokens": 0},
                }
            )
        )
    return [*events, DONE]


def cut(stream: bytes, places: list[int]) -> Iterator[bytes]:
    edges = [0, *sorted(place % len(stream) for place in places), len(stream)]
    return (stream[start:end] for start, end in pairwise(edges))


@settings(max_examples=60, deadline=None)
@given(events=answers(), places=st.lists(st.integers(0, 10**6), max_size=12), chunked=st.booleans())
async def test_both_understand_the_same_answer(events: list[bytes], places: list[int], chunked: bool) -> None:
    pieces = list(cut(b"".join(events), places))
    outcome, chunks = await read_by_both(stream_of(*pieces) if chunked else hung_up_after(*pieces, framing="close"))
    understood = by_adapter(outcome)
    assert understood == by_sdk(chunks)
    assert understood.stop is not None


async def test_both_understand_an_answer_in_one_piece() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    message = {"role": "assistant", "content": "Grüß Gott 🦉", "tool_calls": [call], "refusal": None}
    body = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1741569952,
        "model": "gpt-5-mini",
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "tool_calls"}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7},
    }
    async with (
        VendorServer(whole(orjson.dumps(body))) as vendor,
        make_client_session() as session,
        sdk_for(vendor) as client,
    ):
        provider = ChatCompletionsProvider(session=session, base_url=vendor.base_url, api_key=KEY)
        understood = by_adapter(await outcome_of(provider.stream(REQUEST)))
        asked = request_body(REQUEST)
        del asked["stream"], asked["stream_options"]
        completion = await client.chat.completions.create(**asked)
    told = completion.choices[0].message
    assert understood.text == told.content
    assert understood.calls == [
        (one.id, one.function.name, orjson.loads(one.function.arguments)) for one in told.tool_calls
    ]
    assert (understood.prompt, understood.completion) == (
        completion.usage.prompt_tokens,
        completion.usage.completion_tokens,
    )
    assert understood.stop is REASONS[completion.choices[0].finish_reason]


STATUSES: list[tuple[int, str]] = [
    (400, "BadRequestError"),
    (401, "AuthenticationError"),
    (403, "PermissionDeniedError"),
    (404, "NotFoundError"),
    (429, "RateLimitError"),
    (500, "InternalServerError"),
]


@pytest.mark.parametrize(("status", "raised"), STATUSES, ids=[str(row[0]) for row in STATUSES])
async def test_what_is_a_failure_to_the_one_is_a_failure_to_the_other(status: int, raised: str) -> None:
    import openai

    error = {"error": {"message": "m", "type": "t", "param": None, "code": status}}

    async def refused(wire: Wire) -> None:
        await wire.whole(status, orjson.dumps(error))

    for script in (refused, stream_of(delta(content="Hel"), b"data: " + orjson.dumps(error) + b"\n\n")):
        async with VendorServer(script) as vendor, make_client_session() as session, sdk_for(vendor) as client:
            provider = ChatCompletionsProvider(session=session, base_url=vendor.base_url, api_key=KEY, retries=AT_ONCE)
            outcome = await outcome_of(provider.stream(REQUEST))
            assert outcome.failure is not None
            with pytest.raises(openai.APIError) as failed:
                async for _ in await client.chat.completions.create(**request_body(REQUEST)):
                    pass
            assert isinstance(failed.value, getattr(openai, raised)) or script is not refused


async def test_both_ask_the_same_at_the_same_address() -> None:
    async with (
        VendorServer(stream_of(delta("stop"), DONE)) as vendor,
        make_client_session() as session,
        sdk_for(vendor) as client,
    ):
        request = GenerationRequest(
            "gpt-5-mini", REQUEST.messages, reasoning_effort="HIGH", max_output_tokens=9, user="u1", image_output=True
        )
        provider = ChatCompletionsProvider(session=session, base_url=vendor.base_url, api_key=KEY)
        await outcome_of(provider.stream(request))
        async for _ in await client.chat.completions.create(**request_body(request)):
            pass
    ours, theirs = vendor.requests
    assert (ours.method, ours.path, ours.json) == (theirs.method, theirs.path, theirs.json)
    for name in ("authorization", "content-type"):
        assert ours.headers[name] == theirs.headers[name]


@settings(max_examples=60, deadline=None)
@given(PROMPTS, st.sampled_from([None, "LOW", "HIGH"]), st.sampled_from(["max_tokens", "max_completion_tokens"]))
def test_whatever_is_asked_is_of_the_shape_that_the_client_takes(
    messages: tuple[PromptMessage, ...], effort: Any, limit: Any
) -> None:
    request = GenerationRequest("m", messages, effort, max_output_tokens=7, user="u1")
    assert misfits(request_body(request, output_limit_field=limit), shape()) == []


def test_asking_for_images_is_the_one_thing_that_is_not_openais() -> None:
    request = GenerationRequest("m", REQUEST.messages, image_output=True)
    (wrong,) = misfits(request_body(request), shape())
    assert wrong.startswith(".modalities[0]: 'image'")


def test_a_field_that_the_client_does_not_know_is_found() -> None:
    body = request_body(REQUEST)
    assert misfits(body | {"max_token": 1}, shape()) == [".max_token: unknown"]
    body["messages"][0]["contents"] = body["messages"][0].pop("content")
    assert misfits(body, shape())
