"""Custom endpoints cannot reach inside: every trick that is known, over real sockets.

`wire` writes down what any socket of the loop is connected to, so that "refused" means here: no packet was sent. The
names are answered by `Names`, and by the system's name server where a test says so.
"""

from __future__ import annotations

import ast
import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from aiohttp.abc import AbstractResolver, ResolveResult
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from providers import guard as guard_module
from providers.base import FailureCode
from providers.chat_completions import ChatCompletionsProvider
from providers.event_stream import checked_base_url
from providers.guard import MAX_URL_CHARS, AllowedEndpoint, EndpointGuard, EndpointRefusedError
from tests.adapters import AT_ONCE, KEY, PATIENT, REQUEST, SOON, Outcome, outcome_of, stream_of
from tests.vendor_server import Script, VendorServer, Wire

ROOT = Path(__file__).parent.parent.parent
PUBLIC = "93.184.215.14"
PUBLIC_V6 = "2606:2800:21f:cb07:6820:80da:af6b:8b2c"
UNREACHABLE = "The base address must lead to a server on the public internet; check its host name."

pytestmark = pytest.mark.usefixtures("no_canary_in_logs")


class Names:
    """A name server of the test's: for each name a list of answers, given one after the other, the last for ever."""

    def __init__(self, **answers: Sequence[Sequence[str]]) -> None:
        self._answers = {name.replace("_", "."): list(lists) for name, lists in answers.items()}
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        answers = self._answers.get(host)
        if answers is None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return answers.pop(0) if len(answers) > 1 else answers[0]


def guard_for(*allowed: str, names: Names | None = None, ports: Sequence[int] | None = None) -> EndpointGuard:
    """A guard that knows these names only and refuses without a pause."""
    options: dict[str, Any] = {} if ports is None else {"ports": ports}
    return EndpointGuard(
        allowed=[AllowedEndpoint.parse(entry) for entry in allowed],
        resolve=names or Names(),
        refusal_seconds=0,
        **options,
    )


async def refusal_of(guard: EndpointGuard, base_url: str) -> str:
    with pytest.raises(EndpointRefusedError) as refused:
        await guard.check(base_url)
    error = refused.value
    assert str(error) == error.message
    assert error.message.endswith(".")
    # Whoever logs the refusal, or shows it with what led to it, shows no address either.
    assert (error.__cause__, error.__context__) == (None, None)
    return error.message


async def ask(session: aiohttp.ClientSession, base_url: str) -> Outcome:
    provider = ChatCompletionsProvider(
        session=session, base_url=base_url, api_key=KEY, deadlines=PATIENT, retries=AT_ONCE
    )
    return await outcome_of(provider.stream(REQUEST))


