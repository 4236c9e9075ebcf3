"""What tokens cost: a snapshot of a model's prices, and the one sum that is made of it."""

from __future__ import annotations

from dataclasses import dataclass

from models.records import MessageTokens

_MILLION = 1_000_000
MAX_PRICE = 10**12


@dataclass(frozen=True, slots=True)
class ModelPrices:
    """Prices of a model, in millionths of the operator's currency for a million tokens: in 10^-12 of it for a token.

    `cached` is the price of those tokens of a prompt that the provider had in its cache.
    """

    prompt: int
    cached: int
    completion: int

    def cost_micros(self, tokens: MessageTokens) -> int:
        """What these tokens cost, in millionths of the currency, rounded half up.

        Cached tokens are a share of the prompt's: where a provider reports more of them, all of the prompt was cached.
        """
        cached = min(tokens.cached, tokens.prompt)
        exact = (
            (tokens.prompt - cached) * self.prompt + cached * self.cached + tokens.completion * self.completion
        )  # in 10^-12 of the currency
        return (exact + _MILLION // 2) // _MILLION

    @property
    def free(self) -> bool:
        """Whether nothing costs anything."""
        return self.prompt == self.cached == self.completion == 0
