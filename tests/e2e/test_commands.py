"""The command line beside a server and without one, as an operator uses it; killed where it hurts."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

from models.database import Database
from tests.client import connect
from tests.conftest import make_database
from tests.process import ROOT, ServerProcess

THREADS = "{ viewer { id } threads(first: 5) { nodes { id title messages(first: 3) { nodes { role text } } } } }"
PROJECTS = 2_000


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """A data folder; pytest's own are closed to the user that PostgreSQL runs as under root."""
    with tempfile.TemporaryDirectory(prefix="threadgraph-e2e-", ignore_cleanup_errors=True) as name:
        Path(name).chmod(0o755)
        yield Path(name) / "data"


async def begin(*arguments: str, **environment: str) -> Process:
    """`./threadgraph` with these arguments, from another folder."""
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "TMPDIR")}
    return await asyncio.create_subprocess_exec(
        ROOT / "threadgraph", *arguments, cwd="/", env=kept | environment, stdout=PIPE, stderr=PIPE
    )


async def run(*arguments: str, **environment: str) -> tuple[str, str]:
    """What it writes to standard output and to standard error."""
    return await end(await begin(*arguments, **environment), 0)


async def refused(*arguments: str, **environment: str) -> str:
    """What it says about wrong arguments or settings."""
    return (await end(await begin(*arguments, **environment), 2))[1]


async def end(process: Process, status: int) -> tuple[str, str]:
    async with asyncio.timeout(60):
        output, errors = await process.communicate()
    assert process.returncode == status, errors.decode()
    return output.decode(), errors.decode()


async def test_seed_fills_the_database_of_a_running_server_and_hands_out_a_token_for_it(data_dir: Path) -> None:
    server = await ServerProcess(DATA_DIR=str(data_dir)).start()
    try:
        output, errors = await run("seed", "--users", "3", "--messages", "400", DATA_DIR=str(data_dir))
        assert "Made 3 users, 20 threads and 400 messages" in output
        assert "the server that runs" in errors
        assert "400 of 400 messages" in errors
        token = re.search(r'\{"Authorization": "Bearer (.+)"\}', output)
        assert token
        async with connect(server.address) as client:
            client.token = token[1]
            data = await client.run(THREADS)
            assert data["viewer"]["id"] in output
            assert len(data["threads"]["nodes"]) == 5
            assert data["threads"]["nodes"][0]["messages"]["nodes"][0]["text"]
        # The command did not take the database with it.
        async with connect(server.address) as client:
            await client.sign_in()
    finally:
        await server.end()
    assert not (data_dir / "postgres/postmaster.pid").exists()


async def test_commands_start_the_database_where_no_server_runs_and_stop_it_again(data_dir: Path) -> None:
    await run("seed", "--messages", "50", DATA_DIR=str(data_dir))
    output, _ = await run("backfill", DATA_DIR=str(data_dir))
    assert re.search(r"thread-counts +never run", output)
    assert not (data_dir / "postgres/postmaster.pid").exists()


async def test_a_backfill_that_is_killed_goes_on_where_it_was(postgres_url: str, data_dir: Path) -> None:
    url = await make_database(postgres_url)
    environment = {"DATABASE_URL": url, "DATA_DIR": str(data_dir)}
    await Database(url, pool_size=2, timeout_seconds=10).migrate()
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(
            """
            INSERT INTO users (id, anonymous) VALUES (gen_random_uuid(), true);
            INSERT INTO projects (id, owner_id, name, thread_count)
            SELECT gen_random_uuid(), users.id, 'P', 1000 FROM users, generate_series(1, 2000);
            """
        )
        output, _ = await run("backfill", "thread-counts", "--dry-run", **environment)
        assert f"would write {PROJECTS:,} rows" in output
        assert await connection.fetchval("SELECT count(*) FROM projects WHERE thread_count = 1000") == PROJECTS

        killed = await begin("backfill", "thread-counts", "--batch", "2", **environment)
        async with asyncio.timeout(30):
            while not await connection.fetchval("SELECT rows_done > 50 FROM backfills WHERE name = 'thread-counts'"):
                await asyncio.sleep(0.01)
            killed.send_signal(signal.SIGKILL)
            await killed.communicate()
        done = await connection.fetchval("SELECT rows_done FROM backfills WHERE name = 'thread-counts'")
        assert 50 < done < PROJECTS
        assert await connection.fetchval("SELECT count(*) FROM projects WHERE thread_count = 0") == done

        output, errors = await run("backfill", "thread-counts", **environment)
        assert f"{done:,} of {PROJECTS:,} rows" in errors
        assert f"finished, {PROJECTS:,} rows looked at; this run wrote {PROJECTS - done:,}" in output
        assert await connection.fetchval("SELECT count(*) FROM projects WHERE thread_count <> 0") == 0
    finally:
        await connection.close()


async def test_wrong_arguments_say_what_would_be_right(postgres_url: str, data_dir: Path) -> None:
    environment = {"DATABASE_URL": await make_database(postgres_url), "DATA_DIR": str(data_dir)}
    assert "thread-counts" in await refused("backfill", "no-such", **environment)
    assert "a message at least" in await refused("seed", "--threads", "10", "--messages", "5", **environment)
    assert "cannot be used" in await refused("migrate", DATABASE_URL="postgresql://127.0.0.1:1/none")
