"""The analytics relay: what reaches the operator's host, what comes back, and what does neither."""

from __future__ import annotations

import asyncio
import base64
import gzip
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Self
from urllib.parse import parse_qsl, quote, urlsplit

import aiohttp
import orjson
import pytest
from aiohttp import web

from config import SettingsError
from providers.http import make_client_session
from server.ingest import MAX_ANSWER_BYTES, MAX_AT_ONCE, Ingest, IngestLimits
from server.origins import Origins
from server.runtime import Server
from services.rates import Rates
from tests.client import Client, connect
from tests.conftest import make_database, test_settings
from tests.vendor_server import ReceivedRequest, VendorServer, Wire

KEY = "phc_operatorsOwnKey"
ORIGIN = "https://chat.example.com"
SECRET_TEXT = "stack trace of the host"
MAX_BYTES = 20_000
EVENT = b'{"event":"asked","properties":{"token":"phc_page","distinct_id":"me"}}'


class Host:
    """An analytics host on a real socket that records. `answer` is how it answers; a test may set it."""

    def __init__(self) -> None:
        self.answer: Callable[[Wire], Awaitable[None]] = self.take
        self.server = VendorServer(self._answer)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.port}"

    @property
    def requests(self) -> list[ReceivedRequest]:
        return self.server.requests

    async def take(self, wire: Wire) -> None:
        await wire.whole(200, b'{"status":1}')

    async def _answer(self, wire: Wire) -> None:
        await self.answer(wire)

    def reset(self) -> None:
        self.requests.clear()
        self.answer = self.take

    async def __aenter__(self) -> Self:
        await self.server.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self.server.__aexit__(*error)


@pytest.fixture(scope="module")
async def hosts() -> AsyncIterator[tuple[Host, Host]]:
    async with Host() as events, Host() as assets:
        yield events, assets


@pytest.fixture(scope="module")
async def relaying(
    postgres_url: str, tmp_path_factory: pytest.TempPathFactory, hosts: tuple[Host, Host]
) -> AsyncIterator[Server]:
    """A server that relays."""
    settings = test_settings(
        await make_database(postgres_url),
        tmp_path_factory.mktemp("relaying"),
        ingest_url=hosts[0].url,
        ingest_assets_url=hosts[1].url,
        ingest_api_key=KEY,
        ingest_max_bytes=MAX_BYTES,
        ingest_requests_per_minute=100_000,
        ingest_total_requests_per_minute=100_000,
        allowed_origins=(ORIGIN,),
    )
    server = Server(settings)
    await server.start()
    yield server
    await server.close()


@pytest.fixture
def host(hosts: tuple[Host, Host]) -> Host:
    """Where events go."""
    hosts[0].reset()
    return hosts[0]


@pytest.fixture
def assets(hosts: tuple[Host, Host]) -> Host:
    """Where scripts come from."""
    hosts[1].reset()
    return hosts[1]


@pytest.fixture
async def page(relaying: Server) -> AsyncIterator[Client]:
    """A page that sends analytics."""
    async with connect(relaying.address) as client:
        yield client


async def send(
    page: Client, path: str = "/e/", body: bytes | None = EVENT, *, method: str = "POST", **headers: str
) -> tuple[int, bytes, Any]:
    """A request to the relay; status, body and headers."""
    async with page.http.request(
        method, page.address + "/ingest" + path, data=body, headers=headers, allow_redirects=False
    ) as response:
        return response.status, await response.read(), response.headers


def code_of(body: bytes) -> str:
    return str(orjson.loads(body)["errors"][0]["extensions"]["code"])


FORMS = {
    "JSON": (EVENT, {"Content-Type": "application/json"}),
    "posthog-js": (gzip.compress(EVENT, mtime=0), {"Content-Type": "text/plain"}),
    "posthog-node": (gzip.compress(EVENT, mtime=0), {"Content-Type": "application/json", "Content-Encoding": "gzip"}),
    "beacon": (
        b"data=" + quote(base64.b64encode(EVENT), safe="").encode(),
        {"Content-Type": "application/x-www-form-urlencoded"},
    ),
}


