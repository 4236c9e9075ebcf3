"""`python -m bench.scale`: whether what one request, one stream and one process cost stays the same as there are more.

python -m bench.scale                 all parts; some minutes
python -m bench.scale --only data     a choice: data (messages in the database), streams (at once in one process),
                                      processes (at one database and one Valkey)
python -m bench.scale --messages 10000000    other sizes of the database; ten million take ten minutes to make

CPU is the server processes', on one core; this process, PostgreSQL and Valkey share the other. A machine with more
cores is not needed to see whether processes slow one another down: what a request costs tells.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import orjson

from bench import contenders, report, servers
from bench.contenders import Contender
from bench.cores import Cores
from bench.load_http import HttpRound, fetch, graphql_request, measure_requests
from bench.load_sockets import SESSION
from bench.load_streams import StreamRound, measure_streams, stream_scripts
from bench.run import add_parts, run
from bench.seed import seed
from bench.servers import Place, ServerProcess
from models.ids import IdKind, parse_id
from tests.valkey import ValkeyServer

_PARTS = ("data", "streams", "processes")
_MESSAGES = "100000,1000000"
_STREAMS = "10,100,1000,2000"
_PROCESSES = (1, 2, 4)
_CONNECTIONS = 16
_USERS_AT_ONCE = 100
_THREADS_A_USER = 100
_MESSAGES_A_THREAD = 10
_STATEMENT_SECONDS = 3_600.0
# Others' threads, made by PostgreSQL itself, which is ten times as fast as `threadgraph seed`; Q and M read no more.
_MORE = f"""
WITH made AS (
    INSERT INTO users (id, anonymous) SELECT uuidv7(), false FROM generate_series(1, {_USERS_AT_ONCE}) RETURNING id
), begun AS (
    INSERT INTO threads (id, owner_id, title, title_source)
    SELECT uuidv7(), made.id, 'What somebody else asked', 'TEXT' FROM made, generate_series(1, {_THREADS_A_USER})
    RETURNING id, owner_id
)
INSERT INTO messages (id, owner_id, thread_id, depth, active, role, status, parts)
SELECT uuidv7(), owner_id, id, n, true, CASE n % 2 WHEN 0 THEN 'USER' ELSE 'ASSISTANT' END, 'COMPLETE',
    jsonb_build_array(jsonb_build_object('type', 'text', 'text', repeat('some words of an answer ', 10)))
