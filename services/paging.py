"""Keyset pages: what a connection's arguments mean, and cursors that are positions, not offsets.

After the GraphQL Cursor Connections specification: `first`/`after` walk forwards, `last`/`before` backwards. A cursor
holds the sort key of a row, so a page does not shift when rows before it come or go. Cursors are not signed: a forged
one names another place in the viewer's own list.
"""

from __future__ import annotations

import struct
from base64 import urlsafe_b64decode, urlsafe_b64encode
from binascii import Error as Base64Error
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from math import isfinite
from typing import Generic, TypeVar
from uuid import UUID

from services.errors import BadUserInputError, CursorInvalidError

DEFAULT_PAGE = 25
MAX_PAGE = 100
MAX_NODES = 100
WHETHER_MORE = "whether more"
"""Among the fields of records that are wanted of a page: whether there is a row more, for which one more is read."""

Record = TypeVar("Record")
Position = TypeVar("Position")


@dataclass(frozen=True, slots=True)
class PageRequest(Generic[Position]):
    """A page to fetch: at most `limit` rows behind `after` and before `before`, from the start, or from the end."""

    limit: int
    after: Position | None
    before: Position | None
    backwards: bool

    def rows(self, wanted: frozenset[str] | None) -> int:
        """How many rows to fetch, where these fields of records are wanted; None: all."""
        return self.limit + 1 if wanted is None or WHETHER_MORE in wanted else self.limit


@dataclass(frozen=True, slots=True)
class Page(Generic[Record]):
    """Rows in the order of the list, whichever way they were fetched.

    Whether there are more is known where that was wanted.
    """

    records: list[Record]
    has_next: bool
    has_previous: bool

    @classmethod
    def of(cls, request: PageRequest[Position], fetched: list[Record]) -> Page[Record]:
        """From rows fetched in walking order, one more than the limit where there are more."""
        more = len(fetched) > request.limit
        records = fetched[: request.limit]
        if request.backwards:
            records.reverse()
            return cls(records, has_next=request.before is not None, has_previous=more)
        return cls(records, has_next=more, has_previous=request.after is not None)


def page_request(
    parse: Callable[[str], Position], first: int | None, after: str | None, last: int | None, before: str | None
) -> PageRequest[Position]:
    """What the four arguments ask for.

    Args:
        parse: the cursor parser of this list.

    Raises:
        BadUserInputError: first and last together, or a size outside 1 to 100.
        CursorInvalidError: a cursor that is not one of this list.
    """
    if first is not None and last is not None:
        raise BadUserInputError("Give first or last, not both.", field="last")
    field, size = ("first", first) if last is None else ("last", last)
    if size is not None and not 1 <= size <= MAX_PAGE:
        raise BadUserInputError(f"A page has 1 to {MAX_PAGE} entries.", field=field)
    return PageRequest(
        limit=size or DEFAULT_PAGE,
        after=position_of(parse, after, "after"),
        before=position_of(parse, before, "before"),
        backwards=last is not None,
    )


def position_of(
    parse: Callable[[str], Position], cursor: str | None, field: str, of: str = "this list"
) -> Position | None:
    """The place that a cursor names; None for no cursor.

    Raises:
        CursorInvalidError: it names none.
    """
    if cursor is None:
        return None
    try:
        return parse(cursor)
    except (ValueError, struct.error, OverflowError, Base64Error) as error:
        raise CursorInvalidError(f"This is not a cursor of {of}.", field=field) from error


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class ThreadPosition:
    """A place in the list of threads."""

    pinned: bool
    updated_at: datetime
    id: UUID

    _FORM = struct.Struct(">cBq16s")

    def cursor(self) -> str:
        """The cursor of this place."""
        micros = (self.updated_at - _EPOCH) // _MICROSECOND
        return _encode(self._FORM.pack(b"T", self.pinned, micros, self.id.bytes))

    @classmethod
    def parse(cls, cursor: str) -> ThreadPosition:
        """The place behind a cursor; ValueError or struct.error where there is none."""
        kind, pinned, micros, key = cls._FORM.unpack(_decode(cursor))
        if kind != b"T" or pinned > 1:
            raise ValueError(cursor)
        return cls(bool(pinned), _EPOCH + timedelta(microseconds=micros), UUID(bytes=key))


