"""Users' own keys for providers."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import strawberry

from services.provider_keys import ProviderKeyRecord

if TYPE_CHECKING:
    from graph.types.settings import Settings

LAST_FOUR = "Its last four characters, to tell keys apart; empty where the key is short."


@strawberry.type(description="A key of the viewer's own for a provider. The key itself is never shown again.")
class ProviderKey:
    """What may be seen of a key."""

    provider: str = strawberry.field(description="The provider's name.")
    last_four: str = strawberry.field(description=LAST_FOUR)
    usable: bool = strawberry.field(description="Whether models are asked with it.")
    problem: str | None = strawberry.field(description="Why it is not usable, as a sentence for its owner.")
    created_at: datetime = strawberry.field(description="When there first was a key for this provider.")
    updated_at: datetime = strawberry.field(description="When this key was set.")

    @classmethod
    def of(cls, record: ProviderKeyRecord) -> ProviderKey:
        """From its row."""
        return cls(
            provider=record.provider,
            last_four=record.last_four,
            usable=record.problem is None,
            problem=record.problem,
            created_at=record.created_at,
            updated_at=record.updated_at,
        )


@strawberry.input(description="A key to keep.")
class SetProviderKeyInput:
    """Input of `setProviderKey`."""

    provider: str = strawberry.field(description="The name of a provider, as models have it.")
    key: str = strawberry.field(
        description="The key: at most 500 visible ASCII characters; blanks around it are taken off. It is encrypted, "
        "and never shown again."
    )

    def __repr__(self) -> str:
        return f"SetProviderKeyInput(provider={self.provider!r})"


@strawberry.type(description="The key that is kept.")
class SetProviderKeyPayload:
    """Payload of `setProviderKey`."""

    provider_key: ProviderKey = strawberry.field(description="What is shown of it.")
    settings: Annotated[Settings, strawberry.lazy("graph.types.settings")] = strawberry.field(
        description="The settings as they are now."
    )


@strawberry.input(description="A key to forget.")
class DeleteProviderKeyInput:
    """Input of `deleteProviderKey`."""

    provider: str = strawberry.field(description="The name of the provider.")


@strawberry.type(description="The key that is gone.")
class DeleteProviderKeyPayload:
    """Payload of `deleteProviderKey`."""

    deleted_provider: str = strawberry.field(description="The name of the provider that it was for.")
    settings: Annotated[Settings, strawberry.lazy("graph.types.settings")] = strawberry.field(
        description="The settings as they are now."
    )
