"""Links into the local storage.

A file is never served in a way that runs: its type is the one that its content was found to be, browsers are told not
to guess another, and a document that is opened all the same is in a sandbox and may load nothing.
"""

from __future__ import annotations

import re

from aiohttp import hdrs, web
from aiohttp.abc import AbstractStreamWriter
from multidict import CIMultiDict

from server.bodies import pieces
from server.graphql_http import error_response
from services.errors import BadUserInputError, ErrorCode
from storage.base import StorageError, StorageFullError, TooManyBytesError
from storage.local import LinkRefusedError, LocalStorage

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "sandbox; default-src 'none'",
    # A frontend of another origin may show what its user has a link to.
    "Cross-Origin-Resource-Policy": "cross-origin",
    "Cache-Control": "private, max-age=600, immutable",
}
_RANGE = re.compile("bytes=([0-9]{0,30})-([0-9]{0,30})")


class FileLinks:
    """The handlers of /files/{token}: what a link of the local storage allows."""

    def __init__(self, storage: LocalStorage) -> None:
        self._storage = storage

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Serve links."""
        router.add_get("/files/{token}", self.get)
        router.add_put("/files/{token}", self.put)

    async def get(self, request: web.Request) -> web.StreamResponse:
        """The file, or a range of it."""
        try:
            link = self._storage.opened(request.match_info["token"], "GET")
        except LinkRefusedError:
            return _refused()
        headers = {"Content-Type": link.content_type, "Content-Disposition": link.disposition, **_HEADERS}
        return _File(self._storage.path(link.key), headers=headers)

    async def put(self, request: web.Request) -> web.Response:
        """Write the file: exactly as many bytes, and under the type, that the link was made for."""
        try:
            link = self._storage.opened(request.match_info["token"], "PUT")
        except LinkRefusedError:
            return _refused()
        if request.headers.get("Content-Type", "") != link.content_type or request.content_length != link.size:
            return error_response(
                400, ErrorCode.BAD_USER_INPUT, "Send Content-Type and Content-Length as the upload was created with."
            )
        try:
            await self._storage.put(link.key, pieces(request.content.readany), max_bytes=link.size)
        except (BadUserInputError, TooManyBytesError):
            return error_response(400, ErrorCode.BAD_USER_INPUT, "The body did not come as it was announced.")
        except StorageFullError:
            return error_response(507, ErrorCode.UNAVAILABLE, "There is no room for files on this server.")
        except StorageError:
            return error_response(503, ErrorCode.UNAVAILABLE, "The file storage does not work right now; try again.")
        return web.Response(status=204)


class _File(web.FileResponse):
    """A file, or the one range of it that was asked for.

    aiohttp answers 416 to what is no range of bytes and to several at once. Both are to be passed over (RFC 9110,
    section 14.2): whoever asks so gets the whole.
    """

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Begin the response, as aiohttp does."""
        asked = request.headers.getall(hdrs.RANGE, [])
        if asked and (len(asked) > 1 or not _is_range(asked[0])):
            others = CIMultiDict(request.headers)
            del others[hdrs.RANGE]
            request = request.clone(headers=others)
        return await super().prepare(request)


def _is_range(asked: str) -> bool:
    found = _RANGE.fullmatch(asked)
    if found is None:
        return False
    first, last = found.groups()
    return int(first) <= int(last) if first and last else bool(first or last)


def _refused() -> web.Response:
    return error_response(403, ErrorCode.FORBIDDEN, "This link is not valid, or not any more.")
