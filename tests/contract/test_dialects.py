"""Chat completions as each vendor speaks it: answers as their documents show them, and images.

The samples keep the fields that the vendors send beside those that matter, because these have to be passed over.
"""

from __future__ import annotations

import base64
from typing import Any

import aiohttp
import orjson
import pytest

from providers.base import (
    FailureCode,
    Finish,
    FinishReason,
    GenerationRequest,
    ImageOutput,
    ProviderEvent,
    ReasoningDelta,
    TextDelta,
    TokenUsage,
    ToolCall,
)
from providers.chat_completions import ChatCompletionsProvider
from providers.http import MAX_IMAGE_EVENT_BYTES
from tests.adapters import AT_ONCE, KEY, PATIENT, REQUEST, Outcome, outcome_of, stream_of, whole
from tests.vendor_server import Script, VendorServer

pytestmark = pytest.mark.usefixtures("no_canary_in_logs")

WITH_IMAGES = GenerationRequest("m", REQUEST.messages, image_output=True)
STOP = Finish(FinishReason.STOP)


def sse(*lines: str, head: str = "", usage: str = "") -> list[bytes]:
    """Events, one a line; a line that begins with a colon is a comment. What all have in common is put in for HEAD."""
    lines = tuple(line.replace("HEAD", head).replace("USAGE", usage) for line in lines)
    return [f"{line}\n\n".encode() if line.startswith(":") else f"data: {line}\n\n".encode() for line in lines]


async def ask(session: aiohttp.ClientSession, script: Script, request: GenerationRequest = REQUEST) -> Outcome:
    async with VendorServer(script) as vendor:
        provider = ChatCompletionsProvider(
            session=session, base_url=vendor.base_url, api_key=KEY, deadlines=PATIENT, retries=AT_ONCE
        )
        return await outcome_of(provider.stream(request))


async def events_of(session: aiohttp.ClientSession, *lines: str, **common: str) -> list[ProviderEvent]:
    outcome = await ask(session, stream_of(*sse(*lines, **common)))
    assert outcome.failure is None
    return outcome.events


async def test_google(session: aiohttp.ClientSession) -> None:
    events = await events_of(
        session,
        '{"choices":[{"delta":{"content":"Owls ","role":"assistant"},"index":0}],"created":1767225600,"id":"x","model":'
        '"gemini-3-flash","object":"chat.completion.chunk"}',
        '{"choices":[{"delta":{"role":"assistant","tool_calls":[{"extra_content":{"google":{"thought_signature":"Cv=="}}'
        ',"function":{"arguments":"{\\"q\\":\\"owl\\"}","name":"search"},"id":"function-call-1","type":"function"}]},'
        '"finish_reason":"tool_calls","index":0}],"created":1767225600,"id":"x","model":"gemini-3-flash",'
        '"object":"chat.completion.chunk","usage":{"completion_tokens":6,"prompt_tokens":15,"total_tokens":81}}',
        "[DONE]",
    )
    assert events == [
        TextDelta("Owls "),
        ToolCall("function-call-1", "search", {"q": "owl"}),
        # Thoughts are in the total alone.
        TokenUsage(prompt=15, completion=66, reasoning=60),
        Finish(FinishReason.TOOL_CALLS),
    ]


async def test_xai_counts_reasoning_beside_the_completion(session: aiohttp.ClientSession) -> None:
    events = await events_of(
        session,
        '{"id":"e4","object":"chat.completion.chunk","created":1767225600,"model":"grok","choices":[{"index":0,"delta":'
        '{"reasoning_content":"Hm. ","role":"assistant"}}],"system_fingerprint":"fp_6"}',
        '{"id":"e4","object":"chat.completion.chunk","created":1767225600,"model":"grok","choices":[{"index":0,"delta":'
        '{"content":"Cola"},"finish_reason":"stop"}],"usage":{"prompt_tokens":38,"completion_tokens":2,"total_tokens":'
        '140,"prompt_tokens_details":{"text_tokens":38,"audio_tokens":0,"image_tokens":0,"cached_tokens":7},'
        '"completion_tokens_details":{"reasoning_tokens":100}}}',
        "[DONE]",
    )
    assert events == [
        ReasoningDelta("Hm. "),
        TextDelta("Cola"),
        TokenUsage(prompt=38, completion=102, reasoning=100, cached=7),
        STOP,
    ]


