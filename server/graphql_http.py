"""GraphQL over HTTP, after graphql.github.io/graphql-over-http (draft).

`application/json` answers 200 to every well-formed request, as clients of today expect;
`application/graphql-response+json` answers 400 where nothing was executed (section 6.4.2). What is not even a GraphQL
request gets a 4xx with the same shape of errors.

POST takes queries and mutations, as JSON: a body that a page of another origin can send without asking (text/plain,
forms) is never executed. A form with a file (graphql-multipart-request-spec) needs a header that such a page must ask
for; the file is not kept, but read by the resolver while it comes. GET takes queries only, because urql sends short
ones so by default; there are no cookies, so a forged GET carries no identity. Batches are refused.
"""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
from aiohttp import BodyPartReader, MultipartReader, hdrs, web
from strawberry.exceptions import MissingQueryError
from strawberry.schema.exceptions import CannotGetOperationTypeError, InvalidOperationTypeError
from strawberry.types import ExecutionResult
from strawberry.types.execution import PreExecutionError
from strawberry.types.graphql import OperationType

from graph.context import Context, Services
from graph.errors import format_errors
from graph.scalars import UploadedFile
from graph.schema import Schema
from models.database import DatabaseUnavailableError
from server.answers import Answers
from server.bodies import pieces
from server.identity import viewer_of_headers
from server.operations import Operation, Operations
from services.errors import BadUserInputError, ErrorCode, UnauthenticatedError, UnavailableError

# For a JSON body, to its end; a form with a file has the deadlines of `server.bodies`.
BODY_SECONDS = 30.0

_JSON_TYPE = "application/json"
_RESPONSE_TYPE = "application/graphql-response+json"
_PREFLIGHT = ("GraphQL-Preflight", "Apollo-Require-Preflight")
_POST = (OperationType.QUERY, OperationType.MUTATION)
_GET = (OperationType.QUERY,)


class BadRequestError(Exception):
    """The body or message is no GraphQL request; the text says why."""


class GraphQLRequest:
    """One operation to run: checked for its form, not for its sense."""

    __slots__ = ("extensions", "operation_name", "query", "variables")

    def __init__(self, data: Any) -> None:
        """From decoded JSON.

        Raises:
            BadRequestError: a member is missing or of the wrong type.
        """
        if not isinstance(data, dict):
            raise BadRequestError("The request must be a JSON object.")
        self.query: str = data.get("query") or ""
        self.variables: dict[str, Any] | None = data.get("variables")
        self.operation_name: str | None = data.get("operationName")
        self.extensions: dict[str, Any] | None = data.get("extensions")
        if not isinstance(self.query, str) or not self.query.strip():
            raise BadRequestError("The request must have a query, a string that is not empty.")
        if self.variables is not None and not isinstance(self.variables, dict):
            raise BadRequestError("variables must be an object or null.")
        if self.operation_name is not None and not isinstance(self.operation_name, str):
            raise BadRequestError("operationName must be a string or null.")
        if self.extensions is not None and not isinstance(self.extensions, dict):
            raise BadRequestError("extensions must be an object or null.")


