"""What a resolver is given: who is asking, the services, and this operation's loaders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias
from uuid import UUID

from graphql import OperationDefinitionNode
from strawberry.dataloader import DataLoader
from strawberry.types import Info as StrawberryInfo

from models.records import MessageRecord
from services.accounts import Accounts
from services.attachments import Attachments
from services.changes import Changes
from services.claims import Claims
from services.custom_providers import CustomProviders
from services.errors import UnauthenticatedError, UnavailableError
from services.exports import Exports
from services.forks import Forks
from services.identity import Identities
from services.message_stream import DeltaFollower, MessageStream
from services.messages import Messages
from services.models import Models
from services.paging import Page
from services.projects import Projects
from services.provider_keys import ProviderKeys
from services.search import Search
from services.settings import UserSettings
from services.sharing import Sharing
from services.threads import Threads
from services.turns import Turns
from services.usage import Usage
from services.viewer import Sessions, Viewer
from services.wakeups import Wakeups


@dataclass(frozen=True, slots=True)
class Services:
    """Everything the resolvers may call. Made and closed by the composition root."""

    sessions: Sessions
    identities: Identities
    claims: Claims
    threads: Threads
    messages: Messages
    turns: Turns
    message_stream: MessageStream
    models: Models
    projects: Projects
    settings: UserSettings
    provider_keys: ProviderKeys
    custom_providers: CustomProviders
    forks: Forks
    sharing: Sharing
    changes: Changes
    wakeups: Wakeups
    usage: Usage
    accounts: Accounts
    exports: Exports
    attachments: Attachments
    search: Search


NOTHING_RETURNED: Final = object()


@dataclass
class Context:
    """The context of one operation.

    A WebSocket has one for all its operations as Strawberry sees it; the handler makes a fresh one for each.
    """

    services: Services
    viewer_or_none: Viewer | None = None
    refusal: UnauthenticatedError | UnavailableError | None = None
    """Why the token that was sent stands for nobody, if one was."""
    address: str | None = None
    """Where the operation came from, as far as the connection tells."""
    connection_params: dict[str, object] | None = field(default=None)
    loaders: dict[Any, DataLoader[Any, Any]] = field(default_factory=dict)
    """This operation's, by what they load (see `graph.batching`)."""
    messages_read: dict[Any, dict[UUID, Page[MessageRecord]]] = field(default_factory=dict)
    """Pages of messages that were read with the list of their threads: by what was asked for, and by thread."""
    tell_deltas: Callable[[Any], DeltaFollower] | None = None
    """Who tells this operation's deltas by their plan (`graph.deltas`), where the operation came by a socket."""
    operation_type: str = ""
    """`query`, `mutation` or `subscription`, once the document is known to be one that can be executed."""
    returned: Any = NOTHING_RETURNED
    """What the only root field of a mutation has returned, which must not be called again (see `graph.plan`)."""
    operation_name: str = ""
    """The operation's name in such a document; empty where it has none."""

    @property
    def viewer(self) -> Viewer:
        """Who is asking.

        Raises:
            UnauthenticatedError: nobody who showed a valid token.
            UnavailableError: somebody whose token cannot be verified now.
        """
        if self.viewer_or_none is None:
            raise self.refusal or UnauthenticatedError()
        return self.viewer_or_none

    def begin(self, operation: OperationDefinitionNode) -> None:
        """Note which operation this is, for whoever counts them."""
        self.operation_type = operation.operation.value
        self.operation_name = operation.name.value if operation.name is not None else ""

    async def announce(self, document: str | None) -> None:
        """Wake the viewer's feeds after an operation that may have changed something.

        A document that changes anything has this word in it; one that has it for another reason wakes for nothing.
        """
        if document is not None and "mutation" in document and self.viewer_or_none is not None:
            await self.services.wakeups.ring(self.viewer_or_none.id)


Info: TypeAlias = StrawberryInfo[Context, Any]
