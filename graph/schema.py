"""The schema, put together. The one file of `graph` that imports resolvers."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection
from enum import Enum, EnumMeta
from typing import Any, NamedTuple

import strawberry
from graphql import GraphQLError, OperationDefinitionNode
from graphql import OperationType as GraphQLOperationType
from graphql.execution.values import VariableValues, get_variable_values
from strawberry.schema.config import StrawberryConfig
from strawberry.types import ExecutionResult
from strawberry.types.execution import ExecutionContext
from strawberry.types.graphql import OperationType

from graph.context import Context
from graph.event_executor import EventExecutor
from graph.limits import Checked, Documents, document_limits
from graph.plan import AbandonedError, Plan, UnplannedError, deciding_variables
from graph.scalars import SCALARS
from graph.subscription_plan import SubscriptionPlan, SubscriptionPlanner
from resolvers.account import AccountMutation
from resolvers.attachments import AttachmentMutation, AttachmentQuery
from resolvers.changes import ChangeSubscription
from resolvers.custom_providers import CustomProviderMutation
from resolvers.messages import MessageMutation, MessageQuery, MessageSubscription
from resolvers.models import ModelQuery
from resolvers.nodes import NodeQuery
from resolvers.projects import ProjectMutation, ProjectQuery
from resolvers.provider_keys import ProviderKeyMutation
from resolvers.search import SearchQuery
from resolvers.settings import SettingsMutation, SettingsQuery
from resolvers.sharing import SharingMutation, SharingQuery
from resolvers.threads import ThreadMutation, ThreadQuery
from resolvers.turns import TurnMutation
from resolvers.usage import UsageQuery, UsageSubscription
from resolvers.viewer import ViewerMutation, ViewerQuery
from services import errors

_ERROR_CODES = {
    "UNAUTHENTICATED": "No token, or one that is not valid (any more).",
    "FORBIDDEN": "The operator does not allow it, or not to an anonymous session.",
    "NOT_FOUND": "Missing, or somebody else's: the two look the same.",
    "BAD_USER_INPUT": "A value cannot be accepted; `field` names it.",
    "CONFLICT": "The idempotency key was used with other input.",
    "THREAD_BUSY": "An answer is being written in the thread.",
    "MODEL_UNAVAILABLE": "No such model is offered.",
    "PROVIDER_KEY_MISSING": "The model is known, but no key leads you to it: add one of yours, or enter it again.",
    "BUDGET_EXCEEDED": "The operator's budget for a user leaves no room for an answer; `resetsAt` (RFC 3339) says when "
    "it is renewed, `retryAfter` in how many seconds.",
    "CURSOR_INVALID": "Not a cursor of this list or of a message stream.",
    "CURSOR_MISMATCH": "A cursor of another message's stream.",
    "CURSOR_AHEAD": "A cursor of a position that does not exist (yet).",
    "PAYLOAD_TOO_LARGE": "Longer than the limit.",
    "QUOTA_EXCEEDED": "The viewer's files take all the room they may; delete some.",
    "RATE_LIMITED": "Too much in a short time; `retryAfter` says when to try again.",
    "UNAVAILABLE": "A part of the server is out of reach; try again after `retryAfter` seconds.",
    "GRAPHQL_PARSE_FAILED": "The document is not GraphQL.",
    "GRAPHQL_VALIDATION_FAILED": "The document does not fit the schema.",
    "QUERY_TOO_COMPLEX": "The document asks for more than one operation may.",
    "INTERNAL_SERVER_ERROR": "A defect of the server; `errorId` is in its log.",
}


def _error_code_enum() -> EnumMeta:
    """The services' codes as an enum of the schema, each described."""
    members = {
        code.name: strawberry.enum_value(code.value, description=_ERROR_CODES[code.name]) for code in errors.ErrorCode
    }
    # The members are made at run time, which mypy cannot follow.
    enum: EnumMeta = Enum("ErrorCode", members)  # type: ignore[misc]
    return strawberry.enum(
        enum,
        description="The values of `extensions.code` of an error. `extensions.field` and `extensions.retryAfter` "
        "(seconds) stand beside it where they help.",
    )


@strawberry.type(description="What can be asked. All but `__typename`, introspection and `sharedThread` needs a token.")
class Query(
    NodeQuery,
    ViewerQuery,
    ThreadQuery,
    MessageQuery,
    ProjectQuery,
    AttachmentQuery,
    SearchQuery,
    ModelQuery,
    SettingsQuery,
    SharingQuery,
    UsageQuery,
):
    """Root of queries."""


@strawberry.type(description="What can be changed. All but `startAnonymousSession` needs a token.")
class Mutation(
    ViewerMutation,
    TurnMutation,
    MessageMutation,
    ThreadMutation,
    ProjectMutation,
    SharingMutation,
    AttachmentMutation,
    SettingsMutation,
    ProviderKeyMutation,
    CustomProviderMutation,
    AccountMutation,
):
    """Root of mutations."""


