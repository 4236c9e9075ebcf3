"""Rows as the services hand them up: frozen, typed, without a connection behind them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from functools import lru_cache
from operator import itemgetter
from typing import Any, ClassVar, Self
from uuid import UUID

import asyncpg
import orjson

from models.parts import Part, SharedPart, parts_from_json, shared_parts_from_json, text_from_json


class MessageRole(StrEnum):
    """Who speaks."""

    USER = "USER"
    ASSISTANT = "ASSISTANT"
    SYSTEM = "SYSTEM"


class MessageStatus(StrEnum):
    """Where a message stands. Every status but STREAMING is final."""

    STREAMING = "STREAMING"
    COMPLETE = "COMPLETE"
    STOPPED = "STOPPED"
    FAILED = "FAILED"
    INTERRUPTED = "INTERRUPTED"


@dataclass(frozen=True, slots=True)
class MessageFailure:
    """Why an answer is not whole: a code for programs, a sentence for people, seconds until a retry makes sense."""

    code: str
    message: str
    retry_after: int | None = None


@dataclass(frozen=True, slots=True)
class MessageTokens:
    """What a generation consumed, in tokens; `estimated` where the provider did not report it."""

    prompt: int
    completion: int
    reasoning: int
    cached: int
    estimated: bool


class RowRecord:
    """The columns of a row by their names, in the order in which a subclass declares them.

    Two things are one: what asyncpg read, where a statement that selects just these columns (others may follow them) is
    asked for `fetched`; and a tuple of them, where they were found otherwise. Nothing is copied of what asyncpg read,
    and what knows the order may ask for a column by its place: a plan does, for each field of hundreds of rows.

    Where only some columns were asked for, times are the JSON that they are written as (`written_time`).
    """

    __slots__ = ()
    columns: ClassVar[tuple[str, ...]] = ()
    fetched: ClassVar[type[Any]]
    """To be given to asyncpg's `fetch` as its `record_class`."""
    _made: ClassVar[type[Any]]

    def __init_subclass__(cls) -> None:
        if RowRecord not in cls.__bases__:
            return
        cls.columns = tuple(cls.__annotations__)
        for place, name in enumerate(cls.columns):
            setattr(cls, name, property(itemgetter(place)))
        cls.fetched = type(cls.__name__, (cls, asyncpg.Record), {"__slots__": ()})
        cls._made = type(cls.__name__, (cls, tuple), {"__slots__": ()})

    @classmethod
    def of(cls, values: Iterable[Any]) -> Self:
        """From the columns, all and in order."""
        made: Self = tuple.__new__(cls._made, values)
        return made

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """From a row with columns of these names, in any order and among others."""
        return cls.of([row[name] for name in cls.columns])


class ThreadRecord(RowRecord):
    """A row of `threads`."""

    __slots__ = ()
    id: UUID
    owner_id: UUID
    title: str
    pinned: bool
    archived: bool
    temporary: bool
    project_id: UUID | None
    expires_at: datetime | None
    created_at: datetime
    updated_at: datetime


THREAD_COLUMNS = ", ".join(ThreadRecord.columns)


class ProjectRecord(RowRecord):
    """A row of `projects`."""

    __slots__ = ()
    id: UUID
    owner_id: UUID
    name: str
    description: str | None
    color: str | None
    icon: str | None
    prompt: str | None
    default_model: str | None
    archived: bool
    thread_count: int
    created_at: datetime
    updated_at: datetime


PROJECT_COLUMNS = ", ".join(ProjectRecord.columns)


_ROLES = dict(MessageRole.__members__)
_STATUSES = dict(MessageStatus.__members__)

MESSAGE_COLUMNS = (
    "id, role, parts, created_at, status, depth, thread_id, parent_id, updated_at, model, owner_id, error_code, "
    "error_message, error_retry_after, prompt_tokens, completion_tokens, reasoning_tokens, cached_tokens, "
    "tokens_estimated, duration_ms, attempt"
)
MESSAGE_COLUMNS_BUT_PARTS = ", ".join(name for name in MESSAGE_COLUMNS.split(", ") if name != "parts")
# As `text_from_json`. Most messages have one part, and are not taken apart.
_MESSAGE_TEXT = """
CASE WHEN jsonb_array_length({0}.parts) = 1 AND {0}.parts -> 0 ->> 'type' = 'text' THEN {0}.parts -> 0 ->> 'text'
ELSE (SELECT coalesce(string_agg(part ->> 'text', '' ORDER BY place) FILTER (WHERE part ->> 'type' = 'text'), '')
    FROM jsonb_array_elements({0}.parts) WITH ORDINALITY AS each (part, place)) END
"""


