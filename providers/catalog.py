"""The file of models: which there are, what they can do, what they cost, and which providers have them.

`models.toml` beside this file is the server's own; an operator's file of the same form adds to it and changes it. Both
are read once, at start, and what is wrong with one is said by the name of the table and the field.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, TypeAlias

from models.prices import MAX_PRICE, ModelPrices

OWN_FILE = Path(__file__).with_name("models.toml")
MAX_FILE_BYTES = 1024 * 1024
OPENROUTER = "openrouter"
OutputLimitField: TypeAlias = Literal["max_completion_tokens", "max_tokens"]

_MAX_TOKENS = 2**31 - 1
# No colon: what stands before one is not a vendor but a kind of model (`custom:…`).
_MODEL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/@+-]{0,199}", re.ASCII)
_PROVIDER = re.compile(r"[a-z0-9][a-z0-9-]{0,39}", re.ASCII)


class Ability(StrEnum):
    """What a model can do beyond answering text with text."""

    VISION = "vision"
    PDF = "pdf"
    REASONING = "reasoning"
    EFFORT = "effort"
    TOOLS = "tools"
    IMAGE_OUTPUT = "image-output"


class WireFormat(StrEnum):
    """How a provider is spoken to; an adapter for each."""

    CHAT_COMPLETIONS = "chat-completions"
    ANTHROPIC_MESSAGES = "anthropic-messages"


class CatalogError(ValueError):
    """A file of models cannot be used; the text says where in it and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A provider's address and how it is spoken to.

    Attributes:
        name: what keys are stored under; `custom:<slug>` for a user's own.
        lacks: abilities that models do not have through it.
        output_limit_field: where the limit of an answer goes in the chat-completions format.
        needs_key: whether it is offered only where there is a key for it.
        guarded: the address came from a user, and may not lead inside.
    """

    name: str
    label: str
    format: WireFormat
    base_url: str
    lacks: frozenset[Ability] = frozenset()
    output_limit_field: OutputLimitField = "max_completion_tokens"
    needs_key: bool = True
    guarded: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogModel:
    """A model, and what each provider calls it; the providers in the order in which they are preferred.

    `abilities` None: nobody said. `context_tokens` is all that a request and its answer may have together.
    """

    id: str
    name: str
    providers: Mapping[str, str]
    abilities: frozenset[Ability] | None = None
    context_tokens: int | None = None
    max_output_tokens: int | None = None
    prices: ModelPrices | None = None


@dataclass(frozen=True, slots=True)
class Catalog:
    """All providers and models, by their ids, in the order of the files."""

    providers: Mapping[str, Endpoint] = field(default_factory=dict)
    models: Mapping[str, CatalogModel] = field(default_factory=dict)

    def with_base_url(self, provider: str, base_url: str) -> Catalog:
        """The same with another address for a provider, which may want no key there."""
        endpoint = replace(self.providers[provider], base_url=base_url, needs_key=False)
        return Catalog({**self.providers, provider: endpoint}, self.models)

    def with_only(self, provider: str, vendor_names: Iterable[str]) -> Catalog:
        """The same with exactly these models of a provider; those that no table has are known by their name alone.

        Raises:
            CatalogError: a name is taken by a model of other providers.
        """
        models = {model.id: _without(model, provider) for model in self.models.values()}
        ids = {model.providers[provider]: model.id for model in self.models.values() if provider in model.providers}
        for name in vendor_names:
            if (known := ids.get(name)) is not None:
                models[known] = self.models[known]
            elif name in models and models[name].providers:
                raise CatalogError(f"{name!r} is the id of a model of {' and '.join(models[name].providers)}")
            else:
                models[name] = CatalogModel(id=_model_id(name), name=name, providers={provider: name})
        return Catalog(self.providers, {model.id: model for model in models.values() if model.providers})


def _without(model: CatalogModel, provider: str) -> CatalogModel:
    return replace(model, providers={name: vendor for name, vendor in model.providers.items() if name != provider})


def load_catalog(operators_file: Path | None = None) -> Catalog:
    """The server's own models with an operator's additions and changes.

    Raises:
        CatalogError: a file cannot be read, is not TOML, or holds something that cannot be used.
    """
    tables = _read(OWN_FILE)
    if operators_file is not None:
        for kind, named in _read(operators_file).items():
            for name, changes in named.items():
                before = tables[kind].get(name, {})
                tables[kind][name] = before | changes
                if kind == "models" and "providers" in changes and "providers" in before:
                    tables[kind][name]["providers"] = before["providers"] | changes["providers"]
    providers = {name: _endpoint(name, table) for name, table in tables["providers"].items()}
    models = {
        name: _model(name, table, providers)
        for name, table in tables["models"].items()
        if _taken(table, f"models.{name}", "offered", bool, True)
    }
    return Catalog(providers, models)


def _read(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """The tables of a file: kind, name, fields; every level checked to be a table."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise CatalogError(f"the file has more than {MAX_FILE_BYTES} bytes")
        found = tomllib.loads(content.decode(), parse_float=Decimal)
    except OSError as error:
        raise CatalogError(f"the file cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise CatalogError(f"the file is not TOML ({error})") from error
    _known(found, "the file", {"providers", "models"})
    for kind in ("providers", "models"):
        named = found.setdefault(kind, {})
        if not isinstance(named, dict) or not all(isinstance(table, dict) for table in named.values()):
            raise CatalogError(f"[{kind}.…]: tables with names are wanted here")
    for name, table in found["models"].items():
        if not isinstance(table.get("providers", {}), dict):
            raise CatalogError(f'models.{name}: providers: a table such as {{ openai = "…" }} is wanted')
    return found


def _endpoint(name: str, table: dict[str, Any]) -> Endpoint:
    where = f"providers.{name}"
    if _PROVIDER.fullmatch(name) is None:
        raise CatalogError(f"{where}: a name has small letters, digits and hyphens, 40 at most")
    _known(table, where, {"name", "format", "base_url", "lacks", "output_limit_field", "needs_key"})
    limit_field: Any = _taken(table, where, "output_limit_field", str, "max_completion_tokens")
    if limit_field not in ("max_completion_tokens", "max_tokens"):
        raise CatalogError(f"{where}: output_limit_field: max_completion_tokens or max_tokens")
    return Endpoint(
        name=name,
        label=_taken(table, where, "name", str, name),
        format=_enum(WireFormat, _taken(table, where, "format", str), where, "format"),
        base_url=_taken(table, where, "base_url", str),
        lacks=_abilities(table, where, "lacks") or frozenset(),
        output_limit_field=limit_field,
        needs_key=_taken(table, where, "needs_key", bool, True),
    )


def _model(model_id: str, table: dict[str, Any], providers: Mapping[str, Endpoint]) -> CatalogModel:
    where = f"models.{_model_id(model_id)}"
    allowed = {"name", "abilities", "context_tokens", "max_output_tokens", "prices", "providers", "offered"}
    _known(table, where, allowed)
    by_provider = _taken(table, where, "providers", dict)
    if not by_provider or not all(isinstance(vendor, str) and vendor.strip() for vendor in by_provider.values()):
        raise CatalogError(f"{where}: providers: at least one, each with what it calls the model")
    if unknown := by_provider.keys() - providers.keys():
        raise CatalogError(f"{where}: providers: there is no provider {min(unknown)!r}")
    return CatalogModel(
        id=model_id,
        name=_taken(table, where, "name", str, model_id),
        # Straight to a vendor first; through OpenRouter only where that is all there is.
        providers=dict(sorted(by_provider.items(), key=lambda entry: entry[0] == OPENROUTER)),
        abilities=_abilities(table, where, "abilities"),
        context_tokens=_count(table, where, "context_tokens"),
        max_output_tokens=_count(table, where, "max_output_tokens"),
        prices=_prices(table, where),
    )


def _model_id(text: str) -> str:
    if _MODEL_ID.fullmatch(text) is None:
        raise CatalogError(f"models.{text!r}: an id has letters, digits and . _ / @ + -, 200 at most")
    return text


def _prices(table: dict[str, Any], where: str) -> ModelPrices | None:
    prices = _taken(table, where, "prices", dict, None)
    if prices is None:
        return None
    where = f"{where}: prices"
    _known(prices, where, {"prompt", "cached", "completion"})
    return ModelPrices(*(_price(prices, where, name) for name in ("prompt", "cached", "completion")))


def _price(prices: dict[str, Any], where: str, name: str) -> int:
    """Millionths of the currency for a million tokens, from the currency's own unit."""
    value = prices.get(name)
    if isinstance(value, bool) or not isinstance(value, int | Decimal) or not Decimal(value).is_finite():
        raise CatalogError(f"{where}: {name}: a number is wanted, for a million tokens")
    micros = Decimal(value) * 1_000_000
    if micros != micros.to_integral_value() or not 0 <= micros <= MAX_PRICE:
        raise CatalogError(f"{where}: {name}: from 0 to {MAX_PRICE // 1_000_000}, with six decimals at most")
    return int(micros)


def _abilities(table: dict[str, Any], where: str, name: str) -> frozenset[Ability] | None:
    abilities = _taken(table, where, name, list, None)
    if abilities is None:
        return None
    return frozenset(_enum(Ability, ability, where, name) for ability in abilities)


def _count(table: dict[str, Any], where: str, name: str) -> int | None:
    count = _taken(table, where, name, int, None)
    if count is not None and (isinstance(count, bool) or not 1 <= count <= _MAX_TOKENS):
        raise CatalogError(f"{where}: {name}: a whole number from 1 to {_MAX_TOKENS}")
    return count


def _enum(kind: Any, value: Any, where: str, name: str) -> Any:
    try:
        return kind(value)
    except ValueError:
        raise CatalogError(f"{where}: {name}: one of {', '.join(kind)}") from None


_REQUIRED: Any = object()
_KINDS = {str: "a text", list: "a list", dict: "a table", int: "a whole number", bool: "true or false"}


def _taken(table: dict[str, Any], where: str, name: str, kind: Any, default: Any = _REQUIRED) -> Any:
    value = table.get(name, default)
    if value is _REQUIRED or (value is not default and not isinstance(value, kind)):
        raise CatalogError(f"{where}: {name}: {_KINDS[kind]} is wanted")
    return value


def _known(table: dict[str, Any], where: str, allowed: set[str]) -> None:
    if unknown := table.keys() - allowed:
        raise CatalogError(f"{where}: there is no field {min(unknown)!r}; there are {', '.join(sorted(allowed))}")
