"""The demo by the real npm clients against a real server: `make clients`.

Starts `python -m server` on a free port with a database of its own, runs each script of this folder under Node with the
server's address, and restarts and stops the server as an operator would. The scripts print one line a check, `✔ …` or
`✘ …: why`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import sys
import tempfile
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Awaitable, Callable
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

import orjson

from config import Settings

_HERE = Path(__file__).parent
_ROOT = _HERE.parent.parent
_SCRIPTS = ("graphql-ws.mjs", "apollo.mjs", "urql.mjs")
# Needs the address of the issuer as well, and stops it at its end.
_ISSUER, _ISSUER_SCRIPT = "auth-server.mjs", "better-auth.mjs"
# Asks for a restart by this line.
_RESTARTING_SCRIPT, _RESTART = "restart.mjs", "restart"
_OLDEST_NODE = 20
# The first start of an embedded PostgreSQL makes its files.
_START_SECONDS = 60.0
_SCRIPT_SECONDS = 90.0
_STOP_SECONDS = 15.0
_GRACE_SECONDS = "2"
_ADDRESS = re.compile(r"GraphiQL +(http://127\.0\.0\.1:(\d+)/graphql)")
_COMPLAINT = re.compile(r" (ERROR|CRITICAL) |^Traceback|never awaited")
_PASSED, _FAILED = "✔ ", "✘ "

T = TypeVar("T")

# JavaScript counts UTF-16 code units and cursors count characters: here the two differ.
_SENTENCE = "Streams break 🧵, naïve clients lose text, שלום 👩🏽‍🚀 "
_MODELS = {
    # About 3 s, to be cut and read to its end; and far longer than any check, to be cut and stopped.
    "steady": {"wordsPerSecond": 60, "steps": [{"text": "".join(f"{n}. {_SENTENCE}" for n in range(1, 21))}]},
    "long": {"wordsPerSecond": 40, "steps": [{"text": "".join(f"{n}. {_SENTENCE}" for n in range(1, 1001))}]},
    "endless": {
        "wordsPerSecond": 100,
        "steps": [{"text": "This answer begins and then waits to be stopped."}, {"pause": "forever"}],
    },
    "parts": {
        "steps": [
            {"reasoning": "The weather is asked for."},
            {"text": "Let me see 🌦. "},
            {"tool": "weather", "arguments": {"city": "Zürich"}},
            {"text": "It rains."},
        ]
    },
    "failing": {"steps": [{"text": "It begins well"}, {"fail": "RATE_LIMITED", "retryAfter": 7}]},
}


class ServerError(Exception):
    """The server did not start or stop as it should; the text says how."""


class Tally:
    """The checks that held and those that did not; each is one line on standard output."""

    def __init__(self) -> None:
        self.passed = 0
        self.failures: list[str] = []

    def line(self, line: str) -> None:
        """Print a line, and count it if it is a check's."""
        self.passed += line.startswith(_PASSED)
        if line.startswith(_FAILED):
            self.failures.append(line)
        print(line, flush=True)

    def check(self, name: str, why_not: str | None = None) -> None:
        """Print and count a check; it held where there is no reason why not."""
        self.line(f"{_PASSED}{name}" if why_not is None else f"{_FAILED}{name}: {why_not}")


class ServerProcess:
    """A real server as a child process, its data and its log in a folder."""

    def __init__(self, folder: Path, issuer: str) -> None:
        self._folder = folder
        self._issuer = issuer
        self._log = folder / "server.log"
        self._port = "0"
        self._process: Process | None = None

    async def start(self) -> str:
        """Start it, on the port of last time if there was one; its address.

        Raises:
            ServerError: it did not say in time that it is ready.
        """
        models = self._folder / "models.json"
        models.write_bytes(orjson.dumps(_MODELS))
        # What a developer has set for a server of theirs is not for this one.
        settings = {field.metadata["env"] for field in fields(Settings)}
        environment = {name: value for name, value in os.environ.items() if name not in settings} | {
            "PORT": self._port,
            "DATA_DIR": str(self._folder / "data"),
            "SCRIPTED_MODELS_FILE": str(models),
            "SHUTDOWN_GRACE_SECONDS": _GRACE_SECONDS,
            "TURNS_PER_MINUTE": "0",
            "AUTH_JWKS_URL": f"{self._issuer}/api/auth/jwks",
            "AUTH_ISSUER": self._issuer,
            "AUTH_AUDIENCE": self._issuer,
        }
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "server", cwd=_ROOT, env=environment, stdin=DEVNULL, stdout=PIPE, stderr=log
            )
        assert self._process.stdout is not None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_START_SECONDS):
                async for line in self._process.stdout:
                    if found := _ADDRESS.search(line.decode()):
                        self._port = found[2]
                        return found[1]
        raise ServerError("it did not say that it is ready")

    async def stop(self) -> None:
        """Ask it to stop. It is gone afterwards in any case.

        Raises:
            ServerError: it did not stop in time, or not with exit status 0.
        """
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(_STOP_SECONDS):
                # Also drains what it still prints, so that a full pipe cannot hold it.
                await process.communicate()
        except TimeoutError:
            process.kill()
            await process.communicate()
            raise ServerError(f"it ran on for {_STOP_SECONDS:g} s and was killed") from None
        if process.returncode != 0:
            raise ServerError(f"its exit status is {process.returncode}")

    def complaint(self) -> str | None:
        """The first error in its log, or None."""
        return next((line for line in self.log().splitlines() if _COMPLAINT.search(line)), None)

    def log(self) -> str:
        """What it wrote to standard error."""
        return self._log.read_text(errors="replace")