FROM begun, generate_series(0, {_MESSAGES_A_THREAD - 1}) n
"""


@dataclass(slots=True)
class ScaleBench:
    """One run, on a database that has been started.

    Attributes:
        seconds: of each window.
        rounds: how many windows for each figure of requests.
    """

    parts: Sequence[str]
    messages: Sequence[int]
    streams: Sequence[int]
    seconds: float
    rounds: int
    cores: Cores
    place: Place
    scripts: Path
    token: str = ""

    async def run(self) -> None:
        """Measure everything that was asked for; print each table as soon as it is there."""
        self.scripts.write_bytes(orjson.dumps(stream_scripts(list(self.streams), self.seconds)))
        print(
            "## Scale\n\n"
            f"- product: {report.revision()}; {report.packages()}\n"
            f"- machine: {report.cpu_model()}; servers on core {self.cores.server}, all else on core "
            f"{self.cores.generator}\n"
            f"- figures: least and greatest of {self.rounds} windows of {self.seconds:g} s; the machine's speed varies "
            "(yardstick), so compare the least",
            flush=True,
        )
        await self._prepare()
        for part in self.parts:
            await {"data": self._data, "streams": self._streams, "processes": self._processes}[part]()

    async def _prepare(self) -> None:
        """The tables, and the user whom all ask for, with threads and messages of their own."""
        async with AsyncExitStack() as stack:
            server = await self._started(stack, servers.product(self.place, self.scripts))
            answer = orjson.loads(await fetch(server.port, graphql_request(SESSION)))["data"]["startAnonymousSession"]
        self.token = answer["token"]
        await seed(self.place.database_url, parse_id(IdKind.USER, answer["viewer"]["id"]))

    async def _data(self) -> None:
        lines = _head("messages in the database", "Q: CPU ms/request", "p99 ms", "M: CPU ms/request", "p99 ms")
        lines.append(await self._data_row())
        for size in self.messages:
            await self._grow(size)
            lines.append(await self._data_row())
        _print_table("Requests, as the database of others' messages grows", lines)

    async def _data_row(self) -> str:
        async with AsyncExitStack() as stack:
            server = await self._started(stack, servers.product(self.place, self.scripts))
            cells = []
            for name in ("Q", "M"):
                rounds = await self._asked(server, name)
                cells += [_range([one.cpu_ms for one in rounds], 2), _range([one.p99_ms for one in rounds], 0)]
        return f"| {await self._count():,} | " + " | ".join(cells) + " |"

    async def _count(self) -> int:
        connection = await asyncpg.connect(self.place.database_url)
        try:
            return int(await connection.fetchval("SELECT count(*) FROM messages"))
        finally:
            await connection.close()

    async def _grow(self, size: int) -> None:
        """Make others' messages until there are so many."""
        count = await self._count()
        connection = await asyncpg.connect(self.place.database_url, command_timeout=_STATEMENT_SECONDS)
        try:
            # Without triggers: no feed, no search and no counts of theirs.
            await connection.execute("SET session_replication_role = replica")
            while count < size:
                await connection.execute(_MORE)
                count += _USERS_AT_ONCE * _THREADS_A_USER * _MESSAGES_A_THREAD
                _tell(f"{count:,} of {size:,} messages made")
            await connection.execute("VACUUM ANALYZE")
        finally:
            await connection.close()

    async def _streams(self) -> None:
        lines = _head("answers at once, each read once", "CPU µs/token", "× RAW", "late ms: p50, p99", "KiB each")
        for count in self.streams:
            _tell(f"{count} streams")
            raw, _ = await self._streamed(contenders.RAW, count)
            one, resident_mib = await self._streamed(contenders.PRODUCT, count)
            each = (one.resident_mib - resident_mib) * 1024 / count
            lines.append(
                f"| {count:,} | {one.cpu_us_token:.0f} | {one.cpu_us_token / raw.cpu_us_token:.2f} | "
                f"{one.p50_ms:.0f}, {one.p99_ms:.0f} | {each:.0f} |"
            )
        _print_table("Streams of 30 tokens/s", lines)

    async def _streamed(self, contender: Contender, count: int) -> tuple[StreamRound, float]:
        """By a server of its own: what a process holds that many have gone through is not what these need.

        Returns:
            The round, and the memory before it, in MiB.
        """
        async with AsyncExitStack() as stack:
            server = await self._started(stack, contender.make(self.place, self.scripts))
            before = server.resident_mib()
            one = await measure_streams(
                server, self.cores, contender.open_stream, self.token, streams=count, seconds=self.seconds
            )
        return one, before

    async def _processes(self) -> None:
        lines = _head("processes", "Q: CPU ms/request", "M: CPU ms/request")
        async with ValkeyServer() as valkey:
            for count in _PROCESSES:
                async with AsyncExitStack() as stack:
                    running = [
                        await self._started(
                            stack,
                            servers.product(self.place, self.scripts, name=f"product-{n}", BROADCAST_URL=valkey.url),
                        )
                        for n in range(count)
                    ]
                    cells = []
                    for name in ("Q", "M"):
                        asked = await asyncio.gather(*(self._asked(server, name) for server in running))
                        together = [
                            sum(one.usage.server_seconds for one in rounds)
                            / sum(one.requests for one in rounds)
                            * 1_000
                            for rounds in zip(*asked, strict=True)
                        ]
                        cells.append(_range(together, 2))
                lines.append(f"| {count} | " + " | ".join(cells) + " |")
        _print_table("Requests, as processes share a database, a Valkey and one core", lines)

    async def _asked(self, server: ServerProcess, name: str) -> list[HttpRound]:
        request = contenders.PRODUCT.request(contenders.REQUESTS[name], self.token)
        return [
            await measure_requests(server, self.cores, request, connections=_CONNECTIONS, seconds=self.seconds)
            for _ in range(self.rounds)
        ]

    async def _started(self, stack: AsyncExitStack, server: ServerProcess) -> ServerProcess:
        stack.push_async_callback(server.stop)
        await server.start()
        return server


def _head(*columns: str) -> list[str]:
    return ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]


def _print_table(title: str, lines: list[str]) -> None:
    print(f"\n### {title}\n\n" + "\n".join(lines), flush=True)


def _range(values: Sequence[float], digits: int) -> str:
    return f"{min(values):.{digits}f}–{max(values):.{digits}f}"


def _tell(text: str) -> None:
    print(f"… {text}", file=sys.stderr, flush=True)


def main() -> int:
    """Run it; the exit status is 1 where it could not be run."""
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description="What more of everything costs.")
    add_parts(parser, _PARTS)
    parser.add_argument("--messages", default=_MESSAGES, help="sizes of the database, separated by commas")
    parser.add_argument("--streams", default=_STREAMS, help="numbers of streams, separated by commas")
    arguments = parser.parse_args()

    async def measure(place: Place, cores: Cores) -> None:
        await ScaleBench(
            parts=arguments.only,
            messages=sorted(int(size) for size in arguments.messages.split(",")),
            streams=[int(count) for count in arguments.streams.split(",")],
            seconds=2.0,
            rounds=5,
            cores=cores,
            place=place,
            scripts=place.folder / "scripts.json",
        ).run()

    return run(measure)


if __name__ == "__main__":
    sys.exit(main())