@pytest.fixture
async def wire(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[list[Any]]:
    """Where sockets of this loop were connected to while the test ran."""
    loop = asyncio.get_running_loop()
    targets: list[Any] = []
    connect = loop.sock_connect

    async def note(sock: socket.socket, address: Any) -> None:
        targets.append(address)
        await connect(sock, address)

    monkeypatch.setattr(loop, "sock_connect", note)
    yield targets  # noqa: PT022 - the fixture holds the patch


HELLO = (
    b'data: {"choices":[{"delta":{"content":"Hello"}}]}\n\n',
    b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n',
    b"data: [DONE]\n\n",
)


def hello() -> Script:
    return stream_of(*HELLO)


# How an address is written

MALFORMED = [
    "",
    " ",
    "models.example",
    "models.example/v1",
    "//models.example/v1",
    "http:",
    "http://",
    "http:///v1",
    "http:models.example",
    "http:/models.example",
    "http:/\\models.example",
    "http:\\\\models.example",
    "http://\\models.example",
    "http://models.example\\@127.0.0.1",
    "http://models.example\\.inside.example",
    "file:///etc/passwd",
    "file://models.example/etc/passwd",
    "gopher://models.example/_GET",
    "ftp://models.example",
    "ws://models.example",
    "unix:///var/run/docker.sock",
    "http+unix://%2Fvar%2Frun%2Fdocker.sock/v1",
    "http://unix:/var/run/docker.sock:/v1",
    "javascript:alert(1)",
    "data:text/plain,x",
    "jar:http://models.example!/",
    "httpss://models.example",
    "http ://models.example",
    " http://models.example",
    "http://models.example ",
    "http://models.example/v1 ",
    "http://models.example/v1\n",
    "http://models.example/v1\r\nHost: inside",
    "http://models.example\r\nX-Key: 1",
    "http://models.example/\r",
    "http://models.example/\0",
    "http://models.example\t/v1",
    "ht\ntp://models.example",
    "http://models.example/\x7f",
    "http://models.example/\x85",
    "http://models.example/\u2028",
    "http://models.example/%0d%0aHost:%20inside",
    "http://models.example/%2e%2e/admin",
    "http://models.example/../admin",
    "http://models.example/v1/..",
    "http://models.example/./v1",
    "http://models.example/v1?x=1",
    "http://models.example/v1?",
    "http://models.example/v1#x",
    "http://models.example/v1#",
    "http://models.example#@127.0.0.1",
    "http://models.example?@127.0.0.1",
    "http://user@models.example",
    "http://user:word@models.example",
    "http://:@models.example",
    "http://@models.example",
    "http://models.example@127.0.0.1",
    "http://127.0.0.1:80@models.example",
    "http://models.example%40127.0.0.1",
    "http://models.example:",
    "http://models.example:/v1",
    "http://models.example:http",
    "http://models.example:-80",
    "http://models.example:+80",
    "http://models.example:80:80",
    "http://models.example:8\u0660",
    "http://models.example:８０",
    "http://models.example:0x50",
    "http://models.example:000080",
    "http://models.example.",
    "http://localhost.",
    "http://127.0.0.1.",
    "http://models..example",
    "http://.models.example",
    "http://-models.example",
    "http://mod els.example",
    "http://mod%65ls.example",
    "http://models,inside",
    "http://" + "a" * 64 + ".example",
    "http://" + "a." * 130 + "example",
    # Numbers that name servers, browsers or the C library take for 127.0.0.1.
    "http://127.1",
    "http://127.0.1",
    "http://2130706433",
    "http://0x7f000001",
    "http://0x7f.0x0.0x0.0x1",
    "http://0177.0.0.1",
    "http://0177.0.0.01",
    "http://017700000001",
    "http://127.0.0.0x1",
    "http://127.0.0.01",
    "http://0",
    "http://0x0",
    "http://0.0",
    "http://3232235777",
    "http://256.256.256.256",
    "http://1.2.3.4.5",
    "http://１２７.0.0.1",
    "http://127。0。0。1",
    "http://127．0．0．1",
    "http://①②⑦.⓪.⓪.①",
    "http://𝟭𝟮𝟳.0.0.1",
    "http://ⓛⓞⓒⓐⓛⓗⓞⓢⓣ",
    "http://loca\u00adlhost",
    "http://\u200blocalhost",
    "http://\u212a.example",
    "http://bücher.example",
    "http://[::1",
    "http://::1/",
    "http://[]",
    "http://[::1]x",
    "http://[::1]@models.example",
    "http://[fe80::1%eth0]",
    "http://[fe80::1%25eth0]",
    "http://[::1%25]",
    "http://[::1%lo]",
    "http://[127.0.0.1]",
    "http://[models.example]",
    "http://[v1.x]",
    "http://[:::1]",
    "http://[::ffff:0x7f.1]",
    "http://[::ffff:127.1]",
    "http://models.example/" + "a" * MAX_URL_CHARS,
]


@pytest.mark.parametrize("base_url", MALFORMED)
async def test_what_is_no_plain_address_is_refused_before_anybody_is_asked(base_url: str, wire: list[Any]) -> None:
    names = Names()
    guard = guard_for("0.0.0.0/0", "::/0", names=names)
    assert await refusal_of(guard, base_url) == (
        "The base address must be http:// or https:// with a host, at most a port and a path behind it, in plain ASCII "
        "(an international name in its xn-- form) and at most 2,000 characters."
    )
    assert (names.asked, wire) == ([], [])


@pytest.mark.parametrize(
    ("base_url", "normal"),
    [
        ("https://models.example/v1", "https://models.example/v1"),
        ("HTTPS://Models.EXAMPLE/V1/", "https://models.example/V1"),
        ("hTTp://models.example", "http://models.example"),
        ("https://models.example/", "https://models.example"),
        ("https://models.example///", "https://models.example"),
        ("https://models.example:443/v1", "https://models.example/v1"),
        ("http://models.example:00080/v1", "http://models.example/v1"),
        ("http://models.example:443/v1", "http://models.example:443/v1"),
        ("https://models.example:8443/v1", "https://models.example:8443/v1"),
        ("https://models.example/a/b.c/~d_e-f/x:y@z", "https://models.example/a/b.c/~d_e-f/x:y@z"),
        ("https://xn--bcher-kva.example/v1", "https://xn--bcher-kva.example/v1"),
        (f"https://{PUBLIC}/v1", f"https://{PUBLIC}/v1"),
        ("https://[2606:2800:021f:CB07:6820:80DA:AF6B:8B2C]:8443/v1", f"https://[{PUBLIC_V6}]:8443/v1"),
    ],
)
async def test_what_may_be_saved_has_one_form(base_url: str, normal: str) -> None:
    names = Names(models_example=[[PUBLIC, PUBLIC_V6]], **{"xn--bcher-kva_example": [[PUBLIC]]})
    guard = guard_for(names=names)
    assert await guard.check(base_url) == normal
    assert await guard.check(normal) == normal


TEXTS = st.text(st.sampled_from("aB1.-_:/@[]%\\?#;&=+~ \n١") | st.characters(), max_size=12)


async def test_without_a_look_only_the_text_is_judged() -> None:
    async def nobody(host: str, port: int) -> list[str]:
        raise AssertionError("nobody is to be asked")

    guard = EndpointGuard(resolve=nobody, refusal_seconds=0)
    assert await guard.check("https://Later.example/v1", look_up=False) == "https://later.example/v1"
    for inside in ("http://127.0.0.1/v1", "http://metadata.google.internal", "http://[::1]/", "ftp://a.example"):
        with pytest.raises(EndpointRefusedError):
            await guard.check(inside, look_up=False)


@given(
    st.builds(lambda scheme, rest: scheme + rest, st.sampled_from(["http://", "https://a.example", "HTTP://1."]), TEXTS)
)
async def test_whatever_passes_is_read_alike_by_everybody_who_reads_it_later(base_url: str) -> None:
    seen: list[tuple[str, int]] = []

    async def resolve(host: str, port: int) -> Sequence[str]:
        seen.append((host, port))
        return [PUBLIC]

    guard = EndpointGuard(resolve=resolve, ports=range(1, 65_536), refusal_seconds=0)
    try:
        normal = await guard.check(base_url)
    except EndpointRefusedError:
        return
    urls = checked_base_url(normal), URL(normal)
    parts = urlsplit(normal)
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    host = parts.hostname
    assert all((url.raw_host, url.port, url.scheme) == (host, port, parts.scheme) for url in urls)
    assert not seen or seen == [(host, port)]
    assert str(urls[0]) in (normal, normal + "/")
    assert await guard.check(normal) == normal


@pytest.mark.parametrize("port", [0, 1, 22, 25, 5432, 6379, 8000, 9200, 11434, 65535, 65536, 99999])
@pytest.mark.parametrize("host", ["models.example", "inside.example", "nowhere.example", PUBLIC, "127.0.0.1", "[::1]"])
async def test_ports_that_are_not_listed_are_refused_alike_wherever_they_lead(host: str, port: int) -> None:
    names = Names(models_example=[[PUBLIC]], inside_example=[["10.0.0.1"]])
    message = await refusal_of(guard_for(names=names), f"http://{host}:{port}")
    assert message == "The base address must have a port that is open for endpoints: 80, 443, 8080, 8443."
    assert names.asked == []


async def test_the_operator_lists_the_ports() -> None:
    guard = guard_for(names=Names(models_example=[[PUBLIC]]), ports=[443, 9000])
    assert await guard.check("https://models.example:9000/v1") == "https://models.example:9000/v1"
    assert (await refusal_of(guard, "http://models.example/v1")).endswith(": 443, 9000.")


# Where it leads


def words(text: str) -> list[str]:
    return text.split()


INSIDE = words("""
127.0.0.1 127.255.255.254 10.0.0.1 172.16.0.1 172.31.255.255 192.168.0.1 100.64.0.1 100.100.100.200 169.254.169.254
169.254.170.2 168.63.129.16 192.0.0.192 0.0.0.0 0.1.2.3 192.0.0.8 192.88.99.1 198.18.0.1 203.0.113.7 224.0.0.1
240.0.0.1 255.255.255.255 :: ::1 ::127.0.0.1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:a9fe:a9fe ::ffff:93.184.215.14
64:ff9b::7f00:1 64:ff9b::5db8:d70e 64:ff9b:1::a00:1 2002:7f00:1:: 2002:a00:1::1 2001:0:5db8:d70e::1 2001:db8::1 fc00::1
fd00:ec2::254 fd12:3456::1 fe80::1 fec0::1 ff02::1 ff0e::1 100::1 3fff::1 5f00::1
""")


def in_url(address: str) -> str:
    return f"[{address}]" if ":" in address else address


@pytest.mark.parametrize("address", INSIDE)
async def test_an_address_inside_is_refused_as_a_number_and_behind_a_name(address: str, wire: list[Any]) -> None:
    names = Names(inside_example=[[address]])
    guard = guard_for(names=names)
    assert await refusal_of(guard, f"http://{in_url(address)}/v1") == UNREACHABLE
    assert await refusal_of(guard, "https://inside.example/v1") == UNREACHABLE
    async with guard.make_session() as session:
        for base_url in (f"http://{in_url(address)}/v1", "https://inside.example/v1"):
            assert (await ask(session, base_url)).code is FailureCode.PROVIDER_UNAVAILABLE
    assert wire == []


@pytest.mark.parametrize(
    "answers",
    [
        [],
        ["10.0.0.1"],
        [PUBLIC, "10.0.0.1"],
        ["10.0.0.1", PUBLIC],
        [PUBLIC_V6, "::1"],
        [PUBLIC, PUBLIC_V6, "fe80::1%2"],
        [f"{PUBLIC_V6}%2"],
        [*[PUBLIC] * 20, "10.0.0.1"],
        ["no address"],
        [""],
        [PUBLIC, "127.1"],
        ["０.0.0.0"],
    ],
)
async def test_one_bad_address_among_a_names_refuses_it_in_the_words_for_a_name_that_does_not_exist(
    answers: list[str], wire: list[Any]
) -> None:
    guard = guard_for(names=Names(mixed_example=[answers]))
    assert await refusal_of(guard, "http://mixed.example") == UNREACHABLE
    assert await refusal_of(guard, "http://nowhere.example") == UNREACHABLE
    async with guard.make_session() as session:
        outcomes = [await ask(session, f"http://{name}.example") for name in ("mixed", "nowhere")]
    assert [(outcome.events, outcome.code) for outcome in outcomes] == [([], FailureCode.PROVIDER_UNAVAILABLE)] * 2
    assert outcomes[0].failure is not None
    assert outcomes[1].failure is not None
    assert outcomes[0].failure.message == outcomes[1].failure.message
    assert wire == []


async def test_a_name_server_that_never_answers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_module, "_LOOKUP_SECONDS", SOON)

    async def never(host: str, port: int) -> Sequence[str]:
        await asyncio.Event().wait()
        return []

    guard = EndpointGuard(resolve=never, refusal_seconds=0)
    async with asyncio.timeout(5):
        assert await refusal_of(guard, "http://slow.example") == UNREACHABLE
        async with guard.make_session() as session:
            assert (await ask(session, "http://slow.example")).code is FailureCode.PROVIDER_UNAVAILABLE


