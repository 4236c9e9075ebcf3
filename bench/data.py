"""`python -m bench.data`: how long the database takes for what users wait for, at a size that hurts, with the plans.

python -m bench.data                                    1,000 users with 1,000,000 messages; minutes, the first time
python -m bench.data --users 10 --messages 20000        a first impression
python -m bench.data --only "message page" --plans      one query, with its plan

The data is made once for each size, by what `threadgraph seed` does, in a database of its own under `--folder`, and
found again by the next run. Calls go to the services as requests do. Of every statement that they send, the round trip
is what they wait for (a prepared statement, the generic plan once PostgreSQL prefers it, all rows fetched); execution
is PostgreSQL's own figure for it (EXPLAIN ANALYZE with a custom plan, without the timing of every node). Each call is
for another user or thread, drawn alike at every run; one with many messages is drawn often.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING
from uuid import UUID
from zoneinfo import ZoneInfo

from models.database import Database
from models.embedded import EmbeddedPostgres, EmbeddedPostgresError
from server.progress import ProgressLine
from services.messages import Messages
from services.paging import PathPosition, SearchPosition, ThreadPosition, page_request
from services.search import Search, SearchFilter
from services.seed import SeedPlan, seed
from services.threads import Threads
from services.usage import Usage
from services.usage_window import Timeframe
from services.viewer import Viewer
from services.wakeups import Wakeups
from streams.channel import BroadcastChannel, MemoryBackend

if TYPE_CHECKING:
    from asyncpg import Connection
    from asyncpg.connection import LoggedQuery

_STATEMENT_SECONDS = 120.0
_CALLS = 60
_WARM_UP = 10
_MESSAGES_OF_A_THREAD = 20
# Of the seeded texts: everywhere, often, here and there.
_WORDS = ("the", "stream", "cursor", "backup", "migrate")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a call is sent: a thread and its owner. Drawn by messages, so that long threads come often."""

    viewer: Viewer
    thread_id: UUID


@dataclass(frozen=True, slots=True)
class NamedCall:
    """What a user waits for: `ask` is called with a place, and a word of the seeded texts."""

    name: str
    ask: Callable[[Place, str], Awaitable[object]]


class RecordingDatabase(Database):
    """Remembers every statement that is sent."""

    def __init__(self, url: str) -> None:
        super().__init__(url, pool_size=2, timeout_seconds=60)
        self.statements: list[LoggedQuery] = []

    @asynccontextmanager
    async def acquire(self) -> AsyncIterator[Connection]:
        """As `Database`; what is sent meanwhile is remembered."""
        async with super().acquire() as connection:
            with connection.query_logger(self.statements.append):
                yield connection


