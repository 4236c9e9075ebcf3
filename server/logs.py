"""The log: one line an event, with ids and never with user text.

Every line has the ids of what was being done (`models/log_fields.py`): the request's, the operation's name, the user's,
the thread's and the message's, as far as they are known.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from datetime import UTC, datetime
from typing import Any

import asyncpg
from aiohttp.http_exceptions import HttpProcessingError

from models.log_fields import log_fields

_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


class _Formatter(logging.Formatter):
    """What the two formats have in common: fields, and traces that quote no values of statements."""

    def fields(self, record: logging.LogRecord) -> dict[str, Any]:
        """The fields of a line: what its scope has, and what it says itself."""
        return {**log_fields(), **{key: value for key, value in record.__dict__.items() if key not in _STANDARD}}

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's
        """The trace, without the texts of exceptions that quote what was to be stored."""
        text = super().formatException(ei)
        error: BaseException | None = ei[1]
        seen: set[int] = set()
        while error is not None and id(error) not in seen:
            seen.add(id(error))
            if _quotes_values(error) and str(error):
                text = text.replace(str(error), "(what it says may quote a user)")
            error = error.__cause__ or error.__context__
        return text


class TextFormatter(_Formatter):
    """`time level logger message key=value …`; control characters are escaped, so no input forges a line."""

    def __init__(self) -> None:
        super().__init__()
        self._second = (0, "")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802 - logging's
        """The local time, to the millisecond. What two lines of one second share is made once."""
        second = int(record.created)
        if second != self._second[0]:
            self._second = second, time.strftime(datefmt or self.default_time_format, time.localtime(second))
        return f"{self._second[1]},{int(record.msecs):03}"

    def format(self, record: logging.LogRecord) -> str:
        """One line, and a marked one for each of a trace."""
        head = f"{self.formatTime(record)} {record.levelname} {record.name} {record.getMessage()}"
        fields = self.fields(record)
        line = " ".join([_escaped(head), *(f"{key}={_escaped(str(value))}" for key, value in fields.items())])
        if record.exc_info:
            trace = self.formatException(record.exc_info)
            # Every line of a trace is marked: the text of an exception cannot pass for a line of the log.
            line += "".join(f"\n  | {_escaped(part)}" for part in trace.split("\n"))
        return line


class JsonFormatter(_Formatter):
    """One JSON object a line: `ts`, `level`, `logger`, `message`, the fields, and `exception` where there is one.

    In ASCII: what is no printable character of it is escaped, so nothing begins a line or moves a cursor.
    """

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line: dict[str, object] = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        line = line | {key: _plain(value) for key, value in self.fields(record).items()} | line
        return json.dumps(line).replace("\x7f", "\\u007f")


def _quotes_values(error: BaseException) -> bool:
    """Whether it is of those by which the database, or its client, refuses a value and shows it."""
    if isinstance(error, asyncpg.InterfaceError):
        return isinstance(error, ValueError)
    return isinstance(error, asyncpg.DataError | asyncpg.IntegrityConstraintViolationError)


def _plain(value: object) -> str | int | float | bool | None:
    """A value that JSON has, or its text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, str | int) else str(value)


def _escaped(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _is_refused_request(record: logging.LogRecord) -> bool:
    return record.exc_info is not None and isinstance(record.exc_info[1], HttpProcessingError)


# A request, a statement or a body is no event of ours, and what these log of them for debugging has texts and keys.
_QUIET = ("aiohttp.access", "tortoise", "botocore", "boto3", "s3transfer", "urllib3", "opentelemetry")


def configure_logging(level: str, style: str = "TEXT") -> None:
    """Log to standard error from this level on.

    Args:
        style: `TEXT`, for people, or `JSON`.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "JSON" else TextFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # A refused header is logged by aiohttp with its first characters, and those may be a token's.
    logging.getLogger("aiohttp.server").addFilter(lambda record: not _is_refused_request(record))
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