@strawberry.type(description="What can be followed, over `graphql-transport-ws`.")
class Subscription(MessageSubscription, ChangeSubscription, UsageSubscription):
    """Root of subscriptions."""


_MAX_PLANS = 16
_TYPES = {
    GraphQLOperationType.QUERY: OperationType.QUERY,
    GraphQLOperationType.MUTATION: OperationType.MUTATION,
    GraphQLOperationType.SUBSCRIPTION: OperationType.SUBSCRIPTION,
}


class _Known(NamedTuple):
    checked: Checked
    operation: OperationDefinitionNode
    values: VariableValues


class Schema(strawberry.Schema):
    """Strawberry's schema, with plans for queries and mutations, and without its log of every client's mistakes.

    Errors are logged where they are formatted.
    """

    documents: Documents

    async def run(
        self,
        query: str,
        context: Context,
        *,
        variables: dict[str, Any] | None = None,
        operation_name: str | None = None,
        extensions: dict[str, Any] | None = None,
        allowed: Collection[OperationType],
    ) -> ExecutionResult:
        """Execute an operation: by a plan where the document is known and there is one, else as Strawberry does.

        Raises:
            InvalidOperationTypeError: it is none of the allowed.
            CannotGetOperationTypeError: the document has none of this name.
        """
        planned = await self.run_planned(query, context, variables or {}, operation_name, allowed)
        if planned is not None:
            return planned
        return await self.execute(
            query,
            variable_values=variables,
            context_value=context,
            operation_name=operation_name,
            operation_extensions=extensions,
            allowed_operation_types=allowed,
        )

    async def run_planned(
        self,
        query: str,
        context: Context,
        variables: dict[str, Any],
        operation_name: str | None,
        allowed: Collection[OperationType] = (OperationType.QUERY, OperationType.MUTATION),
    ) -> ExecutionResult | None:
        """Execute an operation by its plan; None where it is Strawberry that must, with the same context."""
        known = self._known(query, operation_name, variables, allowed)
        plan = None if known is None else self._plan(known)
        if known is None or not isinstance(plan, Plan):
            return None
        context.begin(known.operation)
        return await plan.execute(context, known.values)

    def follow_planned(
        self, query: str, context: Context, variables: dict[str, Any], operation_name: str | None
    ) -> AsyncGenerator[ExecutionResult, None] | None:
        """Begin a subscription by its plan; None where it is Strawberry that must, with the same context."""
        known = self._known(query, operation_name, variables, (OperationType.SUBSCRIPTION,))
        plan = None if known is None else self._plan(known)
        if known is None or not isinstance(plan, SubscriptionPlan):
            return None
        try:
            results = plan.follow(context, variables, known.values)
        except AbandonedError:
            return None
        context.begin(known.operation)
        return results

    def _known(
        self, query: str, operation_name: str | None, variables: dict[str, Any], allowed: Collection[OperationType]
    ) -> _Known | None:
        """An operation of a document that was checked and had no errors, of these types, with variables it can have."""
        checked = self.documents.find(query)
        operation = None if checked is None or checked.errors else checked.operations.get(operation_name)
        if checked is None or operation is None or _TYPES[operation.operation] not in allowed:
            return None
        if checked.weigh(operation_name, variables):
            return None
        values = get_variable_values(self._schema, operation.variable_definitions or (), variables)
        return None if isinstance(values, list) else _Known(checked, operation, values)

    def _plan(self, known: _Known) -> Plan | SubscriptionPlan | None:
        checked, operation, values = known
        deciding = checked.deciding
        if deciding is None:
            deciding = checked.deciding = deciding_variables(checked.document)
        place = (id(operation), *[values.coerced.get(name) for name in deciding]) if deciding else id(operation)
        if place not in checked.plans:
            # One that has many is not worth their memory, and may have been made to take it.
            if len(checked.plans) >= _MAX_PLANS:
                return None
            plan: Plan | SubscriptionPlan | None = None
            planner = SubscriptionPlanner(self._schema, self.schema_converter, checked.document, operation, values)
            try:
                follows = operation.operation is GraphQLOperationType.SUBSCRIPTION
                plan = planner.plan_subscription() if follows else planner.plan()
            except UnplannedError:
                pass
            except GraphQLError:
                # These variables do not go with the document, as null with `@include(if:)`: graphql-core says how.
                return None
            checked.plans[place] = plan
        return checked.plans[place]

    def process_errors(self, errors: list[GraphQLError], execution_context: ExecutionContext | None = None) -> None:
        """Nothing: see `graph.errors`."""


def build_schema(*, introspection: bool = True) -> Schema:
    """The schema as it is served.

    Args:
        introspection: whether it can be asked for; without it, errors do not suggest names either.
    """
    documents = Documents()
    schema = Schema(
        query=Query,
        mutation=Mutation,
        subscription=Subscription,
        types=[_error_code_enum()],
        extensions=[document_limits(documents, introspection=introspection)],
        execution_context_class=EventExecutor,
        config=StrawberryConfig(scalar_map=SCALARS, disable_field_suggestions=not introspection),
    )
    schema.documents = documents
    return schema
