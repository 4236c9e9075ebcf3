"""HTTP towards model vendors: the shared session, one bounded exchange under deadlines, and what its failures mean.

The failures of an exchange, by the moment they happen:

    no connection (refused, DNS, TLS)          PROVIDER_UNAVAILABLE
    a deadline passed, at any moment           PROVIDER_TIMEOUT
    not HTTP at all                            PROVIDER_PROTOCOL
    a status other than 200                    by `failure_for_status`
    reset while the answer arrives             PROVIDER_UNAVAILABLE
    hung up while the answer arrives           none: the bytes end, and the wire format tells if it is whole
    more bytes than allowed                    PROVIDER_PROTOCOL

No failure carries a cause or a context: aiohttp's errors name hosts, and the `repr` of some holds the request's headers
with the key.
"""

from __future__ import annotations

import asyncio
import email.utils
import io
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

import aiohttp
from aiohttp.client_proto import ResponseHandler
from yarl import URL

from providers.base import FailureCode, ProviderFailure

_logger = logging.getLogger(__name__)

DEFAULT_MAX_ANSWER_BYTES = 64 * 1024 * 1024
# An event with an image: 24 MiB of it, about as much as a file may have, in base64.
MAX_IMAGE_EVENT_BYTES = 32 * 1024 * 1024
MAX_RETRY_AFTER_SECONDS = 3600

_CONNECTIONS = 4096
_LARGE_BODY_BYTES = 1024 * 1024
_ERROR_BODY_SECONDS = 5.0
# The end of the chunked body comes in the packet of the last event or right behind it. Waiting this long for it keeps
# the connection, and so spares the next answer a TLS handshake.
_SETTLE_SECONDS = 0.05

_SENTENCES = {
    FailureCode.PROVIDER_UNAVAILABLE: "The model provider cannot be reached or is overloaded; try again in a moment.",
    FailureCode.PROVIDER_TIMEOUT: "The model provider took too long to answer; try again or choose another model.",
    FailureCode.PROVIDER_REJECTED_KEY: "The model provider did not accept the API key; check the key and its rights.",
    FailureCode.PROVIDER_REJECTED_REQUEST: (
        "The model provider refused the request; check that the model exists and allows the chosen settings."
    ),
    FailureCode.PROVIDER_PROTOCOL: (
        "The model provider's answer could not be understood; try again or check the provider's base address."
    ),
    FailureCode.RATE_LIMITED: "The model provider is getting too many requests; try again later.",
    FailureCode.CONTEXT_TOO_LONG: (
        "The conversation is too long for this model; shorten it or choose a model with a larger context."
    ),
    FailureCode.CONTENT_FILTERED: "The model provider's content filter refused the request; rephrase the message.",
}
REDIRECTED = "The model provider redirected the request, which is not followed; check the provider's base address."
OUT_OF_CREDIT = "The model provider refused the request for lack of credit; check the account's billing."
TOO_LARGE = "The model provider's answer is larger than allowed; ask for a shorter one."


@dataclass(slots=True, frozen=True)
class Deadlines:
    """How long a vendor may take, in seconds.

    Attributes:
        connect_seconds: for a free place in the pool, DNS, TCP and TLS.
        first_event_seconds: from the start of the first request to the first event, retries and the pauses before them
            included; for an answer in one piece, to its end.
        idle_seconds: from the moment an event was handled to the next one; keep-alive comments do not count.
        total_seconds: for the whole answer, the consumer's own pauses included.
        trailer_seconds: from the mark that the answer is whole to the end of the stream, for usage and the like. What
            is still missing then is done without; the answer does not fail.
    """

    connect_seconds: float = 10
    first_event_seconds: float = 60
    idle_seconds: float = 60
    total_seconds: float = 1800
    trailer_seconds: float = 5


def make_client_session(connector: aiohttp.TCPConnector | None = None) -> aiohttp.ClientSession:
    """A session for all vendors and keys of this process. Call it in the running loop; the caller closes it.

    Args:
        connector: what opens its connections, closed with it. None: one that opens any, for addresses that the operator
            has set. For those that users give there is `providers.guard.EndpointGuard.make_session`.

    It keeps no cookies, reads no proxy or netrc settings from the environment, raises for no status and sets no total
    timeout: `Exchange` has its own deadlines.
    """
    if connector is None:
        # A stream occupies its connection for minutes; aiohttp's default of 100 would queue the 101st reader.
        connector = aiohttp.TCPConnector(limit=_CONNECTIONS, ttl_dns_cache=60)
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None),
        headers={"User-Agent": "threadgraph"},
        trust_env=False,
        raise_for_status=False,
        auto_decompress=False,
    )


