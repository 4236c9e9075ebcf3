"""One answer while it is written: a buffer that any number of readers share.

The producer appends; a reader is a cursor (an offset) into the buffer, not a queue. A reader that is late wakes to one
merged delta, so a slow reader neither holds memory nor delays another, and a reader that stands at the tail gets the
very object that was appended, with its cursor already spelt. Nothing in here awaits but `StreamBuffer.wait`.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias
from uuid import UUID

from models.parts import DeltaKind, Part, ReasoningPart, TextPart, part_length
from models.records import MessageRecord
from streams.cursor import CursorAheadError, cursor_prefix, end_cursor

# A frame of more characters is cut in two, so that one catch-up cannot make a message that proxies refuse.
MAX_DELTA_CHARS = 262_144
# Entries of one part are joined when there are this many. Joining costs a copy of the text: 50,000 entries of 5
# characters are copied 100 times, 12 MB in all, and memory stays at the text instead of 200 bytes an entry.
_JOIN_ENTRIES = 512
# The first of a part and then one of so many appends is timed until its readers have it: a clock for each is too much.
SAMPLED_APPENDS = 64


@dataclass(slots=True, frozen=True)
class Delta:
    """The next characters of a text or reasoning part; `cursor` is the position behind them."""

    cursor: str
    part_index: int
    kind: DeltaKind
    text: str


@dataclass(slots=True, frozen=True)
class PartAdded:
    """A part that appears whole."""

    cursor: str
    part_index: int
    part: Part


@dataclass(slots=True, frozen=True)
class Reset:
    """The reader holds text that was lost with a server: replace it by this message; what follows goes on from it."""

    cursor: str
    message: MessageRecord


@dataclass(slots=True, frozen=True)
class Ended:
    """The terminal event: the message as it is stored."""

    cursor: str
    message: MessageRecord


ContentEvent: TypeAlias = Delta | PartAdded
StreamEvent: TypeAlias = Delta | PartAdded | Reset | Ended


class StreamBuffer:
    """The shared buffer of one attempt to write an answer, in one process. One producer, any number of readers.

    Ended by its producer with `end`; readers are then given the stored message. `closed` without a message means that
    the message is gone or belongs to another producer now: readers look it up anew.
    """

    def __init__(self, message_id: UUID, owner_id: UUID, attempt: int = 1) -> None:
        self.message_id = message_id
        self.owner_id = owner_id
        self.attempt = attempt
        self.length = 0
        # How many read it now, counted by them.
        self.readers = 0
        self.closed = False
        self.ended: Ended | None = None
        # For metrics: when the first append was, and of the last one that is timed its end and its time.
        self.begun_at: float | None = None
        self.timed_length = -1
        self.timed_at = 0.0
        self._prefix = cursor_prefix(message_id, attempt)
        self._entries: list[ContentEvent] = []
        self._starts: list[int] = []
        self._part_index = -1
        self._kind: DeltaKind | None = None
        self._part_entries = 0
        self._signatures: dict[int, str] = {}
        self._unsigned = False
        self._joined = 0
        self._waiters: set[asyncio.Future[None]] = set()
        # In the order in which they came.
        self._followers: dict[Callable[[], None], None] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._telling = False

    @property
    def readers_waiting(self) -> int:
        """How many readers are at the tail now; for metrics and tests."""
        return len(self._waiters) + len(self._followers)

    @property
    def appends(self) -> int:
        """How often something was appended."""
        return len(self._entries) + self._joined

    def append_text(self, kind: DeltaKind, text: str) -> None:
        """Add characters to the part that is being written, or begin a part of another kind. Empty text is nothing."""
        if not text:
            return
        if kind != self._kind:
            self._part_index += 1
            self._kind = kind
            self._part_entries = 0
        elif self._part_entries >= _JOIN_ENTRIES:
            self._join_entries()
        if self._signatures and self._part_index in self._signatures:
            self._unsigned = True
        self._starts.append(self.length)
        self.length += len(text)
        self._part_entries += 1
        self._entries.append(Delta(f"{self._prefix}{self.length}", self._part_index, kind, text))
        if self._part_entries % SAMPLED_APPENDS == 1:
            self._time()
        self._wake()

    def append_part(self, part: Part) -> None:
        """Add a part that appears whole."""
        assert not isinstance(part, TextPart | ReasoningPart), "text grows by append_text"
        self._part_index += 1
        self._kind = None
        self._starts.append(self.length)
        self.length += part_length(part)
        self._entries.append(PartAdded(f"{self._prefix}{self.length}", self._part_index, part))
        self._time()
        self._wake()

    def sign(self, signature: str | None) -> None:
        """Mark the reasoning that is being written as signed, just as it is now; None: it cannot be.

        The answer's reasoning can be sent back as a whole or not at all. So there are no signatures any more once one
        has no place: where the part goes on behind it, has one already, or where there is no such part.
        """
        if signature is None or self._kind != "REASONING" or self._part_index in self._signatures:
            self._unsigned = True
        else:
            self._signatures[self._part_index] = signature

    def end(self, message: MessageRecord) -> None:
        """Give readers the stored message; nothing may be appended after."""
        self.ended = Ended(end_cursor(self.message_id, self.length, self.attempt), message)
        self.close()

    def close(self) -> None:
        """Wake every reader for the last time."""
        self.closed = True
        self._wake()

    def since(self, offset: int) -> list[ContentEvent]:
        """What follows an offset: at most one delta a part (more only where a delta would be too long), in order.

        Raises:
            CursorAheadError: the offset lies behind the end.
        """
        if offset == self.length:
            return []
        if offset > self.length:
            raise CursorAheadError
        if offset == self._starts[-1]:
            last = self._entries[-1]
            if isinstance(last, PartAdded) or len(last.text) <= MAX_DELTA_CHARS:
                return [last]
        first = bisect_right(self._starts, offset) - 1
        return list(self._merged(first, offset))

    def parts(self) -> list[Part]:
        """Everything so far, as parts, reasoning with its signatures where all of it has one.

        What is saved on the way (`since`) has none: a text that is cut is not what was signed.
        """
        parts = parts_of(self.since(0)) if self.length else []
        thoughts = {index for index, part in enumerate(parts) if isinstance(part, ReasoningPart)}
        if not self._unsigned and thoughts == self._signatures.keys():
            for index, signature in self._signatures.items():
                part = parts[index]
                assert isinstance(part, ReasoningPart)
                parts[index] = ReasoningPart(part.text, signature)
        return parts

    async def wait(self, offset: int) -> None:
        """Return when there is something behind the offset, or when the buffer is closed.

        There is no deadline here: a producer ends its buffer by the deadlines of its generation.
        """
        if self.length != offset or self.closed:
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)

    def attach(self, tell: Callable[[], None]) -> None:
        """Call this soon after each growth and after the close; what grows before that is told by the same call.

        A call costs a tenth of what waking a task does. It must not raise.
        """
        self._loop = asyncio.get_running_loop()
        self._followers[tell] = None

    def detach(self, tell: Callable[[], None]) -> None:
        """Do not call this any more."""
        self._followers.pop(tell, None)

    def _time(self) -> None:
        self.timed_length, self.timed_at = self.length, time.monotonic()
        if self.begun_at is None:
            self.begun_at = self.timed_at

    def _wake(self) -> None:
        if self._waiters:
            waiters, self._waiters = self._waiters, set()
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)
        if self._followers and not self._telling:
            assert self._loop is not None
            self._telling = True
            self._loop.call_soon(self._tell)

    def _tell(self) -> None:
        self._telling = False
        for tell in tuple(self._followers):
            tell()

    def _merged(self, first: int, offset: int) -> Iterator[ContentEvent]:
        texts: list[str] = []
        kind: DeltaKind = "TEXT"
        part_index = -1
        position = offset
        for index in range(first, len(self._entries)):
            entry = self._entries[index]
            if texts and (isinstance(entry, PartAdded) or entry.part_index != part_index):
                yield from split_text(self._prefix, position, part_index, kind, "".join(texts))
                position = self._starts[index]
                texts = []
            if isinstance(entry, PartAdded):
                yield entry
                position = self._starts[index] + 1
            else:
                part_index, kind = entry.part_index, entry.kind
                texts.append(entry.text[offset - self._starts[index] :] if index == first else entry.text)
        if texts:
            yield from split_text(self._prefix, position, part_index, kind, "".join(texts))

    def _join_entries(self) -> None:
        """Make one entry of the growing part's entries. Readers hold offsets, so they do not notice."""
        first = len(self._entries) - self._part_entries
        start = self._starts[first]
        text = "".join(entry.text for entry in self._entries[first:] if isinstance(entry, Delta))
        assert self._kind is not None
        self._joined += self._part_entries - 1
        self._entries[first:] = [Delta(f"{self._prefix}{self.length}", self._part_index, self._kind, text)]
        self._starts[first:] = [start]
        self._part_entries = 1


