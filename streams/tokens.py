"""Token counts where the provider gave none: a stopped, failed or interrupted answer was consumed all the same."""

from __future__ import annotations

from models.parts import Part, ReasoningPart, TextPart
from models.records import MessageTokens

# Common tokenizers make about one token of four bytes of English text; other scripts have more bytes a character.
_BYTES_PER_TOKEN = 4


def estimate_tokens(text: str) -> int:
    """About how many tokens a text is: a quarter of its UTF-8 bytes, rounded up."""
    return -(-len(text.encode()) // _BYTES_PER_TOKEN)


def estimate(prompt: str, parts: list[Part]) -> MessageTokens:
    """About what an answer consumed, marked as an estimate."""
    text = sum(estimate_tokens(part.text) for part in parts if isinstance(part, TextPart))
    reasoning = sum(estimate_tokens(part.text) for part in parts if isinstance(part, ReasoningPart))
    return MessageTokens(estimate_tokens(prompt), text + reasoning, reasoning, 0, estimated=True)
