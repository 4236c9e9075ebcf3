"""What was used: reports and totals."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from enum import Enum
from itertools import pairwise

import strawberry

from graph.scalars import BigInt
from graph.types.model import gone_name
from providers.registry import ModelRecord
from services import usage as services


@strawberry.enum(description="How long a usage report reaches back, and into what it is cut.")
class UsageTimeframe(Enum):
    """The timeframes of a report."""

    DAY = strawberry.enum_value(
        "DAY", description="24 buckets of an hour, the last one the current hour of the time zone's clocks."
    )
    WEEK = strawberry.enum_value(
        "WEEK", description="7 buckets of a day of the time zone's calendar, the last one today."
    )
    MONTH = strawberry.enum_value(
        "MONTH", description="30 buckets of a day of the time zone's calendar, the last one today."
    )


@strawberry.type(description="Requests to models and their tokens, summed up. What was estimated is counted too.")
class TokenTotals:
    """Totals."""

    requests: BigInt = strawberry.field(description="Finished answers and titles, however they ended.")
    prompt_tokens: BigInt = strawberry.field(description="Tokens of the histories that were sent.")
    completion_tokens: BigInt = strawberry.field(description="Tokens the models wrote, their reasoning among them.")
    reasoning_tokens: BigInt = strawberry.field(description="Share of `completionTokens` that was reasoning.")
    cached_tokens: BigInt = strawberry.field(
        description="Share of `promptTokens` that the providers had in their caches."
    )
    total_tokens: BigInt = strawberry.field(description="Prompt and completion together.")
    cost_micros: BigInt | None = strawberry.field(
        description="What they cost by the prices of their time, in millionths of the operator's currency. Requests "
        "whose price was not known are left out of it; null where no price was known."
    )

    @classmethod
    def of(cls, totals: services.TokenTotals) -> TokenTotals:
        """From sums."""
        return cls(
            requests=BigInt(totals.requests),
            prompt_tokens=BigInt(totals.prompt),
            completion_tokens=BigInt(totals.completion),
            reasoning_tokens=BigInt(totals.reasoning),
            cached_tokens=BigInt(totals.cached),
            total_tokens=BigInt(totals.prompt + totals.completion),
            cost_micros=None if totals.cost_micros is None else BigInt(totals.cost_micros),
        )


@strawberry.type(description="What one model was used for in a report's window.")
class ModelUsage:
    """A model's share of a report."""

    id: strawberry.ID = strawberry.field(description="The model's id; it may not be offered any more.")
    name: str = strawberry.field(description="The name to show; the id where the model is not offered any more.")
    totals: TokenTotals = strawberry.field(description="The sums of its requests.")


@strawberry.type(description="One hour or day of a report.")
class UsageBucket:
    """A bucket."""

    begins_at: datetime = strawberry.field(name="from", description="Its first instant.")
    ends_at: datetime = strawberry.field(
        name="to", description="The first instant behind it. Days in which clocks are changed have 23 or 25 hours."
    )
    totals: TokenTotals = strawberry.field(description="The sums of the requests that ended in it.")


@strawberry.type(
    description="What the viewer used in a window of time. The sum of `buckets` and the sum of `byModel` are `totals`."
)
class UsageReport:
    """A report."""

    timeframe: UsageTimeframe = strawberry.field(description="How long it reaches back.")
    begins_at: datetime = strawberry.field(name="from", description="The first instant of the window.")
    ends_at: datetime = strawberry.field(
        name="to", description="The first instant behind the window: the end of the current hour, or of today."
    )
    totals: TokenTotals = strawberry.field(description="The sums of the window.")
    by_model: list[ModelUsage] = strawberry.field(
        description="Every model that was asked in the window, custom ones and those that are gone among them; the "
        "most tokens first."
    )
    buckets: list[UsageBucket] = strawberry.field(
        description="The hours or days of the window, side by side, the oldest first; empty ones too."
    )

    @classmethod
    def of(cls, report: services.UsageReport, records: Mapping[str, ModelRecord]) -> UsageReport:
        """From a report.

        Args:
            records: the models in it that are known, by id.
        """
        return cls(
            timeframe=_TIMEFRAMES[report.window.timeframe.value],
            begins_at=report.window.begins_at,
            ends_at=report.window.ends_at,
            totals=TokenTotals.of(report.totals),
            by_model=[
                ModelUsage(
                    id=strawberry.ID(model_id),
                    name=records[model_id].name if model_id in records else gone_name(model_id),
                    totals=TokenTotals.of(totals),
                )
                for model_id, totals in report.by_model.items()
            ],
            buckets=[
                UsageBucket(begins_at=begins_at, ends_at=ends_at, totals=TokenTotals.of(totals))
                for (begins_at, ends_at), totals in zip(pairwise(report.window.edges), report.buckets, strict=True)
            ],
        )


_TIMEFRAMES = dict(UsageTimeframe.__members__)
