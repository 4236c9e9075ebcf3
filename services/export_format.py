"""The file of an account: which members it has, and how a row becomes a line and a line a row (docs/account-data.md).

One `Shape` a member serves both directions, so that what is written can be read. Ids are spelt as the API spells them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from typing import Any, Protocol
from uuid import UUID

import orjson

from models.parts import parts_from_json, parts_to_json
from models.prices import MAX_PRICE
from models.records import MessageRole, MessageStatus
from models.text import is_storable, storable_json
from providers.base import FailureCode
from services.custom_providers import ABILITIES, FORMATS, SLUG

FORMAT = "threadgraph-export"
VERSION = 2
MANIFEST = "manifest.json"
# A member of more than this goes on in the next: none needs the 64-bit fields that some programs cannot read.
MEMBER_BYTES = 1_500_000_000

ERROR_CODES = frozenset(FailureCode) | {
    "ATTACHMENT_UNAVAILABLE",
    "PROVIDER_HUNG_UP",
    "EMPTY_ANSWER",
    "CONTENT_FILTERED",
    "PROVIDER_TIMEOUT",
    "OUTPUT_LIMIT",
    "BUDGET_EXCEEDED",
    "SERVER_SHUTDOWN",
    "SERVER_LOST",
    "INTERNAL_SERVER_ERROR",
}
COLORS = frozenset({"GRAY", "RED", "ORANGE", "YELLOW", "GREEN", "TEAL", "BLUE", "PURPLE", "PINK"})
ENDED = frozenset(MessageStatus) - {MessageStatus.STREAMING}
_MAX_INT = 2**31 - 1
_MAX_BIGINT = 2**63 - 1
# The most that the most tokens of one answer, prompt and completion, come to.
_MAX_COST = 2 * _MAX_INT * MAX_PRICE // 1_000_000
_MODEL_BYTES = 4_000
_EARLIEST, _LATEST = datetime(1970, 1, 1, tzinfo=UTC), datetime(9000, 1, 1, tzinfo=UTC)


class LineError(ValueError):
    """A line is not what it should be; the text is a sentence for people that repeats nothing of the line."""


class Kind(Protocol):
    """A kind of value: as it is in a row, and as it is in a line."""

    def written(self, value: Any) -> Any:
        """The line's form of a row's value."""
        ...

    def read(self, value: Any) -> Any:
        """The row's form of a line's value.

        Raises:
            LineError: it is none; the text begins with a verb and follows the field's name.
        """
        ...


@dataclass(frozen=True, slots=True)
class Text:
    """A text of at most so many bytes of UTF-8, that can be stored."""

    max_bytes: int

    def written(self, value: str) -> str:
        """As it is."""
        return value

    def read(self, value: Any) -> str:
        """See `Kind.read`."""
        if not isinstance(value, str) or not is_storable(value):
            raise LineError("is not a text that can be stored")
        if len(value.encode()) > self.max_bytes:
            raise LineError(f"is longer than {self.max_bytes} bytes")
        return value


@dataclass(frozen=True, slots=True)
class OneOf:
    """One of a few words."""

    words: frozenset[str]

    def written(self, value: str) -> str:
        """As it is."""
        return value

    def read(self, value: Any) -> str:
        """See `Kind.read`."""
        if not isinstance(value, str) or value not in self.words:
            raise LineError("is not one of " + ", ".join(sorted(self.words)))
        return str(value)


@dataclass(frozen=True, slots=True)
class Slug:
    """A text of a fixed form."""

    form: re.Pattern[str]

    def written(self, value: str) -> str:
        """As it is."""
        return value

    def read(self, value: Any) -> str:
        """See `Kind.read`."""
        if not isinstance(value, str) or self.form.fullmatch(value) is None:
            raise LineError("has not the form that it should have")
        return value


@dataclass(frozen=True, slots=True)
class Words:
    """Some of a few words, each once, in their order."""

    words: tuple[str, ...]

    def written(self, value: list[str]) -> list[str]:
        """As they are."""
        return value

    def read(self, value: Any) -> list[str]:
        """See `Kind.read`."""
        if not isinstance(value, list) or value != [word for word in self.words if word in value]:
            raise LineError("is not a list of some of " + ", ".join(self.words) + ", in this order")
        return list(value)


class Flag:
    """True or false."""

    def written(self, value: bool) -> bool:
        """As it is."""
        return value

    def read(self, value: Any) -> bool:
        """See `Kind.read`."""
        if not isinstance(value, bool):
            raise LineError("is neither true nor false")
        return value


@dataclass(frozen=True, slots=True)
class Count:
    """A whole number from 0 on, or from another."""

    highest: int = _MAX_INT
    lowest: int = 0

    def written(self, value: int) -> int:
        """As it is."""
        return value

    def read(self, value: Any) -> int:
        """See `Kind.read`."""
        if not isinstance(value, int) or isinstance(value, bool) or not self.lowest <= value <= self.highest:
            raise LineError(f"is not a whole number from {self.lowest} to {self.highest}")
        return value


class Time:
    """A point in time, in UTC, to the microsecond."""

    def written(self, value: datetime) -> str:
        """After RFC 3339."""
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")

    def read(self, value: Any) -> datetime:
        """See `Kind.read`."""
        try:
            time = datetime.fromisoformat(value)
        except (TypeError, ValueError):
            time = _LATEST
        if time.tzinfo is None or not _EARLIEST <= time < _LATEST:
            raise LineError("is not a time such as 2026-01-31T12:00:00Z")
        return time


class Refers(Enum):
    """What an id stands for: the line itself, a line that must be there, or what may be gone."""

    OWN = "own"
    FILE = "file"
    FREE = "free"


@dataclass(frozen=True, slots=True)
class Id:
    """An id of the API's form, `<noun>_<32 lower-case hex digits>`."""

    noun: str
    refers: Refers = Refers.FILE

    def written(self, value: UUID) -> str:
        """As the API shows it."""
        return f"{self.noun}_{value.hex}"

    def read(self, value: Any) -> UUID:
        """See `Kind.read`."""
        if not isinstance(value, str) or re.fullmatch(rf"{self.noun}_[0-9a-f]{{32}}", value, re.ASCII) is None:
            raise LineError(f"is not the id of a {self.noun}")
        return UUID(hex=value[-32:])


