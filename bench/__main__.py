"""`python -m bench`: what the product costs beside a hand-written server and others, in one run, as Markdown.

python -m bench               all servers and all questions; a quarter of an hour
python -m bench --quick       the product, RAW and Mercurius, in short rounds; a few minutes
python -m bench --only Q,M    a choice: Q (threads with projects), M (threads with messages), S (token streams)
python -m bench --servers yoga    beside the product and RAW, only these
python -m bench --write       and write docs/benchmarks.md, its picture and the table of the README

Servers that this machine cannot run, or that fail, are named, and the rest goes on.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import orjson

from bench import contenders, report
from bench.contenders import CONTENDERS, PRODUCT, RAW, REQUESTS, Contender, RequestKind
from bench.cores import Cores
from bench.load_http import HttpRound, fetch, graphql_request, measure_requests
from bench.load_sockets import SESSION
from bench.load_streams import RATE, StreamRound, measure_streams, stream_scripts
from bench.report import Results
from bench.run import run
from bench.seed import seed
from bench.servers import BenchError, Place, ServerProcess
from models.ids import IdKind, parse_id

T = TypeVar("T")
_CONNECTIONS = 16
_QUICK = "Mercurius"


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure, and how long."""

    contenders: list[Contender]
    kinds: list[str]
    stream_counts: list[int]
    warm_up_seconds: float
    request_rounds: int
    request_seconds: float
    stream_rounds: int
    stream_seconds: float
    write: bool


@dataclass(slots=True)
class Bench:
    """One run, on a database that has been started."""

    plan: Plan
    cores: Cores
    place: Place
    scripts: Path
    token: str = ""
    results: Results = field(default_factory=Results)
    complaints: list[str] = field(default_factory=list)
    text: str = ""

    async def run(self) -> None:
        """Measure everything that was asked for; print each table as soon as it is there."""
        models = stream_scripts(self.plan.stream_counts, self.plan.stream_seconds)
        self.scripts.write_bytes(orjson.dumps(models))
        made_of = {contender.name: contender.made_of() for contender in self.plan.contenders}
        self._print(report.heading(self.cores, _CONNECTIONS, made_of))
        await self._requests()
        for count in self.plan.stream_counts:
            await self._streams(count)
        self._print("### In short\n\n" + report.summary(self.results))
        if self.complaints:
            first = "\n".join(f"    {line}" for line in self.complaints[:10])
            self._print(f"The product logged {len(self.complaints)} warnings or errors; the first:\n\n{first}")

    async def _requests(self) -> None:
        """The servers run side by side; those that are not asked are idle."""
        async with AsyncExitStack() as stack:
            running: dict[Contender, ServerProcess] = {}
            for contender in self.plan.contenders:
                try:
                    running[contender] = await self._started(stack, contender.make(self.place, self.scripts))
                except BenchError as error:
                    if contender in (PRODUCT, RAW):
                        raise
                    self._lose(contender, error)
                if contender is PRODUCT:
                    await self._prepare(running[PRODUCT])
            for kind in self.plan.kinds:
                rounds = await self._request_rounds(REQUESTS[kind], running)
                self.results.requests[kind] = rounds
                self._print(report.requests_table(REQUESTS[kind].title, rounds))
            self.complaints += running[PRODUCT].complaints()

    async def _request_rounds(
        self, kind: RequestKind, running: dict[Contender, ServerProcess]
    ) -> list[dict[str, HttpRound]]:
        expected = await fetch(running[RAW].port, RAW.request(kind, self.token))
        asked: list[Contender] = []
        for contender, server in running.items():
            try:
                _compare(contender, await fetch(server.port, contender.request(kind, self.token)), expected)
                # Compilers of others' runtimes take their time until they know what is worth compiling.
                await self._request_round(kind, contender, server, self.plan.warm_up_seconds)
                asked.append(contender)
            except BenchError as error:
                if contender in (PRODUCT, RAW):
                    raise
                self._lose(contender, error)
        rounds: list[dict[str, HttpRound]] = []
        for number in range(self.plan.request_rounds):
            _tell(f"{kind.title}, round {number + 1} of {self.plan.request_rounds}")
            measured: dict[str, HttpRound] = {}
            for contender in _in_turn(asked, number):
                try:
                    measured[contender.name] = await self._request_round(
                        kind, contender, running[contender], self.plan.request_seconds
                    )
                except BenchError as error:
                    self._lose(contender, error)
                    asked.remove(contender)
            rounds.append(_in_order(measured))
        return rounds

    async def _request_round(
        self, kind: RequestKind, contender: Contender, server: ServerProcess, seconds: float
    ) -> HttpRound:
        request = contender.request(kind, self.token)
        return await measure_requests(server, self.cores, request, connections=_CONNECTIONS, seconds=seconds)

    async def _streams(self, count: int) -> None:
        """A server of its own for every round: what streams leave behind is no part of the next."""
        rounds: list[dict[str, StreamRound]] = []
        asked = list(self.plan.contenders)
        for number in range(self.plan.stream_rounds):
            measured: dict[str, StreamRound] = {}
            for contender in _in_turn(asked, number):
                _tell(f"S: {count} streams, round {number + 1} of {self.plan.stream_rounds}, {contender.name}")
                try:
                    measured[contender.name] = await self._stream_round(contender, count)
                except BenchError as error:
                    self._lose(contender, error)
                    asked.remove(contender)
            rounds.append(_in_order(measured))
        if not any(rounds):
            return
        self.results.streams[count] = rounds
        self._print(report.streams_table(rounds, RATE))

    async def _stream_round(self, contender: Contender, count: int) -> StreamRound:
        async with AsyncExitStack() as stack:
            server = await self._started(stack, contender.make(self.place, self.scripts))
            measured = await measure_streams(
                server, self.cores, contender.open_stream, self.token, streams=count, seconds=self.plan.stream_seconds
            )
            if contender is PRODUCT:
                self.complaints += server.complaints()
            return measured

    def _lose(self, contender: Contender, error: BenchError) -> None:
        """Go on without a server in this part."""
        self.results.missing[contender.name] = reason = " ".join(str(error).split())[:300]
        _tell(f"going on without {contender.name}: {reason}")

    def _print(self, part: str) -> None:
        self.text += f"{part}\n\n"
        print(part, end="\n\n", flush=True)

    async def _started(self, stack: AsyncExitStack, server: ServerProcess) -> ServerProcess:
        await server.start()
        stack.push_async_callback(server.stop)
        return server

    async def _prepare(self, product: ServerProcess) -> None:
        """The user, by the product, whose start made the tables; the user's rows, by SQL."""
        answer: dict[str, Any] = orjson.loads(await fetch(product.port, graphql_request(SESSION)))
        session = answer["data"]["startAnonymousSession"]
        self.token = session["token"]
        await seed(self.place.database_url, parse_id(IdKind.USER, session["viewer"]["id"]))


