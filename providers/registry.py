"""Which model is asked through what: the models there are, and the choice among the keys that lead to them.

A model is asked, by the first of these that there is:

1. through a provider that has it, with the user's own key for that provider;
2. through OpenRouter, with the user's own key for that;
3. with the operator's key for any provider that has it.

A user's key that cannot be read any more takes its provider out of the choice for that user, the operator's key for it
included: falling back in silence would spend somebody else's money, and hide from the user what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from models.prices import ModelPrices
from providers.base import Provider
from providers.catalog import OPENROUTER, Ability, Catalog, CatalogModel, Endpoint

CUSTOM = "custom:"


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """A model as users see it, with the provider it is asked through.

    `vendor_name` is what that provider calls it; `prices` None: not known; `abilities` None: nobody said.
    """

    id: str
    name: str
    provider: str
    vendor_name: str
    prices: ModelPrices | None = None
    abilities: frozenset[Ability] | None = None
    context_tokens: int | None = None
    max_output_tokens: int | None = None
    own_key: bool = False

    @property
    def custom(self) -> bool:
        """Whether a user made it."""
        return self.id.startswith(CUSTOM)

    @property
    def reserved_tokens(self) -> int:
        """What is kept of its context for an answer: a quarter, unless the model writes less at most."""
        if self.context_tokens is None:
            return 0
        return min(self.max_output_tokens or self.context_tokens, self.context_tokens // 4)

    def possible_answer(self, prompt_tokens: int) -> int | None:
        """The most tokens that it can write behind a prompt of about so many; None: not known."""
        if self.context_tokens is None:
            return self.max_output_tokens
        room = max(self.context_tokens - prompt_tokens, self.reserved_tokens, 1)
        return min(self.max_output_tokens or room, room)

    def can(self, ability: Ability, *, unless_known: bool = False) -> bool:
        """Whether it has an ability; what to believe where nobody said is the caller's to know."""
        return unless_known if self.abilities is None else ability in self.abilities


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnModel:
    """A model that a user made: of an endpoint of their own, or of a provider that the catalog has."""

    provider: str
    vendor_name: str
    name: str
    abilities: frozenset[Ability] | None = None
    context_tokens: int | None = None
    max_output_tokens: int | None = None

    @property
    def id(self) -> str:
        """What `modelId` arguments take."""
        return f"{CUSTOM}{self.provider}/{self.vendor_name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnAccess:
    """What a user brought along.

    Attributes:
        keys: by provider; None where there is one that cannot be read any more.
        endpoints: the user's own, by their slugs.
    """

    keys: Mapping[str, str | None] = field(default_factory=dict, repr=False)
    endpoints: Mapping[str, Endpoint] = field(default_factory=dict)
    models: tuple[OwnModel, ...] = ()


NOTHING_OWN = OwnAccess()


class UnknownModelError(KeyError):
    """No model of this id is offered."""


class MissingKeyError(Exception):
    """The model is known, but no key leads to it.

    Args:
        providers: names of those that have it, to be shown.
        unreadable: the provider whose key is there but cannot be read.
    """

    def __init__(self, providers: list[str], unreadable: str | None) -> None:
        super().__init__(", ".join(providers))
        self.providers = providers
        self.unreadable = unreadable


@dataclass(frozen=True, slots=True)
class _Route:
    endpoint: Endpoint
    vendor_name: str
    key: str | None = field(repr=False)
    own: bool


Connect = Callable[[Endpoint, str | None], Provider]


