"""What adapters share that read an answer as Server-Sent Events: from the request to its end, and when to ask again.

A wire format is two things to write: an `EventStreamProvider` that says what is sent where, and an `Answer` that says
what the events mean.

A request is sent again only where the vendor put it off (429, 5xx, or an error of that name as the first word of the
answer) and nothing has been told yet. A lost connection is no such case: the vendor may be at work, and would be paid
twice. And once, without the reasoning of answers before, where the vendor refused that: signatures can be bound to
everything that was said before them, which is left out by and by as a thread grows.
"""

from __future__ import annotations

import asyncio
import logging
import random
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

import aiohttp
import orjson
from yarl import URL

from providers.base import (
    FailureCode,
    FinishReason,
    GenerationRequest,
    ProviderEvent,
    ProviderFailure,
    TokenUsage,
)
from providers.errors import named_failure
from providers.http import (
    DEFAULT_MAX_ANSWER_BYTES,
    MAX_IMAGE_EVENT_BYTES,
    TOO_LARGE,
    Deadlines,
    Exchange,
    failure,
    failure_for_status,
    retry_after_seconds,
)
from providers.payload import parse_json
from providers.sse import DEFAULT_MAX_EVENT_BYTES, EventParser, EventTooLargeError, ServerSentEvent

_logger = logging.getLogger(__name__)

_PAGES = {"text/html", "application/xhtml+xml"}
_HEADER_SAFE_KEY_BYTES = frozenset(range(0x21, 0x7F))


@dataclass(slots=True, frozen=True)
class Retries:
    """How often and how soon a request is sent again that the vendor put off; all within `first_event_seconds`.

    Attributes:
        most: requests after the first one.
        first_pause_seconds: before the second request, doubled before every further one; a random share of up to a half
            is taken off, so that many clients do not come back at once. Added to what a Retry-After asks for.
        longest_wait_seconds: a vendor who asks for more is not asked again; the reader is told when it makes sense.
    """

    most: int = 2
    first_pause_seconds: float = 0.5
    longest_wait_seconds: float = 5

    def pause_before(self, number: int, refusal: ProviderFailure) -> float | None:
        """Seconds to wait before the request of this number (the first retry is 1); None: do not send it."""
        wanted = refusal.retry_after or 0
        if not refusal.passing or number > self.most or wanted > self.longest_wait_seconds:
            return None
        pause = self.first_pause_seconds * 2.0 ** (number - 1)
        return wanted + pause * (1 - random.random() / 2)  # noqa: S311 - spreads load, guards nothing


class Answer(ABC):
    """What an answer has brought so far: events ready to be given out, and what decides how it ends.

    Attributes:
        over: nothing more needs to be read.
        finish: why the model stopped, once the vendor has said so.
    """

    def __init__(self) -> None:
        self.over = False
        self.finish: FinishReason | None = None
        self._events: list[ProviderEvent] = []
        self._usage: TokenUsage | None = None
        self._told = False

    @property
    def spoke(self) -> bool:
        """Whether there was any event yet."""
        return self._told or bool(self._events)

    def collect(self) -> list[ProviderEvent]:
        """The events since the last time."""
        events, self._events = self._events, []
        if events:
            self._told = True
        return events

    def report_usage(self) -> None:
        """Tell the last count the vendor gave, if it gave one: some count along in every chunk."""
        if self._usage is not None:
            self._events.append(self._usage)
            self._usage = None

    @abstractmethod
    def take(self, message: ServerSentEvent) -> bool:
        """Take one event of the stream; False where it was only a sign of life.

        Raises:
            ProviderFailure: it is no JSON, or an error.
        """

    @abstractmethod
    def take_tail(self, tail: ServerSentEvent | None) -> None:
        """Take the end of the stream; `tail` is an event without its blank line, which may be cut short."""

    @abstractmethod
    def take_whole(self, body: bytes) -> None:
        """Take an answer in one piece, from a server that does not stream.

        Raises:
            ProviderFailure: it is no answer, or an error.
        """

    @abstractmethod
    def end(self) -> None:
        """Nothing more will come: tell the usage, and `Finish` only where the vendor marked the end."""


