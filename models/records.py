"""Rows as the services hand them up: frozen, typed, without a connection behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum, StrEnum
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple, TypeVar
from uuid import UUID

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


class _ThreadRow(NamedTuple):
    """The columns as they are, in the order of `THREAD_COLUMNS`."""

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


THREAD_COLUMNS = ", ".join(_ThreadRow._fields)

Row = TypeVar("Row", bound=tuple[Any, ...])


def row_maker(kind: type[Row]) -> Callable[[Iterable[Any]], Row]:
    """What makes rows of a kind from their columns, all and in order, in a third of the time of its `_make`."""
    return partial(tuple.__new__, kind)


class ProjectRecord(NamedTuple):
    """A row of `projects`. `_make` takes one that has just `PROJECT_COLUMNS`."""

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

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> ProjectRecord:
        """From a row with columns of these names."""
        return cls._make([row[name] for name in cls._fields])


PROJECT_COLUMNS = ", ".join(ProjectRecord._fields)


class NotRead(Enum):
    """In the place of what was not read."""

    NOT_READ = 0


NOT_READ = NotRead.NOT_READ


class ThreadRecord(_ThreadRow):
    """A row of `threads`. `_make` takes one that has just `THREAD_COLUMNS`, in a tenth of the time of `from_row`.

    Attributes:
        project: its project; `NOT_READ` where that was not read with it.
    """

    project: ProjectRecord | NotRead | None = NOT_READ

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> ThreadRecord:
        """From a row with columns of these names."""
        return cls._make([row[name] for name in cls._fields])


_ROLES = dict(MessageRole.__members__)
_STATUSES = dict(MessageStatus.__members__)


class _MessageRow(NamedTuple):
    """The columns as they are, in the order of `MESSAGE_COLUMNS`."""

    id: UUID
    owner_id: UUID
    thread_id: UUID
    parent_id: UUID | None
    depth: int
    role_name: str
    status_name: str
    model: str | None
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
    created_at: datetime
    updated_at: datetime
    parts_json: str


MESSAGE_COLUMNS_BUT_PARTS = (
    "id, owner_id, thread_id, parent_id, depth, role, status, model, error_code, error_message, error_retry_after, "
    "prompt_tokens, completion_tokens, reasoning_tokens, cached_tokens, tokens_estimated, duration_ms, attempt, "
    "created_at, updated_at"
)
MESSAGE_COLUMNS = MESSAGE_COLUMNS_BUT_PARTS + ", parts"
_MESSAGE_COLUMNS_BUT_PARTS = MESSAGE_COLUMNS_BUT_PARTS.split(", ")


def wanted_columns(alias: str, fields: Sequence[str], columns: str, wanted: frozenset[str] | None) -> str:
    """The columns `alias.…` of a row, those that nobody wants as NULL: half of a page's time was to decode them.

    Args:
        wanted: the fields of the row that will be looked at; None: all.
    """
    return ", ".join(
        f"{alias}.{column}" if wanted is None or name in wanted else "NULL"
        for name, column in zip(fields, columns.split(", "), strict=True)
    )


@lru_cache(maxsize=256)
def message_columns(wanted: frozenset[str] | None) -> str:
    """The columns `m.…` of a message, see `wanted_columns`."""
    return wanted_columns("m", _MessageRow._fields, MESSAGE_COLUMNS, wanted)


def thread_columns(wanted: frozenset[str] | None) -> str:
    """The columns `t.…` of a thread, see `wanted_columns`."""
    return wanted_columns("t", _ThreadRow._fields, THREAD_COLUMNS, wanted)


def project_columns(wanted: frozenset[str]) -> str:
    """The columns `p.…` of a project, see `wanted_columns`."""
    return wanted_columns("p", ProjectRecord._fields, PROJECT_COLUMNS, wanted)


class MessageRecord(_MessageRow):
    """A row of `messages`. What is more than a column is made when it is asked for.

    `_make` takes a row that has just `MESSAGE_COLUMNS`.
    """

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

    @cached_property
    def parts(self) -> list[Part]:
        """The parts in order."""
        return parts_from_json(self.parts_json)

    @property
    def text(self) -> str:
        """The text parts, joined."""
        return text_from_json(self.parts_json)

    @property
    def ended(self) -> bool:
        """Whether the status is final."""
        return self.status is not MessageStatus.STREAMING

    @classmethod
    def from_row(cls, row: Mapping[str, Any], parts_json: str | None = None) -> MessageRecord:
        """From a row with columns of these names; `parts_json` where the row was selected without its parts."""
        columns = [row[name] for name in _MESSAGE_COLUMNS_BUT_PARTS]
        return cls._make([*columns, row["parts"] if parts_json is None else parts_json])


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

    @cached_property
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
