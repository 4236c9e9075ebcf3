"""What a URL may say, what is refused at once, and what is said once while it is tried for ever."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote
from uuid import uuid4

import pytest

from config import _channel_url
from streams.buffer import Delta
from streams.channel import BroadcastChannel
from streams.token_log import Growth, LogName, TokenLog
from streams.valkey import _OPTIONS, LOST, PREFIX, ValkeyBackend, make_client, reason
from tests.valkey import (
    MASTER_NAME,
    PASSWORD,
    USER_MAY,
    Certificates,
    Front,
    SentinelGroup,
    ValkeyCluster,
    ValkeyServer,
    credentials,
    free_port,
)

Answer = TypeVar("Answer")

DEADLINE_SECONDS = 30.0
WRONG = "wr0ng:secret"


@dataclass
class Place:
    """What there is to be reached in vain."""

    locked: ValkeyServer
    group: SentinelGroup
    certificates: Certificates
    good: Front
    strict: Front
    elsewhere: Front
    expired: Front

    def tls(self, front: Front, options: str = "", *, ca: bool = True) -> str:
        """The URL of a front."""
        options += f"&ssl_ca_certs={self.certificates.authority}" if ca else ""
        return f"rediss://{credentials(PASSWORD)}127.0.0.1:{front.port}/0?{options.lstrip('&')}"

    def sentinel(self, password: str, sentinel_password: str, name: str = MASTER_NAME) -> str:
        """The URL of the group."""
        at = f"{credentials(password)}127.0.0.1:{self.group.sentinel_port}"
        return f"redis+sentinel://{at}/{name}?sentinel_password={quote(sentinel_password, safe='')}"


@pytest.fixture(scope="module")
async def place(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Place]:
    """All of them."""
    signed = Certificates(tmp_path_factory.mktemp("certificates"))
    async with ValkeyServer(password=PASSWORD) as locked, SentinelGroup() as group:
        await locked.run("ACL", "SETUSER", "guest", "on", f">{PASSWORD}", "-@all", "+@connection")
        async with (
            Front(locked.port, signed.make("good")) as good,
            Front(locked.port, signed.make("strict"), asks=signed.authority) as strict,
            Front(locked.port, signed.make("elsewhere", "elsewhere.example")) as elsewhere,
            Front(locked.port, signed.make("expired", days=-1)) as expired,
        ):
            yield Place(locked, group, signed, good, strict, elsewhere, expired)


REFUSED = "the user name or the password was refused"
FAULTS: dict[str, tuple[Callable[[Place], str], str]] = {
    "a wrong password": (lambda at: at.locked.url.replace(quote(PASSWORD, safe=""), quote(WRONG)), REFUSED),
    "no password": (lambda at: f"redis://127.0.0.1:{at.locked.port}", REFUSED),
    "a wrong user": (lambda at: at.locked.url.replace("redis://", "redis://nobody"), REFUSED),
    "a user who may not": (
        lambda at: at.locked.url.replace("redis://", "redis://guest"),
        "this user may not do what is needed",
    ),
    "nobody there": (lambda at: f"redis://127.0.0.1:{free_port()}", "the connection was refused"),
    "a wrong host": (lambda at: "redis://valkey.invalid:6379", "its host name cannot be resolved"),
    "an unknown authority": (lambda at: at.tls(at.good, ca=False), "its certificate was refused: "),
    "a certificate of another": (lambda at: at.tls(at.elsewhere), "its certificate was refused: IP address mismatch"),
    "an expired certificate": (
        lambda at: at.tls(at.expired),
        "its certificate was refused: certificate has expired",
    ),
    "a server without TLS": (lambda at: at.locked.url.replace("redis:", "rediss:"), "it did not answer in time"),
    "a certificate that is asked for": (lambda at: at.tls(at.strict), "the connection was lost"),
    "a wrong name of a master": (
        lambda at: at.sentinel(PASSWORD, PASSWORD, "nobody"),
        "no sentinel that can be reached knows a living master of this name",
    ),
    "a wrong password of the sentinel": (
        lambda at: at.sentinel(PASSWORD, WRONG),
        "a sentinel refused sentinel_password",
    ),
    "a wrong password of the master": (lambda at: at.sentinel(WRONG, PASSWORD), REFUSED),
    "a cluster that is none": (
        lambda at: at.locked.url.replace("redis:", "redis+cluster:"),
        "it is no cluster, or lacks nodes",
    ),
    "no node of a cluster": (
        lambda at: f"redis+cluster://{credentials(PASSWORD)}127.0.0.1:{free_port()}",
        "the connection was refused",
    ),
}


@pytest.mark.parametrize(("url", "why"), FAULTS.values(), ids=list(FAULTS))
async def test_what_is_wrong_is_said_once_without_the_password_and_tried_again(
    place: Place,
    url: Callable[[Place], str],
    why: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("streams.valkey._CONNECT_SECONDS", 0.5)
    caplog.set_level(logging.INFO)
    backend = ValkeyBackend(url(place))
    tries: list[None] = []
    initialize = backend._hearing.initialize
    tried = asyncio.Event()

    async def counted() -> object:
        tries.append(None)
        if len(tries) > 2:
            tried.set()
        return await initialize()

    backend._hearing.initialize = counted
    channel = BroadcastChannel(backend)
    await channel.connect()
    log = TokenLog(url(place))
    try:
        async with asyncio.timeout(DEADLINE_SECONDS):
            await tried.wait()
        with pytest.raises(LOST) as lost:
            await log.probe()
    finally:
        await channel.close()
        await log.close()
    said = [record.getMessage() for record in caplog.records if record.name == "streams.valkey"]
    assert len(said) == 1
    assert said[0].startswith(f"the channel is out of reach: {why}")
    assert said[0].endswith("; trying again")
    assert reason(lost.value).startswith(why)
    for secret in (PASSWORD, quote(PASSWORD, safe=""), WRONG, quote(WRONG)):
        assert secret not in caplog.text


async def test_what_was_wrong_and_is_right_is_used(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with ValkeyServer(password=WRONG) as valkey:
        backend = ValkeyBackend(f"redis://{credentials(PASSWORD)}127.0.0.1:{valkey.port}")
        channel = BroadcastChannel(backend)
        await channel.connect()
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                while REFUSED not in caplog.text:
                    await asyncio.sleep(0.01)
                assert not backend.connected.is_set()
                await valkey.run("CONFIG", "SET", "requirepass", PASSWORD)
                await backend.connected.wait()
        finally:
            await channel.close()
    assert "the channel is back" in caplog.text


async def test_a_certificate_need_not_be_checked_where_the_url_says_so(place: Place) -> None:
    log = TokenLog(place.tls(place.elsewhere, "ssl_cert_reqs=none", ca=False))
    await log.probe()
    await log.close()
    log = TokenLog(place.tls(place.elsewhere, "ssl_check_hostname=false"))
    await log.probe()
    await log.close()


async def test_a_channel_that_is_dead_without_a_word_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streams.valkey.COMMAND_SECONDS", 0.5)
    monkeypatch.setattr("streams.valkey._TELL_SECONDS", 0.1)
    monkeypatch.setattr("streams.valkey._SILENCE_SECONDS", 0.5)
    monkeypatch.setattr("streams.valkey._LISTEN_SECONDS", 0.05)
    async with ValkeyServer() as valkey, Front(valkey.port) as front:
        backend = ValkeyBackend(f"redis://127.0.0.1:{front.port}")
        await backend.connect()
        await backend.subscribe("name")
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                await backend.connected.wait()
                front.hush()
                while not backend.returns:
                    await asyncio.sleep(0.01)
                await valkey.run("PUBLISH", f"{PREFIX}name", "heard again")
                assert (await backend.next_published()).message == "heard again"
        finally:
            await backend.disconnect()


async def test_a_node_of_a_cluster_that_dies_between_two_reads_is_not_asked_for_ever() -> None:
    name = LogName(uuid4())
    async with ValkeyCluster(with_replica=True) as cluster:
        log = TokenLog(cluster.url)
        try:
            assert await log.append([Growth(name, 0, [Delta("", 0, "TEXT", "word")])]) == [4]
            assert [entry.offset for entry in (await log.wait({name: 0}))[name]] == [4]
            await cluster.run("WAIT", 1, 5_000)
            cluster.kill()
            await cluster.promoted()
            found = await until_reached(lambda: log.wait({name: 0}))
            assert [entry.offset for entry in found[name]] == [4]
        finally:
            await log.close()


async def until_reached(ask: Callable[[], Awaitable[Answer]]) -> Answer:
    """The answer of a log that is out of reach for a while."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while True:
            try:
                return await ask()
            except LOST:
                await asyncio.sleep(0.1)


