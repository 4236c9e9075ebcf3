"""Events of Anthropic's Messages API as its documents show them, for servers that play the vendor."""

from __future__ import annotations

from typing import Any

import orjson

PING = b'event: ping\ndata: {"type": "ping"}\n\n'


def sse(event: dict[str, Any]) -> bytes:
    """An event as Anthropic sends it: its type is its name too."""
    return b"event: %b\ndata: %b\n\n" % (str(event["type"]).encode(), orjson.dumps(event))


def message_start(**usage: Any) -> bytes:
    """The beginning, with the counts so far."""
    message: dict[str, Any] = {
        "id": "msg_01",
        "type": "message",
        "role": "assistant",
        "model": "claude-test",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": 25, "output_tokens": 1, **usage},
    }
    return sse({"type": "message_start", "message": message})


def block_start(index: int, block: dict[str, Any]) -> bytes:
    return sse({"type": "content_block_start", "index": index, "content_block": block})


def block_delta(index: int, delta: dict[str, Any]) -> bytes:
    return sse({"type": "content_block_delta", "index": index, "delta": delta})


def block_stop(index: int) -> bytes:
    return sse({"type": "content_block_stop", "index": index})


def text(content: str, index: int = 0) -> bytes:
    return block_delta(index, {"type": "text_delta", "text": content})


def text_block(*deltas: str, index: int = 0) -> list[bytes]:
    return [
        block_start(index, {"type": "text", "text": ""}),
        *(text(delta, index) for delta in deltas),
        block_stop(index),
    ]


def thinking_block(*deltas: str, index: int = 0, signature: str = "EqQBCgIYAhIM1gbcDa9GJwZA2b3h") -> list[bytes]:
    return [
        block_start(index, {"type": "thinking", "thinking": "", "signature": ""}),
        *(block_delta(index, {"type": "thinking_delta", "thinking": delta}) for delta in deltas),
        block_delta(index, {"type": "signature_delta", "signature": signature}),
        block_stop(index),
    ]


def tool_block(
    call_id: str, name: str, *fragments: str, index: int = 0, kind: str = "tool_use", given: Any = None
) -> list[bytes]:
    return [
        block_start(index, {"type": kind, "id": call_id, "name": name, "input": {} if given is None else given}),
        *(block_delta(index, {"type": "input_json_delta", "partial_json": fragment}) for fragment in fragments),
        block_stop(index),
    ]


def message_delta(stop_reason: Any = "end_turn", **usage: Any) -> bytes:
    delta = {"stop_reason": stop_reason, "stop_sequence": None}
    return sse({"type": "message_delta", "delta": delta, "usage": {"output_tokens": 15, **usage}})


MESSAGE_STOP = sse({"type": "message_stop"})


def answer(*blocks: list[bytes], stop_reason: Any = "end_turn") -> list[bytes]:
    """A whole answer of these blocks."""
    return [message_start(), *(event for block in blocks for event in block), message_delta(stop_reason), MESSAGE_STOP]


def error(kind: str, message: str = "Overloaded") -> bytes:
    return sse({"type": "error", "error": {"type": kind, "message": message}})