async def main() -> int:
    """Run every script; 0 where every check held."""
    node = shutil.which("node")
    why_not = await _unfit(node)
    if node is None or why_not is not None:
        print(why_not, file=sys.stderr)
        return 2
    tally = Tally()
    folder = Path(tempfile.mkdtemp(prefix="threadgraph-clients-"))
    # The account that runs the embedded PostgreSQL for root passes through here.
    folder.chmod(0o711)
    issuer, issuer_url = await _start_issuer(node)
    server = ServerProcess(folder, issuer_url)
    try:
        await _check_all(node, server, issuer_url, tally)
        tally.check("server: its log is without errors", server.complaint())
        if tally.failures:
            print(f"\nThe end of the server's log:\n{server.log()[-4_000:]}", flush=True)
    finally:
        with contextlib.suppress(ServerError):
            await server.stop()
        if issuer.returncode is None:
            issuer.kill()
        await issuer.communicate()
        shutil.rmtree(folder, ignore_errors=True)
    # Once more at the end: it is all that is left of a long output in some places.
    print("", *tally.failures, f"{tally.passed} passed, {len(tally.failures)} failed", sep="\n", flush=True)
    return 1 if tally.failures else 0


async def _start_issuer(node: str) -> tuple[Process, str]:
    """The Better Auth server and its address."""
    process = await asyncio.create_subprocess_exec(node, _ISSUER, cwd=_HERE, stdin=DEVNULL, stdout=PIPE)
    assert process.stdout is not None
    try:
        async with asyncio.timeout(_START_SECONDS):
            return process, (await process.stdout.readline()).decode().strip()
    except BaseException:
        process.kill()
        await process.communicate()
        raise


async def _check_all(node: str, server: ServerProcess, issuer_url: str, tally: Tally) -> None:
    async def restart() -> None:
        await _attempt(tally, "server: stops on SIGTERM with exit status 0, an answer being written", server.stop())
        await _attempt(tally, "server: starts again on the same port and data", server.start())

    url = await _attempt(tally, "server: starts and prints its address", server.start())
    if url is None:
        return
    await asyncio.gather(*(_run(node, [script, url], tally) for script in _SCRIPTS))
    await _run(node, [_ISSUER_SCRIPT, url, issuer_url], tally)
    await _run(node, [_RESTARTING_SCRIPT, url], tally, restart)
    await _attempt(tally, "server: stops on SIGTERM with exit status 0", server.stop())


async def _attempt(tally: Tally, name: str, doing: Awaitable[T]) -> T | None:
    try:
        result = await doing
    except ServerError as error:
        tally.check(name, str(error))
        return None
    tally.check(name)
    return result


async def _unfit(node: str | None) -> str | None:
    """Why no script can be run here, or None."""
    if node is None:
        return f"Node {_OLDEST_NODE} or newer is needed, and there is no `node`."
    process = await asyncio.create_subprocess_exec(node, "--version", stdin=DEVNULL, stdout=PIPE)
    version = (await process.communicate())[0].decode().strip()
    if int(re.sub(r"\D.*", "", version.removeprefix("v")) or 0) < _OLDEST_NODE:
        return f"Node {_OLDEST_NODE} or newer is needed; `node` is {version}."
    if not (_HERE / "node_modules").is_dir():
        return f"Install the clients first: cd {_HERE.relative_to(_ROOT)} && npm ci"
    return None


async def _run(
    node: str, script: list[str], tally: Tally, restart: Callable[[], Awaitable[None]] | None = None
) -> None:
    """Run one script and count its checks; that it comes to its end with some is one more."""
    passed = failed = 0
    process = await asyncio.create_subprocess_exec(node, *script, cwd=_HERE, stdin=DEVNULL, stdout=PIPE)
    assert process.stdout is not None
    try:
        async with asyncio.timeout(_SCRIPT_SECONDS):
            async for data in process.stdout:
                line = data.decode().rstrip("\n")
                if restart is not None and line == _RESTART:
                    await restart()
                    continue
                passed += line.startswith(_PASSED)
                failed += line.startswith(_FAILED)
                tally.line(line)
            status = await process.wait()
    except TimeoutError:
        tally.check(script[0], f"it did not end in {_SCRIPT_SECONDS:g} s")
        return
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if not passed + failed or (status and not failed):
        tally.check(script[0], f"it ended with exit status {status} after {passed} checks")


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
