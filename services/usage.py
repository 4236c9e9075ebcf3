"""What a viewer used: reports by hours or days and by model, followed live, and the totals of threads and answers.

A report is read in one query: its totals, models and buckets are sums of the same rows of one snapshot, so they agree
always, whatever is written meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import reduce
from operator import add
from typing import TYPE_CHECKING
from uuid import UUID
from zoneinfo import ZoneInfo

from models.database import Database
from services.usage_window import Timeframe, UsageWindow, usage_window, zone_keys
from services.viewer import Viewer
from services.wakeups import Wakeups

if TYPE_CHECKING:
    from asyncpg import Connection, Record

# At most one report in so long to each subscriber; a burst of ends becomes one report of all of them.
_PAUSE_SECONDS = 0.25
# Also without anything used: a new hour or day may have begun.
_LOOK_SECONDS = 15.0

_SUMS = """
    sum(requests)::bigint AS requests, sum(prompt_tokens)::bigint AS prompt_tokens,
    sum(completion_tokens)::bigint AS completion_tokens, sum(reasoning_tokens)::bigint AS reasoning_tokens,
    sum(cached_tokens)::bigint AS cached_tokens,
    CASE WHEN sum(priced_requests) > 0 THEN sum(cost_micros)::bigint END AS cost_micros
"""
# Quarters of an hour fall whole into buckets. The bounds are there for the index (owner_id, began_at, model).
REPORT = f"""
SELECT width_bucket(began_at, $4::timestamptz[]) - 1 AS bucket, model, {_SUMS}
FROM usage_quarters WHERE owner_id = $1 AND began_at >= $2 AND began_at < $3
GROUP BY bucket, model
"""  # noqa: S608 - only column names are put in
# Whether anything may have been used since a report, by one probe of an index: what writes usage tells the feed in the
# same transaction. So do an import and a claim, and theirs may be of any time.
_MARK = "SELECT max(id) FROM changes WHERE owner_id = $1"
_THREADS = """
SELECT thread_id, count(*) AS requests, sum(prompt_tokens) AS prompt_tokens,
    sum(completion_tokens) AS completion_tokens, sum(reasoning_tokens) AS reasoning_tokens,
    sum(cached_tokens) AS cached_tokens, sum(cost_micros)::bigint AS cost_micros
FROM usage_events WHERE thread_id = ANY($1::uuid[]) AND owner_id = $2 GROUP BY thread_id
"""
_ANSWERS = """
SELECT message_id, cost_micros FROM usage_events
WHERE message_id = ANY($1::uuid[]) AND kind = 'ANSWER' AND owner_id = $2
"""


@dataclass(frozen=True, slots=True)
class TokenTotals:
    """Requests and their tokens, summed up. `cost_micros` is of those whose price was known; None where none's was."""

    requests: int = 0
    prompt: int = 0
    completion: int = 0
    reasoning: int = 0
    cached: int = 0
    cost_micros: int | None = None

    def __add__(self, other: TokenTotals) -> TokenTotals:
        costs = [cost for cost in (self.cost_micros, other.cost_micros) if cost is not None]
        return TokenTotals(
            self.requests + other.requests,
            self.prompt + other.prompt,
            self.completion + other.completion,
            self.reasoning + other.reasoning,
            self.cached + other.cached,
            sum(costs) if costs else None,
        )

    @classmethod
    def from_row(cls, row: Record) -> TokenTotals:
        """From a row of sums."""
        return cls(
            row["requests"],
            row["prompt_tokens"],
            row["completion_tokens"],
            row["reasoning_tokens"],
            row["cached_tokens"],
            row["cost_micros"],
        )


_NOTHING = TokenTotals()


@dataclass(frozen=True, slots=True)
class UsageReport:
    """One window's usage. The sum of `buckets` and the sum of `by_model` are `totals`.

    `by_model` has an entry for each model that was asked in the window, offered still or not, the most tokens first.
    """

    window: UsageWindow
    totals: TokenTotals
    by_model: dict[str, TokenTotals]
    buckets: tuple[TokenTotals, ...]


class Usage:
    """Reports for viewers.

    Args:
        wakeups: who tells that something of a user's may have been used.
    """

    def __init__(self, database: Database, wakeups: Wakeups) -> None:
        self._database = database
        self._wakeups = wakeups
        # Reads folders, once; here and not in the first request that names a zone.
        zone_keys()

    async def report(self, viewer: Viewer, timeframe: Timeframe, zone: ZoneInfo) -> UsageReport:
        """The report as it is now, by the database's clock, which is the clock of the events too."""
        async with self._database.acquire() as connection:
            now = await connection.fetchval("SELECT now()")
            return await read_report(connection, viewer.id, usage_window(timeframe, zone, now))

    async def follow(self, viewer: Viewer, timeframe: Timeframe, zone: ZoneInfo) -> AsyncGenerator[UsageReport, None]:
        """The report now, then again after each finished message, import and claim, and when a new hour or day begins.

        What ends within a quarter of a second comes in one report; the last one always tells of everything.
        """
        told: UsageReport | None = None
        mark: int | None = None
        with self._wakeups.watch(viewer.id) as watch:
            while True:
                async with self._database.acquire() as connection:
                    now: datetime = await connection.fetchval("SELECT now()")
                    window = usage_window(timeframe, zone, now)
                    report = told
                    # Before the report: what comes between the two is noticed as a change, and told of twice at worst.
                    newest: int | None = await connection.fetchval(_MARK, viewer.id)
                    if told is None or window != told.window or newest != mark:
                        mark = newest
                        report = await read_report(connection, viewer.id, window)
                if report is not None and report != told:
                    told = report
                    yield report
                    await asyncio.sleep(_PAUSE_SECONDS)
                await watch.wait(_LOOK_SECONDS)

    async def of_threads(self, viewer: Viewer, thread_ids: Sequence[UUID]) -> list[TokenTotals]:
        """What each thread consumed so far, its title among it, in one query."""
        async with self._database.acquire() as connection:
            rows = await connection.fetch(_THREADS, thread_ids, viewer.id)
        found = {row["thread_id"]: TokenTotals.from_row(row) for row in rows}
        return [found.get(thread_id, _NOTHING) for thread_id in thread_ids]

    async def costs_of_answers(self, viewer: Viewer, message_ids: Sequence[UUID]) -> list[int | None]:
        """What each answer cost, in one query; None where its price was not known, or it has not ended."""
        async with self._database.acquire() as connection:
            rows = await connection.fetch(_ANSWERS, message_ids, viewer.id)
        found: dict[UUID, int | None] = {row["message_id"]: row["cost_micros"] for row in rows}
        return [found.get(message_id) for message_id in message_ids]


async def read_report(connection: Connection, owner_id: UUID, window: UsageWindow) -> UsageReport:
    """The report of a window, in one query."""
    rows = await connection.fetch(REPORT, owner_id, window.begins_at, window.ends_at, window.edges)
    buckets = [_NOTHING] * (len(window.edges) - 1)
    by_model: dict[str, TokenTotals] = {}
    for row in rows:
        totals = TokenTotals.from_row(row)
        buckets[row["bucket"]] += totals
        by_model[row["model"]] = by_model.get(row["model"], _NOTHING) + totals
    ordered = sorted(by_model.items(), key=lambda item: (-(item[1].prompt + item[1].completion), item[0]))
    return UsageReport(window, reduce(add, buckets, _NOTHING), dict(ordered), tuple(buckets))
