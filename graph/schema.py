"""The schema, put together. The one file of `graph` that imports resolvers."""

from __future__ import annotations

from enum import Enum, EnumMeta

import strawberry
from graphql import GraphQLError
from strawberry.schema.config import StrawberryConfig
from strawberry.types.execution import ExecutionContext

from graph.event_executor import EventExecutor
from graph.limits import document_limits
from graph.scalars import SCALARS
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


class Schema(strawberry.Schema):
    """Strawberry's schema without its log of every client's mistakes: errors are logged where they are formatted."""

    def process_errors(self, errors: list[GraphQLError], execution_context: ExecutionContext | None = None) -> None:
        """Nothing: see `graph.errors`."""


def build_schema(*, introspection: bool = True) -> Schema:
    """The schema as it is served.

    Args:
        introspection: whether it can be asked for; without it, errors do not suggest names either.
    """
    return Schema(
        query=Query,
        mutation=Mutation,
        subscription=Subscription,
        types=[_error_code_enum()],
        extensions=[document_limits(introspection=introspection)],
        execution_context_class=EventExecutor,
        config=StrawberryConfig(scalar_map=SCALARS, disable_field_suggestions=not introspection),
    )
