"""GraphQL over HTTP: media types, statuses, and bodies that are none."""

from __future__ import annotations

import asyncio
import gzip
import os
from io import BytesIO
from typing import Any

import orjson
import pytest

from server.runtime import Server
from tests.client import Client, GraphQLErrors, connect
from tests.conftest import make_database, test_settings

JSON = "application/json"
RESPONSE_JSON = "application/graphql-response+json"


async def post(client: Client, body: bytes, **headers: str) -> tuple[int, dict[str, Any], str]:
    """Status, body and media type of a raw request."""
    headers.setdefault("Content-Type", JSON)
    async with client.http.post(client.url, data=BytesIO(body), headers=headers) as response:
        raw = await response.read()
        return response.status, orjson.loads(raw) if raw else {}, response.content_type


NO_REQUESTS = [
    (b"", 400),
    (b"null", 400),
    (b"5", 400),
    (b'""', 400),
    (b"[]", 400),
    (b'[{"query":"{__typename}"}]', 400),
    (b"{", 400),
    (b"{}", 400),
    (b'{"query":null}', 400),
    (b'{"query":5}', 400),
    (b'{"query":" "}', 400),
    (b'{"query":"{__typename}","variables":[]}', 400),
    (b'{"query":"{__typename}","variables":"x"}', 400),
    (b'{"query":"{__typename}","operationName":5}', 400),
    (b'{"query":"{__typename}","extensions":5}', 400),
    (b'{"query":"{__typename}","operationName":"Nope"}', 400),
    (b'{"query":"subscription{messageStream(messageId:\\"x\\"){__typename}}"}', 400),
    (b'{"query":"\xff\xfe"}', 400),
    ('{"query":"{__typename}"}'.encode("utf-16"), 400),
    (b'{"query":"{__typename}","variables":{"a":"\\ud83d"}}', 400),
    (b"[" * 100_000, 400),
    (b'{"variables":' + b'{"a":' * 3_000 + b"1" + b"}" * 3_000 + b"}", 400),
    (b'{"query":"' + b" " * 1_100_000 + b'"}', 413),
]


@pytest.mark.parametrize(
    ("body", "status"), NO_REQUESTS, ids=lambda value: str(value[:40]) if isinstance(value, bytes) else ""
)
async def test_what_is_no_graphql_request_gets_one_clear_error(client: Client, body: bytes, status: int) -> None:
    got, answer, media = await post(client, body)
    assert (got, media) == (status, JSON)
    assert len(answer["errors"]) == 1
    assert answer["errors"][0]["extensions"]["code"] in (
        "BAD_USER_INPUT",
        "PAYLOAD_TOO_LARGE",
        "GRAPHQL_VALIDATION_FAILED",
    )
    assert "data" not in answer


async def test_a_compressed_bomb_is_too_large(client: Client) -> None:
    bomb = gzip.compress(b'{"query":"' + b" " * 50_000_000 + b'"}')
    status, answer, _ = await post(client, bomb, **{"Content-Encoding": "gzip"})
    assert (status, answer["errors"][0]["extensions"]["code"]) == (413, "PAYLOAD_TOO_LARGE")


@pytest.mark.parametrize(
    "media",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/graphql"],
)
async def test_only_json_is_executed(client: Client, media: str) -> None:
    body = b'{"query":"mutation { startAnonymousSession { token } }"}'
    status, answer, _ = await post(client, body, **{"Content-Type": media})
    assert status == 415
    assert "data" not in answer


NUMBERS = [
    "NaN",
    "Infinity",
    "-Infinity",
    "1e400000",
    "9223372036854775808",
    "-1e308",
    "2147483648",
    "1.5",
    "0x10",
    "1_0",
]
DEEP = "[" * 20_000 + "]" * 20_000


