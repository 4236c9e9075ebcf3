"""What a user brought along to reach models with: keys, endpoints and models, as the registry takes them."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

from providers.catalog import Ability, Endpoint, WireFormat
from providers.registry import CUSTOM, NOTHING_OWN, OwnAccess, OwnModel
from services.custom_providers import CustomProviders
from services.provider_keys import ProviderKeys

if TYPE_CHECKING:
    from asyncpg import Connection

# Whether $1 has anything of their own. Most users have not: one statement then instead of three; before a turn none,
# for what is read there anyway tells this too.
HAS_OWN = """
EXISTS (SELECT FROM provider_keys WHERE owner_id = $1) OR EXISTS (SELECT FROM custom_models WHERE owner_id = $1)
"""
_HAS_OWN = f"SELECT {HAS_OWN}"


class OwnAccessReader:
    """Reads it; keys that cannot be read any more are told of as such."""

    def __init__(self, keys: ProviderKeys, custom: CustomProviders) -> None:
        self._keys = keys
        self._custom = custom

    async def read(self, connection: Connection, owner_id: UUID) -> OwnAccess:
        """What a user may use now."""
        if not await connection.fetchval(_HAS_OWN, owner_id):
            return NOTHING_OWN
        keys = await self._keys.of(connection, owner_id)
        own = await self._custom.of(connection, owner_id)
        # An endpoint goes with the key that was read with it: it may have moved since.
        by_name = {name: key.key for name, key in keys.items() if not name.startswith(CUSTOM)}
        by_name |= {CUSTOM + one.slug: one.key.key for one in own.providers if one.key is not None}
        return OwnAccess(
            keys=by_name,
            endpoints={
                one.slug: Endpoint(
                    name=CUSTOM + one.slug,
                    label=one.name,
                    format=WireFormat[one.format],
                    base_url=one.base_url,
                    # What most servers of one's own know.
                    output_limit_field="max_tokens",
                    guarded=True,
                )
                for one in own.providers
            },
            models=tuple(
                OwnModel(
                    provider=model.provider,
                    vendor_name=model.vendor_name,
                    name=model.name,
                    abilities=frozenset(Ability[ability] for ability in model.abilities),
                    context_tokens=model.context_tokens,
                    max_output_tokens=model.max_output_tokens,
                )
                for model in own.models
            ),
        )
