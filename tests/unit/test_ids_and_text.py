"""Ids have one spelling and an order; texts are stored exactly when PostgreSQL can hold them."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any
from uuid import RFC_4122, UUID

import asyncpg
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graph.limits import MAX_DEPTH
from models.ids import IdKind, MalformedIdError, new_id, outside_id, parse_any_id, parse_id
from models.text import REPLACEMENT, clean, clean_json, is_storable, storable_json

KEY = UUID("01890a5d-ac96-774b-bcce-b302099a8057")
HEX = KEY.hex
kinds = st.sampled_from(IdKind)

# Every code point there is, lone surrogates and U+0000 often.
difficult = st.characters() | st.sampled_from("\x00\ud800\udbff\udc00\udfff\ue000\ufffd\uffff\U0010ffff")
texts = st.text(difficult, max_size=20)
json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)
property_settings = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def test_a_key_is_a_uuid_of_version_7() -> None:
    for _ in range(1_000):
        key = new_id()
        assert (key.version, key.variant) == (7, RFC_4122)


def test_a_key_begins_with_the_milliseconds_of_its_making() -> None:
    before = time.time_ns() // 1_000_000
    made = [new_id().int >> 80 for _ in range(1_000)]
    assert before <= made[0]
    assert made == sorted(made)
    assert made[-1] <= time.time_ns() // 1_000_000


def test_a_key_that_is_made_later_sorts_behind() -> None:
    keys = []
    for _ in range(2_000):
        keys.append(new_id())
        made = time.time_ns()
        while time.time_ns() < made + 250:
            pass
    assert keys == sorted(keys)
    assert [key.hex for key in keys] == sorted(key.hex for key in keys), "outside as inside"


def test_keys_of_one_moment_differ_in_all_their_random_bits() -> None:
    keys = [new_id().int for _ in range(2_000)]
    assert len(set(keys)) == len(keys)
    differing = 0
    for key in keys:
        differing |= key ^ keys[0]
    random_bits = (1 << 62) - 1
    assert differing & random_bits == random_bits


@given(kinds, st.uuids())
def test_an_outside_id_leads_back_to_its_key(kind: IdKind, key: UUID) -> None:
    assert parse_id(kind, outside_id(kind, key)) == key
    assert parse_any_id(outside_id(kind, key)) == (kind, key)


@given(st.sampled_from([f"{kind}_" for kind in IdKind] + ["", "thread", "_"]), st.text("0123456789abcdefABCDEF-_ \n"))
def test_what_is_read_as_an_id_is_spelt_as_it_would_be_written(prefix: str, rest: str) -> None:
    try:
        kind, key = parse_any_id(prefix + rest)
    except MalformedIdError:
        return
    assert outside_id(kind, key) == prefix + rest


@pytest.mark.parametrize("kind", IdKind)
def test_an_id_of_another_kind_is_refused(kind: IdKind) -> None:
    for other in set(IdKind) - {kind}:
        with pytest.raises(MalformedIdError):
            parse_id(other, outside_id(kind, KEY))


@pytest.mark.parametrize(
    "text",
    [
        "",
        HEX,
        f"_{HEX}",
        f"thread{HEX}",
        f"thread-{HEX}",
        f"Thread_{HEX}",
        f"thread_{HEX.upper()}",
        f"thread_{KEY}",
        f"thread_{{{HEX}}}",
        f"thread_{HEX[:-1]}",
        f"thread_{HEX}0",
        f"thread_{HEX}\n",
        f" thread_{HEX}",
        f"thread_thread_{HEX}",
        f"thread_{HEX[:-1]}g",
        f"thread_{HEX[:-1]}\N{ARABIC-INDIC DIGIT ONE}",
        f"thread_{HEX[:-1]}\N{FULLWIDTH DIGIT ONE}",
        f"stream_{HEX}",
        "thread_" + "0" * 1_000_000,
        "\ud800",
    ],
    ids=lambda text: repr(text[:48]),
)
def test_every_other_spelling_is_malformed_and_not_repeated_at_length(text: str) -> None:
    with pytest.raises(MalformedIdError) as refused:
        parse_any_id(text)
    assert len(str(refused.value)) <= 80


@pytest.fixture(scope="module")
async def connection(postgres_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection with a table for texts, and functions that tell what PostgreSQL itself accepts."""
    connection = await asyncpg.connect(postgres_url)
    await connection.execute(
        """
        CREATE TEMP TABLE kept (place int, as_text text, as_json jsonb);
        CREATE FUNCTION pg_temp.takes_text(bytes bytea) RETURNS boolean LANGUAGE plpgsql AS $$
        BEGIN
            PERFORM convert_from(bytes, 'UTF8');
            RETURN true;
        EXCEPTION WHEN character_not_in_repertoire THEN
            RETURN false;
        END $$;
        CREATE FUNCTION pg_temp.takes_json(spelt text) RETURNS boolean LANGUAGE plpgsql AS $$
        BEGIN
            PERFORM spelt::jsonb;
            RETURN true;
        EXCEPTION WHEN untranslatable_character OR invalid_text_representation THEN
            RETURN false;
        END $$;
        """
    )
    try:
        yield connection
    finally:
        await connection.close()