class ModelRegistry:
    """The models there are, and how each user reaches them.

    Args:
        catalog: what the files of models say.
        operators: what everybody may use, by provider: adapters with the operator's keys, closed by the caller.
        connect: makes an adapter for an endpoint and a user's key, which lives as long as an answer.
        fixed: models that need no key, each with what streams it; after those of the catalog.
        default: id of the default model; None: the first one that a user can use.

    Raises:
        UnknownModelError: the default is not among the models.
    """

    def __init__(
        self,
        catalog: Catalog | None = None,
        *,
        operators: Mapping[str, Provider] | None = None,
        connect: Connect | None = None,
        fixed: Iterable[tuple[ModelRecord, Provider]] = (),
        default: str | None = None,
    ) -> None:
        self._catalog = catalog or Catalog()
        self._operators = dict(operators or {})
        self._connect = connect
        self._fixed = {model.id: (model, provider) for model, provider in fixed}
        if default is not None and self.find(default) is None:
            raise UnknownModelError(default)
        self._default = default

    @property
    def providers(self) -> Mapping[str, Endpoint]:
        """The providers that take a user's key, by name."""
        return self._catalog.providers

    def find(self, model_id: str) -> ModelRecord | None:
        """The model of this id, whether or not a user can use it; through the operator's provider, if there is one."""
        if (fixed := self._fixed.get(model_id)) is not None:
            return fixed[0]
        model = self._catalog.models.get(model_id)
        if model is None:
            return None
        route = self._route(model, NOTHING_OWN)
        name, vendor = next(iter(model.providers.items()))
        return _record(model, route or _Route(self._catalog.providers[name], vendor, None, own=False))

    def prices_of(self, model_id: str) -> ModelPrices | None:
        """What a model costs now; None where it is not known."""
        found = self.find(model_id)
        return found.prices if found else None

    def available(self, own: OwnAccess = NOTHING_OWN) -> list[ModelRecord]:
        """Every model that a user can use, in the order of the files; theirs first."""
        theirs = (self._own_record(model, own) for model in own.models)
        routes = ((model, self._route(model, own)) for model in self._catalog.models.values())
        return [
            *(record for record in theirs if record is not None),
            *(_record(model, route) for model, route in routes if route is not None),
            *(record for record, _ in self._fixed.values()),
        ]

    def describe(self, model_id: str, own: OwnAccess) -> ModelRecord | None:
        """The model of this id as this user would choose it: known, or made by them; usable or not."""
        if not model_id.startswith(CUSTOM):
            return self.find(model_id)
        model = next((model for model in own.models if model.id == model_id), None)
        if model is None:
            return None
        return self._own_record(model, own) or _own_record(model, own_key=False)

    def resolve(self, model_id: str | None, own: OwnAccess = NOTHING_OWN) -> tuple[ModelRecord, Provider]:
        """The model to ask, and through what; None asks the default.

        Raises:
            UnknownModelError: it is not offered, or no model is.
            MissingKeyError: it is, but nothing leads this user to it.
        """
        if model_id is None:
            model_id = self._default_for(own)
        if (fixed := self._fixed.get(model_id)) is not None:
            return fixed
        if model_id.startswith(CUSTOM):
            return self._resolve_own(model_id, own)
        model = self._catalog.models.get(model_id)
        if model is None:
            raise UnknownModelError(model_id)
        route = self._route(model, own)
        if route is None:
            unreadable = next((self._label(name) for name in model.providers if _unreadable(name, own)), None)
            raise MissingKeyError([self._label(name) for name in model.providers], unreadable)
        return _record(model, route), self._connected(route)

    def _default_for(self, own: OwnAccess) -> str:
        available = [record.id for record in self.available(own)]
        if self._default is not None and (self._default in available or not available):
            return self._default
        if not available:
            raise UnknownModelError(None)
        # What a user made is asked where they choose it, not because it is listed first.
        return next((model_id for model_id in available if not model_id.startswith(CUSTOM)), available[0])

    def _route(self, model: CatalogModel, own: OwnAccess) -> _Route | None:
        # The providers are in their order already: OpenRouter last.
        for name, vendor in model.providers.items():
            if (key := own.keys.get(name)) is not None:
                return _Route(self._catalog.providers[name], vendor, key, own=True)
        for name, vendor in model.providers.items():
            if name in self._operators and not _unreadable(name, own):
                return _Route(self._catalog.providers[name], vendor, None, own=False)
        return None

    def _resolve_own(self, model_id: str, own: OwnAccess) -> tuple[ModelRecord, Provider]:
        model = next((model for model in own.models if model.id == model_id), None)
        if model is None:
            raise UnknownModelError(model_id)
        route = self._own_route(model, own)
        if route is None:
            label = self._label(model.provider)
            raise MissingKeyError([label], label if self._is_unreadable(model, own) else None)
        return _own_record(model, own_key=route.key is not None), self._connected(route)

    def _own_record(self, model: OwnModel, own: OwnAccess) -> ModelRecord | None:
        route = self._own_route(model, own)
        return None if route is None else _own_record(model, own_key=route.key is not None)

    def _own_route(self, model: OwnModel, own: OwnAccess) -> _Route | None:
        """By the user's key alone: what the operator pays for is what the operator listed."""
        if (endpoint := own.endpoints.get(model.provider)) is not None:
            if _unreadable(endpoint.name, own):
                return None
            return _Route(endpoint, model.vendor_name, own.keys.get(endpoint.name), own=True)
        listed = self._catalog.providers.get(model.provider)
        key = own.keys.get(model.provider)
        return None if listed is None or key is None else _Route(listed, model.vendor_name, key, own=True)

    def _is_unreadable(self, model: OwnModel, own: OwnAccess) -> bool:
        endpoint = own.endpoints.get(model.provider)
        return _unreadable(model.provider if endpoint is None else endpoint.name, own)

    def _connected(self, route: _Route) -> Provider:
        if not route.own:
            return self._operators[route.endpoint.name]
        assert self._connect is not None, "keys of users need a way to connect"
        return self._connect(route.endpoint, route.key)

    def _label(self, provider: str) -> str:
        endpoint = self._catalog.providers.get(provider)
        return endpoint.label if endpoint else provider


def _unreadable(provider: str, own: OwnAccess) -> bool:
    return own.keys.get(provider, "") is None


def _record(model: CatalogModel, route: _Route) -> ModelRecord:
    abilities = None if model.abilities is None else model.abilities - route.endpoint.lacks
    return ModelRecord(
        id=model.id,
        name=model.name,
        provider=route.endpoint.name,
        vendor_name=route.vendor_name,
        prices=model.prices,
        abilities=abilities,
        context_tokens=model.context_tokens,
        max_output_tokens=model.max_output_tokens,
        own_key=route.own,
    )


def _own_record(model: OwnModel, *, own_key: bool) -> ModelRecord:
    return ModelRecord(
        id=model.id,
        name=model.name,
        provider=model.provider,
        vendor_name=model.vendor_name,
        abilities=model.abilities,
        context_tokens=model.context_tokens,
        max_output_tokens=model.max_output_tokens,
        own_key=own_key,
    )


__all__ = [
    "CUSTOM",
    "NOTHING_OWN",
    "OPENROUTER",
    "MissingKeyError",
    "ModelRecord",
    "ModelRegistry",
    "OwnAccess",
    "OwnModel",
    "UnknownModelError",
]
