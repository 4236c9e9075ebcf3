"""The hub of a process that shares its streams with others: what its readers see is in the token log first.

A producer appends to a *draft*, which nobody reads. One task writes what all drafts have grown by into the log, in one
round trip, as often as the last one allows, and only then gives it to the readers: in the *buffer*. Processes that do
not write an answer have a buffer of it too, for as long as somebody reads it, and one task of the process fills all of
them from the log.

When the log is out of reach, drafts grow on and readers see a pause. When its data is lost, drafts are written anew.
When an answer has ended, its text is in the database, and its readers get what they lack from there, log or no log.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Sequence
from typing import Any
from uuid import UUID

from models.database import DatabaseUnavailableError
from models.metrics import Histogram
from models.records import MessageRecord
from streams.buffer import ContentEvent, Delta, StreamBuffer, replay
from streams.cursor import CursorAheadError
from streams.ending import Written
from streams.hub import Hub
from streams.token_log import Entry, Growth, LogName, TokenLog
from streams.valkey import LOST, Pause, heed_cancellation, reason

log = logging.getLogger(__name__)

# Between two writes of the log: enough that tokens of many streams share a round trip, too little to be noticed.
_TICK_SECONDS = 0.01
# Between two writes that do not wait for that, for an answer that begins: many that begin at once share their writes.
_HURRY_SECONDS = 0.05
_KEEP_SECONDS = 2.0
_LOOK_SECONDS = 1.0
_PROBE_SECONDS = 2.0
_PROBE_DEADLINE_SECONDS = 2.0
_LOGS_AT_ONCE = 200

_ENDS_SOON_TRIES = 50
_ENDS_SOON_SECONDS = 0.1
# For so long an end is tried to be told by the log; then its readers have found it in the database, or will.
_END_SECONDS = 15.0


Find = Callable[[Sequence[UUID]], Awaitable[dict[UUID, Written]]]


class Draft(StreamBuffer):
    """What a producer of this process has made, ahead of its log and of its readers."""

    def __init__(self, name: LogName, buffer: StreamBuffer, grown: Callable[[Draft], None]) -> None:
        super().__init__(name.message_id, buffer.owner_id, name.attempt)
        self.name = name
        self.buffer = buffer
        self.logged = 0
        # Whether it is known to have grown since it was written last: tokens come much faster than that.
        self.is_noted = False
        # Whether any of it was sent to the log: its readers wait for the first token.
        self.was_sent = False
        self._grown = grown

    def end(self, message: MessageRecord) -> None:
        """The end is stored: readers may have everything."""
        # First: what is behind it closes their buffer without an end.
        end_buffer(self.buffer, message)
        super().end(message)

    def close(self) -> None:
        """Nothing more comes from here."""
        super().close()
        self.buffer.close()

    def _wake(self) -> None:
        # Readers get what is added when the log has it. They wait for the other buffer: nobody waits for this one.
        if not self.is_noted and not self.closed:
            self._grown(self)


class Followed(StreamBuffer):
    """A buffer of an answer that is written elsewhere; `sealed` when its log has nothing more to tell."""

    def __init__(self, name: LogName, owner_id: UUID) -> None:
        super().__init__(name.message_id, owner_id, name.attempt)
        self.name = name
        self.sealed = False


class SharedHub(Hub):
    """The buffers of this process: of its own answers, and of those of others that are read here.

    Args:
        token_log: the log; closed by its maker, after this is stopped.
        find: looks messages up by their ids, whosever they are: readers were let in by others. What is not there (any
            more) is left out.
        lost: called for an answer of this process that somebody else has ended.
    """

    def __init__(self, token_log: TokenLog, find: Find, lost: Callable[[UUID], None]) -> None:
        super().__init__()
        self._log = token_log
        self._find = find
        self._lost = lost
        self._drafts: dict[UUID, Draft] = {}
        self._grown: dict[UUID, Draft] = {}
        # Answers that have ended, and when: their logs are to tell of it.
        self._ended: dict[LogName, float] = {}
        self._to_write = asyncio.Event()
        self._all_written = asyncio.Event()
        # Whether an answer has begun that the log has nothing of: its readers wait for their first token.
        self._is_urgent = False
        self._urgent_from = 0.0
        self._rested = asyncio.Event()
        # Kept for as long as they have readers, and then for a moment: one whose connection broke comes back.
        self._followed: dict[UUID, Followed] = {}
        self._unread: set[UUID] = set()
        self._to_follow = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._endings: set[asyncio.Task[None]] = set()
        # When the log last answered a probe: what is measured is whether it can be used, not whether it was.
        self._answered_at = time.monotonic()
        # For metrics: round trips of the writing task, those that failed, and how often the log came back.
        self.round_trips = Histogram()
        self.failed_appends = 0
        self.failed_reads = 0
        self.returns = 0
        self.rewritten = 0

    def start(self) -> None:
        """Begin to write and to follow."""
        self._tasks = [
            asyncio.create_task(self._write(), name="token log writing"),
            asyncio.create_task(self._keep(), name="token log keeping"),
            asyncio.create_task(self._follow(), name="token log reading"),
            asyncio.create_task(self._look(), name="looking for ends"),
            asyncio.create_task(self._probe(), name="token log probe"),
        ]

    async def stop(self) -> None:
        """Stop; ends that are not in the log yet are given a moment."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_KEEP_SECONDS):
                if self._ended:
                    await self._all_written.wait()
                if self._endings:
                    await asyncio.wait(self._endings)
        for task in [*self._tasks, *self._endings]:
            task.cancel()
        await asyncio.gather(*self._tasks, *self._endings, return_exceptions=True)

    def open(self, message_id: UUID, owner_id: UUID, attempt: int = 1) -> StreamBuffer:
        """A draft; its readers find its buffer by `get`."""
        buffer = super().open(message_id, owner_id, attempt)
        draft = self._drafts[message_id] = Draft(LogName(message_id, attempt), buffer, self._on_growth)
        return draft

    def get(self, message_id: UUID) -> StreamBuffer | None:
        """The buffer of an answer that is written here, or read here already."""
        if (buffer := super().get(message_id)) is not None:
            return buffer
        followed = self._followed.get(message_id)
        # Who still reads one that is closed reads it to its end; who comes now asks the database.
        return None if followed is None or followed.closed else followed

    def remove(self, message_id: UUID) -> None:
        """The answer has ended and is stored, or is not ours any more."""
        super().remove(message_id)
        self._grown.pop(message_id, None)
        if (draft := self._drafts.pop(message_id, None)) is not None:
            self._ended[draft.name] = time.monotonic()
            self._all_written.clear()
            self._to_write.set()

    def discard(self, message_id: UUID) -> None:
        """Forget an answer that was not begun. Its log is not ended: it may be the one of who begins it elsewhere."""
        super().discard(message_id)
        self._grown.pop(message_id, None)
        self._drafts.pop(message_id, None)

    async def follow(self, message_id: UUID) -> StreamBuffer | None:
        """The buffer of an answer that is written elsewhere, with what its log has by now; None where none is.

        It grows for its readers only: count yourself in its `readers` before you wait for anything else.
        """
        if (buffer := self.get(message_id)) is not None:
            return buffer
        written = (await self._find([message_id])).get(message_id)
        if written is None or written.attempt is None:
            return None
        if (buffer := self.get(message_id)) is not None:
            return buffer
        followed = self._followed[message_id] = Followed(LogName(message_id, written.attempt), written.record.owner_id)
        followed.readers += 1
        try:
            self._take(followed, await self._log.read(followed.name, 0))
            self._to_follow.set()
            await self._log.wake()
        except LOST as error:
            log.warning("the token log is out of reach: %s; readers wait", reason(error))
            self._to_follow.set()
        except BaseException:
            # Whoever was to fill it has left. Others who came meanwhile begin anew.
            followed.close()
            raise
        finally:
            followed.readers -= 1
        return followed

    @property
    def out_of_reach_seconds(self) -> float:
        """For how long the token log has not answered; 0 where it did when it was last asked."""
        silent = time.monotonic() - self._answered_at
        return silent if silent > _PROBE_SECONDS + _PROBE_DEADLINE_SECONDS else 0.0

    @property
    def read_here(self) -> Collection[StreamBuffer]:
        """The buffers that readers of this process read, of its own answers and of others'."""
        return [*self._buffers.values(), *self._followed.values()]

    @property
    def written_here(self) -> Collection[StreamBuffer]:
        """What the producers of this process append to."""
        return self._drafts.values()

    @property
    def followed(self) -> int:
        """How many answers of other processes are read here."""
        return len(self._followed)

    @property
    def unlogged_characters(self) -> int:
        """How much the producers of this process are ahead of the log, and so of all readers."""
        return sum(max(0, draft.length - draft.logged) for draft in self._drafts.values())

    def _written(self, message_id: UUID) -> StreamBuffer | None:
        return self._drafts.get(message_id)

    def _later(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)

    def _on_growth(self, draft: Draft) -> None:
        # The first token of one that was silent is news once more.
        draft.is_noted = draft.length > 0
        self._grown[draft.message_id] = draft
        self._to_write.set()
        if not draft.was_sent and draft.length and (now := time.monotonic()) >= self._urgent_from:
            self._urgent_from = now + _HURRY_SECONDS
            self._is_urgent = True
            self._rested.set()

    async def _write(self) -> None:
        pause = Pause()
        while True:
            await self._to_write.wait()
            self._to_write.clear()
            self._is_urgent = False
            grown, self._grown = self._grown, {}
            for draft in grown.values():
                draft.is_noted = False
            drafts = [draft for draft in grown.values() if self._drafts.get(draft.message_id) is draft]
            ended = list(self._ended)
            try:
                for at in range(0, max(len(drafts), len(ended)), _LOGS_AT_ONCE):
                    await self._append(drafts[at : at + _LOGS_AT_ONCE], ended[at : at + _LOGS_AT_ONCE])
            except LOST as error:
                self.failed_appends += 1
                if pause.is_news(why := reason(error)):
                    log.warning("the token log is out of reach: %s; readers wait", why)
            except Exception:
                self.failed_appends += 1
                log.exception("writing the token log failed; trying again")
            else:
                heed_cancellation()
                if (drafts or ended) and pause.reset():
                    self.returns += 1
                    log.info("the token log is back")
                if not self._ended:
                    self._all_written.set()
                if drafts:
                    await self._rest()
                continue
            self._grown = grown | self._grown
            self._forget_ends()
            self._to_write.set()
            await pause.rest()

    async def _rest(self) -> None:
        """Wait between two writes, so that tokens of many streams share the next; a first token is not kept waiting."""
        if self._is_urgent:
            return
        self._rested.clear()
        timer = asyncio.get_running_loop().call_later(_TICK_SECONDS, self._rested.set)
        try:
            await self._rested.wait()
        finally:
            timer.cancel()

    def _forget_ends(self) -> None:
        """Do not keep for ever what the log cannot be told."""
        since = time.monotonic() - _END_SECONDS
        if late := [name for name, ended_at in self._ended.items() if ended_at < since]:
            log.warning("%d ends of answers are not in the token log; readers find them in the database", len(late))
            for name in late:
                del self._ended[name]

    async def _append(self, drafts: Sequence[Draft], ended: Sequence[LogName]) -> None:
        growths = [Growth(draft.name, draft.logged, draft.since(draft.logged)) for draft in drafts]
        # What readers lack is what the log lacks, but where the log was lost: they have more than it then.
        unseen = [
            growth.events if draft.logged == draft.buffer.length else draft.since(draft.buffer.length)
            for draft, growth in zip(drafts, growths, strict=True)
        ]
        lengths = [draft.length for draft in drafts]
        for draft in drafts:
            draft.was_sent = draft.length > 0
        begun = time.monotonic()
        ends = await self._log.append(growths, ended)
        for name in ended:
            # Told, or refused, and then its readers find it in the database.
            self._ended.pop(name, None)
        self.round_trips.observe(time.monotonic() - begun)
        for draft, length, end, events in zip(drafts, lengths, ends[: len(drafts)], unseen, strict=True):
            if end > length:
                # Ended by somebody else, who believes this process dead: the database tells whose it is.
                self._lost(draft.message_id)
                continue
            draft.logged = end
            if end < length:
                # The log was lost, or is an older one: once more, from where it ends.
                self.rewritten += 1
                self._on_growth(draft)
            elif not draft.buffer.closed:
                extend(draft.buffer, events)

    async def _keep(self) -> None:
        """Keep the logs of silent answers, and find out when one was lost."""
        while True:
            await asyncio.sleep(_KEEP_SECONDS)
            for draft in list(self._drafts.values()):
                self._on_growth(draft)

    async def _follow(self) -> None:
        pause = Pause()
        while True:
            buffers = {
                buffer.name: buffer for buffer in self._followed.values() if not buffer.closed and not buffer.sealed
            }
            if not buffers:
                self._to_follow.clear()
                await self._to_follow.wait()
                continue
            try:
                found = await self._log.wait({name: buffer.length for name, buffer in buffers.items()})
            except LOST as error:
                self.failed_reads += 1
                if pause.is_news(why := reason(error)):
                    log.warning("the token log is out of reach: %s; readers wait", why)
                await pause.rest()
                continue
            except Exception:
                log.exception("reading the token log failed; trying again")
                await pause.rest()
                continue
            heed_cancellation()
            if pause.reset():
                log.info("the token log is back")
            for name, entries in found.items():
                # Into the buffer that was asked for: another may have come in its place, which begins elsewhere.
                self._take(buffers[name], entries)

    def _take(self, buffer: Followed, entries: Sequence[Entry]) -> None:
        for entry in entries:
            if buffer.closed:
                return
            if entry.event is None:
                buffer.sealed = True
                self._later(self._finish_soon(buffer.message_id), f"end of {buffer.message_id}")
                return
            if not take_entry(buffer, entry):
                # Not by any writer of ours. What the database has will have to do.
                log.error("a token log has a gap", extra={"message_id": str(buffer.message_id)})
                buffer.sealed = True

    async def _probe(self) -> None:
        while True:
            try:
                async with asyncio.timeout(_PROBE_DEADLINE_SECONDS):
                    await self._log.probe()
            except LOST:
                pass
            except Exception:
                log.exception("asking the token log failed; trying again")
            else:
                self._answered_at = time.monotonic()
            heed_cancellation()
            await asyncio.sleep(_PROBE_SECONDS)

    async def _finish_soon(self, message_id: UUID) -> None:
        """The log is sealed: the end is in the database, or will be in a moment."""
        for _ in range(_ENDS_SOON_TRIES):
            await self._finish([message_id])
            buffer = self._followed.get(message_id)
            if buffer is None or buffer.closed or not buffer.sealed:
                return
            await asyncio.sleep(_ENDS_SOON_SECONDS)

    async def _look(self) -> None:
        """Find ends that no log told of, and attempts that were begun anew."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            self._forget_unread()
            ids = [buffer.message_id for buffer in list(self._followed.values()) if not buffer.closed]
            if ids:
                await self._finish(ids)

    def _forget_unread(self) -> None:
        unread = {message_id for message_id, buffer in self._followed.items() if not buffer.readers}
        for message_id in unread & self._unread:
            # Closed: a reader that has it in hand and is not counted yet looks for another, and does not wait for ever.
            self._followed.pop(message_id).close()
        self._unread = unread & self._followed.keys()

    async def _finish(self, ids: Sequence[UUID]) -> None:
        try:
            found = await self._find(ids)
        except DatabaseUnavailableError as error:
            log.warning("ends of answers wait for the database: %s", error)
            return
        except Exception:
            log.exception("looking for ends of answers failed; trying again")
            return
        for message_id in ids:
            buffer, written = self._followed.get(message_id), found.get(message_id)
            if buffer is None or buffer.closed:
                continue
            if written is None:
                buffer.close()
            elif written.record.ended:
                end_buffer(buffer, written.record)
            elif written.attempt is not None and written.attempt != buffer.attempt:
                # Begun anew: readers look for the buffer of that attempt.
                buffer.close()


def extend(buffer: StreamBuffer, events: Iterable[ContentEvent]) -> None:
    """Append events to a buffer that ends where they begin."""
    for event in events:
        if isinstance(event, Delta):
            buffer.append_text(event.kind, event.text)
        else:
            buffer.append_part(event.part)


def take_entry(buffer: StreamBuffer, entry: Entry) -> bool:
    """Append what a buffer lacks of an entry; False where something before it is missing."""
    event = entry.event
    assert event is not None
    start = entry.offset - (len(event.text) if isinstance(event, Delta) else 1)
    if start > buffer.length:
        return False
    if entry.offset <= buffer.length:
        return True
    if isinstance(event, Delta):
        buffer.append_text(event.kind, event.text[buffer.length - start :])
    else:
        buffer.append_part(event.part)
    return True


def end_buffer(buffer: StreamBuffer, message: MessageRecord) -> None:
    """Give readers what they lack of a stored message, and its end."""
    if buffer.closed:
        return
    lacks = None
    if message.attempt == buffer.attempt:
        with contextlib.suppress(CursorAheadError):
            lacks = list(replay(buffer.message_id, message.parts, buffer.length, buffer.attempt))
    if lacks is None:
        # What is stored is less than what was shown, or other. Each reader looks at the message, and is told so.
        buffer.close()
    else:
        extend(buffer, lacks)
        buffer.end(message)