class Exchange:
    """One POST and the reading of its answer, under deadlines and a bound of bytes. Use it once; `close` it always.

    Args:
        started: when the first request for the same answer began, on the loop's clock; None: this is the first.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        deadlines: Deadlines,
        *,
        max_answer_bytes: int = DEFAULT_MAX_ANSWER_BYTES,
        started: float | None = None,
    ) -> None:
        self._session = session
        self._deadlines = deadlines
        self._bytes_left = max_answer_bytes
        self._loop = asyncio.get_running_loop()
        if started is None:
            started = self._loop.time()
        self._silent_until = started + deadlines.first_event_seconds
        self._total_until = started + deadlines.total_seconds
        self._allowed_silence: float | None = None
        self._posting: asyncio.Timeout | None = None
        self._response: aiohttp.ClientResponse | None = None
        self._protocol: ResponseHandler | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._reading = False
        self._ended = False
        self._broken = False
        self._late = False
        self._aborted = False

    async def post(self, url: URL, *, headers: Mapping[str, str], body: bytes) -> aiohttp.ClientResponse:
        """Send the request; returns when the answer's head is there, whatever its status. Follows no redirect.

        Raises:
            ProviderFailure: no connection, no HTTP, or no head in time.
        """
        code = FailureCode.PROVIDER_UNAVAILABLE
        connect = self._deadlines.connect_seconds
        try:
            async with asyncio.timeout_at(self._due()) as self._posting:
                self._response = await self._session.post(
                    url,
                    # In pieces where it is large (files are): written at once it would make all others wait.
                    data=body if len(body) <= _LARGE_BODY_BYTES else io.BytesIO(body),
                    headers=headers,
                    allow_redirects=False,
                    raise_for_status=False,
                    auto_decompress=False,
                    timeout=aiohttp.ClientTimeout(total=None, connect=connect, sock_connect=connect),
                )
        except TimeoutError as error:
            _log_failed_post(error)
            code = FailureCode.PROVIDER_TIMEOUT
        except aiohttp.ClientResponseError as error:
            _log_failed_post(error)
            code = FailureCode.PROVIDER_PROTOCOL
        except (aiohttp.ClientError, OSError, UnicodeError) as error:  # UnicodeError: a host name DNS cannot encode
            _log_failed_post(error)
        self._posting = None
        if self._aborted:
            raise failure(FailureCode.PROVIDER_UNAVAILABLE)
        if self._response is None:
            raise failure(code)
        self._protocol = self._response.connection.protocol if self._response.connection else None
        return self._response

    async def read(self) -> bytes:
        """The next bytes of the answer as they arrived; empty at its end, also where the vendor hung up too early.

        Raises:
            ProviderFailure: reset, a deadline passed, or the answer is too large.
        """
        assert self._response is not None
        content = self._response.content
        self._start_clocks()
        if self._ended:
            return self._end()
        self._reading = True
        try:
            chunk = await content.readany()
        except (aiohttp.ClientError, OSError):
            # readany() raises at once when the connection is lost, although it still holds what came before; without
            # this, a slow consumer would lose the last words of an interrupted answer.
            chunk = content._read_nowait(-1)  # noqa: SLF001 - there is no public way to those bytes
            self._ended = self._broken = True
        finally:
            self._reading = False
        if not chunk:
            return self._end()
        self._bytes_left -= len(chunk)
        if self._bytes_left < 0:
            raise ProviderFailure(FailureCode.PROVIDER_PROTOCOL, TOO_LARGE)
        return chunk

    async def read_whole(self, max_bytes: int) -> bytes:
        """The rest of the answer in one piece.

        Raises:
            ProviderFailure: as `read`, and when there are more than `max_bytes`.
        """
        body = bytearray()
        while chunk := await self.read():
            body += chunk
            if len(body) > max_bytes:
                raise ProviderFailure(FailureCode.PROVIDER_PROTOCOL, TOO_LARGE)
        return bytes(body)

    async def read_error_body(self, max_bytes: int = 64 * 1024) -> bytes:
        """The beginning of a refusal's body, for choosing a failure code; never for a reader's eyes. Raises nothing."""
        self.allow_silence(_ERROR_BODY_SECONDS)
        body = bytearray()
        try:
            while len(body) < max_bytes and (chunk := await self.read()):
                body += chunk
        except ProviderFailure:
            pass  # the status alone has to do
        return bytes(body[:max_bytes])

    def allow_silence(self, seconds: float) -> None:
        """Something meaningful has arrived: once the next read begins, the vendor may be silent for this long."""
        self._allowed_silence = seconds

    async def settle(self) -> None:
        """Give the end of a finished answer a moment to arrive, so that `close` can keep the connection."""
        assert self._response is not None
        try:
            async with asyncio.timeout(_SETTLE_SECONDS):
                while await self._response.content.readany():
                    pass
        except (TimeoutError, aiohttp.ClientError, OSError):
            return

    def abort(self) -> None:
        """From another task: make whoever waits for this exchange fail with PROVIDER_UNAVAILABLE now."""
        self._aborted = self._ended = True
        if self._posting is not None:
            self._posting.reschedule(self._loop.time())
        if self._response is not None:
            self._response.close()

    def close(self) -> None:
        """Close the connection at once, or give it back where the answer was read to its end."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._response is not None:
            self._response.close()

    def _start_clocks(self) -> None:
        if self._allowed_silence is not None:
            self._silent_until = self._loop.time() + self._allowed_silence
            self._allowed_silence = None
            if self._timer is not None and self._timer.when() > self._silent_until:
                self._timer.cancel()
                self._timer = None
        if self._timer is None:
            self._watch()

    def _due(self) -> float:
        return min(self._silent_until, self._total_until)

    def _watch(self) -> None:
        """Wait for the nearest deadline with one timer an exchange, set anew only when it fires.

        `asyncio.timeout` around every read would be simpler; it costs 8 µs a chunk, more than parsing the event in it.
        """
        if self._loop.time() < self._due():
            self._timer = self._loop.call_at(self._due(), self._on_timer)
            return
        self._timer = None
        self._late = self._ended = True
        assert self._response is not None
        self._response.close()  # wakes the reader with an error

    def _on_timer(self) -> None:
        self._timer = None
        # Without a reader it is the consumer who takes its time; the next read looks at the clock again.
        if self._reading:
            self._watch()

    def _end(self) -> bytes:
        self._ended = True
        if self._aborted:
            raise failure(FailureCode.PROVIDER_UNAVAILABLE)
        if self._late:
            raise failure(FailureCode.PROVIDER_TIMEOUT)
        if self._was_reset():
            raise failure(FailureCode.PROVIDER_UNAVAILABLE)
        return b""

    def _was_reset(self) -> bool:
        """Whether the connection broke, as opposed to being closed in the middle.

        aiohttp raises the same error for both where the body has a frame, and none at all where it ends with the
        connection; only the connection itself knows.
        """
        assert self._response is not None
        headers = self._response.headers
        framed = "Content-Length" in headers or "Transfer-Encoding" in headers
        if framed and not self._broken:
            return False
        return self._protocol is not None and isinstance(self._protocol.exception(), aiohttp.ClientOSError)


