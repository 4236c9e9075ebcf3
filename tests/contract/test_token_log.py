"""The token log against a real Valkey: appending is idempotent and fenced, and what was lost is written anew."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.exceptions import OutOfMemoryError

from models.ids import new_id
from models.parts import Part, TextPart, ToolPart, part_length, parts_to_json
from models.records import MESSAGE_COLUMNS, MessageRecord, MessageRole, MessageStatus
from streams.buffer import ContentEvent, Delta, PartAdded, StreamBuffer, parts_of
from streams.ending import Written
from streams.shared_hub import SharedHub
from streams.token_log import BLOCK_SECONDS, LAST_ID, Entry, Growth, LogName, TokenLog
from streams.valkey import LOST
from tests.valkey import KINDS, SentinelGroup, Valkey, ValkeyServer, scripts_run, unbounded

DEADLINE_SECONDS = 20.0


@pytest.fixture(scope="module")
async def valkey() -> AsyncIterator[ValkeyServer]:
    """A server of this module; tests that kill it start it again."""
    async with ValkeyServer() as server:
        yield server


@pytest.fixture(scope="module", params=KINDS.values(), ids=list(KINDS))
async def any_kind(request: pytest.FixtureRequest) -> AsyncIterator[Valkey]:
    """One of every kind."""
    async with request.param() as valkey:
        yield valkey


@pytest.fixture
async def token_log(valkey: ValkeyServer) -> AsyncIterator[TokenLog]:
    """A process's end of it."""
    log = TokenLog(valkey.url)
    yield log
    await log.close()


def written(message_id: UUID, *said: str | Part) -> StreamBuffer:
    """A buffer with these texts and parts."""
    buffer = StreamBuffer(message_id, new_id())
    for part in said:
        if isinstance(part, str):
            buffer.append_text("TEXT", part)
        else:
            buffer.append_part(part)
    return buffer


def growth(buffer: StreamBuffer, offset: int = 0) -> Growth:
    return Growth(LogName(buffer.message_id), offset, buffer.since(offset))


async def held(log: TokenLog, message_id: UUID) -> list[Part]:
    entries = await log.read(LogName(message_id), 0)
    return parts_of([entry.event for entry in entries if entry.event is not None])


SAID: tuple[str | Part, ...] = ("Grüß ", "🦉", ToolPart("c", "search", {"q": "🦉"}), "Ende")


async def test_what_is_appended_is_read(token_log: TokenLog) -> None:
    buffer = written(new_id(), *SAID)
    assert await token_log.append([growth(buffer)]) == [buffer.length]
    assert await held(token_log, buffer.message_id) == buffer.parts()


async def test_a_long_log_is_read_in_few_pieces(token_log: TokenLog) -> None:
    name = LogName(new_id())
    events: list[ContentEvent] = []
    for part_index, (kind, size) in enumerate((("REASONING", 2_500), ("TEXT", 3_000), ("REASONING", 3_500))):
        events += [Delta("", part_index, kind, f"🦉{number} ") for number in range(size)]  # type: ignore[arg-type]
    call = ToolPart("c", "search", {"q": "🦉"})
    events += [PartAdded("", 3, call), PartAdded("", 4, call), Delta("", 5, "TEXT", "Ende")]
    assert await token_log.append([Growth(name, 0, events)]) == [length := sum(map(event_length, events))]
    await token_log.append((), [name])
    behind = sum(map(event_length, events[:1_000]))
    for offset, held_events in ((0, events), (behind, events[1_000:])):
        entries = await token_log.read(name, offset)
        told = [entry.event for entry in entries[:-1] if entry.event is not None]
        assert (entries[-2].offset, entries[-1].event) == (length, None)
        assert parts_of(told) == parts_of(held_events)
        assert len(entries) < 12
        for entry, event in zip(entries, told, strict=False):
            assert entry.offset - event_length(event) == offset
            offset = entry.offset


def event_length(event: ContentEvent) -> int:
    return len(event.text) if isinstance(event, Delta) else part_length(event.part)