@pytest.mark.parametrize("host", ["inside.example", "nowhere.example"])
async def test_a_refusal_takes_its_time_whether_a_name_exists_or_not(host: str) -> None:
    guard = EndpointGuard(resolve=Names(inside_example=[["10.0.0.1"]]), refusal_seconds=0.1)
    async with guard.make_session() as session:
        began = time.monotonic()
        await refusal_of(guard, f"http://{host}")
        saved = time.monotonic()
        await ask(session, f"http://{host}")
        asked = time.monotonic()
    assert min(saved - began, asked - saved) >= 0.099


async def test_the_name_of_this_machine_is_refused_by_the_systems_own_answer(wire: list[Any]) -> None:
    guard = EndpointGuard(refusal_seconds=0)
    assert await refusal_of(guard, "http://localhost") == UNREACHABLE
    async with guard.make_session() as session:
        for name in ("localhost", "localhost.", "LOCALHOST"):
            assert (await ask(session, f"http://{name}")).code is FailureCode.PROVIDER_UNAVAILABLE
    assert wire == []


async def test_a_public_address_of_this_machine_is_inside_too(monkeypatch: pytest.MonkeyPatch, wire: list[Any]) -> None:
    monkeypatch.setattr(guard_module, "is_public", lambda address: True)  # as if 127.0.0.1 were a public address of it
    guard = guard_for(names=Names(own_example=[["127.0.0.1"]]))
    for host in ("127.0.0.1", "own.example"):
        assert await refusal_of(guard, f"http://{host}") == UNREACHABLE
        async with guard.make_session() as session:
            assert (await ask(session, f"http://{host}")).code is FailureCode.PROVIDER_UNAVAILABLE
    assert wire == []


