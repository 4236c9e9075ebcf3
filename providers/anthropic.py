"""The adapter for Anthropic's Messages API, spoken natively: thinking, prompt caching and its own counts survive.

What comes when: text, reasoning and whole tool calls as their blocks arrive, a signature at the end of its block; then
at most one `TokenUsage`; then `Finish`, which only `message_stop` brings. Pings keep no answer alive: they come however
long the model is silent.

Rules of the request (beside those of `providers.conversation`):

- Every system prompt goes into `system`. Neighbours of one role are one message of several blocks, the first message is
  a user's (answers before it are left out), and blank texts, which are refused there, are left out.
- The system prompt and the conversation up to the last question but one are marked for the prompt cache. The newest
  question is not: it is the one that is edited and asked again.
- A reasoning effort turns thinking on: by `adaptive` and `effort`, and for models from before those (`_BUDGETED`) by a
  budget of tokens. Without an effort the model does as it does by default.
- Thinking goes back as it was signed, and in its place.
- Results of calls stand first in the user's message behind them. The tools that were called are declared, as is asked
  for there, with any input, and may not be called (`tool_choice: none`).
- `max_tokens` is required. It is what the request allows (thinking included); else the limit for the text that the
  provider was made with, and on top of it what the effort may take for thinking; never more than the model can write.

The counts of `message_start` alone are not told: they are made before the answer is. Citations and the server's own
tools have no place in `ProviderEvent` and are passed over. Redacted thinking is passed over, too, and the rest of the
answer's thinking is then marked as not to be sent back: a sequence of it that lacks a block is refused.

What an event costs is measured by `python -m bench.adapters`; docs/providers.md has the numbers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from models.text import clean
from providers.base import (
    FailureCode,
    Finish,
    FinishReason,
    GenerationRequest,
    PromptFile,
    PromptMessage,
    PromptPart,
    PromptReasoning,
    PromptText,
    PromptToolCall,
    ProviderFailure,
    ReasoningDelta,
    ReasoningEffort,
    ReasoningSignature,
    TextDelta,
    TokenUsage,
    ToolCall,
)
from providers.conversation import base64_of, fit, result_text, stretches
from providers.errors import stream_failure
from providers.event_stream import Answer, EventStreamProvider, Retries, checked_base_url, checked_key
from providers.http import DEFAULT_MAX_ANSWER_BYTES, Deadlines, failure
from providers.payload import MAX_TOKEN_COUNT, NOT_JSON, parse_json, text_of, token_count, tool_arguments
from providers.sse import DEFAULT_MAX_EVENT_BYTES, ServerSentEvent

DEFAULT_MAX_TEXT_TOKENS = 16_000

_VERSION = "2023-06-01"
_MAX_TOOL_CALLS = 256
# It holds the whole thinking, encrypted; a longer one is not kept.
_MAX_SIGNATURE_CHARS = 1024 * 1024
_CACHED = {"type": "ephemeral"}
_NOTHING_ASKED = "There is no question to answer; write a message and send it again."

# Room for thinking. With the default for the text the sum is 32,000 at most, which every model with thinking allows.
_THINKING_TOKENS: dict[ReasoningEffort, int] = {"LOW": 2_048, "MEDIUM": 8_192, "HIGH": 16_000}
_LEAST_THINKING_TOKENS = 1_024  # Anthropic's lower bound of a budget
# Models from before adaptive thinking. The list is closed: newer ones refuse a budget, and have to be named nowhere.
_BUDGETED = re.compile(r"claude-(3[-.]|haiku-4[-.]5|(opus|sonnet)-4([-.][015])?(-20[0-9]{6}|(?![0-9.-])))")

_FINISH_REASONS = {
    "end_turn": FinishReason.STOP,
    "stop_sequence": FinishReason.STOP,
    "pause_turn": FinishReason.STOP,
    "max_tokens": FinishReason.LENGTH,
    "model_context_window_exceeded": FinishReason.LENGTH,
    "tool_use": FinishReason.TOOL_CALLS,
    "refusal": FinishReason.CONTENT_FILTER,
}


class AnthropicProvider(EventStreamProvider):
    """A `Provider` for one base address and key.

    Args:
        session: owned and closed by the caller; see `providers.http.make_client_session`.
        base_url: what comes before `/v1/messages`, like `https://api.anthropic.com`, with or without the `/v1`; http or
            https, without credentials, query or fragment. Whether this server may talk to that host is the caller's
            business.
        api_key: sent as `x-api-key`; None sends no such header.
        max_text_tokens: limit of an answer without its thinking, where the request sets none.
        deadlines: how long the vendor may take.
        max_answer_bytes: bound on one answer as it comes over the wire.
        max_event_bytes: bound on one event, and on an answer that comes in one piece.
        retries: how often a request is sent again that the vendor put off.

    Raises:
        ValueError: the address or the key cannot be used; the message contains neither.
    """

    def __init__(
        self,
        *,
        session: aiohttp.ClientSession,
        base_url: str,
        api_key: str | None,
        max_text_tokens: int = DEFAULT_MAX_TEXT_TOKENS,
        deadlines: Deadlines | None = None,
        max_answer_bytes: int = DEFAULT_MAX_ANSWER_BYTES,
        max_event_bytes: int = DEFAULT_MAX_EVENT_BYTES,
        retries: Retries | None = None,
    ) -> None:
        base = checked_base_url(base_url.rstrip("/"))
        super().__init__(
            session=session,
            url=base / "messages" if base.name == "v1" else base / "v1" / "messages",
            headers={"anthropic-version": _VERSION, **({"x-api-key": checked_key(api_key)} if api_key else {})},
            deadlines=deadlines,
            max_answer_bytes=max_answer_bytes,
            max_event_bytes=max_event_bytes,
            retries=retries,
        )
        self._max_text_tokens = max_text_tokens

    def _request_body(self, request: GenerationRequest) -> dict[str, Any]:
        return request_body(request, max_text_tokens=self._max_text_tokens)

    def _new_answer(self) -> Answer:
        return _Answer()


def request_body(request: GenerationRequest, *, max_text_tokens: int) -> dict[str, Any]:
    """The request in Anthropic's terms.

    Raises:
        ProviderFailure: there is no message of a user in it.
    """
    messages = _conversation(fit(request.messages))
    if not messages:
        raise ProviderFailure(FailureCode.PROVIDER_REJECTED_REQUEST, _NOTHING_ASKED)
    body: dict[str, Any] = {
        "model": request.model,
        "messages": messages,
        "stream": True,
        **_limit_and_thinking(request, max_text_tokens),
    }
    if system := [
        _block(part) for message in request.messages if message.role == "system" for part in message.content
        if isinstance(part, PromptText) and part.text.strip()
    ]:  # fmt: skip
        system[-1]["cache_control"] = _CACHED
        body["system"] = system
    if tools := {block["name"] for message in messages for block in message["content"] if block["type"] == "tool_use"}:
        body["tools"] = [{"name": name, "input_schema": {"type": "object"}} for name in sorted(tools)]
        body["tool_choice"] = {"type": "none"}
    if request.user is not None:
        body["metadata"] = {"user_id": request.user}
    return body


def _limit_and_thinking(request: GenerationRequest, max_text_tokens: int) -> dict[str, Any]:
    effort = request.reasoning_effort
    if effort is None:
        return {"max_tokens": request.possible(request.max_output_tokens or max_text_tokens)}
    wanted = max_text_tokens + _THINKING_TOKENS[effort]
    allowed = request.possible(request.max_output_tokens or wanted)
    if _BUDGETED.search(request.model) is None:
        return {
            "max_tokens": allowed,
            # Newer models leave the text of their thinking out unless it is asked for.
            "thinking": {"type": "adaptive", "display": "summarized"},
            "output_config": {"effort": effort.lower()},
        }
    budget = _THINKING_TOKENS[effort]
    if request.max_output_tokens is not None or allowed < wanted:
        budget = min(budget, allowed // 2)  # what is allowed is for both, and the answer gets at least half
    if budget < _LEAST_THINKING_TOKENS:
        return {"max_tokens": allowed}
    return {"max_tokens": allowed, "thinking": {"type": "enabled", "budget_tokens": budget}}


def _conversation(messages: list[PromptMessage]) -> list[dict[str, Any]]:
    conversation: list[dict[str, Any]] = []

    def add(role: str, blocks: list[dict[str, Any]]) -> None:
        if conversation and conversation[-1]["role"] == role:
            conversation[-1]["content"] += blocks
        elif blocks:
            conversation.append({"role": role, "content": blocks})

    for message in messages:
        if message.role == "user":
            add("user", [_block(part) for part in message.content])
        elif message.role == "assistant" and conversation:
            for stretch in stretches(message):
                add("assistant", [_block(part) for part in (*stretch.said, *stretch.calls)])
                add("user", [_result(call) for call in stretch.calls])
    questions = [message for message in conversation if message["role"] == "user"]
    if len(questions) > 1:
        questions[-2]["content"][-1]["cache_control"] = _CACHED
    return conversation


def _block(part: PromptPart) -> dict[str, Any]:
    match part:
        case PromptText(text):
            return {"type": "text", "text": text}
        case PromptReasoning(text, signature):
            return {"type": "thinking", "thinking": text, "signature": signature}
        case PromptFile(name, content_type):
            source = {"type": "base64", "media_type": content_type, "data": base64_of(part)}
            if content_type.startswith("image/"):
                return {"type": "image", "source": source}
            return {"type": "document", "source": source, "title": name}
        case PromptToolCall():
            return {"type": "tool_use", "id": part.call_id, "name": part.name, "input": part.arguments}


def _result(call: PromptToolCall) -> dict[str, Any]:
    told = {"type": "tool_result", "tool_use_id": call.call_id, "content": result_text(call)}
    return told if call.result is not None else told | {"is_error": True}


class _Answer(Answer):
    """An answer of message and content block events, or of one `message`."""

    def __init__(self) -> None:
        super().__init__()
        self._stop_reason: FinishReason | None = None
        self._counts: dict[str, Any] = {}
        self._calls: dict[int, _Call] = {}
        self._calls_begun = 0
        self._thinking: dict[int, _Thinking] = {}

    def take(self, message: ServerSentEvent) -> bool:
        event = parse_json(message.data)
        if event is NOT_JSON:
            raise failure(FailureCode.PROVIDER_PROTOCOL)
        if not isinstance(event, dict):
            return True
        # The type is in the event's name too; gateways are known to leave the one or the other out.
        kind = event.get("type") or message.name
        if kind == "content_block_delta":
            self._take_delta(event)
        elif kind == "content_block_start":
            self._begin_block(event.get("index"), event.get("content_block"))
        elif kind == "content_block_stop":
            self._end_block(event.get("index"))
        elif kind == "message_start":
            self._take_message(event.get("message"))
        elif kind == "message_delta":
            self._take_message_delta(event)
        elif kind == "message_stop":
            self.over = True
            self.finish = self._stop_reason or FinishReason.STOP
        elif "error" in (kind, message.name) or event.get("error"):
            raise stream_failure(event.get("error") or event)
        return bool(kind != "ping")

    def take_tail(self, tail: ServerSentEvent | None) -> None:
        self.over = True
        # A JSON object that is cut short is not JSON any more, so being JSON means being whole.
        if tail is not None and tail.data and parse_json(tail.data) is not NOT_JSON:
            self.take(tail)

    def take_whole(self, body: bytes) -> None:
        message = parse_json(body)
        if isinstance(message, dict) and message.get("error"):
            raise stream_failure(message["error"])
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, list):
            raise failure(FailureCode.PROVIDER_PROTOCOL)
        for index, block in enumerate(content):
            self._begin_block(index, block)
            self._end_block(index)
        self._take_message_delta({"delta": message, "usage": message.get("usage")})
        self.over = True
        self.finish = self._stop_reason or FinishReason.STOP

    def end(self) -> None:
        if self.finish is not None:
            for index in [*self._calls, *self._thinking]:
                self._end_block(index)
        self.report_usage()
        if self.finish is not None:
            self._events.append(Finish(self.finish))

    def _take_message(self, message: Any) -> None:
        usage = message.get("usage") if isinstance(message, dict) else None
        if isinstance(usage, dict):
            self._counts = usage

    def _take_message_delta(self, event: dict[str, Any]) -> None:
        delta, usage = event.get("delta"), event.get("usage")
        reason = delta.get("stop_reason") if isinstance(delta, dict) else None
        if reason and isinstance(reason, str):
            self._stop_reason = _FINISH_REASONS.get(reason, FinishReason.STOP)
        if isinstance(usage, dict):
            # Counts are totals so far; those that are left out are as they were.
            self._counts |= {name: count for name, count in usage.items() if count is not None}
            self._usage = _token_usage(self._counts) or self._usage

    def _begin_block(self, index: Any, block: Any) -> None:
        if not isinstance(block, dict):
            return
        match block.get("type"):
            case "text":
                self._tell_text(block.get("text"))
            case "thinking":
                if isinstance(index, int):
                    self._end_block(index)
                    self._thinking[index] = _Thinking(text_of(block.get("signature")))
                self._tell_thinking(index, block.get("thinking"))
            case "redacted_thinking":
                self._events.append(ReasoningSignature(None))
            case "tool_use" if isinstance(index, int):
                self._begin_call(index, block)

    def _take_delta(self, event: dict[str, Any]) -> None:
        delta = event.get("delta")
        if not isinstance(delta, dict):
            return
        kind = delta.get("type")
        if kind == "text_delta":
            self._tell_text(delta.get("text"))
        elif kind == "thinking_delta":
            self._tell_thinking(event.get("index"), delta.get("thinking"))
        elif kind == "signature_delta":
            place, signature = event.get("index"), text_of(delta.get("signature"))
            if signature and isinstance(place, int) and (thinking := self._thinking.get(place)):
                thinking.signature = signature
        elif kind == "input_json_delta":
            index, fragment = event.get("index"), delta.get("partial_json")
            # A server tool's input has no call here: whoever runs the tool is there, not here.
            if isinstance(index, int) and isinstance(fragment, str) and (call := self._calls.get(index)):
                call.fragments.append(fragment)

    def _tell_text(self, text: Any) -> None:
        if text and isinstance(text, str):
            self._events.append(TextDelta(clean(text)))

    def _tell_thinking(self, index: Any, text: Any) -> None:
        if text and isinstance(text, str):
            told = clean(text)
            if told != text and isinstance(index, int) and (thinking := self._thinking.get(index)):
                thinking.as_it_came = False
            self._events.append(ReasoningDelta(told))

    def _begin_call(self, index: int, block: dict[str, Any]) -> None:
        self._end_block(index)
        if self._calls_begun >= _MAX_TOOL_CALLS:
            raise failure(FailureCode.PROVIDER_PROTOCOL)
        # Calls are answered by their id, so one without gets a name of ours.
        call_id = clean(text_of(block.get("id"))) or f"call_{self._calls_begun}"
        self._calls_begun += 1
        self._calls[index] = _Call(call_id, clean(text_of(block.get("name"))), block.get("input"))

    def _end_block(self, index: Any) -> None:
        if not isinstance(index, int):
            return
        if (call := self._calls.pop(index, None)) is not None:
            self._events.append(call.complete())
        if (thinking := self._thinking.pop(index, None)) is not None and thinking.signature:
            self._events.append(thinking.signed())


@dataclass(slots=True)
class _Thinking:
    """A block of thinking that is still arriving; `as_it_came`: nothing of it had to be repaired."""

    signature: str
    as_it_came: bool = True

    def signed(self) -> ReasoningSignature:
        sound = self.as_it_came and len(self.signature) <= _MAX_SIGNATURE_CHARS and self.signature.isascii()
        return ReasoningSignature(self.signature if sound and self.signature.isprintable() else None)


@dataclass(slots=True)
class _Call:
    """A tool call whose input is still arriving; `given` is what the block began with."""

    call_id: str
    name: str
    given: Any
    fragments: list[str] = field(default_factory=list)

    def complete(self) -> ToolCall:
        written = "".join(self.fragments)
        whole = written if written or self.given is None else self.given
        return ToolCall(self.call_id, self.name, tool_arguments(whole))


def _token_usage(counts: dict[str, Any]) -> TokenUsage | None:
    """The counts as the others count: Anthropic's input leaves out what was read from the cache or written to it."""
    cached = token_count(counts, "cache_read_input_tokens")
    prompt = token_count(counts, "input_tokens") + token_count(counts, "cache_creation_input_tokens") + cached
    completion = token_count(counts, "output_tokens")
    if not prompt and not completion:
        return None
    reasoning = token_count(counts.get("output_tokens_details"), "thinking_tokens")
    prompt = min(prompt, MAX_TOKEN_COUNT)
    return TokenUsage(prompt, completion, min(reasoning, completion), min(cached, prompt))