class GraphQLHttp:
    """The handlers of POST and GET /graphql."""

    def __init__(self, schema: Schema, services: Services, operations: Operations, answers: Answers) -> None:
        self._schema = schema
        self._services = services
        self._operations = operations
        self._answers = answers

    async def post(self, request: web.Request) -> web.StreamResponse:
        """Run one query or mutation."""
        if request.content_type == "multipart/form-data":
            return await self._post_form(request)
        if request.content_type != "application/json":
            return error_response(415, ErrorCode.BAD_USER_INPUT, "Send the request as application/json.")
        try:
            body = await _body(request)
            asked = GraphQLRequest(orjson.loads(body))
        except TimeoutError:
            return error_response(408, ErrorCode.BAD_USER_INPUT, "The body did not come to its end in time.")
        except web.HTTPRequestEntityTooLarge as refusal:
            return error_response(413, ErrorCode.PAYLOAD_TOO_LARGE, refusal.text or "The request is too large.")
        except web.RequestPayloadError:
            return error_response(400, ErrorCode.BAD_USER_INPUT, "The body is not in the encoding that it names.")
        except orjson.JSONDecodeError:
            return error_response(400, ErrorCode.BAD_USER_INPUT, "The request is not JSON in UTF-8.")
        except BadRequestError as refusal:
            return error_response(400, ErrorCode.BAD_USER_INPUT, str(refusal))
        return await self._run(request, asked, _POST)

    async def _post_form(self, request: web.Request) -> web.StreamResponse:
        if not any(request.headers.get(name) for name in _PREFLIGHT):
            message = f"A form needs the header {_PREFLIGHT[0]} or {_PREFLIGHT[1]}, with any value."
            return error_response(415, ErrorCode.BAD_USER_INPUT, message)
        try:
            asked = await _form(request)
        except web.HTTPRequestEntityTooLarge as refusal:
            return error_response(413, ErrorCode.PAYLOAD_TOO_LARGE, refusal.text or "The request is too large.")
        except BadUserInputError as refusal:
            return error_response(400, ErrorCode.BAD_USER_INPUT, refusal.message)
        except (orjson.JSONDecodeError, ValueError, AssertionError):
            return error_response(400, ErrorCode.BAD_USER_INPUT, "The request is not a form with a file.")
        except BadRequestError as refusal:
            return error_response(400, ErrorCode.BAD_USER_INPUT, str(refusal))
        return await self._run(request, asked, _POST)

    async def get(self, request: web.Request) -> web.StreamResponse:
        """Run one query, from the URL."""
        data: dict[str, Any] = dict(request.query)
        try:
            for name in ("variables", "extensions"):
                if data.get(name):
                    data[name] = orjson.loads(data[name])
            asked = GraphQLRequest(data)
        except (orjson.JSONDecodeError, UnicodeEncodeError):
            return error_response(400, ErrorCode.BAD_USER_INPUT, "variables and extensions must be JSON.")
        except BadRequestError as refusal:
            return error_response(400, ErrorCode.BAD_USER_INPUT, str(refusal))
        return await self._run(request, asked, _GET)

    async def _run(
        self, request: web.Request, asked: GraphQLRequest, allowed: tuple[OperationType, ...]
    ) -> web.StreamResponse:
        context = await self._context(request)
        with self._operations.running(context, request.headers) as operation:
            return await self._execute(request, asked, allowed, operation)

    async def _execute(
        self, request: web.Request, asked: GraphQLRequest, allowed: tuple[OperationType, ...], operation: Operation
    ) -> web.StreamResponse:
        context = operation.context
        try:
            result = await self._schema.run(
                asked.query,
                context,
                variables=asked.variables,
                operation_name=asked.operation_name,
                extensions=asked.extensions,
                allowed=allowed,
            )
        except InvalidOperationTypeError as error:
            operation.outcome = ErrorCode.BAD_USER_INPUT
            if error.operation_type is OperationType.SUBSCRIPTION:
                message = "Subscriptions go over a WebSocket (graphql-transport-ws)."
                return error_response(400, ErrorCode.BAD_USER_INPUT, message)
            return not_allowed("Mutations go by POST.")
        except (CannotGetOperationTypeError, MissingQueryError):
            operation.outcome = ErrorCode.GRAPHQL_VALIDATION_FAILED
            message = "The document has no operation of this name."
            return error_response(400, ErrorCode.GRAPHQL_VALIDATION_FAILED, message)
        await context.announce(asked.query)
        payload = result_payload(result)
        operation.told(payload)
        body = orjson.dumps(payload)
        if _RESPONSE_TYPE not in request.headers.get(hdrs.ACCEPT, ""):
            return self._answers.make(request, 200, _JSON_TYPE, body)
        return self._answers.make(request, 400 if is_request_error(result) else 200, _RESPONSE_TYPE, body)

    async def _context(self, request: web.Request) -> Context:
        try:
            viewer = await viewer_of_headers(self._services.identities, request.headers)
            return Context(self._services, viewer, address=request.remote)
        except (UnauthenticatedError, UnavailableError) as refusal:
            return Context(self._services, refusal=refusal, address=request.remote)
        except DatabaseUnavailableError:
            return Context(self._services, refusal=UnavailableError(), address=request.remote)


