"""Deltas written without graphql-core: for every selection the same bytes that graphql-core's results make."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, cast
from uuid import UUID, uuid4

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import graph.deltas
from graph.context import Context, Services
from graph.deltas import DeltaPlan
from graph.schema import build_schema
from models.ids import IdKind, outside_id
from services.message_stream import DeltaFollower, LiveReading
from services.viewer import Viewer
from streams.buffer import Delta, StreamEvent
from tests.unit.test_event_executor import MESSAGE, PLAIN, STOCK, queries, results

SCHEMA = build_schema()
DELTAS = [
    Delta("cursor", 0, "REASONING", "hm\n"),
    Delta("cursor2", 1, "TEXT", 'héllo 🦉 "%s" \\ %b \u2028'),
    Delta("cursor3", 300, "TEXT", "x" * 70_000),
]


class Told:
    """What a socket would be: it keeps the plan."""

    def __init__(self) -> None:
        self.plans: list[DeltaPlan] = []

    def __call__(self, plan: DeltaPlan) -> DeltaFollower:
        self.plans.append(plan)
        return self

    async def follow(self, reading: LiveReading) -> bool:
        raise AssertionError("nothing is live")


class Deltas:
    """A message stream of deltas; a follower gets none of them here, its plan is what is looked at."""

    async def read(
        self, viewer: Viewer, message_id: UUID, after: str | None, follower: DeltaFollower | None
    ) -> AsyncGenerator[StreamEvent, None]:
        for delta in () if follower is not None else DELTAS:
            yield delta


async def plan_of(query: str, variables: dict[str, Any]) -> DeltaPlan | None:
    told = Told()
    services = cast("Services", type("Fixed", (), {"message_stream": Deltas()})())
    context = Context(services, Viewer(uuid4(), anonymous=True, expires_at=2e9), tell_deltas=told)
    variables = variables | {"id": outside_id(IdKind.MESSAGE, MESSAGE)}
    source = await SCHEMA.stream(query, variable_values=variables, context_value=context)
    async for _ in source:
        assert not told.plans, "no delta comes by graphql-core where there is a plan"
    return told.plans[0] if told.plans else None


def message_in(frame: bytes) -> bytes:
    """The payload of a frame of a server, whose head must be as long as needed and no longer."""
    assert frame[0] == 0x81, "a text, whole"
    size, start = frame[1], 2
    if size == 126:
        size, start = int.from_bytes(frame[2:4]), 4
        assert size > 125
    elif size == 127:
        size, start = int.from_bytes(frame[2:10]), 10
        assert size > 65_535
    assert len(frame) == start + size
    return frame[start:]


@settings(max_examples=100, deadline=None)
@given(query=queries, yes=st.booleans(), no=st.booleans())
async def test_every_selection_gives_the_bytes_of_graphql_core(query: str, yes: bool, no: bool) -> None:
    variables = {"yes": yes, "no": no}
    plan = await plan_of(query, variables)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.unit.test_event_executor.EVENTS", DELTAS)
        expected = await results(STOCK, query, variables)
    if plan is None:
        ((data, errors),) = expected
        assert data is None, "only of an operation that was refused there is no plan"
        assert errors
        return
    for delta, (data, errors) in zip(DELTAS, expected, strict=True):
        assert not errors
        message = orjson.dumps({"id": "1", "type": "next", "payload": {"data": data}})
        assert message_in(plan.frame(delta, b'{"id":"1"')) == message


@pytest.mark.parametrize("size", [0, 1, 60, *range(100, 130), 65_400, 65_535, 65_536, 70_000])
async def test_frames_of_every_length_are_whole(size: int) -> None:
    plan = DeltaPlan("stream", (("text", "text"),))
    for start in (b'{"id":"1"', b'{"id":"another"'):
        message = orjson.loads(message_in(plan.frame(Delta("c", 0, "TEXT", "x" * size), start)))
        assert message["payload"] == {"data": {"stream": {"text": "x" * size}}}


async def test_readers_who_asked_the_same_share_what_is_written() -> None:
    one = await plan_of(PLAIN, {})
    other = await plan_of(PLAIN.replace("__typename ...", "__typename # in other words\n ..."), {})
    less = await plan_of(PLAIN.replace("kind", ""), {})
    assert one is other is not less
    assert one is not None
    delta = DELTAS[1]
    assert one.frame(delta, b'{"id":"1"') is one.frame(delta, b'{"id":"1"')
    assert orjson.loads(message_in(one.frame(delta, b'{"id":"2"')))["id"] == "2"
    assert orjson.loads(message_in(one.frame(DELTAS[0], b'{"id":"2"')))["payload"] != message_in(
        one.frame(delta, b'{"id":"2"')
    )


async def test_a_field_that_is_not_plain_leaves_deltas_to_graphql_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph.deltas, "plain_field", lambda *_: None)
    assert await plan_of(PLAIN, {}) is None


async def test_plans_are_kept_only_while_somebody_reads() -> None:
    before = len(graph.deltas._plans)
    plan = await plan_of("subscription($id: ID!) { only: messageStream(messageId: $id) { __typename } }", {})
    assert len(graph.deltas._plans) == before + 1
    del plan
    assert len(graph.deltas._plans) == before
