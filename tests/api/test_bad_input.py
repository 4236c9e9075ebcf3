"""Nothing a caller writes into an argument is more than a typed error: made from the schema, so no field is forgotten.

CHECKLIST R67, R68, S8, S29: every text and id of every root field, each with what cannot be stored, is too long, is of
another kind, or tries to be SQL, a path or a template; every enum, number and truth value with what is none.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any
from uuid import UUID

import aiohttp
import asyncpg
import orjson
import pytest
from graphql import (
    GraphQLEnumType,
    GraphQLInputObjectType,
    GraphQLInputType,
    GraphQLList,
    GraphQLNonNull,
    get_named_type,
    is_leaf_type,
)

from server.runtime import Server
from tests.accounts import key_of
from tests.api.test_delete_account import ways_to_users
from tests.api.test_ownership import SCHEMA, owned, root_fields, session
from tests.client import DEADLINE_SECONDS, Client

__all__ = ["owned", "session"]  # fixtures of test_ownership

Path = tuple[str, ...]


@pytest.fixture
async def rows(server: Server) -> AsyncIterator[asyncpg.Connection]:
    """A connection beside the server's."""
    connection = await asyncpg.connect(server.database.url)
    yield connection
    await connection.close()


# As JSON, because a lone surrogate cannot be encoded otherwise.
NASTY = {
    "empty": b'""',
    "blank": b'" \\n\\t "',
    "nul": b'"a\\u0000b"',
    "half a character": b'"\\ud83d"',
    "long": orjson.dumps("x" * 300_000),
    "wide": orjson.dumps("🦉" * 30_000),
    "of another kind": orjson.dumps("user_" + "0" * 32),
    "no such thing": orjson.dumps("thread_" + "f" * 32),
    "sql": orjson.dumps("'; DROP TABLE users; --"),
    "path": orjson.dumps("../../etc/passwd\r\nX: y"),
    "odd": orjson.dumps("\u202e\ufeff\uffff{{7*7}}%s%n" + "\u0301" * 500),
}
# What a caller may be told about a value. Anything else, above all INTERNAL_SERVER_ERROR, is a defect.
TYPED = {
    *("BAD_USER_INPUT", "PAYLOAD_TOO_LARGE", "NOT_FOUND", "CURSOR_INVALID", "MODEL_UNAVAILABLE", "CONFLICT"),
    *("THREAD_BUSY", "UNAUTHENTICATED", "FORBIDDEN", "UNSUPPORTED_MEDIA", "QUERY_TOO_COMPLEX"),
}
# These end what later cases need.
LAST = {"mutation.deleteAccount"}


# What no enum, number or truth value is.
ODD = {
    "unknown": b'"NO_SUCH_VALUE"',
    "lower case": b'"day"',
    "nul": b'"DAY\\u0000"',
    "half a character": b'"\\ud83d"',
    "huge": b"9223372036854775808",
    "negative": b"-9223372036854775809",
    "broken": b"0.5",
    "list": b"[[]]",
    "object": b"{}",
}
# What a turn of an earlier case still writes is compared by ids; what comes with its end is not compared.
GROWING = {"messages", "turns"}
WHOLE = "(to_jsonb(t) - 'updated_at')"
ENDING = {"streams", "stream_checkpoints", "search_documents", "usage_events", "usage_quarters", "changes"}


def leaves(kind: GraphQLInputType, path: Path) -> Iterator[tuple[Path, GraphQLInputType]]:
    """The places below an argument that take one value, or a list of them, but for files."""
    named = get_named_type(kind)
    if isinstance(named, GraphQLInputObjectType):
        for name, field in named.fields.items():
            yield from leaves(field.type, (*path, name))
    elif named.name != "Upload":
        yield path, kind


def takes_texts(kind: GraphQLInputType) -> bool:
    named = get_named_type(kind)
    return not isinstance(named, GraphQLEnumType) and named.name not in ("Int", "Float", "Boolean", "BigInt")


def is_list(kind: GraphQLInputType) -> bool:
    return isinstance(kind.of_type if isinstance(kind, GraphQLNonNull) else kind, GraphQLList)


def plausible(kind: GraphQLInputType, name: str, ids: dict[str, str]) -> Any:
    """A value that the argument could have."""
    named = get_named_type(kind)
    value: Any
    if isinstance(named, GraphQLInputObjectType):
        value = {
            key: plausible(field.type, key, ids)
            for key, field in named.fields.items()
            if isinstance(field.type, GraphQLNonNull)
        }
    elif isinstance(named, GraphQLEnumType):
        value = next(iter(named.values))
    elif named.name == "ID":
        by_name = {"messageId": "answer", "threadId": "thread", "projectId": "project"}
        value = ids[by_name.get(name, "thread")]
    elif named.name == "Boolean":
        value = True
    elif named.name in ("Int", "BigInt"):
        value = 1
    elif name == "modelId":
        value = "two-words"
    else:
        value = str(uuid.uuid4())
    return [value] if is_list(kind) else value


