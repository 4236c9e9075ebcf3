"""The adapter for the chat-completions wire format, as OpenAI set it and many vendors and local servers speak it.

The format has dialects. Where they differ, this adapter takes what makes sense and skips what does not: a wrong type in
an optional field must not cost the reader an answer. It is strict about what decides: an event has to be JSON, an
`error` ends the answer, and only a `finish_reason` or `[DONE]` makes an answer whole.

What comes when: text, reasoning, images and whole tool calls as they arrive; then at most one `TokenUsage`, also before
a failure where the vendor had sent one by then; then `Finish`.

Rules of the request (beside those of `providers.conversation`):

- A content that is text alone is sent as a string, which every server of this format takes; else as a list of parts.
- Reasoning of answers before is not sent: the format has no place for it that vendors agree on.
- Tools are not declared with the calls of answers before: no server of this format asks for it, and some refuse tools.

Images come in `images` of a delta or a message, as data URLs. What is elsewhere is not fetched: the address would be
chosen by the vendor, and the request made by this server.

Counts follow one rule over all dialects: what `total_tokens` has beyond prompt and completion is reasoning that was not
counted as completion (Google, xAI), and becomes a share of it.

What an event costs is measured by `python -m bench.adapters`; docs/providers.md has the numbers.
"""

from __future__ import annotations

import re
from base64 import b64decode
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson

from models.text import clean
from providers.base import (
    FailureCode,
    Finish,
    FinishReason,
    GenerationRequest,
    ImageOutput,
    PromptFile,
    PromptMessage,
    PromptText,
    PromptToolCall,
    ReasoningDelta,
    TextDelta,
    TokenUsage,
    ToolCall,
)
from providers.catalog import OutputLimitField
from providers.conversation import base64_of, fit, result_text, stretches
from providers.errors import stream_failure
from providers.event_stream import Answer, EventStreamProvider, Retries, checked_base_url, checked_key
from providers.http import DEFAULT_MAX_ANSWER_BYTES, Deadlines, failure
from providers.payload import NOT_JSON, parse_json, text_of, token_count, tool_arguments
from providers.sse import DEFAULT_MAX_EVENT_BYTES, ServerSentEvent

_DONE = b"[DONE]"
_MAX_TOOL_CALLS = 256
_MAX_IMAGES = 16
_IMAGE_URL = re.compile(r"data:(image/[a-z0-9.+-]{1,40})(?:;[a-z0-9=-]{1,40}){0,3};base64,", re.ASCII | re.IGNORECASE)

_FINISH_REASONS = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "tool_calls": FinishReason.TOOL_CALLS,
    "function_call": FinishReason.TOOL_CALLS,
    "content_filter": FinishReason.CONTENT_FILTER,
}


class ChatCompletionsProvider(EventStreamProvider):
    """A `Provider` for one base address and key.

    Args:
        session: owned and closed by the caller; see `providers.http.make_client_session`.
        base_url: what comes before `/chat/completions`, like `https://api.openai.com/v1`; http or https, without
            credentials, query or fragment. Whether this server may talk to that host is the caller's business.
        api_key: sent as bearer token; None sends no Authorization header.
        deadlines: how long the vendor may take.
        max_answer_bytes: bound on one answer as it comes over the wire.
        max_event_bytes: bound on one event, and on an answer that comes in one piece.
        retries: how often a request is sent again that the vendor put off.
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
        retries: Retries | None = None,
        output_limit_field: OutputLimitField = "max_completion_tokens",
    ) -> None:
        super().__init__(
            session=session,
            url=checked_base_url(base_url) / "chat" / "completions",
            headers={"Authorization": f"Bearer {checked_key(api_key)}"} if api_key else {},
            deadlines=deadlines,
            max_answer_bytes=max_answer_bytes,
            max_event_bytes=max_event_bytes,
            retries=retries,
        )
        self._output_limit_field = output_limit_field

    def _request_body(self, request: GenerationRequest) -> dict[str, Any]:
        return request_body(request, output_limit_field=self._output_limit_field)

    def _new_answer(self) -> Answer:
        return _Answer()


def request_body(
    request: GenerationRequest, *, output_limit_field: OutputLimitField = "max_completion_tokens"
) -> dict[str, Any]:
    """The request in the terms of chat completions."""
    body: dict[str, Any] = {
        "model": request.model,
        "messages": [said for message in fit(request.messages) for said in _said(message)],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if request.reasoning_effort is not None:
        body["reasoning_effort"] = request.reasoning_effort.lower()
    if request.max_output_tokens is not None:
        body[output_limit_field] = request.possible(request.max_output_tokens)
    if request.user is not None:
        body["user"] = request.user
    if request.image_output:
        body["modalities"] = ["image", "text"]
    return body


def _said(message: PromptMessage) -> list[dict[str, Any]]:
    """A message in the format's terms; an answer with calls is several, with their results among them."""
    if message.role != "assistant":
        return [{"role": message.role, "content": _content(message)}]
    said: list[dict[str, Any]] = []
    for stretch in stretches(message):
        texts = [part.text for part in stretch.said if isinstance(part, PromptText)]
        if not texts and not stretch.calls:
            continue
        answer: dict[str, Any] = {"role": "assistant", "content": "\n\n".join(texts) if texts else None}
        if stretch.calls:
            answer["tool_calls"] = [_call(call) for call in stretch.calls]
        said.append(answer)
        said += [{"role": "tool", "tool_call_id": call.call_id, "content": result_text(call)} for call in stretch.calls]
    return said


