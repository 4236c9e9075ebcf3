"""Budgets: what each user may consume in a day and a month (UTC), in tokens and in cost, held by reserving first.

A turn reserves the most it can consume before its answer begins. The reservation is in the row of the answer's stream,
and the statement that ends an answer deletes that row and inserts the usage event: what is reserved becomes what was
used, and no reader sees neither or both. All reservations of a user wait for one another at the user's row, so sends at
once cannot overshoot together.

What is reserved is an estimate (see `streams/tokens.py`), and what is counted is what the provider reports: a provider
that counts more than the estimate can carry a user past the limit by that difference, once for each answer in flight.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from models.prices import ModelPrices
from services.errors import BudgetExceededError
from services.viewer import Viewer

if TYPE_CHECKING:
    from asyncpg import Connection

_MILLION = 1_000_000

# FOR NO KEY UPDATE: reservations wait for one another, and no insert of a row that belongs to the user waits for them.
_LOCK_USER = "SELECT FROM users WHERE id = $1 FOR NO KEY UPDATE"
# One statement, so that an answer that ends meanwhile is found either reserved or used.
_TAKEN = """
WITH period AS (
    SELECT date_trunc('day', now(), 'UTC') AS day, date_trunc('month', now(), 'UTC') AS month
), used AS (
    SELECT sum(prompt_tokens + completion_tokens) AS month_tokens, sum(cost_micros) AS month_cost,
        sum(prompt_tokens + completion_tokens) FILTER (WHERE began_at >= day) AS day_tokens,
        sum(cost_micros) FILTER (WHERE began_at >= day) AS day_cost
    FROM usage_quarters, period WHERE owner_id = $1 AND began_at >= month
), reserved AS (
    SELECT coalesce(sum(reserved_tokens), 0) AS tokens, coalesce(sum(reserved_cost_micros), 0) AS cost
    FROM streams WHERE owner_id = $1
)
SELECT now() AS now,
    (coalesce(day_tokens, 0) + tokens)::bigint AS day_tokens, (coalesce(day_cost, 0) + cost)::bigint AS day_cost,
    (coalesce(month_tokens, 0) + tokens)::bigint AS month_tokens, (coalesce(month_cost, 0) + cost)::bigint AS month_cost
FROM used, reserved
"""


@dataclass(frozen=True, slots=True)
class BudgetLimits:
    """Most tokens (prompt and completion) and cost of a user; None: no limit. Most tokens of one answer under them."""

    tokens_per_day: int | None = None
    tokens_per_month: int | None = None
    cost_micros_per_day: int | None = None
    cost_micros_per_month: int | None = None
    answer_tokens: int = 4_096


@dataclass(frozen=True, slots=True)
class Reservation:
    """What a turn holds of its owner's budget, and how many tokens its answer may have (None: as many as it likes)."""

    tokens: int = 0
    cost_micros: int = 0
    answer_tokens: int | None = None


class Budgets:
    """The operator's budgets. Anonymous users are users too."""

    def __init__(self, limits: BudgetLimits) -> None:
        self._limits = limits
        self.of_tokens = limits.tokens_per_day is not None or limits.tokens_per_month is not None
        self.of_cost = limits.cost_micros_per_day is not None or limits.cost_micros_per_month is not None

    @property
    def any(self) -> bool:
        """Whether there is a budget. Without one nothing is locked, read or reserved."""
        return self.of_tokens or self.of_cost

    async def lock(self, connection: Connection, viewer: Viewer) -> None:
        """Make the user's other turns wait until this transaction ends.

        First of all locks of a transaction. Whoever holds a thread or a stream asks of the user's row only what foreign
        keys ask, which this lock grants: nobody who is waited for here can be waiting for it.
        """
        await connection.execute(_LOCK_USER, viewer.id)

    async def reserve(
        self, connection: Connection, viewer: Viewer, prompt_tokens: int, prices: ModelPrices | None
    ) -> Reservation:
        """What a turn with such a prompt reserves. The transaction holds `lock`, and writes it with the turn's stream.

        A model without known prices is free of the limits of cost, as is one that costs nothing.

        Raises:
            BudgetExceededError: not a single token of an answer would fit.
        """
        taken = await connection.fetchrow(_TAKEN, viewer.id)
        cost = None if prices is None or prices.free or not self.of_cost else _Cost(prompt_tokens, prices)
        if not self.of_tokens and cost is None:
            return Reservation()
        limits, grant = self._limits, self._limits.answer_tokens
        exceeded: list[datetime] = []
        for tokens, cost_micros, period in (
            (limits.tokens_per_day, limits.cost_micros_per_day, "day"),
            (limits.tokens_per_month, limits.cost_micros_per_month, "month"),
        ):
            room = self._limits.answer_tokens
            if tokens is not None:
                room = min(room, tokens - taken[f"{period}_tokens"] - prompt_tokens)
            if cost_micros is not None and cost is not None:
                room = min(room, cost.answer_tokens(cost_micros - taken[f"{period}_cost"]))
            if room < 1:
                exceeded.append(_next(period, taken["now"]))
            grant = min(grant, room)
        if exceeded:
            raise BudgetExceededError(max(exceeded), now=taken["now"])
        return Reservation(prompt_tokens + grant, 0 if cost is None else cost.micros(grant), grant)


class _Cost:
    """What a turn can cost at most: as if the prompt's tokens were of the dearer of their two kinds."""

    def __init__(self, prompt_tokens: int, prices: ModelPrices) -> None:
        self._prompt_tokens = prompt_tokens
        self._prompt_price = max(prices.prompt, prices.cached)
        self._answer_price = prices.completion

    def micros(self, answer_tokens: int) -> int:
        """The cost with so many tokens of an answer, rounded up."""
        exact = self._prompt_tokens * self._prompt_price + answer_tokens * self._answer_price
        return -(-exact // _MILLION)

    def answer_tokens(self, micros: int) -> int:
        """How many tokens of an answer so much pays for, the prompt paid; less than 1 where it does not."""
        left = micros * _MILLION - self._prompt_tokens * self._prompt_price
        if left < 0:
            return 0
        return left // self._answer_price if self._answer_price else 2**31 - 1


def _next(period: str, now: datetime) -> datetime:
    """When the day or month that `now` lies in is over, in UTC."""
    today = now.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    if period == "day":
        return today + timedelta(days=1)
    return (today.replace(day=1) + timedelta(days=32)).replace(day=1)
