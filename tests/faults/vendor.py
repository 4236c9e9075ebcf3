"""The vendor of a fault run: says what each question asks it to say, and remembers what it said."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from typing import Any

import orjson

from tests.vendor_server import VendorServer, Wire

MODEL = "gpt-faults"
_WORDS = ("river", "naïve", "שלום", "🧵", "数据", "and", "then", "👩🏽‍🚀", "so", "ß")


@dataclass(frozen=True, slots=True)
class Script:
    """What a question asks for. `is_cut`: the connection ends before the answer has."""

    tag: str
    think_seconds: float
    pieces: int
    every_seconds: float
    is_cut: bool = False

    @property
    def question(self) -> str:
        """The text of the question."""
        return orjson.dumps(
            {
                "tag": self.tag,
                "think": self.think_seconds,
                "pieces": self.pieces,
                "every": self.every_seconds,
                "cut": self.is_cut,
            }
        ).decode()


@dataclass(slots=True)
class Answered:
    """One request and what was said to it."""

    tag: str
    number: int
    prompt_tokens: int
    completion_tokens: int
    said: list[str] = field(default_factory=list)
    is_whole: bool = False

    @property
    def head(self) -> str:
        """What its text begins with, and no other's."""
        return f"[{self.tag}/{self.number}] "

    @property
    def text(self) -> str:
        """All that was said."""
        return "".join(self.said)


class Vendor(VendorServer):
    """Speaks the chat-completions format on a real socket."""

    def __init__(self) -> None:
        super().__init__(self._play)
        self.answered: list[Answered] = []
        self._numbers = random.Random(0)

    def to(self, tag: str) -> list[Answered]:
        """The requests of one question."""
        return [answered for answered in self.answered if answered.tag == tag]

    async def _play(self, wire: Wire) -> None:
        asked = orjson.loads(_last_question(wire.request.json["messages"]))
        tag = asked["tag"]
        number = len(self.to(tag)) + 1
        answered = Answered(tag, number, self._numbers.randrange(1, 9_999), self._numbers.randrange(1, 9_999))
        self.answered.append(answered)
        words = random.Random(f"{tag} {number}")
        await wire.head()
        await asyncio.sleep(asked["think"])
        for place in range(asked["pieces"]):
            piece = answered.head if place == 0 else f"{place}{words.choice(_WORDS)} "
            # Noted first: a piece that has left may be shown before this goes on.
            answered.said.append(piece)
            await wire.event({"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]})
            await asyncio.sleep(asked["every"])
        if asked["cut"]:
            return
        answered.is_whole = True
        usage = {"prompt_tokens": answered.prompt_tokens, "completion_tokens": answered.completion_tokens}
        await wire.event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        await wire.event({"choices": [], "usage": usage})
        await wire.send(b"data: [DONE]\n\n")
        await wire.end()


def _last_question(messages: list[dict[str, Any]]) -> str:
    content = next(message["content"] for message in reversed(messages) if message["role"] == "user")
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
