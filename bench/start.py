"""`python -m bench.start`: how long from the command to the first answer, and what of it is imports, as Markdown.

python -m bench.start              seven starts on one database; a quarter of a minute
python -m bench.start --imports    also which packages take longest to import

The server starts a PostgreSQL of its own, as `make run` does, and is asked over HTTP until it answers. Imports are
those of a bare interpreter, beside those of the libraries alone: the difference is ours.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import median

from bench import report
from bench.cores import Cores, on_core
from bench.load_http import fetch, graphql_request
from bench.load_sockets import SESSION
from bench.run import run
from bench.servers import Place, ServerProcess

_STARTS = 7
_MOST_PACKAGES = 12
_LIBRARIES = "import asyncio, aiohttp, asyncpg, orjson, uvloop, jwt, strawberry, strawberry.aiohttp.views, graphql"
_OURS = "import server.__main__, server.runtime"
_IMPORT = re.compile(r"import time: +(\d+) \| +\d+ \| +([\w.]+)")


async def main(place: Place, cores: Cores, *, imports: bool) -> None:
    """Measure and print."""
    lines = ["| start | first answer, ms | CPU, ms | imports, ms of CPU | of libraries alone |", "|" + " --- |" * 5]
    first, *more = [await _start(place) for _ in range(1 + _STARTS)]
    ours = [_cpu_of(_OURS, cores.server) for _ in range(_STARTS)]
    theirs = [_cpu_of(_LIBRARIES, cores.server) for _ in range(_STARTS)]
    lines.append(f"| first, which makes the database | {first[0]:.0f} | {first[1]:.0f} | | |")
    wall, cpu = zip(*more, strict=True)
    cells = [f"{median(some):.0f} ({min(some):.0f}–{max(some):.0f})" for some in (wall, cpu, ours, theirs)]
    lines.append(f"| next | {' | '.join(cells)} |")
    print(f"{report.revision()}; median (least–greatest) of {_STARTS}\n")
    print("\n".join(lines))
    if imports:
        print("\n| package | ms to import |\n| --- | --- |")
        print("\n".join(f"| {name} | {spent / 1_000:.0f} |" for name, spent in _packages(cores.server)))


async def _start(place: Place) -> tuple[float, float]:
    """Milliseconds from the command to the first answer, and CPU of the server until then."""
    environment = {"DATA_DIR": str(place.folder / "start"), "GRAPHIQL": "false"}
    server = ServerProcess("start", [sys.executable, "-m", "server"], environment, place)
    began = time.perf_counter()
    await server.start()
    try:
        await fetch(server.port, graphql_request(SESSION))
        return (time.perf_counter() - began) * 1_000, server.cpu_seconds() * 1_000
    finally:
        await server.stop()


def _cpu_of(code: str, core: int) -> float:
    """Milliseconds of CPU that a bare interpreter takes for it."""
    before = os.times()
    _python(["-c", code], core)
    after = os.times()
    return (after.children_user + after.children_system - before.children_user - before.children_system) * 1_000


def _packages(core: int) -> list[tuple[str, int]]:
    spent: Counter[str] = Counter()
    for micros, name in _IMPORT.findall(_python(["-X", "importtime", "-c", _OURS], core)):
        spent[name.partition(".")[0]] += int(micros)
    return spent.most_common(_MOST_PACKAGES)


def _python(arguments: list[str], core: int) -> str:
    # What Python compiles is kept, whatever the caller's environment says: it is for whoever starts the server.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, *arguments]
    root = Path(__file__).parent.parent
    with on_core(core):
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
    return done.stderr


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--imports", action="store_true", help="also which packages take longest to import")
    wanted = parser.parse_args().imports
    sys.exit(run(lambda place, cores: main(place, cores, imports=wanted)))