async def test_an_append_whose_answer_was_lost_is_told_of_and_not_repeated(token_log: TokenLog) -> None:
    buffer = written(new_id(), *SAID)
    await token_log.append([growth(buffer)])
    assert await token_log.append([growth(buffer)]) == [buffer.length]
    assert await held(token_log, buffer.message_id) == buffer.parts()


async def test_a_log_that_was_lost_is_not_continued_with_a_hole(valkey: ValkeyServer, token_log: TokenLog) -> None:
    buffer = written(new_id(), *SAID)
    await token_log.append([growth(buffer)])
    await valkey.run("FLUSHALL")
    before = buffer.length
    buffer.append_text("TEXT", " und mehr")
    assert await token_log.append([growth(buffer, before)]) == [0]
    assert await held(token_log, buffer.message_id) == []
    assert await token_log.append([growth(buffer)]) == [buffer.length]
    assert await held(token_log, buffer.message_id) == buffer.parts()


async def test_behind_a_seal_nothing_can_be_appended(token_log: TokenLog) -> None:
    buffer = written(new_id(), "shown")
    await token_log.append([growth(buffer)])
    assert await token_log.sealed(LogName(buffer.message_id)) == [TextPart("shown")]
    before = buffer.length
    buffer.append_text("TEXT", " by a zombie")
    assert await token_log.append([growth(buffer, before)]) == [LAST_ID]
    assert await token_log.sealed(LogName(buffer.message_id)) == [TextPart("shown")]


async def test_an_answer_of_which_nothing_was_logged_can_be_sealed(token_log: TokenLog) -> None:
    buffer = written(new_id(), "too late")
    assert await token_log.sealed(LogName(buffer.message_id)) == []
    assert await token_log.append([growth(buffer)]) == [LAST_ID]


async def test_another_attempt_has_a_log_of_its_own(token_log: TokenLog) -> None:
    buffer = written(new_id(), "again")
    await token_log.sealed(LogName(buffer.message_id, 1))
    assert await token_log.append([Growth(LogName(buffer.message_id, 2), 0, buffer.since(0))]) == [buffer.length]


async def test_every_log_expires(valkey: ValkeyServer, token_log: TokenLog) -> None:
    buffer = written(new_id(), "x")
    await token_log.append([growth(buffer)])
    key = LogName(buffer.message_id).key
    assert 0 < int(str(await valkey.run("PTTL", key))) <= 3_600_000
    await token_log.append((), [LogName(buffer.message_id)])
    assert 0 < int(str(await valkey.run("PTTL", key))) <= 300_000


async def test_many_logs_are_appended_to_in_one_command(valkey: ValkeyServer, token_log: TokenLog) -> None:
    buffers = [written(new_id(), *SAID) for _ in range(100)]
    await token_log.append([growth(buffers[0])])  # the script is there from now on
    before = await scripts_run(valkey)
    ends = await token_log.append([growth(buffer) for buffer in buffers])
    assert ends == [buffer.length for buffer in buffers]
    assert await scripts_run(valkey) - before == 1


async def test_at_every_kind_of_valkey_a_log_is_appended_to_fenced_and_sealed(any_kind: Valkey) -> None:
    log = TokenLog(any_kind.url)
    try:
        await log.probe()
        # A server that starts anew does not know the scripts.
        await any_kind.run("SCRIPT", "FLUSH")
        buffers = [written(new_id(), *SAID) for _ in range(3)]
        growths = [growth(buffer) for buffer in buffers]
        assert await log.append(growths) == await log.append(growths) == [buffer.length for buffer in buffers]
        assert await held(log, buffers[0].message_id) == buffers[0].parts()
        waited = await log.wait({LogName(buffer.message_id): 0 for buffer in buffers})
        assert len(waited) == 3
        await any_kind.run("DEL", LogName(buffers[0].message_id).key)
        assert await log.append([Growth(LogName(buffers[0].message_id), buffers[0].length, [])]) == [0]
        assert await log.append(growths[:1]) == [buffers[0].length]
        assert await log.sealed(LogName(buffers[1].message_id)) == buffers[1].parts()
        assert await log.append(growths[1:2]) == [LAST_ID]
    finally:
        await log.close()


