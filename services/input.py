"""Checks of what callers send; each names the field it refuses."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from models.text import is_storable
from services.errors import BadUserInputError, PayloadTooLargeError


def checked_text(text: str, *, field: str, max_bytes: int) -> str:
    """A text that can be stored: not blank, no NUL, no lone surrogate, at most `max_bytes` of UTF-8.

    Raises:
        BadUserInputError: it is blank, or holds what cannot be stored.
        PayloadTooLargeError: it is too long.
    """
    if not is_storable(text):
        raise BadUserInputError("The text holds a NUL or half a character, which cannot be stored.", field=field)
    if len(text) > max_bytes or len(text.encode()) > max_bytes:
        raise PayloadTooLargeError(f"The text is longer than {max_bytes} bytes.", field=field)
    if not text.strip():
        raise BadUserInputError("The text is empty.", field=field)
    return text


def checked_line(text: str, *, field: str, max_bytes: int) -> str:
    """A text of one line, such as a title: as `checked_text`, with white space folded.

    Raises:
        BadUserInputError, PayloadTooLargeError: as `checked_text`.
    """
    return checked_text(" ".join(text.split()), field=field, max_bytes=max_bytes)


def checked_chars(text: str, *, field: str, max_chars: int) -> str:
    """A text as `checked_text`, of at most so many code points.

    Raises:
        BadUserInputError, PayloadTooLargeError: as `checked_text`.
    """
    if len(text) > max_chars:
        raise PayloadTooLargeError(f"The text is longer than {max_chars:,} characters.", field=field)
    return checked_text(text, field=field, max_bytes=4 * max_chars)


_FARTHEST = timedelta(days=3_660)


def checked_expiry(at: datetime, *, field: str = "expiresAt") -> datetime:
    """A time at which something ends: in the future, at most ten years ahead.

    Raises:
        BadUserInputError: it is not.
    """
    if at.tzinfo is None:
        at = at.replace(tzinfo=UTC)
    if not timedelta(0) < at - datetime.now(UTC) <= _FARTHEST:
        raise BadUserInputError("The time must lie in the future, at most ten years ahead.", field=field)
    return at


_EARLIEST = datetime(1970, 1, 1, tzinfo=UTC)
_LATEST = datetime(9999, 1, 1, tzinfo=UTC)


def checked_time(at: datetime) -> datetime:
    """A time to compare with: in UTC where nothing else is said, and where PostgreSQL can hold it."""
    if at.tzinfo is None:
        at = at.replace(tzinfo=UTC)
    return min(max(at, _EARLIEST), _LATEST)


def escaped_like(text: str) -> str:
    """A text for use inside a LIKE pattern, where it stands for itself."""
    return text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")


def checked_key(key: str, *, field: str = "idempotencyKey") -> str:
    """An idempotency key: 1 to 200 visible ASCII characters, such as a UUID.

    Raises:
        BadUserInputError: it is not.
    """
    if not 1 <= len(key) <= 200 or not key.isascii() or not key.isprintable() or " " in key:
        raise BadUserInputError("An idempotency key is 1 to 200 visible ASCII characters, such as a UUID.", field=field)
    return key
