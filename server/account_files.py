"""The file of an account over HTTP: out by a signed link, in by POST with a token."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing

import orjson
from aiohttp import ClientError, web

from graph.errors import caller_extensions
from models.database import DatabaseUnavailableError
from server.graphql_http import error_response
from server.identity import viewer_of_headers
from services.errors import (
    BadUserInputError,
    CallerError,
    ErrorCode,
    ImportRefusedError,
    UnauthenticatedError,
    UnavailableError,
)
from services.exports import Exports
from services.identity import Identities
from services.imports import Imports

log = logging.getLogger(__name__)

IDLE_SECONDS = 30.0
TOTAL_SECONDS = 900.0
_ZIP = "application/zip"
_HEADERS = {
    "Content-Type": _ZIP,
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "sandbox; default-src 'none'",
}
_STATUS = {
    ErrorCode.UNAUTHENTICATED: 401,
    ErrorCode.FORBIDDEN: 403,
    ErrorCode.BAD_USER_INPUT: 400,
    ErrorCode.PAYLOAD_TOO_LARGE: 413,
    ErrorCode.QUOTA_EXCEEDED: 413,
    ErrorCode.UNAVAILABLE: 503,
}


class AccountFiles:
    """The handlers of GET /export/{token} and POST /import.

    Args:
        idle_seconds: how long a client may be silent, in either direction.
        total_seconds: how long a whole file may take, in either direction.
    """

    def __init__(
        self,
        identities: Identities,
        exports: Exports,
        imports: Imports,
        *,
        idle_seconds: float = IDLE_SECONDS,
        total_seconds: float = TOTAL_SECONDS,
    ) -> None:
        self._identities = identities
        self._exports = exports
        self._imports = imports
        self._idle_seconds = idle_seconds
        self._total_seconds = total_seconds

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Serve both."""
        router.add_get("/export/{token}", self.download, allow_head=False)
        router.add_post("/import", self.upload)

    async def download(self, request: web.Request) -> web.StreamResponse:
        """The file behind a link, written while it is read. A browser can be sent here: no header is needed."""
        response = web.StreamResponse(headers=_HEADERS)
        try:
            async with self._exports.open(request.match_info["token"]) as export:
                response.headers["Content-Disposition"] = f'attachment; filename="{export.file_name}"'
                await response.prepare(request)
                async with asyncio.timeout(self._total_seconds), aclosing(export.chunks()) as chunks:
                    async for chunk in chunks:
                        await asyncio.wait_for(response.write(chunk), self._idle_seconds)
                await response.write_eof()
        except (CallerError, DatabaseUnavailableError, TimeoutError, ConnectionError) as error:
            if not response.prepared:
                return _refusal(error)
            log.warning("an export was broken off: %s", type(error).__name__)
            _abort(request)
        except BaseException:
            _abort(request)
            raise
        return response

    async def upload(self, request: web.Request) -> web.Response:
        """Take in a file; how many lines of each member were added."""
        try:
            viewer = await viewer_of_headers(self._identities, request.headers)
            if viewer is None:
                raise UnauthenticatedError
            if request.content_type != _ZIP:
                return error_response(415, ErrorCode.BAD_USER_INPUT, f"Send the file as {_ZIP}.")
            counts = await self._imports.take(viewer, self._body(request), size=request.content_length)
        except (CallerError, DatabaseUnavailableError) as error:
            return _refusal(error)
        return web.Response(body=orjson.dumps({"imported": counts}), content_type="application/json")

    async def _body(self, request: web.Request) -> AsyncIterator[bytes]:
        """The body in the pieces it comes in.

        Raises:
            BadUserInputError: it does not come to its end in time.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._total_seconds
        while True:
            try:
                async with asyncio.timeout_at(min(deadline, loop.time() + self._idle_seconds)):
                    piece = await request.content.readany()
            except (ClientError, OSError, web.RequestPayloadError) as error:
                raise BadUserInputError("The file did not come to its end.") from error
            if not piece:
                return
            yield piece


def _abort(request: web.Request) -> None:
    """Break the connection, so that nobody takes what has come for the whole."""
    if request.transport is not None:
        request.transport.abort()


def _refusal(error: Exception) -> web.Response:
    if not isinstance(error, CallerError):
        error = UnavailableError()
    extensions = caller_extensions(error)
    if isinstance(error, ImportRefusedError) and error.line is not None:
        extensions["line"] = error.line
    response = web.Response(
        status=_STATUS[error.code],
        body=orjson.dumps({"errors": [{"message": error.message, "extensions": extensions}]}),
        content_type="application/json",
        headers={"Cache-Control": "no-store"},
    )
    if error.retry_after is not None:
        response.headers["Retry-After"] = str(error.retry_after)
    return response
