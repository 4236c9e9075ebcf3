"""What a model is told of a conversation beyond its texts: files, calls, reasoning; and what is left out or named."""

from __future__ import annotations

import base64
import io
import uuid
from pathlib import Path
from typing import Any

import orjson
import pytest

from models.ids import IdKind, parse_id
from providers.base import (
    GenerationRequest,
    ImageOutput,
    PromptFile,
    PromptMessage,
    PromptReasoning,
    PromptText,
    PromptToolCall,
    ProviderEvent,
    ReasoningDelta,
    ReasoningSignature,
    TextDelta,
    ToolCall,
)
from providers.scripted import drawn
from server.runtime import Server
from services.history import MAX_IMAGE_BYTES, MAX_SENT_FILES, Prompt, PromptLimits, estimate_prompt, history
from streams.tokens import TOKENS_PER_IMAGE
from tests.anthropic_wire import answer as anthropic_answer
from tests.anthropic_wire import text_block, thinking_block
from tests.api import test_anthropic_models, test_real_models
from tests.api.test_attachments import DELETE, database, png
from tests.api.test_real_models import said
from tests.client import Client
from tests.scripts import SCRIPTS
from tests.unit.test_pdf import CATALOG, TRAILER, plain, tree
from tests.vendor_server import Wire

SEES = PromptLimits(max_chars=400_000, vision=True, pdf=True, model_id="driven")
BLIND = PromptLimits(max_chars=400_000, model_id="driven")


def pdf(pages: int) -> bytes:
    return b"%PDF-1.7\n" + plain(1, CATALOG) + plain(2, tree(pages)) + TRAILER


async def asked(client: Client, *events: ProviderEvent, question: str | None = None, **more: Any) -> dict[str, Any]:
    """A whole turn with the driven model."""
    text = question or str(uuid.uuid4())
    for event in events or (TextDelta("seen"),):
        SCRIPTS.driven.queue(text).put_nowait(event)
    SCRIPTS.driven.queue(text).put_nowait(None)
    turn = await client.send(text, model="driven", **more)
    turn["answer"] = await client.finish(turn["assistantMessage"]["id"])
    turn["question"] = text
    return turn


async def following(client: Client, *turns: dict[str, Any], **more: Any) -> GenerationRequest:
    """What the model is asked with by another turn of the thread."""
    turn = await asked(client, threadId=turns[-1]["thread"]["id"], **more)
    return SCRIPTS.driven.requests[turn["question"]]


async def told(server: Server, turn: dict[str, Any], limits: PromptLimits) -> Prompt:
    """What a model with these limits would be told up to the turn's question."""
    return await history(server.database, server.storage, parse_id(IdKind.MESSAGE, turn["userMessage"]["id"]), limits)


async def estimated(server: Server, turn: dict[str, Any], limits: PromptLimits) -> int:
    async with server.database.acquire() as connection:
        return await estimate_prompt(connection, parse_id(IdKind.MESSAGE, turn["userMessage"]["id"]), limits)


def sent(prompt: Prompt) -> list[str]:
    """The names of the files whose bytes go along, oldest message first."""
    return [part.name for message in prompt.messages for part in message.content if isinstance(part, PromptFile)]


# Files


async def test_images_and_pdfs_are_sent_to_models_that_can_take_them_and_named_to_others(
    server: Server, client: Client
) -> None:
    image, document = png(2, 2), pdf(3)
    given = [await client.upload(image, "p.png"), await client.upload(document, "d.pdf")]
    turn = await asked(client, attachmentIds=[one["id"] for one in given])
    assert (await told(server, turn, SEES)).messages == (
        PromptMessage(
            "user",
            (
                PromptText(f'[File "p.png" (image/png, {len(image)} bytes):]'),
                PromptFile("p.png", "image/png", image),
                PromptText(f'[File "d.pdf" (application/pdf, {len(document)} bytes):]'),
                PromptFile("d.pdf", "application/pdf", document),
                PromptText(turn["question"]),
            ),
        ),
    )
    (blind,) = (await told(server, turn, BLIND)).messages
    assert blind.text == (
        f'[File "p.png" (image/png, {len(image)} bytes): its content is not shown here.]\n\n'
        f'[File "d.pdf" (application/pdf, {len(document)} bytes): its content is not shown here.]\n\n{turn["question"]}'
    )
    assert sent(await told(server, turn, PromptLimits(max_chars=9, vision=True))) == ["p.png"]
    assert sent(await told(server, turn, PromptLimits(max_chars=9, pdf=True))) == ["d.pdf"]
    # The vendor gave no count: what was sent is estimated, the image and the three pages among it.
    assert turn["answer"]["usage"]["promptTokens"] > TOKENS_PER_IMAGE + 3 * 2_500
    await client.run(DELETE, {"id": given[0]["id"]})
    assert sent(await told(server, turn, SEES)) == ["d.pdf"]
    assert "deleted since" in (await told(server, turn, SEES)).messages[0].text


