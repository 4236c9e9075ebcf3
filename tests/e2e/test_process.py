"""The server as a process: started, stopped, killed, started again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import orjson
import psutil
import pytest

from models.parts import parts_from_json, parts_length
from tests.client import Client, GraphQLErrors, connect, text_of
from tests.conftest import make_database
from tests.process import ROOT, ServerProcess
from tests.vendor_server import VendorServer, Wire

SCRIPTS = {
    "steady": {"wordsPerSecond": 200, "steps": [{"text": " ".join(f"word{n}" for n in range(4_000))}]},
    "short": {"wordsPerSecond": 100, "steps": [{"text": " ".join(f"word{n}" for n in range(100))}]},
}
STEADY = " ".join(f"word{n}" for n in range(4_000))


@pytest.fixture
async def environment(postgres_url: str, tmp_path: Path) -> dict[str, str]:
    """A database and a data folder of one test, with the scripts above."""
    scripts = tmp_path / "scripts.json"
    scripts.write_bytes(orjson.dumps(SCRIPTS))
    return {
        "DATABASE_URL": await make_database(postgres_url),
        "DATA_DIR": str(tmp_path / "data"),
        "SCRIPTED_MODELS_FILE": str(scripts),
        "CHECKPOINT_SECONDS": "0.2",
    }


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder for an embedded database: pytest's own are closed to the user that PostgreSQL runs as under root."""
    with tempfile.TemporaryDirectory(prefix="threadgraph-e2e-", ignore_cleanup_errors=True) as name:
        yield Path(name)
        for pid in databases_under(Path(name)):
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(pid).terminate()


@contextlib.asynccontextmanager
async def running(environment: dict[str, str], **more: str) -> AsyncIterator[ServerProcess]:
    """A server that is ended with the block, if it is not before."""
    server = await ServerProcess(**(environment | more)).start()
    try:
        yield server
    finally:
        if server.process.returncode is None:
            await server.end(signal.SIGKILL)


async def read_some(client: Client, message_id: str, characters: int) -> tuple[str, str]:
    """The first characters of a stream and the cursor behind them."""
    held, cursor = "", ""
    async with client.reading(message_id) as subscription:
        while len(held) < characters:
            payload = await subscription.next()
            assert payload is not None
            event = payload["data"]["messageStream"]
            held, cursor = held + event["text"], event["cursor"]
    return held, cursor


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("PORT", "http", "a whole number from 0 to 65535"),
        ("PORT", "65536", "a whole number from 0 to 65535"),
        ("DATABASE_URL", "mysql://user:hunter2@host/db", "postgres://"),
        ("BROADCAST_URL", "kafka://host", "memory://"),
        ("SHUTDOWN_GRACE_SECONDS", "-1", "a number of seconds from 0 to 600"),
        ("SHUTDOWN_GRACE_SECONDS", "nan", "a number of seconds from 0 to 600"),
        ("ANONYMOUS_SESSIONS", "perhaps", "true or false"),
        ("SESSION_SECRET", "short", "at least 32 bytes"),
        ("ALLOWED_ORIGINS", "https://a.example/path", "exact origins"),
        ("OPENAI_BASE_URL", "ftp://x", "http://"),
        ("DEFAULT_MODEL", "no-such-model", "not offered"),
        ("TITLE_MODEL", "no-such-model", "not offered"),
        ("SCRIPTED_MODELS_FILE", "/nonexistent/scripts.json", "not a readable JSON file"),
    ],
)
async def test_a_wrong_setting_stops_the_start_with_its_name(
    environment: dict[str, str], name: str, value: str, expected: str
) -> None:
    server = ServerProcess(**(environment | {name: value}))
    await server.launch()
    assert await server.wait() == 2
    assert name in server.output
    assert expected in server.output
    assert "hunter2" not in server.output
    assert "Traceback" not in server.output


async def test_a_database_that_is_not_there_stops_the_start_with_a_clear_text(environment: dict[str, str]) -> None:
    server = ServerProcess(**(environment | {"DATABASE_URL": "postgresql://user:hunter2@127.0.0.1:1/x"}))
    await server.launch()
    assert await server.wait() != 0
    assert "DATABASE_URL" in server.output
    assert "hunter2" not in server.output
    assert "Traceback" not in server.output


