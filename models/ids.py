"""Identifiers: UUIDv7 keys inside, typed opaque ids outside.

Outside, an id is `<kind>_<32 lower-case hex digits>`, so that `node(id:)` knows what to look for and an id of the wrong
kind is refused before any query. There is one spelling of every id: anything else is malformed.
"""

from __future__ import annotations

import os
import re
import time
from enum import StrEnum
from uuid import UUID

_FORM = re.compile(r"([a-z]+)_([0-9a-f]{32})", re.ASCII)


class IdKind(StrEnum):
    """The prefix of an outside id."""

    USER = "user"
    THREAD = "thread"
    MESSAGE = "message"
    PROJECT = "project"
    SHARE = "share"
    ATTACHMENT = "attachment"


_KINDS = {kind.value: kind for kind in IdKind}


class MalformedIdError(ValueError):
    """The text is not an id of the expected kind."""


def new_id() -> UUID:
    """A UUIDv7 of now: those made one after the other by a process are in order, within a millisecond too."""
    while True:
        try:
            # One call takes it out of the list: no two threads have the same.
            bits = _random_bits.pop()
        except IndexError:
            _random_bits.extend(_read_random_bits())
        else:
            milliseconds, nanoseconds = divmod(time.time_ns(), 1_000_000)
            # RFC 9562, section 6.2, method 3: the twelve bits behind the milliseconds count their parts.
            return id_of_time(milliseconds, nanoseconds * 4_096 // 1_000_000 << 62 | bits)


def _read_random_bits() -> list[int]:
    """62 random bits for each of many ids: to ask the kernel takes longer than to make an id."""
    size = 8
    many = os.urandom(size * 100)
    return [int.from_bytes(many[start : start + size]) >> 2 for start in range(0, len(many), size)]


_random_bits: list[int] = []


def id_of_time(milliseconds: int, random_bits: int) -> UUID:
    """A UUIDv7 (RFC 9562, section 5.7): 48 bits of milliseconds since 1970, then 74 others. Ordered by time."""
    return UUID(
        int=(milliseconds << 80)
        | (0x7 << 76)
        | ((random_bits >> 62) << 64)
        | (0b10 << 62)
        | (random_bits & ((1 << 62) - 1))
    )


def outside_id(kind: IdKind, key: UUID) -> str:
    """The id that clients see."""
    return f"{kind.value}_{key.hex}"


def parse_id(kind: IdKind, text: str) -> UUID:
    """The key behind an outside id of this kind.

    Raises:
        MalformedIdError: another kind, another spelling, or no id at all.
    """
    found, key = parse_any_id(text)
    if found is not kind:
        raise MalformedIdError(text[:80])
    return key


def parse_any_id(text: str) -> tuple[IdKind, UUID]:
    """The kind and key behind an outside id.

    Raises:
        MalformedIdError: the text has not the form of an id.
    """
    match = _FORM.fullmatch(text) if len(text) <= 64 else None
    kind = _KINDS.get(match[1]) if match else None
    if match is None or kind is None:
        raise MalformedIdError(text[:80])
    return kind, UUID(hex=match[2])