async def test_files_beyond_the_bounds_are_named_the_newest_are_sent(server: Server, client: Client) -> None:
    images = [await client.upload(png(2, 2) + bytes([n]), f"{n}.png") for n in range(MAX_SENT_FILES + 4)]
    first = await asked(client, attachmentIds=[image["id"] for image in images[:12]])
    second = await asked(client, attachmentIds=[image["id"] for image in images[12:]], threadId=first["thread"]["id"])
    names = sent(await told(server, second, SEES))
    assert len(names) == MAX_SENT_FILES
    assert names == [f"{n}.png" for n in (*range(8), *range(12, 24))]
    request = SCRIPTS.driven.requests[second["question"]]
    assert request.messages[0].text.count("its content is not shown here") == 4


@pytest.mark.parametrize(
    ("content", "goes"),
    [
        (png(8_000, 8) + bytes(MAX_IMAGE_BYTES - 37), True),
        (png(8_000, 8) + bytes(MAX_IMAGE_BYTES - 36), False),
        (png(8_001, 8), False),
        (pdf(100), True),
        (pdf(101), False),
        (b"%PDF-1.7 encrypted, or broken", False),
    ],
    ids=["an image as large as may be", "a larger one", "a wider one", "100 pages", "101 pages", "pages not known"],
)
async def test_what_vendors_would_refuse_is_named(server: Server, client: Client, content: bytes, goes: bool) -> None:
    turn = await asked(client, attachmentIds=[(await client.upload(io.BytesIO(content), "f"))["id"]])
    assert sent(await told(server, turn, SEES)) == (["f"] if goes else [])


async def test_no_more_bytes_are_sent_than_a_request_may_have(server: Server, client: Client) -> None:
    images = [await client.upload(io.BytesIO(png(2, 2) + bytes(3_500_000 + n)), f"{n}.png") for n in range(4)]
    turn = await asked(client, attachmentIds=[image["id"] for image in images])
    assert sent(await told(server, turn, SEES)) == ["0.png", "1.png", "2.png"]


async def test_images_of_answers_are_told_of_with_them(server: Server, client: Client) -> None:
    image = drawn(4, 4)
    turn = await asked(client, TextDelta("Here: "), ImageOutput("image/png", image))
    request = await following(client, turn)
    assert request.messages[1] == PromptMessage(
        "assistant", (PromptText("Here: "), PromptFile("image-1.png", "image/png", image))
    )
    second = await asked(client, threadId=turn["thread"]["id"])
    assert "image-1.png" in (await told(server, second, BLIND)).messages[1].text


# Calls and reasoning


async def test_calls_go_along_in_their_place(client: Client) -> None:
    turn = await asked(client, TextDelta("Wait. "), ToolCall("c1", "search", {"q": "🦉"}), TextDelta("An owl."))
    request = await following(client, turn)
    assert request.messages[1].content == (
        PromptText("Wait. "),
        PromptToolCall("c1", "search", {"q": "🦉"}, None),
        PromptText("An owl."),
    )


async def test_an_answer_that_is_a_call_alone_goes_along(client: Client) -> None:
    turn = await asked(client, ToolCall("c1", "search", {}))
    assert len((await following(client, turn)).messages) == 3