# The address that is connected to


async def test_a_name_that_changes_after_the_check_leads_nowhere(wire: list[Any]) -> None:
    """DNS rebinding: public when it is saved, a real server on this machine when it is asked."""
    async with VendorServer(hello()) as inside:
        names = Names(rebinding_example=[[PUBLIC], ["127.0.0.1"]])
        guard = guard_for(names=names, ports=[inside.port])
        base_url = await guard.check(f"http://rebinding.example:{inside.port}/v1")
        async with guard.make_session() as session:
            outcome = await ask(session, base_url)
    assert names.asked == ["rebinding.example"] * 2
    assert (outcome.events, outcome.code) == ([], FailureCode.PROVIDER_UNAVAILABLE)
    assert (inside.connections, wire) == (0, [])


class LyingResolver(AbstractResolver):
    """A resolver that lets everything through, as if the guard's own had a hole."""

    def __init__(self, *addresses: str) -> None:
        self._addresses = addresses

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        return [
            ResolveResult(hostname=host, host=address, port=port, family=family, proto=0, flags=0)
            for address in self._addresses
        ]

    async def close(self) -> None:
        return None


def with_resolver(session: aiohttp.ClientSession, resolver: AbstractResolver) -> aiohttp.ClientSession:
    connector = session.connector
    assert isinstance(connector, aiohttp.TCPConnector)
    connector._resolver = resolver
    return session


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "::ffff:127.0.0.1", "127.1", "localhost", "fe80::1%lo", ""])
async def test_the_socket_is_the_wall_even_if_the_resolver_had_a_hole(address: str, wire: list[Any]) -> None:
    async with VendorServer(hello()) as inside:
        guard = guard_for(ports=[inside.port])
        async with with_resolver(guard.make_session(), LyingResolver(address)) as session:
            outcome = await ask(session, f"http://models.example:{inside.port}/v1")
    assert outcome.code is FailureCode.PROVIDER_UNAVAILABLE
    assert (inside.connections, wire) == (0, [])


