"""Token buckets: what comes at once, what comes later, and what one address or user cannot take from others."""

from __future__ import annotations

import uuid

import pytest

from services.errors import RateLimitedError
from services.rates import Rates, UserRate


class Clock:
    """A clock that stands."""

    def __init__(self) -> None:
        self.time = 1_000.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_minutes_worth_may_come_at_once_and_then_as_it_is_filled(clock: Clock) -> None:
    rates = Rates(each=6, total=1_000, now=clock)
    assert [rates.take("10.0.0.1") for _ in range(7)] == [0] * 6 + [10]
    clock.time += 9.9
    assert rates.take("10.0.0.1") == 1
    clock.time += 0.2
    assert [rates.take("10.0.0.1"), rates.take("10.0.0.1")] == [0, 10]
    clock.time += 10_000
    assert [rates.take("10.0.0.1") for _ in range(7)] == [0] * 6 + [10]


def test_one_address_uses_up_its_own_share_and_not_everybodys(clock: Clock) -> None:
    rates = Rates(each=2, total=4, now=clock)
    assert [rates.take("10.0.0.1") > 0 for _ in range(10)] == [False] * 2 + [True] * 8
    assert [rates.take("10.0.0.2"), rates.take("10.0.0.3")] == [0, 0]
    assert rates.take("10.0.0.4") == 15


def test_an_ipv6_network_is_one_address(clock: Clock) -> None:
    rates = Rates(each=1, total=1_000, now=clock)
    assert rates.take("2001:db8::1") == 0
    assert rates.take("2001:db8::ffff:1%eth0") > 0
    assert rates.take("2001:db8:0:1::1") == 0
    assert rates.take("::ffff:10.0.0.1") == 0
    assert rates.take("10.0.0.1") > 0
    assert rates.take(None) == 0
    assert rates.take("no address") > 0


def test_the_table_of_addresses_is_bounded(clock: Clock) -> None:
    rates = Rates(each=1, total=1_000_000, now=clock)
    for number in range(12_000):
        rates.take(f"10.{number // 65536}.{number // 256 % 256}.{number % 256}")
        rates.take("192.0.2.1")
    assert len(rates) == 10_000
    assert rates.take("192.0.2.1") > 0


def test_a_user_who_did_too_much_waits_and_no_other(clock: Clock) -> None:
    rate = UserRate(2, "things", now=clock)
    ann, bob = uuid.uuid4(), uuid.uuid4()
    rate.check(ann)
    rate.check(ann)
    with pytest.raises(RateLimitedError, match="Too many things") as refused:
        rate.check(ann)
    assert refused.value.retry_after == 30
    rate.check(bob)
    clock.time += 30
    rate.check(ann)


def test_a_rate_of_nought_is_no_bound_and_remembers_nobody() -> None:
    rate = UserRate(0, "things")
    user = uuid.uuid4()
    assert [rate.take(user) for _ in range(1_000)] == [0] * 1_000
    assert len(rate) == 0


def test_the_table_of_users_is_bounded(clock: Clock) -> None:
    rate = UserRate(1, "things", now=clock)
    for number in range(12_000):
        rate.take(uuid.UUID(int=number))
    assert len(rate) == 10_000
    assert rate.take(uuid.UUID(int=11_999)) > 0