async def test_a_port_in_use_stops_the_start_with_a_clear_text(environment: dict[str, str], postgres_url: str) -> None:
    async with running(environment) as first:
        port = first.address.rsplit(":", 1)[1]
        other = environment | {"DATABASE_URL": await make_database(postgres_url), "PORT": port}
        second = ServerProcess(**other)
        await second.launch()
        assert await second.wait() != 0
        assert "PORT" in second.output
        assert "Traceback" not in second.output


@pytest.mark.parametrize(
    ("number", "name"),
    [(signal.SIGTERM, "data"), (signal.SIGINT, "a path too long for a socket " + "x" * 100)],
    ids=["SIGTERM", "SIGINT, long path with spaces"],
)
async def test_the_embedded_database_starts_stops_and_keeps_its_data(
    folder: Path, number: signal.Signals, name: str
) -> None:
    environment = {"DATA_DIR": str(folder / name)}
    async with running(environment) as server, connect(server.address) as client:
        await client.sign_in()
        turn = await client.send("Keep me", model="scripted-echo")
        before = await client.finish(turn["assistantMessage"]["id"])
        assert databases_under(folder)
        assert await server.end(number) == 0
    assert not databases_under(folder)
    async with running(environment) as server, connect(server.address) as again:
        again.token = client.token
        assert await again.message(before["id"]) == before
        assert await server.end(number) == 0
    assert not databases_under(folder)


def databases_under(folder: Path) -> list[int]:
    """Pids of the PostgreSQL processes whose data lies in a folder."""
    processes = psutil.process_iter(["name", "cmdline"])
    postgres = [process for process in processes if process.info["name"] == "postgres"]
    return [process.pid for process in postgres if str(folder) in " ".join(process.info["cmdline"] or ())]


async def test_a_second_server_on_the_same_folder_or_database_is_refused(
    environment: dict[str, str], folder: Path
) -> None:
    embedded = {"DATA_DIR": str(folder / "data")}
    async with running(embedded) as first:
        second = ServerProcess(**embedded)
        await second.launch()
        assert await second.wait() == 2
        assert "another server uses" in second.output
        assert await first.end() == 0
    async with running(environment):
        second = ServerProcess(**environment)
        await second.launch()
        assert await second.wait() == 2
        assert "another server uses this database" in second.output


async def test_after_kill_9_the_next_start_ends_what_was_live_and_readers_go_on(environment: dict[str, str]) -> None:
    async with running(environment) as server, connect(server.address) as client:
        await client.sign_in()
        turn = await client.send("Die", model="steady")
        early, early_cursor = await read_some(client, turn["assistantMessage"]["id"], 500)
        # A second of growth and more: whatever was there a second ago must be kept.
        await asyncio.sleep(1.5)
        held, cursor = await read_some(client, turn["assistantMessage"]["id"], 1_000)
        await server.end(signal.SIGKILL)
    async with running(environment) as server, connect(server.address) as again:
        again.token = client.token
        answer = await again.message(turn["assistantMessage"]["id"])
        assert (answer["status"], answer["error"]["code"]) == ("INTERRUPTED", "SERVER_LOST")
        assert STEADY.startswith(answer["text"])
        # 200 words a second of at least 6 characters: a second is worth 1,200 of them.
        assert len(answer["text"]) >= len(held) - 2_200
        assert len(answer["text"]) >= len(early)
        events = await again.read(turn["assistantMessage"]["id"], early_cursor)
        assert early + text_of(events) == answer["text"]
        assert events[-1]["message"] == answer
        events = await again.read(turn["assistantMessage"]["id"], cursor)
        if len(held) > len(answer["text"]):
            assert [event["__typename"] for event in events] == ["MessageReset", "MessageEnded"]
            assert events[0]["message"] == answer
            assert await again.read(answer["id"], events[0]["cursor"]) == [events[1]]
        else:
            assert held + text_of(events) == answer["text"]
        live = "query($id: ID!) { thread(id: $id) { liveMessage { id } } }"
        assert (await again.run(live, {"id": turn["thread"]["id"]}))["thread"]["liveMessage"] is None
        retried = await again.retry(answer["id"], model="scripted-echo")
        assert (await again.finish(retried["assistantMessage"]["id"]))["text"] == "Die"


