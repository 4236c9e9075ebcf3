"""What goes to a vendor beyond text: files, calls and signed reasoning, by the rules of each format."""

from __future__ import annotations

import base64
import itertools
import re
from typing import Any

import aiohttp
import orjson
import pytest
from hypothesis import given

from providers.anthropic import AnthropicProvider
from providers.anthropic import request_body as messages_body
from providers.base import (
    FailureCode,
    GenerationRequest,
    PromptFile,
    PromptMessage,
    PromptPart,
    PromptReasoning,
    PromptText,
    PromptToolCall,
    TextDelta,
)
from providers.chat_completions import request_body as chat_body
from providers.conversation import ENDED_WITH_CALL, NOT_CARRIED_OUT
from tests.adapters import AT_ONCE, KEY, PATIENT, Outcome, outcome_of, stream_of
from tests.anthropic_wire import answer, text_block
from tests.prompts import PROMPTS
from tests.vendor_server import ReceivedRequest, Script, VendorServer, Wire

pytestmark = pytest.mark.usefixtures("no_canary_in_logs")

IMAGE, PDF = PromptFile("a.png", "image/png", b"\x89PNG bytes"), PromptFile("d.pdf", "application/pdf", b"%PDF-1.7")
DONE = PromptToolCall("toolu_1", "search", {"q": "owl"}, ["a page"])
BROKEN = PromptToolCall("toolu_1", "search", {"q": "owl"})
THOUGHT = PromptReasoning("hm", "EqQ=")
NEXT = PromptMessage.of("user", "Next?")


def asked(*content: PromptPart) -> PromptMessage:
    return PromptMessage("user", content)


def said(*content: PromptPart) -> PromptMessage:
    return PromptMessage("assistant", content)


def by_messages(*messages: PromptMessage, **wishes: Any) -> dict[str, Any]:
    """The body for Anthropic, without its marks for the cache."""
    body = messages_body(GenerationRequest("claude-haiku-4-5", messages, **wishes), max_text_tokens=16_000)
    unmarked = orjson.dumps(body).replace(b',"cache_control":{"type":"ephemeral"}', b"")
    found: dict[str, Any] = orjson.loads(unmarked)
    return found


def by_chat(*messages: PromptMessage, **wishes: Any) -> dict[str, Any]:
    return chat_body(GenerationRequest("m", messages, **wishes))


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


# Files


def test_files_are_sent_in_their_place_as_each_format_has_them() -> None:
    question = asked(PromptText("[a.png:]"), IMAGE, PDF, PromptText("What is this?"))
    source = {"type": "base64", "media_type": "image/png", "data": base64_of(IMAGE.data)}
    assert by_messages(question)["messages"] == [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "[a.png:]"},
                {"type": "image", "source": source},
                {
                    "type": "document",
                    "source": {"type": "base64", "media_type": "application/pdf", "data": base64_of(PDF.data)},
                    "title": "d.pdf",
                },
                {"type": "text", "text": "What is this?"},
            ],
        }
    ]
    assert by_chat(question)["messages"] == [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "[a.png:]"},
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64_of(IMAGE.data)}"}},
                {
                    "type": "file",
                    "file": {
                        "filename": "d.pdf",
                        "file_data": f"data:application/pdf;base64,{base64_of(PDF.data)}",
                    },
                },
                {"type": "text", "text": "What is this?"},
            ],
        }
    ]


def test_what_is_text_alone_is_a_string_for_servers_that_know_no_parts() -> None:
    question = asked(PromptText("[File:]"), PromptText("Hello"))
    assert by_chat(question)["messages"] == [{"role": "user", "content": "[File:]\n\nHello"}]


def test_images_of_an_answer_stand_before_the_question_behind_it() -> None:
    history = (PromptMessage.of("user", "Draw."), said(PromptText("Here: "), IMAGE), NEXT)
    blocks = by_messages(*history)["messages"]
    assert [message["role"] for message in blocks] == ["user", "assistant", "user"]
    assert [part["type"] for part in blocks[2]["content"]] == ["text", "image", "text"]
    assert blocks[2]["content"][0]["text"] == '[File "a.png", from the answer before:]'
    parts = by_chat(*history)["messages"]
    assert parts[1] == {"role": "assistant", "content": "Here: "}
    assert [part["type"] for part in parts[2]["content"]] == ["text", "image_url", "text"]


def test_an_answer_that_is_an_image_alone_leaves_no_empty_message() -> None:
    history = (PromptMessage.of("user", "Draw."), said(IMAGE), NEXT)
    assert [message["role"] for message in by_messages(*history)["messages"]] == ["user"]
    assert [message["role"] for message in by_chat(*history)["messages"]] == ["user", "user"]


def test_images_are_asked_for_only_where_they_are_wanted() -> None:
    assert by_chat(NEXT, image_output=True)["modalities"] == ["image", "text"]
    assert "modalities" not in by_chat(NEXT)