_ATTACHMENT = Id("attachment", Refers.FREE)


def _with_attachment(part: dict[str, Any], spelt: Callable[[Any], str]) -> dict[str, Any]:
    """A part with the id of its attachment, if it is a file, spelt otherwise."""
    if part["type"] != "file":
        return part
    return part | {"attachmentId": spelt(part["attachmentId"])}


class Parts:
    """The parts of a message, in their stored form."""

    def written(self, value: str) -> Any:
        """As they are stored, but for the spelling of ids."""
        if '"attachmentId"' not in value:
            return orjson.Fragment(value)
        return [_with_attachment(part, lambda key: _ATTACHMENT.written(UUID(hex=key))) for part in orjson.loads(value)]

    def read(self, value: Any) -> str:
        """See `Kind.read`."""
        if not isinstance(value, list):
            raise LineError("is not a list of parts")
        for part in value:
            if not isinstance(part, dict) or not _is_part(part):
                raise LineError("has a part that is none")
        if storable_json(value) != value:
            raise LineError("has a text that cannot be stored, or is nested too deeply")
        # Through the parts themselves: what cannot be read later is found now.
        parts = [_with_attachment(part, lambda given: _ATTACHMENT.read(given).hex) for part in value]
        return parts_to_json(parts_from_json(orjson.dumps(parts)))


_PART_FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "text": {"text": (str,)},
    "reasoning": {"text": (str,)},
    "tool": {"callId": (str,), "name": (str,), "arguments": (object,), "result": (object,)},
    "source": {"url": (str,), "title": (str, type(None))},
    "file": {"attachmentId": (str,), "name": (str,), "contentType": (str,), "size": (int,)},
}


# Those that a part has only where there is something to say.
_OPTIONAL_PART_FIELDS: dict[str, dict[str, tuple[type, ...]]] = {"reasoning": {"signature": (str,)}}


def _is_part(part: dict[str, Any]) -> bool:
    kind = part.get("type")
    fields = _PART_FIELDS.get(kind) if isinstance(kind, str) else None
    if fields is None:
        return False
    fields = fields | {name: types for name, types in _OPTIONAL_PART_FIELDS.get(str(kind), {}).items() if name in part}
    if part.keys() != fields.keys() | {"type"}:
        return False
    return all(isinstance(part[name], types) for name, types in fields.items()) and part.get("text") != ""


@dataclass(frozen=True, slots=True)
class Field:
    """A value of a line and the column it comes from and goes to; null in files of versions before `since`."""

    name: str
    column: str
    kind: Kind
    nullable: bool = False
    since: int = 1


