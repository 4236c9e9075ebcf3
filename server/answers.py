"""Answers to GraphQL requests, written in one piece.

aiohttp makes a response of headers that are looked up, changed by signals and put together anew for each: 6 of the 100
parts of a request for 50 threads (docs/decisions/0023-planned-execution.md). The head of an answer is nearly always the
same, so here it is text. It says what `Requests`, `Origins` and `security_headers` say of every other response; a test
compares both. Whoever does not keep the connection, or speaks HTTP/1.0, is answered by aiohttp.
"""

from __future__ import annotations

import time
from email.utils import formatdate

from aiohttp import ClientConnectionResetError, HttpVersion11, hdrs, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import SERVER_SOFTWARE
from multidict import CIMultiDict

from server.origins import Origins
from server.pages import SECURITY_HEADERS
from server.requests import HEADER, Requests

ROUTE = "/graphql"
# Answers are a viewer's own.
_CACHE_CONTROL = "no-store"
_REASONS = {200: "OK", 400: "Bad Request"}


class Answers:
    """Makes the responses to operations that were executed, or refused as GraphQL documents."""

    def __init__(self, requests: Requests, origins: Origins) -> None:
        self._requests = requests
        self._origins = origins
        self._date = (0, "")

    def make(self, request: web.Request, status: int, content_type: str, body: bytes) -> web.StreamResponse:
        """The response to a request by POST."""
        if request.keep_alive and request.version == HttpVersion11:
            return _Answer(self, status, content_type, body)
        headers = CIMultiDict({hdrs.CONTENT_TYPE: content_type, hdrs.CACHE_CONTROL: _CACHE_CONTROL})
        return web.Response(status=status, body=body, headers=headers)

    def head(self, request: web.Request, status: int, content_type: str, length: int) -> bytes:
        """The head of an answer to a request that keeps its connection; it is counted as begun."""
        self._requests.responses[request.method, ROUTE, status] += 1
        second = int(time.time())
        if second != self._date[0]:
            self._date = second, formatdate(second, usegmt=True)
        return (
            f"HTTP/1.1 {status} {_REASONS[status]}\r\n"
            f"Content-Type: {content_type}\r\nContent-Length: {length}\r\nDate: {self._date[1]}\r\n{_FIXED}"
            f"{HEADER}: {self._requests.id_of(request)}\r\n{self._cors(request)}\r\n"
        ).encode()

    def _cors(self, request: web.Request) -> str:
        if hdrs.ORIGIN not in request.headers:
            return ""
        return "".join(f"{name}: {value}\r\n" for name, value in self._origins.headers(request).items())


_FIXED = "".join(
    f"{name}: {value}\r\n"
    for name, value in {
        hdrs.CACHE_CONTROL: _CACHE_CONTROL,
        hdrs.SERVER: SERVER_SOFTWARE,
        hdrs.VARY: "Origin",
        **SECURITY_HEADERS,
    }.items()
)


class _Answer(web.StreamResponse):
    """One answer, with aiohttp's interface of a response."""

    def __init__(self, answers: Answers, status: int, content_type: str, body: bytes) -> None:
        super().__init__(status=status)
        self._answers = answers
        self._type = content_type
        self._payload = body
        self._head = b""
        self._asked: web.BaseRequest | None = None

    @property
    def keep_alive(self) -> bool:
        """Whether the connection goes on: else this would be another response."""
        return True

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Make the head."""
        assert isinstance(request, web.Request)
        self._asked = request
        self._head = self._answers.head(request, self.status, self._type, len(self._payload))
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        """Send all of it."""
        assert self._asked is not None
        transport = self._asked.transport
        if transport is None or transport.is_closing():
            raise ClientConnectionResetError("Cannot write to closing transport")
        transport.write(self._head + self._payload)
