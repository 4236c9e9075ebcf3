"""Rows as the services hand them up: frozen, typed, without a connection behind them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from functools import cached_property
from typing import Any
from uuid import UUID

from models.parts import Part, SharedPart, parts_from_json, parts_text, shared_parts_from_json


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


@dataclass(frozen=True, slots=True)
class ThreadRecord:
    """A row of `threads`."""

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

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> ThreadRecord:
        """From a row selected with `THREAD_COLUMNS`."""
        return cls(
            row["id"],
            row["owner_id"],
            row["title"],
            row["pinned"],
            row["archived"],
            row["temporary"],
            row["project_id"],
            row["expires_at"],
            row["created_at"],
            row["updated_at"],
        )


THREAD_COLUMNS = "id, owner_id, title, pinned, archived, temporary, project_id, expires_at, created_at, updated_at"


@dataclass(frozen=True, slots=True)
class ProjectRecord:
    """A row of `projects`."""

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
        """From a row selected with `PROJECT_COLUMNS`."""
        return cls(
            row["id"],
            row["owner_id"],
            row["name"],
            row["description"],
            row["color"],
            row["icon"],
            row["prompt"],
            row["default_model"],
            row["archived"],
            row["thread_count"],
            row["created_at"],
            row["updated_at"],
        )


PROJECT_COLUMNS = (
    "id, owner_id, name, description, color, icon, prompt, default_model, archived, thread_count, created_at, "
    "updated_at"
)


@dataclass(frozen=True)
class MessageRecord:
    """A row of `messages`. The parts are decoded when first asked for."""

    id: UUID
    owner_id: UUID
    thread_id: UUID
    parent_id: UUID | None
    depth: int
    role: MessageRole
    status: MessageStatus
    parts_json: str
    model: str | None
    failure: MessageFailure | None
    tokens: MessageTokens | None
    duration_ms: int | None
    attempt: int
    created_at: datetime
    updated_at: datetime

    @cached_property
    def parts(self) -> list[Part]:
        """The parts in order."""
        return parts_from_json(self.parts_json)

    @cached_property
    def text(self) -> str:
        """The text parts, joined."""
        return parts_text(self.parts)

    @property
    def ended(self) -> bool:
        """Whether the status is final."""
        return self.status is not MessageStatus.STREAMING

    @classmethod
    def from_row(cls, row: Mapping[str, Any], parts_json: str | None = None) -> MessageRecord:
        """From a row selected with `MESSAGE_COLUMNS`; `parts_json` where the row was selected without its parts."""
        failure = None
        if row["error_code"] is not None:
            failure = MessageFailure(row["error_code"], row["error_message"] or "", row["error_retry_after"])
        tokens = None
        if row["prompt_tokens"] is not None:
            tokens = MessageTokens(
                row["prompt_tokens"],
                row["completion_tokens"],
                row["reasoning_tokens"],
                row["cached_tokens"],
                row["tokens_estimated"],
            )
        return cls(
            id=row["id"],
            owner_id=row["owner_id"],
            thread_id=row["thread_id"],
            parent_id=row["parent_id"],
            depth=row["depth"],
            role=MessageRole(row["role"]),
            status=MessageStatus(row["status"]),
            parts_json=row["parts"] if parts_json is None else parts_json,
            model=row["model"],
            failure=failure,
            tokens=tokens,
            duration_ms=row["duration_ms"],
            attempt=row["attempt"],
            created_at=row["created_at"],
            updated_at=row["updated_at"],
        )


MESSAGE_COLUMNS_BUT_PARTS = (
    "id, owner_id, thread_id, parent_id, depth, role, status, model, error_code, error_message, error_retry_after, "
    "prompt_tokens, completion_tokens, reasoning_tokens, cached_tokens, tokens_estimated, duration_ms, attempt, "
    "created_at, updated_at"
)
MESSAGE_COLUMNS = MESSAGE_COLUMNS_BUT_PARTS + ", parts"


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