@pytest.mark.parametrize("size", [10, 3_000_000])
async def test_a_large_request_arrives_whole_and_with_its_length(session: aiohttp.ClientSession, size: int) -> None:
    question = asked(PromptFile("a.png", "image/png", bytes(range(256)) * (size // 256)), PromptText("?"))
    _, (request,) = await ask(session, stream_of(*HELLO), question)
    assert request.json == messages_body(GenerationRequest("claude-haiku-4-5", (question,)), max_text_tokens=16_000)
    assert int(request.headers["content-length"]) == len(request.body)
    assert request.headers["content-type"] == "application/json"
    assert not {"transfer-encoding", "content-disposition"} & request.headers.keys()


# Calls


def test_calls_go_along_with_their_results() -> None:
    history = (PromptMessage.of("user", "Look."), said(PromptText("Wait."), DONE, DONE, PromptText("An owl.")), NEXT)
    use = {"type": "tool_use", "name": "search", "input": {"q": "owl"}}
    body = by_messages(*history)
    assert body["messages"][1:] == [
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "Wait."}, use | {"id": "call00001"}, use | {"id": "call00002"}],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "call00001", "content": '["a page"]'},
                {"type": "tool_result", "tool_use_id": "call00002", "content": '["a page"]'},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "An owl."}]},
        {"role": "user", "content": [{"type": "text", "text": "Next?"}]},
    ]
    assert body["tools"] == [{"name": "search", "input_schema": {"type": "object"}}]
    assert body["tool_choice"] == {"type": "none"}
    function = {"type": "function", "function": {"name": "search", "arguments": '{"q":"owl"}'}}
    chat = by_chat(*history)
    assert chat["messages"][1:] == [
        {
            "role": "assistant",
            "content": "Wait.",
            "tool_calls": [function | {"id": "call00001"}, function | {"id": "call00002"}],
        },
        {"role": "tool", "tool_call_id": "call00001", "content": '["a page"]'},
        {"role": "tool", "tool_call_id": "call00002", "content": '["a page"]'},
        {"role": "assistant", "content": "An owl."},
        {"role": "user", "content": "Next?"},
    ]
    assert "tools" not in chat


def test_a_call_that_was_not_carried_out_is_told_so_and_its_answer_is_closed() -> None:
    history = (PromptMessage.of("user", "Look."), said(BROKEN), NEXT)
    assert by_messages(*history)["messages"][2:4] == [
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "call00001", "content": NOT_CARRIED_OUT, "is_error": True}
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": ENDED_WITH_CALL}]},
    ]
    assert by_chat(*history)["messages"][2:4] == [
        {"role": "tool", "tool_call_id": "call00001", "content": NOT_CARRIED_OUT},
        {"role": "assistant", "content": ENDED_WITH_CALL},
    ]


@pytest.mark.parametrize(
    ("arguments", "sent"), [(None, {}), ({}, {}), ("raw", {"input": "raw"}), ([1], {"input": [1]}), (0, {"input": 0})]
)
def test_the_arguments_of_a_call_are_an_object_whatever_the_model_wrote(arguments: Any, sent: Any) -> None:
    history = (NEXT, said(PromptToolCall("c", "näme of it", arguments, "r")), NEXT)
    (use,) = (block for block in by_messages(*history)["messages"][1]["content"] if block["type"] == "tool_use")
    assert (use["name"], use["input"]) == ("n_me_of_it", sent)
    (call,) = by_chat(*history)["messages"][1]["tool_calls"]
    assert orjson.loads(call["function"]["arguments"]) == sent


# Reasoning


def test_signed_thinking_goes_back_in_its_place() -> None:
    history = (NEXT, said(THOUGHT, BROKEN, PromptReasoning("so", "c2l="), PromptText("A")), NEXT)
    first, _, second = by_messages(*history)["messages"][1:4]
    assert first["content"][0] == {"type": "thinking", "thinking": "hm", "signature": "EqQ="}
    assert [block["type"] for block in first["content"]] == ["thinking", "tool_use"]
    assert second["content"][0] == {"type": "thinking", "thinking": "so", "signature": "c2l="}
    assert "hm" not in orjson.dumps(by_chat(*history)).decode()


def test_thinking_never_ends_an_answer() -> None:
    body = by_messages(NEXT, said(THOUGHT, PromptText("A"), THOUGHT), NEXT)
    assert body["messages"][1]["content"] == [{"type": "text", "text": "A"}]
    assert len(by_messages(NEXT, said(THOUGHT), NEXT)["messages"]) == 1


HELLO = answer(text_block("Hi"))
# As Anthropic and gateways to it say it.
REFUSALS = [
    (400, "messages.1.content.0: Invalid `signature` in `thinking` block"),
    (429, "messages.1.content.0: Invalid `signature` in `thinking` block"),
    (
        400,
        "messages.3.content.0: `thinking` or `redacted_thinking` blocks in the latest assistant message cannot be "
        "modified. These blocks must remain as they were in the original response.",
    ),
]


