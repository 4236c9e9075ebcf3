"""The parts an answer is made of, and their one linear order.

An answer is a list of parts. Text and reasoning parts grow character by character; the others appear whole. Laid end to
end they form one line on which every position is an *offset*: a text or reasoning part is as long as its text (in
Unicode code points), every other part has the length 1. Offsets are what stream cursors point at, so a position that a
client holds means the same in a live buffer, in the token log and in the finished message row.

For that to hold, a text or reasoning part is never empty: it begins to exist with its first character.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias
from uuid import UUID

import orjson


@dataclass(slots=True, frozen=True)
class TextPart:
    """What the model says to the reader."""

    text: str


@dataclass(slots=True, frozen=True)
class ReasoningPart:
    """What the model thought before or between its texts, where the provider shows it.

    `signature` is the vendor's mark on exactly this text, for the model that wrote the message: with it the text can be
    sent back. It is stored and exported, and shown to nobody.
    """

    text: str
    signature: str | None = None


@dataclass(slots=True, frozen=True)
class ToolPart:
    """A tool call the model asked for. `arguments` and `result` are JSON; `result` is None until there is one."""

    call_id: str
    name: str
    arguments: Any = field(default=None)
    result: Any = field(default=None)


@dataclass(slots=True, frozen=True)
class SourcePart:
    """A page or document the model drew on."""

    url: str
    title: str | None = None


@dataclass(slots=True, frozen=True)
class FilePart:
    """A file that a user sent along or a model made: what is remembered of it when the attachment is gone."""

    attachment_id: UUID
    name: str
    content_type: str
    size: int


@dataclass(slots=True, frozen=True)
class SharedFilePart:
    """A file of a share: found by its position among the share's files, and by no id of its owner's."""

    position: int
    name: str
    content_type: str
    size: int


Part: TypeAlias = TextPart | ReasoningPart | ToolPart | SourcePart | FilePart
SharedPart: TypeAlias = TextPart | ReasoningPart | ToolPart | SourcePart | SharedFilePart
DeltaKind: TypeAlias = Literal["TEXT", "REASONING"]


def part_length(part: Part) -> int:
    """The length of a part on the answer's line: code points of text, or 1 for a part that appears whole."""
    if isinstance(part, TextPart | ReasoningPart):
        return len(part.text)
    return 1


def parts_length(parts: list[Part]) -> int:
    """The offset just behind the last part."""
    return sum(map(part_length, parts))


def parts_text(parts: list[Part]) -> str:
    """The readable text of a message: its text parts, joined without anything between them."""
    return "".join(part.text for part in parts if isinstance(part, TextPart))


def part_to_dict(part: Part) -> dict[str, Any]:
    """The stored form of one part (a JSON object with a `type`)."""
    match part:
        case TextPart(text):
            return {"type": "text", "text": text}
        case ReasoningPart(text, signature):
            return {"type": "reasoning", "text": text} | ({} if signature is None else {"signature": signature})
        case ToolPart(call_id, name, arguments, result):
            return {"type": "tool", "callId": call_id, "name": name, "arguments": arguments, "result": result}
        case SourcePart(url, title):
            return {"type": "source", "url": url, "title": title}
        case FilePart(attachment_id, name, content_type, size):
            told = {"name": name, "contentType": content_type, "size": size}
            return {"type": "file", "attachmentId": attachment_id.hex} | told


def part_from_dict(stored: dict[str, Any]) -> Part:
    """The part behind its stored form.

    Raises:
        ValueError: the stored type is not known to this version.
    """
    match stored["type"]:
        case "text":
            return TextPart(stored["text"])
        case "reasoning":
            return ReasoningPart(stored["text"], stored.get("signature"))
        case "tool":
            return ToolPart(stored["callId"], stored["name"], stored["arguments"], stored["result"])
        case "source":
            return SourcePart(stored["url"], stored["title"])
        case "file":
            return FilePart(UUID(hex=stored["attachmentId"]), stored["name"], stored["contentType"], stored["size"])
        case unknown:
            raise ValueError(f"unknown part type {unknown!r}")


def parts_to_json(parts: list[Part]) -> str:
    """The stored form of a list of parts, for a `jsonb` column."""
    return orjson.dumps([part_to_dict(part) for part in parts]).decode()


def parts_from_json(stored: str | bytes) -> list[Part]:
    """The parts behind a `jsonb` column's text."""
    return [part_from_dict(part) for part in orjson.loads(stored)]


def text_from_json(stored: str | bytes) -> str:
    """The text parts behind a `jsonb` column's text, joined; no part is made for it."""
    parts = orjson.loads(stored)
    if len(parts) == 1 and parts[0]["type"] == "text":
        text: str = parts[0]["text"]
        return text
    return "".join([part["text"] for part in parts if part["type"] == "text"])


def shared_parts_from_json(stored: str | bytes) -> list[SharedPart]:
    """The parts of a shared message behind a `jsonb` column's text."""
    return [_shared_part(part) for part in orjson.loads(stored)]


def _shared_part(stored: dict[str, Any]) -> SharedPart:
    if stored["type"] == "file":
        return SharedFilePart(stored["position"], stored["name"], stored["contentType"], stored["size"])
    part = part_from_dict(stored)
    assert not isinstance(part, FilePart)
    return part
