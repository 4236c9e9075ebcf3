"""Files over plain HTTP: `POST /attachments` takes one in as it comes, `GET /attachments/{id}` leads to one.

Both take the token in the Authorization header, as GraphQL does; there are no cookies that a page of another origin
could make use of. Failures have the shape that GraphQL's have, and a status to go with it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import orjson
from aiohttp import web
from aiohttp.multipart import content_disposition_filename, parse_content_disposition
from graphql import GraphQLError

from graph.context import Services
from graph.errors import format_error
from models.ids import IdKind, MalformedIdError, outside_id, parse_id
from models.records import AttachmentRecord
from server.bodies import pieces
from server.graphql_http import error_response
from server.identity import viewer_of_headers
from services.errors import CallerError, ErrorCode, NotFoundError, UnauthenticatedError
from services.viewer import Viewer

_STATUSES = {
    ErrorCode.UNAUTHENTICATED.value: 401,
    ErrorCode.FORBIDDEN.value: 403,
    ErrorCode.NOT_FOUND.value: 404,
    ErrorCode.PAYLOAD_TOO_LARGE.value: 413,
    ErrorCode.QUOTA_EXCEEDED.value: 403,
    ErrorCode.RATE_LIMITED.value: 429,
    ErrorCode.UNAVAILABLE.value: 503,
    ErrorCode.INTERNAL_SERVER_ERROR.value: 500,
}
_HEADERS = {"Cache-Control": "no-store"}

# A position in a path: digits, as many as a position can have.
_POSITION = "[0-9]{1,9}"


class AttachmentHttp:
    """The handlers of /attachments."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Serve both."""
        router.add_post("/attachments", self._answered(self._post))
        router.add_get("/attachments/{id}", self._answered(self._get))
        router.add_get(f"/shared/{{token}}/files/{{position:{_POSITION}}}", self._answered(self._get_shared))

    async def _post(self, request: web.Request) -> web.Response:
        """Store the body as a file: its name from `?name=` or Content-Disposition, its type from what it holds."""
        viewer = await self._viewer(request)
        declared = request.content_type if "Content-Type" in request.headers else None
        if declared is not None and declared.startswith("multipart/"):
            return error_response(415, ErrorCode.BAD_USER_INPUT, "Send the file itself as the body, not a form.")
        if request.headers.get("Content-Encoding", "identity").lower() != "identity":
            return error_response(415, ErrorCode.BAD_USER_INPUT, "Send the file as it is, without Content-Encoding.")
        record = await self._services.attachments.upload(
            viewer,
            pieces(request.content.readany),
            name=_name(request),
            content_type=declared,
            size=request.content_length,
        )
        body = orjson.dumps(_shown(record, await self._services.attachments.url(record)))
        return web.Response(status=201, body=body, content_type="application/json", headers=_HEADERS)

    async def _get(self, request: web.Request) -> web.Response:
        """Lead the owner to the file, by a link that lives for minutes."""
        viewer = await self._viewer(request)
        try:
            attachment_id = parse_id(IdKind.ATTACHMENT, request.match_info["id"])
        except MalformedIdError as error:
            raise NotFoundError("attachment") from error
        record = await self._services.attachments.find(viewer, attachment_id)
        url = None if record is None else await self._services.attachments.url(record)
        if url is None:
            raise NotFoundError("attachment")
        return web.Response(status=302, headers={**_HEADERS, "Location": url})

    async def _get_shared(self, request: web.Request) -> web.Response:
        """Lead whoever has the token of a share to one of its files. Asked each time: a revoked one is shut."""
        position = int(request.match_info["position"])
        url = await self._services.sharing.file_url(request.match_info["token"], position)
        return web.Response(status=302, headers={**_HEADERS, "Location": url})

    async def _viewer(self, request: web.Request) -> Viewer:
        viewer = await viewer_of_headers(self._services.identities, request.headers)
        if viewer is None:
            raise UnauthenticatedError
        return viewer

    def _answered(
        self, handler: Callable[[web.Request], Awaitable[web.Response]]
    ) -> Callable[[web.Request], Awaitable[web.Response]]:
        """The handler with its failures as responses."""

        async def answer(request: web.Request) -> web.Response:
            try:
                return await handler(request)
            except web.HTTPException:
                raise
            except Exception as error:
                return failure_response(error)

        return answer


def failure_response(error: Exception) -> web.Response:
    """A failure in GraphQL's shape: what the caller can act on, or the id of a defect."""
    shown = format_error(GraphQLError("", original_error=error))
    response = web.Response(
        status=_STATUSES.get(shown["extensions"]["code"], 400),
        body=orjson.dumps({"errors": [shown]}),
        content_type="application/json",
        headers=_HEADERS,
    )
    if isinstance(error, CallerError) and error.retry_after is not None:
        response.headers["Retry-After"] = str(error.retry_after)
    return response


def _name(request: web.Request) -> str:
    if "name" in request.query:
        return request.query["name"]
    _, parameters = parse_content_disposition(request.headers.get("Content-Disposition"))
    return content_disposition_filename(parameters, "filename") or ""


def _shown(record: AttachmentRecord, url: str | None) -> dict[str, object]:
    """As the schema's Attachment has it."""
    return {
        "id": outside_id(IdKind.ATTACHMENT, record.id),
        "name": record.name,
        "contentType": record.content_type,
        "size": record.size,
        "tokens": record.tokens,
        "pages": record.pages,
        "width": record.width,
        "height": record.height,
        "createdAt": record.created_at,
        "url": url,
    }
