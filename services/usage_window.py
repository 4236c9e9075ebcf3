"""The stretch of time a usage report covers, cut into the hours or days of somebody's time zone."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from enum import StrEnum
from functools import cache
from zoneinfo import ZoneInfo, available_timezones

from services.errors import BadUserInputError

_MAX_ZONE_CHARS = 64
_HOURS = 24
_MICROSECOND = timedelta(microseconds=1)


class Timeframe(StrEnum):
    """How long a report reaches back."""

    DAY = "DAY"
    WEEK = "WEEK"
    MONTH = "MONTH"


_DAYS = {Timeframe.WEEK: 7, Timeframe.MONTH: 30}


@dataclass(frozen=True, slots=True)
class UsageWindow:
    """Buckets side by side: each begins at an edge (UTC) and ends before the next; one edge more than buckets."""

    timeframe: Timeframe
    edges: tuple[datetime, ...]

    @property
    def begins_at(self) -> datetime:
        """The first instant of the first bucket."""
        return self.edges[0]

    @property
    def ends_at(self) -> datetime:
        """The first instant behind the last bucket."""
        return self.edges[-1]


def usage_window(timeframe: Timeframe, zone: ZoneInfo, now: datetime) -> UsageWindow:
    """The window whose last bucket `now` falls into.

    DAY: 24 elapsed hours, the last one the current hour of the zone's clocks. WEEK and MONTH: 7 and 30 dates of the
    zone's calendar, the last one today; a day begins with the first instant of its date, and has 23 or 25 hours where
    the clocks are changed. Every edge lies on a quarter of an hour of UTC, as the offsets of all zones do since 1980.
    """
    local = now.astimezone(zone)
    if timeframe is Timeframe.DAY:
        into_the_hour = timedelta(minutes=local.minute, seconds=local.second, microseconds=local.microsecond)
        # In UTC: an hour of it is an hour that passes, whatever the clocks of the zone do meanwhile.
        hour = now.astimezone(UTC) - into_the_hour
        return UsageWindow(timeframe, tuple(hour + timedelta(hours=number) for number in range(1 - _HOURS, 2)))
    today = local.date()
    if _first_instant(today + timedelta(days=1), zone) <= now:
        # The clocks were put back over midnight just after it: it is yesterday again, but today has begun.
        today += timedelta(days=1)
    edges = [_first_instant(today + timedelta(days=1), zone), _first_instant(today, zone)]
    while len(edges) <= _DAYS[timeframe]:
        # By the instant before, and not by dates: zones that crossed the date line have skipped one.
        edges.append(_first_instant((edges[-1] - _MICROSECOND).astimezone(zone).date(), zone))
    return UsageWindow(timeframe, tuple(reversed(edges)))


def _first_instant(day: date, zone: ZoneInfo) -> datetime:
    """When a date begins. Where the clocks skip midnight that is the instant of the skip, where they show it twice the
    first: what `fold=0` means for both (PEP 495)."""
    return datetime(day.year, day.month, day.day, tzinfo=zone).astimezone(UTC)


def known_zone(key: str) -> ZoneInfo:
    """The time zone of an IANA key such as `Europe/Berlin`, spelled as the database spells it.

    Raises:
        BadUserInputError: there is none of this key.
    """
    if len(key) > _MAX_ZONE_CHARS or key not in zone_keys():
        raise BadUserInputError("This is not the name of a time zone, such as Europe/Berlin or UTC.", field="timezone")
    return ZoneInfo(key)


@cache
def zone_keys() -> frozenset[str]:
    """Every IANA key. The first call reads folders; `localtime`, which some machines have, is a setting and no zone."""
    return frozenset(available_timezones() - {"localtime"})