class MessageRecord(RowRecord):
    """A row of `messages`. What is more than a column is made whenever it is asked for.

    What is asked for most comes first: columns behind the last that is wanted are left out.

    Attributes:
        read_text: the text, where it was read in place of the parts; None elsewhere.
    """

    __slots__ = ()
    id: UUID
    role_name: str
    parts_json: str
    read_text: str | None
    created_at: datetime
    status_name: str
    depth: int
    thread_id: UUID
    parent_id: UUID | None
    updated_at: datetime
    model: str | None
    owner_id: UUID
    error_code: str | None
    error_message: str | None
    error_retry_after: int | None
    prompt_tokens: int | None
    completion_tokens: int
    reasoning_tokens: int
    cached_tokens: int
    tokens_estimated: bool
    duration_ms: int | None
    attempt: int

    @property
    def role(self) -> MessageRole:
        """Who speaks."""
        return _ROLES[self.role_name]

    @property
    def status(self) -> MessageStatus:
        """Where it stands."""
        return _STATUSES[self.status_name]

    @property
    def failure(self) -> MessageFailure | None:
        """Why it is not whole, where it is not."""
        if self.error_code is None:
            return None
        return MessageFailure(self.error_code, self.error_message or "", self.error_retry_after)

    @property
    def tokens(self) -> MessageTokens | None:
        """What it consumed, where that is known."""
        if self.prompt_tokens is None:
            return None
        return MessageTokens(
            self.prompt_tokens,
            self.completion_tokens,
            self.reasoning_tokens,
            self.cached_tokens,
            self.tokens_estimated,
        )

    @property
    def parts(self) -> list[Part]:
        """The parts in order."""
        return parts_from_json(self.parts_json)

    @property
    def text(self) -> str:
        """The text parts, joined."""
        return text_from_json(self.parts_json) if self.read_text is None else self.read_text

    @property
    def ended(self) -> bool:
        """Whether the status is final."""
        return self.status is not MessageStatus.STREAMING

    @classmethod
    def from_row(cls, row: Mapping[str, Any], parts_json: str | None = None) -> Self:
        """From a row with columns of the table's names; `parts_json` where the row was selected without its parts."""
        columns = [
            parts_json if name == "parts" and parts_json is not None else None if name is None else row[name]
            for name in _MESSAGE_NAMES
        ]
        return cls.of(columns)


# The table's, in the order of the record's.
_TEXT = MessageRecord.columns.index("read_text")
_MESSAGE_NAMES: list[str | None] = [*MESSAGE_COLUMNS.split(", ")]
_MESSAGE_NAMES.insert(_TEXT, None)


def _wanted_columns(
    alias: str, fields: Sequence[str], columns: Sequence[str | None], wanted: frozenset[str] | None
) -> list[str]:
    """The columns `alias.…` of a row; half of a page's time was to decode those that nobody wants.

    Args:
        wanted: the fields of the row that will be looked at; None: all.
    """
    if wanted is None:
        return ["NULL" if column is None else f"{alias}.{column}" for column in columns]
    return [
        "NULL" if column is None or name not in wanted else _read_as(column).format(f"{alias}.{column}")
        for name, column in zip(fields, columns, strict=True)
    ]


def _read_as(column: str) -> str:
    # asyncpg makes a datetime of a difference added to an epoch: two thirds of what it took to read a message.
    return "to_json({})" if column in _TIMES else "{}"


_TIMES = frozenset({"created_at", "updated_at", "expires_at"})


def written_time(value: datetime | str | None) -> datetime | orjson.Fragment | None:
    """A time of a row as orjson is to write it, where it was read as JSON: with six digits behind the second, or none.

    PostgreSQL leaves zeros at the end out.
    """
    if not isinstance(value, str):
        return value
    second, dot, rest = value.partition(".")
    return orjson.Fragment(f"{second}.{rest[:-_ZONE]:0<6}{rest[-_ZONE:]}" if dot else value)


def time_of(value: datetime | str) -> datetime:
    """A time of a row, however it was read."""
    return datetime.fromisoformat(value.strip('"')) if isinstance(value, str) else value


_ZONE = len('+00:00"')
WRITTEN_TIME_CHARS = len('"2026-01-01T00:00:00.000000+00:00"')
"""Of a time that needs no zeros."""


