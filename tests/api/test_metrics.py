"""What is counted is what was done, over real sockets; who may read it; and that names do not grow without bound."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from prometheus_client.parser import text_string_to_metric_families

from graph.context import Context
from models.database import Database, DatabaseUnavailableError
from models.ids import IdKind, new_id, parse_id
from server.metrics import ServerCollector
from server.operations import MAX_NAMES, OTHER, UNNAMED, Operations
from server.runtime import Server
from tests.client import Client, GraphQLErrors, connect
from tests.conftest import make_database, test_settings
from tests.process import ROOT
from tests.scripts import SCRIPTS, TextDelta
from tests.valkey import ValkeyServer

TOKEN = "the-token-of-the-scraper"
DEADLINE_SECONDS = 30.0


@pytest.fixture(scope="module")
async def observed(postgres_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    """A server that shows its metrics."""
    url, folder = await make_database(postgres_url), tmp_path_factory.mktemp("observed")
    server = Server(test_settings(url, folder, metrics_token=TOKEN), providers=SCRIPTS.models())
    await server.start()
    try:
        yield server
    finally:
        await server.drain()
        await server.close()


@pytest.fixture
async def caller(observed: Server) -> AsyncIterator[Client]:
    """A new user of that server."""
    async with connect(observed.address) as client:
        await client.sign_in()
        yield client


class Numbers:
    """The samples of one scrape."""

    def __init__(self, text: str) -> None:
        families = list(text_string_to_metric_families(text))
        self.names = {family.name for family in families if family.name.startswith("threadgraph_")}
        self.samples = [sample for family in families for sample in family.samples]

    def __call__(self, name: str, /, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        name = f"threadgraph_{name}"
        return sum(
            sample.value for sample in self.samples if sample.name == name and labels.items() <= sample.labels.items()
        )


async def scrape(client: Client) -> Numbers:
    """What Prometheus would read now."""
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with client.http.get(client.address + "/metrics", headers=headers) as response:
        assert response.status == 200
        return Numbers(await response.text())


class Growth:
    """By how much a metric grew between two scrapes."""

    def __init__(self, before: Numbers, after: Numbers) -> None:
        self._before, self._after = before, after

    def __call__(self, name: str, /, **labels: str) -> float:
        return self._after(name, **labels) - self._before(name, **labels)


async def test_without_the_setting_there_is_no_such_path(client: Client) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with client.http.get(client.address + "/metrics", headers=headers) as response:
        assert response.status == 404


@pytest.mark.parametrize("shown", [None, "", "Bearer ", "Bearer wrong", f"bearer  {TOKEN}", TOKEN, f"Bearer {TOKEN}x"])
async def test_without_the_token_nothing_is_told(caller: Client, shown: str | None) -> None:
    headers = {} if shown is None else {"Authorization": shown}
    async with caller.http.get(caller.address + "/metrics", headers=headers) as response:
        assert response.status == 401
        assert response.headers["WWW-Authenticate"] == "Bearer"
        assert "threadgraph_" not in await response.text()


async def test_a_viewers_token_is_not_the_scrapers(caller: Client) -> None:
    headers = {"Authorization": f"Bearer {caller.token}"}
    async with caller.http.get(caller.address + "/metrics", headers=headers) as response:
        assert response.status == 401


async def test_prometheus_can_read_it_in_both_formats(caller: Client) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    for accept, expected in (
        ("", "text/plain"),
        ("application/openmetrics-text; version=1.0.0", "application/openmetrics-text"),
    ):
        async with caller.http.get(
            caller.address + "/metrics", headers=headers | ({"Accept": accept} if accept else {})
        ) as response:
            assert response.headers["Content-Type"].startswith(expected)
            assert response.headers["Cache-Control"] == "no-store"
            text = await response.text()
            assert "threadgraph_streams_live 0" in text
            assert "process_cpu_seconds_total" in text


async def test_an_answer_is_counted_from_its_question_to_its_end(caller: Client) -> None:
    before = await scrape(caller)
    turn = await caller.send("Count me")
    message = await caller.finish(turn["assistantMessage"]["id"])
    grew = Growth(before, await scrape(caller))
    assert grew("answers_total", status="COMPLETE", code="") == 1
    assert grew("answer_seconds_count") == 1
    assert grew("answer_first_piece_seconds_count") == 1
    assert grew("stream_characters_total") == len(message["text"])
    assert grew("stream_appends_total") > 0
    assert grew("tokens_total", kind="prompt") == 7
    assert grew("tokens_total", kind="completion") == 2
    assert grew("tokens_total", kind="cached") == 3
    assert grew("stream_reads_total", **{"from": "start"}) == 1
    assert grew("stream_events_delivered_total") >= 2
    assert grew("graphql_operations_total", type="mutation", outcome="ok") == 1
    assert grew("graphql_operation_seconds_count", type="mutation") == 1
    assert grew("graphql_operations_total", type="subscription", outcome="ok") == 1
    assert grew("graphql_operation_seconds_count", type="subscription") == 0, "a subscription has no latency"
    assert grew("http_responses_total", method="POST", route="/graphql", status="200") == 1
    assert grew("http_responses_total", method="GET", route="/graphql", status="101") == 1
    assert grew("database_wait_seconds_count") > 0


async def test_live_answers_readers_resumes_and_stops_are_seen(caller: Client) -> None:
    before = await scrape(caller)
    turn = await caller.send("Go on", model="hangs")
    message_id = turn["assistantMessage"]["id"]
    async with caller.reading(message_id) as first:
        held, cursor = "", ""
        while held != "one two ":
            payload = await first.next()
            assert payload is not None
            event = payload["data"]["messageStream"]
            held, cursor = held + event["text"], event["cursor"]
        async with caller.reading(message_id, cursor) as second:
            # The acknowledgement of another operation on a socket of its own: both readers are in by now.
            while (during := await scrape(caller))("stream_readers") - before("stream_readers") < 2:
                pass
            assert during("streams_live") == before("streams_live") + 1
            assert during("stream_buffered_characters") >= len("one two ")
            assert during("sockets_open") == before("sockets_open") + 2
            assert during("socket_operations_running") == before("socket_operations_running") + 2
            assert during("database_connections_open") >= 1
            assert during("database_connections_max") == 20
            await caller.stop(message_id)
            for reader in (first, second):
                events = [event async for event in reader.events()]
                assert events[-1]["__typename"] == "MessageEnded"
    after = await scrape(caller)
    grew = Growth(before, after)
    assert grew("stream_reads_total", **{"from": "resume"}) == 1
    assert grew("stream_stops_total") == 1
    assert grew("answers_total", status="STOPPED") == 1
    assert after("streams_live") == before("streams_live")
    assert after("stream_readers") == before("stream_readers")


async def test_a_failed_answer_is_counted_with_its_code(caller: Client) -> None:
    before = await scrape(caller)
    turn = await caller.send("Fail", model="fails-midway")
    message = await caller.finish(turn["assistantMessage"]["id"])
    grew = Growth(before, await scrape(caller))
    assert grew("answers_total", status="FAILED", code=message["error"]["code"]) == 1


async def test_the_lag_of_delivery_is_sampled_and_plausible(caller: Client) -> None:
    before = await scrape(caller)
    turn = await caller.send("Words", model="slow")
    message_id = turn["assistantMessage"]["id"]
    began = time.monotonic()
    async with caller.reading(message_id) as reading:
        received = 0
        while received < 130:
            assert await reading.next() is not None
            received += 1
    took = time.monotonic() - began
    await caller.stop(message_id)
    grew = Growth(before, await scrape(caller))
    assert 1 <= grew("stream_delivery_lag_seconds_count") <= 6, "one in 32"
    assert 0 <= grew("stream_delivery_lag_seconds_sum") < took


async def test_an_answer_of_a_dead_server_is_counted_by_who_ends_it(
    postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = await make_database(postgres_url)

    async def nothing(*_: Any) -> None:
        """What a server that was killed does at its end."""

    server = Server(test_settings(url, tmp_path), providers=SCRIPTS.models())
    await server.start()
    async with connect(server.address) as client:
        await client.sign_in()
        old = await client.send("Die", model="hangs")
        new = await client.send("Die, and come back", model="hangs")
    with monkeypatch.context() as killed:
        killed.setattr("services.generation.end_answer", nothing)
        await server.close()
    connection = await asyncpg.connect(url)
    await connection.execute(
        "UPDATE messages SET created_at = now() - interval '1 hour' WHERE id = $1",
        parse_id(IdKind.MESSAGE, old["assistantMessage"]["id"]),
    )
    await connection.close()
    token = client.token
    server = Server(test_settings(url, tmp_path, metrics_token=TOKEN), providers=SCRIPTS.models())
    await server.start()
    try:
        async with connect(server.address) as client:
            numbers = await scrape(client)
            client.token = token
            await client.stop(new["assistantMessage"]["id"])
        assert numbers("reaper_take_overs_total") == 2
        assert numbers("reaper_restarts_total") == 1
        assert numbers("reaper_ends_total") == 1
        assert numbers("answers_total") == 0, "it was not this server's"
    finally:
        await server.drain()
        await server.close()


async def test_operations_are_counted_by_the_name_in_their_document(caller: Client) -> None:
    before = await scrape(caller)
    await caller.run("query MetricsWhoAmI { viewer { id } }")
    await caller.run("{ viewer { id } }")
    with pytest.raises(GraphQLErrors):
        await caller.run("query MetricsNothing { message(id: 5) { id } }")
    with pytest.raises(GraphQLErrors):
        await caller.run("query MetricsInvalid { nothingOfThisName }")
    with pytest.raises(GraphQLErrors):
        await caller.read("x")
    grew = Growth(before, await scrape(caller))
    assert grew("graphql_operations_total", type="query", name="MetricsWhoAmI", outcome="ok") == 1
    assert grew("graphql_operations_total", type="query", name=UNNAMED, outcome="ok") == 1
    assert grew("graphql_operations_total", type="subscription", outcome="BAD_USER_INPUT") == 1
    assert grew("graphql_operations_total", type="query", name="MetricsNothing", outcome="BAD_USER_INPUT") == 1
    assert grew("graphql_operations_total", name="MetricsInvalid") == 0, "it is not executed"
    assert grew("graphql_operations_total", type="invalid", name=UNNAMED, outcome="GRAPHQL_VALIDATION_FAILED") == 1


def test_a_process_keeps_a_bounded_number_of_names() -> None:
    operations = Operations()
    for number in range(3 * MAX_NAMES):
        for name in (f"Name{number}", "Name0", "x" * 100 + str(number)):
            context = Context(None, operation_type="query", operation_name=name)  # type: ignore[arg-type]
            with operations.running(context):
                pass
    names = {name for _, name, _ in operations.outcomes}
    assert len(names) == MAX_NAMES + 1
    assert OTHER in names
    assert operations.outcomes["query", "Name0", "ok"] == 3 * MAX_NAMES + 1, "who was first stays"
    assert sum(operations.outcomes.values()) == 9 * MAX_NAMES, "and none is lost"


async def test_paths_and_methods_that_clients_make_up_make_no_series(caller: Client) -> None:
    for number in range(5):
        async with caller.http.get(f"{caller.address}/made/up/{number}") as response:
            assert response.status == 404
    for method in ("PROPFIND", "MKCALENDAR"):
        async with caller.http.request(method, f"{caller.address}/graphql") as response:
            assert response.status == 405
    numbers = await scrape(caller)
    shown = {tuple(sorted(sample.labels.items())) for sample in numbers.samples if "http_responses" in sample.name}
    assert not any("made" in str(labels) or "MKCALENDAR" in str(labels) for labels in shown)
    assert numbers("http_responses_total", route="none", status="404") >= 5
    assert numbers("http_responses_total", method="other", status="405") >= 2


async def test_no_metric_has_an_id_or_a_text_in_it(caller: Client) -> None:
    canary = f"canary{uuid.uuid4().hex}"
    turn = await caller.send(f"Say {canary}")
    await caller.finish(turn["assistantMessage"]["id"])
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with caller.http.get(caller.address + "/metrics", headers=headers) as response:
        text = await response.text()
    for told in (canary, TOKEN, caller.token, turn["assistantMessage"]["id"].split("_")[1], caller.id.split("_")[1]):
        assert str(told) not in text


async def test_two_thousand_live_answers_are_read_in_no_time(observed: Server) -> None:
    owner = new_id()
    buffers = [observed.hub.open(new_id(), owner) for _ in range(2_000)]
    try:
        for buffer in buffers:
            for _ in range(20):
                buffer.append_text("TEXT", "token ")
        collector = observed.metrics.collectors[0]
        assert isinstance(collector, ServerCollector)
        list(collector.collect())
        used = []
        for _ in range(5):
            began = time.process_time()
            list(collector.collect())
            used.append(time.process_time() - began)
        assert min(used) < 0.05
    finally:
        for buffer in buffers:
            observed.hub.remove(buffer.message_id)


async def test_what_ended_stays_counted(observed: Server) -> None:
    appends, characters = observed.hub.appended
    buffer = observed.hub.open(new_id(), new_id())
    buffer.append_text("TEXT", "four")
    buffer.append_text("REASONING", "and six")
    assert observed.hub.appended == (appends + 2, characters + 11)
    observed.hub.remove(buffer.message_id)
    assert observed.hub.appended == (appends + 2, characters + 11)


async def test_a_database_out_of_reach_is_counted_by_what_was_raised(postgres_url: str) -> None:
    database = Database(await make_database(postgres_url), pool_size=2, timeout_seconds=1)
    await database.connect()
    try:
        assert database.connections[0] >= 1
        with pytest.raises(DatabaseUnavailableError):
            async with database.acquire() as connection:
                await connection.execute("SELECT pg_sleep(60)")
        assert sum(database.unavailable.values()) == 1
        assert database.waits.count == 2, "the first was that of connecting"
    finally:
        await database.close()


@pytest.fixture
async def shared(postgres_url: str, tmp_path: Path) -> AsyncIterator[tuple[ValkeyServer, Client]]:
    """A server that shares its streams, its Valkey, and a user of it."""
    async with ValkeyServer() as valkey:
        settings = test_settings(
            await make_database(postgres_url), tmp_path, metrics_token=TOKEN, broadcast_url=valkey.url
        )
        server = Server(settings, providers=SCRIPTS.models())
        await server.start()
        try:
            async with connect(server.address) as client:
                await client.sign_in()
                yield valkey, client
        finally:
            await server.drain()
            await server.close()


async def scrape_until(client: Client, name: str) -> Numbers:
    """The first scrape in which this metric is not 0."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not (numbers := await scrape(client))(name):
            await asyncio.sleep(0.05)
    return numbers


