"""Planned subscription events: for every selection the same results as graphql-core gives, and nothing that grows."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, cast
from uuid import UUID, uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strawberry.schema.schema import StrawberryGraphQLCoreExecutionContext

import graph.event_executor
from graph.context import Context, Services
from graph.event_executor import EventExecutor
from graph.schema import Schema, build_schema
from models.ids import IdKind, outside_id
from models.parts import ReasoningPart, TextPart, ToolPart
from services.message_stream import DeltaFollower
from services.viewer import Viewer
from streams.buffer import Delta, StreamEvent, replay

MESSAGE = uuid4()
EVENTS: list[StreamEvent] = [
    *replay(
        MESSAGE, [ReasoningPart("hm"), TextPart("héllo 🦉"), ToolPart("c", "search", {"q": [1]}), TextPart("x")], 0
    ),
    Delta("cursor", 3, "TEXT", "y"),
]


class FixedStream:
    """A message stream that always says the same."""

    async def read(
        self, viewer: Viewer, message_id: UUID, after: str | None, follower: DeltaFollower | None
    ) -> AsyncGenerator[StreamEvent, None]:
        for event in EVENTS:
            yield event


def context() -> Context:
    services = cast("Services", type("Fixed", (), {"message_stream": FixedStream()})())
    return Context(services, Viewer(uuid4(), anonymous=True, expires_at=2e9))


PLANNED = build_schema()
STOCK = build_schema()
STOCK.execution_context_class = StrawberryGraphQLCoreExecutionContext


async def results(schema: Schema, query: str, variables: dict[str, Any]) -> list[tuple[Any, list[str]]]:
    variables = variables | {"id": outside_id(IdKind.MESSAGE, MESSAGE)}
    source = await schema.stream(query, variable_values=variables, context_value=context())
    found = []
    async for result in source:
        data, errors = result.data, result.errors  # type: ignore[union-attr]
        found.append((data, [error.message for error in errors or ()]))
    return found


names = st.sampled_from(["cursor", "partIndex", "kind", "text", "__typename"])
directives = st.sampled_from(["", "@include(if: $yes)", "@skip(if: $yes)", "@include(if: $no)", "@skip(if: false)"])
fields = st.builds(
    lambda name, alias, directive: f"{alias + ': ' if alias else ''}{name} {directive}",
    names,
    st.sampled_from(["", "", "a", "text2", "kind2"]),
    directives,
)
deltas = st.lists(fields, min_size=1, max_size=5).map(" ".join)
fragments = st.one_of(
    deltas.map(lambda inner: f"... on MessageDelta {{ {inner} }}"),
    deltas.map(lambda inner: f"... on MessageDelta {{ ... {{ {inner} }} }}"),
    directives.map(lambda directive: f"... on MessageStreamEvent {directive} {{ __typename }}"),
    directives.map(lambda directive: f"...Named {directive}"),
    st.just("__typename"),
    st.just("... on MessagePartAdded { cursor partIndex part { __typename ... on ToolPart { name arguments } } }"),
    st.just("... on MessageEnded { cursor }"),
)
queries = st.builds(
    lambda alias, inner: (
        "subscription($id: ID!, $yes: Boolean = true, $no: Boolean = false) "
        f"{{ {alias}messageStream(messageId: $id) "
        f"{{ __typename @include(if: $yes) @skip(if: $no) {' '.join(inner)} }} }} "
        "fragment Named on MessageDelta { text cursor }"
    ),
    st.sampled_from(["", "it: "]),
    st.lists(fragments, max_size=5).map(lambda parts: [*parts, "...Named @include(if: $yes)"]),
)


@settings(max_examples=150, deadline=None)
@given(query=queries, yes=st.booleans(), no=st.booleans())
async def test_every_selection_gives_what_graphql_core_gives(query: str, yes: bool, no: bool) -> None:
    variables = {"yes": yes, "no": no}
    assert await results(PLANNED, query, variables) == await results(STOCK, query, variables)


PLAIN = (
    "subscription($id: ID!) { messageStream(messageId: $id) { __typename ... on MessageDelta { cursor kind text } } }"
)


def planned_kinds(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """The classes of events for which a plan is looked for from now on, each time."""
    planned: list[type] = []
    plan = EventExecutor._plan

    def watched(self: EventExecutor, kind: type) -> Any:
        planned.append(kind)
        return plan(self, kind)

    monkeypatch.setattr(EventExecutor, "_plan", watched)
    return planned


async def test_plain_events_are_planned_once_a_subscription(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = planned_kinds(monkeypatch)
    found = await results(PLANNED, PLAIN, {})
    assert [data["messageStream"].get("text") for data, _ in found] == ["hm", "héllo 🦉", None, "x", "y"]
    assert sorted(kind.__name__ for kind in planned) == ["MessageDelta", "MessagePartAdded"]


async def test_nothing_is_kept_for_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    executors: list[EventExecutor] = []
    build = EventExecutor.build_per_event_executor

    def watched(self: EventExecutor, payload: Any) -> Any:
        executors.append(self)
        return build(self, payload)

    monkeypatch.setattr(EventExecutor, "build_per_event_executor", watched)
    monkeypatch.setattr(graph.event_executor, "is_leaf_type", lambda _: False)
    await results(PLANNED, PLAIN, {})
    assert len(executors) == len(EVENTS)
    assert len(executors[0]._relevant_sub_fields) <= 2
