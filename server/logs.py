"""The log: one line an event, with ids and never with user text."""

from __future__ import annotations

import logging
import sys

from aiohttp.http_exceptions import HttpProcessingError

_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


class _Formatter(logging.Formatter):
    """`time level logger message key=value …`; control characters are escaped, so no input forges a line."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        extras = {key: value for key, value in record.__dict__.items() if key not in _STANDARD}
        first, _, rest = text.partition("\n")
        line = " ".join([_escaped(first), *(f"{key}={_escaped(str(value))}" for key, value in extras.items())])
        return f"{line}\n{rest}" if rest and record.exc_info else line + (_escaped("\n" + rest) if rest else "")


def _escaped(text: str) -> str:
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _is_refused_request(record: logging.LogRecord) -> bool:
    return record.exc_info is not None and isinstance(record.exc_info[1], HttpProcessingError)


def configure_logging(level: str) -> None:
    """Log to standard error from this level on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # A refused header is logged by aiohttp with its first characters, and those may be a token's.
    logging.getLogger("aiohttp.server").addFilter(lambda record: not _is_refused_request(record))
    # Ordinary disconnects and each request are not events of ours.
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
    logging.getLogger("tortoise").setLevel(logging.WARNING)