@pytest.mark.parametrize("value", [*NUMBERS, DEEP], ids=lambda value: value[:20])
async def test_a_number_that_cannot_be_one_and_nesting_without_end_are_typed_errors(client: Client, value: str) -> None:
    typed = {"BAD_USER_INPUT", "GRAPHQL_PARSE_FAILED", "GRAPHQL_VALIDATION_FAILED", "QUERY_TOO_COMPLEX"}
    variable = b'{"query":"query($n: Int) { threads(first: $n) { nodes { id } } }","variables":{"n":' + value.encode()
    written = orjson.dumps({"query": f"{{ threads(first: {value}) {{ nodes {{ id }} }} }}"})
    for body in (variable + b"}}", written):
        status, answer, _ = await post(client, body, Authorization=f"Bearer {client.token}")
        assert status in (200, 400)
        assert {error["extensions"]["code"] for error in answer["errors"]} <= typed
        assert len(orjson.dumps(answer)) < 2_000


@pytest.mark.parametrize(
    "query", ["{ ... @defer { viewer { id } } }", "{ threads { nodes @stream(initialCount: 1) { id } } }"]
)
async def test_answers_come_in_one_piece(client: Client, query: str) -> None:
    with pytest.raises(GraphQLErrors) as refused:
        await client.run(query)
    assert refused.value.code == "GRAPHQL_VALIDATION_FAILED"


async def test_a_hash_of_a_document_is_no_document(client: Client) -> None:
    for more in ({}, {"query": ""}, {"query": None}):
        asked = {"extensions": {"persistedQuery": {"version": 1, "sha256Hash": "0" * 64}}} | more
        status, answer, _ = await post(client, orjson.dumps(asked))
        assert (status, answer["errors"][0]["extensions"]["code"]) == (400, "BAD_USER_INPUT")


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH"])
async def test_other_methods_are_not_allowed(client: Client, method: str) -> None:
    async with client.http.request(method, client.url, params={"query": "{__typename}"}) as response:
        assert response.status == 405
        assert "POST" in response.headers["Allow"]


async def get(client: Client, **params: str) -> tuple[int, dict[str, Any], str | None]:
    headers = {"Authorization": f"Bearer {client.token}"}
    async with client.http.get(client.url, params=params, headers=headers) as response:
        return response.status, orjson.loads(await response.read()), response.headers.get("Allow")


async def test_get_answers_queries(client: Client) -> None:
    query = "query A($ids: [ID!]!) { viewer { id } nodes(ids: $ids) { id } } query B { __typename }"
    status, answer, _ = await get(client, query=query, variables='{"ids":[]}', operationName="A")
    assert (status, answer) == (200, {"data": {"viewer": {"id": client.id}, "nodes": []}})


async def test_get_never_changes_anything(client: Client) -> None:
    given = '{idempotencyKey: "k", text: "x", modelId: "two-words"}'
    status, answer, allow = await get(client, query=f"mutation {{ sendMessage(input: {given}) {{ thread {{ id }} }} }}")
    assert (status, allow, "data" in answer) == (405, "POST", False)
    assert (await client.run("{ threads { nodes { id } } }"))["threads"]["nodes"] == []


@pytest.mark.parametrize(
    "params",
    [{"query": ""}, {"query": "{__typename}", "variables": "{"}, {"query": "{__typename}", "variables": "[]"}],
)
async def test_a_get_that_is_no_request_gets_one_clear_error(client: Client, params: dict[str, str]) -> None:
    status, answer, _ = await get(client, **params)
    assert (status, answer["errors"][0]["extensions"]["code"]) == (400, "BAD_USER_INPUT")


async def test_a_get_without_a_query_says_how_to_ask(client: Client) -> None:
    status, _, allow = await get(client)
    assert (status, allow) == (405, "POST")


async def test_the_media_type_that_was_accepted_decides_the_status_of_a_refused_document(client: Client) -> None:
    body = orjson.dumps({"query": "{ nope }"})
    status, answer, media = await post(client, body, Accept=RESPONSE_JSON)
    assert (status, media, "data" in answer) == (400, RESPONSE_JSON, False)
    status, answer, media = await post(client, body, Accept=JSON)
    assert (status, media, "data" in answer) == (200, JSON, False)
    assert answer["errors"][0]["extensions"]["code"] == "GRAPHQL_VALIDATION_FAILED"
    assert answer["errors"][0]["locations"] == [{"line": 1, "column": 3}]