GROQ_HEAD = '"id":"chatcmpl-f","object":"chat.completion.chunk","created":1767225600,"model":"openai/gpt-oss-120b"'
GROQ_USAGE = (
    '{"queue_time":0.1,"prompt_tokens":75,"prompt_time":0.002,"completion_tokens":40,"completion_time":0.08,'
    '"total_tokens":115,"total_time":0.09,"completion_tokens_details":{"reasoning_tokens":21}}'
)


@pytest.mark.parametrize("twice", [False, True])
async def test_groq(session: aiohttp.ClientSession, twice: bool) -> None:
    last = ['{HEAD,"choices":[],"usage":USAGE}'] if twice else []
    events = await events_of(
        session,
        '{HEAD,"choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],'
        '"x_groq":{"id":"req_01"}}',
        '{HEAD,"choices":[{"index":0,"delta":{"reasoning":"Hm. ","channel":"analysis"},"finish_reason":null}]}',
        '{HEAD,"choices":[{"index":0,"delta":{"content":"Fast."},"logprobs":null,"finish_reason":null}]}',
        '{HEAD,"choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}],"x_groq":{"id":"req_01","usage":USAGE}}',
        *last,
        "[DONE]",
        head=GROQ_HEAD,
        usage=GROQ_USAGE,
    )
    assert events == [
        ReasoningDelta("Hm. "),
        TextDelta("Fast."),
        TokenUsage(prompt=75, completion=40, reasoning=21),
        STOP,
    ]


async def test_groq_breaks_an_answer_off(session: aiohttp.ClientSession) -> None:
    pieces = sse(
        '{HEAD,"choices":[{"index":0,"delta":{"content":"Fa"},"finish_reason":null}]}',
        '{HEAD,"choices":[{"index":0,"delta":{},"finish_reason":null}],"x_groq":{"id":"req_1","error":"overload"}}',
        head=GROQ_HEAD,
    )
    outcome = await ask(session, stream_of(*pieces))
    assert (outcome.events, outcome.code) == ([TextDelta("Fa")], FailureCode.PROVIDER_UNAVAILABLE)


OPENROUTER_HEAD = (
    '"id":"gen-1","provider":"Google","model":"google/gemini-3-flash","object":"chat.completion.chunk",'
    '"created":1767225600'
)
OPENROUTER_USAGE = (
    '{"prompt_tokens":12,"completion_tokens":30,"total_tokens":42,"cost":0.00014,"is_byok":false,'
    '"prompt_tokens_details":{"cached_tokens":4,"audio_tokens":0},"cost_details":{"upstream_inference_cost":null},'
    '"completion_tokens_details":{"reasoning_tokens":8,"image_tokens":0}}'
)


async def test_openrouter(session: aiohttp.ClientSession) -> None:
    events = await events_of(
        session,
        ": OPENROUTER PROCESSING",
        ": OPENROUTER PROCESSING",
        '{HEAD,"choices":[{"index":0,"delta":{"role":"assistant","content":"","reasoning":"Hm. ","reasoning_details":'
        '[{"type":"reasoning.text","text":"Hm. ","format":"google-gemini-v1","index":0}]},"finish_reason":null,'
        '"native_finish_reason":null,"logprobs":null}]}',
        ": OPENROUTER PROCESSING",
        '{HEAD,"choices":[{"index":0,"delta":{"role":"assistant","content":"Hi"},"finish_reason":null,'
        '"native_finish_reason":null,"logprobs":null}]}',
        '{HEAD,"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":"stop",'
        '"native_finish_reason":"STOP","logprobs":null}]}',
        '{HEAD,"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null,'
        '"native_finish_reason":null,"logprobs":null}],"usage":USAGE}',
        "[DONE]",
        head=OPENROUTER_HEAD,
        usage=OPENROUTER_USAGE,
    )
    assert events == [
        ReasoningDelta("Hm. "),
        TextDelta("Hi"),
        TokenUsage(prompt=12, completion=30, reasoning=8, cached=4),
        STOP,
    ]