def _content(message: PromptMessage) -> str | list[dict[str, Any]]:
    if all(isinstance(part, PromptText) for part in message.content):
        return message.text
    return [
        {"type": "text", "text": part.text} if isinstance(part, PromptText) else _file(part)
        for part in message.content
        if isinstance(part, PromptText | PromptFile)
    ]


def _file(file: PromptFile) -> dict[str, Any]:
    url = f"data:{file.content_type};base64,{base64_of(file)}"
    if file.content_type.startswith("image/"):
        return {"type": "image_url", "image_url": {"url": url}}
    return {"type": "file", "file": {"filename": file.name, "file_data": url}}


def _call(call: PromptToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": orjson.dumps(call.arguments).decode()}
    return {"id": call.call_id, "type": "function", "function": function}


class _Answer(Answer):
    """An answer of `chat.completion.chunk` objects, or of one `chat.completion`."""

    def __init__(self) -> None:
        super().__init__()
        self._done = False
        self._calls: list[_Call] = []
        self._calls_begun = 0
        self._images = 0

    def take(self, message: ServerSentEvent) -> bool:
        if message.data.startswith(_DONE):
            self.over = self._done = True
            return True
        chunk = parse_json(message.data)
        if chunk is NOT_JSON:
            raise failure(FailureCode.PROVIDER_PROTOCOL)
        if isinstance(chunk, dict):
            if message.name == "error":
                raise stream_failure(chunk.get("error") or chunk)
            self._take_chunk(chunk)
        return True

    def take_tail(self, tail: ServerSentEvent | None) -> None:
        self.over = True
        # A JSON object that is cut short is not JSON any more, so being JSON means being whole.
        if tail is not None and (tail.data.startswith(_DONE) or parse_json(tail.data) is not NOT_JSON):
            self.take(tail)

    def take_whole(self, body: bytes) -> None:
        completion = parse_json(body)
        if not isinstance(completion, dict) or not (completion.get("error") or _first_choice(completion)):
            raise failure(FailureCode.PROVIDER_PROTOCOL)
        self._take_chunk(completion)
        self.over = self._done = True

    def end(self) -> None:
        if self._done and self.finish is None:
            self.finish = FinishReason.TOOL_CALLS if self._calls else FinishReason.STOP
        if self.finish is None:
            self.report_usage()
            return
        self._complete_calls()
        self.report_usage()
        self._events.append(Finish(self.finish))

    def _take_chunk(self, chunk: dict[str, Any]) -> None:
        if error := chunk.get("error"):
            raise stream_failure(error)
        if usage := chunk.get("usage"):
            self._usage = _token_usage(usage) or self._usage
        elif groq := chunk.get("x_groq"):
            self._take_groq(groq)
        choice = _first_choice(chunk)
        if choice is None:
            if chunk.get("object") == "error":  # vLLM, before it put the error into a field
                raise stream_failure(chunk)
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
        if text:
            if isinstance(text, str):
                self._events.append(TextDelta(clean(text)))
            elif isinstance(text, list):
                self._take_pieces(text)
        fragments = delta.get("tool_calls")
        if isinstance(fragments, list):
            for fragment in fragments:
                if isinstance(fragment, dict):
                    self._take_call_fragment(fragment)
        images = delta.get("images")
        if isinstance(images, list):
            for image in images:
                self._take_image(image)

    def _take_pieces(self, pieces: list[Any]) -> None:
        """A content in pieces, as Mistral's reasoning models send it."""
        for piece in pieces:
            if not isinstance(piece, dict):
                continue
            if text := text_of(piece.get("text")):
                self._events.append(TextDelta(clean(text)))
            thinking = piece.get("thinking")
            for thought in thinking if isinstance(thinking, list) else ():
                if isinstance(thought, dict) and (text := text_of(thought.get("text"))):
                    self._events.append(ReasoningDelta(clean(text)))

    def _take_image(self, image: Any) -> None:
        """An image as a data URL; whatever else is skipped.

        Raises:
            ProviderFailure: more images than any real answer has.
        """
        place = image.get("image_url") if isinstance(image, dict) else None
        url = text_of(place.get("url") if isinstance(place, dict) else place)
        head = _IMAGE_URL.match(url)
        if head is None:
            return
        try:
            data = b64decode(url[head.end() :], validate=True)
        except ValueError:
            return
        if not data:
            return
        if self._images >= _MAX_IMAGES:
            raise failure(FailureCode.PROVIDER_PROTOCOL)
        self._images += 1
        self._events.append(ImageOutput(head[1].lower(), data))

    def _take_groq(self, groq: Any) -> None:
        """What Groq puts beside the format: the counts of a stream, and why it was broken off."""
        if not isinstance(groq, dict):
            return
        if error := groq.get("error"):
            raise stream_failure(error)
        self._usage = _token_usage(groq.get("usage")) or self._usage

    def _take_finish_reason(self, reason: Any, choice: dict[str, Any]) -> None:
        if not isinstance(reason, str):
            return
        if reason == "error":  # OpenRouter: the vendor behind it broke off
            raise stream_failure(choice.get("error"))
        self.finish = _FINISH_REASONS.get(reason, FinishReason.STOP)
        self._complete_calls()

    def _take_call_fragment(self, fragment: dict[str, Any]) -> None:
        function = fragment.get("function")
        if not isinstance(function, dict):
            function = {}
        name = text_of(function.get("name"))
        call = self._call_for(fragment.get("index"), text_of(fragment.get("id")), name)
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
        return ToolCall(clean(self.call_id) or self.fallback_id, clean(self.name), tool_arguments(arguments))


def _begins_another(latest: _Call, call_id: str, name: str) -> bool:
    """Whether a fragment is the first of a new call although it has the index of `latest`.

    Two dialects need this: Gemini's endpoint has numbered all parallel calls 0, each with its own id and name, and
    calls that come in one piece have no index at all.
    """
    if not name or (call_id and call_id == latest.call_id):
        return False
    return latest.index is None or bool(call_id and latest.call_id)


def _first_choice(chunk: dict[str, Any]) -> dict[str, Any] | None:
    choices = chunk.get("choices")
    if isinstance(choices, list) and choices and isinstance(choices[0], dict):
        return choices[0]
    return None


def _token_usage(usage: Any) -> TokenUsage | None:
    """The counts of a usage object; None where it counts nothing. What is missing or no sensible number counts as 0."""
    if not isinstance(usage, dict):
        return None
    prompt = token_count(usage, "prompt_tokens")
    completion = token_count(usage, "completion_tokens")
    reasoning = token_count(usage.get("completion_tokens_details"), "reasoning_tokens")
    if (uncounted := token_count(usage, "total_tokens") - prompt - completion) > 0:
        completion += uncounted
        reasoning = max(reasoning, uncounted)
    if not prompt and not completion:
        return None
    cached = token_count(usage.get("prompt_tokens_details"), "cached_tokens") or token_count(
        usage, "prompt_cache_hit_tokens"
    )
    return TokenUsage(prompt, completion, min(reasoning, completion), min(cached, prompt))
