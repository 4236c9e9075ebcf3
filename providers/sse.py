"""Server-Sent Events as bytes arrive, after the parsing rules of the WHATWG HTML standard, section 9.2.6.

The parser takes chunks cut anywhere, also inside a character or between CR and LF, and never holds more than one event.
It leaves `data` undecoded: an event's payload is JSON nearly always, and a JSON parser wants the bytes.

`id` and `retry` are understood and dropped. They serve reconnection, and a model's answer cannot be resumed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

DEFAULT_MAX_EVENT_BYTES = 4 * 1024 * 1024
DEFAULT_EVENT_NAME = "message"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class EventTooLargeError(Exception):
    """One event, or one line that never ends, is larger than the parser's bound. The parser is of no use afterwards."""


class ServerSentEvent(NamedTuple):
    """One dispatched event. `data` may be empty; its lines are joined with LF."""

    name: str
    data: bytes


class EventParser:
    """An incremental parser for one event stream.

    Measured with CPython 3.11 on a 2-core virtual machine, for `data: {...}\\n\\n` of 281 bytes: 2.4 to 3.5 µs an event
    where each is a chunk of its own, 1.3 to 2.0 µs where a chunk holds fifty, 3.2 to 4.8 µs with CRLF. `orjson.loads`
    of the same event took 2.0 to 2.5 µs.

    Args:
        max_event_bytes: bound on what is held of one event, and on one unfinished line.
    """

    def __init__(self, *, max_event_bytes: int = DEFAULT_MAX_EVENT_BYTES) -> None:
        self._max_event_bytes = max_event_bytes
        self._start: bytes | None = b""  # what may yet be a byte order mark; None once that is decided
        self._after_cr = False
        self._line = bytearray()  # an unfinished line
        self._data: bytes | bytearray | None = None  # None: no data line yet, which is not the same as empty data
        self._name = b""

    def feed(self, chunk: bytes) -> Iterator[ServerSentEvent]:
        """The events that this chunk completes. Iterate to the end before the next call: the work is done on the way.

        Raises:
            EventTooLargeError: after the events before the one that is too large.
        """
        if self._start is not None:
            chunk = self._without_byte_order_mark(chunk)
        if self._after_cr or b"\r" in chunk:
            chunk = self._with_lf_only(chunk)
        lines = chunk.split(b"\n")
        if self._line and len(lines) > 1:
            self._line += lines[0]
            lines[0] = bytes(self._line)
            self._line.clear()
        rest = lines.pop()
        for line in lines:
            if line.startswith(b"data: "):
                self._add_data(line[6:])
            elif line:
                self._take_field(line)
            elif self._data is not None:
                yield self._dispatch()
            else:
                self._name = b""
        if rest:
            self._line += rest
            self._check_bound(len(self._line))

    def finish(self) -> ServerSentEvent | None:
        """The event that the end of the stream left without its blank line, if there is one.

        The standard discards it, for it may be cut short. Vendors and proxies are known to omit the last blank line, so
        the caller gets to see it and decides whether it is whole.
        """
        line = bytes(self._start or self._line)
        self._start = None
        self._line.clear()
        if line:
            self._take_field(line)
        return None if self._data is None else self._dispatch()

    def _without_byte_order_mark(self, chunk: bytes) -> bytes:
        assert self._start is not None
        start = self._start + chunk
        if len(start) < len(_BYTE_ORDER_MARK) and _BYTE_ORDER_MARK.startswith(start):
            self._start = start
            return b""
        self._start = None
        return start.removeprefix(_BYTE_ORDER_MARK)

    def _with_lf_only(self, chunk: bytes) -> bytes:
        """The chunk with LF for CR and CRLF. A CR ends its line at once; the next chunk's first LF is then dropped."""
        if not chunk:
            return chunk
        if self._after_cr and chunk.startswith(b"\n"):
            chunk = chunk[1:]
        self._after_cr = chunk.endswith(b"\r")
        return chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    def _take_field(self, line: bytes) -> None:
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            self._add_data(value)
        elif field == b"event":
            self._name = value
            self._check_bound(0)

    def _add_data(self, value: bytes) -> None:
        if self._data is None:
            self._data = value
        else:
            # One bytearray, not a list of lines: millions of two-byte lines would weigh twenty times their bytes.
            if not isinstance(self._data, bytearray):
                self._data = bytearray(self._data)
            self._data += b"\n"
            self._data += value
        self._check_bound(0)

    def _check_bound(self, line_length: int) -> None:
        held = line_length + len(self._name) + (0 if self._data is None else len(self._data))
        if held > self._max_event_bytes:
            raise EventTooLargeError

    def _dispatch(self) -> ServerSentEvent:
        assert self._data is not None
        name = self._name.decode("utf-8", "replace") if self._name else DEFAULT_EVENT_NAME
        event = ServerSentEvent(name, bytes(self._data))
        self._name = b""
        self._data = None
        return event