def main() -> int:
    """Run the benchmark; the exit status is 1 where it could not be run."""
    try:
        plan = _plan()
    except BenchError as error:
        print(error, file=sys.stderr)
        return 1

    async def measure(place: Place, cores: Cores) -> None:
        began = time.monotonic()
        bench = Bench(plan, cores, place, place.folder / "scripts.json")
        await bench.run()
        if plan.write:
            _write(bench, f"Took {time.monotonic() - began:.0f} s.")

    return run(measure)


def _write(bench: Bench, took: str) -> None:
    """What was measured, into the documents."""
    docs = report.ROOT / "docs"
    picture = ""
    try:
        from bench import plot

        plot.draw(bench.results, docs / "benchmarks.png")
        picture = "![CPU of requests, CPU of token events and their lag, of each server](benchmarks.png)\n\n"
    except ImportError as error:
        print(f"There is no picture: {error}", file=sys.stderr)
    (docs / "benchmarks.md").write_text(report.document(bench.text, picture, took))
    readme = report.ROOT / "README.md"
    readme.write_text(report.with_table(readme.read_text(), report.summary(bench.results)))


def _compare(contender: Contender, answer: bytes, expected: bytes) -> None:
    """The product's bytes are RAW's; others' `data` is the same value, whatever the order and spacing."""
    if answer == expected:
        return
    if contender is PRODUCT or orjson.loads(answer).get("data") != orjson.loads(expected)["data"]:
        raise BenchError(f"{contender.name} answers {answer[:1_000]!r} and not {expected[:1_000]!r}")


def _in_turn(asked: list[Contender], number: int) -> list[Contender]:
    """To and fro, so that nobody is always the one before or behind another."""
    return asked[::-1] if number % 2 else list(asked)


def _in_order(measured: dict[str, T]) -> dict[str, T]:
    return {contender.name: measured[contender.name] for contender in CONTENDERS if contender.name in measured}


def _plan() -> Plan:
    parser = argparse.ArgumentParser(prog="python -m bench", description="The product beside other servers.")
    parser.add_argument("--quick", action="store_true", help="few and short rounds, few servers, and 300 streams only")
    parser.add_argument("--only", default="Q,M,S", help="which of Q, M and S to measure, separated by commas")
    parser.add_argument("--streams", default="", help="the numbers of streams for S, separated by commas")
    parser.add_argument("--servers", default="", help="the servers beside the product and RAW, separated by commas")
    parser.add_argument("--rounds", type=int, default=0, help="how many rounds, instead of so many as usual")
    parser.add_argument("--write", action="store_true", help="write the documents too")
    arguments = parser.parse_args()
    asked = [name.strip().upper() for name in arguments.only.split(",")]
    if unknown := set(asked) - {"Q", "M", "S"}:
        parser.error(f"--only knows Q, M and S, not {', '.join(sorted(unknown))}")
    quick = arguments.quick
    try:
        counts = [int(count) for count in (arguments.streams or ("300" if quick else "300,1000")).split(",")]
    except ValueError:
        parser.error("--streams takes whole numbers")
    if min(counts) < 1:
        parser.error("--streams takes numbers from 1")
    everybody = ",".join(contender.name for contender in CONTENDERS)
    return Plan(
        contenders=contenders.chosen(arguments.servers or (_QUICK if quick else everybody)),
        kinds=[kind for kind in REQUESTS if kind in asked],
        stream_counts=counts if "S" in asked else [],
        warm_up_seconds=1.5 if quick else 3.0,
        request_rounds=arguments.rounds or (5 if quick else 7),
        request_seconds=0.7 if quick else 1.5,
        stream_rounds=arguments.rounds or (1 if quick else 3),
        stream_seconds=5.0 if quick else 6.0,
        write=arguments.write,
    )


def _tell(progress: str) -> None:
    print(f"… {progress}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