@pytest.mark.parametrize("form", FORMS)
async def test_an_event_arrives_with_the_operators_key_whatever_form_it_has(
    page: Client, host: Host, form: str
) -> None:
    body, headers = FORMS[form]
    status, answer, _ = await send(page, "/i/v0/e/?compression=gzip-js&ver=1.2&_=17", body, **headers)
    assert (status, answer) == (200, b'{"status":1}')
    (request,) = host.requests
    assert (request.method, urlsplit(request.path).path) == ("POST", "/i/v0/e/")
    assert parse_qsl(urlsplit(request.path).query) == [("ver", "1.2"), ("_", "17")]
    assert request.json == {"event": "asked", "properties": {"token": KEY, "distinct_id": "me"}, "api_key": KEY}
    assert request.headers["content-type"] == "application/json"
    assert "content-encoding" not in request.headers


async def test_the_host_learns_nothing_of_who_sends(page: Client, host: Host) -> None:
    await send(
        page,
        "/e/",
        EVENT,
        **{
            "Cookie": "session=secret",
            "Authorization": "Bearer secret",
            "X-Forwarded-For": "192.0.2.1",
            "X-Forwarded-Host": "evil.example",
            "Forwarded": "for=192.0.2.1",
            "X-Real-IP": "192.0.2.1",
            "Referer": "https://chat.example.com/thread/secret",
            "Origin": ORIGIN,
            "Proxy-Authorization": "Basic secret",
            "X-Api-Key": "secret",
            "User-Agent": "a browser",
            "Accept": "*/*",
            "Accept-Language": "de",
        },
    )
    (request,) = host.requests
    assert set(request.headers) == {
        "host", "user-agent", "accept", "accept-encoding", "content-type", "content-length"
    }  # fmt: skip
    assert request.headers["host"] == urlsplit(host.url).netloc
    assert request.headers["user-agent"] == "a browser"


async def test_a_caller_gets_no_cookie_and_no_header_of_the_hosts(page: Client, host: Host) -> None:
    async def answer(wire: Wire) -> None:
        headers = {
            "Set-Cookie": "a=b",
            "Server": "secret",
            "Access-Control-Allow-Origin": "*",
            "Access-Control-Allow-Credentials": "true",
            "Location": "https://evil.example",
            "Refresh": "0;url=https://evil.example",
            "Strict-Transport-Security": "max-age=1",
            "ETag": '"1"',
            "Cache-Control": "max-age=60",
        }
        await wire.whole(200, b"{}", headers=headers)

    host.answer = answer
    status, _, headers = await send(page, Origin=ORIGIN)
    assert status == 200
    assert headers["ETag"] == '"1"'
    assert headers["Cache-Control"] == "max-age=60"
    assert headers.getall("Access-Control-Allow-Origin") == [ORIGIN]
    for name in ("Set-Cookie", "Access-Control-Allow-Credentials", "Location", "Refresh", "Strict-Transport-Security"):
        assert name not in headers
    assert "secret" not in str(headers)
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert "sandbox" in headers["Content-Security-Policy"]


# The path, and where it goes: the key is in the place of the page's.
READS = [
    ("/flags/?v=2&config=true", "POST", 0, "/flags/?v=2&config=true"),
    ("/decide/?v=3", "POST", 0, "/decide/?v=3"),
    ("/batch/", "POST", 0, "/batch/"),
    ("/capture", "POST", 0, "/capture"),
    ("/s/?retry_count=2", "POST", 0, "/s/?retry_count=2"),
    ("/e/?token=phc_page&api_key=x&data=e30%3D", "POST", 0, "/e/"),
    ("/api/surveys/?token=phc_page", "GET", 0, f"/api/surveys/?token={KEY}"),
    ("/api/early_access_features/?token=a&stage=beta", "GET", 0, f"/api/early_access_features/?stage=beta&token={KEY}"),
    ("/array/phc_page/config?ip=0&_=5", "GET", 1, f"/array/{KEY}/config?ip=0&_=5"),
    ("/array/phc_page/config.js", "GET", 1, f"/array/{KEY}/config.js"),
    ("/static/array.js", "GET", 1, "/static/array.js"),
    ("/static/recorder.js?v=1.449.2", "GET", 1, "/static/recorder.js?v=1.449.2"),
    ("/static/1.449.2/posthog-recorder.js", "GET", 1, "/static/1.449.2/posthog-recorder.js"),
    ("/e/?ver=a%0d%0aX-Evil:%201", "POST", 0, "/e/?ver=a%0D%0AX-Evil%3A+1"),
]


