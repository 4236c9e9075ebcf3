"""One span an operation and one an answer, by whom they were asked for, and nothing of a user's in them."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from server.runtime import Server
from server.tracing import OtelTracing
from tests.client import Client, GraphQLErrors, connect
from tests.conftest import make_database, test_settings
from tests.scripts import SCRIPTS


class Traced:
    """A server whose spans a test can read."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.tracing = OtelTracing(self.exporter, service_name="under-test")

    def spans(self, name: str) -> list[ReadableSpan]:
        """All ended spans of this name."""
        self.tracing.flush()
        return [span for span in self.exporter.get_finished_spans() if span.name == name]


@pytest.fixture(scope="module")
async def traced(postgres_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Traced, Server]]:
    """A server with spans."""
    traced, url = Traced(), await make_database(postgres_url)
    server = Server(
        test_settings(url, tmp_path_factory.mktemp("traced")), providers=SCRIPTS.models(), tracing=traced.tracing
    )
    await server.start()
    try:
        yield traced, server
    finally:
        await server.drain()
        await server.close()
        traced.tracing.close()


@pytest.fixture
async def caller(traced: tuple[Traced, Server]) -> AsyncIterator[Client]:
    """A new user of that server."""
    async with connect(traced[1].address) as client:
        await client.sign_in()
        yield client


async def test_an_operation_is_a_span_below_that_of_its_caller(traced: tuple[Traced, Server], caller: Client) -> None:
    trace_id, parent_id = uuid.uuid4().hex, uuid.uuid4().hex[:16]
    await caller.post("query Traced1 { viewer { id } }", None, traceparent=f"00-{trace_id}-{parent_id}-01")
    (span,) = traced[0].spans("query Traced1")
    assert f"{span.context.trace_id:032x}" == trace_id
    assert span.parent is not None
    assert f"{span.parent.span_id:016x}" == parent_id
    assert dict(span.attributes or {}) == {"graphql.operation.type": "query", "graphql.operation.name": "Traced1"}
    assert span.resource.attributes["service.name"] == "under-test"


@pytest.mark.parametrize("header", ["", "x", "00-0-0-0", "00-" + "0" * 32 + "-" + "0" * 16 + "-01"])
async def test_a_header_that_names_no_span_begins_a_trace(
    traced: tuple[Traced, Server], caller: Client, header: str
) -> None:
    name = f"Traced{uuid.uuid4().hex}"
    await caller.post(f"query {name} {{ viewer {{ id }} }}", None, traceparent=header)
    (span,) = traced[0].spans(f"query {name}")
    assert span.parent is None


async def test_an_answer_is_a_span_below_that_of_its_question_and_tells_no_text(
    traced: tuple[Traced, Server], caller: Client
) -> None:
    canary = f"canary{uuid.uuid4().hex}"
    turn = await caller.send(f"Trace {canary}", model="fails-midway")
    message_id = turn["assistantMessage"]["id"]
    message = await caller.finish(message_id)
    key = str(uuid.UUID(message_id.split("_")[1]))
    answers = [span for span in traced[0].spans("answer") if (span.attributes or {})["threadgraph.message_id"] == key]
    (answer,) = answers
    assert answer.attributes is not None
    assert answer.attributes["threadgraph.status"] == "FAILED"
    assert answer.attributes["error.type"] == message["error"]["code"]
    assert not answer.status.is_ok
    (question,) = [
        span for span in traced[0].spans("mutation unnamed") if span.context.trace_id == answer.context.trace_id
    ]
    assert answer.parent is not None
    assert answer.parent.span_id == question.context.span_id
    with pytest.raises(GraphQLErrors):
        await caller.run(f'{{ thread(id: "{canary}") {{ id }} }}')
    traced[0].tracing.flush()
    assert canary not in "".join(span.to_json() for span in traced[0].exporter.get_finished_spans())


async def test_subscriptions_of_one_socket_are_spans_of_their_own(
    traced: tuple[Traced, Server], caller: Client
) -> None:
    turn = await caller.send("Read me")
    await caller.finish(turn["assistantMessage"]["id"])
    await caller.finish(turn["assistantMessage"]["id"])
    spans = traced[0].spans("subscription unnamed")
    assert len(spans) >= 2
    assert len({span.context.trace_id for span in spans}) == len(spans)


async def test_spans_arrive_at_a_collector_with_the_headers_of_the_setting(postgres_url: str, tmp_path: Path) -> None:
    arrived: list[tuple[str, ExportTraceServiceRequest]] = []

    async def collect(request: web.Request) -> web.Response:
        arrived.append((request.headers["X-Key"], ExportTraceServiceRequest.FromString(await request.read())))
        return web.Response()

    app = web.Application()
    app.router.add_post("/v1/traces", collect)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    settings = test_settings(
        await make_database(postgres_url),
        tmp_path,
        otel_exporter_otlp_endpoint=f"http://{host}:{port}",
        otel_exporter_otlp_headers=(("x-key", "secret"),),
    )
    server = Server(settings, providers=SCRIPTS.models())
    await server.start()
    try:
        async with connect(server.address) as client:
            await client.sign_in()
            turn = await client.send("Export me")
            await client.finish(turn["assistantMessage"]["id"])
    finally:
        await server.drain()
        # What has not been sent is sent now.
        await server.close()
        await runner.cleanup()
    spans = [
        span.name
        for key, request in arrived
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
        if key == "secret"
    ]
    assert {"answer", "mutation unnamed", "subscription unnamed"} <= set(spans)


async def test_a_collector_that_is_away_keeps_nobody_for_long(postgres_url: str, tmp_path: Path) -> None:
    settings = test_settings(
        await make_database(postgres_url), tmp_path, otel_exporter_otlp_endpoint="http://127.0.0.1:9"
    )
    server = Server(settings)
    await server.start()
    async with connect(server.address) as client:
        await client.sign_in()
    async with asyncio.timeout(15):
        await server.drain()
        await server.close()
