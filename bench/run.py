"""One run of a benchmark: the cores, a folder, a database that has been started, and what it says at the end."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import uvloop

from bench.cores import Cores
from bench.servers import BenchError, Place
from models.embedded import MAX_CONNECTIONS, EmbeddedPostgres, EmbeddedPostgresError


def run(measure: Callable[[Place, Cores], Awaitable[None]], *, max_connections: int = MAX_CONNECTIONS) -> int:
    """Measure, with servers on one core and PostgreSQL and this process on another; all is stopped and removed after.

    Args:
        measure: does it; cancelled by SIGTERM, as by Ctrl-C.
        max_connections: of PostgreSQL.

    Returns:
        The exit status: 1 where it could not be done, which is said.
    """
    if not hasattr(os, "sched_setaffinity"):
        print("The benchmark pins processes and reads /proc: it needs Linux.", file=sys.stderr)
        return 1
    cores = Cores.pick()
    # Before PostgreSQL is started: it inherits the core.
    os.sched_setaffinity(0, {cores.generator})
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="threadgraph-bench-") as name:
        folder = Path(name)
        # PostgreSQL's own user must be able to pass, should this be run by root.
        folder.chmod(0o711)
        try:
            with EmbeddedPostgres(folder / "database" / "postgres", max_connections=max_connections) as postgres:
                place = Place(postgres.url, folder, cores.server)
                with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                    runner.run(_until_terminated(measure(place, cores)))
        except (KeyboardInterrupt, asyncio.CancelledError):
            print("The benchmark was stopped.", file=sys.stderr)
            return 1
        except (BenchError, EmbeddedPostgresError, OSError) as error:
            print(f"The benchmark failed. {error}", file=sys.stderr)
            return 1
    print(f"\nTook {time.monotonic() - began:.0f} s.")
    return 0


def add_parts(parser: argparse.ArgumentParser, parts: Sequence[str]) -> None:
    """Let `--only` choose among the parts of a benchmark: all of them, where it is not given."""

    def chosen(text: str) -> list[str]:
        names = [name.strip().lower() for name in text.split(",")]
        if unknown := set(names) - set(parts):
            raise argparse.ArgumentTypeError(f"{', '.join(parts)}, not {', '.join(sorted(unknown))}")
        return names

    parser.add_argument("--only", type=chosen, default=list(parts), help=f"of {', '.join(parts)}; separated by commas")


async def _until_terminated(work: Awaitable[None]) -> None:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    await work