async def test_signed_reasoning_goes_back_to_the_model_that_wrote_it_alone(server: Server, client: Client) -> None:
    turn = await asked(
        client, ReasoningDelta("Let me "), ReasoningDelta("see."), ReasoningSignature("EqQ="), TextDelta("A")
    )
    request = await following(client, turn)
    assert request.messages[1].content == (PromptReasoning("Let me see.", "EqQ="), PromptText("A"))
    second = await asked(client, threadId=turn["thread"]["id"])
    other = PromptLimits(max_chars=400_000, model_id="another")
    assert (await told(server, second, other)).messages[1].content == (PromptText("A"),)
    assert orjson.dumps(turn["answer"]).count(b"EqQ=") == 0


@pytest.mark.parametrize(
    "events",
    [
        [ReasoningDelta("hm"), TextDelta("A")],
        [ReasoningDelta("hm"), ReasoningSignature("s"), ReasoningDelta("so"), TextDelta("A")],
        [ReasoningDelta("hm"), ReasoningSignature("s"), TextDelta("A"), ReasoningDelta("so")],
        [ReasoningDelta("hm"), ReasoningSignature("s"), ReasoningSignature(None), TextDelta("A")],
    ],
    ids=["no signature", "more text behind it", "more reasoning without one", "a part withheld"],
)
async def test_reasoning_that_is_not_signed_as_a_whole_is_left_out(client: Client, events: list[ProviderEvent]) -> None:
    request = await following(client, await asked(client, *events))
    assert request.messages[1].content == (PromptText("A"),)


async def test_reasoning_alone_is_no_answer_to_go_on_from(client: Client) -> None:
    turn = await asked(client, ReasoningDelta("hm"), ReasoningSignature("s"))
    assert [message.role for message in (await following(client, turn)).messages] == ["user", "user"]


async def test_a_signature_is_shown_to_nobody_and_goes_with_an_export_but_with_no_link(
    server: Server, client: Client
) -> None:
    turn = await client.send("Think", model="thinks-signed")
    events = await client.read(turn["assistantMessage"]["id"])
    assert b"EqQ=" not in orjson.dumps(events)
    share = "mutation($id: ID!) { shareThread(input: {threadId: $id}) { share { token } } }"
    token = (await client.run(share, {"id": turn["thread"]["id"]}))["shareThread"]["share"]["token"]
    async with database(server) as connection:
        query = "SELECT m.parts FROM share_messages m JOIN shares s ON s.id = m.share_id WHERE s.token = $1"
        assert "EqQ=" not in str(await connection.fetch(query, token))
        query = "SELECT parts FROM messages WHERE id = $1"
        kept = await connection.fetchval(query, parse_id(IdKind.MESSAGE, turn["assistantMessage"]["id"]))
    assert orjson.loads(kept)[0] == {"type": "reasoning", "text": "Let me see.", "signature": "EqQ="}


# The context


async def conversation(client: Client, turns: int, words: int) -> dict[str, Any]:
    """A thread of so many turns; the last of them."""
    turn = await asked(client, TextDelta("a " * words), question="0 " + "q " * words + str(uuid.uuid4()))
    for number in range(1, turns):
        question = f"{number} " + "q " * words + str(uuid.uuid4())
        turn = await asked(client, TextDelta("a " * words), question=question, threadId=turn["thread"]["id"])
    return turn


async def test_the_oldest_are_left_out_until_the_rest_fits_the_models_context(server: Server, client: Client) -> None:
    last = await conversation(client, 5, 200)
    whole = await told(server, last, BLIND)
    assert len(whole.messages) == 9
    seen = set()
    for context in range(0, whole.tokens + 100, 37):
        limits = PromptLimits(max_chars=400_000, context_tokens=context + 50, reserved_tokens=50)
        prompt = await told(server, last, limits)
        assert prompt.messages == whole.messages[-len(prompt.messages) :]
        assert prompt.messages[0].role == "user"
        assert prompt.tokens <= context or len(prompt.messages) == 1
        seen.add(len(prompt.messages))
    assert seen == {1, 3, 5, 7, 9}


