"""`python -m bench.fanout`: an answer with many readers, beside a server that encodes each event once for all of them.

python -m bench.fanout                 250 readers of one answer at 30 tokens/s, five rounds; about two minutes
python -m bench.fanout --quick         one short round
python -m bench.fanout --readers 50    another number
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import tempfile
from pathlib import Path

import orjson
import uvloop

from bench import report, servers
from bench.contenders import PRODUCT, RAW
from bench.cores import Cores
from bench.load_http import HttpConnection
from bench.load_sockets import sessions, sharing
from bench.load_streams import RATE, OpenStream, StreamRound, measure_streams, stream_scripts
from bench.servers import BenchError, Place, ServerProcess
from bench.websocket import StreamReader
from models.embedded import EmbeddedPostgres, EmbeddedPostgresError


async def _open_raw(server: ServerProcess, _: HttpConnection, token: str, __: int) -> StreamReader:
    """One more reader of RAW's one stream."""
    reader = StreamReader(f"/fanout?rate={RATE}", f"Authorization: Bearer {token}\r\n", [], RATE)
    await reader.open(server.port)
    return reader


async def _compare(place: Place, scripts: Path, cores: Cores, readers: int, rounds: int, seconds: float) -> None:
    task = asyncio.current_task()
    assert task is not None
    # As Ctrl-C does: the servers are stopped and the folder is removed.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    scripts.write_bytes(orjson.dumps(stream_scripts([readers], seconds)))
    print(report.heading(cores, 1, {contender.name: contender.made_of() for contender in (PRODUCT, RAW)}), flush=True)
    found: list[dict[str, StreamRound]] = []
    token = ""
    for number in range(rounds):
        # A server of its own for every round: what readers leave behind is no part of the next.
        measured: dict[str, StreamRound] = {}
        asked: list[tuple[ServerProcess, OpenStream]] = [
            (servers.product(place, scripts), sharing(1)),
            (servers.raw(place), _open_raw),
        ]
        for server, open_stream in asked:
            print(f"… round {number + 1}, {server.name}", file=sys.stderr, flush=True)
            await server.start()
            try:
                if server.name == "product":
                    (token,) = await sessions(server, 1)
                measured[server.name] = await measure_streams(
                    server, cores, open_stream, token, streams=readers, seconds=seconds
                )
            finally:
                await server.stop()
        found.append(measured)
    title = f"F: 1 stream x {readers} readers x {RATE} tokens/s"
    print("\n" + report.streams_table(found, RATE, title=title), flush=True)


def main() -> int:
    """Run it; the exit status is 1 where it could not be run."""
    parser = argparse.ArgumentParser(prog="python -m bench.fanout", description="One answer with many readers.")
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--readers", type=int, default=250, help="how many read it")
    arguments = parser.parse_args()
    if not hasattr(os, "sched_setaffinity"):
        print("The benchmark pins processes and reads /proc: it needs Linux.", file=sys.stderr)
        return 1
    rounds, seconds = (1, 4.0) if arguments.quick else (5, 6.0)
    cores = Cores.pick()
    # Before PostgreSQL is started: it inherits the core.
    os.sched_setaffinity(0, {cores.generator})
    with tempfile.TemporaryDirectory(prefix="threadgraph-bench-") as name:
        folder = Path(name)
        # PostgreSQL's own user must be able to pass, should this be run by root.
        folder.chmod(0o711)
        try:
            with EmbeddedPostgres(folder / "database" / "postgres") as postgres:
                place = Place(postgres.url, folder, cores.server)
                with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                    runner.run(_compare(place, folder / "scripts.json", cores, arguments.readers, rounds, seconds))
        except (KeyboardInterrupt, asyncio.CancelledError):
            print("The benchmark was stopped.", file=sys.stderr)
            return 1
        except (BenchError, EmbeddedPostgresError, OSError) as error:
            print(f"The benchmark failed. {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