def refused_once(status: int, message: str) -> Script:
    first = True

    async def script(wire: Wire) -> None:
        nonlocal first
        if first:
            first = False
            body = {"type": "error", "error": {"type": "invalid_request_error", "message": message}}
            await wire.whole(status, orjson.dumps(body))
        else:
            await stream_of(*HELLO)(wire)

    return script


async def ask(
    session: aiohttp.ClientSession, script: Script, *history: PromptMessage
) -> tuple[Outcome, list[ReceivedRequest]]:
    async with VendorServer(script) as vendor:
        provider = AnthropicProvider(
            session=session, base_url=vendor.base_url, api_key=KEY, deadlines=PATIENT, retries=AT_ONCE
        )
        outcome = await outcome_of(provider.stream(GenerationRequest("claude-haiku-4-5", history)))
        return outcome, vendor.requests


@pytest.mark.parametrize(("status", "message"), REFUSALS)
async def test_thinking_that_the_vendor_refuses_is_left_out_and_asked_again(
    session: aiohttp.ClientSession, status: int, message: str
) -> None:
    history = (NEXT, said(THOUGHT, PromptText("A")), NEXT)
    outcome, requests = await ask(session, refused_once(status, message), *history)
    assert (outcome.events[0], outcome.code) == (TextDelta("Hi"), None)
    assert [b"signature" in request.body for request in requests] == [True, False]


@pytest.mark.parametrize(("status", "message"), REFUSALS[::2])
async def test_a_refusal_of_thinking_where_there_is_none_is_final(
    session: aiohttp.ClientSession, status: int, message: str
) -> None:
    outcome, requests = await ask(session, refused_once(status, message), NEXT)
    assert (outcome.events, outcome.code, len(requests)) == ([], FailureCode.PROVIDER_REJECTED_REQUEST, 1)


async def test_another_refusal_is_not_asked_again_without_thinking(session: aiohttp.ClientSession) -> None:
    history = (NEXT, said(THOUGHT, PromptText("A")), NEXT)
    outcome, requests = await ask(session, refused_once(400, "max_tokens: Field required"), *history)
    assert (outcome.code, len(requests)) == (FailureCode.PROVIDER_REJECTED_REQUEST, 1)


# Whatever comes


@given(PROMPTS)
def test_anthropics_rules_hold_whatever_the_history(messages: tuple[PromptMessage, ...]) -> None:
    body = messages_body(GenerationRequest("claude-haiku-4-5", messages, "HIGH"), max_text_tokens=16_000)
    conversation = body["messages"]
    assert [message["role"] for message in conversation] == (["user", "assistant"] * len(conversation))[
        : len(conversation)
    ]
    assert conversation[-1]["role"] == "user"
    waiting: list[str] = []
    ids: list[str] = []
    for message in conversation:
        kinds = [block["type"] for block in message["content"]]
        assert kinds
        assert all(block["text"].strip() for block in message["content"] if block["type"] == "text")
        if message["role"] == "user":
            answered = [block["tool_use_id"] for block in message["content"] if block["type"] == "tool_result"]
            assert answered == waiting, "each call is answered, at once and in order"
            assert kinds[: len(answered)] == ["tool_result"] * len(answered), "results stand first"
            waiting = []
        else:
            assert kinds[-1] != "thinking"
            assert "image" not in kinds
            waiting = [block["id"] for block in message["content"] if block["type"] == "tool_use"]
            assert kinds[len(kinds) - len(waiting) :] == ["tool_use"] * len(waiting)
            ids += waiting
            for block in message["content"]:
                if block["type"] == "tool_use":
                    assert re.fullmatch("[a-zA-Z0-9_-]{1,128}", block["name"])
                    assert block["name"] in {tool["name"] for tool in body["tools"]}
                    assert isinstance(block["input"], dict)
    assert len(set(ids)) == len(ids)
    assert ("tools" in body) == bool(ids)
    marks = orjson.dumps(body).count(b"cache_control")
    assert marks <= 4
    assert not any(
        "cache_control" in block
        for message in conversation
        for block in message["content"]
        if block["type"] == "thinking"
    )


@given(PROMPTS)
def test_the_rules_of_chat_completions_hold_whatever_the_history(messages: tuple[PromptMessage, ...]) -> None:
    conversation = chat_body(GenerationRequest("m", messages))["messages"]
    ids: list[str] = []
    waiting: list[str] = []
    for before, message in itertools.pairwise([{"role": "system"}, *conversation]):
        if message["role"] == "tool":
            assert message["tool_call_id"] == waiting.pop(0)
            assert message["content"] or message["content"] == ""
            continue
        assert waiting == [], "each call is answered before anybody speaks"
        assert not (message["role"] == "user" and before["role"] == "tool")
        if message["role"] == "assistant":
            waiting = [call["id"] for call in message.get("tool_calls", [])]
            ids += waiting
            assert message["content"] or waiting
            assert message["content"] is None or isinstance(message["content"], str)
        else:
            assert message["content"]
    assert conversation[-1]["role"] == "user"
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch("[a-zA-Z0-9]{9}", call_id) for call_id in ids)
