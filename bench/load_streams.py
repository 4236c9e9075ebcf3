"""Token streams over WebSocket: every stream has a producer of its own in the server and one reader here."""

from __future__ import annotations

import asyncio
import gc
import uuid
from array import array
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import orjson

from bench.cores import Cores, yardstick_ms
from bench.load_http import HttpConnection, graphql_request, percentile
from bench.servers import BenchError, ServerProcess
from bench.websocket import TOKEN, StreamReader, read_all
from bench.window import Usage, Window

RATE = 30
_STARTERS = 8
_SETTLE_SECONDS = 1.0
_RUNNING_SECONDS = 120.0
_WORDS_A_STEP = RATE

_SEND = """
mutation Ask($input: SendMessageInput!) { sendMessage(input: $input) { assistantMessage { id } } }
"""
# What a client has to ask for to draw an answer and to resume it; not the whole text again at the end, whose words
# would be counted.
READ = """
subscription Read($messageId: ID!, $after: Cursor) {
  messageStream(messageId: $messageId, after: $after) {
    __typename
    ... on MessageDelta { cursor kind text }
    ... on MessagePartAdded { cursor }
    ... on MessageReset { cursor message { status } }
    ... on MessageEnded { cursor message { status error { message } } }
  }
}
"""

OpenStream = Callable[[ServerProcess, HttpConnection, str, int], Awaitable[StreamReader]]


@dataclass(frozen=True, slots=True)
class StreamRound:
    """One window of one server under one number of streams.

    Attributes:
        streams: how many.
        events: text frames that came in the window, with tokens in them.
        tokens: tokens in them; more than events where the server merged what a late reader missed.
        p50_ms: median lag of an event's oldest token behind the beat of its producer, see `StreamReader.best`.
        p99_ms: the same for 99 of 100.
        resident_mib: memory of the server at the end.
        problems: what should not have happened.
    """

    streams: int
    events: int
    tokens: int
    p50_ms: float
    p99_ms: float
    resident_mib: float
    problems: list[str]
    usage: Usage

    @property
    def cpu_us_event(self) -> float:
        """CPU of the server an event, in microseconds."""
        return self.usage.server_seconds / self.events * 1e6

    @property
    def cpu_us_token(self) -> float:
        """CPU of the server a token, in microseconds."""
        return self.usage.server_seconds / self.tokens * 1e6

    @property
    def delivered(self) -> float:
        """Tokens that came, as a share of those that the rate promises."""
        return self.tokens / (self.streams * RATE * self.usage.seconds)


def model_name(streams: int) -> str:
    """The scripted model whose answers begin late enough for so many to be asked for first."""
    return f"bench-{streams}"


def stream_scripts(counts: list[int], seconds: float) -> dict[str, Any]:
    """Scripted models for the product, one for each number of streams.

    Each is silent until all its streams are started, so that starting the last ones is not slowed down by the first
    ones' tokens; then it speaks until after the window.

    Args:
        counts: the numbers of streams.
        seconds: length of the window.
    """
    models: dict[str, Any] = {}
    for count in counts:
        # One step of a second each: the provider makes a list of a step's words for every stream.
        speaking = [{"text": TOKEN.decode() * _WORDS_A_STEP}] * int(seconds + _silence(count) + _RUNNING_SECONDS)
        models[model_name(count)] = {"wordsPerSecond": RATE, "steps": [{"pause": _silence(count)}, *speaking]}
    return models


def _silence(count: int) -> int:
    return 2 + count // 50


def _short_silence(count: int) -> int:
    """Of servers that need not be asked by a mutation first."""
    return 2 + count // 100


async def open_product_stream(
    server: ServerProcess, connection: HttpConnection, token: str, streams: int
) -> StreamReader:
    """Ask in a new thread, and read the answer as a client does: `graphql-transport-ws`."""
    message_id = await ask(connection, token, model_name(streams))
    reader = StreamReader(*product_socket(token, READ, {"messageId": message_id}), RATE)
    await reader.open(server.port)
    return reader


async def ask(connection: HttpConnection, token: str, model: str) -> str:
    """Ask a model in a new thread; the id of the answer."""
    asked = {"idempotencyKey": str(uuid.uuid4()), "text": "Say a word.", "modelId": model}
    answer: dict[str, Any] = orjson.loads(await connection.exchange(graphql_request(_SEND, token, {"input": asked})))
    if "errors" in answer:
        raise BenchError(f"sendMessage was refused: {answer['errors']}")
    message_id: str = answer["data"]["sendMessage"]["assistantMessage"]["id"]
    return message_id


