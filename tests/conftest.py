"""One real PostgreSQL for the whole run, a database for each worker, a real server on a real socket for each module.

The controller of pytest-xdist starts the database; the workers get its address. Tests do not share users, so they run
in any order and at once.
"""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import tempfile
import uuid
from collections import deque
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import asyncpg
import pytest

from config import Settings
from models.database import Database
from models.embedded import EmbeddedPostgres
from server.runtime import Server
from tests.client import Client, connect
from tests.issuer import SHARED_SECRET, shared_secret_token
from tests.scripts import SCRIPTS

_URL = "THREADGRAPH_TEST_DATABASE"
_TEMPLATE = "test_template"
# The run's database survives no loss of power; tests of what does have one of their own. What is committed is written
# at once all the same: a vacuum marks nothing as visible to all whose commit waits.
_CARELESS = {
    "fsync": "off",
    "full_page_writes": "off",
    "checkpoint_timeout": "1h",
    "max_wal_size": "4GB",
}

# Each takes 10 to 45 s, or starts servers and databases in processes of their own; the longest first.
_LONG = (
    "tests/faults/",
    "tests/e2e/test_clocks.py",
    "tests/e2e/test_soak.py",
    "tests/e2e/",
    "tests/contract/test_migrations.py",
    "tests/api/test_nodes_everywhere.py",
    "tests/api/test_event_loop.py",
    "tests/api/test_projects.py::test_the_projects_model_goes_before",
    "tests/api/test_threads.py::test_every_untouched_thread_appears_once",
    "tests/api/test_defects.py",
    "tests/api/test_storage_faults.py",
    "tests/api/test_slow_readers.py",
    "tests/api/test_budgets.py",
    "tests/api/test_real_models.py",
    "tests/api/test_anthropic_models.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """Start the database once, before any worker."""
    if os.environ.get(_URL):
        return
    folder = Path(tempfile.mkdtemp(prefix="threadgraph-tests-"))
    folder.chmod(0o755)
    postgres = EmbeddedPostgres(folder / "postgres", max_connections=600)
    postgres.start()
    os.environ[_URL] = postgres.url
    asyncio.run(_prepare(postgres.url))
    config.stash[_DATABASE] = (postgres, folder)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests come first, at half of the workers: they wait for most of their time, the short ones compute.

    The scheduler gives each worker an equal share of the list, one after the other, and those who have done theirs take
    from the ends of others'. A long test at the end of the list would leave three workers without work.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    places = {item: next((n for n, place in enumerate(_LONG) if item.nodeid.startswith(place)), None) for item in items}
    long = sorted((item for item in items if places[item] is not None), key=lambda item: places[item] or 0)
    short = deque(item for item in items if places[item] is None)
    dealt: list[pytest.Item] = []
    for number in range(workers):
        share = len(dealt) + (len(items) - len(dealt)) // (workers - number)
        if number < (among := max(1, workers // 2)):
            dealt += long[number::among]
        while short and len(dealt) < share:
            dealt.append(short.popleft())
    items[:] = [*dealt, *short]


def pytest_collection_finish() -> None:
    """Five thousand tests live until the end; the garbage collector need not look at them each time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Stop what was started."""
    if _DATABASE in config.stash:
        postgres, folder = config.stash[_DATABASE]
        del os.environ[_URL]
        postgres.stop()
        shutil.rmtree(folder, ignore_errors=True)


_DATABASE = pytest.StashKey[tuple[EmbeddedPostgres, Path]]()


@pytest.fixture(scope="session")
def postgres_url() -> str:
    """The address of the run's PostgreSQL, database `postgres`."""
    return os.environ[_URL]


async def make_database(postgres_url: str, *, empty: bool = False) -> str:
    """A new database; its address.

    Args:
        empty: without even the tables, which take a second to make; else they are copied.
    """
    return await _create(
        postgres_url, f"test_{uuid.uuid4().hex}", "" if empty else f"TEMPLATE {_TEMPLATE} STRATEGY FILE_COPY"
    )


async def _prepare(postgres_url: str) -> None:
    connection = await asyncpg.connect(postgres_url)
    try:
        for setting, value in _CARELESS.items():
            await connection.execute(f"ALTER SYSTEM SET {setting} = '{value}'")
        await connection.execute("SELECT pg_reload_conf()")
    finally:
        await connection.close()
    await Database(await _create(postgres_url, _TEMPLATE, ""), pool_size=1, timeout_seconds=60).migrate()


async def _create(postgres_url: str, name: str, source: str) -> str:
    connection = await asyncpg.connect(postgres_url)
    try:
        await connection.execute(f"CREATE DATABASE {name} {source}")
    finally:
        await connection.close()
    return postgres_url.replace("/postgres?", f"/{name}?")


@pytest.fixture(scope="session")
async def database_url(postgres_url: str) -> str:
    """A database of this worker."""
    return await make_database(postgres_url)


@pytest.fixture(scope="session")
def data_dir() -> Iterator[Path]:
    """A data folder of this worker."""
    with tempfile.TemporaryDirectory(prefix="threadgraph-data-") as folder:
        yield Path(folder)


def test_settings(database_url: str, data_dir: Path, **changes: object) -> Settings:
    """Settings of a server for tests: any free port, this worker's database, fast checkpoints."""
    values: dict[str, object] = {
        "port": 0,
        "data_dir": data_dir,
        "database_url": database_url,
        "session_secret": "s" * 32,
        "auth_shared_secret": SHARED_SECRET,
        "anonymous_sessions_per_minute": 1_000_000,
        "turns_per_minute": 0,
        "uploads_per_minute": 0,
        "shares_per_minute": 0,
        "key_changes_per_minute": 0,
        "checkpoint_seconds": 0.1,
        "shutdown_grace_seconds": 5.0,
        "database_pool_size": 20,
        # Statements over ten thousand rows, on a machine that may be busy with three other workers.
        "database_timeout_seconds": 30.0,
        # One user comes back with a thousand readers at once.
        "max_sockets_per_user": 2_000,
        "log_level": "WARNING",
    }
    return Settings(**(values | changes))  # type: ignore[arg-type]


test_settings.__test__ = False  # type: ignore[attr-defined]


async def public_names(host: str, port: int) -> list[str]:
    """A name server that knows names under `example` alone, and only public addresses for them."""
    if not host.endswith(".example"):
        raise OSError("no such name")
    return ["93.184.215.14"]


@pytest.fixture(scope="session")
async def server(database_url: str, data_dir: Path) -> AsyncIterator[Server]:
    """A server with every built-in model and the scripts of the tests."""
    server = Server(test_settings(database_url, data_dir), providers=SCRIPTS.models(), resolve=public_names)
    await server.start()
    try:
        yield server
    finally:
        await server.drain()
        await server.close()


@pytest.fixture
async def client(server: Server) -> AsyncIterator[Client]:
    """A new anonymous user of the server."""
    async with connect(server.address) as client:
        await client.sign_in()
        yield client


@pytest.fixture
async def other(server: Server) -> AsyncIterator[Client]:
    """Another new anonymous user of the server."""
    async with connect(server.address) as client:
        await client.sign_in()
        yield client


@pytest.fixture
async def person(server: Server) -> AsyncIterator[Client]:
    """A new user of the server who has signed in elsewhere."""
    async with connect(server.address) as client:
        await client.sign_in_with(shared_secret_token())
        yield client


@pytest.fixture
async def nobody(server: Server) -> AsyncIterator[Client]:
    """A caller without a token."""
    async with connect(server.address) as client:
        yield client
