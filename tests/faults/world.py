"""Everything a fault run needs, for real: server processes, a PostgreSQL, a Valkey, a vendor, and what can go wrong."""

from __future__ import annotations

import asyncio
import os
import random
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import aiohttp
import psutil
import redis.asyncio as redis

from models.embedded import EmbeddedPostgres
from streams.valkey import PREFIX, heed_cancellation
from tests.conftest import make_database
from tests.faults.proxy import Proxy
from tests.faults.vendor import MODEL, Vendor
from tests.process import ServerProcess
from tests.valkey import ValkeyServer

LEASE_SECONDS = 2.0
_METRICS_TOKEN = "a-token-for-metrics"
# What a server may say at no time, whatever is done to it.
_COMPLAINT = re.compile(r"Traceback|never awaited|never retrieved| (ERROR|CRITICAL) ")
_QUIET_SECONDS = 20.0


@dataclass
class Node:
    """One server, through its restarts, with the lines to what it needs."""

    number: int
    environment: dict[str, str]
    to_database: Proxy
    to_valkey: Proxy
    process: ServerProcess | None = None
    is_frozen: bool = False
    outputs: list[str] = field(default_factory=list)

    @property
    def address(self) -> str | None:
        """Where it serves; None while it does not."""
        return None if self.process is None else self.process.address

    async def start(self) -> None:
        """Start it, if it does not run."""
        if self.process is None:
            process = ServerProcess(**self.environment)
            await process.start()
            self.process = process

    async def end(self, number: signal.Signals) -> None:
        """End it by a signal, and wait for that."""
        process, self.process = self.process, None
        if process is not None:
            if self.is_frozen:
                process.process.send_signal(signal.SIGCONT)
                self.is_frozen = False
            await process.end(number)
            self.outputs.append(process.output)

    def freeze(self) -> None:
        """Stop its process where it is."""
        if self.process is not None and not self.is_frozen:
            self.process.process.send_signal(signal.SIGSTOP)
            self.is_frozen = True

    def thaw(self) -> None:
        """Let it go on."""
        if self.process is not None and self.is_frozen:
            self.process.process.send_signal(signal.SIGCONT)
            self.is_frozen = False

    @property
    def log(self) -> str:
        """All that it has written, over its restarts."""
        return "\n".join([*self.outputs, self.process.output if self.process else ""])

    def complaint(self) -> str | None:
        """The first line of its log that no fault excuses."""
        return next((line for line in self.log.splitlines() if _COMPLAINT.search(line)), None)

    @property
    def descriptors(self) -> int:
        """How many files and sockets its process has open."""
        assert self.process is not None
        return int(psutil.Process(self.process.process.pid).num_fds())


