"""The log: one line an event, with ids and never with user text."""

from __future__ import annotations

import logging
import sys

from aiohttp.http_exceptions import HttpProcessingError

_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


class _Formatter(logging.Formatter):
    """`time level logger message key=value …`; control characters are escaped, so no input forges a line."""

    def format(self, record: logging.LogRecord) -> str:
        extras = {key: value for key, value in record.__dict__.items() if key not in _STANDARD}
        head = f"{self.formatTime(record)} {record.levelname} {record.name} {record.getMessage()}"
        line = " ".join([_escaped(head), *(f"{key}={_escaped(str(value))}" for key, value in extras.items())])
        if record.exc_info:
            trace = self.formatException(record.exc_info)
            # Every line of a trace is marked: the text of an exception cannot pass for a line of the log.
            line += "".join(f"\n  | {_escaped(part)}" for part in trace.split("\n"))
        return line


def _escaped(text: str) -> str:
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _is_refused_request(record: logging.LogRecord) -> bool:
    return record.exc_info is not None and isinstance(record.exc_info[1], HttpProcessingError)


def configure_logging(level: str) -> None:
    """Log to standard error from this level on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # A refused header is logged by aiohttp with its first characters, and those may be a token's.
    logging.getLogger("aiohttp.server").addFilter(lambda record: not _is_refused_request(record))
    # Ordinary disconnects and each request are not events of ours.
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
    logging.getLogger("tortoise").setLevel(logging.WARNING)
