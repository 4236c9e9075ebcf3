"""`python -m bench.usage_data`: how long a usage report of a heavy user takes the database, as Markdown.

Starts a PostgreSQL of its own, gives one user a million events of five models over the last 30 days, and a tenth as
many to a thousand others meanwhile: the rows lie as they come, in the order of time. Then asks for each timeframe.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from datetime import datetime
from pathlib import Path
from uuid import UUID
from zoneinfo import ZoneInfo

import asyncpg

from models.database import Database
from models.embedded import EmbeddedPostgres
from models.ids import new_id
from services.usage import REPORT, read_report
from services.usage_window import Timeframe, usage_window

_OTHERS = 1_000
_ROUNDS = 50
_QUARTERS = 30 * 24 * 4
_ADD_USERS = "INSERT INTO users (id, anonymous) SELECT id, true FROM unnest($1::uuid[]) AS id"
# The trigger rolls up here as it does for single events. Quiet: the feed is not what is measured.
_ADD_EVENTS = """
INSERT INTO usage_events (id, owner_id, message_id, kind, model, status, prompt_tokens, completion_tokens,
    reasoning_tokens, cached_tokens, estimated, prompt_price, cached_price, completion_price, cost_micros, created_at)
SELECT gen_random_uuid(), CASE WHEN number <= $2 THEN $1
        ELSE ($3::uuid[])[1 + floor(random() * cardinality($3))::int] END, gen_random_uuid(), 'ANSWER',
    'model-' || floor(random() * 5)::int, 'COMPLETE', floor(random() * 8000)::int, floor(random() * 900)::int,
    floor(random() * 300)::int, floor(random() * 2000)::int, false, 250000, 25000, 2000000,
    floor(random() * 4000)::int, now() - ($5::float - random()) * interval '15 minutes'
FROM generate_series(1, $2::int + $4::int) AS number
"""


async def add_events(connection: asyncpg.Connection, owner: UUID, others: list[UUID], count: int) -> None:
    """Give a user so many events over the last 30 days, a quarter of an hour after the other, and others a tenth."""
    for quarter in range(_QUARTERS, 0, -1):
        share = count // quarter
        count -= share
        async with connection.transaction():
            await connection.execute("SET LOCAL threadgraph.quiet = 'on'")
            await connection.execute(_ADD_EVENTS, owner, share, others, share // 10, float(quarter))


async def measure(url: str, events: int) -> str:
    """Fill the database and ask; the page."""
    database = Database(url, pool_size=2, timeout_seconds=600)
    await database.migrate()
    connection = await asyncpg.connect(url)
    try:
        owner, others = new_id(), [new_id() for _ in range(_OTHERS)]
        await connection.execute(_ADD_USERS, [owner, *others])
        began = time.perf_counter()
        await add_events(connection, owner, others, events)
        filled = time.perf_counter() - began
        await connection.execute("VACUUM ANALYZE usage_events, usage_quarters")
        quarters = await connection.fetchval("SELECT count(*) FROM usage_quarters WHERE owner_id = $1", owner)
        lines = [
            f"{events:,} events of one user over 30 days, 5 models, in {quarters:,} rows of quarters; a tenth of "
            f"{_OTHERS:,} other users. Filled in {filled:.0f} s. {_ROUNDS} reports each.",
            "",
            "| timeframe | zone | CPU of the database | elapsed there, best | median | worst |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        zones = ("UTC", "Asia/Kathmandu")
        lines += [await _row(connection, owner, timeframe, zone) for timeframe in Timeframe for zone in zones]
        return "\n".join(lines)
    finally:
        await connection.close()


async def _row(connection: asyncpg.Connection, owner: UUID, timeframe: Timeframe, zone: str) -> str:
    now: datetime = await connection.fetchval("SELECT now()")
    window = usage_window(timeframe, ZoneInfo(zone), now)
    backend = await connection.fetchval("SELECT pg_backend_pid()")
    elapsed, cpu = [], 0.0
    for _ in range(_ROUNDS):
        plan = await connection.fetchval(
            f"EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) {REPORT}",
            *(owner, window.begins_at, window.ends_at, window.edges),
        )
        (found,) = json.loads(plan)
        elapsed.append(found["Planning Time"] + found["Execution Time"])
        before = _cpu_ms(backend)
        await read_report(connection, owner, window)
        cpu += _cpu_ms(backend) - before
    times = (cpu / _ROUNDS, min(elapsed), statistics.median(elapsed), max(elapsed))
    return f"| {timeframe} | {zone} | " + " | ".join(f"{time:.1f} ms" for time in times) + " |"


def _cpu_ms(pid: int) -> float:
    """What a process had of the processors: on a busy machine, elapsed times are those of its neighbours."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.usage_data", description=__doc__)
    parser.add_argument("--events", type=int, default=1_000_000, help="events of the heavy user")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="threadgraph-usage-") as folder:
        Path(folder).chmod(0o755)
        postgres = EmbeddedPostgres(Path(folder) / "postgres")
        postgres.start()
        try:
            print(asyncio.run(measure(postgres.url, arguments.events)))
        finally:
            postgres.stop()


if __name__ == "__main__":
    main()
