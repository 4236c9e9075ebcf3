"""The adapter for the chat-completions wire format, as OpenAI set it and many vendors and local servers speak it.

The format has dialects. Where they differ, this adapter takes what makes sense and skips what does not: a wrong type in
an optional field must not cost the reader an answer. It is strict about what decides: an event has to be JSON, an
`error` ends the answer, and only a `finish_reason` or `[DONE]` makes an answer whole.

What comes when: text, reasoning and whole tool calls as they arrive; then at most one `TokenUsage`, also before a
failure where the vendor had sent one by then; then `Finish`.

Measured like the event parser: 9 µs an event for parsing and understanding, 11 to 13 µs of CPU with aiohttp and the
socket while a vendor sends faster than is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias

import aiohttp
import orjson
from yarl import URL

from models.text import clean, clean_json
from providers.base import (
    FailureCode,
    Finish,
    FinishReason,
    GenerationRequest,
    ProviderEvent,
    ProviderFailure,
    ReasoningDelta,
    TextDelta,
    TokenUsage,
    ToolCall,
)
from providers.http import (
    DEFAULT_MAX_ANSWER_BYTES,
    OUT_OF_CREDIT,
    TOO_LARGE,
    Deadlines,
    Exchange,
    failure,
    failure_for_status,
    retry_after_seconds,
)
from providers.sse import DEFAULT_MAX_EVENT_BYTES, EventParser, EventTooLargeError, ServerSentEvent

OutputLimitField: TypeAlias = Literal["max_completion_tokens", "max_tokens"]

_DONE = b"[DONE]"
_MAX_TOOL_CALLS = 256
_MAX_TOKEN_COUNT = 2**31 - 1  # what a GraphQL Int holds

_FINISH_REASONS = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "tool_calls": FinishReason.TOOL_CALLS,
    "function_call": FinishReason.TOOL_CALLS,
    "content_filter": FinishReason.CONTENT_FILTER,
}

# How vendors name what a status alone does not tell, as `code`, `type` or `status` of the error object, in lower case.
_OUT_OF_CREDIT_NAMES = {"insufficient_quota", "billing_hard_limit_reached"}
_ERROR_NAMES = {
    "context_length_exceeded": FailureCode.CONTEXT_TOO_LONG,
    "exceed_context_size_error": FailureCode.CONTEXT_TOO_LONG,  # llama.cpp
    "content_filter": FailureCode.CONTENT_FILTERED,
    "content_policy_violation": FailureCode.CONTENT_FILTERED,
    "invalid_api_key": FailureCode.PROVIDER_REJECTED_KEY,
}
# vLLM, Ollama and OpenRouter say it in the text only; Gemini refuses a wrong key with 400.
_ERROR_PHRASES = (
    ("context length", FailureCode.CONTEXT_TOO_LONG),
    ("context window", FailureCode.CONTEXT_TOO_LONG),
    ("api key not valid", FailureCode.PROVIDER_REJECTED_KEY),
)
_STREAM_ERROR_NAMES = {
    "rate_limit_exceeded": FailureCode.RATE_LIMITED,
    "rate_limit_error": FailureCode.RATE_LIMITED,
    "too_many_requests": FailureCode.RATE_LIMITED,
    "authentication_error": FailureCode.PROVIDER_REJECTED_KEY,
    "permission_error": FailureCode.PROVIDER_REJECTED_KEY,
    "invalid_request_error": FailureCode.PROVIDER_REJECTED_REQUEST,
    "model_not_found": FailureCode.PROVIDER_REJECTED_REQUEST,
    "not_found_error": FailureCode.PROVIDER_REJECTED_REQUEST,
    "timeout": FailureCode.PROVIDER_TIMEOUT,
    "timeout_error": FailureCode.PROVIDER_TIMEOUT,
}

_PAGES = {"text/html", "application/xhtml+xml"}
_HEADER_SAFE_KEY = re.compile("[\x21-\x7e]+")
_NOT_JSON = object()


class ChatCompletionsProvider:
    """A `Provider` for one base address and key.

    Cheap to make: the session is shared. Never retries.

    Args:
        session: owned and closed by the caller; see `providers.http.make_client_session`.
        base_url: what comes before `/chat/completions`, like `https://api.openai.com/v1`; http or https, without
            credentials, query or fragment. Whether this server may talk to that host is the caller's business.
        api_key: sent as bearer token; None sends no Authorization header.
        deadlines: how long the vendor may take.
        max_answer_bytes: bound on one answer as it comes over the wire.
        max_event_bytes: bound on one event, and on an answer that comes in one piece.
        output_limit_field: the name under which `max_output_tokens` is sent; some servers know the old one only.

    Raises:
        ValueError: the address or the key cannot be used; the message contains neither.
    """

    def __init__(
        self,
        *,
        session: aiohttp.ClientSession,
        base_url: str,
        api_key: str | None,
        deadlines: Deadlines | None = None,
        max_answer_bytes: int = DEFAULT_MAX_ANSWER_BYTES,
        max_event_bytes: int = DEFAULT_MAX_EVENT_BYTES,
        output_limit_field: OutputLimitField = "max_completion_tokens",
    ) -> None:
        self._session = session
        self._url = _completions_url(base_url)
        self._headers = _headers(api_key)
        self._deadlines = deadlines or Deadlines()
        self._max_answer_bytes = max_answer_bytes
        self._max_event_bytes = max_event_bytes
        self._output_limit_field = output_limit_field
        self._running: set[Exchange] = set()
        self._closed = False

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[ProviderEvent, None]:
        """Stream one answer; see `Provider.stream`. Closing or cancelling closes the connection at once.

        Raises:
            ProviderFailure: from the generator, before or after any number of events.
        """
        if self._closed or self._session.closed:
            raise failure(FailureCode.PROVIDER_UNAVAILABLE)
        body = _request_body(request, self._output_limit_field)
        answer = _Answer()
        exchange = Exchange(self._session, self._deadlines, max_answer_bytes=self._max_answer_bytes)
        self._running.add(exchange)
        try:
            response = await exchange.post(self._url, headers=self._headers, body=body)
            await _refuse_failures(exchange, response)
            if _media_type(response) == "application/json":
                answer.take_whole(await exchange.read_whole(self._max_event_bytes))
            parser = EventParser(max_event_bytes=self._max_event_bytes)
            while not answer.over:
                await self._take_chunk(exchange, parser, answer)
                for event in answer.collect():
                    yield event
            answer.end()
            for event in answer.collect():
                yield event
            await exchange.settle()
        except ProviderFailure:
            answer.report_usage()
            for event in answer.collect():
                yield event
            raise
        finally:
            self._running.discard(exchange)
            exchange.close()

    async def close(self) -> None:
        """Make running streams fail with PROVIDER_UNAVAILABLE, and later ones too. The session stays open."""
        self._closed = True
        for exchange in list(self._running):
            exchange.abort()

    async def _take_chunk(self, exchange: Exchange, parser: EventParser, answer: _Answer) -> None:
        chunk = await self._next_chunk(exchange, answer)
        if not chunk:
            answer.take_tail(parser.finish())
            return
        heard = False
        try:
            for message in parser.feed(chunk):
                if message.data:  # an empty event is a keep-alive like a comment
                    answer.take(message)
                    heard = True
                if answer.over:
                    return
        except EventTooLargeError:
            raise ProviderFailure(FailureCode.PROVIDER_PROTOCOL, TOO_LARGE) from None
        if heard:
            exchange.allow_silence(self._allowed_silence(answer))

    async def _next_chunk(self, exchange: Exchange, answer: _Answer) -> bytes:
        """The next bytes; a connection lost behind the finish_reason is an ordinary end."""
        try:
            return await exchange.read()
        except ProviderFailure as lost:
            if answer.finish is None or lost.code is FailureCode.PROVIDER_PROTOCOL or self._closed:
                raise
            return b""

    def _allowed_silence(self, answer: _Answer) -> float:
        idle = self._deadlines.idle_seconds
        return idle if answer.finish is None else min(idle, self._deadlines.trailer_seconds)


def _completions_url(base_url: str) -> URL:
    try:
        url = URL(base_url)
    except ValueError:
        url = URL()
    visible = base_url.isprintable() and " " not in base_url
    usable = url.scheme in ("http", "https") and url.host and not (url.user or url.password)
    if not visible or not usable or url.query_string or url.fragment:
        raise ValueError("The base address must be http or https with a host, and nothing behind the path.")
    return url / "chat" / "completions"


def _headers(api_key: str | None) -> dict[str, str]:
    headers = {
        "Content-Type": "application/json",
        "Accept": "text/event-stream, application/json",
        # A compressed answer could be a bomb, and would hold tokens back until a block is full.
        "Accept-Encoding": "identity",
    }
    if not api_key:
        return headers
    if not _HEADER_SAFE_KEY.fullmatch(api_key):
        raise ValueError("The API key has characters that an HTTP header cannot carry.")
    return {**headers, "Authorization": f"Bearer {api_key}"}


def _request_body(request: GenerationRequest, output_limit_field: OutputLimitField) -> bytes:
    body: dict[str, Any] = {
        "model": request.model,
        "messages": [{"role": message.role, "content": message.text} for message in request.messages],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if request.reasoning_effort is not None:
        body["reasoning_effort"] = request.reasoning_effort.lower()
    if request.max_output_tokens is not None:
        body[output_limit_field] = request.max_output_tokens
    if request.user is not None:
        body["user"] = request.user
    return orjson.dumps(body)


def _media_type(response: aiohttp.ClientResponse) -> str:
    return response.headers.get("Content-Type", "").partition(";")[0].strip().lower()


async def _refuse_failures(exchange: Exchange, response: aiohttp.ClientResponse) -> None:
    """Raise for every answer that cannot hold a completion."""
    if response.status != 200:
        retry_after = retry_after_seconds(response.headers.get("Retry-After"), datetime.now(UTC))
        body = await exchange.read_error_body() if response.status >= 400 else b""
        raise _named_failure(_parse(body)) or failure_for_status(response.status, retry_after=retry_after)
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding != "identity" or _media_type(response) in _PAGES:
        raise failure(FailureCode.PROVIDER_PROTOCOL)


def _named_failure(body: Any) -> ProviderFailure | None:
    """What a vendor's error object says beyond its status; None where it says nothing that is known.

    The shapes seen: `{"error": {...}}`, the same in a list (Gemini), `{"error": "text"}` (Ollama), the bare object
    (Mistral).
    """
    if isinstance(body, list):
        body = body[0] if body else None
    error = body.get("error") or body if isinstance(body, dict) else None
    for name in _error_names(error):
        if name in _OUT_OF_CREDIT_NAMES:
            return ProviderFailure(FailureCode.PROVIDER_REJECTED_REQUEST, OUT_OF_CREDIT)
        if name in _ERROR_NAMES:
            return failure(_ERROR_NAMES[name])
    text = (error.get("message") if isinstance(error, dict) else error) or ""
    if isinstance(text, str):
        for phrase, code in _ERROR_PHRASES:
            if phrase in text.lower():
                return failure(code)
    return None


def _stream_failure(error: Any) -> ProviderFailure:
    """What an error inside of an answer means, where no status helps: its name, else its number, else "unavailable"."""
    if named := _named_failure({"error": error}):
        return named
    for name in _error_names(error):
        if name in _STREAM_ERROR_NAMES:
            return failure(_STREAM_ERROR_NAMES[name])
        if re.fullmatch("[45][0-9][0-9]", name):
            return failure_for_status(int(name))
    return failure(FailureCode.PROVIDER_UNAVAILABLE)


def _error_names(error: Any) -> list[str]:
    if not isinstance(error, dict):
        return []
    names = (error.get(key) for key in ("code", "type", "status"))
    return [str(name).lower() for name in names if isinstance(name, str | int)]


def _parse(data: bytes | str) -> Any:
    """The JSON value, or `_NOT_JSON`: no exception, because that would carry the vendor's text along."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        pass
    # orjson refuses what is repaired here rather than lost: invalid UTF-8 and lone surrogates.
    text = data.decode("utf-8", "replace") if isinstance(data, bytes) else data
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _NOT_JSON


