"""Subscription events without a whole execution each.

graphql-core makes an executor for every event, collects the selected fields anew, and keeps what it collected for as
long as the subscription is open: 10 objects an event, 7 MiB a second at 4,000 events/s. Most events of a token stream
are one object of plain attributes. For those the selection is compiled once per subscription and type, and an event is
one dict. Whatever is not plain is executed by graphql-core, which is also the oracle of the tests.

At 100 streams x 30 tokens/s this took CPU per event from 4.0 to 2.7 times that of a hand-written server
(docs/decisions/0009-planned-subscription-events.md).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from graphql import (
    ExecutionResult,
    GraphQLEnumType,
    GraphQLLeafType,
    GraphQLNonNull,
    GraphQLObjectType,
    GraphQLResolveInfo,
    GraphQLString,
    is_leaf_type,
)
from graphql.execution.collect_fields import collect_fields
from graphql.execution.middleware import MiddlewareManager
from graphql.type.definition import GraphQLResolveInfoHelpers
from strawberry.schema.schema import StrawberryGraphQLCoreExecutionContext

from graph.context import NOTHING_RETURNED

Field = tuple[str, str, Callable[[Any], Any]]
"""Response key, attribute, and how its value is written."""


class EventPlan:
    """How events of one type are written: the root's response key and the fields below it."""

    __slots__ = ("fields", "root_key")

    def __init__(self, root_key: str, fields: list[Field]) -> None:
        self.root_key = root_key
        self.fields = fields

    def result(self, payload: Any) -> ExecutionResult:
        """The result of one event."""
        data = {key: write(getattr(payload, attribute)) for key, attribute, write in self.fields}
        return ExecutionResult({self.root_key: data}, None)


class _PlannedEvent:
    """What graphql-core takes for the executor of one event."""

    __slots__ = ("_payload", "_plan")

    def __init__(self, plan: EventPlan, payload: Any) -> None:
        self._plan = plan
        self._payload = payload

    def execute_operation(self, serially: bool | None = None) -> ExecutionResult:
        """The event's result; nothing in it can fail or wait."""
        return self._plan.result(self._payload)


class _Returned(MiddlewareManager):
    """Has what the root field of a mutation has returned already in the place of its resolver."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self._value = value

    def get_field_resolver(self, field_resolver: Callable[..., Any]) -> Callable[..., Any]:
        """The resolver itself, but for the root."""

        def resolve(source: Any, info: GraphQLResolveInfo[Any], **arguments: Any) -> Any:
            return self._value if info.path.prev is None else field_resolver(source, info, **arguments)

        return resolve


class EventExecutor(StrawberryGraphQLCoreExecutionContext):
    """Strawberry's executor, with planned subscription events, and for what is left of a mutation by plan."""

    def execute_operation(self, serially: bool | None = None) -> Any:
        """Execute the operation; what its plan has done already is not done again."""
        returned = getattr(self.context_value, "returned", NOTHING_RETURNED)
        if returned is not NOTHING_RETURNED:
            self.middleware_manager = _Returned(returned)
        return super().execute_operation(serially)

    @cached_property
    def event_plans(self) -> dict[type, EventPlan | None]:
        """Of the classes of events that came; None where graphql-core must execute them."""
        return {}

    @property
    def async_helpers(self) -> GraphQLResolveInfoHelpers:
        """What resolvers may await things with, made when it is asked for.

        graphql-core keeps it, and with it a circle: each operation and all it held would stay until the garbage
        collector comes, which a server that collects seldom would pay with its memory.
        """
        return GraphQLResolveInfoHelpers(self.gather_async_work, self.track_async_work)

    @async_helpers.setter
    def async_helpers(self, helpers: GraphQLResolveInfoHelpers) -> None:
        del helpers

    def build_per_event_executor(self, payload: Any) -> Any:
        """An executor for one event: a planned one where the event's type is plain."""
        plans, kind = self.event_plans, type(payload)
        if kind not in plans:
            plans[kind] = self._plan(kind)
        plan = plans[kind]
        if plan is not None:
            return _PlannedEvent(plan, payload)
        executor = super().build_per_event_executor(payload)
        # Of its own: in the shared one graphql-core keeps an entry for every event.
        executor._relevant_sub_fields = {}  # noqa: SLF001 - there is no public way to
        return executor

    def _plan(self, kind: type) -> EventPlan | None:
        """The plan for events of a class, or None where graphql-core must execute them."""
        definition = getattr(kind, "__strawberry_definition__", None)
        event_type = self.schema.get_type(definition.name) if definition is not None else None
        root_type = self.schema.subscription_type
        if not isinstance(event_type, GraphQLObjectType) or root_type is None:
            return None
        roots = collect_fields(self.schema, self.fragments, self.variable_values, root_type, self.operation)
        if len(roots.grouped_field_set) != 1:
            return None
        root_key, root_nodes = next(iter(roots.grouped_field_set.items()))
        selected = self.collect_subfields(event_type, root_nodes)
        fields = [
            plain_field(event_type, key, nodes[0].node.name.value) for key, nodes in selected.grouped_field_set.items()
        ]
        plain = [field for field in fields if field is not None]
        return EventPlan(root_key, plain) if len(plain) == len(fields) else None


def plain_field(event_type: GraphQLObjectType, key: str, name: str) -> Field | None:
    """How to write a field that is a non-null leaf read from an attribute; None for any other."""
    if name == "__typename":
        type_name = event_type.name
        return key, "__class__", lambda _: type_name
    field = event_type.fields.get(name)
    definition = field.extensions.get("strawberry-definition") if field else None
    if field is None or definition is None or definition.base_resolver is not None:
        return None
    if not isinstance(field.type, GraphQLNonNull) or not is_leaf_type(field.type.of_type):
        return None
    return key, definition.python_name, _writer(field.type.of_type)


def _writer(leaf: GraphQLLeafType) -> Callable[[Any], Any]:
    """How a leaf's value is written."""
    if leaf is GraphQLString:
        return _same
    if isinstance(leaf, GraphQLEnumType):
        names = {member.value: name for name, member in leaf.values.items()}
        return lambda value: names[getattr(value, "value", value)]
    return leaf.coerce_output_value


def _same(value: Any) -> Any:
    return value
