"""Planned subscriptions: begun without Strawberry, they give what its `stream` gives, and end as it does."""

from __future__ import annotations

import gc
import weakref
from collections.abc import AsyncGenerator
from typing import Any, cast
from uuid import UUID, uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graph.context import Context, Services
from graph.errors import format_errors
from graph.subscription_plan import SubscriptionPlan
from models.ids import IdKind, outside_id
from services.errors import CursorAheadError, NotFoundError
from services.message_stream import DeltaFollower
from services.viewer import Viewer
from streams.buffer import StreamEvent
from tests.unit.test_event_executor import EVENTS, MESSAGE, PLAIN, PLANNED, STOCK, planned_kinds, queries

ID = outside_id(IdKind.MESSAGE, MESSAGE)
Told = tuple[Any, list[dict[str, Any]]]


class Stream:
    """A message stream that says something, fails if it shall, and notes that it was closed."""

    def __init__(self, error: Exception | None = None, after: int = len(EVENTS)) -> None:
        self.error = error
        self.after = after
        self.closed = False

    async def read(
        self, viewer: Viewer, message_id: UUID, after: str | None, follower: DeltaFollower | None
    ) -> AsyncGenerator[StreamEvent, None]:
        try:
            for event in EVENTS[: self.after]:
                yield event
            if self.error is not None:
                raise self.error
        finally:
            self.closed = True


def context(stream: Stream, *, anonymous: bool = False) -> Context:
    services = cast("Services", type("Fixed", (), {"message_stream": stream})())
    return Context(services, None if anonymous else Viewer(uuid4(), anonymous=True, expires_at=2e9))


async def told(source: AsyncGenerator[Any, None]) -> list[Told]:
    found = []
    async for result in source:
        errors = format_errors(result.errors or [])
        for error in errors:
            # Each defect has a number of its own.
            if error.get("extensions", {}).pop("errorId", None) is not None:
                error["message"] = error["message"].partition("(error ")[0]
        found.append((result.data, errors))
    return found


async def by_strawberry(schema: Any, query: str, variables: dict[str, Any], given: Context) -> list[Told]:
    return await told(await schema.stream(query, variable_values=variables, context_value=given))


async def by_plan(query: str, variables: dict[str, Any], given: Context) -> list[Told] | None:
    """None where there is no plan, though the document was seen."""
    await by_strawberry(PLANNED, query, variables, context(Stream()))
    source = PLANNED.follow_planned(query, given, variables, None)
    return None if source is None else await told(source)


@settings(max_examples=150, deadline=None)
@given(query=queries, yes=st.booleans(), no=st.booleans())
async def test_every_selection_gives_what_graphql_core_gives(query: str, yes: bool, no: bool) -> None:
    variables = {"id": ID, "yes": yes, "no": no}
    expected = await by_strawberry(STOCK, query, variables, context(Stream()))
    found = await by_plan(query, variables, context(Stream()))
    if found is None:
        assert [data for data, _ in expected] == [None], "only for an operation that is refused there is no plan"
    else:
        assert found == expected
        assert len(found) == len(EVENTS)


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize(
    "error", [NotFoundError("message"), CursorAheadError("Ahead.", field="after"), ValueError("x")], ids=type
)
async def test_a_failure_is_told_as_graphql_core_tells_it(error: Exception, after: int) -> None:
    expected = await by_strawberry(STOCK, PLAIN, {"id": ID}, context(Stream(error, after)))
    found = await by_plan(PLAIN, {"id": ID}, context(Stream(error, after)))
    assert found == expected
    data, errors = found[-1]
    assert (len(found), data, len(errors)) == (after + 1, None, 1)


async def test_what_the_resolver_refuses_is_refused_alike() -> None:
    for variables, anonymous in (({"id": ID}, True), ({"id": "nonsense"}, False)):
        given = [context(Stream(), anonymous=anonymous) for _ in range(2)]
        expected = await by_strawberry(STOCK, PLAIN, variables, given[0])
        assert await by_plan(PLAIN, variables, given[1]) == expected
        assert [data for data, _ in expected] == [None]


@pytest.mark.parametrize(
    ("query", "variables"),
    [
        (PLAIN, {}),
        (PLAIN, {"id": None}),
        (PLAIN, {"id": {"no": "id"}}),
        (
            PLAIN.replace("($id: ID!)", "($id: ID!, $no: Boolean!)").replace(
                "{ message", "{ ... @include(if: $no) { message", 1
            )
            + "}",
            {"id": ID, "no": False},
        ),
        ("{ __typename }", {}),
        ("subscription { nonsense }", {}),
        ("subscription { messageStream", {}),
    ],
)
async def test_what_cannot_run_is_left_to_strawberry(query: str, variables: dict[str, Any]) -> None:
    assert await by_plan(query, variables, context(Stream())) is None


async def test_a_document_is_planned_once_and_its_events_are_too(monkeypatch: pytest.MonkeyPatch) -> None:
    query = PLAIN.replace("__typename", "only: __typename")
    await by_strawberry(PLANNED, query, {"id": ID}, context(Stream()))
    planned = planned_kinds(monkeypatch)
    for _ in range(3):
        assert len(await by_plan(query, {"id": ID}, context(Stream())) or ()) == len(EVENTS)
    known = PLANNED.documents.find(query)
    assert known is not None
    assert [type(plan) for plan in known.plans.values()] == [SubscriptionPlan]
    # By Strawberry each of the three times, and once for all by plan.
    assert len(planned) == 4 * 2


async def test_a_reader_who_leaves_leaves_nothing_open() -> None:
    await by_strawberry(PLANNED, PLAIN, {"id": ID}, context(Stream()))
    stream = Stream()
    source = PLANNED.follow_planned(PLAIN, context(stream), {"id": ID}, None)
    assert source is not None
    await anext(source)
    assert not stream.closed
    await source.aclose()
    assert stream.closed


@pytest.mark.parametrize("fails", [False, True], ids=["ends", "fails"])
async def test_a_subscription_is_freed_without_the_garbage_collector(fails: bool) -> None:
    stream = Stream(NotFoundError("message") if fails else None)
    await by_plan(PLAIN, {"id": ID}, context(Stream()))
    gc.collect()
    gc.disable()
    try:
        given = context(stream)
        source = PLANNED.follow_planned(PLAIN, given, {"id": ID}, None)
        assert source is not None
        results = [result async for result in source]
        assert len(results) == len(EVENTS) + fails
        kept = weakref.ref(given)
        stream.error = None
        del given, source, results
        assert kept() is None
    finally:
        gc.enable()


async def test_a_planned_subscription_is_known_by_its_name() -> None:
    query = PLAIN.replace("subscription(", "subscription Read(")
    await by_strawberry(PLANNED, query, {"id": ID}, context(Stream()))
    given = context(Stream())
    source = PLANNED.follow_planned(query, given, {"id": ID}, "Read")
    assert source is not None
    assert (given.operation_type, given.operation_name) == ("subscription", "Read")
    await source.aclose()
    assert PLANNED.follow_planned(query, context(Stream()), {"id": ID}, "Write") is None