@property_settings
@given(st.lists(texts, min_size=1, max_size=40))
async def test_a_text_is_storable_exactly_where_postgresql_takes_it(
    connection: asyncpg.Connection, several: list[str]
) -> None:
    verdicts = await connection.fetch(
        """
        SELECT pg_temp.takes_text(raw) AS as_text, pg_temp.takes_json(spelt) AS as_json
        FROM unnest($1::bytea[], $2::text[]) WITH ORDINALITY AS given (raw, spelt, place) ORDER BY place
        """,
        # As a client could send them: surrogates as bytes that are no UTF-8, and as the escapes that JSON has.
        [text.encode("utf-8", "surrogatepass") for text in several],
        [json.dumps(text) for text in several],
    )
    joined = [json.loads(json.dumps(text)) for text in several]
    assert [row["as_text"] for row in verdicts] == [is_storable(text) for text in several]
    # JSON escapes make one character of two halves that stand together.
    assert [row["as_json"] for row in verdicts] == [is_storable(text) for text in joined]


@property_settings
@given(st.lists(texts, min_size=1, max_size=40))
async def test_a_cleaned_text_comes_back_from_text_and_jsonb_as_it_went_in(
    connection: asyncpg.Connection, several: list[str]
) -> None:
    cleaned = [clean(text) for text in several]
    await connection.execute(
        "INSERT INTO kept SELECT place, as_text, as_json FROM unnest($1::text[], $2::jsonb[]) WITH ORDINALITY "
        "AS given (as_text, as_json, place)",
        cleaned,
        [orjson.dumps({text: [text]}).decode() for text in cleaned],
    )
    rows = await connection.fetch("DELETE FROM kept RETURNING place, as_text, as_json")
    rows.sort(key=lambda row: row["place"])
    assert [row["as_text"] for row in rows] == cleaned
    assert [orjson.loads(row["as_json"]) for row in rows] == [{text: [text]} for text in cleaned]


@given(texts)
def test_cleaning_replaces_what_cannot_be_stored_and_nothing_else(text: str) -> None:
    cleaned = clean(text)
    assert is_storable(cleaned)
    assert len(cleaned) == len(text), "offsets of cursors stay where they are"
    for before, after in zip(text, cleaned, strict=True):
        assert after == (before if is_storable(before) else REPLACEMENT)
    assert clean(cleaned) == cleaned
    assert (cleaned == text) == is_storable(text)


def strings_of(value: Any) -> Iterator[str]:
    """Every string and key in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from strings_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings_of(inner)


@given(json_values)
def test_a_cleaned_json_value_can_be_written_and_keeps_its_shape(value: Any) -> None:
    cleaned = clean_json(value)
    assert orjson.loads(orjson.dumps(cleaned)) == cleaned
    assert "\\u0000" not in orjson.dumps(cleaned).decode()
    assert clean_json(cleaned) == cleaned
    if all(is_storable(text) for text in strings_of(value)):
        assert cleaned == value


def test_keys_and_values_are_cleaned_however_deep() -> None:
    given_value = {"a\x00": [{"b\ud800": "c\udfff"}, 1, 1.5, None, True, ["\x00"]], "kept": "é"}
    assert clean_json(given_value) == {
        f"a{REPLACEMENT}": [{f"b{REPLACEMENT}": f"c{REPLACEMENT}"}, 1, 1.5, None, True, [REPLACEMENT]],
        "kept": "é",
    }


def test_cleaning_changes_nothing_in_what_it_was_given() -> None:
    value = {"k": ["\x00", {"n": "\ud800"}]}
    clean_json(value)
    assert value == {"k": ["\x00", {"n": "\ud800"}]}


@given(json_values)
def test_a_json_value_that_can_be_stored_is_only_cleaned(value: Any) -> None:
    assert storable_json(value) == clean_json(value)


def nested(depth: int, inner: Any) -> Any:
    """A JSON value in so many lists."""
    for _ in range(depth):
        inner = [inner]
    return inner


@pytest.mark.parametrize("depth", [0, 100, 200, 240, 250, 253, 254, 300, 1_000, 20_000])
def test_a_json_value_of_any_depth_can_be_stored_and_sent(depth: int) -> None:
    kept = storable_json(nested(depth, {"key\x00": "value"}))
    # The deepest place in a response: each selected field may be an object in a list.
    orjson.dumps(nested(2 * MAX_DEPTH + 3, kept))


@pytest.mark.parametrize("depth", [0, 200, 254, 300])
def test_what_is_nested_too_deeply_is_kept_as_its_text(depth: int) -> None:
    value = nested(depth, {"key": "value \ud800"})
    kept = storable_json(value)
    assert (json.loads(kept) if isinstance(kept, str) else kept) == clean_json(value)


@pytest.mark.parametrize("number", [2**64 - 1, -(2**63), 2**64, -(2**63) - 1, 10**400])
def test_an_integer_of_any_size_is_kept(number: int) -> None:
    kept = storable_json({"n": number})
    assert orjson.loads(orjson.dumps(kept)) == kept
    assert (json.loads(kept) if isinstance(kept, str) else kept) == {"n": number}


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_json_has_not_can_be_stored(number: float) -> None:
    assert orjson.loads(orjson.dumps(storable_json([number]))) == [None]
