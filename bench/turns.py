"""`python -m bench.turns`: what a whole turn costs, beside a server written by hand that writes the same rows.

python -m bench.turns                 all parts, five rounds; some minutes
python -m bench.turns --quick         one short round
python -m bench.turns --only fast     a choice: fast (as fast as it goes, read by nobody), read (100 tokens/s, each read
                                      by one reader), first (how long it takes to the first token)
python -m bench.turns --no-valkey     without the product on the Valkey channel

A turn: a question by `sendMessage` in a new thread, 500 tokens of a scripted model, stored and ended. The servers are
real processes, on one core; this process, PostgreSQL and Valkey share the other.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import asyncpg
import orjson

from bench import report, servers
from bench.cores import Cores, yardstick_ms
from bench.load_http import HttpConnection, graphql_request
from bench.load_sockets import sessions
from bench.load_streams import READ
from bench.run import add_parts, run
from bench.servers import HOST, BenchError, Place, ServerProcess
from bench.websocket import TOKEN, SocketClient
from bench.window import Usage, Window
from tests.valkey import ValkeyServer

_PARTS = ("fast", "read", "first")
_WORDS = 500
_RATE = 100
# For how long a model may think before its first token, in seconds: not at all, and as the fastest vendors do.
_THOUGHTS = (0.0, 0.2)
_QUESTION = "How does a stream go on when its reader comes back after a while?"
_ASKERS = 4
_DONE_SECONDS = 120.0
_WARM_UP = 60
_PRODUCT, _SHARED, _RAW = "product", "product on Valkey", "RAW"
_SEND = "mutation Ask($input: SendMessageInput!) { sendMessage(input: $input) { assistantMessage { id } } }"
_ENDED = (b"MessageEnded", b'"ended":true')


class TurnReader(SocketClient):
    """A socket that reads one answer: when its first token came, how many came, and when it ended."""

    def __init__(self, path: str, headers: str, opening: list[str]) -> None:
        super().__init__(path, headers, opening)
        self.ready = asyncio.Event()
        self.ended = asyncio.Event()
        self.first = 0.0
        self.tokens = 0

    def read(self, text: str) -> None:
        """Ask for an answer."""
        self.first, self.tokens = 0.0, 0
        self.ended.clear()
        self._send(0x81, text.encode())

    def _say_next(self) -> None:
        super()._say_next()
        if not self._opening:
            self.ready.set()

    def _take_frame(self, kind: int, data: bytes, start: int, end: int, now: float) -> None:
        if tokens := data.count(TOKEN, start, end):
            self.first = self.first or now
            self.tokens += tokens
        elif any(data.find(mark, start, end) >= 0 for mark in _ENDED):
            self.ended.set()
        elif b'"connection_ack"' not in data[start:end] and b'"complete"' not in data[start:end]:
            self._complain(data[start:end])


@dataclass(slots=True)
class Side:
    """A server that makes turns, and how it is asked.

    Attributes:
        name: what the table calls it.
        make: the server, not started.
        question: the bytes that ask in a new thread for so many tokens a second (0: as fast as it goes), after so many
            seconds of thought.
        answer_id: the answer's id in what it replies.
        reader: a socket to read answers on.
        subscription: the text that asks for an answer on it.
    """

    name: str
    make: Callable[[], ServerProcess]
    question: Callable[[str, int, float], bytes]
    answer_id: Callable[[Any], str]
    reader: Callable[[str], TurnReader]
    subscription: Callable[[str], str]


@dataclass(frozen=True, slots=True)
class TurnsRound:
    """So many turns at one server.

    Attributes:
        turns: how many.
        lost: how many answers did not come whole to their readers.
    """

    turns: int
    lost: int
    usage: Usage

    @property
    def cpu_ms(self) -> float:
        """CPU of the server a turn."""
        return self.usage.server_seconds / self.turns * 1_000


@dataclass(slots=True)
class TurnsBench:
    """One run, on a database that has been started."""

    parts: Sequence[str]
    rounds: int
    turns: int
    cores: Cores
    place: Place
    scripts: Path
    with_valkey: bool
    token: str = ""
    costs: dict[str, list[dict[str, TurnsRound]]] = field(default_factory=dict)

    async def run(self) -> None:
        """Measure everything that was asked for; print each table as soon as it is there."""
        said = {"text": TOKEN.decode() * _WORDS}
        models = {
            _model(rate, thought): {"wordsPerSecond": rate, "steps": [{"pause": thought}, said] if thought else [said]}
            for rate, thought in [(_RATE, 0.0), *((0, thought) for thought in _THOUGHTS)]
        }
        self.scripts.write_bytes(orjson.dumps(models))
        print(self._heading(), flush=True)
        async with AsyncExitStack() as stack:
            sides = [self._product(_PRODUCT), self._raw()]
            if self.with_valkey:
                valkey = await stack.enter_async_context(ValkeyServer())
                sides.insert(1, self._product(_SHARED, BROADCAST_URL=valkey.url))
            for part in self.parts:
                if part == "first":
                    await self._first(sides)
                else:
                    await self._cost(part, sides)

    async def _cost(self, part: str, sides: Sequence[Side]) -> None:
        rate = _RATE if part == "read" else 0
        measure = self._read if part == "read" else self._fast
        rounds: list[dict[str, TurnsRound]] = []
        for number in range(self.rounds):
            measured: dict[str, TurnsRound] = {}
            for side in sides[::-1] if number % 2 and self.token else sides:
                print(f"… {part}, round {number + 1}, {side.name}", file=sys.stderr, flush=True)
                # One at a time: without Valkey, a server claims the database for itself.
                async with self._running(side) as server:
                    # Each connection to the database prepares each statement once.
                    await self._fast(server, side, 0, _WARM_UP)
                    measured[side.name] = await measure(server, side, rate, self.turns)
            rounds.append(measured)
        title = (
            f"Turns of {_WORDS} tokens at {_RATE} tokens/s, each read by one reader"
            if part == "read"
            else f"Turns of {_WORDS} tokens as fast as they are taken, read by nobody"
        )
        print("\n" + _table(title, rounds), flush=True)

    async def _fast(self, server: ServerProcess, side: Side, rate: int, turns: int) -> TurnsRound:
        """Some connections that ask, one question after the other; the answers need not be waited for."""
        numbers = iter(range(turns))
        pace = yardstick_ms(self.cores.server)
        connections = [await HttpConnection.open(server.port) for _ in range(_ASKERS)]

        async def ask_on(connection: HttpConnection) -> None:
            for _ in numbers:
                await self._ask(side, connection, rate)

        window = Window(server, self.cores, pace)
        await _all(*(ask_on(connection) for connection in connections))
        await self._all_ended()
        usage = window.close()
        for connection in connections:
            connection.close()
        return TurnsRound(turns, 0, usage)

    async def _read(self, server: ServerProcess, side: Side, rate: int, turns: int) -> TurnsRound:
        """All of them at once, spread over a second; each has a reader, whose socket is open before."""
        pace = yardstick_ms(self.cores.server)
        connection = await HttpConnection.open(server.port)
        readers = [await _opened(side.reader(self.token), server) for _ in range(turns)]
        window = Window(server, self.cores, pace)
        for reader in readers:
            reader.read(side.subscription(await self._ask(side, connection, rate)))
            await asyncio.sleep(1 / turns)
        await _all(*(reader.ended.wait() for reader in readers))
        usage = window.close()
        connection.close()
        lost = sum(reader.tokens != _WORDS for reader in readers)
        for reader in readers:
            reader.close()
        return TurnsRound(turns, lost, usage)

    async def _first(self, sides: Sequence[Side]) -> None:
        """One turn after the other, by one client: what there is to wait for when nothing else is going on."""
        waits: dict[str, list[list[float]]] = {side.name: [] for side in sides}
        for side in sides:
            async with self._running(side) as server:
                # Each connection to the database prepares each statement once.
                await self._fast(server, side, 0, _WARM_UP)
                connection = await HttpConnection.open(server.port)
                reader = await _opened(side.reader(self.token), server)
                for thought in _THOUGHTS:
                    asked, first = [], []
                    for _ in range(self.turns):
                        began = time.perf_counter()
                        answer_id = await self._ask(side, connection, 0, thought)
                        asked.append((time.perf_counter() - began) * 1_000)
                        reader.read(side.subscription(answer_id))
                        await _all(reader.ended.wait())
                        if reader.tokens == _WORDS:
                            first.append((reader.first - began - thought) * 1_000)
                    waits[side.name] += [asked, first]
                connection.close()
                reader.close()
        heads = [
            f"{what}, the model {'at once' if thought == 0 else f'after {thought * 1_000:.0f} ms'}"
            for thought in _THOUGHTS
            for what in ("answered", "a token more")
        ]
        rows = [" | ".join([f"| {name}", *map(_quantiles, times)]) + " |" for name, times in waits.items()]
        head = (
            "### To the first token: until the question is answered, and what is added to the model's own time until "
            "its reader has a token\n\n"
            f"| {self.turns} turns, one after the other; ms, p50, p90 | {' | '.join(heads)} |"
        )
        print("\n" + "\n".join([head, "| --- |" + " --- |" * len(heads), *rows]), flush=True)

    async def _ask(self, side: Side, connection: HttpConnection, rate: int, thought: float = 0.0) -> str:
        answer = orjson.loads(await connection.exchange(side.question(self.token, rate, thought)))
        if "errors" in answer:
            raise BenchError(f"the question was refused: {answer['errors']}")
        return side.answer_id(answer)

    async def _all_ended(self) -> None:
        """Wait until no answer is being written any more."""
        database = await asyncpg.connect(self.place.database_url)
        try:
            async with asyncio.timeout(_DONE_SECONDS):
                while await database.fetchval("SELECT EXISTS (SELECT FROM streams)"):
                    await asyncio.sleep(0.02)
        finally:
            await database.close()

    def _running(self, side: Side) -> _Running:
        return _Running(self, side)

    def _product(self, name: str, **more: str) -> Side:
        def question(token: str, rate: int, thought: float) -> bytes:
            asked = {"idempotencyKey": str(uuid.uuid4()), "text": _QUESTION, "modelId": _model(rate, thought)}
            return graphql_request(_SEND, token, {"input": asked})

        def reader(token: str) -> TurnReader:
            init = {"type": "connection_init", "payload": {"authorization": f"Bearer {token}"}}
            return TurnReader(
                "/graphql", "Sec-WebSocket-Protocol: graphql-transport-ws\r\n", [orjson.dumps(init).decode()]
            )

        def subscription(answer_id: str) -> str:
            payload = {"query": READ, "variables": {"messageId": answer_id}}
            return orjson.dumps({"id": answer_id, "type": "subscribe", "payload": payload}).decode()

        return Side(
            name,
            lambda: servers.product(self.place, self.scripts, name=name.replace(" ", "-"), **more),
            question,
            lambda answer: str(answer["data"]["sendMessage"]["assistantMessage"]["id"]),
            reader,
            subscription,
        )

    def _raw(self) -> Side:
        def question(token: str, rate: int, thought: float) -> bytes:
            asked = {"text": _QUESTION, "words": _WORDS, "rate": rate, "thought": thought}
            body = orjson.dumps({"idempotencyKey": str(uuid.uuid4()), **asked})
            head = (
                f"POST /turns HTTP/1.1\r\nHost: {HOST}\r\nAuthorization: Bearer {token}\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            return head.encode() + body

        return Side(
            _RAW,
            lambda: servers.raw_turns(self.place),
            question,
            lambda answer: str(answer["messageId"]),
            lambda token: TurnReader("/read", f"Authorization: Bearer {token}\r\n", []),
            lambda answer_id: answer_id,
        )

    def _heading(self) -> str:
        shared = ": ONE CORE FOR ALL, so that the times below say little" if self.cores.shared else ""
        return (
            "## Whole turns\n\n"
            f"- product: {report.revision()}; {report.packages()}\n"
            f"- machine: {report.cpu_model()}; servers on core {self.cores.server}, all else on core "
            f"{self.cores.generator}{shared}\n"
            "- figures: median of the rounds (least–greatest); the servers take turns in each round, and a ratio is "
            "taken within a round\n"
            "- CPU is the server process's, user and system; PostgreSQL's and Valkey's are not in it"
        )


def _model(rate: int, thought: float) -> str:
    return f"turn-{rate}-{thought}"


class _Running:
    """A server for as long as a block lasts; the first one makes the user whom all ask for."""

    def __init__(self, bench: TurnsBench, side: Side) -> None:
        self._bench = bench
        self._server = side.make()

    async def __aenter__(self) -> ServerProcess:
        await self._server.start()
        if not self._bench.token:
            (self._bench.token,) = await sessions(self._server, 1)
        return self._server

    async def __aexit__(self, *_: object) -> None:
        await self._server.stop()
        if lines := self._server.complaints():
            print(f"{self._server.name} logged {len(lines)} warnings or errors: {lines[:3]}", flush=True)


async def _opened(reader: TurnReader, server: ServerProcess) -> TurnReader:
    await reader.open(server.port)
    await _all(reader.ready.wait())
    # Its answer to the opening is not waited for: what is said next is taken in its order.
    return reader


async def _all(*work: Awaitable[object]) -> None:
    try:
        async with asyncio.timeout(_DONE_SECONDS):
            await asyncio.gather(*work)
    except TimeoutError:
        raise BenchError("not everything that was asked for came in time") from None


def _quantiles(times: Sequence[float]) -> str:
    ordered = sorted(times)
    return f"{median(ordered):.1f}, {ordered[int(len(ordered) * 0.9)]:.1f}" if ordered else ""


def _table(title: str, rounds: Sequence[dict[str, TurnsRound]]) -> str:
    first = rounds[0]
    heads = ["CPU ms/turn", "× RAW", "× product", "turns/s", "its core, %", "others on its core, %", "yardstick ms"]
    lines = [f"### {title}\n", f"| {len(rounds)} rounds of {first[_RAW].turns} | " + " | ".join(heads) + " |"]
    lines.append("| --- |" + " --- |" * len(heads))
    for name in first:
        own = [one[name] for one in rounds]
        cells = [
            _spread([one.cpu_ms for one in own], 3),
            _spread([one[name].cpu_ms / one[_RAW].cpu_ms for one in rounds], 2),
            _spread([one[name].cpu_ms / one[_PRODUCT].cpu_ms for one in rounds], 2),
            _spread([one.turns / one.usage.seconds for one in own], 0),
            _spread([one.usage.server * 100 for one in own], 0),
            _spread([one.usage.others * 100 for one in own], 0),
            _spread([one.usage.yardstick_ms for one in own], 0),
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        if lost := sum(one.lost for one in own):
            lines.append(f"\nPROBLEM: {lost} answers of {name} did not come whole")
    return "\n".join(lines)


def _spread(values: Sequence[float], digits: int) -> str:
    middle = f"{median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def main() -> int:
    """Run it; the exit status is 1 where it could not be run."""
    parser = argparse.ArgumentParser(prog="python -m bench.turns", description="What a whole turn costs.")
    parser.add_argument("--quick", action="store_true", help="one short round")
    add_parts(parser, _PARTS)
    parser.add_argument("--no-valkey", action="store_true", help="without the product on the Valkey channel")
    parser.add_argument("--rounds", type=int, default=0, help="how many rounds, instead of so many as usual")
    arguments = parser.parse_args()

    async def measure(place: Place, cores: Cores) -> None:
        await TurnsBench(
            parts=arguments.only,
            rounds=arguments.rounds or (1 if arguments.quick else 5),
            turns=50 if arguments.quick else 100,
            cores=cores,
            place=place,
            scripts=place.folder / "scripts.json",
            with_valkey=not arguments.no_valkey,
        ).run()

    return run(measure)


if __name__ == "__main__":
    sys.exit(main())