async def test_openrouter_tells_an_error_in_the_middle(session: aiohttp.ClientSession) -> None:
    pieces = sse(
        '{HEAD,"choices":[{"index":0,"delta":{"content":"Hal"},"finish_reason":null}]}',
        '{HEAD,"error":{"code":429,"message":"Rate limit exceeded"},"choices":[{"index":0,"delta":{"content":""},'
        '"finish_reason":"error"}]}',
        head=OPENROUTER_HEAD,
    )
    outcome = await ask(session, stream_of(*pieces))
    assert (outcome.events, outcome.code) == ([TextDelta("Hal")], FailureCode.RATE_LIMITED)


async def test_vllm_tells_an_error_in_the_middle(session: aiohttp.ClientSession) -> None:
    for error in (
        '{"object":"error","message":"boom","type":"InternalServerError","param":null,"code":500}',
        '{"error":{"object":"error","message":"boom","type":"InternalServerError","param":null,"code":500}}',
    ):
        outcome = await ask(session, stream_of(*sse('{"choices":[{"delta":{"content":"Hal"}}]}', error, "[DONE]")))
        assert (outcome.events, outcome.code) == ([TextDelta("Hal")], FailureCode.PROVIDER_UNAVAILABLE)


async def test_deepseek(session: aiohttp.ClientSession) -> None:
    head = '"id":"1f","object":"chat.completion.chunk","created":1767225600,"model":"deepseek-reasoner"'
    events = await events_of(
        session,
        ": keep-alive",
        '{HEAD,"choices":[{"index":0,"delta":{"role":"assistant","content":null,"reasoning_content":""},"finish_reason":null}]}',
        '{HEAD,"choices":[{"index":0,"delta":{"content":null,"reasoning_content":"Hm. "},"finish_reason":null}]}',
        '{HEAD,"choices":[{"index":0,"delta":{"content":"So.","reasoning_content":null},"finish_reason":null}]}',
        '{HEAD,"choices":[{"index":0,"delta":{"content":"","reasoning_content":null},"finish_reason":"stop"}],"usage":'
        '{"prompt_tokens":18,"completion_tokens":9,"total_tokens":27,"prompt_cache_hit_tokens":16,'
        '"prompt_cache_miss_tokens":2,"completion_tokens_details":{"reasoning_tokens":5}}}',
        "[DONE]",
        head=head,
    )
    assert events == [
        ReasoningDelta("Hm. "),
        TextDelta("So."),
        TokenUsage(prompt=18, completion=9, reasoning=5, cached=16),
        STOP,
    ]


async def test_mistral_sends_thinking_and_text_in_pieces(session: aiohttp.ClientSession) -> None:
    head = '"id":"c1","object":"chat.completion.chunk","created":1767225600,"model":"magistral-medium"'
    events = await events_of(
        session,
        '{HEAD,"choices":[{"index":0,"delta":{"role":"assistant","content":[{"type":"thinking","thinking":[{"type":"text",'
        '"text":"Hm. "}]}]},"finish_reason":null}]}',
        '{HEAD,"choices":[{"index":0,"delta":{"content":[{"type":"text","text":"So."}, 5, {"type":"reference"}]},'
        '"finish_reason":"stop"}],"usage":{"prompt_tokens":3,"total_tokens":9,"completion_tokens":6}}',
        "[DONE]",
        head=head,
    )
    assert events == [ReasoningDelta("Hm. "), TextDelta("So."), TokenUsage(prompt=3, completion=6), STOP]


# Images


PNG = b"\x89PNG\r\n\x1a\n and so on"