async def test_at_every_kind_of_valkey_a_wait_is_ended(any_kind: Valkey) -> None:
    log = TokenLog(any_kind.url)
    try:
        name = LogName(new_id())
        await log.wake()
        assert await log.wait({name: 0}) == {}  # woken before it waited
        begun = time.monotonic()
        waiting = asyncio.create_task(log.wait({name: 0}))
        await blocked(any_kind)
        await log.wake()
        assert await waiting == {}
        assert time.monotonic() - begun < BLOCK_SECONDS
    finally:
        await log.close()


async def blocked(valkey: Valkey) -> None:
    """Somebody waits for a log."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while True:
            clients = await valkey.run("INFO", "clients")
            assert isinstance(clients, dict)
            if clients["blocked_clients"]:
                return
            await asyncio.sleep(0.01)


class Database:
    """What the database says of messages, as a test sets it."""

    def __init__(self) -> None:
        self.written: dict[UUID, Written] = {}

    async def find(self, ids: Sequence[UUID]) -> dict[UUID, Written]:
        """Those that there are."""
        return {key: self.written[key] for key in ids if key in self.written}

    def begin(self, message_id: UUID, owner_id: UUID, attempt: int = 1) -> None:
        """An answer is being written."""
        self.written[message_id] = Written(record(message_id, owner_id, MessageStatus.STREAMING), attempt)

    def end(self, message_id: UUID, parts: list[Part], status: MessageStatus = MessageStatus.COMPLETE) -> MessageRecord:
        """Its end is stored."""
        ended = record(message_id, self.written[message_id].record.owner_id, status, parts)
        self.written[message_id] = Written(ended, None)
        return ended


def record(message_id: UUID, owner_id: UUID, status: MessageStatus, parts: list[Part] | None = None) -> MessageRecord:
    now = datetime.now(UTC)
    nothing = dict.fromkeys(MESSAGE_COLUMNS.split(", "))
    return MessageRecord.from_row(
        nothing
        | {
            "id": message_id,
            "owner_id": owner_id,
            "thread_id": new_id(),
            "depth": 1,
            "role": MessageRole.ASSISTANT.value,
            "status": status.value,
            "parts": parts_to_json(parts or []),
            "model": "m",
            "attempt": 1,
            "created_at": now,
            "updated_at": now,
        }
    )


class Node:
    """A process's hub, with what it was told to give up."""

    def __init__(self, valkey: Valkey, database: Database) -> None:
        self.log = TokenLog(valkey.url)
        self.lost: list[UUID] = []
        self.hub = SharedHub(self.log, database.find, self.lost.append)

    async def __aenter__(self) -> Node:
        self.hub.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.hub.stop()
        await self.log.close()


async def follow(node: Node, message_id: UUID) -> StreamBuffer:
    """As a reader at this node."""
    followed = await node.hub.follow(message_id)
    assert followed is not None
    followed.readers += 1
    return followed


async def until_length(buffer: StreamBuffer, length: int) -> None:
    async with asyncio.timeout(DEADLINE_SECONDS):
        while buffer.length < length and not buffer.closed:
            await buffer.wait(buffer.length)
    assert buffer.length == length


async def message_at_the_end(buffer: StreamBuffer) -> MessageRecord | None:
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not buffer.closed:
            await buffer.wait(buffer.length)
    return buffer.ended.message if buffer.ended else None


async def test_readers_everywhere_see_what_is_written_somewhere(any_kind: Valkey) -> None:
    database, message_id, owner_id = Database(), new_id(), new_id()
    async with Node(any_kind, database) as writer, Node(any_kind, database) as reader:
        draft = writer.hub.open(message_id, owner_id)
        database.begin(message_id, owner_id)
        followed = await follow(reader, message_id)
        assert followed.owner_id == owner_id
        own = writer.hub.get(message_id)
        assert own is not None
        for part in SAID:
            if isinstance(part, str):
                draft.append_text("TEXT", part)
            else:
                draft.append_part(part)
            await until_length(followed, draft.length)
            await until_length(own, draft.length)
        assert followed.parts() == own.parts() == draft.parts()
        ended = database.end(message_id, draft.parts())
        writer.hub.remove(message_id)
        draft.end(ended)
        assert await message_at_the_end(followed) == ended


