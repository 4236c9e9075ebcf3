"""The ids that belong to what is being done now, for every line that is logged meanwhile.

Ids and names only, never a user's text. A task that is started in a scope takes its fields along: the line that tells
of an answer's end has the id of the request that asked for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

_NONE: Mapping[str, str] = {}
_fields: ContextVar[dict[str, str] | None] = ContextVar("log_fields", default=None)


@contextmanager
def log_scope(**more: object) -> Iterator[None]:
    """Lines logged in the block have these fields, beside those of the block around it."""
    token = _fields.set({**(_fields.get() or _NONE), **{name: str(value) for name, value in more.items()}})
    try:
        yield
    finally:
        _fields.reset(token)


def log_note(**more: object) -> None:
    """Add fields to the innermost scope, as they become known; outside of any scope it does nothing."""
    if (fields := _fields.get()) is not None:
        fields.update({name: str(value) for name, value in more.items()})


def log_fields() -> Mapping[str, str]:
    """The fields of now."""
    return _fields.get() or _NONE
