"""The ids that belong to what is being done now, for every line that is logged meanwhile.

Ids and names only, never a user's text. A task that is started in a scope takes its fields along: the line that tells
of an answer's end has the id of the request that asked for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar

_NONE: dict[str, object] = {}
_fields: ContextVar[dict[str, object]] = ContextVar("log_fields", default=_NONE)


class log_scope:  # noqa: N801 - used like a function
    """Lines logged in the block have these fields, beside those of the block around it.

    No generator: every request has two of these, and most log nothing.
    """

    __slots__ = ("_more", "_token")

    def __init__(self, **more: object) -> None:
        self._more = more

    def __enter__(self) -> None:
        # Not held twice: some scopes last for as long as a socket.
        self._token = _fields.set(_fields.get() | self._more)
        del self._more

    def __exit__(self, *_: object) -> None:
        _fields.reset(self._token)


def log_note(**more: object) -> None:
    """Add fields to the innermost scope, as they become known; outside of any scope it does nothing."""
    if (fields := _fields.get()) is not _NONE:
        fields.update(more)


def log_fields() -> Mapping[str, str]:
    """The fields of now."""
    return {name: str(value) for name, value in _fields.get().items()}
