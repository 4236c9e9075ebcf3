"""Answers of dead servers: found by their leases, ended once, with everything that was saved of them.

The rows are built by hand, as a server leaves them that was killed; reapers and keepers work on a real database.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.database import Database, DatabaseUnavailableError
from models.ids import new_id
from models.parts import Part, ReasoningPart, SourcePart, TextPart, ToolPart, parts_length, parts_text, parts_to_json
from models.prices import ModelPrices
from models.records import MessageFailure, MessageRecord, MessageStatus, MessageTokens
from models.text import clean_json, storable_json
from streams.buffer import StreamBuffer, replay
from streams.ending import AnswerEnd, StreamHold, end_answer
from streams.leases import LeaseKeeper
from streams.recovery import SERVER_LOST, AnswerWaitsError, LogUnavailableError, Reaper, Restart, Sealed
from tests.conftest import make_database

DEADLINE_SECONDS = 30.0
TOKENS = MessageTokens(5, 3, 1, 2, estimated=False)
PRICES = ModelPrices(3_000_000, 300_000, 15_000_000)
storable = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=8)
growth = st.one_of(
    st.tuples(st.just("TEXT"), storable),
    st.tuples(st.just("REASONING"), storable),
    st.tuples(st.just("PART"), st.just("")),
)
property_settings = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
async def migrated(postgres_url: str) -> AsyncIterator[Database]:
    """A database of this module, with the tables."""
    database = Database(await make_database(postgres_url), pool_size=20, timeout_seconds=10)
    await database.migrate()
    await database.connect()
    yield database
    await database.close()


@pytest.fixture
async def database(migrated: Database) -> AsyncIterator[Database]:
    """The same database, empty; what a test leaves behind must fit together."""
    async with migrated.acquire() as connection:
        await connection.execute("TRUNCATE users CASCADE")
    yield migrated
    async with migrated.acquire() as connection:
        assert await connection.fetchval(_ADRIFT) == 0, "a stream without a live answer, or the other way round"
        orphans = "SELECT count(*) FROM stream_checkpoints WHERE stream_id NOT IN (SELECT message_id FROM streams)"
        assert await connection.fetchval(orphans) == 0


_ADRIFT = """
SELECT count(*) FROM streams FULL JOIN (SELECT id FROM messages WHERE status = 'STREAMING') live ON id = message_id
WHERE id IS NULL OR message_id IS NULL
"""


@dataclass(frozen=True)
class Answer:
    """An answer that is being written, by a server that is nowhere."""

    id: UUID = field(default_factory=new_id)
    thread_id: UUID = field(default_factory=new_id)
    owner_id: UUID = field(default_factory=new_id)
    holder: UUID = field(default_factory=uuid4)

    @property
    def hold(self) -> StreamHold:
        """The hold that its producer has."""
        return StreamHold(self.id, self.thread_id, self.owner_id, 1, "two-words", PRICES)


async def leave(
    database: Database, *stretches: list[Part], lease: float = -1.0, holder: UUID | None = None, asked: float = 3_600
) -> Answer:
    """The rows of an answer asked so long ago, with these checkpoints and this many seconds of its lease to go."""
    answer = Answer(holder=holder or uuid4())
    question_id, offset = new_id(), 0
    async with database.transaction() as connection:
        await connection.execute("INSERT INTO users (id, anonymous) VALUES ($1, true)", answer.owner_id)
        await connection.execute(
            """
            INSERT INTO threads (id, owner_id, title, title_source, created_at, updated_at)
            VALUES ($1, $2, 'A thread', 'TEXT', now() - interval '1 hour', now() - interval '1 hour')
            """,
            *(answer.thread_id, answer.owner_id),
        )
        await connection.execute(
            """
            INSERT INTO messages (id, owner_id, thread_id, parent_id, depth, active, role, status, parts, model,
                created_at, updated_at)
            SELECT id, $1, $2, parent_id, depth, true, role, status, '[]'::jsonb, model,
                now() - make_interval(secs => $6), now() - make_interval(secs => $6)
            FROM (VALUES ($3::uuid, NULL::uuid, 0, 'USER', 'COMPLETE', NULL), ($4, $3, 1, 'ASSISTANT', 'STREAMING', $5))
                AS given (id, parent_id, depth, role, status, model)
            """,
            *(answer.owner_id, answer.thread_id, question_id, answer.id, answer.hold.model, asked),
        )
        await connection.execute(
            """
            INSERT INTO streams (message_id, owner_id, holder, lease_expires_at)
            VALUES ($1, $2, $3, now() + make_interval(secs => $4))
            """,
            *(answer.id, answer.owner_id, answer.holder, lease),
        )
        for parts in stretches:
            await connection.execute(
                "INSERT INTO stream_checkpoints (stream_id, from_offset, parts) VALUES ($1, $2, $3)",
                *(answer.id, offset, parts_to_json(parts)),
            )
            offset += parts_length(parts)
    return answer


async def told(user_id: UUID) -> None:
    """Nobody follows."""


def reaper(
    database: Database,
    *,
    living: list[UUID] | None = None,
    every: float = 60.0,
    lease: float = 10.0,
    sealed: Sealed | None = None,
    log_away: bool = False,
    restart: Restart | None = None,
) -> Reaper:
    """A reaper of a server that writes these answers."""
    return Reaper(
        database,
        living=lambda: living or [],
        every_seconds=every,
        lease_seconds=lease,
        prices_of={"two-words": PRICES}.get,
        used=told,
        sealed=sealed,
        log_away=lambda: log_away,
        restart=restart,
    )


async def rows_of(database: Database, answer: Answer) -> dict[str, list[dict[str, Any]]]:
    """Every row that an answer has anywhere."""
    places = {
        "threads": ("id", answer.thread_id),
        "messages": ("id", answer.id),
        "streams": ("message_id", answer.id),
        "stream_checkpoints": ("stream_id", answer.id),
        "usage_events": ("message_id", answer.id),
    }
    rows = {}
    async with database.acquire() as connection:
        for table, (column, key) in places.items():
            found = await connection.fetch(f"SELECT * FROM {table} WHERE {column} = $1 ORDER BY ctid", key)
            rows[table] = [dict(row) for row in found]
    return rows


async def stored(database: Database, answer: Answer) -> MessageRecord:
    """The message as it is stored."""
    return MessageRecord.from_row((await rows_of(database, answer))["messages"][0])


async def has_ended(database: Database, answer: Answer) -> MessageRecord:
    """The message once it has ended."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not (record := await stored(database, answer)).ended:
            await asyncio.sleep(0.01)
    return record