@pytest.mark.parametrize(("path", "method", "where", "arrives"), READS, ids=lambda value: str(value)[:40])
async def test_every_allowed_path_goes_to_its_host(
    page: Client, hosts: tuple[Host, Host], host: Host, assets: Host, path: str, method: str, where: int, arrives: str
) -> None:
    async def answer(wire: Wire) -> None:
        kind = "text/javascript" if ".js" in path else "application/json; charset=utf-8"
        await wire.whole(200, b"{}", content_type=kind)

    hosts[where].answer = answer
    status, body, _ = await send(page, path, EVENT if method == "POST" else None, method=method)
    assert (status, body) == (200, b"{}")
    assert [request.path for request in hosts[where].requests] == [arrives]
    assert not hosts[1 - where].requests


TRICKS = [
    "GET /ingest/e/",
    "PUT /ingest/e/",
    "DELETE /ingest/e/",
    "OPTIONS /ingest/e/",
    "HEAD /ingest/static/array.js",
    "POST /ingest/static/array.js",
    "POST /ingest/",
    "POST /ingest",
    "POST /ingest//e/",
    "POST /ingest/e//",
    "POST //ingest/e/",
    "POST /ingest/./e/",
    "POST /ingest/x/../e/",
    "POST /ingest/%65/",
    "POST /ingest/e%2f",
    "POST /ingest/e/;x",
    "POST /ingest/e/%0d%0aX:1",
    "POST /ingest/%2e%2e/graphql",
    "GET /ingest/static/../array/x/config",
    "GET /ingest/static/..%2fsecret.js",
    "GET /ingest/static/%2e%2e/secret.js",
    "GET /ingest/static/.hidden.js",
    "GET /ingest/static/a/b/c.js",
    "GET /ingest/static/page.html",
    "GET /ingest/static/a..js",
    "GET /ingest/array/a/b/config",
    "GET /ingest/array//config",
    "GET /ingest/array/%2e%2e/config",
    "GET /ingest/array/a/config.json",
    "GET /ingest/api/projects/@current/feature_flags/",
    "GET /ingest/api/users/@me/",
    "GET /ingest/@evil.example/static/array.js",
    "GET /ingest/http://evil.example/static/array.js",
    "GET /ingest\\static\\array.js",
    "GET /ingest/api/surveys/?" + "&".join(["v=1"] * 40),
    "POST /INGEST/e/",
    "GET http://evil.example/ingest/static/array.js",
]


@pytest.mark.parametrize("line", TRICKS)
async def test_no_other_path_and_no_other_spelling_goes_anywhere(
    relaying: Server, host: Host, assets: Host, line: str
) -> None:
    port = urlsplit(relaying.address).port
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = EVENT if line.startswith(("POST", "PUT")) else b""
    head = f"{line} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    writer.write(head.encode() + body)
    async with asyncio.timeout(10):
        answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    assert re.match(rb"HTTP/1\.1 (404|400|405) ", answer), answer[:200]
    assert not host.requests
    assert not assets.requests


@pytest.mark.parametrize(
    ("body", "headers", "status", "code"),
    [
        (b"", {}, 400, "BAD_USER_INPUT"),
        (b"hello", {"Content-Type": "text/plain"}, 400, "BAD_USER_INPUT"),
        (b"{}{}", {"Content-Type": "application/json"}, 400, "BAD_USER_INPUT"),
        (b'{"batch":{}}', {}, 400, "BAD_USER_INPUT"),
        (b"data=%00", {"Content-Type": "application/x-www-form-urlencoded"}, 400, "BAD_USER_INPUT"),
        (EVENT, {"Content-Type": "application/x-www-form-urlencoded"}, 400, "BAD_USER_INPUT"),
        (EVENT, {"Content-Encoding": "gzip"}, 400, "BAD_USER_INPUT"),
        (b'{"event":"%b"}' % (b"x" * MAX_BYTES), {}, 413, "PAYLOAD_TOO_LARGE"),
        (gzip.compress(b'{"event":"%b"}' % (b" " * 10_000_000), mtime=0), {}, 413, "PAYLOAD_TOO_LARGE"),
        (
            gzip.compress(b'{"event":"%b"}' % (b" " * 10_000_000), mtime=0),
            {"Content-Encoding": "gzip"},
            413,
            "PAYLOAD_TOO_LARGE",
        ),
    ],
    ids=lambda value: repr(value)[:30],
)
async def test_what_is_not_understood_or_too_large_goes_nowhere(
    page: Client, host: Host, body: bytes, headers: dict[str, str], status: int, code: str
) -> None:
    got, answer, shown = await send(page, "/e/", body, Origin=ORIGIN, **headers)
    assert (got, code_of(answer)) == (status, code)
    assert shown["Access-Control-Allow-Origin"] == ORIGIN
    assert not host.requests