async def test_the_first_token_of_an_answer_does_not_wait_for_the_next_write(
    valkey: ValkeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streams.shared_hub._TICK_SECONDS", 3_600.0)
    monkeypatch.setattr("streams.shared_hub._HURRY_SECONDS", 0.0)
    async with Node(valkey, Database()) as writer:
        for number in range(3):
            message_id = new_id()
            draft, own = writer.hub.open(message_id, new_id()), writer.hub.get(message_id)
            assert own is not None
            if number == 2:
                # Known to be there, as those that are kept alive are, before anything has come.
                writer.hub._on_growth(draft)  # type: ignore[arg-type]
            draft.append_text("TEXT", "first")
            await until_length(own, 5)


async def test_readers_at_the_writer_are_given_the_end_and_what_they_lack_without_the_database(
    valkey: ValkeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, message_id, owner_id = Database(), new_id(), new_id()
    async with Node(valkey, database) as writer:
        draft = writer.hub.open(message_id, owner_id)
        own = writer.hub.get(message_id)
        assert own is not None
        database.begin(message_id, owner_id)
        draft.append_text("TEXT", "shown")
        await until_length(own, 5)
        draft.append_text("TEXT", " and not in the log")
        ended = database.end(message_id, draft.parts())
        monkeypatch.setattr(database, "find", None)
        writer.hub.remove(message_id)
        draft.end(ended)
        assert own.ended is not None
        assert (own.ended.message, own.parts()) == (ended, draft.parts())


async def test_nothing_is_shown_that_the_log_does_not_have(valkey: ValkeyServer) -> None:
    database, message_id, owner_id = Database(), new_id(), new_id()
    async with Node(valkey, database) as writer:
        draft = writer.hub.open(message_id, owner_id)
        own = writer.hub.get(message_id)
        assert own is not None
        draft.append_text("TEXT", "logged ")
        await until_length(own, 7)
        valkey.freeze()
        try:
            draft.append_text("TEXT", "not logged")
            # Two ticks and more of a log that does not answer.
            await asyncio.sleep(0.3)
            assert own.length == 7
        finally:
            valkey.thaw()
        await until_length(own, draft.length)
        assert own.parts() == draft.parts()


async def entries_of(node: Node, message_id: UUID) -> list[Entry]:
    """What the log of a first attempt holds."""
    return await node.log.read(LogName(message_id), 0)


async def ended_of(node: Node, count: int) -> list[UUID]:
    """So many answers at a node that have said a word, which is logged, and then ended."""
    drafts = [node.hub.open(new_id(), new_id()) for _ in range(count)]
    for draft in drafts:
        draft.append_text("TEXT", "word")
    for draft in drafts:
        own = node.hub.get(draft.message_id)
        assert own is not None
        await until_length(own, 4)
    for draft in drafts:
        node.hub.remove(draft.message_id)
    return [draft.message_id for draft in drafts]


async def test_a_server_that_stops_has_told_of_every_end(valkey: ValkeyServer) -> None:
    async with Node(valkey, Database()) as reader:
        async with Node(valkey, Database()) as writer:
            ids = await ended_of(writer, 450)
        for message_id in ids:
            assert [(entry.offset, entry.event is None) for entry in await entries_of(reader, message_id)] == [
                (4, False),
                (LAST_ID, True),
            ]


async def test_an_end_is_told_when_the_log_is_back_and_not_kept_for_ever(
    valkey: ValkeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Node(valkey, Database()) as node:
        valkey.kill()
        failed = node.hub.failed_appends
        told, forgotten = new_id(), new_id()
        for message_id in (forgotten, told):
            node.hub.open(message_id, new_id())
            node.hub.remove(message_id)
            async with asyncio.timeout(DEADLINE_SECONDS):
                while node.hub.failed_appends == failed:
                    await asyncio.sleep(0.01)
            assert LogName(message_id) in node.hub._ended
            failed = node.hub.failed_appends
            if message_id == forgotten:
                monkeypatch.setattr("streams.shared_hub._END_SECONDS", 0.0)
                async with asyncio.timeout(DEADLINE_SECONDS):
                    while node.hub._ended:
                        await asyncio.sleep(0.01)
                monkeypatch.undo()
        await valkey.start()
        async with asyncio.timeout(DEADLINE_SECONDS):
            while node.hub._ended:
                await asyncio.sleep(0.01)
        assert [entry.event for entry in await entries_of(node, told)] == [None]
        assert await entries_of(node, forgotten) == []


async def test_an_end_that_is_refused_keeps_no_other_answer_back(valkey: ValkeyServer) -> None:
    async with Node(valkey, Database()) as node:
        refused, good = new_id(), new_id()
        node.hub.open(refused, new_id())
        await valkey.run("SET", LogName(refused).key, "not a log")
        node.hub.remove(refused)
        node.hub.open(good, new_id()).append_text("TEXT", "word")
        own = node.hub.get(good)
        assert own is not None
        await until_length(own, 4)
        assert (node.hub.failed_appends, node.hub._ended) == (0, {})
        assert await node.log.append((), [LogName(refused), LogName(good)]) == [-1, LAST_ID]
        with pytest.raises(LOST, match="cannot be"):
            # Nobody is told that nothing more can be appended where that is not so.
            await node.log.sealed(LogName(refused))


async def test_who_finds_an_answer_to_be_anothers_does_not_end_its_log(valkey: ValkeyServer) -> None:
    async with Node(valkey, Database()) as late, Node(valkey, Database()) as holder:
        message_id, owner_id = new_id(), new_id()
        late.hub.open(message_id, owner_id, attempt=2)
        draft = holder.hub.open(message_id, owner_id, attempt=2)
        own = holder.hub.get(message_id)
        assert own is not None
        late.hub.discard(message_id)
        # Behind all that it had to tell.
        await ended_of(late, 1)
        draft.append_text("TEXT", "word")
        await until_length(own, 4)
        assert (holder.lost, late.hub.get(message_id)) == ([], None)


async def test_a_server_that_comes_back_empty_is_given_everything_again(valkey: ValkeyServer) -> None:
    database, message_id, owner_id = Database(), new_id(), new_id()
    async with Node(valkey, database) as writer, Node(valkey, database) as late:
        draft = writer.hub.open(message_id, owner_id)
        database.begin(message_id, owner_id)
        own = writer.hub.get(message_id)
        assert own is not None
        draft.append_text("TEXT", "before the end of the world ")
        await until_length(own, draft.length)
        valkey.kill()
        await valkey.start()
        # The model is silent: the log is found to be lost all the same.
        followed = await follow(late, message_id)
        await until_length(followed, draft.length)
        draft.append_text("TEXT", "and after it")
        await until_length(followed, draft.length)
        await until_length(own, draft.length)
        assert followed.parts() == own.parts() == draft.parts()


async def test_r30_an_evicted_log_is_written_anew_under_its_readers() -> None:
    database, message_id, owner_id = Database(), new_id(), new_id()
    async with (
        ValkeyServer("--maxmemory", "4mb", "--maxmemory-policy", "allkeys-lru") as small,
        Node(small, database) as writer,
        Node(small, database) as reader,
        Node(small, database) as late,
    ):
        draft = writer.hub.open(message_id, owner_id)
        database.begin(message_id, owner_id)
        followed = await follow(reader, message_id)
        for round_ in range(3):
            draft.append_text("TEXT", f"before the eviction {round_} ")
            await until_length(followed, draft.length)
            # Others' data comes until there is no place for ours: all of it at once, so that nothing is used since.
            key, filled = LogName(message_id).key, 0
            while await small.run("EXISTS", key):
                await small.run("EVAL", FILL, 0, filled, 1_000)
                filled += 1_000
            draft.append_text("TEXT", f"and after it {round_} ")
            await until_length(followed, draft.length)
        assert writer.hub.rewritten
        whole = await follow(late, message_id)
        await until_length(whole, draft.length)
        assert whole.parts() == followed.parts() == draft.parts()


FILL = """
for n = ARGV[1], ARGV[1] + ARGV[2] do redis.call('SET', 'other:' .. n, string.rep('x', 1000)) end
"""


async def test_r33_a_memory_that_is_full_is_a_pause_and_heals(caplog: pytest.LogCaptureFixture) -> None:
    database, message_id, owner_id = Database(), new_id(), new_id()
    async with (
        ValkeyServer("--maxmemory", "4mb", "--maxmemory-policy", "noeviction") as small,
        Node(small, database) as writer,
        Node(small, database) as reader,
    ):
        draft = writer.hub.open(message_id, owner_id)
        database.begin(message_id, owner_id)
        followed = await follow(reader, message_id)
        own = writer.hub.get(message_id)
        assert followed is not None
        assert own is not None
        draft.append_text("TEXT", "before ")
        await until_length(followed, draft.length)
        await small.run("EVAL", FILL, 0, 1, 10_000)
        with pytest.raises(OutOfMemoryError):
            await small.run("SET", "one", "more")
        draft.append_text("TEXT", "while it is full ")
        async with asyncio.timeout(DEADLINE_SECONDS):
            while writer.hub.failed_appends < 3:
                await asyncio.sleep(0.01)
        assert own.length == followed.length == len("before ")
        late = await follow(reader, message_id)  # is not refused
        assert late is followed
        await small.run("CONFIG", "SET", "maxmemory", "100mb")
        draft.append_text("TEXT", "and after")
        await until_length(followed, draft.length)
        await until_length(own, draft.length)
        assert followed.parts() == draft.parts()
    assert caplog.text.count("the token log is out of reach: its memory is full; readers wait") == 1


async def test_r31_what_comes_while_the_log_is_frozen_is_kept_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("streams.valkey.COMMAND_SECONDS", 0.3)
    monkeypatch.setattr("streams.valkey._TRY_SECONDS", 0.15)
    database, message_id, owner_id = Database(), new_id(), new_id()
    async with ValkeyServer() as valkey, Node(valkey, database) as writer, Node(valkey, database) as reader:
        draft = writer.hub.open(message_id, owner_id)
        database.begin(message_id, owner_id)
        followed = await follow(reader, message_id)
        draft.append_text("TEXT", "seen ")
        await until_length(followed, draft.length)
        # A reader may know it first.
        own = writer.hub.get(message_id)
        assert own is not None
        await until_length(own, draft.length)
        tasks = len(asyncio.all_tasks())
        valkey.freeze()
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                while writer.hub.failed_appends < 3:
                    draft.append_text("TEXT", "not seen ")
                    await asyncio.sleep(0.001)
            assert writer.hub.unlogged_characters == draft.length - len("seen ")
            # The answer itself is all that grew: no queue of the log's own, no task for each token, no line of the log.
            assert list(writer.hub._grown) in ([], [message_id])
            assert len(asyncio.all_tasks()) <= tasks + 2
            assert caplog.text.count("the token log is out of reach") <= 4
        finally:
            valkey.thaw()
        await until_length(followed, draft.length)
        assert followed.parts() == draft.parts()


async def test_r34_every_key_has_a_bound_and_an_end_whenever_its_writer_dies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("streams.token_log._MOST_ENTRIES", 100)
    async with ValkeyServer() as valkey:
        # As long as a process lives that does nothing but die: no call is followed by another that would bound it.
        for dies_after in range(4):
            log, buffer = TokenLog(valkey.url), written(new_id(), "x")
            if dies_after >= 1:
                await log.append([growth(buffer)])
            if dies_after >= 2:
                for _ in range(500):
                    before = buffer.length
                    buffer.append_text("TEXT", "y")
                    await log.append([growth(buffer, before)])
                length = int(str(await valkey.run("XLEN", LogName(buffer.message_id).key)))
                assert 100 <= length <= 300  # Valkey drops whole blocks of a hundred
            if dies_after >= 3:
                await log.append((), [LogName(buffer.message_id)])
            await log.wake()
            assert await unbounded(valkey) == []
            await log.close()
        assert await valkey.run("DBSIZE") == 7


async def test_a_master_that_was_frozen_and_wakes_is_written_to_and_read_by_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("streams.valkey.COMMAND_SECONDS", 2.0)
    monkeypatch.setattr("streams.valkey._TRY_SECONDS", 1.0)
    database, message_id, owner_id = Database(), new_id(), new_id()
    async with SentinelGroup() as group, Node(group, database) as writer, Node(group, database) as reader:
        draft = writer.hub.open(message_id, owner_id)
        database.begin(message_id, owner_id)
        followed = await follow(reader, message_id)
        draft.append_text("TEXT", "at the first ")
        await until_length(followed, draft.length)
        first = group.primary
        first.freeze()
        draft.append_text("TEXT", "at the second ")
        await group.promoted()
        await until_length(followed, draft.length)
        first.thaw()
        draft.append_text("TEXT", "while there are two, ")
        await until_length(followed, draft.length)
        await first.runs_until(lambda text: "'role': 'slave'" in text, "INFO", "replication")
        draft.append_text("TEXT", "and after")
        await until_length(followed, draft.length)
        assert followed.parts() == draft.parts()
        assert await held(reader.log, message_id) == draft.parts()


async def test_a_writer_that_was_given_up_is_told(valkey: ValkeyServer) -> None:
    database, message_id, owner_id = Database(), new_id(), new_id()
    async with Node(valkey, database) as zombie, Node(valkey, database) as other:
        draft = zombie.hub.open(message_id, owner_id)
        own = zombie.hub.get(message_id)
        assert own is not None
        draft.append_text("TEXT", "shown")
        await until_length(own, 5)
        assert await other.log.sealed(LogName(message_id)) == [TextPart("shown")]
        draft.append_text("TEXT", " never shown")
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not zombie.lost:
                await asyncio.sleep(0.01)
        assert zombie.lost[0] == message_id
        assert own.length == 5


async def test_readers_of_a_sealed_answer_get_the_end_when_it_is_stored(valkey: ValkeyServer) -> None:
    database, message_id, owner_id = Database(), new_id(), new_id()
    async with Node(valkey, database) as writer, Node(valkey, database) as reader:
        draft = writer.hub.open(message_id, owner_id)
        database.begin(message_id, owner_id)
        draft.append_text("TEXT", "half")
        followed = await follow(reader, message_id)
        await until_length(followed, 4)
        await reader.log.sealed(LogName(message_id))
        await asyncio.sleep(0.2)  # sealed, but not stored yet
        assert followed.ended is None  # the reader waits
        ended = database.end(message_id, [TextPart("half")], MessageStatus.INTERRUPTED)
        assert await message_at_the_end(followed) == ended


async def test_an_end_of_which_no_log_tells_is_found(valkey: ValkeyServer) -> None:
    database, message_id, owner_id = Database(), new_id(), new_id()
    async with Node(valkey, database) as reader:
        database.begin(message_id, owner_id)
        followed = await follow(reader, message_id)
        ended = database.end(message_id, [TextPart("from the database")])
        assert await message_at_the_end(followed) == ended
        assert followed.parts() == [TextPart("from the database")]


async def test_an_attempt_that_begins_anew_is_followed(valkey: ValkeyServer) -> None:
    database, message_id, owner_id = Database(), new_id(), new_id()
    async with Node(valkey, database) as second, Node(valkey, database) as reader:
        database.begin(message_id, owner_id)
        followed = await follow(reader, message_id)
        await second.log.sealed(LogName(message_id, 1))
        draft = second.hub.open(message_id, owner_id, attempt=2)
        database.begin(message_id, owner_id, attempt=2)
        draft.append_text("TEXT", "the second try")
        # Whoever reads the first looks again, and finds the second.
        while not followed.closed:
            await followed.wait(followed.length)
        again = await follow(reader, message_id)
        assert again.attempt == 2
        await until_length(again, draft.length)
        assert again.since(0)[0].cursor.endswith(f".2-{again.length}")


async def test_a_buffer_lives_as_long_as_its_readers(valkey: ValkeyServer) -> None:
    database, message_id = Database(), new_id()
    async with Node(valkey, database) as reader:
        database.begin(message_id, new_id())
        followed = await follow(reader, message_id)
        await asyncio.sleep(2.5)  # it is looked once a second for those that nobody reads
        assert reader.hub.get(message_id) is followed
        followed.readers -= 1
        async with asyncio.timeout(5):
            while reader.hub.get(message_id) is not None:
                await asyncio.sleep(0.05)
        assert reader.hub.followed == 0
        assert followed.closed  # who has it in hand, and did not say so yet, looks for another


async def test_who_leaves_while_a_log_is_read_leaves_nobody_waiting(
    valkey: ValkeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, message_id, owner_id = Database(), new_id(), new_id()
    async with Node(valkey, database) as writer, Node(valkey, database) as reader:
        draft = writer.hub.open(message_id, owner_id)
        database.begin(message_id, owner_id)
        draft.append_text("TEXT", "shown")
        reading = asyncio.Event()

        async def read(name: LogName, offset: int) -> list[Entry]:
            reading.set()
            await asyncio.Event().wait()
            return []

        with monkeypatch.context() as patch:
            patch.setattr(reader.log, "read", read)
            first = asyncio.create_task(reader.hub.follow(message_id))
            await reading.wait()
            second = await follow(reader, message_id)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        assert await message_at_the_end(second) is None
        third = await follow(reader, message_id)
        draft.append_text("TEXT", " and more")
        await until_length(third, draft.length)


async def test_what_was_asked_for_a_buffer_that_was_given_up_is_not_put_into_the_next(
    valkey: ValkeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, message_id, owner_id = Database(), new_id(), new_id()
    async with Node(valkey, database) as writer, Node(valkey, database) as reader:
        draft = writer.hub.open(message_id, owner_id)
        database.begin(message_id, owner_id)
        waiting, arrived, deliver = asyncio.Event(), asyncio.Event(), asyncio.Event()
        deliver.set()
        read_, wait_ = reader.log.read, reader.log.wait

        async def wait(offsets: Mapping[LogName, int]) -> dict[LogName, list[Entry]]:
            waiting.set()
            found = await wait_(offsets)
            if found:
                arrived.set()
                await deliver.wait()
            return found

        monkeypatch.setattr(reader.log, "wait", wait)
        first = await follow(reader, message_id)
        draft.append_text("TEXT", "first")
        await until_length(first, draft.length)
        arrived.clear()
        deliver.clear()
        draft.append_text("TEXT", ", second")
        reading, read_on = asyncio.Event(), asyncio.Event()

        async def read(name: LogName, offset: int) -> list[Entry]:
            entries = await read_(name, offset)
            reading.set()
            await read_on.wait()
            return entries

        async with asyncio.timeout(DEADLINE_SECONDS):
            await arrived.wait()
            first.readers -= 1
            while reader.hub.followed:
                await asyncio.sleep(0.01)
            monkeypatch.setattr(reader.log, "read", read)
            following = asyncio.create_task(follow(reader, message_id))
            await reading.wait()
            waiting.clear()
            deliver.set()
            await waiting.wait()
            read_on.set()
            second = await following
        await until_length(second, draft.length)
        draft.append_text("TEXT", ", third")
        await until_length(second, draft.length)


PIECE = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pieces=st.lists(
        st.tuples(st.sampled_from(["TEXT", "REASONING", "PART"]), st.text(min_size=1, max_size=20)),
        min_size=1,
        max_size=30,
    ),
    lost=st.sets(st.integers(0, 29), max_size=3),
)
async def test_whatever_is_lost_between_appends_the_log_ends_equal_to_the_answer(
    valkey: ValkeyServer, pieces: list[tuple[str, str]], lost: set[int]
) -> None:
    log = TokenLog(valkey.url)
    buffer = StreamBuffer(new_id(), new_id())
    name = LogName(buffer.message_id)
    logged = 0
    try:
        for place, (kind, text) in enumerate(pieces):
            if kind == "PART":
                buffer.append_part(ToolPart("c", text))
            else:
                buffer.append_text("TEXT" if kind == "TEXT" else "REASONING", text)
            if place in lost:
                await valkey.run("DEL", name.key)
            (logged,) = await log.append([Growth(name, logged, buffer.since(logged))])
        while logged < buffer.length:
            (logged,) = await log.append([Growth(name, logged, buffer.since(logged))])
        assert await held(log, buffer.message_id) == buffer.parts()
        # From every place on: exactly the rest.
        for offset in range(buffer.length + 1):
            entries = await log.read(name, offset)
            assert all(entry.offset > offset for entry in entries)
    finally:
        await log.close()
