"""Text that PostgreSQL and UTF-8 can hold.

PostgreSQL refuses U+0000 in `text` and `jsonb`, and UTF-8 cannot carry lone surrogates, which JSON can (`"\\ud83d"`).
User input with either is refused at the edge; what a model provider sends is repaired here, because an answer must not
be lost for one bad character.
"""

from __future__ import annotations

import json
import re
from typing import Any

import orjson

_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
# Levels that a stored list of parts, and the deepest response, put around a value.
_WRAPPING_LEVELS = 40
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def is_storable(text: str) -> bool:
    """Whether PostgreSQL can hold this text as it is."""
    return _UNSTORABLE.search(text) is None


def clean(text: str) -> str:
    """The text with every character that cannot be stored replaced by U+FFFD."""
    # isascii() is one memchr-like scan; almost every chunk of most answers passes it and has no NUL.
    if text.isascii() and "\x00" not in text:
        return text
    return _UNSTORABLE.sub(REPLACEMENT, text)


def storable_json(value: Any) -> Any:
    """A JSON value that can be stored: cleaned, or its text where it is nested too deeply or has too large a number.

    JSON is read down to 1,024 levels and written down to 254 (orjson), with integers of up to 64 bits.
    """
    try:
        cleaned = clean_json(value)
        probe = cleaned
        for _ in range(_WRAPPING_LEVELS):
            probe = [probe]
        orjson.dumps(probe)
    except (TypeError, RecursionError):
        try:
            return clean(json.dumps(value, ensure_ascii=False))
        except (TypeError, ValueError, RecursionError):
            return None
    return cleaned


def clean_json(value: Any) -> Any:
    """A JSON value with every string and key in it cleaned."""
    match value:
        case str():
            return clean(value)
        case list():
            return [clean_json(item) for item in value]
        case dict():
            return {clean(key): clean_json(item) for key, item in value.items()}
        case _:
            return value
