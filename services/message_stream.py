"""Reading an answer: while it is written, after it, from any place on, whatever happened to the server meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncGenerator
from typing import Protocol
from uuid import UUID

from models.log_fields import log_note
from models.metrics import Histogram
from models.parts import parts_length
from models.records import MessageRecord, MessageRole, MessageStatus
from services.errors import (
    BadUserInputError,
    CursorAheadError,
    CursorInvalidError,
    CursorMismatchError,
    NotFoundError,
    UnavailableError,
)
from services.generation import Generations
from services.messages import Messages
from services.viewer import Viewer
from streams import buffer as streams_buffer
from streams import cursor as streams_cursor
from streams.buffer import Delta, Ended, Reset, StreamBuffer, StreamEvent
from streams.cursor import StreamPosition, cursor_prefix, end_cursor
from streams.hub import Hub
from streams.recovery import SERVER_LOST

_POLL_SECONDS = 0.25


class LiveReading:
    """Where a reader stands in a buffer that grows.

    Args:
        offset: what it has.
    """

    __slots__ = ("_counts", "_timed", "buffer", "offset")

    def __init__(self, counts: MessageStream, buffer: StreamBuffer, offset: int) -> None:
        self.buffer = buffer
        self.offset = offset
        self._counts = counts
        # What was there before this reader has not waited for it.
        self._timed = buffer.timed_length

    def gave(self, delta: Delta) -> None:
        """The reader has a delta that lay at its offset."""
        self.offset = offset = self.offset + len(delta.text)
        self._counts.delivered += 1
        if self._timed != self.buffer.timed_length <= offset:
            self._observe()

    def moved(self, offset: int) -> None:
        """The reader has everything up to there, by another way."""
        self.offset = offset
        if self._timed != self.buffer.timed_length <= offset:
            self._observe()

    def _observe(self) -> None:
        """Note how long the last piece that is timed took to its reader."""
        self._timed = self.buffer.timed_length
        self._counts.lag.observe(time.monotonic() - self.buffer.timed_at)


class DeltaFollower(Protocol):
    """Tells one reader the deltas of live answers, so that they need not come through `read`."""

    async def follow(self, reading: LiveReading) -> bool:
        """Give all deltas from the offset on, until something else follows or the buffer is closed.

        Returns:
            Whether there is still a reader.
        """


class MessageStream:
    """Reads and stops answers for viewers.

    Args:
        patience_seconds: how long a live answer without a writer is waited for: a dead server's is ended by then.
    """

    def __init__(self, hub: Hub, messages: Messages, generations: Generations, *, patience_seconds: float) -> None:
        self._hub = hub
        self._messages = messages
        self._generations = generations
        self._patience_seconds = patience_seconds
        # For metrics: reads that are open, reads begun by whether they had a cursor, events given, readers set back,
        # stops asked, and how long pieces of a live answer took from their append to the reader's socket.
        self.readers = 0
        self.begun: Counter[str] = Counter()
        self.delivered = 0
        self.resets = 0
        self.stops = 0
        self.lag = Histogram()
        self._attached: Counter[StreamBuffer] = Counter()
        self._detached = asyncio.Event()

    async def settled(self, patience_seconds: float) -> None:
        """Wait until the readers of answers that have ended are told so, or for so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_seconds):
                while any(buffer.closed for buffer in self._attached):
                    self._detached.clear()
                    await self._detached.wait()

    async def read(
        self, viewer: Viewer, message_id: UUID, after: str | None, follower: DeltaFollower | None = None
    ) -> AsyncGenerator[StreamEvent, None]:
        """The answer from a cursor on (None: from its start), ending with `Ended`. Nothing after `Ended`'s own cursor.

        Args:
            follower: is given the deltas of live buffers, which are not yielded then.

        Raises:
            NotFoundError: no such message of the viewer's; also when it is deleted while it is read.
            CursorInvalidError, CursorMismatchError, CursorAheadError: the cursor is of no, another, a future place.
            UnavailableError: the message is live, but nobody writes it and nobody has ended it in time.
        """
        position = _position(message_id, after)
        offset, attempt = position.offset, position.attempt
        log_note(message_id=message_id)
        self.begun["start" if after is None else "resume"] += 1
        self.readers += 1
        try:
            while True:
                buffer = self._hub.get(message_id)
                if buffer is None or buffer.owner_id != viewer.id:
                    found = await self._stored_or_live(viewer, message_id)
                    if isinstance(found, MessageRecord):
                        for event in _replay(found, StreamPosition(message_id, offset, position.ended, attempt)):
                            self.delivered += 1
                            self.resets += type(event) is Reset
                            yield event
                        return
                    buffer = found
                if attempt is not None and attempt != buffer.attempt and (offset or position.ended):
                    # What the reader has was lost before any of it was saved, and the answer was begun anew.
                    record = await self._find(viewer, message_id)
                    if attempt > record.attempt:
                        raise CursorAheadError("This cursor is ahead of the stream.", field="after")
                    if record.ended or record.attempt != buffer.attempt:
                        # The buffer is an old one, and will be closed in a moment.
                        await asyncio.sleep(_POLL_SECONDS)
                        continue
                    offset, position = 0, StreamPosition(message_id, 0)
                    self.delivered += 1
                    self.resets += 1
                    yield Reset(f"{cursor_prefix(message_id, buffer.attempt)}0", record)
                attempt = buffer.attempt
                buffer.readers += 1
                self._attached[buffer] += 1
                try:
                    if position.ended or offset > buffer.length:
                        if not await self._caught_up(buffer, position):
                            raise CursorAheadError("This cursor is ahead of the stream.", field="after")
                        if buffer.closed:
                            if self._hub.get(message_id) is buffer:
                                await asyncio.sleep(_POLL_SECONDS)
                            continue
                    reading = LiveReading(self, buffer, offset)
                    while True:
                        if follower is not None and not await follower.follow(reading):
                            return
                        length = buffer.length
                        for event in buffer.since(reading.offset):
                            self.delivered += 1
                            yield event
                        reading.moved(length)
                        offset = length
                        if buffer.closed and buffer.length == offset:
                            break
                        if follower is None:
                            await buffer.wait(offset)
                    if buffer.ended is not None:
                        self.delivered += 1
                        yield buffer.ended
                        return
                finally:
                    buffer.readers -= 1
                    self._detach(buffer)
                # Closed without an end: deleted, or another server's now. The database knows.
        finally:
            self.readers -= 1

    async def stop(self, viewer: Viewer, message_id: UUID) -> MessageRecord:
        """Stop an answer, keep what has come, and return it as it is stored. Stopping twice, or too late, is no error.

        Raises:
            NotFoundError: no such message of the viewer's.
            BadUserInputError: it is not an answer.
            UnavailableError: its writer did not stop in time.
        """
        self.stops += 1
        buffer = self._hub.get(message_id)
        if buffer is not None and buffer.owner_id == viewer.id:
            # Known here to be the viewer's: the model is left at once, though the database does not answer.
            await self._generations.stop(message_id)
        record = await self._find(viewer, message_id)
        if record.role is not MessageRole.ASSISTANT:
            raise BadUserInputError("Only an answer can be stopped.", field="messageId")
        deadline = asyncio.get_running_loop().time() + self._patience_seconds
        while not record.ended:
            await self._generations.stop(message_id)
            buffer = self._hub.get(message_id)
            if buffer is not None and self._hub.writes(message_id):
                await self._generations.wait_ended(message_id)
                if buffer.ended is not None:
                    return buffer.ended.message
            record = await self._find(viewer, message_id)
            if not record.ended:
                if asyncio.get_running_loop().time() > deadline:
                    raise UnavailableError("The answer could not be stopped in time; try again.")
                await asyncio.sleep(_POLL_SECONDS)
        return record

    def _detach(self, buffer: StreamBuffer) -> None:
        self._attached[buffer] -= 1
        if not self._attached[buffer]:
            del self._attached[buffer]
        self._detached.set()

    async def _caught_up(self, buffer: StreamBuffer, position: StreamPosition) -> bool:
        """Whether a buffer that is filled from a log soon has what a reader was shown elsewhere, or is closed.

        The log may be a moment behind the database, or lost and not yet written anew. And who reads the log at another
        server may be ahead of those who read here, until the writer is told that the log has it.
        """
        written, offset = self._hub.written_length(buffer.message_id), position.offset
        if written is not None and (offset > written or (position.ended and offset != written)):
            return False
        try:
            async with asyncio.timeout(self._patience_seconds):
                while not buffer.closed and (position.ended or buffer.length < position.offset):
                    await buffer.wait(buffer.length)
        except TimeoutError:
            return False
        return True

    async def _stored_or_live(self, viewer: Viewer, message_id: UUID) -> MessageRecord | StreamBuffer:
        """The ended message, or the buffer of one that is being written."""
        deadline = asyncio.get_running_loop().time() + self._patience_seconds
        while True:
            record = await self._find(viewer, message_id)
            if record.ended:
                return record
            if (buffer := await self._hub.follow(message_id)) is not None:
                return buffer
            if asyncio.get_running_loop().time() > deadline:
                raise UnavailableError("Nobody is writing this answer; try again.")
            await asyncio.sleep(_POLL_SECONDS)

    async def _find(self, viewer: Viewer, message_id: UUID) -> MessageRecord:
        record = await self._messages.find(viewer, message_id)
        if record is None:
            raise NotFoundError("message", field="messageId")
        return record