class EventStreamProvider(ABC):
    """A `Provider` for one address and key. Cheap to make: the session is shared.

    Args:
        session: owned and closed by the caller; see `providers.http.make_client_session`.
        url: where requests are posted to.
        headers: sent with each, the key among them.
        deadlines: how long the vendor may take.
        max_answer_bytes: bound on one answer as it comes over the wire.
        max_event_bytes: bound on one event, and on an answer that comes in one piece; more where images are wanted.
        retries: how often a request is sent again that the vendor put off.
    """

    def __init__(
        self,
        *,
        session: aiohttp.ClientSession,
        url: URL,
        headers: Mapping[str, str],
        deadlines: Deadlines | None = None,
        max_answer_bytes: int = DEFAULT_MAX_ANSWER_BYTES,
        max_event_bytes: int = DEFAULT_MAX_EVENT_BYTES,
        retries: Retries | None = None,
    ) -> None:
        self._session = session
        self._url = url
        self._headers = {
            "Content-Type": "application/json",
            "Accept": "text/event-stream, application/json",
            # A compressed answer could be a bomb, and would hold tokens back until a block is full.
            "Accept-Encoding": "identity",
            **headers,
        }
        self._deadlines = deadlines or Deadlines()
        self._max_answer_bytes = max_answer_bytes
        self._max_event_bytes = max_event_bytes
        self._retries = retries or Retries()
        self._running: set[Exchange] = set()
        self._closing = asyncio.Event()

    @abstractmethod
    def _request_body(self, request: GenerationRequest) -> object:
        """The request as JSON in the vendor's terms."""

    @abstractmethod
    def _new_answer(self) -> Answer:
        """What will understand the answer."""

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[ProviderEvent, None]:
        """Stream one answer; see `Provider.stream`. Closing or cancelling closes the connection at once.

        Raises:
            ProviderFailure: from the generator, before or after any number of events.
        """
        if self._closing.is_set() or self._session.closed:
            raise failure(FailureCode.PROVIDER_UNAVAILABLE)
        most_bytes = max(self._max_event_bytes, MAX_IMAGE_EVENT_BYTES if request.image_output else 0)
        body = await self._written(request)
        # The bytes of files are held while they are sent, and not for as long as the answer takes.
        simpler = request.without_reasoning()
        del request
        started, retries = asyncio.get_running_loop().time(), 0
        pause: float | None
        while True:
            answer = self._new_answer()
            exchange = Exchange(
                self._session, self._deadlines, max_answer_bytes=self._max_answer_bytes, started=started
            )
            self._running.add(exchange)
            try:
                parser = await self._open(exchange, body, answer, most_bytes)
                while not answer.over:
                    await self._take_chunk(exchange, parser, answer)
                    for event in answer.collect():
                        body, simpler = b"", None
                        yield event
                answer.end()
                for event in answer.collect():
                    yield event
                await exchange.settle()
            except ProviderFailure as refusal:
                if refusal.of_reasoning and simpler is not None and not answer.spoke:
                    body, simpler, pause = await self._written(simpler), None, 0.0
                else:
                    retries += 1
                    pause = None if answer.spoke else self._pause(retries, refusal, started)
                if pause is None:
                    answer.report_usage()
                    for event in answer.collect():
                        yield event
                    raise
            else:
                return
            finally:
                self._running.discard(exchange)
                exchange.close()
            await self._rest(pause)

    async def _written(self, request: GenerationRequest) -> bytes:
        """The body of a request. With files it takes milliseconds, in which others are not made to wait."""
        if not request.has_files:
            return orjson.dumps(self._request_body(request))
        return await asyncio.to_thread(lambda: orjson.dumps(self._request_body(request)))

    async def close(self) -> None:
        """Make running streams fail with PROVIDER_UNAVAILABLE, and later ones too. The session stays open."""
        self._closing.set()
        for exchange in list(self._running):
            exchange.abort()

    async def _open(self, exchange: Exchange, body: bytes, answer: Answer, most_bytes: int) -> EventParser:
        response = await exchange.post(self._url, headers=self._headers, body=body)
        await _refuse_failures(exchange, response)
        if _media_type(response) == "application/json":
            answer.take_whole(await exchange.read_whole(most_bytes))
        return EventParser(max_event_bytes=most_bytes)

    async def _take_chunk(self, exchange: Exchange, parser: EventParser, answer: Answer) -> None:
        chunk = await self._next_chunk(exchange, answer)
        if not chunk:
            answer.take_tail(parser.finish())
            return
        heard = False
        try:
            for message in parser.feed(chunk):
                # An empty event is a keep-alive like a comment.
                if message.data and answer.take(message):
                    heard = True
                if answer.over:
                    return
        except EventTooLargeError:
            raise ProviderFailure(FailureCode.PROVIDER_PROTOCOL, TOO_LARGE) from None
        if heard:
            exchange.allow_silence(self._allowed_silence(answer))

    async def _next_chunk(self, exchange: Exchange, answer: Answer) -> bytes:
        """The next bytes; a connection lost after the vendor said why the model stopped is an ordinary end."""
        try:
            return await exchange.read()
        except ProviderFailure as lost:
            if answer.finish is None or lost.code is FailureCode.PROVIDER_PROTOCOL or self._closing.is_set():
                raise
            return b""

    def _allowed_silence(self, answer: Answer) -> float:
        idle = self._deadlines.idle_seconds
        return idle if answer.finish is None else min(idle, self._deadlines.trailer_seconds)

    def _pause(self, number: int, refusal: ProviderFailure, started: float) -> float | None:
        pause = self._retries.pause_before(number, refusal)
        if pause is None or self._closing.is_set():
            return None
        waited = asyncio.get_running_loop().time() - started
        if waited + pause >= min(self._deadlines.first_event_seconds, self._deadlines.total_seconds):
            return None
        _logger.info("a model provider put a request off (%s); it is sent again in %.1f s", refusal.code, pause)
        return pause

    async def _rest(self, seconds: float) -> None:
        """Wait, unless the provider is closed meanwhile."""
        try:
            async with asyncio.timeout(seconds):
                await self._closing.wait()
        except TimeoutError:
            return
        raise failure(FailureCode.PROVIDER_UNAVAILABLE)