@pytest.mark.parametrize("order", [("127.0.0.1", "127.0.0.2"), ("127.0.0.2", "127.0.0.1"), ("::1", "127.0.0.1")])
async def test_happy_eyeballs_looks_at_each_of_several_addresses(order: tuple[str, ...], wire: list[Any]) -> None:
    async with VendorServer(hello()) as vendor:
        guard = guard_for(f"127.0.0.1:{vendor.port}")
        async with with_resolver(guard.make_session(), LyingResolver(*order)) as session:
            outcome = await ask(session, f"http://models.example:{vendor.port}/v1")
        assert outcome.finished
        # The guard's own resolver refuses such a name as a whole.
        guard = guard_for(f"127.0.0.1:{vendor.port}", names=Names(models_example=[order]))
        async with guard.make_session() as session:
            assert (await ask(session, f"http://models.example:{vendor.port}/v1")).failure is not None
    assert wire == [("127.0.0.1", vendor.port)]
    assert vendor.connections == 1


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0x7f.1",
        "0177.0.0.1",
        "017700000001",
        "0",
        "0.0.0.0",
        "[::]",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[::127.0.0.1]",
        "[64:ff9b::7f00:1]",
        "１２７.0.0.1",
        "127。0。0。1",
        "①②⑦.⓪.⓪.①",
        "ⓛⓞⓒⓐⓛⓗⓞⓢⓣ",
        "localhost",
        "LOCALHOST.",
        "localhost..",
        "127.0.0.1.",
        "loc%61lhost",
        "[fe80::1%25lo]",
        "[::1%25lo]",
    ],
)
async def test_no_spelling_of_this_machine_is_connected_to_though_it_was_never_checked(
    host: str, wire: list[Any]
) -> None:
    """As if an address had come past `check`, asked of the system's own name server."""
    async with VendorServer(hello()) as inside:
        guard = EndpointGuard(ports=[inside.port], refusal_seconds=0)
        async with guard.make_session() as session:
            outcome = await ask(session, f"http://{host}:{inside.port}/v1")
    assert outcome.code in (FailureCode.PROVIDER_UNAVAILABLE, FailureCode.PROVIDER_PROTOCOL)
    assert (inside.connections, wire) == (0, [])


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "gopher://127.0.0.1/_x",
        "unix:///var/run/docker.sock",
        "http+unix://%2Fvar%2Frun%2Fdocker.sock/v1",
        "tcp://127.0.0.1:80/",
        "ws://127.0.0.1/",
        "ftp://127.0.0.1/",
    ],
)
async def test_the_session_reaches_nothing_by_another_scheme(url: str, wire: list[Any]) -> None:
    async with guard_for().make_session() as session:
        with pytest.raises((aiohttp.ClientError, ValueError)):
            await session.get(url)
    assert wire == []


@pytest.mark.parametrize(
    "info",
    [
        (socket.AF_UNIX, socket.SOCK_STREAM, 0, "", "/var/run/docker.sock"),
        (socket.AF_UNIX, socket.SOCK_STREAM, 0, "", (PUBLIC, 443)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("models.example", 443)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("", 443)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", (PUBLIC, "443")),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", (PUBLIC, 22)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", (0x7F000001, 443)),
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (f"{PUBLIC_V6}%lo", 443, 0, 0)),
    ],
)
def test_no_socket_is_made_for_what_is_no_address_with_an_open_port(info: Any) -> None:
    with pytest.raises(ConnectionRefusedError):
        guard_for()._open_socket(info)


def test_a_socket_is_made_for_a_public_address() -> None:
    infos: list[tuple[int, tuple[Any, ...]]] = [
        (socket.AF_INET, (PUBLIC, 443)),
        (socket.AF_INET6, (PUBLIC_V6, 443, 0, 0)),
    ]
    for family, target in infos:
        with guard_for()._open_socket((family, socket.SOCK_STREAM, 6, "", target)) as made:
            assert (made.family, made.type) == (family, socket.SOCK_STREAM)