async def test_what_the_loss_of_the_channel_does_is_counted(shared: tuple[ValkeyServer, Client]) -> None:
    valkey, client = shared
    question = f"Shared {uuid.uuid4()}"
    queue = SCRIPTS.driven.queue(question)
    turn = await client.send(question, model="driven")
    queue.put_nowait(TextDelta("one "))
    async with client.reading(turn["assistantMessage"]["id"]) as reading:
        await reading.next()
        await scrape_until(client, "channel_connected")
        valkey.kill()
        queue.put_nowait(TextDelta("two "))
        numbers = await scrape_until(client, "token_log_append_failures_total")
        assert numbers("token_log_unlogged_characters") == len("two ")
        await valkey.start()
        await reading.next()
        numbers = await scrape_until(client, "channel_reconnects_total")
        assert numbers("token_log_reconnects_total") >= 1
        assert numbers("token_log_rewrites_total") >= 1, "it came back empty"
        assert numbers("token_log_unlogged_characters") == 0
        assert numbers("token_log_append_seconds_count") >= 2
        assert numbers("stream_appends_total") == 2, "what is written again is not counted again"
        assert numbers("stream_characters_total") == len("one two ")
        queue.put_nowait(None)
        assert [event async for event in reading.events()][-1]["message"]["status"] == "COMPLETE"
    numbers = await scrape(client)
    assert numbers("stream_characters_total") == len("one two ")
    assert metrics_of_page() == {name.removeprefix("threadgraph_") for name in numbers.names}


def metrics_of_page() -> set[str]:
    """The metrics that docs/observability.md lists, without what Prometheus adds to the names of counters."""
    page = (ROOT / "docs/observability.md").read_text().split("## Metrics")[1].split("### What to alert on")[0]
    return {name.removesuffix("_total") for name in re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)}


def test_the_alerts_of_the_page_are_about_metrics_that_are_there() -> None:
    page = (ROOT / "docs/observability.md").read_text()
    named = {re.sub(r"(_total|_bucket)$", "", name) for name in re.findall(r"threadgraph_(\w+)", page)}
    assert len(named) > 5
    assert named <= metrics_of_page()


def test_who_uses_neither_metrics_nor_spans_does_not_wait_for_their_imports() -> None:
    late = {"prometheus_client", "server.metrics", "server.tracing", "opentelemetry.exporter"}
    program = f"import sys, server.runtime; print({late} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
