"""The models that can be asked, and the provider behind each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from models.prices import ModelPrices
from providers.base import Provider


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """A model as users see it. `vendor_name` is what its provider calls it; `prices` None: not known."""

    id: str
    name: str
    provider: str
    vendor_name: str
    prices: ModelPrices | None = None


class UnknownModelError(KeyError):
    """No model of this id is offered."""


class ModelRegistry:
    """Which models there are. The first is the default where the operator names none.

    Args:
        models: each with the provider that streams it.
        default: id of the default model.

    Raises:
        UnknownModelError: the default is not among the models.
    """

    def __init__(self, models: Iterable[tuple[ModelRecord, Provider]], *, default: str | None = None) -> None:
        self._models = {model.id: (model, provider) for model, provider in models}
        if default is not None and default not in self._models:
            raise UnknownModelError(default)
        self._default = default or next(iter(self._models), None)

    @property
    def models(self) -> list[ModelRecord]:
        """Every model, in the order of the registry."""
        return [model for model, _ in self._models.values()]

    def find(self, model_id: str) -> ModelRecord | None:
        """The model of this id, if it is offered."""
        found = self._models.get(model_id)
        return found[0] if found else None

    def prices_of(self, model_id: str) -> ModelPrices | None:
        """What a model costs now; None where it is not known."""
        found = self.find(model_id)
        return found.prices if found else None

    def resolve(self, model_id: str | None) -> tuple[ModelRecord, Provider]:
        """The model to ask, and through what; None asks the default.

        Raises:
            UnknownModelError: it is not offered, or no model is.
        """
        wanted = model_id if model_id is not None else self._default
        if wanted is None or wanted not in self._models:
            raise UnknownModelError(wanted)
        return self._models[wanted]
