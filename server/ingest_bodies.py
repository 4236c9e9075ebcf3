"""What analytics libraries send, read and written anew with the operator's project key.

A body is understood in these forms, whatever its Content-Type and `compression=` say, as PostHog itself takes them:

    JSON                                posthog-js without compression, posthog-node, curl
    gzip of JSON                        posthog-js by default (it announces it in no header)
    base64 of either                    older libraries
    a form with `data=` of any of them  posthog-js when a page is left (`compression=base64`)

`Content-Encoding: gzip` and `deflate` are undone before, by the HTTP server. Everything else is refused. What goes on
is always plain JSON, written by us: two readers cannot understand it in two ways.
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from typing import Any, NoReturn
from urllib.parse import parse_qsl

import orjson

from services.errors import BadUserInputError, PayloadTooLargeError

# One field with three names for PostHog, which refuses an object that has two of them.
KEY_NAMES = ("api_key", "token", "$token")

_GZIP = b"\x1f\x8b"
_GZIP_WINDOW = 16 + zlib.MAX_WBITS
_MAX_FORM_FIELDS = 16
_FORM = "The form must have one field `data`, with JSON, gzip or base64 of it."
_UNKNOWN = "The body must be JSON, gzip or base64 of it, or a form with it as `data`."
_SHAPE = "The JSON must be an event, a list of events, or an object with a list of events as `batch`."


def with_key(body: bytes, key: str, *, is_form: bool, max_bytes: int) -> bytes:
    """The body as JSON, with the key in the place of every other.

    Raises:
        BadUserInputError: it is none of the forms above, or not of events.
        PayloadTooLargeError: it is larger than allowed when it is decompressed.
    """
    if is_form:
        body = _form_data(body)
    value = _json(_plain(body, max_bytes))
    _put_key(value, key)
    return _written(value)


def _form_data(body: bytes) -> bytes:
    try:
        # A form may have + for a blank; base64 has none, so there it stands for itself.
        fields = parse_qsl(body.decode("ascii"), strict_parsing=True, errors="strict", max_num_fields=_MAX_FORM_FIELDS)
    except (ValueError, UnicodeDecodeError) as error:
        raise BadUserInputError(_FORM) from error
    found = [value for name, value in fields if name == "data"]
    if len(found) != 1:
        raise BadUserInputError(_FORM)
    text = found[0]
    return (text if text.lstrip()[:1] in ("{", "[") else text.replace(" ", "+")).encode()


def _plain(body: bytes, max_bytes: int) -> bytes:
    """The body without its compression, and without base64 around that."""
    if body.startswith(_GZIP):
        body = _unzipped(body, max_bytes)
    if body.lstrip()[:1] in (b"{", b"["):
        return body
    try:
        body = base64.b64decode(body.strip(), validate=True)
    except binascii.Error as error:
        raise BadUserInputError(_UNKNOWN) from error
    return _unzipped(body, max_bytes) if body.startswith(_GZIP) else body


def _unzipped(body: bytes, max_bytes: int) -> bytes:
    decompressor = zlib.decompressobj(_GZIP_WINDOW)
    try:
        # One byte more than is allowed, and no further: a bomb is known by its first bytes too many.
        plain = decompressor.decompress(body, max_bytes + 1)
    except zlib.error as error:
        raise BadUserInputError(_UNKNOWN) from error
    if len(plain) > max_bytes:
        raise PayloadTooLargeError(f"The body may be {max_bytes} bytes long when it is decompressed.")
    if not decompressor.eof or decompressor.unused_data:
        raise BadUserInputError(_UNKNOWN)
    return plain


def _json(text: bytes) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        pass
    # Half characters, which orjson refuses: browsers write them where a text was cut in the middle of an emoji.
    try:
        return json.loads(text.decode(), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise BadUserInputError(_UNKNOWN) from error


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


def _written(value: Any) -> bytes:
    try:
        return orjson.dumps(value)
    except TypeError:
        pass
    # Half characters again, or deeper than orjson writes, as a recorded page may be.
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise BadUserInputError(_UNKNOWN) from error


def _put_key(value: Any, key: str) -> None:
    """Put the key where PostHog looks for one, and leave no other in such a place."""
    if isinstance(value, dict) and "batch" in value:
        _events(value["batch"], key)
        if not _replaced(value, key):
            value["api_key"] = key
        return
    # Not every event says whose it is where a batch says it for them; here each must.
    for event in _events(value if isinstance(value, list) else [value], key):
        if not any(name in event for name in KEY_NAMES):
            event["api_key"] = key


def _events(value: Any, key: str) -> list[dict[str, Any]]:
    """The events with the key in the place of theirs."""
    if not isinstance(value, list) or not all(isinstance(event, dict) for event in value):
        raise BadUserInputError(_SHAPE)
    for event in value:
        _replaced(event, key)
    return value


def _replaced(holder: dict[str, Any], key: str) -> bool:
    """Put the key in the place of the one that is there, under its name and no other; whether there was one."""
    names = [name for name in KEY_NAMES if name in holder]
    for name in names[1:]:
        del holder[name]
    if names:
        holder[names[0]] = key
    properties = holder.get("properties")
    # posthog-js has it here and nowhere else.
    if isinstance(properties, dict) and "token" in properties:
        properties["token"] = key
    return bool(names)
