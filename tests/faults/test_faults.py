"""The short form of `make faults`."""

from __future__ import annotations

from tests.faults import scenarios
from tests.faults.history import History
from tests.faults.world import World

_SEEDS = (84, 88)
# Which these were chosen for; a fault that is added to the suite gives every seed another history.
_CHOSEN_FOR = {
    "kill a server",
    "freeze a server",
    "drain a server",
    "flush Valkey",
    "restart Valkey",
    "part a server from Valkey",
    "part a server from PostgreSQL",
    "lose notices",
}


async def test_whatever_goes_wrong_no_answer_is_lost_and_no_reader_misled() -> None:
    assert {failing.what for seed in _SEEDS for failing in History.of(seed).failings} >= _CHOSEN_FOR
    async with World() as world:
        for seed in _SEEDS:
            assert (await scenarios.history(world, seed))["readers"] > 0


async def test_a_deployment_of_three_servers_under_load_loses_nothing() -> None:
    assert (await scenarios.deployment(4))["COMPLETE"] > 0


async def test_a_database_that_is_away_stops_no_stream_and_loses_no_end() -> None:
    await scenarios.database_away(streams=40, seconds=5)
