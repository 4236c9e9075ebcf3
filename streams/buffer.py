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
from typing import NamedTuple, TypeAlias, cast
from uuid import UUID
from weakref import WeakKeyDictionary

from models.parts import DeltaKind, Part, ReasoningPart, TextPart, part_length
from models.records import MessageRecord
from streams.cursor import CursorAheadError, cursor_prefix, end_cursor

# A frame of more characters is cut in two, so that one catch-up cannot make a message that proxies refuse.
MAX_DELTA_CHARS = 262_144
# So many pieces of a part are joined to one, once: memory stays at the text and some hundred bytes for each 32 tokens
# instead of a hundred for each token.
JOINED_PIECES = 32


class Delta(NamedTuple):
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
        # Pieces of text and whole parts, and at which offset each begins.
        self._entries: list[str | PartAdded] = []
        self._starts: list[int] = []
        # Of each part: its first entry, and its kind where it is text.
        self._firsts: list[int] = []
        self._kinds: list[DeltaKind | None] = []
        self._kind: DeltaKind | None = None
        # How many pieces of the part that grows are not joined yet.
        self._loose = 0
        # The last piece, once somebody at the tail has asked for it.
        self._tail: Delta | None = None
        self._signatures: dict[int, str] = {}
        self._unsigned = False
        self._joined = 0
        # No set: an empty one takes three times as much of each answer.
        self._waiters: dict[asyncio.Future[None], None] = {}
        # In the order in which they came; and as they are called, None where that changed.
        self._followers: dict[Callable[[], None], None] = {}
        self._called: tuple[Callable[[], None], ...] | None = ()
        self._teller: _Teller | None = None
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
            self._begin_part(kind)
        elif self._loose >= JOINED_PIECES:
            self._join_pieces()
        if self._signatures and len(self._firsts) - 1 in self._signatures:
            self._unsigned = True
        self._starts.append(self.length)
        self._entries.append(text)
        self.length += len(text)
        self._tail = None
        self._loose += 1
        if self._loose == 1:
            # The first of those that will be joined: a clock for each is too much.
            self._time()
        self._wake()

    def append_part(self, part: Part) -> None:
        """Add a part that appears whole."""
        assert not isinstance(part, TextPart | ReasoningPart), "text grows by append_text"
        self._begin_part(None)
        self._starts.append(self.length)
        self.length += part_length(part)
        self._entries.append(PartAdded(f"{self._prefix}{self.length}", len(self._firsts) - 1, part))
        self._tail = None
        self._time()
        self._wake()

    def sign(self, signature: str | None) -> None:
        """Mark the reasoning that is being written as signed, just as it is now; None: it cannot be.

        The answer's reasoning can be sent back as a whole or not at all. So there are no signatures any more once one
        has no place: where the part goes on behind it, has one already, or where there is no such part.
        """
        part_index = len(self._firsts) - 1
        if signature is None or self._kind != "REASONING" or part_index in self._signatures:
            self._unsigned = True
        else:
            self._signatures[part_index] = signature

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
        if (delta := self.delta_since(offset)) is not None:
            return [delta]
        if offset == self._starts[-1] and isinstance(last := self._entries[-1], PartAdded):
            return [last]
        return list(self._merged(offset))

    def delta_since(self, offset: int) -> Delta | None:
        """What follows an offset before the end, where all of it is one delta, as it nearly always is; else None."""
        kind, length = self._kind, self.length
        if kind is None or length - offset > MAX_DELTA_CHARS:
            return None
        starts = self._starts
        if offset == starts[-1]:
            if (tail := self._tail) is None:
                text = cast("str", self._entries[-1])
                tail = self._tail = Delta(f"{self._prefix}{length}", len(self._firsts) - 1, kind, text)
            return tail
        if offset < starts[self._firsts[-1]]:
            return None
        first = bisect_right(starts, offset) - 1
        text = self._text(first, len(self._entries))[offset - starts[first] :]
        return Delta(f"{self._prefix}{length}", len(self._firsts) - 1, kind, text)

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
        self._waiters[waiter] = None
        try:
            await waiter
        finally:
            self._waiters.pop(waiter, None)

    def attach(self, tell: Callable[[], None]) -> None:
        """Call this soon after each growth and after the close; what grows before that is told by the same call.

        A call costs a tenth of what waking a task does. It must not raise.
        """
        self._teller = _Teller.of(asyncio.get_running_loop())
        self._followers[tell] = None
        self._called = None

    def detach(self, tell: Callable[[], None]) -> None:
        """Do not call this any more."""
        self._followers.pop(tell, None)
        self._called = None

    def _time(self) -> None:
        self.timed_length, self.timed_at = self.length, time.monotonic()
        if self.begun_at is None:
            self.begun_at = self.timed_at

    def _wake(self) -> None:
        if self._waiters:
            waiters, self._waiters = self._waiters, {}
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)
        if self._followers and not self._telling:
            assert self._teller is not None
            self._telling = True
            self._teller.note(self)

    def to_tell(self) -> tuple[Callable[[], None], ...]:
        """Whom to call now; for what grows from here on they are called once more."""
        self._telling = False
        if (called := self._called) is None:
            called = self._called = tuple(self._followers)
        return called

    def _merged(self, offset: int) -> Iterator[ContentEvent]:
        first = bisect_right(self._starts, offset) - 1
        for index in range(bisect_right(self._firsts, first) - 1, len(self._firsts)):
            kind, begin = self._kinds[index], max(first, self._firsts[index])
            if kind is None:
                entry = self._entries[begin]
                assert isinstance(entry, PartAdded)
                yield entry
                continue
            end = self._firsts[index + 1] if index + 1 < len(self._firsts) else len(self._entries)
            start = max(offset, self._starts[begin])
            text = self._text(begin, end)[start - self._starts[begin] :]
            yield from split_text(self._prefix, start, index, kind, text)

    def _text(self, first: int, end: int) -> str:
        return "".join(cast("list[str]", self._entries[first:end]))

    def _begin_part(self, kind: DeltaKind | None) -> None:
        self._firsts.append(len(self._entries))
        self._kinds.append(kind)
        self._kind = kind
        self._loose = 0

    def _join_pieces(self) -> None:
        """Make one piece of the loose ones. Readers hold offsets, so they do not notice."""
        first = len(self._entries) - self._loose
        self._joined += self._loose - 1
        self._entries[first:] = [self._text(first, len(self._entries))]
        del self._starts[first + 1 :]
        self._loose = 0


class _Teller:
    """Tells of all buffers of a loop that have grown, by one call soon after: a handle for each costs as its event."""

    __slots__ = ("_grown",)

    def __init__(self) -> None:
        self._grown: list[StreamBuffer] = []

    @staticmethod
    def of(loop: asyncio.AbstractEventLoop) -> _Teller:
        """The one of a loop."""
        if (teller := _tellers.get(loop)) is None:
            teller = _tellers[loop] = _Teller()
        return teller

    def note(self, buffer: StreamBuffer) -> None:
        """Tell of it soon."""
        if not self._grown:
            asyncio.get_running_loop().call_soon(self._tell)
        self._grown.append(buffer)

    def _tell(self) -> None:
        grown, self._grown = self._grown, []
        for buffer in grown:
            try:
                for tell in buffer.to_tell():
                    tell()
            except Exception as error:
                told = {"message": "telling of a stream failed", "exception": error}
                asyncio.get_running_loop().call_exception_handler(told)


_tellers: WeakKeyDictionary[asyncio.AbstractEventLoop, _Teller] = WeakKeyDictionary()


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
