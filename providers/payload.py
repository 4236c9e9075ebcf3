"""What vendors' JSON holds, made safe: a wrong type counts as nothing, and what cannot be stored is repaired."""

from __future__ import annotations

import json
from typing import Any

import orjson

from models.text import clean, clean_json

NOT_JSON = object()
MAX_TOKEN_COUNT = 2**31 - 1  # what a GraphQL Int holds


def parse_json(data: bytes | str) -> Any:
    """The JSON value, or `NOT_JSON`: no exception, because that would carry the vendor's text along."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        pass
    # orjson refuses what is repaired here rather than lost: invalid UTF-8 and lone surrogates.
    text = data.decode("utf-8", "replace") if isinstance(data, bytes) else data
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return NOT_JSON


def tool_arguments(arguments: Any) -> Any:
    """Arguments of a tool call as a JSON value that can be stored; where they are none, the text itself."""
    if isinstance(arguments, str):
        arguments = clean(arguments)
        if not arguments.strip():
            return {}  # a call without arguments
    value = parse_json(arguments) if isinstance(arguments, str) else arguments
    unusable = arguments if isinstance(arguments, str) else None
    if value is NOT_JSON:
        return unusable
    try:
        value = clean_json(value)
        orjson.dumps(value)  # refuses integers beyond 64 bits and more than 254 levels, and so would whoever stores it
    except (TypeError, RecursionError):
        return unusable
    return value


def token_count(counts: Any, name: str) -> int:
    """The count of this name; what is missing or no sensible number counts as 0."""
    value = counts.get(name) if isinstance(counts, dict) else None
    if isinstance(value, bool) or not isinstance(value, int):
        return 0
    return min(max(value, 0), MAX_TOKEN_COUNT)


def text_of(value: Any) -> str:
    """The value if it is a text, else an empty one."""
    return value if isinstance(value, str) else ""