async def test_a_cluster_that_has_moved_as_a_whole_is_found_by_its_url() -> None:
    port = free_port()
    log = TokenLog(f"redis+cluster://{credentials(PASSWORD)}127.0.0.1:{port}")
    try:
        for _ in range(2):
            # The second time every node that the client was told of is gone.
            async with ValkeyCluster() as cluster, Front(cluster.nodes[0].port, port=port):
                await until_reached(log.wake)
                assert int(str(await cluster.run("DBSIZE"))) == 1
    finally:
        await log.close()


REFUSALS = {
    "redis+sentinel://127.0.0.1:1": "as docs/operating.md has them",
    "redis+sentinel:///main": "as docs/operating.md has them",
    "redis+sentinel://a:b/main": "as docs/operating.md has them",
    "redis+cluster://127.0.0.1:1/3": "as docs/operating.md has them",
    "redis+cluster://127.0.0.1:99999": "as docs/operating.md has them",
    "redis://127.0.0.1:many": "as docs/operating.md has them",
    "redis://127.0.0.1?decode_responses=1": "no option 'decode_responses' is known",
    "redis://127.0.0.1?socket_timeout=0.1": "no option 'socket_timeout' is known",
    "redis://127.0.0.1?sentinel_password=x": "no option 'sentinel_password' is known",
    "redis://127.0.0.1?max_connections=many": "as docs/operating.md has them",
    "redis://127.0.0.1?ssl_cert_reqs=none": "ssl_cert_reqs is for TLS",
    "rediss://127.0.0.1?ssl_ca_certs=/nowhere/ca.pem": "ssl_ca_certs: there is no such file",
    "rediss+cluster://127.0.0.1?ssl_certfile=/nowhere/own.pem": "ssl_certfile: there is no such file",
    "rediss+sentinel://127.0.0.1/main?ssl_cert_reqs=perhaps": "another option of TLS",
    f"rediss://127.0.0.1?ssl_ca_certs={__file__}": "another option of TLS",
}


