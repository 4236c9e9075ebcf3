"""`/ingest/*`: what an analytics library in the browser sends, relayed to the host that the operator named.

The host sees the operator's key and never the caller's; no cookie, no token and no address of the caller's. The caller
sees what the host says to a request that went well, and never the key; of a failure it sees our words. docs/ingest.md
says what passes; everything else does not.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlencode

import aiohttp
from aiohttp import hdrs, web
from yarl import URL

from server.bodies import pieces
from server.graphql_http import error_response
from server.ingest_bodies import with_key
from server.origins import Origins
from services.errors import BadUserInputError, ErrorCode, PayloadTooLargeError
from services.rates import Rates

log = logging.getLogger(__name__)

PREFIX = "/ingest"
MAX_AT_ONCE = 128
MAX_ANSWER_BYTES = 8 * 1024 * 1024

_NAME = "[A-Za-z0-9_-]+"
_FILE = rf"{_NAME}(?:\.{_NAME})*"
# Nothing in these matches a percent sign, two slashes or two dots in a row: there is one way to spell a path.
_EVENTS = re.compile(r"/(?:e|s|i/v0/e|batch|capture|flags|decide)/?")
_READS = re.compile(r"/api/(?:surveys|early_access_features|web_experiments|product_tours)/?")
_CONFIG = re.compile(rf"/array/({_NAME})(/config|/config\.js|/array\.js)")
_SCRIPTS = re.compile(rf"/static/(?:{_FILE}/)?{_FILE}\.js")

# The times, versions and options that the libraries put into the address: no events, and no key but ours.
PARAMETERS = frozenset(
    {
        "_",
        "beacon",
        "config",
        "ip",
        "only_evaluate_survey_feature_flags",
        "retry_count",
        "sent_at",
        "stage",
        "t",
        "v",
        "ver",
    }
)
_MAX_PARAMETERS = 32

_REQUEST_HEADERS = (hdrs.USER_AGENT, hdrs.ACCEPT, hdrs.IF_NONE_MATCH, hdrs.IF_MODIFIED_SINCE)
_RESPONSE_HEADERS = (hdrs.CONTENT_TYPE, hdrs.CACHE_CONTROL, hdrs.ETAG, hdrs.LAST_MODIFIED)
_ENCODINGS = frozenset(("br", "deflate", "gzip", "zstd"))
_DATA_TYPES = frozenset(("application/json", "text/plain"))
_SCRIPT_TYPES = frozenset(("application/javascript", "application/x-javascript", "text/javascript"))
# Opened as a page, it is nothing; as a script or as data it is not affected.
_SAFE = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "sandbox; default-src 'none'"}

_LOOK_SECONDS = 0.1
_BUSY_SECONDS = "1"
_FORM = "application/x-www-form-urlencoded"
_REFUSED = "The analytics host did not take this request."


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestLimits:
    """What the relay may take of a process.

    Attributes:
        max_bytes: of a body, compressed and not.
        body_seconds: for a body to come.
        connect_seconds: for a connection to the host.
        silence_seconds: for the host's first word, and between two.
        total_seconds: for the whole exchange, the caller's reading included.
    """

    max_bytes: int
    body_seconds: float = 10.0
    connect_seconds: float = 5.0
    silence_seconds: float = 10.0
    total_seconds: float = 30.0


@dataclass(frozen=True, slots=True)
class _Target:
    """Where a request goes.

    Attributes:
        url: with the operator's key in it where the address has one.
        types: what the answer may be.
        alias: what the caller calls the project, put into the answer in the key's place.
        is_opaque: a script for everybody, which has no key in it and may come compressed.
    """

    url: URL
    types: frozenset[str]
    alias: str = "project"
    is_opaque: bool = False


class _HostError(Exception):
    """The host did not answer as it should; the text is for the log."""


class Ingest:
    """The handler of /ingest/*.

    Args:
        session: for the host alone; closed by whoever made it.
        url: where events go.
        assets_url: where scripts and configuration come from.
    """

    def __init__(
        self, session: aiohttp.ClientSession, *, url: str, assets_url: str, key: str, rates: Rates, limits: IngestLimits
    ) -> None:
        self._session = session
        self._url = url
        self._assets_url = assets_url
        self._key = key
        self._rates = rates
        self._limits = limits
        self._running = 0

    def add_routes(self, router: web.UrlDispatcher, origins: Origins) -> None:
        """Serve the relay, to programs and to pages of these origins."""

        async def handle(request: web.Request) -> web.StreamResponse:
            target = self._target(request)
            if target is None:
                return error_response(404, ErrorCode.NOT_FOUND, "There is no such path in the analytics relay.")
            # Not CORS, which lets a page send what it may not read: no other site's visitors fill this project.
            if not origins.admits(request):
                return error_response(403, ErrorCode.FORBIDDEN, "Analytics are not taken from this origin.")
            return await self._relay(request, target)

        router.add_route("*", PREFIX + "/{path:.*}", handle)

    def _target(self, request: web.Request) -> _Target | None:
        """Where this request goes; None: nowhere. Decided by the path as it was sent, before anybody decoded it."""
        path, _, query = request.raw_path.partition("?")
        if not path.startswith(PREFIX + "/"):
            return None
        path = path[len(PREFIX) :]
        try:
            parameters = parse_qsl(query, keep_blank_values=True, errors="strict", max_num_fields=_MAX_PARAMETERS)
        except ValueError:
            return None
        parameters = [(name, value) for name, value in parameters if name in PARAMETERS]
        if request.method == "POST" and _EVENTS.fullmatch(path):
            return _Target(_url(self._url + path, parameters), _DATA_TYPES)
        if request.method != "GET":
            return None
        if _READS.fullmatch(path):
            return _Target(_url(self._url + path, [*parameters, ("token", self._key)]), _DATA_TYPES)
        if (config := _CONFIG.fullmatch(path)) is not None:
            alias, file = config.groups()
            types = _SCRIPT_TYPES if file.endswith(".js") else _DATA_TYPES
            return _Target(_url(f"{self._assets_url}/array/{self._key}{file}", parameters), types, alias)
        if _SCRIPTS.fullmatch(path):
            return _Target(_url(self._assets_url + path, parameters), _SCRIPT_TYPES, is_opaque=True)
        return None

    async def _relay(self, request: web.Request, target: _Target) -> web.StreamResponse:
        if wait := self._rates.take(request.remote):
            return _again_later(429, ErrorCode.RATE_LIMITED, "Too many analytics requests; try again later.", str(wait))
        if self._running >= MAX_AT_ONCE:
            message = "The analytics relay has too much to do; try again."
            return _again_later(503, ErrorCode.UNAVAILABLE, message, _BUSY_SECONDS)
        with self._counted():
            try:
                body = await self._body(request) if request.method == "POST" else None
            except PayloadTooLargeError as refusal:
                return error_response(413, ErrorCode.PAYLOAD_TOO_LARGE, refusal.message)
            except BadUserInputError as refusal:
                return error_response(400, ErrorCode.BAD_USER_INPUT, refusal.message)
            except TimeoutError:
                return error_response(408, ErrorCode.BAD_USER_INPUT, "The body did not come to its end in time.")
            return await self._exchange(request, target, body)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    async def _body(self, request: web.Request) -> bytes:
        """The body as it goes on.

        Raises:
            BadUserInputError, PayloadTooLargeError: it does not.
            TimeoutError: it did not come to its end.
        """
        limit = self._limits.max_bytes
        body = bytearray()
        async with asyncio.timeout(self._limits.body_seconds):
            async for piece in pieces(request.content.readany):
                body += piece
                if len(body) > limit:
                    raise PayloadTooLargeError(f"The body may be {limit} bytes long.")
        return with_key(bytes(body), self._key, is_form=request.content_type == _FORM, max_bytes=limit)

    async def _exchange(self, request: web.Request, target: _Target, body: bytes | None) -> web.StreamResponse:
        response = web.StreamResponse(headers=_SAFE)
        try:
            async with _until_it_leaves(request), asyncio.timeout(self._limits.total_seconds):
                return await self._pass_on(request, target, body, response)
        except TimeoutError:
            status, reason = 504, "the host was too slow, or the caller left"
        except _HostError as error:
            status, reason = 502, str(error)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            # The kind alone: the text of these errors has addresses in it, and the key.
            status, reason = 502, type(error).__name__
        except BaseException:
            _abort_begun(request, response)
            raise
        log.info("a request to the analytics host failed: %s", reason)
        if response.prepared:
            # What has come must not be taken for the whole.
            _abort_begun(request, response)
            return response
        message = "The analytics host took too long." if status == 504 else "The analytics host cannot be reached now."
        return error_response(status, ErrorCode.UNAVAILABLE, message)

    async def _pass_on(
        self, request: web.Request, target: _Target, body: bytes | None, response: web.StreamResponse
    ) -> web.StreamResponse:
        limits = self._limits
        async with self._session.request(
            request.method,
            target.url,
            data=body,
            headers=_headers(request, target, has_body=body is not None),
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(
                total=None,
                connect=limits.connect_seconds,
                sock_connect=limits.connect_seconds,
                sock_read=limits.silence_seconds,
            ),
        ) as answer:
            refusal = _refusal(answer)
            if refusal is not None:
                return refusal
            _describe(answer, target, response)
            hidden = None if target.is_opaque else self._key.encode()
            async with aclosing(_content(answer, hidden, target.alias.encode())) as content:
                # Waited for before the caller is told that all is well.
                first = await anext(content, b"")
                await response.prepare(request)
                if first:
                    await response.write(first)
                async for piece in content:
                    await response.write(piece)
            await response.write_eof()
        return response


def _url(address: str, parameters: list[tuple[str, str]]) -> URL:
    # Encoded by us alone, so that nothing in it is read twice.
    return URL(f"{address}?{urlencode(parameters)}" if parameters else address, encoded=True)


def _headers(request: web.Request, target: _Target, *, has_body: bool) -> dict[str, str]:
    headers: dict[str, str] = {name: request.headers[name] for name in _REQUEST_HEADERS if name in request.headers}
    # What has the key in it must be readable for us; a script only passes through.
    asked = {
        coding.partition(";")[0].strip().lower() for coding in request.headers.get("Accept-Encoding", "").split(",")
    }
    codings = sorted(asked & _ENCODINGS) if target.is_opaque else []
    headers[hdrs.ACCEPT_ENCODING] = ", ".join(codings) or "identity"
    if has_body:
        headers[hdrs.CONTENT_TYPE] = "application/json"
    return headers


def _refusal(answer: aiohttp.ClientResponse) -> web.Response | None:
    """Our words for an answer that is none; None where it is one.

    Raises:
        _HostError: the host does not do what it is there for.
    """
    match answer.status:
        case 200 | 201 | 202 | 204 | 304:
            return None
        case 400 | 422:
            return error_response(400, ErrorCode.BAD_USER_INPUT, _REFUSED)
        case 404:
            return error_response(404, ErrorCode.NOT_FOUND, "The analytics host has no such thing.")
        case 413:
            return error_response(413, ErrorCode.PAYLOAD_TOO_LARGE, "The analytics host takes no body of this size.")
        case 429:
            wait = answer.headers.get(hdrs.RETRY_AFTER, "")
            seconds = wait if re.fullmatch("[0-9]{1,5}", wait) else _BUSY_SECONDS
            return _again_later(429, ErrorCode.RATE_LIMITED, "The analytics host takes no more for now.", seconds)
        case 401 | 403:
            log.warning("the analytics host refused INGEST_API_KEY with status %d", answer.status)
    raise _HostError(f"status {answer.status}")


def _describe(answer: aiohttp.ClientResponse, target: _Target, response: web.StreamResponse) -> None:
    """Set the status and the headers that pass.

    Raises:
        _HostError: what comes is not what was asked for.
    """
    encoding = answer.headers.get(hdrs.CONTENT_ENCODING, "identity").lower()
    if encoding != "identity":
        if not target.is_opaque or encoding not in _ENCODINGS:
            raise _HostError("a body that is compressed")
        response.headers[hdrs.CONTENT_ENCODING] = encoding
    if target.is_opaque:
        response.headers[hdrs.VARY] = "Accept-Encoding"
    has_body = answer.status not in (204, 304)
    # A page of the host's would be a page of ours. What has no type is none: browsers may not guess one.
    is_typed = hdrs.CONTENT_TYPE in answer.headers
    if has_body and (is_typed or target.is_opaque) and answer.content_type not in target.types:
        raise _HostError("a body of another type")
    for name in _RESPONSE_HEADERS:
        if name in answer.headers and (has_body or name != hdrs.CONTENT_TYPE):
            response.headers[name] = answer.headers[name]
    response.headers.setdefault(hdrs.CACHE_CONTROL, "no-store")
    response.set_status(answer.status)


async def _content(answer: aiohttp.ClientResponse, hidden: bytes | None, alias: bytes) -> AsyncGenerator[bytes, None]:
    """The body in pieces, with the alias in the place of what is hidden, however the host cuts it.

    Raises:
        _HostError: it is too large.
    """
    left = MAX_ANSWER_BYTES
    held = b""
    async for piece in answer.content.iter_any():
        left -= len(piece)
        if left < 0:
            raise _HostError("a body that is too large")
        if hidden is None:
            yield piece
            continue
        held = (held + piece).replace(hidden, alias)
        # The end may be a beginning of it.
        most = min(len(hidden) - 1, len(held))
        keep = next((size for size in range(most, 0, -1) if held.endswith(hidden[:size])), 0)
        if len(held) > keep:
            yield held[: len(held) - keep]
        held = held[len(held) - keep :]
    if held:
        yield held


@asynccontextmanager
async def _until_it_leaves(request: web.Request) -> AsyncIterator[None]:
    """End what is inside by TimeoutError once the caller has hung up; aiohttp tells nobody who does not write."""
    loop = asyncio.get_running_loop()
    timer: asyncio.TimerHandle
    async with asyncio.timeout(None) as leaving:

        def look() -> None:
            nonlocal timer
            if request.transport is None or request.transport.is_closing():
                leaving.reschedule(loop.time())
            else:
                timer = loop.call_later(_LOOK_SECONDS, look)

        timer = loop.call_later(_LOOK_SECONDS, look)
        try:
            yield
        finally:
            timer.cancel()


def _abort_begun(request: web.Request, response: web.StreamResponse) -> None:
    if response.prepared and request.transport is not None:
        request.transport.abort()


def _again_later(status: int, code: ErrorCode, message: str, seconds: str) -> web.Response:
    response = error_response(status, code, message)
    response.headers[hdrs.RETRY_AFTER] = seconds
    return response