def fields_with_values() -> list[str]:
    found = [
        name
        for name, field in root_fields().items()
        if any(True for key, argument in field.args.items() for _ in leaves(argument.type, (key,)))
    ]
    return sorted(found, key=lambda name: (name in LAST, name))


def with_value(variables: dict[str, Any], path: Path, value: Any) -> dict[str, Any]:
    """The variables with another value at one place."""
    if len(path) == 1:
        return variables | {path[0]: value}
    return variables | {path[0]: with_value(dict(variables.get(path[0]) or {}), path[1:], value)}


async def send(client: Client, query: str, variables: bytes) -> list[dict[str, Any]]:
    """The errors of an operation whose variables are written by hand."""
    payload = b'{"query":' + orjson.dumps(query) + b',"variables":' + variables + b"}"
    if query.startswith("subscription"):
        async with client.socket() as socket:
            assert (await socket.receive_json(timeout=DEADLINE_SECONDS))["type"] == "connection_ack"
            await socket.send_str((b'{"id":"1","type":"subscribe","payload":' + payload + b"}").decode())
            answered = await socket.receive(timeout=DEADLINE_SECONDS)
            if answered.type is aiohttp.WSMsgType.CLOSE:
                assert socket.close_code == 4400, "a message that is no JSON, such as of half a character, closes it"
                return [{"message": "", "extensions": {"code": "BAD_USER_INPUT"}}]
            frame = orjson.loads(answered.data)
            refused: list[dict[str, Any]] = (
                frame["payload"] if frame["type"] == "error" else frame["payload"].get("errors", [])
            )
            return refused
    headers = {"Authorization": f"Bearer {client.token}", "Content-Type": "application/json"}
    async with client.http.post(client.url, data=payload, headers=headers) as response:
        assert response.status in (200, 400, 413), response.status
        answer = orjson.loads(await response.read())
    errors: list[dict[str, Any]] = answer.get("errors", [])
    return errors


async def state(connection: asyncpg.Connection, user_id: UUID) -> set[tuple[str, str]]:
    """Everything of a user's, in whatever tables there are."""
    ways = await ways_to_users(connection)
    found = " UNION ALL ".join(
        f"SELECT '{table}', {'t.id' if table in GROWING else WHOLE}::text FROM {table} t WHERE {condition}"
        for table, condition in ways.items()
        if table not in ENDING
    )
    return {tuple(row) for row in await connection.fetch(found, user_id)}


@pytest.mark.parametrize("name", fields_with_values())
async def test_no_value_is_more_than_a_typed_error_that_changes_nothing(
    client: Client, owned: dict[str, str], rows: asyncpg.Connection, name: str
) -> None:
    kind, field_name = name.split(".")
    field = root_fields()[name]
    declared = ", ".join(f"${key}: {argument.type}" for key, argument in field.args.items())
    given = ", ".join(f"{key}: ${key}" for key in field.args)
    selection = "" if is_leaf_type(get_named_type(field.type)) else "{ __typename }"
    query = f"{kind}({declared}) {{ it: {field_name}({given}) {selection} }}"
    places = [place for key, argument in field.args.items() for place in leaves(argument.type, (key,))]
    assert places
    user_id = key_of(client)
    before = await state(rows, user_id)
    for path, place in places:
        cases = dict(NASTY if takes_texts(place) else ODD)
        if is_list(place):
            cases = {case: b"[" + value + b"]" for case, value in cases.items()}
            cases["ten thousand"] = orjson.dumps([f"message_{n:032x}" for n in range(10_000)])
            cases["the same twice"] = orjson.dumps([owned["answer"]] * 2)
        for case, value in cases.items():
            base = {
                key: plausible(argument.type, key, owned)
                for key, argument in field.args.items()
                if isinstance(argument.type, GraphQLNonNull)
            }
            marker = str(uuid.uuid4())
            variables = orjson.dumps(with_value(base, path, marker)).replace(orjson.dumps(marker), value)
            errors = await send(client, query, variables)
            assert errors or takes_texts(place), f"{'.'.join(path)} {case} was taken"
            for error in errors:
                assert error["extensions"]["code"] in TYPED, f"{'.'.join(path)} {case}: {error}"
                assert len(error["message"]) < 500, "an error does not repeat what was sent"
            after = await state(rows, user_id)
            assert after == before or not errors, f"{'.'.join(path)} {case}: {errors}"
            before = after


def test_every_root_field_with_a_value_is_tried() -> None:
    assert SCHEMA.mutation_type
    assert len(fields_with_values()) > 15