def split_text(prefix: str, start: int, part_index: int, kind: DeltaKind, text: str) -> Iterator[Delta]:
    """One stretch of a part as deltas of bearable length, the first beginning at offset `start`."""
    for at in range(0, len(text), MAX_DELTA_CHARS):
        piece = text[at : at + MAX_DELTA_CHARS]
        yield Delta(f"{prefix}{start + at + len(piece)}", part_index, kind, piece)


def replay(message_id: UUID, parts: list[Part], offset: int, attempt: int = 1) -> Iterator[ContentEvent]:
    """What follows an offset of a stored message: the same events that a live buffer of these parts would give.

    Raises:
        CursorAheadError: the offset lies behind the end.
    """
    prefix = cursor_prefix(message_id, attempt)
    start = 0
    for index, part in enumerate(parts):
        end = start + part_length(part)
        if end > offset:
            if isinstance(part, TextPart | ReasoningPart):
                kind: DeltaKind = "TEXT" if isinstance(part, TextPart) else "REASONING"
                begin = max(offset, start)
                yield from split_text(prefix, begin, index, kind, part.text[begin - start :])
            else:
                yield PartAdded(f"{prefix}{end}", index, part)
        start = end
    if offset > start:
        raise CursorAheadError


def parts_of(events: list[ContentEvent]) -> list[Part]:
    """The parts that a run of events from an offset on makes; the first may continue a part begun before it."""
    parts: list[Part] = []
    texts: list[str] = []
    current: Delta | None = None
    for event in events:
        if current is not None and (isinstance(event, PartAdded) or event.part_index != current.part_index):
            parts.append(_text_part(current, texts))
            current, texts = None, []
        if isinstance(event, PartAdded):
            parts.append(event.part)
        else:
            current = event
            texts.append(event.text)
    if current is not None:
        parts.append(_text_part(current, texts))
    return parts


def _text_part(delta: Delta, texts: list[str]) -> Part:
    text = "".join(texts)
    return TextPart(text) if delta.kind == "TEXT" else ReasoningPart(text)


def join_parts(stretches: list[list[Part]]) -> list[Part]:
    """The parts behind consecutive stretches of one answer: text that continues is joined to what it continues.

    Two parts of the same kind never follow each other in a buffer, so a stretch that begins with the kind that the one
    before ended with continues it.
    """
    joined: list[Part] = []
    for stretch in stretches:
        for part in stretch:
            last = joined[-1] if joined else None
            if isinstance(part, TextPart) and isinstance(last, TextPart):
                joined[-1] = TextPart(last.text + part.text)
            elif isinstance(part, ReasoningPart) and isinstance(last, ReasoningPart):
                joined[-1] = ReasoningPart(last.text + part.text)
            else:
                joined.append(part)
    return joined