async def _body(request: web.Request) -> bytes:
    """The body of a request, at once where it came with the head, as those of GraphQL do.

    Raises:
        TimeoutError, HTTPRequestEntityTooLarge, RequestPayloadError: see `GraphQLHttp.post`.
    """
    content = request.content
    whole = content.is_eof() and content.exception() is None and hdrs.CONTENT_ENCODING not in request.headers
    if whole and content.total_bytes <= request.client_max_size:
        return content.read_nowait()
    async with asyncio.timeout(BODY_SECONDS):
        return await request.read()


async def _form(request: web.Request) -> GraphQLRequest:
    """The operation of a form: `operations`, `map`, then the one file that they name, not read yet.

    Raises:
        BadRequestError, BadUserInputError, ValueError, HTTPRequestEntityTooLarge: it is no such form.
    """
    reader = await request.multipart()
    operations = orjson.loads(await _part(request, reader, "operations"))
    places = orjson.loads(await _part(request, reader, "map"))
    if not isinstance(operations, dict):
        raise BadRequestError("operations must be one JSON object.")
    if not isinstance(places, dict) or len(places) != 1:
        raise BadRequestError("map must name one file.")
    ((name, paths),) = places.items()
    if not isinstance(paths, list) or len(paths) != 1 or not isinstance(paths[0], str):
        raise BadRequestError("map must name one place for the file.")
    part = await reader.next()
    if not isinstance(part, BodyPartReader) or part.name != name:
        raise BadRequestError("The file that map names must come next.")
    file = UploadedFile(part.filename or "", part.headers.get("Content-Type"), pieces(part.read_chunk))
    *way, last = paths[0].split(".")
    place: Any = operations
    for step in way:
        place = place.get(step) if isinstance(place, dict) else None
    if way[:1] != ["variables"] or not isinstance(place, dict) or place.get(last, file) is not None:
        raise BadRequestError("map must name a variable that is null.")
    place[last] = file
    return GraphQLRequest(operations)


async def _part(request: web.Request, reader: MultipartReader, name: str) -> bytes:
    """The next part of a form, which has to have this name, whole."""
    part = await reader.next()
    if not isinstance(part, BodyPartReader) or part.name != name:
        raise BadRequestError(f"A form with a file has first operations, then map; {name} is missing.")
    content = bytearray()
    async for piece in pieces(part.read_chunk):
        content += piece
        if len(content) > request.client_max_size:
            raise web.HTTPRequestEntityTooLarge(request.client_max_size, len(content))
    return bytes(content)


def error_response(status: int, code: ErrorCode, message: str) -> web.Response:
    """A response to what is no GraphQL request, in the shape of one."""
    body = {"errors": [{"message": message, "extensions": {"code": code.value}}]}
    return web.Response(status=status, body=orjson.dumps(body), content_type="application/json")


def not_allowed(message: str) -> web.Response:
    """405 with the method that is right (RFC 9110, section 15.5.6)."""
    response = error_response(405, ErrorCode.BAD_USER_INPUT, message)
    response.headers["Allow"] = "POST"
    return response


def result_payload(result: ExecutionResult) -> dict[str, Any]:
    """A result as the GraphQL specification (section 7.1) has it: `data` only where there was execution."""
    payload: dict[str, Any] = {}
    if result.errors:
        payload["errors"] = format_errors(result.errors)
    if not is_request_error(result):
        payload["data"] = result.data
    return payload


def is_request_error(result: ExecutionResult) -> bool:
    """Whether nothing was executed: the document or its variables were refused."""
    if isinstance(result, PreExecutionError):
        return True
    return result.data is None and bool(result.errors) and all(error.path is None for error in result.errors or ())