async def test_an_error_of_a_field_is_no_refusal(client: Client) -> None:
    status, answer, media = await post(client, b'{"query":"{ viewer { id } }"}', Accept=RESPONSE_JSON)
    assert (status, media, answer["data"]) == (200, RESPONSE_JSON, None)
    assert answer["errors"][0]["path"] == ["viewer"]


REFUSED = [
    ("{", None, "GRAPHQL_PARSE_FAILED"),
    ("{ nope }", None, "GRAPHQL_VALIDATION_FAILED"),
    ("query($n: Int!) { threads(first: $n) { nodes { id } } }", {"n": "x"}, "BAD_USER_INPUT"),
    ("query($n: Int!) { threads(first: $n) { nodes { id } } }", {"n": 2**40}, "BAD_USER_INPUT"),
    ("query($n: Int!) { threads(first: $n) { nodes { id } } }", None, "BAD_USER_INPUT"),
    ("query($i: SendMessageInput!) { __typename }", {"i": {"userId": "x"}}, "GRAPHQL_VALIDATION_FAILED"),
    (
        "mutation($i: SendMessageInput!) { sendMessage(input: $i) { thread { id } } }",
        {"i": {"idempotencyKey": "k", "text": "x", "role": "SYSTEM"}},
        "BAD_USER_INPUT",
    ),
    ("{ " + " ".join(f"a{n}: __typename" for n in range(31)) + " }", None, "QUERY_TOO_COMPLEX"),
    ("{ " + " ".join(f"a{n}: __typename" for n in range(1_000)) + " }", None, "GRAPHQL_PARSE_FAILED"),
    ("query A { __typename } query B { __typename }", None, "GRAPHQL_VALIDATION_FAILED"),
    ("{ " + "__typename " * 3_000 + "}", None, "GRAPHQL_PARSE_FAILED"),
    ("{ __typename " + "@skip(if: false) " * 10 + "}", None, "GRAPHQL_VALIDATION_FAILED"),
    ("{ __typename " + " ".join(f"@d{n}" for n in range(500)) + "}", None, "QUERY_TOO_COMPLEX"),
    (
        '{ thread(id: "x") ' + "{ messages { nodes { thread " * 5 + "{ id }" + " } } }" * 5 + " }",
        None,
        "QUERY_TOO_COMPLEX",
    ),
    (
        "{ threads(first: 100) { nodes { messages(first: 100) { nodes { siblings { id } } } } } }",
        None,
        "QUERY_TOO_COMPLEX",
    ),
    (
        "query($n: Int) { threads(first: $n) { nodes { messages(last: $n) { nodes { siblings { id } } } } } }",
        {"n": 100},
        "QUERY_TOO_COMPLEX",
    ),
    ("fragment A on Query { ...B } fragment B on Query { ...A } { ...A }", None, "GRAPHQL_VALIDATION_FAILED"),
    (
        "query A { __typename } " + " ".join(f"query Q{n} {{ __typename }}" for n in range(25)),
        None,
        "QUERY_TOO_COMPLEX",
    ),
]


