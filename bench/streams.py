"""`python -m bench.streams`: what sockets, readers, catching up and the token log cost, as Markdown.

python -m bench.streams            10,000 idle sockets, 1,000 readers, 20,000 tokens at 100 a second; some minutes
python -m bench.streams --quick    500 idle sockets, 100 readers, 20,000 tokens at once; in less than a minute
python -m bench.streams --only idle,readers     a choice: idle, readers, resume (with the log)

The servers are real processes, on one core; this process, PostgreSQL and Valkey share the other.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import orjson

from bench import load_resume, report, servers
from bench.cores import Cores
from bench.load_http import HttpConnection
from bench.load_resume import LOG_MODEL, LOG_RATE, LongAnswer, Resume, log_size
from bench.load_sockets import IdleRound, measure_idle, sessions, sharing
from bench.load_streams import RATE, OpenStream, StreamRound, ask, measure_streams, open_product_stream, stream_scripts
from bench.run import add_parts, run
from bench.servers import Place, ServerProcess
from tests.valkey import ValkeyServer

_PARTS = ("idle", "readers", "resume")
_TOKENS = 20_000
_LOG_ANSWERS = 10
_SHARED_ANSWERS = 10
_POOL = 20


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure, and how much of it."""

    parts: list[str]
    idle_sockets: int
    idle_rounds: int
    idle_seconds: float
    readers: int
    reading_seconds: float
    token_rate: float
    log_seconds: float


@dataclass(slots=True)
class StreamsBench:
    """One run, on a database that has been started."""

    plan: Plan
    cores: Cores
    place: Place
    scripts: Path
    token: str = ""

    async def run(self) -> None:
        """Measure everything that was asked for; print each table as soon as it is there."""
        plan = self.plan
        models = stream_scripts([plan.readers], plan.reading_seconds)
        models |= load_resume.scripts(_TOKENS, plan.token_rate, plan.log_seconds)
        self.scripts.write_bytes(orjson.dumps(models))
        print(_heading(self.cores), flush=True)
        async with AsyncExitStack() as stack:
            # The first start makes the tables, which takes memory that others would be found to do without.
            await self._started(stack, servers.product(self.place, self.scripts))
        if "resume" in plan.parts:
            await self._resume()
        if "readers" in plan.parts:
            await self._readers()
        if "idle" in plan.parts:
            await self._idle()

    async def _idle(self) -> None:
        plan = self.plan
        async with AsyncExitStack() as stack:
            server = await self._started(stack, servers.product(self.place, self.scripts))
            _tell(f"{plan.idle_sockets} users")
            tokens = await sessions(server, plan.idle_sockets)
            rounds = []
            for number in range(plan.idle_rounds):
                _tell(f"{plan.idle_sockets} idle sockets, round {number + 1}")
                rounds.append(await measure_idle(server, self.cores, tokens, plan.idle_seconds))
            print("\n" + _idle_table(rounds) + _complaints(server), flush=True)

    async def _readers(self) -> None:
        plan = self.plan
        rows = []
        kinds: list[tuple[str, OpenStream]] = [
            (f"{plan.readers} answers, each read once", open_product_stream),
            (f"{_SHARED_ANSWERS} answers, read by {plan.readers}", sharing(_SHARED_ANSWERS)),
        ]
        for title, open_stream in kinds:
            async with AsyncExitStack() as stack:
                server = await self._started(stack, servers.product(self.place, self.scripts))
                (token,) = await sessions(server, 1)
                _tell(title)
                before = server.resident_mib()
                measured = await measure_streams(
                    server, self.cores, open_stream, token, streams=plan.readers, seconds=plan.reading_seconds
                )
                rows.append(_readers_row(title, measured, before))
                rows += [f"\nPROBLEM: {problem}" for problem in dict.fromkeys(measured.problems)]
        head = f"### Readers at {RATE} tokens/s for each answer\n\n"
        head += (
            "| | KiB a reader | lag p50 ms | lag p99 ms | events/s | tokens/event | tokens delivered | server busy |"
        )
        print("\n" + "\n".join([head, "| --- | --- | --- | --- | --- | --- | --- | --- |", *rows]), flush=True)

    async def _resume(self) -> None:
        plan = self.plan
        async with AsyncExitStack() as stack:
            valkey = await stack.enter_async_context(ValkeyServer())
            here, there = [
                await self._started(
                    stack, servers.product(self.place, self.scripts, name=name, BROADCAST_URL=valkey.url)
                )
                for name in ("here", "there")
            ]
            (token,) = await sessions(here, 1)
            connection = await HttpConnection.open(here.port)
            stack.callback(connection.close)
            answer = await LongAnswer.begin(here, connection, token)
            small = [await ask(connection, token, LOG_MODEL) for _ in range(_LOG_ANSWERS)]
            _tell(f"{_LOG_ANSWERS} answers at {LOG_RATE} tokens/s, for {plan.log_seconds:.0f} s")
            # Soon after their text: an answer whose provider says nothing more is ended, and its log, too.
            await asyncio.sleep(plan.log_seconds + 1)
            log = await log_size(valkey, small)
            _tell(f"{_TOKENS} tokens, for {_TOKENS / plan.token_rate:.0f} s")
            await answer.written(_TOKENS, _TOKENS / plan.token_rate)
            long = await log_size(valkey, [answer.message_id])
            # Each connection to the database prepares each statement once.
            await answer.resumes(here, _TOKENS)
            rows = [_resume_row("from memory, at its server", await answer.resumes(here, _TOKENS))]
            first, *others = await answer.resumes(there, _TOKENS)
            rows.append(_resume_row(f"from the log ({long.entries:,} entries), the first at another server", [first]))
            rows.append(_resume_row("those behind it there", others))
            await answer.stop(here)
            rows.append(_resume_row("after the end, from the database", await answer.resumes(there, _TOKENS)))
            head = f"### Catching up on {_TOKENS:,} tokens\n\n"
            head += "| | events | tokens | bytes | ms from connecting | ms of CPU from subscribing |"
            print("\n" + "\n".join([head, "| --- | --- | --- | --- | --- | --- |", *rows]))
            print(
                f"\n### The token log in Valkey\n\n"
                f"{_LOG_ANSWERS} answers at {LOG_RATE} tokens/s: {log.tokens:,} tokens in {log.entries:,} entries take "
                f"{log.size:,} bytes (MEMORY USAGE), {log.size / log.tokens:.1f} bytes a token, of which "
                f"{log.text / log.tokens:.1f} are its text; "
                f"the long answer: {long.size / long.tokens:.1f} bytes a token."
                + _complaints(here)
                + _complaints(there),
                flush=True,
            )

    async def _started(self, stack: AsyncExitStack, server: ServerProcess) -> ServerProcess:
        await server.start()
        stack.push_async_callback(server.stop)
        return server