async def test_what_was_refused_is_logged_without_its_name(caplog: pytest.LogCaptureFixture) -> None:
    async with guard_for(names=Names(secret_example=[["10.9.8.7"]])).make_session() as session:
        for base_url in ("http://10.9.8.7/v1", "http://secret.example/v1"):
            await ask(session, base_url)
    assert "an endpoint of a user's led to an address that is not open" in caplog.text
    assert "10.9.8.7" not in caplog.text
    assert "secret" not in caplog.text


# What the operator opens


async def test_without_a_setting_nothing_inside_is_open() -> None:
    async with VendorServer(hello()) as vendor:
        guard = guard_for(ports=[vendor.port])
        assert await refusal_of(guard, vendor.base_url) == UNREACHABLE
        async with guard.make_session() as session:
            assert (await ask(session, vendor.base_url)).code is FailureCode.PROVIDER_UNAVAILABLE
    assert vendor.connections == 0


@pytest.mark.parametrize("allowed", ["127.0.0.1:{port}", "127.0.0.0/8:{port}", "0.0.0.0/0:{port}"])
async def test_an_allowed_address_is_reached_by_the_ordinary_adapter(allowed: str, wire: list[Any]) -> None:
    async with VendorServer(hello()) as vendor:
        guard = guard_for(allowed.format(port=vendor.port))
        assert await guard.check(vendor.base_url + "/") == vendor.base_url
        async with guard.make_session() as session:
            outcome = await ask(session, vendor.base_url)
            assert await refusal_of(guard, f"http://127.0.0.1:{vendor.port + 1}") != UNREACHABLE
            elsewhere = await ask(session, f"http://127.0.0.1:{vendor.port + 1}")
    assert (outcome.text, outcome.finished) == ("Hello", True)
    assert elsewhere.code is FailureCode.PROVIDER_UNAVAILABLE
    assert vendor.requests[0].headers["authorization"] == f"Bearer {KEY}"
    assert vendor.requests[0].headers["host"] == f"127.0.0.1:{vendor.port}"
    assert "cookie" not in vendor.requests[0].headers
    assert wire == [("127.0.0.1", vendor.port)]


async def test_an_entry_without_a_port_opens_the_ports_that_are_open_everywhere() -> None:
    guard = guard_for("10.0.0.0/8", "models.internal", names=Names(models_internal=[["10.0.0.5"]]))
    for host in ("10.0.0.5", "models.internal"):
        assert await guard.check(f"http://{host}:8080/v1") == f"http://{host}:8080/v1"
        await refusal_of(guard, f"http://{host}:5432/v1")
    assert await refusal_of(guard, "http://192.168.0.1:8080/v1") == UNREACHABLE


async def test_an_allowed_name_is_reached_wherever_it_is_and_opens_its_address_to_no_other() -> None:
    names = Names(models_internal=[["127.0.0.1"]], other_example=[["127.0.0.1"]])
    async with VendorServer(hello()) as vendor:
        guard = guard_for(f"models.internal:{vendor.port}", names=names)
        base_url = f"http://models.internal:{vendor.port}/v1"
        assert await guard.check(base_url) == base_url
        async with guard.make_session() as session:
            outcome = await ask(session, base_url)
            assert (await ask(session, base_url.replace("models", "MODELS").replace("nal:", "nal.:"))).finished
            for host in ("other.example", "127.0.0.1", "xmodels.internal", "models.internal.example"):
                other = f"http://{host}:{vendor.port}/v1"
                assert await refusal_of(guard, other) == UNREACHABLE
                assert (await ask(session, other)).code is FailureCode.PROVIDER_UNAVAILABLE
    assert outcome.text == "Hello"
    assert vendor.requests[0].headers["host"] == f"models.internal:{vendor.port}"
    assert len(vendor.requests) == 2


@pytest.mark.parametrize(
    "address",
    words("""
    169.254.169.254 169.254.170.2 100.100.100.200 168.63.129.16 192.0.0.192 fd00:ec2::254 fd20:ce::254 fd00:42::42
    fe80::1 ::ffff:169.254.169.254 ::a9fe:a9fe 64:ff9b::a9fe:a9fe 64:ff9b:1::a9fe:a9fe 2002:a9fe:a9fe::1 0.0.0.0 ::
    """),
)
async def test_no_setting_opens_a_metadata_service(address: str, wire: list[Any]) -> None:
    names = Names(models_internal=[[address]])
    guard = guard_for("0.0.0.0/0", "::/0", "models.internal", names=names)
    async with guard.make_session() as session:
        for host in (in_url(address), "models.internal"):
            assert await refusal_of(guard, f"http://{host}/latest/meta-data") == UNREACHABLE
            assert (await ask(session, f"http://{host}/latest")).code is FailureCode.PROVIDER_UNAVAILABLE
    assert wire == []