@pytest.mark.parametrize(("query", "variables", "code"), REFUSED, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("transport", ["http", "socket"])
async def test_a_document_that_is_refused_says_why_by_its_code(
    client: Client, query: str, variables: dict[str, Any] | None, code: str, transport: str
) -> None:
    async def attempt() -> None:
        if transport == "http":
            await client.run(query, variables)
        else:
            async with client.subscribe(query, variables or {}) as operation:
                await operation.next()

    with pytest.raises(GraphQLErrors) as refused:
        await attempt()
    codes = {error["extensions"]["code"] for error in refused.value.errors}
    assert code in codes
    assert len(refused.value.errors) <= 50
    assert (await client.run("{ __typename }")) == {"__typename": "Query"}


async def test_an_exponential_spread_of_fragments_is_refused_fast(client: Client) -> None:
    fragments = " ".join(f"fragment F{n} on Query {{ ...F{n + 1} ...F{n + 1} }}" for n in range(60))
    with pytest.raises(GraphQLErrors) as refused:
        await client.run(fragments + " fragment F60 on Query { __typename } { ...F0 }")
    assert "QUERY_TOO_COMPLEX" in {error["extensions"]["code"] for error in refused.value.errors}


async def test_a_page_size_in_a_variable_counts_as_it_is_given(client: Client) -> None:
    query = "query($n: Int) { threads(first: $n) { nodes { messages(last: $n) { nodes { siblings { id } } } } } }"
    assert await client.run(query, {"n": 5}) == {"threads": {"nodes": []}}


NESTED = "projects(first: $n) { nodes { threads(first: $n) { nodes { messages(first: $n) { nodes { id } } } } } }"
NEGATIVE = "{ a: threads(first: -2000000000) { nodes { id } } " + NESTED.replace("$n", "100") + " }"


@pytest.mark.parametrize(
    ("query", "variables"),
    [
        (f"query($n: Int = 100) {{ {NESTED} }}", {}),
        (f"query($n: Int) {{ {NESTED} }}", {"n": 100.0}),
        (f"query($n: Int = 100, $m: Int) {{ {NESTED.replace('$n', '$n, last: $m')} }}", {"m": None}),
        (f"query($m: Int) {{ {NESTED.replace('$n', '100, last: $m')} }}", {"m": None}),
        (NEGATIVE, {}),
    ],
    ids=[
        "by default",
        "as a fraction",
        "beside one that is null",
        "beside a variable that is null",
        "beside less than none",
    ],
)
async def test_a_page_size_counts_however_it_is_written(client: Client, query: str, variables: dict[str, Any]) -> None:
    for _ in range(2):
        with pytest.raises(GraphQLErrors) as refused:
            await client.run(query, variables)
        assert refused.value.code == "QUERY_TOO_COMPLEX"


async def test_only_the_operation_that_is_run_is_weighed(client: Client) -> None:
    query = f"query Light {{ __typename }} query Heavy($n: Int = 100) {{ {NESTED} }}"

    async def asked(name: str) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {client.token}"}
        async with client.http.post(
            client.url, json={"query": query, "operationName": name}, headers=headers
        ) as response:
            answer: dict[str, Any] = await response.json()
        return answer

    for _ in range(2):
        assert await asked("Light") == {"data": {"__typename": "Query"}}
        assert (await asked("Heavy"))["errors"][0]["extensions"]["code"] == "QUERY_TOO_COMPLEX"


async def test_a_default_of_very_many_digits_is_read_by_nobody(client: Client) -> None:
    query = f"query($id: ID = {'1' * 5_000}) {{ thread(id: $id) {{ id }} }}"
    _, answer = await client.post(query)
    assert answer["data"] == {"thread": None} or answer["errors"]


@pytest.mark.parametrize("transport", ["http", "socket"])
async def test_null_for_whether_a_field_is_included_is_said_each_time(client: Client, transport: str) -> None:
    query = "query($i: Boolean = true) { threads(first: 1) @include(if: $i) { nodes { id } } }"

    async def attempt() -> None:
        if transport == "http":
            await client.run(query, {"i": None})
        else:
            async with client.subscribe(query, {"i": None}) as operation:
                await operation.next()

    for _ in range(3):
        with pytest.raises(GraphQLErrors) as refused:
            await attempt()
        assert refused.value.code == "BAD_USER_INPUT"
    assert await client.run(query) == {"threads": {"nodes": []}}


@pytest.mark.parametrize(
    "field",
    ["threads(first: 2, filter: 1)", "thread(id: 5)", "nodes(ids: [null])", "message"],
)
async def test_bad_arguments_never_reach_a_service(client: Client, field: str) -> None:
    status, answer = await client.post(f"{{ {field} {{ id }} }}")
    assert status == 200
    assert answer["errors"]


async def test_a_defect_is_masked_and_found_in_the_log(
    client: Client, server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*_: Any) -> None:
        raise RuntimeError("postgresql://admin:hunter2@db/secret SELECT * FROM users")

    monkeypatch.setattr(type(server.application._http._services.threads), "find", broken)
    _, answer = await client.post('{ thread(id: "thread_' + "0" * 32 + '") { id } }')
    error = answer["errors"][0]
    assert "hunter2" not in str(answer)
    assert error["extensions"]["code"] == "INTERNAL_SERVER_ERROR"
    assert any(error["extensions"]["errorId"] in record.getMessage() for record in caplog.records)
    async with client.subscribe('{ thread(id: "thread_' + "0" * 32 + '") { id } }', {}) as operation:
        with pytest.raises(GraphQLErrors) as over_socket:
            await operation.next()
    assert over_socket.value.code == "INTERNAL_SERVER_ERROR"
    assert "hunter2" not in str(over_socket.value)


async def test_health_and_security_headers(client: Client) -> None:
    for path in ("/healthz", "/readyz"):
        async with client.http.get(client.address + path) as response:
            assert response.status == 200
            assert response.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(("GET", path) for path in ("/", "/nope", "/graphql", "/graphql?query={__typename}", "/readyz", "/exports/x")),
        *(("POST", path) for path in ("/graphql", "/attachments", "/import", "/nope")),
        *(("PUT", path) for path in ("/graphql", "/files/x")),
    ],
)
async def test_no_answer_lets_a_browser_guess_what_it_is(client: Client, method: str, path: str) -> None:
    headers = {"Accept": "text/html"} if path in ("/", "/graphql") else {}
    async with client.http.request(
        method, client.address + path, headers=headers, data=b"<script>", allow_redirects=False
    ) as response:
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert "Set-Cookie" not in response.headers
        if response.content_type == "text/html":
            assert "frame-ancestors 'none'" in response.headers["Content-Security-Policy"]


