"""Token counts where the provider gave none: a stopped, failed or interrupted answer was consumed all the same."""

from __future__ import annotations

import orjson

from models.parts import DeltaKind, FilePart, Part, ReasoningPart, TextPart, ToolPart
from models.records import MessageTokens

# Common tokenizers make about one token of four bytes of English text; other scripts have more bytes a character.
BYTES_PER_TOKEN = 4
# About what an ordinary image counts, sent or made; vendors count from 250 to some thousands.
TOKENS_PER_IMAGE = 1_600


def estimate_tokens(text: str) -> int:
    """About how many tokens a text is: a quarter of its UTF-8 bytes, rounded up."""
    return estimate_tokens_of(len(text.encode()))


def estimate_tokens_of(size: int) -> int:
    """About how many tokens a text of so many UTF-8 bytes is."""
    return -(-size // BYTES_PER_TOKEN)


def estimate(prompt_tokens: int, parts: list[Part]) -> MessageTokens:
    """About what an answer consumed, marked as an estimate."""
    text = sum(estimate_tokens(part.text) for part in parts if isinstance(part, TextPart))
    reasoning = sum(estimate_tokens(part.text) for part in parts if isinstance(part, ReasoningPart))
    images = TOKENS_PER_IMAGE * sum(isinstance(part, FilePart) for part in parts)
    return MessageTokens(prompt_tokens, text + reasoning + images, reasoning, 0, estimated=True)


class Allowance:
    """How many tokens an answer may have yet, counted as `estimate` counts them, without looking at what came before.

    Args:
        tokens: at most so many; what was taken is never estimated to be more.
    """

    def __init__(self, tokens: int) -> None:
        self._bytes_left = tokens * BYTES_PER_TOKEN
        self._kind: DeltaKind | None = None

    def take(self, kind: DeltaKind, text: str) -> str:
        """The text that is allowed: all of it, or what fits of its beginning."""
        if not text:
            return text
        if kind != self._kind:
            self._begin(kind)
        size = len(text) if text.isascii() else len(text.encode())
        if size > self._bytes_left:
            text = text.encode()[: max(0, self._bytes_left)].decode(errors="ignore")
            size = self._bytes_left
        self._bytes_left -= size
        return text

    def take_part(self, part: ToolPart) -> bool:
        """Whether a tool call is allowed: whole or not at all. Its name and arguments are what the model wrote."""
        return self._take_whole(len(part.name.encode()) + len(orjson.dumps(part.arguments)))

    def take_image(self) -> bool:
        """Whether an image is allowed."""
        return self._take_whole(TOKENS_PER_IMAGE * BYTES_PER_TOKEN)

    def _take_whole(self, size: int) -> bool:
        self._begin(None)
        self._bytes_left -= size
        return self._bytes_left >= 0

    def _begin(self, kind: DeltaKind | None) -> None:
        """A part of its own is rounded up to whole tokens by itself."""
        self._bytes_left -= self._bytes_left % BYTES_PER_TOKEN
        self._kind = kind
