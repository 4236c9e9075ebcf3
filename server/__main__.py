"""The command line: `python -m server [serve | migrate | settings | schema | demo]`."""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import signal
import sys
from collections.abc import Callable

from config import Settings, SettingsError, load, settings_page
from models.embedded import EmbeddedPostgresError
from server.logs import configure_logging

try:
    import uvloop

    _new_event_loop: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
except ImportError:  # not there on Windows
    _new_event_loop = asyncio.new_event_loop


def main() -> int:
    """Run one command; the exit status is 0, or 2 where a setting or argument is wrong."""
    parser = argparse.ArgumentParser(prog="python -m server", description="Threadgraph: AI chat over GraphQL.")
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("serve", help="start the server (the default)")
    commands.add_parser("settings", help="print every setting as Markdown")
    commands.add_parser("schema", help="print the GraphQL schema")
    demo = commands.add_parser("demo", help="against a running server: ask, cut the connection, resume, compare")
    demo.add_argument("--url", default=f"http://127.0.0.1:{os.environ.get('PORT') or 8000}/graphql")
    demo.add_argument("--model", default=None, help="id of the model to ask")
    arguments = parser.parse_args()
    match arguments.command:
        case "settings":
            print(settings_page(), end="")
        case "schema":
            from graph.schema import build_schema

            print(build_schema().as_str())
        case "demo":
            from server.demo import run_demo

            return asyncio.run(run_demo(arguments.url, arguments.model))
        case _:
            return _serve()
    return 0


def _serve() -> int:
    # Until the event loop takes signals: as the first process of a container, Python would ignore this one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        settings = load(os.environ)
        configure_logging(settings.log_level)
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
    # Imported here: printing settings or help should not wait for it.
    from server.runtime import Server

    server = Server(settings)
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


def _quiet_garbage_collector() -> None:
    """Full collections stopped a busy server for 140 to 310 ms and made its p99; with this, 4 ms."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)


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