@dataclass(frozen=True)
class Shape:
    """A member of the file: lines of one table's rows. `name` is the member's, without `.ndjson`."""

    name: str
    table: str
    fields: tuple[Field, ...]
    since: int = 1

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the fields, in order."""
        return tuple(field.column for field in self.fields)

    def line(self, row: Mapping[str, Any]) -> bytes:
        """A row as a line."""
        values = {
            field.name: None if row[field.column] is None else field.kind.written(row[field.column])
            for field in self.fields
        }
        return orjson.dumps(values, option=orjson.OPT_APPEND_NEWLINE)

    def row(self, line: bytes, version: int = VERSION) -> dict[str, Any]:
        """A line of a file of this version as the values of a row, ids as the file has them.

        Raises:
            LineError: it is none of this member's.
        """
        try:
            values = orjson.loads(line)
        except orjson.JSONDecodeError:
            values = None
        if not isinstance(values, dict):
            raise LineError("This is not a JSON object.")
        names = [field.name for field in self.fields if field.since <= version]
        if values.keys() != set(names):
            raise LineError("The fields are not those of this version: " + ", ".join(names) + ".")
        row: dict[str, Any] = {}
        for field in self.fields:
            value = values.get(field.name)
            if value is None and field.nullable:
                row[field.column] = None
                continue
            try:
                row[field.column] = field.kind.read(value)
            except LineError as error:
                raise LineError(f"{field.name} {error}.") from error
        return row


_TITLE = Text(4_000)
_MODEL = Text(_MODEL_BYTES)
_ROLE = OneOf(frozenset(MessageRole))
_STATUS = OneOf(ENDED)
_FLAG, _COUNT, _BIG, _TIME, _PARTS = Flag(), Count(), Count(_MAX_BIGINT), Time(), Parts()
_PRICE = Count(MAX_PRICE)
_CREATED, _UPDATED = Field("createdAt", "created_at", _TIME), Field("updatedAt", "updated_at", _TIME)

SETTINGS = Shape(
    "settings",
    "settings",
    (
        Field("defaultModelId", "default_model", _MODEL, nullable=True),
        Field("titleModelId", "title_model", _MODEL, nullable=True, since=2),
        Field("userName", "user_name", Text(4_000), nullable=True, since=2),
        Field("userTraits", "user_traits", Text(40_000), nullable=True, since=2),
        Field("userContext", "user_context", Text(40_000), nullable=True, since=2),
        _CREATED,
        _UPDATED,
    ),
)
# Without their keys: a key is bound to its owner and in no export.
CUSTOM_PROVIDERS = Shape(
    "custom_providers",
    "custom_providers",
    (
        Field("slug", "slug", Slug(SLUG)),
        Field("name", "name", Text(4_000)),
        Field("baseUrl", "base_url", Text(4_000)),
        Field("format", "format", OneOf(frozenset(FORMATS))),
        _CREATED,
        _UPDATED,
    ),
    since=2,
)
CUSTOM_MODELS = Shape(
    "custom_models",
    "custom_models",
    (
        Field("provider", "provider", Text(4_000)),
        Field("vendorName", "vendor_name", Text(4_000)),
        Field("name", "name", Text(4_000)),
        Field("abilities", "abilities", Words(ABILITIES)),
        Field("contextTokens", "context_tokens", Count(lowest=1), nullable=True),
        Field("maxOutputTokens", "max_output_tokens", Count(lowest=1), nullable=True),
        _CREATED,
        _UPDATED,
    ),
    since=2,
)
PROJECTS = Shape(
    "projects",
    "projects",
    (
        Field("id", "id", Id("project", Refers.OWN)),
        Field("name", "name", Text(4_000)),
        Field("description", "description", Text(40_000), nullable=True),
        Field("color", "color", OneOf(COLORS), nullable=True),
        Field("icon", "icon", Text(1_000), nullable=True),
        Field("prompt", "prompt", Text(400_000), nullable=True),
        Field("defaultModelId", "default_model", _MODEL, nullable=True),
        Field("archived", "archived", _FLAG),
        _CREATED,
        _UPDATED,
    ),
)
THREADS = Shape(
    "threads",
    "threads",
    (
        Field("id", "id", Id("thread", Refers.OWN)),
        Field("projectId", "project_id", Id("project"), nullable=True),
        Field("title", "title", _TITLE),
        Field("titleSource", "title_source", OneOf(frozenset({"TEXT", "MODEL", "USER"}))),
        Field("pinned", "pinned", _FLAG),
        Field("archived", "archived", _FLAG),
        Field("temporary", "temporary", _FLAG),
        Field("expiresAt", "expires_at", _TIME, nullable=True),
        _CREATED,
        _UPDATED,
    ),
)
ATTACHMENTS = Shape(
    "attachments",
    "attachments",
    (
        Field("id", "id", Id("attachment", Refers.OWN)),
        Field("name", "name", Text(4_000)),
        Field("contentType", "content_type", Text(1_000)),
        Field("size", "size", _BIG),
        Field("tokens", "tokens", _COUNT, nullable=True),
        Field("pages", "pages", _COUNT, nullable=True),
        Field("width", "width", _COUNT, nullable=True),
        Field("height", "height", _COUNT, nullable=True),
        _CREATED,
    ),
)
MESSAGES = Shape(
    "messages",
    "messages",
    (
        Field("id", "id", Id("message", Refers.OWN)),
        Field("threadId", "thread_id", Id("thread")),
        Field("parentId", "parent_id", Id("message"), nullable=True),
        Field("activeChildId", "active_child_id", Id("message"), nullable=True),
        Field("depth", "depth", _COUNT),
        Field("active", "active", _FLAG),
        Field("role", "role", _ROLE),
        Field("status", "status", _STATUS),
        Field("parts", "parts", _PARTS),
        Field("modelId", "model", _MODEL, nullable=True),
        Field("errorCode", "error_code", OneOf(ERROR_CODES), nullable=True),
        Field("errorMessage", "error_message", Text(40_000), nullable=True),
        Field("errorRetryAfter", "error_retry_after", _COUNT, nullable=True),
        Field("promptTokens", "prompt_tokens", _COUNT, nullable=True),
        Field("completionTokens", "completion_tokens", _COUNT, nullable=True),
        Field("reasoningTokens", "reasoning_tokens", _COUNT, nullable=True),
        Field("cachedTokens", "cached_tokens", _COUNT, nullable=True),
        Field("tokensEstimated", "tokens_estimated", _FLAG),
        Field("durationMs", "duration_ms", _COUNT, nullable=True),
        _CREATED,
        _UPDATED,
    ),
)
SHARES = Shape(
    "shares",
    "shares",
    (
        Field("id", "id", Id("share", Refers.OWN)),
        Field("threadId", "thread_id", Id("thread")),
        Field("token", "token", Text(1_000)),
        Field("title", "title", _TITLE),
        Field("includesAttachments", "includes_attachments", _FLAG),
        Field("expiresAt", "expires_at", _TIME, nullable=True),
        _CREATED,
    ),
)
SHARE_MESSAGES = Shape(
    "share_messages",
    "share_messages",
    (
        Field("shareId", "share_id", Id("share")),
        Field("position", "position", _COUNT),
        Field("role", "role", _ROLE),
        Field("status", "status", _STATUS),
        Field("parts", "parts", _PARTS),
        Field("modelId", "model", _MODEL, nullable=True),
        _CREATED,
    ),
)
USAGE = Shape(
    "usage",
    "usage_events",
    (
        Field("messageId", "message_id", Id("message", Refers.FREE)),
        Field("threadId", "thread_id", Id("thread", Refers.FREE), nullable=True),
        Field("kind", "kind", OneOf(frozenset({"ANSWER", "TITLE"}))),
        Field("modelId", "model", _MODEL),
        Field("status", "status", _STATUS),
        Field("promptTokens", "prompt_tokens", _COUNT),
        Field("completionTokens", "completion_tokens", _COUNT),
        Field("reasoningTokens", "reasoning_tokens", _COUNT),
        Field("cachedTokens", "cached_tokens", _COUNT),
        Field("estimated", "estimated", _FLAG),
        Field("promptPrice", "prompt_price", _PRICE, nullable=True),
        Field("cachedPrice", "cached_price", _PRICE, nullable=True),
        Field("completionPrice", "completion_price", _PRICE, nullable=True),
        Field("costMicros", "cost_micros", Count(_MAX_COST), nullable=True),
        _CREATED,
    ),
)
# In the order in which they are written and read: what is referred to stands before what refers to it.
SHAPES = (
    SETTINGS,
    CUSTOM_PROVIDERS,
    CUSTOM_MODELS,
    PROJECTS,
    ATTACHMENTS,
    THREADS,
    MESSAGES,
    SHARES,
    SHARE_MESSAGES,
    USAGE,
)


def bytes_name(attachment_id: UUID) -> str:
    """The name of the member with the bytes of an attachment."""
    return f"attachments/{_ATTACHMENT.written(attachment_id)}"


def member_name(shape: Shape, number: int) -> str:
    """The name of a member: `messages.ndjson`, then `messages-2.ndjson` and so on."""
    return f"{shape.name}.ndjson" if number == 1 else f"{shape.name}-{number}.ndjson"
