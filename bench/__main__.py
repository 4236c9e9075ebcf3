"""`python -m bench`: what the product costs beside a hand-written server, in one run, as Markdown on standard output.

python -m bench            everything, in less than five minutes
python -m bench --quick    a first impression, in less than one
python -m bench --only Q,M a choice: Q (threads with projects), M (threads with messages), S (token streams)
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import uvloop

from bench import report, servers
from bench.cores import Cores
from bench.load_http import HttpRound, fetch, get_request, graphql_request, measure_requests
from bench.load_sockets import SESSION
from bench.load_streams import (
    RATE,
    StreamRound,
    measure_streams,
    open_product_stream,
    open_raw_stream,
    stream_scripts,
)
from bench.seed import seed
from bench.servers import BenchError, Place, ServerProcess
from models.embedded import EmbeddedPostgres, EmbeddedPostgresError
from models.ids import IdKind, parse_id

_CONNECTIONS = 16


@dataclass(frozen=True, slots=True)
class RequestKind:
    """The same question to both servers: a GraphQL document and a path of RAW."""

    title: str
    query: str
    path: str


_KINDS = {
    "Q": RequestKind(
        "Q: a page of 50 threads with their projects",
        """
        query Threads {
          threads(first: 50) {
            nodes { id title pinned createdAt updatedAt project { id name } }
            pageInfo { hasNextPage hasPreviousPage startCursor endCursor }
          }
        }
        """,
        "/threads?first=50",
    ),
    "M": RequestKind(
        "M: 10 threads with their last 10 messages",
        """
        query Histories {
          threads(first: 10) { nodes { id title messages(last: 10) { nodes { id role text createdAt } } } }
        }
        """,
        "/histories?threads=10&messages=10",
    ),
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure, and how long."""

    kinds: list[str]
    stream_counts: list[int]
    request_rounds: int
    request_seconds: float
    stream_rounds: int
    stream_seconds: float


@dataclass(slots=True)
class Bench:
    """One run, on a database that has been started."""

    plan: Plan
    cores: Cores
    place: Place
    scripts: Path
    token: str = ""
    complaints: list[str] = field(default_factory=list)

    async def run(self) -> None:
        """Measure everything that was asked for; print each table as soon as it is there."""
        task = asyncio.current_task()
        assert task is not None
        # As Ctrl-C does: the servers are stopped and the folder is removed.
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        models = stream_scripts(self.plan.stream_counts, self.plan.stream_seconds)
        self.scripts.write_bytes(orjson.dumps(models))
        print(report.heading(self.cores, _CONNECTIONS), flush=True)
        await self._requests()
        for count in self.plan.stream_counts:
            await self._streams(count)
        if self.complaints:
            print(f"\nThe product logged {len(self.complaints)} warnings or errors; the first:\n")
            print("\n".join(f"    {line}" for line in self.complaints[:10]), flush=True)

    async def _requests(self) -> None:
        """Both servers run side by side; the one that is not asked is idle."""
        async with AsyncExitStack() as stack:
            product = await self._started(stack, servers.product(self.place, self.scripts))
            await self._prepare(product)
            raw = await self._started(stack, servers.raw(self.place))
            for kind in self.plan.kinds:
                product_rounds, raw_rounds = await self._request_rounds(_KINDS[kind], product, raw)
                print("\n" + report.requests_table(_KINDS[kind].title, product_rounds, raw_rounds), flush=True)
            self.complaints += product.complaints()

    async def _request_rounds(
        self, kind: RequestKind, product: ServerProcess, raw: ServerProcess
    ) -> tuple[list[HttpRound], list[HttpRound]]:
        asked = {
            product: graphql_request(kind.query, self.token),
            raw: get_request(kind.path, self.token),
        }
        answers = [await fetch(server.port, request) for server, request in asked.items()]
        if answers[0] != answers[1]:
            raise BenchError(f"{kind.title}: the two servers answer differently:\n{str(answers)[:2_000]}")
        rounds: dict[ServerProcess, list[HttpRound]] = {product: [], raw: []}
        for number in range(self.plan.request_rounds):
            for server, request in asked.items():
                _tell(f"{kind.title}, round {number + 1}, {server.name}")
                measured = await measure_requests(
                    server, self.cores, request, connections=_CONNECTIONS, seconds=self.plan.request_seconds
                )
                rounds[server].append(measured)
        return rounds[product], rounds[raw]

    async def _streams(self, count: int) -> None:
        """A server of its own for every round: what streams leave behind is no part of the next."""
        product_rounds: list[StreamRound] = []
        raw_rounds: list[StreamRound] = []
        for number in range(self.plan.stream_rounds):
            for server, open_stream, rounds in (
                (servers.product(self.place, self.scripts), open_product_stream, product_rounds),
                (servers.raw(self.place), open_raw_stream, raw_rounds),
            ):
                async with AsyncExitStack() as stack:
                    await self._started(stack, server)
                    _tell(f"S: {count} streams, round {number + 1}, {server.name}")
                    measured = await measure_streams(
                        server, self.cores, open_stream, self.token, streams=count, seconds=self.plan.stream_seconds
                    )
                    rounds.append(measured)
                    self.complaints += server.complaints()
        print("\n" + report.streams_table(product_rounds, raw_rounds, RATE), flush=True)

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
    plan = _plan()
    if not hasattr(os, "sched_setaffinity"):
        print("The benchmark pins processes and reads /proc: it needs Linux.", file=sys.stderr)
        return 1
    cores = Cores.pick()
    # Before PostgreSQL is started: it inherits the core.
    os.sched_setaffinity(0, {cores.generator})
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="threadgraph-bench-") as name:
        folder = Path(name)
        # PostgreSQL's own user must be able to pass, should this be run by root.
        folder.chmod(0o711)
        try:
            with EmbeddedPostgres(folder / "database" / "postgres") as postgres:
                bench = Bench(plan, cores, Place(postgres.url, folder, cores.server), folder / "scripts.json")
                with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                    runner.run(bench.run())
        except (KeyboardInterrupt, asyncio.CancelledError):
            print("The benchmark was stopped.", file=sys.stderr)
            return 1
        except (BenchError, EmbeddedPostgresError, OSError) as error:
            print(f"The benchmark failed. {error}", file=sys.stderr)
            return 1
    print(f"\nTook {time.monotonic() - began:.0f} s.")
    return 0


def _plan() -> Plan:
    parser = argparse.ArgumentParser(prog="python -m bench", description="The product beside a hand-written server.")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds, and 300 streams only")
    parser.add_argument("--only", default="Q,M,S", help="which of Q, M and S to measure, separated by commas")
    parser.add_argument("--streams", default="", help="the numbers of streams for S, separated by commas")
    arguments = parser.parse_args()
    chosen = [name.strip().upper() for name in arguments.only.split(",")]
    if unknown := set(chosen) - {"Q", "M", "S"}:
        parser.error(f"--only knows Q, M and S, not {', '.join(sorted(unknown))}")
    quick = arguments.quick
    try:
        counts = [int(count) for count in (arguments.streams or ("300" if quick else "300,1000")).split(",")]
    except ValueError:
        parser.error("--streams takes whole numbers")
    if min(counts) < 1:
        parser.error("--streams takes numbers from 1")
    return Plan(
        kinds=[kind for kind in _KINDS if kind in chosen],
        stream_counts=counts if "S" in chosen else [],
        request_rounds=5 if quick else 9,
        request_seconds=0.7 if quick else 1.5,
        stream_rounds=1 if quick else 2,
        stream_seconds=5.0 if quick else 8.0,
    )


def _tell(progress: str) -> None:
    print(f"… {progress}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