async def test_the_metadata_name_is_refused_whatever_it_leads_to(wire: list[Any]) -> None:
    names = Names(metadata_google_internal=[["10.0.0.1"]])
    networks = (IPv4Network("0.0.0.0/0"), IPv6Network("::/0"), "metadata.google.internal")
    guard = EndpointGuard(allowed=[AllowedEndpoint(where) for where in networks], resolve=names, refusal_seconds=0)
    async with guard.make_session() as session:
        for host in ("metadata.google.internal", "Metadata.Google.Internal"):
            assert await refusal_of(guard, f"http://{host}") == UNREACHABLE
            assert (await ask(session, f"http://{host}.")).code is FailureCode.PROVIDER_UNAVAILABLE
    assert (names.asked, wire) == ([], [])


async def test_the_name_that_is_certified_and_asked_for_is_the_one_of_the_address() -> None:
    hellos: asyncio.Queue[bytes] = asyncio.Queue()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hellos.put_nowait(await reader.read(65_536))
        writer.close()

    async with await asyncio.start_server(listen, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        guard = guard_for(f"models.internal:{port}", names=Names(models_internal=[["127.0.0.1"]]))
        async with guard.make_session() as session:
            outcome = await ask(session, f"https://models.internal:{port}/v1")
        hello = await asyncio.wait_for(hellos.get(), 5)
    assert outcome.code is FailureCode.PROVIDER_UNAVAILABLE
    assert b"\0\x0fmodels.internal" in hello


# What an endpoint may answer, and what is kept


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_not_followed_and_no_key_forwarded_even_to_an_allowed_address(
    status: int, wire: list[Any]
) -> None:
    async with VendorServer(hello()) as inside, VendorServer(lambda wire: redirect(wire)) as vendor:

        async def redirect(wire: Wire) -> None:
            await wire.whole(status, b"", headers={"Location": f"{inside.base_url}/chat/completions"})

        guard = guard_for(f"127.0.0.1:{vendor.port}", f"127.0.0.1:{inside.port}")
        async with guard.make_session() as session:
            outcome = await ask(session, vendor.base_url)
    assert (outcome.events, outcome.code) == ([], FailureCode.PROVIDER_PROTOCOL)
    assert (len(vendor.requests), inside.connections) == (1, 0)
    assert wire == [("127.0.0.1", vendor.port)]


async def test_whoever_follows_redirects_with_the_session_still_gets_nowhere(wire: list[Any]) -> None:
    async with VendorServer(hello()) as inside, VendorServer(lambda wire: redirect(wire)) as vendor:

        async def redirect(wire: Wire) -> None:
            await wire.whole(307, b"", headers={"Location": inside.base_url})

        async with guard_for(f"127.0.0.1:{vendor.port}").make_session() as session:
            with pytest.raises(aiohttp.ClientConnectorError):
                await session.get(vendor.base_url)
    assert inside.connections == 0
    assert wire == [("127.0.0.1", vendor.port)]


async def test_a_connection_that_is_kept_serves_the_host_it_was_made_for_alone(wire: list[Any]) -> None:
    names = Names(models_internal=[["127.0.0.1"]], other_example=[["127.0.0.1"]])
    async with VendorServer(hello()) as vendor:
        guard = guard_for(f"models.internal:{vendor.port}", names=names)
        async with guard.make_session() as session:
            answers = [
                await ask(session, f"http://{host}:{vendor.port}/v1")
                for host in ("models.internal", "other.example", "127.0.0.1", "models.internal")
            ]
    assert [answer.finished for answer in answers] == [True, False, False, True]
    assert vendor.connections == 1, "it was kept"
    assert len(vendor.requests) == 2
    assert wire == [("127.0.0.1", vendor.port)]


async def test_proxies_of_the_environment_are_not_asked(monkeypatch: pytest.MonkeyPatch, wire: list[Any]) -> None:
    async with VendorServer(hello()) as proxy, VendorServer(hello()) as vendor:
        for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        monkeypatch.delenv("no_proxy", raising=False)
        async with guard_for(f"127.0.0.1:{vendor.port}").make_session() as session:
            assert (await ask(session, vendor.base_url)).finished
            with pytest.raises(aiohttp.ClientProxyConnectionError):
                await session.post(vendor.base_url, proxy=f"http://127.0.0.1:{proxy.port}")
    assert (proxy.connections, vendor.connections) == (0, 1)
    assert wire == [("127.0.0.1", vendor.port)]


async def test_cookies_are_not_kept() -> None:
    async def script(wire: Wire) -> None:
        await wire.head(headers={"Set-Cookie": "who=me; Path=/"})
        await wire.pieces(HELLO)
        await wire.end()

    async with VendorServer(script) as vendor, guard_for(f"127.0.0.1:{vendor.port}").make_session() as session:
        for _ in range(2):
            assert (await ask(session, vendor.base_url)).finished
    assert [request.headers.get("cookie") for request in vendor.requests] == [None, None]


async def test_what_an_inner_server_says_is_not_shown() -> None:
    banner = b"-ERR unknown command 'POST' on redis-7.inside\r\n"

    async with (
        VendorServer(lambda wire: wire.raw(banner)) as vendor,
        guard_for(f"127.0.0.1:{vendor.port}").make_session() as session,
    ):
        outcome = await ask(session, vendor.base_url)
    assert outcome.code is FailureCode.PROVIDER_PROTOCOL
    assert "redis" not in repr(outcome.failure)


# Lookups


async def test_names_that_never_resolve_hold_a_bounded_number_of_threads_and_none_of_the_loops_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(guard_module, "_LOOKUP_SECONDS", SOON)
    ordinary, may_end = socket.getaddrinfo, threading.Event()

    def slow(host: Any, *rest: Any, **options: Any) -> Any:
        if host == "slow.example":
            assert may_end.wait(30)
            raise socket.gaierror(socket.EAI_AGAIN, "try again")
        return ordinary(host, *rest, **options)

    def lookups() -> int:
        return sum(thread.name == "endpoint lookup" for thread in threading.enumerate())

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    guard = EndpointGuard(allowed=[AllowedEndpoint("localhost")], refusal_seconds=0)
    try:
        waiting = [asyncio.create_task(refusal_of(guard, "http://slow.example")) for _ in range(100)]
        assert await asyncio.to_thread(lambda: "the loop's own threads are free") is not None
        assert await asyncio.gather(*waiting) == [UNREACHABLE] * 100
        assert lookups() == 16
        assert await refusal_of(guard, "http://localhost") == UNREACHABLE, "there is no place, and it is not waited for"
    finally:
        may_end.set()
    monkeypatch.setattr(guard_module, "_LOOKUP_SECONDS", 5)
    assert await guard.check("http://localhost") == "http://localhost"


async def test_the_systems_name_server_is_asked_in_threads_that_give_all_their_addresses() -> None:
    addresses = await guard_module._Lookups().resolve("localhost", 80)
    assert {ip_address(address).is_loopback for address in addresses} == {True}
    with pytest.raises(UnicodeError):
        await guard_module._Lookups().resolve("a" * 64, 80)


# Nobody else connects

# Where sessions and connections are made. Who gets a user's address there takes `EndpointGuard.make_session` instead;
# what is listed connects to what the operator has set, and nothing else.
MAKERS = {
    "providers/http.py",  # the vendors of the settings; the guard gives it its own connector
    "providers/guard.py",
    "server/issuers.py",  # AUTH_JWKS_URL
    "server/demo.py",  # the demo's own server
    "storage/s3.py",  # STORAGE_URL
    "models/database.py",  # DATABASE_URL
    "models/pool.py",  # the same
}
CONNECTING_CALLS = {
    "ClientSession",
    "TCPConnector",
    "UnixConnector",
    "BaseConnector",
    "open_connection",
    "open_unix_connection",
    "create_connection",
    "create_unix_connection",
    "create_datagram_endpoint",
    "sock_connect",
    "urlopen",
    "HTTPConnection",
    "HTTPSConnection",
    "create_pool",
}
CONNECTING_MODULES = {"httpx", "requests", "urllib3", "http.client", "urllib.request", "boto3", "ftplib", "smtplib"}
FOLDERS = ("graph", "models", "providers", "resolvers", "server", "services", "storage", "streams")


def connects(source: str) -> bool:
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if name in CONNECTING_CALLS:
                return True
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id="aiohttp"), attr="request")
                | ast.Attribute(value=ast.Name(id="asyncpg"), attr="connect")
                | ast.Attribute(value=ast.Name(id="socket"), attr="socket")
            ):
                return True
            case ast.Import(names=names) if any(alias.name in CONNECTING_MODULES for alias in names):
                return True
            case ast.ImportFrom(module=module) if module in CONNECTING_MODULES:
                return True
    return False


def test_nobody_but_the_listed_modules_makes_connections() -> None:
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    found = {str(path.relative_to(ROOT)) for path in paths if connects(path.read_text())}
    assert found == MAKERS


@pytest.mark.parametrize(
    "source",
    [
        "import aiohttp\naiohttp.ClientSession()",
        "from aiohttp import ClientSession\nClientSession()",
        "async def f():\n    async with aiohttp.request('GET', url): pass",
        "from urllib.request import urlopen",
        "import httpx",
        "import http.client",
        "asyncio.open_connection(host, 80)",
    ],
)
def test_the_search_for_connections_finds_them(source: str) -> None:
    assert connects(source)