def product_socket(token: str, query: str, variables: dict[str, Any]) -> tuple[str, str, list[str]]:
    """Path, headers and opening of a socket of the product that subscribes to one thing."""
    opening: list[dict[str, Any]] = [
        {"type": "connection_init", "payload": {"authorization": f"Bearer {token}"}},
        {"id": "1", "type": "subscribe", "payload": {"query": query, "variables": variables}},
    ]
    texts = [orjson.dumps(message).decode() for message in opening]
    return "/graphql", "Sec-WebSocket-Protocol: graphql-transport-ws\r\n", texts


async def open_peer_stream(server: ServerProcess, _: HttpConnection, token: str, streams: int) -> StreamReader:
    """The same subscription, of a server that knows no messages: it is told for how long to be silent first."""
    reader = StreamReader(*product_socket(token, READ, {"messageId": str(_short_silence(streams))}), RATE)
    await reader.open(server.port)
    return reader


async def open_raw_stream(server: ServerProcess, _: HttpConnection, token: str, streams: int) -> StreamReader:
    """A bare socket."""
    path = f"/stream?rate={RATE}&silence={_short_silence(streams)}"
    reader = StreamReader(path, f"Authorization: Bearer {token}\r\n", [], RATE)
    await reader.open(server.port)
    return reader


async def measure_streams(
    server: ServerProcess, cores: Cores, open_stream: OpenStream, token: str, *, streams: int, seconds: float
) -> StreamRound:
    """Start the streams, wait until all run, and measure for so many seconds.

    Raises:
        BenchError: not all streams run in time, or nothing came.
    """
    pace = yardstick_ms(cores.server)
    readers = await _start(server, open_stream, token, streams)
    try:
        await _all_running(server, readers)
        await asyncio.sleep(_SETTLE_SECONDS)
        with _no_collections():
            for reader in readers:
                reader.recording = True
            events, tokens = _count(readers)
            window = Window(server, cores, pace)
            read_all(readers, seconds)
            usage = window.close()
            events_after, tokens_after = _count(readers)
            for reader in readers:
                reader.recording = False
        resident_mib = server.resident_mib()
        problems = [problem for reader in readers for problem in reader.problems]
        if lost := sum(reader.closed for reader in readers):
            problems.append(f"{lost} of {streams} sockets were closed by the server")
    finally:
        for reader in readers:
            reader.close()
    if events_after == events:
        raise BenchError(f"{server.name} delivered nothing: {problems[:3]}")
    lags = array("d")
    for reader in readers:
        lags.extend(arrival - reader.best for arrival in reader.arrivals)
    ordered = sorted(lags)
    return StreamRound(
        streams=streams,
        events=events_after - events,
        tokens=tokens_after - tokens,
        p50_ms=percentile(ordered, 0.5) * 1_000,
        p99_ms=percentile(ordered, 0.99) * 1_000,
        resident_mib=resident_mib,
        problems=problems,
        usage=usage,
    )


async def _start(server: ServerProcess, open_stream: OpenStream, token: str, streams: int) -> list[StreamReader]:
    readers: list[StreamReader] = []
    numbers = iter(range(streams))

    async def starter() -> None:
        connection = await HttpConnection.open(server.port)
        try:
            for _ in numbers:
                reader = await open_stream(server, connection, token, streams)
                readers.append(reader)
        finally:
            connection.close()

    starters = [asyncio.create_task(starter()) for _ in range(_STARTERS)]
    try:
        await asyncio.gather(*starters)
    finally:
        for task in starters:
            task.cancel()
    return readers


async def _all_running(server: ServerProcess, readers: list[StreamReader]) -> None:
    try:
        async with asyncio.timeout(_RUNNING_SECONDS):
            for reader in readers:
                await reader.running.wait()
    except TimeoutError as error:
        running = sum(reader.running.is_set() for reader in readers)
        problems = [problem for reader in readers for problem in reader.problems]
        raise BenchError(f"{server.name}: {running} of {len(readers)} streams run; {problems[:3]}") from error


def _count(readers: list[StreamReader]) -> tuple[int, int]:
    return sum(reader.events for reader in readers), sum(reader.tokens for reader in readers)


@contextmanager
def _no_collections() -> Iterator[None]:
    """Without garbage collections of the generator, which would be taken for lags of the server."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