def checked_base_url(base_url: str) -> URL:
    """The base address of a vendor.

    Raises:
        ValueError: it is no plain http or https address; the message does not contain it.
    """
    try:
        url = URL(base_url)
    except ValueError:
        url = URL()
    visible = base_url.isprintable() and " " not in base_url
    usable = url.scheme in ("http", "https") and url.host and not (url.user or url.password)
    if not visible or not usable or url.query_string or url.fragment:
        raise ValueError("The base address must be http or https with a host, and nothing behind the path.")
    return url


def checked_key(api_key: str) -> str:
    """The key, fit for a header.

    Raises:
        ValueError: it is not; the message does not contain it.
    """
    if not _HEADER_SAFE_KEY_BYTES.issuperset(map(ord, api_key)):
        raise ValueError("The API key has characters that an HTTP header cannot carry.")
    return api_key


def _media_type(response: aiohttp.ClientResponse) -> str:
    return response.headers.get("Content-Type", "").partition(";")[0].strip().lower()


async def _refuse_failures(exchange: Exchange, response: aiohttp.ClientResponse) -> None:
    """Raise for every answer that cannot hold a completion."""
    if response.status != 200:
        retry_after = retry_after_seconds(response.headers.get("Retry-After"), datetime.now(UTC))
        body = await exchange.read_error_body() if response.status >= 400 else b""
        refusal = named_failure(parse_json(body)) or failure_for_status(response.status, retry_after=retry_after)
        # A header of OpenAI's and Anthropic's servers, which their own clients obey.
        if response.headers.get("X-Should-Retry") == "false":
            refusal.passing = False
        raise refusal
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding != "identity" or _media_type(response) in _PAGES:
        raise failure(FailureCode.PROVIDER_PROTOCOL)