async def test_the_key_is_never_shown_however_the_host_cuts_it(page: Client, assets: Host, host: Host) -> None:
    said = b'{"token":"%b","x":"phc_operatorsOwn","y":"%b%b"}' % (KEY.encode(), KEY.encode(), KEY.encode())

    async def answer(wire: Wire) -> None:
        await wire.head(content_type="application/json")
        await wire.pieces(said[at : at + 3] for at in range(0, len(said), 3))
        await wire.end()

    assets.answer = host.answer = answer
    _, body, _ = await send(page, "/array/phc_page/config", None, method="GET")
    assert body == said.replace(KEY.encode(), b"phc_page")
    _, body, _ = await send(page, "/flags/")
    assert body == said.replace(KEY.encode(), b"project")


async def test_a_script_comes_as_the_host_has_it(page: Client, assets: Host) -> None:
    script = gzip.compress(b"console.log(1)" * 1_000, mtime=0)

    async def answer(wire: Wire) -> None:
        if wire.request.headers.get("if-none-match") == '"1"':
            await wire.raw(b'HTTP/1.1 304 Same\r\nETag: "1"\r\nConnection: close\r\n\r\n')
            return
        await wire.head(content_type="application/javascript", headers={"Content-Encoding": "gzip", "ETag": '"1"'})
        await wire.pieces(script[at : at + 50] for at in range(0, len(script), 50))
        await wire.end()

    assets.answer = answer
    url = page.address + "/ingest/static/array.js"
    asked = {"Accept-Encoding": "gzip, br;q=0.5, evil", "Origin": ORIGIN}
    async with page.http.get(url, headers=asked) as response:
        assert await response.read() == b"console.log(1)" * 1_000
        assert response.headers["Content-Encoding"] == "gzip"
        assert {name.strip() for name in response.headers["Vary"].split(",")} == {"Accept-Encoding", "Origin"}
        assert response.headers["Access-Control-Allow-Origin"] == ORIGIN
    assert assets.requests[0].headers["accept-encoding"] == "br, gzip"
    async with page.http.get(url, headers=asked | {"If-None-Match": '"1"'}) as response:
        assert (response.status, response.headers["ETag"], await response.read()) == (304, '"1"', b"")


async def test_an_answer_of_any_length_streams(page: Client, assets: Host) -> None:
    go_on = asyncio.Event()

    async def answer(wire: Wire) -> None:
        await wire.head(content_type="text/javascript")
        await wire.send(b"first;")
        await go_on.wait()
        await wire.send(b"second;")
        await wire.end()

    assets.answer = answer
    async with page.http.get(page.address + "/ingest/static/array.js") as response, asyncio.timeout(10):
        assert await response.content.readany() == b"first;"
        go_on.set()
        assert await response.read() == b"second;"


def failing(status: int, **headers: str) -> Callable[[Wire], Awaitable[None]]:
    async def answer(wire: Wire) -> None:
        await wire.whole(status, SECRET_TEXT.encode() + KEY.encode(), content_type="text/html", headers=headers)

    return answer


async def closing(wire: Wire) -> None:
    wire.reset()


async def garbage(wire: Wire) -> None:
    await wire.raw(b"this is no HTTP at all\r\n\r\n")