async def test_what_a_project_says_has_its_place_in_the_context(server: Server, client: Client) -> None:
    made = await client.run(
        'mutation($p: String!) { createProject(input: {name: "p", prompt: $p}) { project { id } } }',
        {"p": "word " * 400},
    )
    first = await asked(client, projectId=made["createProject"]["project"]["id"])
    second = await asked(client, threadId=first["thread"]["id"])
    for context, roles in ((10_000, ["system", "user", "assistant", "user"]), (530, ["system", "user"])):
        prompt = await told(server, second, PromptLimits(max_chars=400_000, context_tokens=context))
        assert [message.role for message in prompt.messages] == roles


async def test_the_estimate_and_the_prompt_are_of_the_same_files(server: Server, client: Client) -> None:
    given = [
        await client.upload(b"some words", "w.txt"),
        await client.upload(png(2, 2), "p.png"),
        await client.upload(pdf(2), "d.pdf"),
    ]
    first = await asked(client, ReasoningDelta("hm"), ReasoningSignature("EqQ="), ToolCall("c", "f", {"q": 1}))
    last = await asked(client, threadId=first["thread"]["id"], attachmentIds=[one["id"] for one in given])
    for limits in (SEES, BLIND, PromptLimits(max_chars=400_000, context_tokens=3_000, vision=True, pdf=True)):
        prompt, estimate = await told(server, last, limits), await estimated(server, last, limits)
        assert prompt.tokens <= estimate <= prompt.tokens + 3 * 40 + 3 * 4
    assert await estimated(server, last, SEES) - await estimated(server, last, BLIND) > TOKENS_PER_IMAGE + 4_900


# Through the adapters


async def test_an_image_reaches_a_chat_completions_vendor_and_one_comes_back(postgres_url: str, tmp_path: Path) -> None:
    made = drawn(6, 6)

    async def script(wire: Wire) -> None:
        url = data_url(made)
        await wire.head()
        await wire.event(said(content="Here: "))
        await wire.event(said(images=[{"type": "image_url", "image_url": {"url": url}}]))
        await wire.event(said(finish="stop"))
        await wire.send(b"data: [DONE]\n\n")
        await wire.end()

    image = png(2, 2)
    async with test_real_models.served(postgres_url, tmp_path, script) as (client, vendor):
        file = await client.upload(image, "p.png")
        turn = await client.send("And this?", model="gpt-test", attachmentIds=[file["id"]])
        first = await client.finish(turn["assistantMessage"]["id"])
        assert (first["status"], first["parts"][1]["name"]) == ("COMPLETE", "image-1.png")
        again = await client.send("Bluer.", model="gpt-test", threadId=turn["thread"]["id"])
        await client.finish(again["assistantMessage"]["id"])
    assert vendor.requests[0].json["messages"] == [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": f'[File "p.png" (image/png, {len(image)} bytes):]'},
                {"type": "image_url", "image_url": {"url": data_url(image)}},
                {"type": "text", "text": "And this?"},
            ],
        }
    ]
    assert vendor.requests[1].json["messages"][1:] == [
        {"role": "assistant", "content": "Here: "},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": '[File "image-1.png", from the answer before:]'},
                {"type": "image_url", "image_url": {"url": data_url(made)}},
                {"type": "text", "text": "Bluer."},
            ],
        },
    ]


async def test_thinking_goes_back_to_anthropic_with_its_signature(postgres_url: str, tmp_path: Path) -> None:
    async def script(wire: Wire) -> None:
        await wire.head()
        await wire.pieces(anthropic_answer(thinking_block("Hm.", signature="EqQ="), text_block("Yes.", index=1)))
        await wire.end()

    async with test_anthropic_models.served(postgres_url, tmp_path, script) as (client, vendor):
        first = await client.send("One?", model="claude-test", reasoningEffort="LOW")
        await client.finish(first["assistantMessage"]["id"])
        for model in ("claude-test", "claude-haiku-4-5"):
            turn = await client.send("Two?", model=model, threadId=first["thread"]["id"])
            assert (await client.finish(turn["assistantMessage"]["id"]))["status"] == "COMPLETE"
    thinking = {"type": "thinking", "thinking": "Hm.", "signature": "EqQ="}
    text = {"type": "text", "text": "Yes."}
    assert [request.json["messages"][1]["content"] for request in vendor.requests[1:]] == [[thinking, text], [text]]


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"