class _Answer:
    """What an answer has brought so far: events ready to be given out, and what decides how it ends."""

    def __init__(self) -> None:
        self.over = False
        self.finish: FinishReason | None = None
        self._done = False
        self._events: list[ProviderEvent] = []
        self._usage: TokenUsage | None = None
        self._calls: list[_Call] = []
        self._calls_begun = 0

    def collect(self) -> list[ProviderEvent]:
        """The events since the last time."""
        events, self._events = self._events, []
        return events

    def take(self, message: ServerSentEvent) -> None:
        """One event of the stream.

        Raises:
            ProviderFailure: it is no JSON, or an error.
        """
        if message.data.startswith(_DONE):
            self.over = self._done = True
            return
        chunk = _parse(message.data)
        if chunk is _NOT_JSON:
            raise failure(FailureCode.PROVIDER_PROTOCOL)
        if not isinstance(chunk, dict):
            return
        if message.name == "error":
            raise _stream_failure(chunk.get("error") or chunk)
        self._take_chunk(chunk)

    def take_tail(self, tail: ServerSentEvent | None) -> None:
        """The stream ended; `tail` is an event without its blank line, which counts if it is whole.

        A JSON object that is cut short is not JSON any more, so being JSON means being whole.
        """
        self.over = True
        if tail is not None and (tail.data.startswith(_DONE) or _parse(tail.data) is not _NOT_JSON):
            self.take(tail)

    def take_whole(self, body: bytes) -> None:
        """An answer in one piece, from a server that does not stream."""
        completion = _parse(body)
        if not isinstance(completion, dict) or not (completion.get("error") or _first_choice(completion)):
            raise failure(FailureCode.PROVIDER_PROTOCOL)
        self._take_chunk(completion)
        self.over = self._done = True

    def end(self) -> None:
        """Nothing more will come. A `Finish` only where the vendor marked the end."""
        if self._done and self.finish is None:
            self.finish = FinishReason.TOOL_CALLS if self._calls else FinishReason.STOP
        if self.finish is None:
            self.report_usage()
            return
        self._complete_calls()
        self.report_usage()
        self._events.append(Finish(self.finish))

    def report_usage(self) -> None:
        # Some vendors count along in every chunk; only the last count is told, and once.
        if self._usage is not None:
            self._events.append(self._usage)
            self._usage = None

    def _take_chunk(self, chunk: dict[str, Any]) -> None:
        if error := chunk.get("error"):
            raise _stream_failure(error)
        if usage := chunk.get("usage"):
            self._usage = _token_usage(usage) or self._usage
        choice = _first_choice(chunk)
        if choice is None:
            return
        delta = choice.get("delta") or choice.get("message")
        if isinstance(delta, dict):
            self._take_delta(delta)
        if reason := choice.get("finish_reason"):
            self._take_finish_reason(reason, choice)

    def _take_delta(self, delta: dict[str, Any]) -> None:
        reasoning = delta.get("reasoning_content") or delta.get("reasoning")
        if reasoning and isinstance(reasoning, str):
            self._events.append(ReasoningDelta(clean(reasoning)))
        text = delta.get("content") or delta.get("refusal")
        if text and isinstance(text, str):
            self._events.append(TextDelta(clean(text)))
        fragments = delta.get("tool_calls")
        if isinstance(fragments, list):
            for fragment in fragments:
                if isinstance(fragment, dict):
                    self._take_call_fragment(fragment)

    def _take_finish_reason(self, reason: Any, choice: dict[str, Any]) -> None:
        if not isinstance(reason, str):
            return
        if reason == "error":  # OpenRouter: the vendor behind it broke off
            raise _stream_failure(choice.get("error"))
        self.finish = _FINISH_REASONS.get(reason, FinishReason.STOP)
        self._complete_calls()

    def _take_call_fragment(self, fragment: dict[str, Any]) -> None:
        function = fragment.get("function")
        if not isinstance(function, dict):
            function = {}
        name = _text(function.get("name"))
        call = self._call_for(fragment.get("index"), _text(fragment.get("id")), name)
        call.name = call.name or name
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            call.fragments.append(arguments)
        elif arguments is not None:
            call.value = arguments

    def _call_for(self, index: Any, call_id: str, name: str) -> _Call:
        """The call that a fragment belongs to: the latest one with its index, or a new one.

        Raises:
            ProviderFailure: more calls than any real answer has.
        """
        latest = next((call for call in reversed(self._calls) if call.index == index), None)
        if latest is not None and not _begins_another(latest, call_id, name):
            latest.call_id = latest.call_id or call_id
            return latest
        if self._calls_begun >= _MAX_TOOL_CALLS:
            raise failure(FailureCode.PROVIDER_PROTOCOL)
        # Calls are answered by their id, so one without gets a name of ours.
        call = _Call(index, call_id, fallback_id=f"call_{self._calls_begun}")
        self._calls_begun += 1
        self._calls.append(call)
        return call

    def _complete_calls(self) -> None:
        self._events.extend(call.complete() for call in self._calls)
        self._calls.clear()