async def test_an_answer_whose_lease_ran_out_is_ended_with_what_was_saved_of_it(database: Database) -> None:
    call = ToolPart("c1", "search", {"q": "🦉"})
    answer = await leave(
        database,
        [ReasoningPart("Let me s")],
        [ReasoningPart("ee."), TextPart("Hel")],
        [TextPart("lo "), call, SourcePart("https://a.example", "A"), TextPart("wor")],
        [TextPart("ld")],
    )
    (record,) = await reaper(database).reap()
    parts = [
        ReasoningPart("Let me see."),
        TextPart("Hello "),
        call,
        SourcePart("https://a.example", "A"),
        TextPart("world"),
    ]
    assert (record.id, record.status, record.failure) == (answer.id, MessageStatus.INTERRUPTED, SERVER_LOST)
    assert (record.parts, record.text) == (parts, "Hello world")
    assert record.tokens == MessageTokens(0, 2 + 2 + 3, 3, 0, estimated=True)
    assert record.duration_ms is not None
    assert record.duration_ms >= 3_600_000
    kept = await stored(database, answer)
    columns = [name for name in MessageRecord.columns if name != "parts_json"]
    assert [getattr(kept, name) for name in columns] == [getattr(record, name) for name in columns]
    rows = await rows_of(database, answer)
    assert kept.parts == parts
    assert rows["streams"] == rows["stream_checkpoints"] == []
    assert rows["threads"][0]["updated_at"] == rows["messages"][0]["updated_at"] == record.updated_at
    (used,) = rows["usage_events"]
    assert (used["kind"], used["model"], used["status"]) == ("ANSWER", "two-words", "INTERRUPTED")
    assert (used["owner_id"], used["estimated"]) == (answer.owner_id, True)
    assert (used["prompt_tokens"], used["completion_tokens"], used["reasoning_tokens"]) == (0, 7, 3)
    assert used["thread_id"] == answer.thread_id
    assert (used["prompt_price"], used["cached_price"], used["completion_price"]) == (3_000_000, 300_000, 15_000_000)
    assert used["cost_micros"] == 7 * 15


async def test_an_answer_of_which_nothing_was_saved_ends_empty(database: Database) -> None:
    await leave(database)
    (record,) = await reaper(database).reap()
    assert (record.status, record.parts, record.failure) == (MessageStatus.INTERRUPTED, [], SERVER_LOST)


async def test_a_lease_that_has_not_run_out_is_left_alone(database: Database) -> None:
    answer = await leave(database, [TextPart("half")], lease=60)
    before = await rows_of(database, answer)
    assert await reaper(database).reap() == []
    assert await rows_of(database, answer) == before


async def test_where_no_other_server_can_be_alive_no_lease_is_waited_for(database: Database) -> None:
    answers = [await leave(database, [TextPart("half")], lease=lease) for lease in (-1, 60, 3_600)]
    ended = await reaper(database).reap(all_others=True)
    assert {record.id for record in ended} == {answer.id for answer in answers}
    assert {record.text for record in ended} == {"half"}


async def test_an_answer_that_this_process_writes_is_not_reaped_however_late_its_lease(database: Database) -> None:
    ours, lost = [await leave(database, lease=-3_600) for _ in range(2)]
    before = await rows_of(database, ours)
    for all_others in (False, True):
        ended = await reaper(database, living=[ours.id]).reap(all_others=all_others)
        assert [record.id for record in ended] == ([] if all_others else [lost.id])
    assert await rows_of(database, ours) == before


async def test_ten_reapers_at_once_end_every_answer_exactly_once(database: Database) -> None:
    answers = [await leave(database, [TextPart(f"answer {n} ")], [TextPart("saved")]) for n in range(40)]
    results = await asyncio.gather(*(reaper(database).reap() for _ in range(10)))
    counts = Counter(record.id for result in results for record in result)
    assert counts == {answer.id: 1 for answer in answers}
    for n, answer in enumerate(answers):
        rows = await rows_of(database, answer)
        assert (await stored(database, answer)).text == f"answer {n} saved"
        assert len(rows["usage_events"]) == 1
        assert rows["streams"] == []