def calls(database: Database) -> list[NamedCall]:
    """Completed as the product grows: every list, search and chart."""

    async def nothing(thread_id: UUID) -> None:
        """No answer is being written."""

    threads, messages = Threads(database, end_live=nothing), Messages(database)
    first = page_request(ThreadPosition.parse, 50, None, None, None)
    last = page_request(ThreadPosition.parse, None, None, 50, None)
    first_messages = page_request(PathPosition.parse, 50, None, None, None)
    last_messages = page_request(PathPosition.parse, None, None, 50, None)
    search, hits = Search(database), page_request(SearchPosition.parse, 25, None, None, None)
    usage = Usage(database, Wakeups(database, BroadcastChannel(MemoryBackend()), look_seconds=60))
    utc, kathmandu = ZoneInfo("UTC"), ZoneInfo("Asia/Kathmandu")
    return [
        NamedCall("thread list", lambda at, word: threads.page(at.viewer, first)),
        NamedCall("thread list, from its end", lambda at, word: threads.page(at.viewer, last)),
        NamedCall("message page", lambda at, word: messages.pages(at.viewer, [at.thread_id], first_messages)),
        NamedCall(
            "message page, from its end", lambda at, word: messages.pages(at.viewer, [at.thread_id], last_messages)
        ),
        NamedCall("search: a word", lambda at, word: search.page(at.viewer, f'"{word}"', hits, SearchFilter())),
        NamedCall("search: a beginning", lambda at, word: search.page(at.viewer, word[:3], hits, SearchFilter())),
        NamedCall("search: misspelt", lambda at, word: search.page(at.viewer, f"{word}x the", hits, SearchFilter())),
        NamedCall("usage: 24 hours", lambda at, word: usage.report(at.viewer, Timeframe.DAY, utc)),
        NamedCall("usage: 30 days", lambda at, word: usage.report(at.viewer, Timeframe.MONTH, kathmandu)),
    ]


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one call: milliseconds of each time, and the plans of the slowest."""

    execution: list[float]
    round_trip: list[float]
    statements: int
    plans: list[str]


async def run(url: str, arguments: argparse.Namespace) -> None:
    """Make the data if it is not there, and print the table."""
    database = RecordingDatabase(url)
    await database.migrate()
    await database.connect()
    plans: list[tuple[str, str]] = []
    async with database.session(statement_seconds=_STATEMENT_SECONDS) as connection:
        await _make_data(database, connection, arguments)
        places = await _places(connection)
        print(await _heading(connection))
        print("| call | statements | execution ms: median | p95 | round trip ms: median | p95 |")
        print("| --- | --- | --- | --- | --- | --- |")
        for call in calls(database):
            if arguments.only not in call.name:
                continue
            figures = await _measure(database, connection, call, places)
            plans += [(call.name, plan) for plan in figures.plans]
            print(
                f"| {call.name} | {figures.statements} "
                f"| {median(figures.execution):.2f} | {_p95(figures.execution):.2f} "
                f"| {median(figures.round_trip):.2f} | {_p95(figures.round_trip):.2f} |",
                flush=True,
            )
    await database.close()
    if arguments.plans:
        for name, plan in plans:
            print(f"\n### {name}: the slowest\n\n```\n{plan}\n```")


async def _make_data(database: Database, connection: Connection, arguments: argparse.Namespace) -> None:
    wanted = f"seeded: {arguments.users} users, {arguments.messages} messages, seed {arguments.seed}"
    found = await connection.fetchval(
        "SELECT shobj_description(oid, 'pg_database') FROM pg_database WHERE datname = current_database()"
    )
    if found == wanted:
        return
    # Left by a run that was stopped.
    await connection.execute("TRUNCATE users CASCADE")
    plan = SeedPlan(
        users=arguments.users,
        threads=max(1, arguments.messages // _MESSAGES_OF_A_THREAD),
        messages=arguments.messages,
        seed=arguments.seed,
        now=datetime.now(UTC),
    )
    line = ProgressLine("making the data", "messages")
    await seed(database, plan, lambda done: line.show(done, plan.messages))
    line.end()
    await connection.execute(f"COMMENT ON DATABASE postgres IS '{wanted}'")


async def _places(connection: Connection) -> list[Place]:
    rows = await connection.fetch(
        "SELECT owner_id, thread_id FROM messages WHERE active ORDER BY hashtextextended(id::text, 1) LIMIT $1",
        _WARM_UP + _CALLS,
    )
    forever = time.time() + 86_400
    return [Place(Viewer(row["owner_id"], anonymous=True, expires_at=forever), row["thread_id"]) for row in rows]


async def _heading(connection: Connection) -> str:
    counts = await connection.fetchrow(
        """
        SELECT (SELECT count(*) FROM users) AS users, (SELECT count(*) FROM threads) AS threads,
            (SELECT count(*) FROM messages) AS messages, (SELECT count(*) FROM usage_events) AS events,
            pg_size_pretty(pg_database_size(current_database())) AS size, current_setting('server_version') AS version
        """
    )
    return (
        f"{counts['users']:,} users, {counts['threads']:,} threads, {counts['messages']:,} messages, "
        f"{counts['events']:,} usage events; {counts['size']}; PostgreSQL {counts['version']}. "
        f"{_CALLS} calls each, behind {_WARM_UP} to warm up.\n"
    )


async def _measure(
    database: RecordingDatabase, connection: Connection, call: NamedCall, places: Sequence[Place]
) -> Figures:
    sent: list[list[LoggedQuery]] = []
    for number, place in enumerate(places):
        database.statements.clear()
        await call.ask(place, _WORDS[number % len(_WORDS)])
        sent.append(list(database.statements))
    sent = sent[_WARM_UP:]
    execution = [sum([await _execution(connection, statement) for statement in statements]) for statements in sent]
    slowest = max(range(len(sent)), key=execution.__getitem__)
    return Figures(
        execution,
        [sum(statement.elapsed for statement in statements) * 1000 for statements in sent],
        max(map(len, sent)),
        [await _plan(connection, statement) for statement in sent[slowest]],
    )


async def _execution(connection: Connection, statement: LoggedQuery) -> float:
    explained = await connection.fetchval(
        f"EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) {statement.query}", *(statement.args or ())
    )
    return float(json.loads(explained)[0]["Execution Time"])


async def _plan(connection: Connection, statement: LoggedQuery) -> str:
    rows = await connection.fetch(f"EXPLAIN (ANALYZE, BUFFERS) {statement.query}", *(statement.args or ()))
    return "\n".join(row[0] for row in rows)


def _p95(values: Sequence[float]) -> float:
    return quantiles(values, n=20)[-1]


def main() -> int:
    """Measure; the exit status is 1 where it could not be done."""
    parser = argparse.ArgumentParser(prog="python -m bench.data", description="Database times at a size that hurts.")
    parser.add_argument("--users", type=int, default=1_000)
    parser.add_argument("--messages", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("data/bench"), help="where the databases are kept")
    parser.add_argument("--only", default="", help="queries whose names hold this")
    parser.add_argument("--plans", action="store_true", help="print the plan of the slowest call of each")
    arguments = parser.parse_args()
    folder = arguments.folder / f"{arguments.users}-{arguments.messages}-{arguments.seed}"
    try:
        with EmbeddedPostgres(folder / "postgres") as postgres:
            asyncio.run(run(postgres.url, arguments))
    except (EmbeddedPostgresError, OSError) as error:
        print(f"It could not be measured. {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
