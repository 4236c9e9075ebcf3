"""`python -m bench.adapters`: CPU that one event of a model's answer costs, beside a bare parse, as Markdown.

Every row reads the same answers of both wire formats. "Bare" is `orjson.loads` of each event's data and nothing else.
Over the socket, the vendor is a process of its own that sends as fast as is read, and only the reader's CPU counts. The
last row is the vendors' own clients, which make typed objects.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from multiprocessing.connection import Connection

import aiohttp
import anthropic
import openai
import orjson

from providers.anthropic import AnthropicProvider
from providers.base import GenerationRequest, PromptMessage
from providers.chat_completions import ChatCompletionsProvider
from providers.event_stream import EventStreamProvider
from providers.http import make_client_session
from providers.sse import EventParser

_EVENTS = 20_000
_ROUNDS = 5
_EVENTS_A_CHUNK = 4  # what a read brings while the vendor is faster than the reader, or less
_REQUEST = GenerationRequest("bench", (PromptMessage.of("user", "Go"),))
_WORD = " lorem"


def _named(event: Mapping[str, object]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (str(event["type"]).encode(), orjson.dumps(event))


def _messages_answer() -> tuple[bytes, bytes, bytes]:
    """The beginning, one word and the end of an answer in Anthropic's format."""
    usage = {"input_tokens": 9, "output_tokens": 1}
    start = {"type": "message_start", "message": {"id": "m", "type": "message", "role": "assistant", "content": [],
             "model": "bench", "stop_reason": None, "stop_sequence": None, "usage": usage}}  # fmt: skip
    begin = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    word = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": _WORD}}
    stop = {"type": "content_block_stop", "index": 0}
    delta = {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None}, "usage": usage}
    return _named(start) + _named(begin), _named(word), _named(stop) + _named(delta) + _named({"type": "message_stop"})