async def test_without_introspection_nothing_of_the_schema_is_told(postgres_url: str, tmp_path: Any) -> None:
    url = await make_database(postgres_url)
    server = Server(test_settings(url, tmp_path, introspection=False, graphiql=False))
    await server.start()
    try:
        async with connect(server.address) as client:
            for query in ("{ __schema { types { name } } }", '{ __type(name: "Thread") { name } }', "{ thred { id } }"):
                with pytest.raises(GraphQLErrors) as refused:
                    await client.run(query)
                assert "Did you mean" not in str(refused.value)
            async with client.http.get(client.url, headers={"Accept": "text/html"}) as response:
                assert response.status == 405
    finally:
        await server.drain()
        await server.close()


def test_no_test_runs_with_settings_of_the_machine() -> None:
    assert "OPENAI_API_KEY" not in os.environ


async def head_of(client: Client, begun: bytes) -> bytes:
    """What comes on a connection on which a request was begun so, until the server closes it."""
    host, port = client.address.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(begun)
        async with asyncio.timeout(20):
            return await reader.read()
    finally:
        writer.close()


async def test_a_body_that_does_not_come_is_not_waited_for(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.graphql_http.BODY_SECONDS", 0.1)
    begun = (
        b'POST /graphql HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"query":'
    )
    answer = await head_of(client, begun)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"BAD_USER_INPUT" in answer


async def test_headers_that_do_not_come_are_not_waited_for(
    postgres_url: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.connections.SILENCE_SECONDS", 0.2)
    server = Server(test_settings(await make_database(postgres_url), tmp_path))
    await server.start()
    try:
        async with connect(server.address) as client:
            for begun in (b"", b"POST /graph", b"POST /graphql HTTP/1.1\r\nHost: x\r\nX-One: "):
                assert await head_of(client, begun) in (b"", b"HTTP/1.1 408 Request Timeout")
    finally:
        await server.drain()
        await server.close()


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br"])
async def test_a_body_that_is_not_what_it_says_is_refused(client: Client, encoding: str) -> None:
    body = b"this is compressed by nobody"
    headers = {"Content-Type": JSON, "Content-Encoding": encoding}
    async with client.http.post(client.url, data=body, headers=headers) as response:
        assert response.status == 400
        answer = await response.read()
    assert b"Traceback" not in answer
