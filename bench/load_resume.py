"""A reader that has missed a long answer catches up: how many events, bytes and milliseconds that takes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from bench.load_http import HttpConnection, fetch, graphql_request
from bench.load_streams import READ, ask, product_socket
from bench.servers import BenchError, ServerProcess
from bench.websocket import TOKEN, StreamReader, TextReader
from models.ids import IdKind, parse_id
from streams.token_log import LogName
from tests.valkey import ValkeyServer

RESUME_MODEL = "bench-resume"
LOG_MODEL = "bench-log"
LOG_RATE = 50
_STOP = "mutation Stop($id: ID!) { stopMessage(input: {messageId: $id}) { message { status } } }"
_TIMES = 5
_PATIENCE_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Resume:
    """One reader that catches up.

    Attributes:
        events: those that carried what was missed.
        tokens: how many were in them.
        size: bytes of those events.
        seconds: from the begin of its connection until it had them.
        cpu_seconds: of the server, from the subscription on a socket that is open until all is taken.
    """

    events: int
    tokens: int
    size: int
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True, slots=True)
class LogSize:
    """The logs of some answers in Valkey, as Valkey counts them."""

    tokens: int
    entries: int
    size: int
    text: int


def scripts(tokens: int, rate: float, log_seconds: float) -> dict[str, Any]:
    """The scripted models that are needed here; their answers stay live until they are stopped."""
    word = TOKEN.decode()
    return {
        RESUME_MODEL: {"wordsPerSecond": rate, "steps": [{"text": word * tokens}, {"pause": "forever"}]},
        LOG_MODEL: {
            "wordsPerSecond": LOG_RATE,
            "steps": [{"text": word * int(LOG_RATE * log_seconds)}, {"pause": "forever"}],
        },
    }


class LongAnswer:
    """An answer that is being written, and the cursor of a reader who saw only its beginning."""

    def __init__(self, token: str, message_id: str, first: bytes, steady: StreamReader) -> None:
        self.message_id = message_id
        self._token = token
        self._seen = first.count(TOKEN)
        self._after = orjson.loads(first)["payload"]["data"]["messageStream"]["cursor"]
        self._steady = steady

    @classmethod
    async def begin(cls, server: ServerProcess, connection: HttpConnection, token: str) -> LongAnswer:
        """Ask for it, and read its first event."""
        message_id = await ask(connection, token, RESUME_MODEL)
        steady = StreamReader(*product_socket(token, READ, {"messageId": message_id}), 1.0)
        await steady.open(server.port)
        first = TextReader(*product_socket(token, READ, {"messageId": message_id}))
        await first.open(server.port)
        _, text = await first.next()
        first.close()
        return cls(token, message_id, text, steady)

    async def written(self, tokens: int, seconds: float) -> None:
        """Wait until so many tokens are there.

        Raises:
            BenchError: they are not in time.
        """
        try:
            async with asyncio.timeout(seconds + _PATIENCE_SECONDS):
                while self._steady.tokens < tokens:
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise BenchError(f"only {self._steady.tokens} of {tokens} tokens were written") from None
        self._steady.close()

    async def resumes(self, server: ServerProcess, tokens: int) -> list[Resume]:
        """Some readers, one after the other, who go on with the cursor; the answer has so many tokens."""
        return [await self._resume(server, tokens) for _ in range(_TIMES)]

    async def stop(self, server: ServerProcess) -> None:
        """Let it end: its text is in the database from then on."""
        # The connection on which it was asked for is closed by now: nobody used it.
        answer = orjson.loads(await fetch(server.port, graphql_request(_STOP, self._token, {"id": self.message_id})))
        if "errors" in answer:
            raise BenchError(f"stopMessage was refused: {answer['errors']}")

    async def _resume(self, server: ServerProcess, tokens: int) -> Resume:
        path, headers, (init, subscribe) = product_socket(
            self._token, READ, {"messageId": self.message_id, "after": self._after}
        )
        reader = TextReader(path, headers, [init])
        began = time.perf_counter()
        await reader.open(server.port)
        await reader.next()
        busy = server.cpu_seconds()
        reader.say(subscribe)
        events = held = size = 0
        at = began
        while held < tokens - self._seen:
            at, text = await reader.next()
            if not (found := text.count(TOKEN)):
                raise BenchError(f"not what was missed: {text[:300]!r}")
            events, held, size = events + 1, held + found, size + len(text)
        busy = server.cpu_seconds() - busy
        reader.close()
        return Resume(events, held, size, at - began, busy)


async def log_size(valkey: ValkeyServer, message_ids: Sequence[str]) -> LogSize:
    """What the logs of these answers take."""
    size = entries = text = 0
    for message_id in message_ids:
        key = LogName(parse_id(IdKind.MESSAGE, message_id)).key
        size += _number(await valkey.run("MEMORY", "USAGE", key, "SAMPLES", 0))
        entries += _number(await valkey.run("XLEN", key))
        last = await valkey.run("XREVRANGE", key, "+", "-", "COUNT", 1)
        if not isinstance(last, list) or not last:
            raise BenchError("a log is empty")
        text += int(last[0][0].partition(b"-")[0])
    return LogSize(tokens=text // len(TOKEN), entries=entries, size=size, text=text)


def _number(answer: object) -> int:
    if not isinstance(answer, int):
        raise BenchError(f"Valkey answered {answer!r}")
    return answer