async def test_more_answers_than_one_look_takes_are_all_ended(database: Database) -> None:
    answers = [await leave(database) for _ in range(101)]
    ended = await reaper(database).reap()
    assert len(ended) == 101
    assert {record.id for record in ended} == {answer.id for answer in answers}


async def test_a_server_that_died_while_it_reaped_leaves_the_rest_to_the_next(database: Database) -> None:
    answer = await leave(database, [TextPart("half")])
    # As after the take-over of a reaper: another holder, the next epoch, a lease that runs out again.
    async with database.acquire() as connection:
        await connection.execute("UPDATE streams SET epoch = 2, holder = $1", uuid4())
    (record,) = await reaper(database).reap()
    assert (record.id, record.text) == (answer.id, "half")


def whole(text: str, *, called_provider: bool = True) -> AnswerEnd:
    """The end that the producer itself writes."""
    return AnswerEnd(MessageStatus.COMPLETE, [TextPart(text)], None, TOKENS, called_provider)


async def test_a_producer_that_wakes_after_its_answer_was_ended_changes_nothing(database: Database) -> None:
    answer = await leave(database, [TextPart("half")])
    assert len(await reaper(database).reap()) == 1
    before = await rows_of(database, answer)
    assert await end_answer(database, answer.hold, whole("half and the rest")) is None
    assert await rows_of(database, answer) == before


async def test_a_producer_that_was_taken_over_ends_nothing_and_counts_nothing(database: Database) -> None:
    """What is counted is what the message says, which whoever took it over decides."""
    answer = await leave(database, [TextPart("half")])
    async with database.acquire() as connection:
        await connection.execute("UPDATE streams SET epoch = 2")
    before = await rows_of(database, answer)
    other = MessageTokens(50, 30, 10, 20, estimated=False)
    assert await end_answer(database, answer.hold, replace(whole("zombie"), tokens=other)) is None
    assert await rows_of(database, answer) == before
    record = await end_answer(database, replace(answer.hold, epoch=2), whole("the taker's"))
    assert record is not None
    assert (record.text, record.tokens) == ("the taker's", TOKENS)
    (used,) = (await rows_of(database, answer))["usage_events"]
    assert (used["prompt_tokens"], used["completion_tokens"]) == (TOKENS.prompt, TOKENS.completion)


async def test_what_a_producer_used_whose_thread_was_deleted_meanwhile_is_counted(database: Database) -> None:
    answer = await leave(database, [TextPart("half")])
    async with database.acquire() as connection:
        await connection.execute("DELETE FROM threads WHERE id = $1", answer.thread_id)
    for _ in range(2):
        assert await end_answer(database, answer.hold, whole("for nobody")) is None
    async with database.acquire() as connection:
        used = await connection.fetch("SELECT * FROM usage_events WHERE message_id = $1", answer.id)
    assert [(one["prompt_tokens"], one["thread_id"]) for one in used] == [(TOKENS.prompt, None)]


class InterruptedDatabase:
    """A database in whose second use from now on something else happens first."""

    def __init__(self, database: Database, meanwhile: Callable[[], Awaitable[None]]) -> None:
        self._database = database
        self._meanwhile = meanwhile
        self._uses = 0

    @asynccontextmanager
    async def acquire(self) -> AsyncIterator[asyncpg.Connection]:
        """A connection."""
        self._uses += 1
        if self._uses == 2:
            await self._meanwhile()
        async with self._database.acquire() as connection:
            yield connection


async def checkpoint(keeper: LeaseKeeper) -> None:
    """Save what all answers grew by, at once."""
    await keeper._keep_some(keeper._saved, 1, keeper._checkpoint)


async def renew(keeper: LeaseKeeper) -> None:
    """Renew all leases, at once."""
    await keeper._keep_some(keeper._buffers, 1, keeper._renew)


async def test_a_producer_that_wakes_while_its_answer_is_being_reaped_comes_too_late(database: Database) -> None:
    keeping = Keeping(database)
    answer, buffer = await keeping.answer(lease=-1)
    buffer.append_text("TEXT", "half")
    await checkpoint(keeping.keeper)
    ends: list[MessageRecord | None] = []

    async def wake() -> None:
        buffer.append_text("TEXT", " and more")
        await checkpoint(keeping.keeper)
        await renew(keeping.keeper)
        ends.append(await end_answer(database, answer.hold, whole("half and more")))

    (record,) = await reaper(InterruptedDatabase(database, wake)).reap()  # type: ignore[arg-type]
    assert ends == [None]
    assert keeping.lost == [answer.id]
    assert (record.text, record.failure) == ("half", SERVER_LOST)


async def test_an_answer_that_somebody_is_ending_is_not_waited_for(database: Database) -> None:
    locked, free = [await leave(database) for _ in range(2)]
    async with database.transaction() as connection:
        await connection.execute("SELECT FROM streams WHERE message_id = $1 FOR UPDATE", locked.id)
        async with asyncio.timeout(DEADLINE_SECONDS):
            assert [record.id for record in await reaper(database).reap()] == [free.id]
    assert [record.id for record in await reaper(database).reap()] == [locked.id]