def image(data: bytes = PNG, content_type: str = "image/png") -> dict[str, Any]:
    url = f"data:{content_type};base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}, "index": 0}


def delta(finish: str | None = None, **fields: Any) -> bytes:
    return b"data: " + orjson.dumps({"choices": [{"index": 0, "delta": fields, "finish_reason": finish}]}) + b"\n\n"


ENDED = [delta("stop"), b"data: [DONE]\n\n"]


async def test_images_come_between_texts(session: aiohttp.ClientSession) -> None:
    pieces = [delta(content="Here: "), delta(content="", images=[image(), image(b"GIF89a", "image/GIF")])]
    outcome = await ask(session, stream_of(*pieces, delta(content="Nice?"), *ENDED), WITH_IMAGES)
    assert outcome.events == [
        TextDelta("Here: "),
        ImageOutput("image/png", PNG),
        ImageOutput("image/gif", b"GIF89a"),
        TextDelta("Nice?"),
        STOP,
    ]


async def test_an_image_of_an_answer_in_one_piece_is_taken(session: aiohttp.ClientSession) -> None:
    message = {"role": "assistant", "content": "Here.", "images": [image()]}
    body = orjson.dumps({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})
    outcome = await ask(session, whole(body), WITH_IMAGES)
    assert outcome.events == [TextDelta("Here."), ImageOutput("image/png", PNG), STOP]


ODD_IMAGES = [
    None,
    "text",
    {},
    {"image_url": None},
    {"image_url": {"url": 5}},
    {"image_url": {"url": ""}},
    {"image_url": {"url": "https://internal.example/a.png"}},
    {"image_url": {"url": "file:///etc/passwd"}},
    {"image_url": {"url": "data:image/png;base64,"}},
    {"image_url": {"url": "data:image/png;base64,%%%%"}},
    {"image_url": {"url": "data:image/png,plain"}},
    {"image_url": {"url": "data:text/html;base64,PGI+"}},
    {"image_url": {"url": "data:image/" + "x" * 10_000 + ";base64,AAAA"}},
]


@pytest.mark.parametrize("odd", ODD_IMAGES, ids=range(len(ODD_IMAGES)))
async def test_what_is_no_image_as_data_is_skipped_and_never_fetched(session: aiohttp.ClientSession, odd: Any) -> None:
    outcome = await ask(session, stream_of(delta(content="a", images=[odd]), delta(images={}), *ENDED), WITH_IMAGES)
    assert outcome.events == [TextDelta("a"), STOP]


async def test_an_image_of_ten_megabytes_is_taken_where_images_are_wanted(session: aiohttp.ClientSession) -> None:
    large = bytes(10_000_000)
    outcome = await ask(session, stream_of(delta(images=[image(large)]), *ENDED), WITH_IMAGES)
    assert outcome.events == [ImageOutput("image/png", large), STOP]
    outcome = await ask(session, stream_of(delta(images=[image(large)]), *ENDED))
    assert (outcome.events, outcome.code) == ([], FailureCode.PROVIDER_PROTOCOL)


async def test_an_event_with_an_image_has_a_bound_too(session: aiohttp.ClientSession) -> None:
    async def script(wire: Any) -> None:
        await wire.head()
        await wire.send(delta(content="a"))
        await wire.send(b"data: ")
        while True:
            await wire.send(b"x" * 1_048_576)

    outcome = await ask(session, script, WITH_IMAGES)
    assert (outcome.events, outcome.code) == ([TextDelta("a")], FailureCode.PROVIDER_PROTOCOL)
    assert MAX_IMAGE_EVENT_BYTES < 64 * 1024 * 1024


async def test_images_without_end_are_a_protocol_failure(session: aiohttp.ClientSession) -> None:
    outcome = await ask(session, stream_of(delta(images=[image()] * 17), *ENDED), WITH_IMAGES)
    assert outcome.code is FailureCode.PROVIDER_PROTOCOL
    assert len(outcome.events) == 16