@lru_cache(maxsize=256)
def message_columns(wanted: frozenset[str] | None, alias: str = "m") -> tuple[str, ...]:
    """The columns `m.…` of a message up to the last that is wanted, others before it as NULL.

    The text is read as such where it is wanted and the parts are not.
    """
    columns = _wanted_columns(alias, MessageRecord.columns, _MESSAGE_NAMES, wanted)
    if wanted is not None and "read_text" in wanted and "parts_json" not in wanted:
        columns[_TEXT] = _MESSAGE_TEXT.format(alias)
    return tuple(_trimmed(columns))


def thread_columns(wanted: frozenset[str] | None, *, whole: bool) -> str:
    """The columns `t.…` of a thread up to the last that is wanted, others before it as NULL.

    Args:
        whole: whether they are followed by what has its place behind all of them.
    """
    columns = _wanted_columns("t", ThreadRecord.columns, ThreadRecord.columns, wanted)
    return ", ".join(columns if whole else _trimmed(columns))


def _trimmed(columns: list[str]) -> list[str]:
    while len(columns) > 1 and columns[-1] == "NULL":
        columns.pop()
    return columns


def project_columns(wanted: frozenset[str]) -> str:
    """The columns `p.…` of a project, those that nobody wants as NULL."""
    return ", ".join(_wanted_columns("p", ProjectRecord.columns, ProjectRecord.columns, wanted))


@dataclass(frozen=True, slots=True)
class ShareRecord:
    """A row of `shares`, as its owner sees it. Whoever has the token reads the snapshot, so it is in no log."""

    id: UUID
    thread_id: UUID
    token: str = field(repr=False)
    title: str
    includes_attachments: bool
    expires_at: datetime | None
    created_at: datetime
    message_count: int

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> ShareRecord:
        """From a row selected with `SHARE_COLUMNS` and `message_count`."""
        return cls(
            row["id"],
            row["thread_id"],
            row["token"],
            row["title"],
            row["includes_attachments"],
            row["expires_at"],
            row["created_at"],
            row["message_count"],
        )


SHARE_COLUMNS = "id, thread_id, token, title, includes_attachments, expires_at, created_at"


@dataclass(frozen=True, slots=True)
class SharedThreadRecord:
    """A row of `shares`, as anybody with the token sees it: no id, no owner, no thread."""

    token: str = field(repr=False)
    title: str
    includes_attachments: bool
    expires_at: datetime | None
    created_at: datetime

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> SharedThreadRecord:
        """From a row with columns of these names."""
        return cls(row["token"], row["title"], row["includes_attachments"], row["expires_at"], row["created_at"])


@dataclass(frozen=True)
class SharedMessageRecord:
    """A row of `share_messages`. The parts are decoded when first asked for."""

    position: int
    role: MessageRole
    status: MessageStatus
    parts_json: str
    model: str | None
    created_at: datetime

    @property
    def parts(self) -> list[SharedPart]:
        """The parts in order."""
        return shared_parts_from_json(self.parts_json)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> SharedMessageRecord:
        """From a row with columns of these names."""
        return cls(
            row["position"],
            MessageRole(row["role"]),
            MessageStatus(row["status"]),
            row["parts"],
            row["model"],
            row["created_at"],
        )


class AttachmentState(StrEnum):
    """Where an attachment stands: its bytes are awaited, there, or referred to by a message."""

    RESERVED = "RESERVED"
    STORED = "STORED"
    LINKED = "LINKED"


@dataclass(frozen=True, slots=True)
class AttachmentRecord:
    """A row of `attachments`, with the storage key of its blob (None: reserved only)."""

    id: UUID
    owner_id: UUID
    state: AttachmentState
    name: str
    content_type: str
    size: int
    tokens: int | None
    pages: int | None
    width: int | None
    height: int | None
    created_at: datetime
    key: str | None

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> AttachmentRecord:
        """From a row selected with `ATTACHMENT_COLUMNS` from `attachments a LEFT JOIN blobs b`."""
        return cls(
            row["id"],
            row["owner_id"],
            AttachmentState(row["state"]),
            row["name"],
            row["content_type"],
            row["size"],
            row["tokens"],
            row["pages"],
            row["width"],
            row["height"],
            row["created_at"],
            row["key"],
        )


ATTACHMENT_COLUMNS = (
    "a.id, a.owner_id, a.state, a.name, a.content_type, a.size, a.tokens, a.pages, a.width, a.height, a.created_at, "
    "b.key"
)