async def test_an_answer_can_be_ended_once(database: Database) -> None:
    answer = await leave(database)
    first = await end_answer(database, answer.hold, whole("first"))
    before = await rows_of(database, answer)
    assert first is not None
    assert (first.text, first.tokens, first.failure) == ("first", TOKENS, None)
    assert await end_answer(database, answer.hold, whole("second")) is None
    assert await rows_of(database, answer) == before


async def test_of_many_ends_at_once_one_holds(database: Database) -> None:
    for _ in range(10):
        answer = await leave(database)
        reaping = asyncio.create_task(reaper(database).reap())
        ends = await asyncio.gather(*(end_answer(database, answer.hold, whole(f"end {n}")) for n in range(8)))
        held = [record for record in ends if record is not None] + list(await reaping or [])
        assert len(held) == 1
        assert (await stored(database, answer)).text == held[0].text
        assert len((await rows_of(database, answer))["usage_events"]) == 1


async def test_the_end_of_an_answer_keeps_every_word_of_its_failure(database: Database) -> None:
    answer = await leave(database)
    failure = MessageFailure("RATE_LIMITED", "Too much, “mañana”.", 7)
    end = AnswerEnd(MessageStatus.FAILED, [], failure, TOKENS)
    record = await end_answer(database, answer.hold, end)
    assert record is not None
    assert (record.status, record.failure) == (MessageStatus.FAILED, failure)
    assert (await stored(database, answer)).failure == failure


async def test_an_answer_for_which_no_model_was_asked_costs_nothing(database: Database) -> None:
    answer = await leave(database)
    assert await end_answer(database, answer.hold, whole("", called_provider=False)) is not None
    assert (await rows_of(database, answer))["usage_events"] == []


async def test_the_end_of_an_answer_whose_thread_was_deleted_only_counts_its_use(database: Database) -> None:
    answer = await leave(database, [TextPart("half")])
    async with database.acquire() as connection:
        await connection.execute("DELETE FROM threads WHERE id = $1", answer.thread_id)
    assert await reaper(database).reap() == [], "the stream went with its thread"
    for _ in range(2):
        assert await end_answer(database, answer.hold, whole("too late")) is None
    (used,) = (rows := await rows_of(database, answer)).pop("usage_events")
    assert not any(rows.values())
    assert (used["owner_id"], used["completion_tokens"]) == (answer.owner_id, 3)
    assert (used["thread_id"], used["cost_micros"]) == (None, 3 * 3 + round(2 * 0.3) + 3 * 15)


async def test_the_end_of_an_answer_whose_user_is_gone_leaves_no_row(database: Database) -> None:
    answer = await leave(database)
    async with database.acquire() as connection:
        await connection.execute("DELETE FROM users WHERE id = $1", answer.owner_id)
    assert await end_answer(database, answer.hold, whole("too late")) is None
    assert not any((await rows_of(database, answer)).values())


async def test_an_end_that_races_the_deletion_of_its_thread_never_deadlocks(database: Database) -> None:
    for _ in range(20):
        answer = await leave(database, [TextPart("half")])

        async def delete(thread_id: UUID) -> None:
            async with database.acquire() as connection:
                await connection.execute("DELETE FROM threads WHERE id = $1", thread_id)

        async with asyncio.timeout(DEADLINE_SECONDS):
            await asyncio.gather(
                delete(answer.thread_id), end_answer(database, answer.hold, whole("x")), reaper(database).reap()
            )
        assert len((await rows_of(database, answer)).pop("usage_events")) <= 1


async def test_a_reaper_that_was_started_looks_again_and_again_until_it_is_stopped(database: Database) -> None:
    looking = reaper(database, every=0.02, lease=0.2)
    looking.start()
    try:
        for _ in range(2):
            assert (await has_ended(database, await leave(database))).failure == SERVER_LOST
    finally:
        await looking.stop()
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "reaper" and task is looking._task]


async def test_who_is_cut_off_from_the_log_leaves_the_dead_to_those_who_reach_it(database: Database) -> None:
    async def cut_off(message_id: UUID, attempt: int) -> list[Part]:
        raise LogUnavailableError("its log is out of reach")

    async def reached(message_id: UUID, attempt: int) -> list[Part]:
        return [TextPart("all that was shown")]

    answer = await leave(database, [TextPart("all")])
    # The one that is cut off looks first.
    away = reaper(database, every=0.02, lease=1.0, sealed=cut_off, log_away=True)
    away.start()
    try:
        async with asyncio.timeout(DEADLINE_SECONDS):
            while answer.id not in away._expired:
                await asyncio.sleep(0.01)
        there = reaper(database, every=0.02, lease=1.0, sealed=reached)
        there.start()
        try:
            assert (await has_ended(database, answer)).text == "all that was shown"
        finally:
            await there.stop()
        # And where nobody reaches it, it ends without it.
        alone = await leave(database, [TextPart("all")])
        assert (await has_ended(database, alone)).text == "all"
        assert (away.taken_over, away.ended, away.failed) == (1, 1, 0)
    finally:
        await away.stop()


