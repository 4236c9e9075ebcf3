"""Stream cursors: where a reader stands in one answer.

A cursor names its message and an offset on the answer's line (see `models.parts`). It is opaque to clients, not secret
and not signed: a forged one can only ask the owner's own message for the rest from another place.

Form: `<message id, base64url>.<offset>` while the answer goes on, with a final `.` behind its end. Where the answer was
begun anew, the attempt stands before the offset: `.2-<offset>`. Offsets of two attempts are not of one line.
"""

from __future__ import annotations

import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import dataclass
from uuid import UUID

_FORM = re.compile(r"([A-Za-z0-9_-]{22})\.(?:([2-9])-)?(0|[1-9][0-9]{0,15})(\.?)", re.ASCII)


class CursorError(Exception):
    """A cursor that this stream cannot go on from."""


class MalformedCursorError(CursorError):
    """Not a stream cursor at all."""


class ForeignCursorError(CursorError):
    """A cursor of another message's stream."""


class CursorAheadError(CursorError):
    """A cursor behind the end of what exists: nobody was ever given it."""


@dataclass(frozen=True, slots=True)
class StreamPosition:
    """An offset in one attempt to write a message (None: in whichever there is); `ended` behind its terminal event."""

    message_id: UUID
    offset: int
    ended: bool = False
    attempt: int | None = None


def cursor_prefix(message_id: UUID, attempt: int = 1) -> str:
    """What all cursors of an attempt to write a message begin with; the offset follows."""
    prefix = urlsafe_b64encode(message_id.bytes)[:22].decode() + "."
    return prefix if attempt == 1 else f"{prefix}{attempt}-"


def end_cursor(message_id: UUID, length: int, attempt: int = 1) -> str:
    """The cursor of the terminal event of an answer of this length."""
    return f"{cursor_prefix(message_id, attempt)}{length}."


def parse_cursor(text: str, message_id: UUID) -> StreamPosition:
    """The position a cursor names in this message's stream.

    Raises:
        MalformedCursorError: the text is not a stream cursor.
        ForeignCursorError: it belongs to another message.
    """
    match = _FORM.fullmatch(text) if len(text) <= 64 else None
    if match is None:
        raise MalformedCursorError
    prefix = match[1] + "."
    if prefix != cursor_prefix(message_id):
        # A 22nd character has bits to spare; one spelling only.
        key = urlsafe_b64decode(match[1] + "==")
        if cursor_prefix(UUID(bytes=key)) != prefix:
            raise MalformedCursorError
        raise ForeignCursorError
    return StreamPosition(message_id, int(match[3]), bool(match[4]), int(match[2] or 1))
