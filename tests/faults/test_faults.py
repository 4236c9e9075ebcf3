"""The short form of `make faults`."""

from __future__ import annotations

from tests.faults import scenarios
from tests.faults.world import World


async def test_whatever_goes_wrong_no_answer_is_lost_and_no_reader_misled() -> None:
    async with World() as world:
        # Chosen for what they have together: kills, freezes, deployments, and a Valkey that is emptied.
        for seed in (4, 8):
            assert (await scenarios.history(world, seed))["readers"] > 0


async def test_a_deployment_of_three_servers_under_load_loses_nothing() -> None:
    assert (await scenarios.deployment(4))["COMPLETE"] > 0


async def test_a_database_that_is_away_stops_no_stream_and_loses_no_end() -> None:
    await scenarios.database_away(streams=40, seconds=5)
