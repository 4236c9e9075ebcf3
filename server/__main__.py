"""The command line: `python -m server [serve | demo | migrate | backfill | seed | settings | schema]`."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING

from config import Settings, SettingsError, load, settings_page
from models.embedded import EmbeddedPostgresError
from server.arguments import command_line
from server.descriptors import allow_descriptors
from server.embedded import embedded_postgres
from server.logs import configure_logging

if TYPE_CHECKING:
    from server.runtime import Server

log = logging.getLogger(__name__)

try:
    import uvloop

    _new_event_loop: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
except ImportError:  # not there on Windows
    _new_event_loop = asyncio.new_event_loop


def main() -> int:
    """Run one command; the exit status is 0, or 2 where a setting or argument is wrong."""
    arguments = command_line().parse_args()
    match arguments.command:
        case "settings":
            print(settings_page(), end="")
        case "schema":
            from graph.schema import build_schema

            print(build_schema().as_str())
        case "demo":
            return _run_demo(arguments)
        case "migrate" | "backfill" | "seed":
            return _run_command(arguments)
        case _:
            return _serve()
    return 0


def _run_demo(arguments: Namespace) -> int:
    from server.demo import run_demo

    try:
        keys = load(os.environ).vendor_keys
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    return asyncio.run(run_demo(arguments.url, arguments.model, keys))


def _run_command(arguments: Namespace) -> int:
    from server.commands import run_command

    try:
        settings = load(os.environ)
        configure_logging(settings.log_level, settings.log_format)
        with asyncio.Runner(loop_factory=_new_event_loop) as runner:
            return runner.run(run_command(arguments, settings))
    except (SettingsError, EmbeddedPostgresError) as error:
        print(error, file=sys.stderr)
        return 2
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("Stopped.", file=sys.stderr)
        return 130


def _serve() -> int:
    # Until the event loop takes signals: as the first process of a container, Python would ignore this one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    # Nothing that a start makes is garbage before its end; to look for some took a twelfth of it.
    gc.disable()
    try:
        settings = load(os.environ)
        configure_logging(settings.log_level, settings.log_format)
        allowed = allow_descriptors(settings.max_sockets)
        if allowed is not None and allowed < settings.max_sockets:
            log.warning("MAX_SOCKETS is %d, but this process may have %d descriptors", settings.max_sockets, allowed)
        with asyncio.Runner(loop_factory=_new_event_loop) as runner:
            runner.run(_run(settings))
    except (SettingsError, EmbeddedPostgresError) as error:
        print(f"Threadgraph cannot start.\n{error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"Threadgraph cannot start: {error}", file=sys.stderr)
        return 1
    return 0


async def _run(settings: Settings) -> None:
    server = _server(settings)
    stopping = asyncio.Event()
    hurry = asyncio.Event()

    def stop() -> None:
        # The second signal gives up the grace.
        (hurry if stopping.is_set() else stopping).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    await server.start()
    _quiet_garbage_collector()
    try:
        _greet(server.address)
        await stopping.wait()
        print("Stopping …", flush=True)
        draining = asyncio.create_task(server.drain())
        hurried = asyncio.create_task(hurry.wait())
        await asyncio.wait({draining, hurried}, return_when=asyncio.FIRST_COMPLETED)
        if not draining.done():
            await server.generations.drain(0)
        await draining
        hurried.cancel()
    finally:
        await server.close()
    print("Stopped.", flush=True)


def _server(settings: Settings) -> Server:
    """The server. Its database starts while its modules are imported, which takes longer: half of a start."""
    postgres = None if settings.database_url else embedded_postgres(settings)
    if postgres is not None:
        postgres.begin()
    try:
        # Imported here: printing settings or help should not wait for it.
        from server.runtime import Server

        return Server(settings, postgres=postgres)
    except BaseException:
        if postgres is not None:
            postgres.stop()
        raise


def _quiet_garbage_collector() -> None:
    """Full collections stopped a busy server for 140 to 310 ms and made its p99; with this, 4 ms.

    What the start has left behind is half a megabyte: to look for it would take a tenth of the start.
    """
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)
    gc.enable()


def _greet(address: str) -> None:
    port = address.rsplit(":", 1)[1]
    demo = "make demo" if port == "8000" else f"make demo PORT={port}"
    print(
        f"\n  Threadgraph is ready.\n\n"
        f"    GraphiQL   {address}/graphql   (open it in a browser)\n"
        f"    API        POST and WebSocket (graphql-transport-ws) at the same address\n\n"
        f"  Next, in another terminal:   {demo}\n"
        f"  Ctrl-C stops the server and its database.\n",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
