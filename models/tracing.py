"""Spans, as the rest of the code knows them. What makes real ones is `server/tracing.py`; by default there are none."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Span(Protocol):
    """Something that takes a while, with what is known of it. Never a user's text."""

    def rename(self, name: str) -> None:
        """Its name, known only now."""
        ...

    def note(self, attributes: Mapping[str, str | int]) -> None:
        """Attributes, as they become known."""
        ...

    def fail(self, code: str) -> None:
        """It ended with this error code."""
        ...


class Tracing(Protocol):
    """What begins spans."""

    def span(self, name: str, carrier: Mapping[str, str] | None = None) -> AbstractContextManager[Span]:
        """A span for as long as the block lasts; the parent of those that are begun in it, and in tasks of it.

        Args:
            carrier: headers of a request, which may name a parent elsewhere (W3C Trace Context).
        """
        ...


class _NoSpan:
    """A span of nobody's."""

    def rename(self, name: str) -> None:
        """Nothing."""

    def note(self, attributes: Mapping[str, str | int]) -> None:
        """Nothing."""

    def fail(self, code: str) -> None:
        """Nothing."""


NO_SPAN: Span = _NoSpan()


class _NoTracing:
    """No spans."""

    def __init__(self) -> None:
        self._block: AbstractContextManager[Span] = nullcontext(NO_SPAN)

    def span(self, name: str, carrier: Mapping[str, str] | None = None) -> AbstractContextManager[Span]:
        """Nothing."""
        return self._block


NO_TRACING: Tracing = _NoTracing()
