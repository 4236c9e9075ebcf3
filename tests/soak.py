"""A server under churn for as long as you like: what it uses must not grow. `python -m tests.soak --minutes 30`.

Users come, ask, read, lose their connections, stop, upload, delete and go. Memory, files, threads, connections to
PostgreSQL and keys in Valkey are sampled meanwhile; in the end everybody leaves, and all must be as it was before.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import psutil

from models.embedded import EmbeddedPostgres
from tests.client import Client, GraphQLErrors, connect
from tests.process import ServerProcess
from tests.valkey import ValkeyServer

_TOKEN = "t" * 32
_USERS = 8
_SETTLE_SECONDS = 30.0
# Of what is counted, and not of memory, so much may be there that was not before: a pool that grew.
_SPARE_FILES = 25
_MEBIBYTE = 1_048_576
_CHANGES = "subscription { changes { __typename } }"
_SETTINGS = 'mutation { updateSettings(input: {personalization: {name: "Soak"}}) { settings { defaultModel { id } } } }'


@dataclass(frozen=True)
class Sample:
    """What the server uses at one moment."""

    seconds: float
    rss_mib: float
    files: int
    threads: int
    postgres: int
    valkey_keys: int
    live: int
    readers: int
    sockets: int


@dataclass
class Report:
    """What was done, what was used, and what is wrong with that."""

    samples: list[Sample] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


async def soak(database_url: str, folder: Path, *, seconds: float, every: float, seed: int = 0) -> Report:
    """Run it.

    Args:
        database_url: an empty database.
        seconds: for how long there is churn.
        every: how often a sample is taken.
    """
    report = Report()
    async with ValkeyServer() as valkey:
        server = await ServerProcess(
            DATABASE_URL=database_url,
            DATA_DIR=str(folder),
            BROADCAST_URL=valkey.url,
            METRICS_TOKEN=_TOKEN,
            DATABASE_POOL_SIZE="10",
            ANONYMOUS_SESSIONS_PER_MINUTE="1000000",
        ).start()
        database = await asyncpg.connect(database_url)
        try:
            async with connect(server.address) as scraper:
                sampling = _Sampling(server, database, valkey, scraper)
                await _churn(server, report, min(3.0, seconds), seed)
                before = await sampling.settled()
                churning = asyncio.create_task(_churn(server, report, seconds, seed + 1))
                try:
                    while not churning.done():
                        await asyncio.wait([churning], timeout=every)
                        report.samples.append(await sampling.take())
                    await churning
                finally:
                    churning.cancel()
                after = await sampling.settled()
            report.problems += _problems(before, after, report.samples)
            if server.process.returncode is not None or "Traceback" in server.output:
                report.problems.append(f"the server has ended, or logged a defect: {server.output[-2_000:]}")
            report.samples = [before, *report.samples, after]
        finally:
            await database.close()
            await server.end()
    return report


def _problems(before: Sample, after: Sample, samples: list[Sample]) -> list[str]:
    problems = [
        f"{name}: {there_was} before, {there_is} when all had left"
        for name, there_was, there_is in (
            ("answers that are written", 0, after.live),
            ("readers", 0, after.readers),
            ("sockets", 0, after.sockets),
        )
        if there_is > there_was
    ]
    if after.files > before.files + _SPARE_FILES:
        problems.append(f"open files: {before.files} before, {after.files} when all had left")
    # Growth of the pools and caches belongs to the first quarter; behind it the halves are compared.
    steady = samples[len(samples) // 4 :]
    half = len(steady) // 2
    if half:
        for name, spare in (("rss_mib", 24.0), ("files", _SPARE_FILES), ("threads", 10), ("postgres", 5)):
            early, late = (
                statistics.median(asdict(one)[name] for one in part) for part in (steady[:half], steady[half:])
            )
            if late > early * 1.05 + spare:
                problems.append(f"{name} grew from {early:g} to {late:g}")
    return problems


class _Sampling:
    def __init__(
        self, server: ServerProcess, database: asyncpg.Connection, valkey: ValkeyServer, scraper: Client
    ) -> None:
        self._process = psutil.Process(server.process.pid)
        self._database = database
        self._valkey = valkey
        self._scraper = scraper
        self._begun = time.monotonic()

    async def take(self) -> Sample:
        headers = {"Authorization": f"Bearer {_TOKEN}"}
        async with self._scraper.http.get(self._scraper.address + "/metrics", headers=headers) as response:
            text = await response.text()

        def metric(name: str) -> int:
            found = re.search(rf"^threadgraph_{name} (\S+)$", text, re.MULTILINE)
            assert found is not None, f"there is no metric {name}"
            return int(float(found[1]))

        postgres = await self._database.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        keys = await self._valkey.run("DBSIZE")
        assert isinstance(keys, int)
        return Sample(
            round(time.monotonic() - self._begun, 1),
            round(self._process.memory_info().rss / _MEBIBYTE, 1),
            self._process.num_fds(),
            self._process.num_threads(),
            postgres,
            keys,
            metric("streams_live"),
            metric("stream_readers"),
            metric("sockets_open"),
        )

    async def settled(self) -> Sample:
        """When nobody is there any more, or as it is after a while."""
        until = time.monotonic() + _SETTLE_SECONDS
        while True:
            sample = await self.take()
            if not (sample.live or sample.readers or sample.sockets) or time.monotonic() > until:
                return sample
            await asyncio.sleep(0.2)


async def _churn(server: ServerProcess, report: Report, seconds: float, seed: int) -> None:
    until = time.monotonic() + seconds
    async with asyncio.TaskGroup() as users:
        for number in range(_USERS):
            users.create_task(_users(server.address, report, until, random.Random(f"{seed} {number}")))


async def _users(address: str, report: Report, until: float, chance: random.Random) -> None:
    """One user after another, each for a while."""
    while time.monotonic() < until:
        async with connect(address) as client:
            await client.sign_in()
            report.done["users"] += 1
            async with client.subscribe(_CHANGES, {}) as feed:
                threads: list[str] = []
                for _ in range(chance.randrange(2, 12)):
                    if time.monotonic() >= until:
                        break
                    # A device that finds its thread busy, deleted or at its end: refused by a code, and it goes on.
                    with contextlib.suppress(GraphQLErrors):
                        await _use(client, report, threads, chance)
                if chance.random() < 0.5:
                    feed.abort()


async def _use(client: Client, report: Report, threads: list[str], chance: random.Random) -> None:
    more: dict[str, Any] = {"threadId": chance.choice(threads)} if threads and chance.random() < 0.5 else {}
    if chance.random() < 0.2:
        more["attachmentIds"] = [(await client.upload(chance.randbytes(20_000).hex().encode()))["id"]]
    turn = await client.send("What will grow? " * chance.randrange(1, 20), model="scripted-echo", **more)
    threads.append(turn["thread"]["id"])
    message_id = turn["assistantMessage"]["id"]
    report.done["answers"] += 1
    match chance.randrange(5):
        case 0:
            async with client.reading(message_id) as reading:
                await reading.next()
                reading.abort()
        case 1:
            await client.stop(message_id)
        case 2:
            await client.run(_SETTINGS)
        case 3:
            given = {"input": {"threadId": threads.pop()}}
            await client.run("mutation($input: DeleteThreadInput!) { deleteThread(input: $input) { threadId } }", given)
            return
    await client.read(message_id)
    await client.path(turn["thread"]["id"])


async def _main(arguments: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="threadgraph-soak-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        postgres = EmbeddedPostgres(folder / "postgres", max_connections=100)
        postgres.start()
        try:
            report = await soak(
                postgres.url,
                folder / "data",
                seconds=arguments.minutes * 60,
                every=arguments.every,
                seed=arguments.seed,
            )
        finally:
            postgres.stop()
    for sample in report.samples:
        print(" ".join(f"{key}={value}" for key, value in asdict(sample).items()))
    print(", ".join(f"{count:,} {what}" for what, count in report.done.items()))
    for problem in report.problems:
        print(f"PROBLEM: {problem}")
    return 1 if report.problems else 0


def main() -> int:
    """The command line; the exit status is 1 where something grew."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description="A server under churn, sampled.")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--every", type=float, default=10.0, metavar="SECONDS")
    parser.add_argument("--seed", type=int, default=0)
    return asyncio.run(_main(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
