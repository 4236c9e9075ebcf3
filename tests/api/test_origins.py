"""Which pages may read what the server says: exactly those of one setting, over HTTP and over sockets."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from datetime import timedelta
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp
import pytest

from server.pages import Health
from server.runtime import Server
from tests.accounts import link
from tests.client import PROTOCOL, Client, connect
from tests.conftest import make_database, test_settings
from tests.vendor_server import VendorServer, Wire

ALLOWED = ("https://chat.example.com", "http://localhost:3000")
REFUSED = (
    "https://evil.example.com",
    "https://chat.example.com.evil.com",
    "https://evilchat.example.com",
    "https://chat.example.com:444",
    "https://chat.example.com:443",
    "http://chat.example.com",
    "https://chat.example.com/",
    "https://chat.example.com/path",
    "https://chat.example.com@evil.com",
    "https://me@chat.example.com",
    "https://chat.example.com.",
    "https://*.example.com",
    "https://chat.example.com, https://evil.example.com",
    "http://localhost:3001",
    "http://localhost",
    "file://",
    "null",
    "*",
    "",
)
ASKING = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, content-type"}
LIMIT = 100_000
ID = "0" * 32


@pytest.fixture(scope="module")
async def host() -> AsyncIterator[VendorServer]:
    """An analytics host."""

    async def answer(wire: Wire) -> None:
        await wire.whole(200, b"{}")

    async with VendorServer(answer) as host:
        yield host


@pytest.fixture(scope="module")
async def fronted(
    postgres_url: str, tmp_path_factory: pytest.TempPathFactory, host: VendorServer
) -> AsyncIterator[Server]:
    """A server with frontends of its own, and with everything that can be served."""
    settings = test_settings(
        await make_database(postgres_url),
        tmp_path_factory.mktemp("fronted"),
        allowed_origins=ALLOWED,
        ingest_url=f"http://127.0.0.1:{host.port}",
        ingest_api_key="phc_operator",
        ingest_max_bytes=LIMIT,
        max_request_bytes=LIMIT,
    )
    server = Server(settings)
    await server.start()
    yield server
    await server.drain()
    await server.close()


@pytest.fixture
async def user(fronted: Server) -> AsyncIterator[Client]:
    """A new anonymous user of that server."""
    async with connect(fronted.address) as client:
        await client.sign_in()
        yield client


def may_read(headers: Any, origin: str) -> bool:
    """Whether a browser shows a response to a page of this origin; no response may say anything in between."""
    allowed = headers.getall("Access-Control-Allow-Origin", [])
    assert allowed in ([], [origin])
    assert "Access-Control-Allow-Credentials" not in headers
    assert "Origin" in [name.strip() for name in ",".join(headers.getall("Vary", [])).split(",")]
    assert headers.getall("X-Content-Type-Options") == ["nosniff"]
    return bool(allowed)


ANSWERED: list[tuple[str, str, dict[str, str], int]] = [
    ("POST", "{ __typename }", {}, 200),
    ("POST", "{ __typename }", {"Accept": "application/graphql-response+json"}, 200),
    ("POST", "{ nope }", {"Accept": "application/graphql-response+json"}, 400),
    ("POST", "{ nope }", {"Origin": ALLOWED[0]}, 200),
    ("POST", "{ __typename }", {"Origin": REFUSED[0]}, 200),
    ("GET", "{ __typename }", {"Origin": ALLOWED[1], "X-Request-Id": "mine"}, 200),
]


@pytest.mark.parametrize(("method", "query", "more", "status"), ANSWERED)
async def test_an_answer_has_the_same_head_whether_or_not_its_connection_is_kept(
    user: Client, method: str, query: str, more: dict[str, str], status: int
) -> None:
    heads, bodies = [], []
    for connection in ("keep-alive", "close"):
        given: dict[str, Any] = {"params": {"query": query}} if method == "GET" else {"json": {"query": query}}
        headers = more | {"Connection": connection}
        async with user.http.request(method, user.url, headers=headers, **given) as response:
            bodies.append(await response.read())
            heads.append({name.title(): value for name, value in response.headers.items()})
            assert response.status == status
            assert len(heads[-1]) == len(response.headers)
    kept, ended = heads
    assert ended.pop("Connection") == "close"
    if "X-Request-Id" not in more:
        assert kept.pop("X-Request-Id") != ended.pop("X-Request-Id")
    assert abs(parsedate_to_datetime(kept.pop("Date")) - parsedate_to_datetime(ended.pop("Date"))) < timedelta(
        minutes=1
    )
    assert kept == ended
    assert bodies[0] == bodies[1]
    assert kept["Cache-Control"] == "no-store"


# What is sent, and the status that comes: every route, and every kind of failure.
REQUESTS: list[tuple[str, str, dict[str, Any], int]] = [
    ("POST", "/graphql", {"json": {"query": "{__typename}"}}, 200),
    (
        "POST",
        "/graphql",
        {"json": {"query": "{ nope }"}, "headers": {"Accept": "application/graphql-response+json"}},
        400,
    ),
    ("GET", "/graphql?query={__typename}", {}, 200),
    ("GET", "/graphql", {}, 405),
    ("PUT", "/graphql", {}, 405),
    ("POST", "/graphql", {"data": b"{", "headers": {"Content-Type": "application/json"}}, 400),
    ("POST", "/graphql", {"data": b"x", "headers": {"Content-Type": "text/plain"}}, 415),
    ("POST", "/graphql", {"data": b" " * 2 * LIMIT, "headers": {"Content-Type": "application/json"}}, 413),
    ("POST", "/attachments", {"data": b"x"}, 401),
    ("POST", "/attachments", {"data": b"x", "headers": {"Authorization": "Bearer no"}}, 401),
    ("GET", f"/attachments/attachment_{ID}", {}, 401),
    ("GET", "/files/none", {}, 403),
    ("PUT", "/files/none", {"data": b"x"}, 403),
    ("GET", "/shared/none/files/0", {}, 404),
    ("GET", "/export/none", {}, 403),
    ("POST", "/import", {"data": b"x"}, 401),
    ("POST", "/ingest/e/", {"json": {"event": "e"}}, 200),
    ("POST", "/ingest/e/", {"data": b"x"}, 400),
    ("POST", "/ingest/e/", {"data": b" " * 2 * LIMIT}, 413),
    ("POST", "/ingest/nowhere", {"data": b"x"}, 404),
    ("GET", "/ingest/static/array.js", {}, 502),
    ("GET", "/healthz", {}, 200),
    ("GET", "/readyz", {}, 200),
    ("GET", "/graphiql/none.js", {}, 404),
    ("GET", "/nowhere", {}, 404),
    ("DELETE", "/healthz", {}, 405),
    ("OPTIONS", "/graphql", {}, 405),
]


@pytest.mark.parametrize(
    ("method", "path", "given", "status"),
    REQUESTS,
    ids=[f"{method} {path[:30]} {status} {at}" for at, (method, path, _, status) in enumerate(REQUESTS)],
)
async def test_a_page_reads_every_answer_and_every_refusal_or_none(
    fronted: Server, method: str, path: str, given: dict[str, Any], status: int
) -> None:
    async with connect(fronted.address) as nobody:
        for origin in (*ALLOWED, "https://evil.example.com", "null"):
            sent = given | {"headers": given.get("headers", {}) | {"Origin": origin}}
            async with nobody.http.request(method, fronted.address + path, **sent) as response:
                assert may_read(response.headers, origin) is (origin in ALLOWED)
                is_kept_out = path.startswith("/ingest/") and "nowhere" not in path and origin not in ALLOWED
                assert response.status == (403 if is_kept_out else status)


async def test_a_page_reads_that_something_is_broken(fronted: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: Any) -> bool:
        raise RuntimeError("a defect")

    for route in fronted.application.web.router.routes():
        if isinstance(health := getattr(route.handler, "__self__", None), Health):
            monkeypatch.setattr(health, "_parts", broken)
    async with connect(fronted.address) as nobody:
        for origin in (ALLOWED[0], "https://evil.example.com"):
            async with nobody.http.get(fronted.address + "/readyz", headers={"Origin": origin}) as response:
                assert response.status == 500
                assert may_read(response.headers, origin) is (origin in ALLOWED)


async def test_a_page_reads_what_streams_and_where_it_is_led(fronted: Server, user: Client) -> None:
    url = (await user.upload(b"a text"))["url"]
    exported = await link(user)
    sent = {"Authorization": f"Bearer {user.token}"}
    for origin in (*ALLOWED, "https://evil.example.com"):
        for address, status in ((url, 200), (exported, 200)):
            async with user.http.get(address, headers={"Origin": origin}) as response:
                assert response.status == status
                assert may_read(response.headers, origin) is (origin in ALLOWED)
                await response.read()
        async with user.http.get(url, headers={"Origin": origin, "Range": "bytes=0-1"}) as response:
            assert response.status == 206
            assert may_read(response.headers, origin) is (origin in ALLOWED)
        body = await _uploaded(user, sent | {"Origin": origin})
        async with user.http.get(
            f"{fronted.address}/attachments/{body}", headers=sent | {"Origin": origin}, allow_redirects=False
        ) as response:
            assert response.status == 302
            assert may_read(response.headers, origin) is (origin in ALLOWED)


async def _uploaded(user: Client, headers: dict[str, str]) -> str:
    async with user.http.post(
        f"{user.address}/attachments", params={"name": "x.txt"}, data=uuid.uuid4().bytes, headers=headers
    ) as response:
        assert response.status == 201
        return str((await response.json())["id"])


async def test_a_page_may_read_when_to_try_again_and_what_a_file_is_called(fronted: Server, user: Client) -> None:
    async with user.http.get(await link(user), headers={"Origin": ALLOWED[0]}) as response:
        exposed = response.headers["Access-Control-Expose-Headers"].lower().split(", ")
    assert {"retry-after", "content-disposition"} <= set(exposed)
    # What a viewer of PDFs reads a file in ranges by.
    assert {"accept-ranges", "content-range", "etag"} <= set(exposed)


@pytest.mark.parametrize(
    "path",
    ["/graphql", "/attachments", "/import", "/export/x", "/files/x", "/shared/x/files/0", "/ingest/e/", "/nowhere"],
)
async def test_before_it_sends_a_browser_is_told_what_a_page_may_send(fronted: Server, path: str) -> None:
    async with connect(fronted.address) as nobody:
        for origin in ALLOWED:
            async with nobody.http.options(fronted.address + path, headers={"Origin": origin} | ASKING) as response:
                assert response.status == 204
                assert may_read(response.headers, origin)
                assert response.headers["Access-Control-Allow-Methods"] == "POST, PUT"
                names = response.headers["Access-Control-Allow-Headers"].split(", ")
                assert {"authorization", "content-type", "range"} <= set(names)
                assert "*" not in names
        for origin in REFUSED:
            async with nobody.http.options(fronted.address + path, headers={"Origin": origin} | ASKING) as response:
                assert response.status == 403
                assert not may_read(response.headers, origin)
                assert "Access-Control-Allow-Methods" not in response.headers


@pytest.mark.parametrize("origin", REFUSED)
async def test_an_origin_that_only_looks_like_one_of_the_setting_is_none(fronted: Server, origin: str) -> None:
    async with connect(fronted.address) as nobody:
        headers = {"Origin": origin}
        async with nobody.http.post(nobody.url, json={"query": "{__typename}"}, headers=headers) as response:
            assert not may_read(response.headers, origin)
        with pytest.raises(aiohttp.WSServerHandshakeError, match="403"):
            await nobody.http.ws_connect(nobody.url, protocols=(PROTOCOL,), headers={"Origin": origin})


async def test_two_origins_are_none(fronted: Server) -> None:
    async with connect(fronted.address) as nobody:
        headers = [("Origin", ALLOWED[0]), ("Origin", "https://evil.example.com")]
        async with nobody.http.post(nobody.url, json={"query": "{__typename}"}, headers=headers) as response:
            assert not may_read(response.headers, ALLOWED[0])
        with pytest.raises(aiohttp.WSServerHandshakeError, match="403"):
            await nobody.http.ws_connect(nobody.url, protocols=(PROTOCOL,), headers=headers)


@pytest.mark.parametrize("origin", [*ALLOWED, "the server itself", None])
async def test_sockets_are_for_the_same_origins_for_the_servers_own_pages_and_for_programs(
    fronted: Server, origin: str | None
) -> None:
    shown = fronted.address if origin == "the server itself" else origin
    headers = {} if shown is None else {"Origin": shown}
    async with connect(fronted.address) as nobody, nobody.socket(**headers) as ws:
        assert (await ws.receive_json(timeout=10))["type"] == "connection_ack"


async def test_without_the_setting_no_other_origin_reads_anything(client: Client) -> None:
    for origin in (*ALLOWED, "null", "*"):
        headers = {"Origin": origin}
        async with client.http.post(client.url, json={"query": "{__typename}"}, headers=headers) as response:
            assert not may_read(response.headers, origin)
        async with client.http.options(client.url, headers=headers | ASKING) as response:
            assert response.status == 403
        with pytest.raises(aiohttp.WSServerHandshakeError, match="403"):
            await client.http.ws_connect(client.url, protocols=(PROTOCOL,), headers=headers)