async def half_a_head(wire: Wire) -> None:
    await wire.raw(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n")


async def huge(wire: Wire) -> None:
    await wire.raw(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nX: " + b"x" * 100_000 + b"\r\n\r\n")


async def compressed(wire: Wire) -> None:
    headers = {"Content-Encoding": "gzip"}
    await wire.whole(200, gzip.compress(KEY.encode(), mtime=0), headers=headers)


@pytest.mark.parametrize(
    ("answer", "status", "code"),
    [
        (failing(200), 502, "UNAVAILABLE"),
        (failing(301, Location="https://evil.example/"), 502, "UNAVAILABLE"),
        (failing(302, Location="/e/"), 502, "UNAVAILABLE"),
        (failing(307, Location="/e/"), 502, "UNAVAILABLE"),
        (failing(400), 400, "BAD_USER_INPUT"),
        (failing(401), 502, "UNAVAILABLE"),
        (failing(403), 502, "UNAVAILABLE"),
        (failing(404), 404, "NOT_FOUND"),
        (failing(413), 413, "PAYLOAD_TOO_LARGE"),
        (failing(429, **{"Retry-After": "7"}), 429, "RATE_LIMITED"),
        (failing(429, **{"Retry-After": "<script>"}), 429, "RATE_LIMITED"),
        (failing(500), 502, "UNAVAILABLE"),
        (failing(503), 502, "UNAVAILABLE"),
        (closing, 502, "UNAVAILABLE"),
        (garbage, 502, "UNAVAILABLE"),
        (half_a_head, 502, "UNAVAILABLE"),
        (huge, 502, "UNAVAILABLE"),
        (compressed, 502, "UNAVAILABLE"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
async def test_a_host_that_fails_is_told_in_our_words(
    page: Client, host: Host, answer: Any, status: int, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    host.answer = answer
    with caplog.at_level(logging.DEBUG, "server"):
        got, body, headers = await send(page, Origin=ORIGIN)
    assert (got, code_of(body)) == (status, code)
    assert headers["Access-Control-Allow-Origin"] == ORIGIN
    assert headers["Content-Type"].startswith("application/json")
    assert SECRET_TEXT not in str(body)
    assert KEY not in str(body) + str(headers) + caplog.text
    assert "127.0.0.1" not in caplog.text
    assert len(host.requests) == 1
    assert re.fullmatch("[0-9]+", headers.get("Retry-After", "0"))
    assert ("Retry-After" in headers) is (status == 429)


async def test_an_answer_that_breaks_off_is_not_taken_for_the_whole(page: Client, assets: Host) -> None:
    async def answer(wire: Wire) -> None:
        await wire.head(content_type="text/javascript")
        await wire.send(b"half")
        await wire.be_read()
        wire.reset()

    assets.answer = answer
    with pytest.raises(aiohttp.ClientError):
        await send(page, "/static/array.js", None, method="GET")


async def test_an_answer_without_end_is_cut(page: Client, assets: Host) -> None:
    async def answer(wire: Wire) -> None:
        await wire.head(content_type="text/javascript")
        while True:
            await wire.send(b"x" * 65_536)

    assets.answer = answer
    async with page.http.get(page.address + "/ingest/static/array.js") as response:
        got = 0
        try:
            async for piece in response.content.iter_any():
                got += len(piece)
        except aiohttp.ClientError:
            assert got <= MAX_ANSWER_BYTES
        else:
            pytest.fail("it came to an end")


async def test_a_page_of_another_origin_sends_nothing(page: Client, host: Host) -> None:
    for origin in (
        "https://evil.example",
        "null",
        "http://chat.example.com",
        ORIGIN + ".evil.example",
        ORIGIN + ":444",
    ):
        status, body, headers = await send(page, Origin=origin)
        assert (status, code_of(body)) == (403, "FORBIDDEN")
        assert "Access-Control-Allow-Origin" not in headers
    assert not host.requests
    for origin in (ORIGIN, page.address):
        assert (await send(page, Origin=origin))[0] == 200


async def test_without_the_setting_there_is_no_relay(client: Client) -> None:
    for method, path in (("POST", "/e/"), ("GET", "/static/array.js"), ("POST", "/flags/")):
        assert (await send(client, path, EVENT if method == "POST" else None, method=method))[0] == 404


async def test_a_relay_needs_a_key(postgres_url: str, tmp_path: Any) -> None:
    server = Server(test_settings(postgres_url, tmp_path, ingest_url="https://analytics.example"))
    with pytest.raises(SettingsError, match="INGEST_API_KEY"):
        await server.start()


@asynccontextmanager
async def relay(host_url: str, *, each: int = 100_000, **times: float) -> AsyncIterator[Client]:
    """A relay alone, with short times."""
    async with make_client_session() as session:
        limits = IngestLimits(max_bytes=MAX_BYTES, **times)
        rates = Rates(each=each, total=100_000)
        app = web.Application()
        ingest = Ingest(session, url=host_url, assets_url=host_url, key=KEY, rates=rates, limits=limits)
        ingest.add_routes(app.router, Origins(()))
        runner = web.AppRunner(app, handle_signals=False, access_log=None, shutdown_timeout=1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            async with connect(f"http://127.0.0.1:{runner.addresses[0][1]}") as client:
                yield client
        finally:
            await runner.cleanup()


async def hang(wire: Wire) -> None:
    await wire.gone()


async def drip(wire: Wire) -> None:
    await wire.head(content_type="application/json")
    while True:
        await wire.send(b" ")
        await asyncio.sleep(0.02)


async def test_a_silent_host_is_not_waited_for(host: Host) -> None:
    host.answer = hang
    async with relay(host.url, silence_seconds=0.2) as page, asyncio.timeout(10):
        status, body, _ = await send(page)
    assert (status, code_of(body)) == (504, "UNAVAILABLE")


async def test_a_host_that_never_comes_to_its_end_is_cut(host: Host) -> None:
    host.answer = drip
    async with relay(host.url, total_seconds=0.4) as page, asyncio.timeout(10):
        with pytest.raises(aiohttp.ClientError):
            await send(page)


async def test_a_host_that_is_not_there_is_told(unused_tcp_port: int) -> None:
    async with relay(f"http://127.0.0.1:{unused_tcp_port}") as page:
        status, body, _ = await send(page)
    assert (status, code_of(body)) == (502, "UNAVAILABLE")


async def test_a_body_that_does_not_come_is_not_waited_for(host: Host) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    async with (
        relay(host.url, body_seconds=0.2) as page,
        asyncio.timeout(10),
        page.http.post(page.address + "/ingest/e/", data=body()) as response,
    ):
        assert response.status == 408
        assert code_of(await response.read()) == "BAD_USER_INPUT"
    assert not host.requests


async def test_a_caller_that_leaves_ends_the_request_to_the_host() -> None:
    asked = asyncio.Event()

    async def answer(wire: Wire) -> None:
        asked.set()
        await wire.gone()

    async with VendorServer(answer) as host, relay(f"http://127.0.0.1:{host.port}") as page:
        sending = asyncio.create_task(send(page))
        async with asyncio.timeout(10):
            await asked.wait()
            sending.cancel()
            await host.client_left.wait()


async def test_too_many_requests_are_refused_with_the_time_to_wait(host: Host) -> None:
    async with relay(host.url, each=3) as page:
        answers = [await send(page) for _ in range(4)]
    assert [status for status, _, _ in answers] == [200, 200, 200, 429]
    _, body, headers = answers[-1]
    assert code_of(body) == "RATE_LIMITED"
    assert 1 <= int(headers["Retry-After"]) <= 20
    assert len(host.requests) == 3


async def test_the_host_gets_so_many_requests_at_once_and_no_more() -> None:
    asked = asyncio.Semaphore(0)
    go_on = asyncio.Event()

    async def answer(wire: Wire) -> None:
        asked.release()
        await go_on.wait()
        await wire.whole(200, b"{}")

    async with VendorServer(answer) as host, relay(f"http://127.0.0.1:{host.port}") as page:
        sending = [asyncio.create_task(send(page)) for _ in range(MAX_AT_ONCE)]
        async with asyncio.timeout(20):
            for _ in range(MAX_AT_ONCE):
                await asked.acquire()
            status, body, headers = await send(page)
            assert (status, code_of(body), headers["Retry-After"]) == (503, "UNAVAILABLE", "1")
            go_on.set()
            assert {status for status, _, _ in await asyncio.gather(*sending)} == {200}
            assert (await send(page))[0] == 200


async def test_the_connections_to_the_host_end_with_the_server(postgres_url: str, tmp_path: Any) -> None:
    async def answer(wire: Wire) -> None:
        await wire.whole(200, b"{}")

    async with VendorServer(answer) as host:
        settings = test_settings(
            await make_database(postgres_url),
            tmp_path,
            ingest_url=f"http://127.0.0.1:{host.port}",
            ingest_api_key=KEY,
        )
        server = Server(settings)
        await server.start()
        try:
            async with connect(server.address) as page:
                assert (await send(page))[0] == 200
                assert not host.client_left.is_set()
        finally:
            await server.close()
        async with asyncio.timeout(10):
            await host.client_left.wait()