@dataclass(frozen=True, slots=True)
class AgePosition:
    """A place in a list of objects by their age: keys are UUIDv7, so the key is the age."""

    id: UUID

    _FORM = struct.Struct(">c16s")

    def cursor(self) -> str:
        """The cursor of this place."""
        return _encode(self._FORM.pack(b"A", self.id.bytes))

    @classmethod
    def parse(cls, cursor: str) -> AgePosition:
        """The place behind a cursor; ValueError or struct.error where there is none."""
        kind, key = cls._FORM.unpack(_decode(cursor))
        if kind != b"A":
            raise ValueError(cursor)
        return cls(UUID(bytes=key))


@dataclass(frozen=True, slots=True)
class SharedPosition:
    """A place in a shared thread: the message's position in the snapshot."""

    position: int

    _FORM = struct.Struct(">cI")

    def cursor(self) -> str:
        """The cursor of this place."""
        return _encode(self._FORM.pack(b"L", self.position))

    @classmethod
    def parse(cls, cursor: str) -> SharedPosition:
        """The place behind a cursor; ValueError or struct.error where there is none."""
        kind, position = cls._FORM.unpack(_decode(cursor))
        if kind != b"L" or position > 2**31 - 1:
            raise ValueError(cursor)
        return cls(position)


@dataclass(frozen=True, slots=True)
class FeedPosition:
    """A place in a viewer's feed: the last change seen. `whose` is the half of the viewer's key that is random."""

    whose: bytes
    change_id: int

    _FORM = struct.Struct(">c8sq")

    def cursor(self) -> str:
        """The cursor of this place."""
        return _encode(self._FORM.pack(b"F", self.whose, self.change_id))

    @classmethod
    def parse(cls, cursor: str) -> FeedPosition:
        """The place behind a cursor; ValueError or struct.error where there is none."""
        kind, whose, change_id = cls._FORM.unpack(_decode(cursor))
        if kind != b"F" or change_id < 0:
            raise ValueError(cursor)
        return cls(whose, change_id)


@dataclass(frozen=True, slots=True)
class SearchPosition:
    """A place in what a search found. `search` tells searches apart: a place in one means nothing in another."""

    search: bytes
    rank: float
    id: UUID

    _FORM = struct.Struct(">c4sf16s")

    def cursor(self) -> str:
        """The cursor of this place. The rank is PostgreSQL's `real`, which four bytes hold as it is."""
        return _encode(self._FORM.pack(b"S", self.search, self.rank, self.id.bytes))

    @classmethod
    def parse(cls, cursor: str) -> SearchPosition:
        """The place behind a cursor; ValueError or struct.error where there is none."""
        kind, search, rank, key = cls._FORM.unpack(_decode(cursor))
        if kind != b"S" or not isfinite(rank):
            raise ValueError(cursor)
        return cls(search, rank, UUID(bytes=key))


# Keys that no row reaches.
FIRST_ID = UUID(int=0)
LAST_ID = UUID(int=2**128 - 1)


@dataclass(frozen=True, slots=True)
class PathPosition:
    """A place on a thread's active path: how deep it is in the tree."""

    depth: int

    _FORM = struct.Struct(">cI")

    def cursor(self) -> str:
        """The cursor of this place."""
        return _encode(self._FORM.pack(b"M", self.depth))

    @classmethod
    def parse(cls, cursor: str) -> PathPosition:
        """The place behind a cursor; ValueError or struct.error where there is none."""
        kind, depth = cls._FORM.unpack(_decode(cursor))
        if kind != b"M" or depth > 2**31 - 1:
            raise ValueError(cursor)
        return cls(depth)


@dataclass(frozen=True, slots=True)
class AttachmentPosition:
    """A place in the list of attachments, by age: the time is the head of the id."""

    id: UUID

    _FORM = struct.Struct(">c16s")

    def cursor(self) -> str:
        """The cursor of this place."""
        return _encode(self._FORM.pack(b"A", self.id.bytes))

    @classmethod
    def parse(cls, cursor: str) -> AttachmentPosition:
        """The place behind a cursor; ValueError or struct.error where there is none."""
        kind, key = cls._FORM.unpack(_decode(cursor))
        if kind != b"A":
            raise ValueError(cursor)
        return cls(UUID(bytes=key))


def _encode(packed: bytes) -> str:
    return urlsafe_b64encode(packed).rstrip(b"=").decode()


def _decode(cursor: str) -> bytes:
    if len(cursor) > 64 or not cursor.isascii():
        raise ValueError("too long")
    packed = urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4))
    if _encode(packed) != cursor:
        raise ValueError("another spelling")
    return packed