def _position(message_id: UUID, after: str | None) -> StreamPosition:
    if after is None:
        return StreamPosition(message_id, 0)
    try:
        return streams_cursor.parse_cursor(after, message_id)
    except streams_cursor.ForeignCursorError as error:
        raise CursorMismatchError("This cursor belongs to another message's stream.", field="after") from error
    except streams_cursor.MalformedCursorError as error:
        raise CursorInvalidError("This is not a cursor of a message stream.", field="after") from error


def _replay(record: MessageRecord, position: StreamPosition) -> list[StreamEvent]:
    parts, attempt = record.parts, record.attempt
    length = parts_length(parts)
    ended = Ended(end_cursor(record.id, length, attempt), record)
    read = attempt if position.attempt is None or not (position.offset or position.ended) else position.attempt
    if read != attempt or position.offset > length or (position.ended and position.offset != length):
        if read < attempt or (
            record.status is MessageStatus.INTERRUPTED
            and record.failure is not None
            and (record.failure.code == SERVER_LOST.code)
        ):
            # The last moments before a server died are gone with it; what the reader holds is more than there is, or
            # what came before the answer was begun anew.
            return [Reset(f"{cursor_prefix(record.id, attempt)}{length}", record), ended]
        raise CursorAheadError("This cursor is ahead of the stream.", field="after")
    if position.ended:
        return []
    return [*streams_buffer.replay(record.id, parts, position.offset, attempt), ended]
