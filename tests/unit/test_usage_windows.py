"""The windows of usage reports: hours and days of any zone, side by side, on the days when clocks are changed too."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from services.errors import BadUserInputError
from services.usage_window import Timeframe, UsageWindow, known_zone, usage_window, zone_keys

MICROSECOND = timedelta(microseconds=1)
HOUR = timedelta(hours=1)
zones = st.sampled_from(sorted(zone_keys())).map(ZoneInfo)
instants = st.datetimes(datetime(2000, 1, 1), datetime(2040, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001
days_of_change = [
    ("Europe/Berlin", "2026-03-29T01:00:00+00:00"),
    ("Europe/Berlin", "2026-10-25T00:59:59.999999+00:00"),
    ("Australia/Lord_Howe", "2026-04-04T15:10:00+00:00"),  # half an hour back
    ("Australia/Lord_Howe", "2026-10-03T15:45:00+00:00"),  # half an hour on
    ("Asia/Kathmandu", "2026-11-23T18:14:59.999999+00:00"),  # 5:45 ahead: a microsecond before midnight
    ("Asia/Beirut", "2026-03-28T22:00:00+00:00"),  # midnight is skipped
    ("America/Havana", "2026-11-01T04:30:00+00:00"),  # midnight comes twice
    ("America/Nuuk", "2026-10-25T00:30:00+00:00"),  # back over midnight
    ("America/St_Johns", "2006-10-29T02:45:00+00:00"),  # back over midnight, a minute after it
    ("Pacific/Apia", "2011-12-31T10:00:00+00:00"),  # the 30th was skipped
    ("Pacific/Kiritimati", "2026-11-23T10:00:00+00:00"),
]


def examples(test: Any) -> Any:
    """Try the days of change with every law."""
    for key, now in days_of_change:
        test = example(ZoneInfo(key), datetime.fromisoformat(now))(test)
    return test


def check(window: UsageWindow, now: datetime, buckets: int) -> None:
    """What holds for every window."""
    assert len(window.edges) == buckets + 1
    assert all(edge.utcoffset() == timedelta(0) for edge in window.edges)
    assert all(earlier < later for earlier, later in pairwise(window.edges))
    assert window.edges[-2] <= now < window.edges[-1], "the last bucket is the current one"
    assert (window.begins_at, window.ends_at) == (window.edges[0], window.edges[-1])
    for edge in window.edges:
        assert edge.timestamp() % 900 == 0, "what is rolled up by quarters falls whole into buckets"


@examples
@given(zones, instants)
def test_a_day_is_24_elapsed_hours_up_to_the_end_of_the_current_hour(zone: ZoneInfo, now: datetime) -> None:
    window = usage_window(Timeframe.DAY, zone, now)
    check(window, now, 24)
    assert {later - earlier for earlier, later in pairwise(window.edges)} == {HOUR}
    local = now.astimezone(zone)
    assert now - window.edges[-2] == timedelta(
        minutes=local.minute, seconds=local.second, microseconds=local.microsecond
    )


@examples
@given(zones, instants)
def test_weeks_and_months_are_dates_that_begin_with_their_first_instant(zone: ZoneInfo, now: datetime) -> None:
    for timeframe, days in ((Timeframe.WEEK, 7), (Timeframe.MONTH, 30)):
        window = usage_window(timeframe, zone, now)
        check(window, now, days)
        dates = []
        for edge in window.edges:
            local, before = edge.astimezone(zone), (edge - MICROSECOND).astimezone(zone)
            assert before.date() < local.date(), "a date begins at its edge"
            skipped = local.replace(tzinfo=None) - before.replace(tzinfo=None) > MICROSECOND
            assert local.time() == datetime.min.time() or skipped
            dates.append(local.date())
        assert dates[-2] >= now.astimezone(zone).date(), "the last bucket is today"
        assert all(later - earlier in (timedelta(days=1), timedelta(days=2)) for earlier, later in pairwise(dates))


@pytest.mark.parametrize(
    ("zone", "now", "hours"),
    [
        ("UTC", "2026-11-23T12:00:00+00:00", 24),
        ("Europe/Berlin", "2026-03-29T12:00:00+00:00", 23),
        ("Europe/Berlin", "2026-10-25T12:00:00+00:00", 25),
        ("Australia/Lord_Howe", "2026-10-04T02:00:00+00:00", 23.5),
        ("Australia/Lord_Howe", "2026-04-05T02:00:00+00:00", 24.5),
        ("Asia/Beirut", "2026-03-29T12:00:00+00:00", 23),
    ],
)
def test_a_day_has_as_many_hours_as_its_clocks_show(zone: str, now: str, hours: float) -> None:
    window = usage_window(Timeframe.WEEK, ZoneInfo(zone), datetime.fromisoformat(now))
    assert (window.edges[-1] - window.edges[-2]) / HOUR == hours
    assert (window.edges[-2] - window.edges[-3]) / HOUR == 24


def test_dates_that_a_zone_skipped_are_no_buckets() -> None:
    now = datetime.fromisoformat("2012-01-02T12:00:00+14:00")
    apia = ZoneInfo("Pacific/Apia")
    window = usage_window(Timeframe.WEEK, apia, now)
    assert [edge.astimezone(apia).date().isoformat() for edge in window.edges] == [
        *("2011-12-26", "2011-12-27", "2011-12-28", "2011-12-29", "2011-12-31"),
        *("2012-01-01", "2012-01-02", "2012-01-03"),
    ]


@pytest.mark.parametrize("key", ["UTC", "Europe/Berlin", "America/Argentina/Buenos_Aires", "Etc/GMT+12", "EST5EDT"])
def test_iana_keys_are_known(key: str) -> None:
    assert known_zone(key).key == key


@pytest.mark.parametrize(
    "key",
    [
        *("", " ", "utc", "europe/berlin", "Europe/", "Europe", "/", ".", "..", "../UTC", "/etc/passwd"),
        *("Europe/../Europe/Berlin", "/usr/share/zoneinfo/UTC", "posix/UTC", "localtime", "posixrules", "tzdata.zi"),
        *("UTC ", " UTC", "UTC\x00", "UTC\n", "\ud800", "🦉", "+02:00", "GMT+25", "Europe/Berlin" * 10_000),
    ],
    ids=lambda key: ascii(key[:30]),
)
def test_anything_else_is_refused_and_the_field_named(key: str) -> None:
    with pytest.raises(BadUserInputError) as refused:
        known_zone(key)
    assert refused.value.field == "timezone"