class World:
    """Several servers that share a PostgreSQL, a Valkey and a vendor. Leaving it ends all of it.

    Args:
        nodes: how many servers.
        settings: further ones of theirs, as environment variables.
    """

    def __init__(self, nodes: int = 3, **settings: str) -> None:
        self.nodes: list[Node] = []
        self.vendor = Vendor()
        self.valkey = ValkeyServer()
        self.database_url = ""
        self._count = nodes
        self._settings = settings
        self._folder = Path(tempfile.mkdtemp(prefix="threadgraph-faults-"))
        self._folder.chmod(0o755)
        self._postgres = EmbeddedPostgres(self._folder / "postgres", max_connections=40 * nodes + 20)
        self._dying_postgres: int | None = None
        self._stack = AsyncExitStack()
        self._repeating: asyncio.Task[None] | None = None
        # When writers were lost, and when Valkey lost what it held: only both together may cost text that was shown.
        self.writers_lost: list[float] = []
        self.data_lost: list[float] = []

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._close()

    async def _start(self) -> None:
        await asyncio.to_thread(self._postgres.start)
        self.database_url = await make_database(self._postgres.url, empty=True)
        await self._stack.enter_async_context(self.vendor)
        await self._stack.enter_async_context(self.valkey)
        models = self._folder / "models.toml"
        models.write_text(f'[models.{MODEL}]\nproviders = {{ openai = "{MODEL}" }}\n')
        socket = f"{self._postgres.url.split('host=')[1]}/.s.PGSQL.5432"
        database = self.database_url.split("/")[3].split("?")[0]
        for number in range(self._count):
            to_database = await self._stack.enter_async_context(Proxy(lambda: asyncio.open_unix_connection(socket)))
            to_valkey = await self._stack.enter_async_context(
                Proxy(lambda: asyncio.open_connection("127.0.0.1", self.valkey.port))
            )
            environment = {
                "DATABASE_URL": f"postgresql://postgres@127.0.0.1:{to_database.port}/{database}",
                "DATABASE_TIMEOUT_SECONDS": "3",
                "BROADCAST_URL": f"redis://127.0.0.1:{to_valkey.port}/0",
                "DATA_DIR": str(self._folder / f"node{number}"),
                "SESSION_SECRET": "s" * 32,
                "LEASE_SECONDS": f"{LEASE_SECONDS:g}",
                "SHUTDOWN_GRACE_SECONDS": "1",
                "METRICS_TOKEN": _METRICS_TOKEN,
                "LOG_LEVEL": "INFO",
                "OPENAI_BASE_URL": self.vendor.base_url,
                "OPENAI_API_KEY": "sk-faults",
                "OPENAI_MODELS": MODEL,
                "MODELS_FILE": str(models),
                "SCRIPTED_MODELS": "false",
                **self._settings,
            }
            self.nodes.append(Node(number, environment, to_database, to_valkey))
        await asyncio.gather(*(node.start() for node in self.nodes))

    async def _close(self) -> None:
        try:
            await self.heal(restart=False)
            await asyncio.gather(*(node.end(signal.SIGKILL) for node in self.nodes))
            await self._stack.aclose()
        finally:
            await asyncio.to_thread(self._postgres.stop)
            await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)

    async def kill_node(self, number: int) -> None:
        """`kill -9`."""
        self.writers_lost.append(time.monotonic())
        await self.nodes[number].end(signal.SIGKILL)

    async def drain_node(self, number: int) -> None:
        """SIGTERM, and wait for its end."""
        await self.nodes[number].end(signal.SIGTERM)

    def freeze_node(self, number: int) -> None:
        """SIGSTOP."""
        self.writers_lost.append(time.monotonic())
        self.nodes[number].freeze()

    async def flush_valkey(self) -> None:
        """Everything Valkey holds is gone."""
        self.data_lost.append(time.monotonic())
        await self.valkey.run("FLUSHALL")

    def kill_valkey(self) -> None:
        """Valkey is gone, and what it held."""
        self.data_lost.append(time.monotonic())
        self.valkey.kill()

    async def cut_subscriptions(self) -> None:
        """Break the connections by which servers hear each other's notices: those that are sent now are lost."""
        await self.valkey.run("CLIENT", "KILL", "TYPE", "pubsub")

    def kill_postgres(self) -> None:
        """PostgreSQL is gone at once, as by a loss of power; what it has confirmed is on the disk."""
        if (pid := self._postgres._running_pid()) is not None:
            self._dying_postgres = pid
            os.kill(pid, signal.SIGQUIT)

    async def start_postgres(self) -> None:
        """Start it again."""
        async with asyncio.timeout(30):
            while self._dying_postgres is not None and self._postgres._running_pid() == self._dying_postgres:
                await asyncio.sleep(0.05)
        self._dying_postgres = None
        await asyncio.to_thread(self._postgres.restart_if_dead)

    def repeat_notices(self, seed: str) -> None:
        """Say every notice between servers once more, a moment later: each comes twice, and out of order."""
        if self._repeating is None:
            self._repeating = asyncio.create_task(self._repeat(seed))

    async def _repeat(self, seed: str) -> None:
        chance = random.Random(seed)
        said: dict[bytes, int] = {}
        client = redis.Redis(host="127.0.0.1", port=self.valkey.port)
        try:
            async with client.pubsub(ignore_subscribe_messages=True) as heard:
                await heard.psubscribe(f"{PREFIX}*")
                while True:
                    message = await heard.get_message(timeout=1.0)
                    heed_cancellation()
                    if message is None:
                        continue
                    if said.get(message["data"], 0) > 0:
                        said[message["data"]] -= 1
                        continue
                    said[message["data"]] = said.get(message["data"], 0) + 1
                    await asyncio.sleep(chance.uniform(0, 0.5))
                    await client.publish(message["channel"], message["data"])
        except (OSError, redis.RedisError):
            pass  # until Valkey is killed
        finally:
            await client.aclose()

    async def heal(self, *, restart: bool = True) -> None:
        """End every fault; all nodes serve when it returns, unless they are not to be started again."""
        if self._repeating is not None:
            self._repeating.cancel()
            await asyncio.gather(self._repeating, return_exceptions=True)
            self._repeating = None
        for node in self.nodes:
            node.thaw()
            node.to_database.heal()
            node.to_valkey.heal()
        if restart:
            if self.valkey._process is None:
                await self.valkey.start()
            self.valkey.thaw()
            await self.start_postgres()
            await asyncio.gather(*(node.start() for node in self.nodes))

    async def metrics(self, node: Node) -> dict[str, float]:
        """A node's own numbers, those without labels."""
        headers = {"Authorization": f"Bearer {_METRICS_TOKEN}"}
        async with (
            aiohttp.ClientSession() as http,
            http.get(f"{node.address}/metrics", headers=headers, timeout=aiohttp.ClientTimeout(5)) as response,
        ):
            lines = (await response.text()).splitlines()
        return {name: float(value) for name, value in (line.split(" ")[:2] for line in lines if line[0] != "#")}

    async def until_quiet(self, right: Callable[[dict[str, float]], bool]) -> list[dict[str, float]]:
        """Every node's metrics when they are right, or in the end."""
        deadline = time.monotonic() + _QUIET_SECONDS
        while True:
            found = [await self.metrics(node) for node in self.nodes]
            if all(map(right, found)) or time.monotonic() > deadline:
                return found
            await asyncio.sleep(0.1)
