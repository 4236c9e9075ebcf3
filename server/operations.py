"""Every GraphQL operation, however it came: counted by name and outcome, timed, logged by its ids, and one span each.

Names come from clients, and each new one would be a new series of metrics: a process keeps the first 200 names of
documents that it could execute, and counts the rest as `other`. So a caller who makes names up costs others their
names, in the metrics of one process, and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from graph.context import Context
from models.log_fields import log_note, log_scope
from models.metrics import Histogram
from models.tracing import NO_SPAN, NO_TRACING, Span, Tracing
from services.errors import ErrorCode

log = logging.getLogger(__name__)

MAX_NAMES = 200
MAX_NAME_CHARS = 80
SLOW_SECONDS = 1.0
OTHER = "other"
UNNAMED = "unnamed"
OK = "ok"
CLOSED = "closed"
"""The client went away, or completed a subscription, before its end."""
_INTERNAL = ErrorCode.INTERNAL_SERVER_ERROR.value
_CODES = frozenset(code.value for code in ErrorCode)


class Operation:
    """One operation while it runs; `outcome` is `ok`, `closed` or the code of its first error."""

    __slots__ = ("context", "outcome", "started")

    def __init__(self, context: Context) -> None:
        self.context = context
        self.outcome = OK
        self.started = time.monotonic()

    def told(self, payload: Mapping[str, Any]) -> None:
        """A result, as it goes to the client."""
        if "errors" in payload:
            self.failed(payload["errors"])

    def failed(self, errors: list[dict[str, Any]]) -> None:
        """The errors that it ended with, formatted."""
        if self.outcome == OK:
            code = errors[0].get("extensions", {}).get("code", _INTERNAL)
            self.outcome = code if code in _CODES else _INTERNAL


class Operations:
    """The operations of one process.

    Args:
        tracing: who begins a span for each.
    """

    def __init__(self, tracing: Tracing = NO_TRACING) -> None:
        self._tracing = tracing
        self._names: set[str] = set()
        self.outcomes: Counter[tuple[str, str, str]] = Counter()
        self.seconds: dict[tuple[str, str], Histogram] = {}
        """Of queries and mutations, by type and name: a subscription takes as long as its client likes."""

    def running(self, context: Context, carrier: Mapping[str, str] | None = None) -> AbstractContextManager[Operation]:
        """One operation for as long as the block lasts.

        Args:
            carrier: headers of its request, which may name the span that it belongs to.
        """
        return _Running(self, context, self._tracing.span("GraphQL", carrier))

    def count(self, operation: Operation, span: Span) -> None:
        """An operation has ended."""
        seconds = time.monotonic() - operation.started
        context, outcome = operation.context, operation.outcome
        kind, name = context.operation_type or "invalid", self._name(context)
        self.outcomes[kind, name, outcome] += 1
        if kind in ("query", "mutation"):
            histogram = self.seconds.get((kind, name))
            if histogram is None:
                histogram = self.seconds[kind, name] = Histogram()
            histogram.observe(seconds)
        if span is not NO_SPAN:
            span.rename(f"{kind} {name}")
            span.note({"graphql.operation.type": kind, "graphql.operation.name": name})
            if outcome == _INTERNAL:
                span.fail(outcome)
            elif outcome != OK:
                span.note({"threadgraph.outcome": outcome})
        log_note(operation=name, operation_type=kind)
        slow = kind != "subscription" and seconds > SLOW_SECONDS
        level = logging.WARNING if slow else logging.DEBUG
        if log.isEnabledFor(level):
            extra = {"outcome": outcome, "seconds": round(seconds, 4)}
            log.log(level, "slow operation" if slow else "operation", extra=extra)

    def _name(self, context: Context) -> str:
        name = context.operation_name
        if not name:
            return UNNAMED
        if name not in self._names:
            if len(self._names) >= MAX_NAMES or len(name) > MAX_NAME_CHARS:
                return OTHER
            self._names.add(name)
        return name


class _Running:
    """One operation. No generator: those take twice the time, of every request."""

    __slots__ = ("_block", "_operation", "_operations", "_scope", "_span")

    def __init__(self, operations: Operations, context: Context, block: AbstractContextManager[Span]) -> None:
        viewer = context.viewer_or_none
        self._operations = operations
        self._operation = Operation(context)
        self._scope = log_scope() if viewer is None else log_scope(user_id=viewer.id)
        self._block = block

    def __enter__(self) -> Operation:
        self._scope.__enter__()
        self._span = self._block.__enter__()
        return self._operation

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, asyncio.CancelledError | ConnectionError):
            self._operation.outcome = CLOSED
        elif isinstance(error, Exception):
            self._operation.outcome = _INTERNAL
        self._operations.count(self._operation, self._span)
        self._block.__exit__(kind, error, trace)
        self._scope.__exit__(kind, error, trace)


_ids = random.Random(os.urandom(32))  # noqa: S311 - ids are no secrets


def new_request_id() -> str:
    """An id that nobody else has. It is no secret."""
    return f"{_ids.getrandbits(64):016x}"