async def test_a_lease_that_ran_out_while_nobody_could_renew_it_is_not_a_death(database: Database) -> None:
    answer = await leave(database)
    looking = reaper(database, every=0.02, lease=1.0)
    looking.start()
    try:
        async with asyncio.timeout(DEADLINE_SECONDS):
            while answer.id not in looking._expired:
                await asyncio.sleep(0.01)
        async with database.acquire() as connection:
            # As its writer does, back at the database like the one that looks.
            await connection.execute(
                "UPDATE streams SET lease_expires_at = now() + interval '1 hour' WHERE message_id = $1", answer.id
            )
        async with asyncio.timeout(DEADLINE_SECONDS):
            while answer.id in looking._expired:
                await asyncio.sleep(0.01)
        rows = await rows_of(database, answer)
        assert [row["status"] for row in rows["messages"]] == ["STREAMING"]
    finally:
        await looking.stop()


async def test_an_answer_whose_log_is_out_of_reach_waits_for_it_and_ends_without_it_at_last(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    tries = 0

    async def sealed(message_id: UUID, attempt: int) -> list[Part]:
        nonlocal tries
        tries += 1
        raise LogUnavailableError("its log is out of reach: the connection was lost")

    answer = await leave(database, [TextPart("saved")])
    for _ in range(3):
        # Each time it is the server's for a lease; here that lease is over at once.
        ended = await reaper(database, lease=0, sealed=sealed).reap(only=[answer.id])
        if ended:
            break
    assert tries == 3
    assert [(record.id, record.text, record.failure) for record in ended] == [(answer.id, "saved", SERVER_LOST)]
    why = "waits: its log is out of reach: the connection was lost"
    waits = [record for record in caplog.records if why in record.getMessage()]
    assert len(waits) == 2
    assert not [record for record in caplog.records if record.exc_info], "what heals by itself is no defect"


async def test_what_was_shown_counts_more_than_what_was_saved(database: Database) -> None:
    async def sealed(message_id: UUID, attempt: int) -> list[Part]:
        return [TextPart("saved, and shown")]

    answer = await leave(database, [TextPart("saved")])
    (ended,) = await reaper(database, sealed=sealed).reap(only=[answer.id])
    assert ended.text == "saved, and shown"


class Restarts:
    """Begins answers anew as far as their rows go; `right` is whether it can."""

    def __init__(self, database: Database, *, right: bool = True) -> None:
        self.database = database
        self.right = right
        self.holds: list[StreamHold] = []

    async def restart(self, hold: StreamHold) -> bool:
        self.holds.append(hold)
        if self.right:
            async with self.database.acquire() as connection:
                await connection.execute("UPDATE messages SET attempt = attempt + 1 WHERE id = $1", hold.message_id)
        return self.right


async def test_what_had_nothing_is_begun_anew_once_though_ten_reapers_race(database: Database) -> None:
    restarts = Restarts(database)
    answers = [await leave(database, asked=1) for _ in range(20)]
    results = await asyncio.gather(*(reaper(database, restart=restarts.restart).reap() for _ in range(10)))
    assert not any(results)
    assert {hold.message_id for hold in restarts.holds} == {answer.id for answer in answers}
    assert [(hold.epoch, hold.attempt) for hold in restarts.holds] == [(2, 1)] * 20
    await reaper(database).reap(all_others=True)


async def test_an_answer_is_begun_three_times_at_most(database: Database) -> None:
    restarts = Restarts(database)
    answer = await leave(database, asked=1)
    tries = [await reaper(database, lease=0, restart=restarts.restart).reap() for _ in range(3)]
    assert [hold.attempt for hold in restarts.holds] == [1, 2]
    assert [[record.failure for record in ended] for ended in tries] == [[], [], [SERVER_LOST]]
    assert tries[-1][0].id == answer.id


async def test_what_this_server_leaves_to_others_is_begun_anew_by_another(database: Database) -> None:
    async def later(hold: StreamHold) -> bool:
        raise AnswerWaitsError("this server is shutting down")

    restarts = Restarts(database)
    answer = await leave(database, asked=1)
    assert await reaper(database, lease=0, restart=later).reap() == []
    assert [row["status"] for row in (await rows_of(database, answer))["messages"]] == ["STREAMING"]
    assert await reaper(database, restart=restarts.restart).reap() == []
    assert [hold.message_id for hold in restarts.holds] == [answer.id]
    await reaper(database).reap(all_others=True)


@pytest.mark.parametrize(
    ("parts", "shown", "asked", "right"),
    [
        ([TextPart("saved")], [], 1, True),
        ([], [TextPart("shown")], 1, True),
        ([], [], 3_600, True),
        ([], [], 1, False),
    ],
    ids=["something was saved", "something was shown", "asked an hour ago", "no server can"],
)
async def test_what_cannot_be_begun_anew_is_ended(
    database: Database, parts: list[Part], shown: list[Part], asked: float, right: bool
) -> None:
    async def sealed(message_id: UUID, attempt: int) -> list[Part]:
        return shown

    restarts = Restarts(database, right=right)
    answer = await leave(database, *([parts] if parts else []), asked=asked)
    (ended,) = await reaper(database, sealed=sealed, restart=restarts.restart).reap()
    assert (ended.id, ended.failure, ended.parts) == (answer.id, SERVER_LOST, parts or shown)
    assert len(restarts.holds) == (not right)


class FailingDatabase:
    """A database whose next uses fail as the real one does when it is out of reach, before or behind the work."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.failures: list[tuple[str, Exception]] = []
        self.failed = 0

    @asynccontextmanager
    async def acquire(self) -> AsyncIterator[asyncpg.Connection]:
        """A connection, or the next failure."""
        when, error = self.failures.pop(0) if self.failures else ("never", Exception())
        self.failed += when != "never"
        if when == "before":
            raise error
        async with self._database.acquire() as connection:
            yield connection
        if when == "behind":
            raise error


@pytest.mark.parametrize("error", [DatabaseUnavailableError("ConnectionDoesNotExistError"), ValueError("a defect")])
async def test_a_reaper_outlives_an_outage_of_the_database(database: Database, error: Exception) -> None:
    failing = FailingDatabase(database)
    failing.failures = [("before", error)] * 3
    answer = await leave(database)
    looking = reaper(failing, every=0.02, lease=0.2)  # type: ignore[arg-type]
    looking.start()
    try:
        assert (await has_ended(database, answer)).failure == SERVER_LOST
        assert failing.failed == 3
    finally:
        await looking.stop()


class Keeping:
    """A lease keeper with the answers of its process, and those that it lost."""

    def __init__(self, database: Database, *, lease: float = 60.0, checkpoint: float = 60.0) -> None:
        self.database = database
        self.lost: list[UUID] = []
        self.keeper = LeaseKeeper(
            database, holder=uuid4(), lease_seconds=lease, checkpoint_seconds=checkpoint, lost=self.lost.append
        )

    async def answer(self, *, lease: float = 1.0) -> tuple[Answer, StreamBuffer]:
        """An answer that this process writes, with its buffer."""
        answer = await leave(self.database, lease=lease, holder=self.keeper.holder)
        buffer = StreamBuffer(answer.id, answer.owner_id)
        self.keeper.keep(buffer)
        return answer, buffer

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The keeper at work, as long as the block lasts."""
        self.keeper.start()
        try:
            yield
        finally:
            await self.keeper.stop()


async def expiry(database: Database, answer: Answer) -> Any:
    """Until when an answer is believed to be written."""
    return (await rows_of(database, answer))["streams"][0]["lease_expires_at"]


async def renewed(database: Database, answer: Answer, before: Any) -> Any:
    """The lease once it is a later one."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while (after := await expiry(database, answer)) <= before:
            await asyncio.sleep(0.01)
    return after


async def test_a_lease_is_renewed_again_and_again_also_after_it_ran_out(database: Database) -> None:
    keeping = Keeping(database, lease=0.1)
    answer, _ = await keeping.answer(lease=-5)
    before = await expiry(database, answer)
    async with keeping.running():
        first = await renewed(database, answer, before)
        assert await renewed(database, answer, first) > first
    assert keeping.lost == []


async def test_a_lease_lasts_as_long_as_the_settings_say_from_each_renewal(database: Database) -> None:
    keeping = Keeping(database, lease=12.5)
    answer, _ = await keeping.answer(lease=0)
    async with database.transaction() as connection:
        before = await connection.fetchval("SELECT now()")
    await renew(keeping.keeper)
    async with database.acquire() as connection:
        after = await connection.fetchval("SELECT now()")
    remaining = (await expiry(database, answer)) - before
    assert 12.5 <= remaining.total_seconds() <= 12.5 + (after - before).total_seconds()


async def test_only_leases_of_its_own_answers_are_renewed(database: Database) -> None:
    keeping = Keeping(database)
    mine, _ = await keeping.answer()
    released, _ = await keeping.answer()
    keeping.keeper.release(released.id)
    strangers = await leave(database, lease=1)
    others = {answer: await expiry(database, answer) for answer in (released, strangers)}
    before = await expiry(database, mine)
    await renew(keeping.keeper)
    assert await expiry(database, mine) > before
    assert {answer: await expiry(database, answer) for answer in others} == others
    assert keeping.lost == []


async def test_an_answer_that_was_taken_over_or_deleted_is_lost_and_no_other(database: Database) -> None:
    keeping = Keeping(database, lease=0.1)
    taken, _ = await keeping.answer()
    deleted, _ = await keeping.answer()
    kept, _ = await keeping.answer()
    async with database.acquire() as connection:
        await connection.execute("UPDATE streams SET holder = $2, epoch = 2 WHERE message_id = $1", taken.id, uuid4())
        await connection.execute("DELETE FROM threads WHERE id = $1", deleted.thread_id)
    before = await expiry(database, taken)
    async with keeping.running():
        async with asyncio.timeout(DEADLINE_SECONDS):
            while set(keeping.lost) < {taken.id, deleted.id}:
                await asyncio.sleep(0.01)
    assert kept.id not in keeping.lost
    assert await expiry(database, taken) == before, "somebody else's lease is not ours to renew"


async def test_an_answer_that_a_reaper_takes_over_is_lost_by_its_keeper(database: Database) -> None:
    keeping = Keeping(database)
    answer, buffer = await keeping.answer(lease=-1)
    buffer.append_text("TEXT", "half")
    await checkpoint(keeping.keeper)
    (record,) = await reaper(database).reap()
    assert record.text == "half"
    await renew(keeping.keeper)
    assert keeping.lost == [answer.id]
    buffer.append_text("TEXT", " and more")
    await checkpoint(keeping.keeper)
    assert (await rows_of(database, answer))["stream_checkpoints"] == []


async def test_many_answers_are_kept_in_turns_and_each_once_a_round(database: Database) -> None:
    keeper, rounds, begun = Keeping(database).keeper, list[list[UUID]](), list[int]()
    done = asyncio.Event()

    async def keep(ids: list[UUID]) -> None:
        rounds.append(ids)
        if len(rounds) == 2:
            begun.append(sum(map(len, rounds)))
            keeper.keep(late)
        if len(rounds) == 6:
            done.set()
            await asyncio.Event().wait()

    buffers = [StreamBuffer(new_id(), new_id()) for _ in range(250)]
    late = StreamBuffer(new_id(), new_id())
    for buffer in buffers:
        keeper.keep(buffer)
    keeping = asyncio.create_task(keeper._keep(keeper._saved, 0.03, keep))
    async with asyncio.timeout(DEADLINE_SECONDS):
        await done.wait()
    keeping.cancel()
    assert max(map(len, rounds)) <= 100
    kept = [message_id for ids in rounds for message_id in ids]
    assert kept[:250] == [buffer.message_id for buffer in buffers]
    # One that comes in the midst of a round is kept before any other is twice.
    assert kept.index(late.message_id) == begun[0] + 250


async def test_nothing_is_asked_of_the_database_where_nothing_is_written(database: Database) -> None:
    failing = FailingDatabase(database)
    failing.failures = [("before", AssertionError("asked"))]
    keeper = Keeping(failing).keeper  # type: ignore[arg-type]
    await renew(keeper)
    await checkpoint(keeper)
    assert failing.failed == 0


async def test_a_keeper_outlives_an_outage_of_the_database(database: Database) -> None:
    failing = FailingDatabase(database)
    keeping = Keeping(failing, lease=0.1, checkpoint=0.05)  # type: ignore[arg-type]
    answer = await leave(database, lease=-1, holder=keeping.keeper.holder)
    buffer = StreamBuffer(answer.id, answer.owner_id)
    buffer.append_text("TEXT", "kept ")
    keeping.keeper.keep(buffer)
    failing.failures = [("before", DatabaseUnavailableError("x"))] * 3 + [("before", RuntimeError("a defect"))] * 3
    before = await expiry(database, answer)
    async with keeping.running():
        await renewed(database, answer, before)
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not (await rows_of(database, answer))["stream_checkpoints"]:
                await asyncio.sleep(0.01)
    assert failing.failed == 6
    (record,) = await reaper(database).reap(all_others=True)
    assert record.text == "kept "


async def saved(database: Database) -> MessageRecord:
    """What a reaper makes of the one answer there is, once its server is dead."""
    (record,) = await reaper(database).reap(all_others=True)
    return record


def grow(buffer: StreamBuffer, script: list[tuple[str, str]]) -> None:
    """Append as a provider does."""
    for kind, text in script:
        if kind == "PART":
            buffer.append_part(ToolPart("id", "name", {"a": ["🦉"]}))
        else:
            buffer.append_text(kind, text)  # type: ignore[arg-type]


@property_settings
@given(st.lists(st.lists(growth, max_size=6), max_size=6))
async def test_checkpoints_of_any_ticks_fold_to_what_the_readers_saw(
    database: Database, ticks: list[list[tuple[str, str]]]
) -> None:
    keeping = Keeping(database)
    answer, buffer = await keeping.answer()
    for tick in ticks:
        grow(buffer, tick)
        await checkpoint(keeping.keeper)
    record = await saved(database)
    assert record.parts == buffer.parts()
    # A cursor of a live reader means the same in what is stored.
    assert list(replay(answer.id, record.parts, 0)) == (buffer.since(0) if buffer.length else [])


async def test_a_tick_writes_only_what_came_since_the_tick_before(database: Database) -> None:
    keeping = Keeping(database)
    answer, buffer = await keeping.answer()
    for text in ("one ", "", "two ", "three"):
        buffer.append_text("TEXT", text)
        await checkpoint(keeping.keeper)
    checkpoints = (await rows_of(database, answer))["stream_checkpoints"]
    assert [row["from_offset"] for row in checkpoints] == [0, 4, 8]
    assert sum(len(row["parts"]) for row in checkpoints) < 3 * len(parts_to_json([TextPart("one two three")]))


async def test_one_tick_saves_every_answer_of_the_process_and_none_of_another(database: Database) -> None:
    keeping = Keeping(database)
    mine = [await keeping.answer() for _ in range(20)]
    for n, (_, buffer) in enumerate(mine):
        buffer.append_text("TEXT", f"answer {n}")
    foreign = await leave(database, lease=60)
    stray = StreamBuffer(foreign.id, foreign.owner_id)
    stray.append_text("TEXT", "not ours")
    keeping.keeper.keep(stray)
    await checkpoint(keeping.keeper)
    ended = {record.id: record.text for record in await reaper(database).reap(all_others=True)}
    assert ended == {answer.id: f"answer {n}" for n, (answer, _) in enumerate(mine)} | {foreign.id: ""}


async def test_words_that_come_while_a_tick_is_being_written_are_saved_by_the_next(database: Database) -> None:
    keeping = Keeping(database)
    _, buffer = await keeping.answer()
    buffer.append_text("TEXT", "before ")
    tick = asyncio.create_task(checkpoint(keeping.keeper))
    while not tick.done():
        buffer.append_text("TEXT", "during ")
        await asyncio.sleep(0)
    await checkpoint(keeping.keeper)
    assert parts_text((await saved(database)).parts) == parts_text(buffer.parts())


async def test_a_tick_that_did_not_reach_the_database_is_made_good_by_the_next(database: Database) -> None:
    failing = FailingDatabase(database)
    keeping = Keeping(failing)  # type: ignore[arg-type]
    answer = await leave(database, lease=60, holder=keeping.keeper.holder)
    buffer = StreamBuffer(answer.id, answer.owner_id)
    keeping.keeper.keep(buffer)
    buffer.append_text("TEXT", "one ")
    failing.failures = [("before", DatabaseUnavailableError("x"))]
    with pytest.raises(DatabaseUnavailableError):
        await checkpoint(keeping.keeper)
    buffer.append_text("TEXT", "two ")
    await checkpoint(keeping.keeper)
    assert (await saved(database)).text == "one two "


async def test_a_tick_whose_commit_was_not_heard_of_leaves_no_hole(database: Database) -> None:
    failing = FailingDatabase(database)
    keeping = Keeping(failing)  # type: ignore[arg-type]
    answer = await leave(database, lease=60, holder=keeping.keeper.holder)
    buffer = StreamBuffer(answer.id, answer.owner_id)
    keeping.keeper.keep(buffer)
    buffer.append_text("TEXT", "one ")
    failing.failures = [("behind", DatabaseUnavailableError("ConnectionDoesNotExistError"))]
    with pytest.raises(DatabaseUnavailableError):
        await checkpoint(keeping.keeper)
    for text in ("two ", "three"):
        buffer.append_text("TEXT", text)
        await checkpoint(keeping.keeper)
    assert (await saved(database)).text == "one two three"


async def test_a_tick_that_meets_a_renewal_leaves_no_hole(database: Database) -> None:
    keeping = Keeping(database)
    answer, buffer = await keeping.answer()
    buffer.append_text("TEXT", "one ")
    await checkpoint(keeping.keeper)
    buffer.append_text("TEXT", "two ")
    async with database.transaction() as connection:
        # What _RENEW locks, in the other task of the same keeper, every third of a lease.
        await connection.execute("SELECT FROM streams WHERE message_id = $1 FOR UPDATE", answer.id)
        await checkpoint(keeping.keeper)
    buffer.append_text("TEXT", "three")
    await checkpoint(keeping.keeper)
    assert (await saved(database)).text == "one two three"


def nested(depth: int) -> Any:
    """A JSON value of so many lists."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


# A vendor can send all of these: orjson reads 1,024 levels and writes 254; json, asked after it, reads any number.
DEEP, BIG = nested(300), 2**64
# Written alone it has 253 levels; in the list of parts it has two more.
JUST_TOO_DEEP = nested(252)


@pytest.mark.parametrize("arguments", [DEEP, BIG, JUST_TOO_DEEP], ids=["deep", "big", "just too deep"])
async def test_an_answer_with_a_strange_tool_call_can_be_ended(database: Database, arguments: Any) -> None:
    answer = await leave(database)
    # As services/generation.py makes it of what an adapter read.
    part = ToolPart("c1", "search", storable_json(arguments))
    assert await end_answer(database, answer.hold, AnswerEnd(MessageStatus.COMPLETE, [part], None, TOKENS)) is not None


async def test_an_answer_with_a_strange_tool_call_keeps_no_other_from_being_saved(database: Database) -> None:
    keeping = Keeping(database)
    answer, buffer = await keeping.answer()
    buffer.append_text("TEXT", "innocent")
    _, other = await keeping.answer()
    other.append_part(ToolPart("c1", "search", clean_json(DEEP)))
    await checkpoint(keeping.keeper)
    ended = await reaper(database).reap(all_others=True)
    assert [record.text for record in ended if record.id == answer.id] == ["innocent"]


async def test_an_answer_that_cannot_be_read_keeps_no_other_from_being_ended(database: Database) -> None:
    unreadable = await leave(database)
    async with database.acquire() as connection:
        await connection.execute(
            "INSERT INTO stream_checkpoints (stream_id, from_offset, parts) VALUES ($1, 0, $2)",
            *(unreadable.id, '[{"type": "from a newer version"}]'),
        )
    others = [await leave(database) for _ in range(5)]
    ended = await reaper(database).reap()
    assert {record.id for record in ended} >= {answer.id for answer in others}


async def test_many_answers_that_cannot_be_read_do_not_keep_a_server_from_starting(database: Database) -> None:
    async with database.acquire() as connection:
        for answer in [await leave(database) for _ in range(100)]:
            await connection.execute(
                "INSERT INTO stream_checkpoints (stream_id, from_offset, parts) VALUES ($1, 0, $2)",
                *(answer.id, '[{"type": "from a newer version"}]'),
            )
    async with asyncio.timeout(5):
        assert await reaper(database).reap(all_others=True) == []