def _chat_answer() -> tuple[bytes, bytes, bytes]:
    """The same in the chat-completions format, with what OpenAI puts around every word."""

    def chunk(delta: dict[str, str], reason: str | None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return b"data: %b\n\n" % orjson.dumps(
            {
                "id": "chatcmpl-CHdtGeM3VXQBhKfVhsSMwJZ1EZ5zC",
                "object": "chat.completion.chunk",
                "created": 1741569952,
                "model": "gpt-5-mini-2025-08-07",
                "service_tier": "default",
                "system_fingerprint": "fp_44added55e",
                "choices": [choice],
            }
        )

    return chunk({"role": "assistant"}, None), chunk({"content": _WORD}, None), chunk({}, "stop") + b"data: [DONE]\n\n"


_ANSWERS = {"/v1/messages": _messages_answer(), "/v1/chat/completions": _chat_answer()}


async def _serve(pipe: Connection) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next(int(line[15:]) for line in head.lower().split("\r\n") if line.startswith("content-length:"))
        await reader.readexactly(length)
        before, word, after = _ANSWERS[head.split(" ")[1].partition("?")[0]]
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n")
        writer.write(b"Transfer-Encoding: chunked\r\n\r\n")
        for event in (before, *([word] * _EVENTS), after):
            writer.write(b"%x\r\n%b\r\n" % (len(event), event))
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    pipe.send(server.sockets[0].getsockname()[1])
    await server.serve_forever()


def _run_server(pipe: Connection) -> None:
    asyncio.run(_serve(pipe))


async def _cpu_of_event(read: Callable[[], Awaitable[None]]) -> float:
    """µs of this process's CPU for one event: the median of some rounds, the first one left out."""
    rounds = []
    for _ in range(_ROUNDS + 1):
        started = time.process_time()
        await read()
        rounds.append((time.process_time() - started) / _EVENTS * 1e6)
    return statistics.median(rounds[1:])


def _bare(path: str) -> Callable[[], Awaitable[None]]:
    word = _ANSWERS[path][1].partition(b"data: ")[2].strip()

    async def read() -> None:
        for _ in range(_EVENTS):
            orjson.loads(word)

    return read


def _parsed(path: str) -> Callable[[], Awaitable[None]]:
    chunk = _ANSWERS[path][1] * _EVENTS_A_CHUNK

    async def read() -> None:
        parser = EventParser()
        for _ in range(_EVENTS // _EVENTS_A_CHUNK):
            for event in parser.feed(chunk):
                orjson.loads(event.data)

    return read


def _understood(path: str, provider: EventStreamProvider) -> Callable[[], Awaitable[None]]:
    chunk = _ANSWERS[path][1] * _EVENTS_A_CHUNK

    async def read() -> None:
        parser, answer = EventParser(), provider._new_answer()  # noqa: SLF001 - what is between the socket and the events
        for _ in range(_EVENTS // _EVENTS_A_CHUNK):
            for event in parser.feed(chunk):
                answer.take(event)
            for _told in answer.collect():
                pass

    return read


def _adapter(provider: EventStreamProvider) -> Callable[[], Awaitable[None]]:
    async def read() -> None:
        async with aclosing(provider.stream(_REQUEST)) as events:
            async for _ in events:
                pass

    return read


def _client_of_anthropic(client: anthropic.AsyncAnthropic) -> Callable[[], Awaitable[None]]:
    async def read() -> None:
        events = await client.messages.create(
            model="bench", max_tokens=9, stream=True, messages=[{"role": "user", "content": "Go"}]
        )
        async for _ in events:
            pass

    return read


def _client_of_openai(client: openai.AsyncOpenAI) -> Callable[[], Awaitable[None]]:
    async def read() -> None:
        chunks = await client.chat.completions.create(
            model="bench", stream=True, messages=[{"role": "user", "content": "Go"}]
        )
        async for _ in chunks:
            pass

    return read


async def _measure(session: aiohttp.ClientSession, port: int) -> None:
    base_url = f"http://127.0.0.1:{port}/v1"
    messages = AnthropicProvider(session=session, base_url=base_url, api_key="k", max_answer_bytes=2**30)
    chat = ChatCompletionsProvider(session=session, base_url=base_url, api_key="k", max_answer_bytes=2**30)
    print("| µs of CPU for one event | Anthropic Messages | chat completions |\n| --- | --- | --- |")
    paths = {"/v1/messages": messages, "/v1/chat/completions": chat}
    rows: list[tuple[str, list[Callable[[], Awaitable[None]]]]] = [
        ("bare `orjson.loads`", [_bare(path) for path in paths]),
        ("event stream split, and `orjson.loads`", [_parsed(path) for path in paths]),
        ("split and understood by the adapter", [_understood(*each) for each in paths.items()]),
        ("the same over a socket, through aiohttp, to the consumer", [_adapter(each) for each in paths.values()]),
    ]
    for title, readers in rows:
        print(f"| {title} | " + " | ".join([f"{await _cpu_of_event(read):.1f}" for read in readers]) + " |")
    async with (
        anthropic.AsyncAnthropic(api_key="k", base_url=base_url.removesuffix("/v1")) as theirs,
        openai.AsyncOpenAI(api_key="k", base_url=base_url) as others,
    ):
        costs = [await _cpu_of_event(_client_of_anthropic(theirs)), await _cpu_of_event(_client_of_openai(others))]
        print(f"| the vendor's own client over the socket | {costs[0]:.1f} | {costs[1]:.1f} |")


async def _main(port: int) -> None:
    async with make_client_session() as session:
        await _measure(session, port)


if __name__ == "__main__":
    ours, theirs = multiprocessing.Pipe()
    vendor = multiprocessing.get_context("spawn").Process(target=_run_server, args=(theirs,), daemon=True)
    vendor.start()
    try:
        asyncio.run(_main(ours.recv()))
    finally:
        vendor.terminate()
        vendor.join()