@pytest.mark.parametrize(("url", "why"), REFUSALS.items(), ids=list(REFUSALS))
async def test_what_can_never_work_is_refused_without_the_password(url: str, why: str) -> None:
    with pytest.raises(ValueError, match=why) as refused:
        make_client(url.replace("://", f"://user:{WRONG}@"))
    assert WRONG not in str(refused.value)
    assert Path(__file__).name not in str(refused.value)


async def test_what_the_documents_say_is_taken(place: Place) -> None:
    text = Path("docs/operating.md").read_text()
    urls = re.findall(r"`((?:rediss?(?:\+[a-z]+)?|unix)://[^`]+)`", text)
    kinds = {url.partition(":")[0] for url in urls}
    assert kinds == {
        *("redis", "rediss", "unix"),
        *(f"{protocol}+{kind}" for protocol in ("redis", "rediss") for kind in ("sentinel", "cluster")),
    }
    for url in urls:
        assert _channel_url(url) == url
        await make_client(url.replace("/etc/threadgraph/ca.pem", str(place.certificates.authority))).aclose()
    assert f"ACL SETUSER threadgraph on >password {USER_MAY}\n" in text
    options = re.findall(
        r"`([a-z_]+)(?:=[a-z]+)?`", text[text.index("| option |") : text.index("A URL that can never")]
    )
    assert {*options} == _OPTIONS - {"username", "password"}