def failure(
    code: FailureCode, *, retry_after: int | None = None, passing: bool = False, of_reasoning: bool = False
) -> ProviderFailure:
    """A failure with the ordinary sentence of its code."""
    return ProviderFailure(code, _SENTENCES[code], retry_after=retry_after, passing=passing, of_reasoning=of_reasoning)


def failure_for_status(status: int, *, retry_after: int | None = None) -> ProviderFailure:
    """What an HTTP status other than 200 means where the body tells nothing better."""
    match status:
        case 401 | 403:
            return failure(FailureCode.PROVIDER_REJECTED_KEY)
        case 402:
            return ProviderFailure(FailureCode.PROVIDER_REJECTED_REQUEST, OUT_OF_CREDIT)
        case 408 | 504:
            return failure(FailureCode.PROVIDER_TIMEOUT, retry_after=retry_after, passing=status == 504)
        case 413:
            return failure(FailureCode.CONTEXT_TOO_LONG)
        case 429:
            return failure(FailureCode.RATE_LIMITED, retry_after=retry_after, passing=True)
    if 300 <= status < 400:
        return ProviderFailure(FailureCode.PROVIDER_PROTOCOL, REDIRECTED)
    if 400 <= status < 500:
        return failure(FailureCode.PROVIDER_REJECTED_REQUEST)
    if 500 <= status < 600:
        return failure(FailureCode.PROVIDER_UNAVAILABLE, retry_after=retry_after, passing=True)
    return failure(FailureCode.PROVIDER_PROTOCOL)


def retry_after_seconds(header: str | None, now: datetime) -> int | None:
    """The seconds a Retry-After header asks for (RFC 9110, 10.2.3), from 0 to `MAX_RETRY_AFTER_SECONDS`.

    Fractions, which some vendors send, are rounded up. None for no header, a negative number or anything else.
    """
    if header is None:
        return None
    text = header.strip()
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        return math.ceil(min(float(text), MAX_RETRY_AFTER_SECONDS))
    try:
        date = email.utils.parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return math.ceil(min(max((date - now).total_seconds(), 0), MAX_RETRY_AFTER_SECONDS))


def _log_failed_post(error: Exception) -> None:
    # The kind alone: the text of these errors names hosts and addresses.
    _logger.info("a request to a model provider failed: %s", type(error).__name__)
