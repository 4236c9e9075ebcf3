"""Root fields about usage."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated
from zoneinfo import ZoneInfo

import strawberry

from graph.context import Info, Services
from graph.types.usage import UsageReport, UsageTimeframe
from services import usage as services_usage
from services.usage_window import Timeframe, known_zone
from services.viewer import Viewer

TimeframeArgument = Annotated[UsageTimeframe, strawberry.argument(description="How long it reaches back.")]
TimezoneArgument = Annotated[
    str | None,
    strawberry.argument(
        description="IANA name of the time zone whose hours and days are meant, such as `Europe/Berlin`."
    ),
]

_TIMEFRAMES = {
    UsageTimeframe.DAY: Timeframe.DAY,
    UsageTimeframe.WEEK: Timeframe.WEEK,
    UsageTimeframe.MONTH: Timeframe.MONTH,
}


@strawberry.type
class UsageQuery:
    """Queries."""

    @strawberry.field(description="What the viewer used: totals, by model, and by hours or days.")
    async def usage(self, info: Info, timeframe: TimeframeArgument, timezone: TimezoneArgument = "UTC") -> UsageReport:
        viewer, services = info.context.viewer, info.context.services
        report = await services.usage.report(viewer, _TIMEFRAMES[timeframe], _zone(timezone))
        return await _report(services, viewer, report)


@strawberry.type
class UsageSubscription:
    """Subscriptions."""

    @strawberry.subscription(
        description="The report now, then again after each finished message of the viewer, an import and a claim, and "
        "when a new hour or day begins. What ends within a quarter of a second comes in one report."
    )
    async def usage(
        self, info: Info, timeframe: TimeframeArgument, timezone: TimezoneArgument = "UTC"
    ) -> AsyncGenerator[UsageReport, None]:
        viewer, services = info.context.viewer, info.context.services
        zone = _zone(timezone)
        async with aclosing(services.usage.follow(viewer, _TIMEFRAMES[timeframe], zone)) as reports:
            async for report in reports:
                yield await _report(services, viewer, report)


async def _report(services: Services, viewer: Viewer, report: services_usage.UsageReport) -> UsageReport:
    ids = list(report.by_model)
    records = await services.models.describe_many(viewer, ids)
    return UsageReport.of(report, {key: record for key, record in zip(ids, records, strict=True) if record})


def _zone(key: str | None) -> ZoneInfo:
    return known_zone("UTC" if key is None else key)
