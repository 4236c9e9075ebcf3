"""Subscriptions compiled once, and then begun without Strawberry and graphql-core.

To begin one cost them more than to read what a reader has missed: that is a list of pieces joined, and one frame. A
plan coerces the arguments and calls the resolver. graphql-core executes events, but for those of plain fields
(`graph.event_executor`), and makes an executor when the first of the others comes; deltas go by `graph.deltas`.
Whatever else a subscription does, and how it fails, is as Strawberry's `stream` has it, which remains for documents
that are seen for the first time; a test compares both.

Measured in docs/decisions/0027-planned-subscriptions.md.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from inspect import isasyncgenfunction
from typing import Any, cast

from graphql import DocumentNode, GraphQLError, GraphQLSchema
from graphql.execution.collect_fields import collect_fields
from graphql.execution.values import VariableValues
from strawberry.types import ExecutionResult

from graph.context import Context
from graph.deltas import DeltaPlace, delta_place
from graph.event_executor import EventExecutor, EventPlan
from graph.plan import AbandonedError, Planner, Run, UnplannedError, definition_of


class SubscriptionInfo:
    """What a resolver is given in place of Strawberry's Info: the context, and where its deltas' plan is found."""

    __slots__ = ("context", "deltas")

    def __init__(self, context: Context, deltas: DeltaPlace | None) -> None:
        self.context = context
        self.deltas = deltas


class SubscriptionPlan:
    """A compiled subscription.

    Args:
        begin: calls the resolver.
        deltas: see `graph.deltas`.
    """

    def __init__(
        self,
        schema: GraphQLSchema,
        document: DocumentNode,
        operation_name: str | None,
        begin: Callable[[SubscriptionInfo, Run], AsyncGenerator[Any, None]],
        deltas: DeltaPlace | None,
    ) -> None:
        self._schema = schema
        self._document = document
        self._operation_name = operation_name
        self._begin = begin
        self._deltas = deltas
        # By class. What decides of them is what decides whether this plan is used.
        self._events: dict[type, EventPlan | None] = {}

    def follow(
        self, context: Context, variables: dict[str, Any], values: VariableValues
    ) -> AsyncGenerator[ExecutionResult, None]:
        """The results, as they come.

        Args:
            variables: as they were sent.
            values: the same, coerced.

        Raises:
            AbandonedError: graphql-core shall say what is wrong with the arguments.
        """
        try:
            source = self._begin(SubscriptionInfo(context, self._deltas), Run(context, values))
        except Exception as error:
            raise AbandonedError from error
        return self._results(source, context, variables)

    async def _results(
        self, source: AsyncGenerator[Any, None], context: Context, variables: dict[str, Any]
    ) -> AsyncGenerator[ExecutionResult, None]:
        executor: EventExecutor | None = None
        try:
            async with aclosing(source):
                async for event in source:
                    plan = self._events.get(type(event))
                    if plan is not None:
                        result = plan.result(event)
                    else:
                        executor = executor or self._executor(context, variables)
                        result = executor.build_per_event_executor(event).execute_operation()
                        if isinstance(result, Awaitable):
                            result = await result
                    yield ExecutionResult(data=result.data, errors=result.errors)
        except Exception as error:
            # In no name of this frame, which the error leads back to: they would hold each other.
            yield _failure(error)

    def _executor(self, context: Context, variables: dict[str, Any]) -> EventExecutor:
        built = EventExecutor.build(
            self._schema,
            self._document,
            context_value=context,
            raw_variable_values=variables,
            operation_name=self._operation_name,
        )
        assert isinstance(built, EventExecutor), "the variables were coerced before"
        built.event_plans = self._events
        return built


def _failure(error: Exception) -> ExecutionResult:
    located = error if isinstance(error, GraphQLError) else GraphQLError(str(error), original_error=error)
    return ExecutionResult(data=None, errors=[located])


class SubscriptionPlanner(Planner):
    """Makes the plan of one subscription; see `Planner`."""

    def plan_subscription(self) -> SubscriptionPlan:
        """The plan."""
        schema, operation, values = self._schema, self._operation, self._variables
        root = schema.subscription_type
        assert root is not None
        fields = collect_fields(schema, self._fragments, values, root, operation).grouped_field_set
        if len(fields) != 1:
            raise UnplannedError
        ((key, details),) = fields.items()
        definition, field = definition_of(root, details[0].node.name.value)
        resolver = field.base_resolver
        if resolver is None or resolver.parent_parameter or resolver.root_parameter or resolver.info_parameter is None:
            raise UnplannedError(key)
        function = cast("Callable[..., AsyncGenerator[Any, None]]", resolver.wrapped_func)
        if not isasyncgenfunction(function):
            raise UnplannedError(key)
        info, arguments = resolver.info_parameter.name, self._arguments(definition, field, details[0].node)
        root_object = (None,) if resolver.self_parameter else ()

        def begin(planned: SubscriptionInfo, run: Run) -> AsyncGenerator[Any, None]:
            return function(*root_object, **arguments(run), **{info: planned})

        name = None if operation.name is None else operation.name.value
        deltas = delta_place(schema, self._fragments, values, operation, root)
        return SubscriptionPlan(schema, self._document, name, begin, deltas)
