"""`python -m bench.fanout`: an answer with many readers, beside a server that encodes each event once for all of them.

python -m bench.fanout                 250 readers of one answer at 30 tokens/s, five rounds; about two minutes
python -m bench.fanout --quick         one short round
python -m bench.fanout --readers 50    another number
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import orjson

from bench import report, servers
from bench.contenders import PRODUCT, RAW
from bench.cores import Cores
from bench.load_http import HttpConnection
from bench.load_sockets import sessions, sharing
from bench.load_streams import RATE, OpenStream, StreamRound, measure_streams, stream_scripts
from bench.run import run
from bench.servers import Place, ServerProcess
from bench.websocket import StreamReader


async def _open_raw(server: ServerProcess, _: HttpConnection, token: str, __: int) -> StreamReader:
    """One more reader of RAW's one stream."""
    reader = StreamReader(f"/fanout?rate={RATE}", f"Authorization: Bearer {token}\r\n", [], RATE)
    await reader.open(server.port)
    return reader


async def _compare(place: Place, scripts: Path, cores: Cores, readers: int, rounds: int, seconds: float) -> None:
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
    rounds, seconds = (1, 4.0) if arguments.quick else (5, 6.0)

    async def measure(place: Place, cores: Cores) -> None:
        await _compare(place, place.folder / "scripts.json", cores, arguments.readers, rounds, seconds)

    return run(measure)


if __name__ == "__main__":
    sys.exit(main())