def _heading(cores: Cores) -> str:
    shared = ": ONE CORE FOR ALL, so that the times below say little" if cores.shared else ""
    return (
        "## Sockets, readers, catching up\n\n"
        f"- product: {report.revision()}; {report.packages()}\n"
        f"- machine: {report.cpu_model()}; servers on core {cores.server}, all else on core {cores.generator}{shared}\n"
        "- memory is the resident memory of the server's process; what the kernel holds for a socket is not in it"
    )


def _idle_table(rounds: Sequence[IdleRound]) -> str:
    first = rounds[0]
    rows = [
        f"### {first.sockets:,} idle sockets, each of another user, each with a subscription to `changes`\n",
        "| | " + " | ".join(f"round {number + 1}" for number in range(len(rounds))) + " |",
        "| --- |" + " --- |" * len(rounds),
    ]
    columns = {
        "KiB a socket": [f"{one.kib_each:.1f}" for one in rounds],
        "memory MiB: before, open, after": [
            f"{one.before_mib:.0f}, {one.open_mib:.0f}, {one.after_mib:.0f}" for one in rounds
        ],
        "descriptors: before, open, after": [", ".join(f"{count:,}" for count in one.descriptors) for one in rounds],
        "opened in s": [f"{one.open_seconds:.1f}" for one in rounds],
        "server busy while idle, % of a core": [f"{one.usage.server * 100:.0f}" for one in rounds],
    }
    return "\n".join([*rows, *(f"| {name} | " + " | ".join(values) + " |" for name, values in columns.items())])


def _readers_row(title: str, one: StreamRound, before_mib: float) -> str:
    each = (one.resident_mib - before_mib) * 1_024 / one.streams
    return (
        f"| {title} | {each:.0f} | {one.p50_ms:.1f} | {one.p99_ms:.1f} | {one.events / one.usage.seconds:,.0f} | "
        f"{one.tokens / one.events:.2f} | {one.delivered:.1%} | {one.usage.server:.0%} |"
    )


def _resume_row(title: str, resumes: Sequence[Resume]) -> str:
    events = max(one.events for one in resumes)
    told = [
        f"{median(times):.1f} ({min(times):.1f}–{max(times):.1f})"
        for times in ([one.seconds * 1_000 for one in resumes], [one.cpu_seconds * 1_000 for one in resumes])
    ]
    return f"| {title} | {events} | {resumes[0].tokens:,} | {resumes[0].size:,} | {' | '.join(told)} |"


def _complaints(server: ServerProcess) -> str:
    lines = server.complaints()
    if not lines:
        return ""
    return f"\n\n{server.name} logged {len(lines)} warnings or errors; the first:\n\n" + "\n".join(
        f"    {line}" for line in lines[:5]
    )


def main() -> int:
    """Run it; the exit status is 1 where it could not be run."""
    plan = _plan()
    # The servers inherit it, too.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if most != resource.RLIM_INFINITY and most < plan.idle_sockets + 500:
        print(f"{plan.idle_sockets} sockets need more descriptors than the {most} allowed.", file=sys.stderr)
        return 1

    async def measure(place: Place, cores: Cores) -> None:
        await StreamsBench(plan, cores, place, place.folder / "scripts.json").run()

    return run(measure, max_connections=3 * _POOL)


def _plan() -> Plan:
    parser = argparse.ArgumentParser(prog="python -m bench.streams", description="What sockets and readers cost.")
    parser.add_argument("--quick", action="store_true", help="fewer of everything, in less than a minute")
    add_parts(parser, _PARTS)
    arguments = parser.parse_args()
    quick = arguments.quick
    return Plan(
        parts=arguments.only,
        idle_sockets=500 if quick else 10_000,
        idle_rounds=1 if quick else 2,
        idle_seconds=2.0 if quick else 10.0,
        readers=100 if quick else 1_000,
        reading_seconds=2.0 if quick else 10.0,
        token_rate=10_000 if quick else 100,
        log_seconds=4.0 if quick else 30.0,
    )


def _tell(progress: str) -> None:
    print(f"… {progress}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
