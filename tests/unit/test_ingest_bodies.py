"""What analytics libraries send: every form is understood, every key is the operator's, everything else is refused."""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
from typing import Any
from urllib.parse import quote, quote_plus

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from server.ingest_bodies import KEY_NAMES, with_key
from services.errors import BadUserInputError, PayloadTooLargeError

KEY = "phc_operator"
LIMIT = 100_000


def put(body: bytes, *, is_form: bool = False, max_bytes: int = LIMIT) -> Any:
    return json.loads(with_key(body, KEY, is_form=is_form, max_bytes=max_bytes))


def b64(data: bytes) -> bytes:
    return base64.b64encode(data)


EVENT = {"event": "asked", "properties": {"token": "phc_page", "distinct_id": "me", "text": "a+b 🧵 100%"}}
PLAIN = orjson.dumps(EVENT)
FORMS: dict[str, tuple[bytes, bool]] = {
    "JSON": (PLAIN, False),
    "JSON with blanks": (b"\n " + PLAIN + b"\n", False),
    "gzip": (gzip.compress(PLAIN, mtime=0), False),
    "base64": (b64(PLAIN), False),
    "base64 of gzip": (b64(gzip.compress(PLAIN, mtime=0)), False),
    "form of JSON": (b"data=" + quote_plus(PLAIN).encode(), True),
    "form of base64": (b"data=" + quote(b64(PLAIN)).encode() + b"&compression=base64&token=phc_page", True),
    "form of base64 whose + was not encoded": (b"ver=1&data=" + b64(PLAIN).replace(b"=", b"%3D"), True),
    "form of base64 of gzip": (b"data=" + quote(b64(gzip.compress(PLAIN, mtime=0)), safe="").encode(), True),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_and_goes_on_as_json(form: str) -> None:
    body, is_form = FORMS[form]
    assert put(body, is_form=is_form) == EVENT | {
        "api_key": KEY,
        "properties": EVENT["properties"] | {"token": KEY},  # type: ignore[operator]
    }


@pytest.mark.parametrize("name", KEY_NAMES)
def test_a_key_keeps_its_name_and_gets_the_operators_value(name: str) -> None:
    assert put(orjson.dumps({"event": "e", name: "phc_page"})) == {"event": "e", name: KEY}


def test_of_two_names_for_one_key_the_first_is_kept() -> None:
    body = {"event": "e", "$token": "a", "token": "b", "api_key": "c"}
    assert put(orjson.dumps(body)) == {"event": "e", "api_key": KEY}


def test_a_batch_has_the_key_for_all_its_events() -> None:
    events = [{"event": "a", "api_key": "phc_x"}, {"event": "b", "properties": {"token": "phc_y"}}, {"event": "c"}]
    assert put(orjson.dumps({"batch": events, "sent_at": "now"})) == {
        "api_key": KEY,
        "sent_at": "now",
        "batch": [{"event": "a", "api_key": KEY}, {"event": "b", "properties": {"token": KEY}}, {"event": "c"}],
    }


def test_each_event_of_a_list_has_the_key() -> None:
    assert put(b'[{"event":"a"},{"event":"b","token":"x"}]') == [
        {"event": "a", "api_key": KEY},
        {"event": "b", "token": KEY},
    ]


def test_a_member_that_comes_twice_is_one() -> None:
    assert put(b'{"event":"e","token":"a","token":"b"}') == {"event": "e", "token": KEY}


def test_half_characters_do_not_cost_a_batch() -> None:
    assert put(b'{"event":"cut \\ud83e"}') == {"event": "cut \ud83e", "api_key": KEY}


def test_a_deep_page_is_recorded() -> None:
    deep = '{"a":' * 500 + "1" + "}" * 500
    assert put(f'{{"event":"$snapshot","properties":{{"page":{deep}}}}}'.encode())["api_key"] == KEY


@pytest.mark.parametrize(
    ("body", "is_form"),
    [
        (b"", False),
        (b"null", False),
        (b"5", False),
        (b'"text"', False),
        (b"[1]", False),
        (b"[[]]", False),
        (b'{"batch":5}', False),
        (b'{"batch":[5]}', False),
        (b'{"batch":null}', False),
        (b"{", False),
        (b'{"event":NaN}', False),
        (b'{"event":"\xff"}', False),
        (b'{"event":' + b"9" * 5_000 + b"}", False),
        (b"[" * 50_000, False),
        (b"data=x", False),
        (b"N4IgpgbgTgzglgewHYgFwEYA0IBGBDNVAbVEgC8BXOVEAGwFMBnOWqAZx", False),
        (b"\x1f\x8b\x08broken", False),
        (gzip.compress(PLAIN, mtime=0)[:-4], False),
        (gzip.compress(PLAIN, mtime=0) + b"more", False),
        (gzip.compress(gzip.compress(PLAIN, mtime=0), mtime=0), False),
        (b64(b64(PLAIN)), False),
        (b"", True),
        (b"data=", True),
        (b"other=" + quote(PLAIN).encode(), True),
        (b"data=" + quote(PLAIN).encode() + b"&data=" + quote(PLAIN).encode(), True),
        (b"&".join([b"a=1"] * 100) + b"&data=%7B%7D", True),
        (b"data=%ff", True),
        (b"data=\xff", True),
    ],
)
def test_what_is_not_understood_is_refused(body: bytes, is_form: bool) -> None:
    with pytest.raises(BadUserInputError):
        put(body, is_form=is_form)


@pytest.mark.parametrize("wrap", [lambda zipped: zipped, b64], ids=["gzip", "base64 of gzip"])
def test_a_compressed_bomb_is_known_by_its_first_bytes(wrap: Any) -> None:
    bomb = gzip.compress(b'{"event":"' + b" " * 50_000_000 + b'"}', mtime=0)
    with pytest.raises(PayloadTooLargeError):
        put(wrap(bomb))


def test_the_limit_is_exact() -> None:
    body = b'{"event":"%b"}' % (b"x" * 100)
    assert put(gzip.compress(body, mtime=0), max_bytes=len(body))
    with pytest.raises(PayloadTooLargeError):
        put(gzip.compress(body, mtime=0), max_bytes=len(body) - 1)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=10,
)
NAMED = st.sampled_from([*KEY_NAMES, "event", "batch", "properties", "$set"])
OBJECTS = st.dictionaries(NAMED | st.text(max_size=4), JSON, max_size=6)
EVENTS = st.builds(
    lambda base, more: base | ({} if more is None else {"properties": more}), OBJECTS, st.none() | OBJECTS
)


@example({"batch": [], "properties": {"token": None}})
@given(EVENTS | st.lists(EVENTS, max_size=4) | st.builds(lambda batch: {"batch": batch}, st.lists(EVENTS, max_size=4)))
def test_whatever_comes_no_other_key_is_left_where_one_is_looked_for(value: Any) -> None:
    try:
        got = put(json.dumps(value).encode())
    except BadUserInputError:
        return
    holders = got if isinstance(got, list) else [got]
    for holder in holders:
        assert [holder[name] for name in KEY_NAMES if name in holder] == [KEY]
    for event in [*holders, *(got.get("batch", []) if isinstance(got, dict) else [])]:
        assert {event[name] for name in KEY_NAMES if name in event} <= {KEY}
        assert not isinstance(event.get("properties"), dict) or event["properties"].get("token", KEY) == KEY


@given(st.binary(max_size=200), st.booleans())
def test_no_bytes_are_a_defect(body: bytes, is_form: bool) -> None:
    with contextlib.suppress(BadUserInputError):
        put(body, is_form=is_form)