@dataclass(slots=True)
class _Call:
    """A tool call that is still arriving in fragments."""

    index: Any
    call_id: str
    fallback_id: str
    name: str = ""
    fragments: list[str] = field(default_factory=list)
    value: Any = None

    def complete(self) -> ToolCall:
        arguments = self.value if self.value is not None else "".join(self.fragments)
        return ToolCall(clean(self.call_id) or self.fallback_id, clean(self.name), _arguments(arguments))


def _begins_another(latest: _Call, call_id: str, name: str) -> bool:
    """Whether a fragment is the first of a new call although it has the index of `latest`.

    Two dialects need this: Gemini's endpoint has numbered all parallel calls 0, each with its own id and name, and
    calls that come in one piece have no index at all.
    """
    if not name or (call_id and call_id == latest.call_id):
        return False
    return latest.index is None or bool(call_id and latest.call_id)


def _arguments(arguments: Any) -> Any:
    """Arguments as a JSON value that can be stored; where they are none, the text itself."""
    if isinstance(arguments, str):
        arguments = clean(arguments)
        if not arguments.strip():
            return {}  # a call without arguments
    value = _parse(arguments) if isinstance(arguments, str) else arguments
    unusable = arguments if isinstance(arguments, str) else None
    if value is _NOT_JSON:
        return unusable
    try:
        value = clean_json(value)
        orjson.dumps(value)  # refuses integers beyond 64 bits and more than 254 levels, and so would whoever stores it
    except (TypeError, RecursionError):
        return unusable
    return value


def _first_choice(chunk: dict[str, Any]) -> dict[str, Any] | None:
    choices = chunk.get("choices")
    if isinstance(choices, list) and choices and isinstance(choices[0], dict):
        return choices[0]
    return None


def _token_usage(usage: Any) -> TokenUsage | None:
    """The counts of a usage object; None where it counts nothing. What is missing or no sensible number counts as 0."""
    if not isinstance(usage, dict):
        return None
    prompt = _count(usage, "prompt_tokens")
    completion = _count(usage, "completion_tokens")
    if not prompt and not completion:
        return None
    cached = _count(usage.get("prompt_tokens_details"), "cached_tokens")
    reasoning = _count(usage.get("completion_tokens_details"), "reasoning_tokens")
    return TokenUsage(prompt, completion, min(reasoning, completion), min(cached, prompt))


def _count(counts: Any, name: str) -> int:
    value = counts.get(name) if isinstance(counts, dict) else None
    if isinstance(value, bool) or not isinstance(value, int):
        return 0
    return min(max(value, 0), _MAX_TOKEN_COUNT)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