async def test_a_reader_of_lost_text_is_told_to_start_over_from_what_is_kept(environment: dict[str, str]) -> None:
    async with running(environment, CHECKPOINT_SECONDS="1") as server, connect(server.address) as client:
        await client.sign_in()
        message_id = (await client.send("Lose", model="steady"))["assistantMessage"]["id"]
        saved = await checkpoint(environment["DATABASE_URL"])
        held, cursor = await read_some(client, message_id, saved + 60)
        await server.end(signal.SIGKILL)
    async with running(environment) as server, connect(server.address) as again:
        again.token = client.token
        answer = await again.message(message_id)
        assert len(answer["text"]) < len(held), "killed before the next checkpoint"
        events = await again.read(message_id, cursor)
        assert [event["__typename"] for event in events] == ["MessageReset", "MessageEnded"]
        assert events[0]["message"] == events[1]["message"] == answer


async def test_an_answer_of_which_nothing_was_saved_is_begun_anew(environment: dict[str, str]) -> None:
    async with running(environment, CHECKPOINT_SECONDS="1") as server, connect(server.address) as client:
        await client.sign_in()
        message_id = (await client.send("Lose", model="short"))["assistantMessage"]["id"]
        held, cursor = await read_some(client, message_id, 10)
        await server.end(signal.SIGKILL)
    async with running(environment) as server, connect(server.address) as again:
        again.token = client.token
        # The reader of the first attempt starts over, and so does one who comes with its cursor when all is over.
        events = await again.read(message_id, cursor)
        assert [event["__typename"] for event in (events[0], events[-1])] == ["MessageReset", "MessageEnded"]
        reset, ended = events[0]["message"], events[-1]["message"]
        assert (reset["status"], reset["text"], ended["status"]) == ("STREAMING", "", "COMPLETE")
        assert text_of(events) == ended["text"]
        assert ended["text"].startswith(held)
        late = await again.read(message_id, cursor)
        assert [event["__typename"] for event in late] == ["MessageReset", "MessageEnded"]
        assert late[0]["message"] == late[1]["message"] == ended
        for event in (events[0], events[len(events) // 2]):
            assert text_of(await again.read(message_id, event["cursor"])) == "".join(
                other["text"] for other in events[events.index(event) + 1 : -1]
            )
        assert await again.read(message_id, events[-1]["cursor"]) == []


async def checkpoint(database_url: str) -> int:
    """How many characters the first checkpoint has, when there is one."""
    connection = await asyncpg.connect(database_url)
    try:
        async with asyncio.timeout(10):
            while (parts := await connection.fetchval("SELECT parts FROM stream_checkpoints LIMIT 1")) is None:
                await asyncio.sleep(0.02)
        return parts_length(parts_from_json(parts))
    finally:
        await connection.close()


async def test_kill_9_leaves_the_embedded_database_to_the_next_start(folder: Path) -> None:
    environment = {"DATA_DIR": str(folder / "data")}
    async with running(environment) as server, connect(server.address) as client:
        await client.sign_in()
        turn = await client.send("x", model="scripted-echo")
        await client.finish(turn["assistantMessage"]["id"])
        await server.end(signal.SIGKILL)
    assert databases_under(folder)
    async with running(environment) as server, connect(server.address) as again:
        again.token = client.token
        assert (await again.message(turn["assistantMessage"]["id"]))["text"] == "x"
        assert await server.end() == 0
    assert not databases_under(folder)


async def test_a_pid_file_that_names_somebody_else_is_not_believed(folder: Path) -> None:
    environment = {"DATA_DIR": str(folder / "data")}
    async with running(environment) as server:
        assert await server.end() == 0
    stranger = await asyncio.create_subprocess_exec("sleep", "60")
    try:
        (folder / "data/postgres/postmaster.pid").write_text(f"{stranger.pid}\n")
        async with running(environment) as server:
            assert await server.end() == 0
        assert stranger.returncode is None
    finally:
        stranger.kill()
        await stranger.wait()


async def test_a_first_start_that_is_killed_leaves_no_half_of_a_cluster(folder: Path) -> None:
    environment = {"DATA_DIR": str(folder / "data")}
    killed = ServerProcess(**environment)
    await killed.launch()
    async with asyncio.timeout(30):
        while not list((folder / "data").glob("postgres*/PG_VERSION")):
            await asyncio.sleep(0.005)
    await killed.end(signal.SIGKILL)
    async with running(environment) as server, connect(server.address) as client:
        await client.sign_in()
        assert await server.end() == 0


async def test_a_start_that_ends_early_leaves_no_database_running(folder: Path) -> None:
    # The settings are found wrong, and the signal comes, while the database starts: it begins before all else.
    environment = {"DATA_DIR": str(folder / "data")}
    refused = ServerProcess(**environment, AUTH_ISSUER="threadgraph", AUTH_SHARED_SECRET="x" * 32)
    await refused.launch()
    assert await refused.wait() == 2
    assert "AUTH_ISSUER" in refused.output
    assert not databases_under(folder)
    stopped = ServerProcess(**environment)
    await stopped.launch()
    async with asyncio.timeout(30):
        while not databases_under(folder):
            await asyncio.sleep(0.005)
    assert await stopped.end(signal.SIGTERM) == 0
    assert not databases_under(folder)
    assert "Traceback" not in stopped.output


async def test_an_embedded_database_that_dies_is_started_again(folder: Path) -> None:
    async with running({"DATA_DIR": str(folder / "data")}) as server, connect(server.address) as client:
        await client.sign_in()
        turn = await client.send("Survive this, please", model="scripted")
        held, cursor = await read_some(client, turn["assistantMessage"]["id"], 40)
        postmaster = int((folder / "data/postgres/postmaster.pid").read_text().split()[0])
        psutil.Process(postmaster).kill()
        async with asyncio.timeout(30):
            while True:
                async with client.http.get(server.address + "/readyz") as response:
                    if response.status == 200 and databases_under(folder):
                        break
                await asyncio.sleep(0.05)
        events = await client.read(turn["assistantMessage"]["id"], cursor)
        assert events[-1]["message"]["status"] == "COMPLETE"
        assert held + text_of(events) == events[-1]["message"]["text"]
        assert await server.end() == 0


async def test_sigterm_lets_answers_end_within_the_grace(environment: dict[str, str]) -> None:
    async with running(environment, SHUTDOWN_GRACE_SECONDS="20") as server, connect(server.address) as client:
        await client.sign_in()
        turn = await client.send("Finish", model="short")
        async with client.reading(turn["assistantMessage"]["id"]) as subscription:
            await subscription.next()
            ending = asyncio.create_task(server.end())
            async with asyncio.timeout(10):
                while True:
                    async with client.http.get(server.address + "/readyz") as response:
                        if response.status == 503:
                            break
            with pytest.raises(GraphQLErrors) as refused:
                await client.send("Too late", model="short")
            assert (refused.value.code, refused.value.extensions["retryAfter"]) == ("UNAVAILABLE", 1)
            events = [event async for event in subscription.events()]
            assert events[-1]["message"]["status"] == "COMPLETE"
            frame = await subscription.ws.receive(timeout=20)
            assert (frame.type, subscription.ws.close_code) == (aiohttp.WSMsgType.CLOSE, 1012)
        assert await ending == 0


@pytest.mark.parametrize("hurry", [False, True], ids=["after the grace", "by a second signal"])
async def test_what_has_not_ended_is_interrupted_with_its_text(environment: dict[str, str], hurry: bool) -> None:
    grace = "60" if hurry else "0.5"
    async with running(environment, SHUTDOWN_GRACE_SECONDS=grace) as server, connect(server.address) as client:
        await client.sign_in()
        turn = await client.send("Interrupt", model="steady")
        async with client.reading(turn["assistantMessage"]["id"]) as subscription:
            first = await subscription.next()
            assert first is not None
            server.process.send_signal(signal.SIGTERM)
            if hurry:
                async with asyncio.timeout(10):
                    while "Stopping" not in server.output:
                        await asyncio.sleep(0.01)
                server.process.send_signal(signal.SIGTERM)
            events = [first["data"]["messageStream"], *[event async for event in subscription.events()]]
        message = events[-1]["message"]
        assert (message["status"], message["error"]["code"]) == ("INTERRUPTED", "SERVER_SHUTDOWN")
        assert text_of(events) == message["text"]
        assert STEADY.startswith(message["text"])
        assert await server.wait() == 0
    async with running(environment) as server, connect(server.address) as again:
        again.token = client.token
        stored = await again.message(message["id"])
        assert stored == message
        assert await again.read(message["id"], events[0]["cursor"]) == _merged(events[1:])


def _merged(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a reader gets at once for these events of one text part."""
    return [events[-2] | {"text": text_of(events)}, events[-1]]


async def test_the_demo_with_a_key_asks_the_vendor_and_takes_the_key_back(
    environment: dict[str, str], tmp_path: Path
) -> None:
    async def answer(wire: Wire) -> None:
        await wire.head()
        for n in range(100):
            await wire.event({"choices": [{"delta": {"content": f"real word {n} "}}]})
        await wire.event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        await wire.end()

    async with VendorServer(answer) as vendor:
        models = tmp_path / "models.toml"
        models.write_text(f'[providers.openai]\nbase_url = "{vendor.base_url}"\n')
        async with running(environment, MODELS_FILE=str(models)) as server:
            demo = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "server", "demo", "--url", server.address + "/graphql"),
                cwd=ROOT,
                env={**os.environ, "OPENAI_API_KEY": "sk-of-the-demo"},
                stdout=asyncio.subprocess.PIPE,
            )
            async with asyncio.timeout(60):
                output, _ = await demo.communicate()
            connection = await asyncpg.connect(environment["DATABASE_URL"])
            try:
                assert await connection.fetchval("SELECT count(*) FROM provider_keys") == 0
            finally:
                await connection.close()
    assert demo.returncode == 0, output
    assert "equal to the letter" in output.decode()
    assert "sk-of-the-demo" not in output.decode() + server.output
    assert vendor.requests[0].headers["authorization"] == "Bearer sk-of-the-demo"


@pytest.mark.parametrize(
    ("status", "events", "code", "told"),
    [
        (200, [{"choices": [{"delta": {"content": "Short."}, "finish_reason": "stop"}]}], 0, "equal to the letter"),
        (200, [{"choices": [{"delta": {"content": "Cut off"}}]}], 1, "The answer ended as INTERRUPTED. The model's"),
        (401, [], 1, "The answer ended as FAILED. The model provider did not accept the API key"),
    ],
)
async def test_the_demo_ends_and_says_why_also_where_the_answer_is_over_before_the_cut(
    environment: dict[str, str], tmp_path: Path, status: int, events: list[Any], code: int, told: str
) -> None:
    async def answer(wire: Wire) -> None:
        await wire.head(status)
        for event in events:
            await wire.event(event)
        await wire.end()

    async with VendorServer(answer) as vendor:
        models = tmp_path / "models.toml"
        models.write_text(f'[providers.openai]\nbase_url = "{vendor.base_url}"\n')
        async with running(environment, MODELS_FILE=str(models)) as server:
            demo = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "server", "demo", "--url", server.address + "/graphql"),
                cwd=ROOT,
                env={**os.environ, "OPENAI_API_KEY": "sk-of-the-demo"},
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
            try:
                async with asyncio.timeout(60):
                    output, _ = await demo.communicate()
            finally:
                if demo.returncode is None:
                    demo.kill()
    assert demo.returncode == code, output
    assert told in output.decode()


async def test_the_demo_proves_the_answer_whole_and_says_so(environment: dict[str, str]) -> None:
    async with running(environment) as server:
        demo = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "server",
            "demo",
            "--url",
            server.address + "/graphql",
            "--model",
            "short",
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(60):
            output, _ = await demo.communicate()
    assert demo.returncode == 0
    assert "equal to the letter" in output.decode()
    assert "connection cut after" in output.decode()
