"""Faults that have a name: a deployment at noon, and a database that is away for long."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import AsyncExitStack

from tests.client import GraphQLErrors
from tests.faults.checker import check
from tests.faults.history import History, roll
from tests.faults.users import Reader, User, Violation
from tests.faults.vendor import Script
from tests.faults.world import World

_FAST_SECONDS = 5.0


async def history(world: World, seed: int) -> dict[str, int]:
    """A random history, from its first moment to its check. What was seen."""
    # What the history before had lost excuses nothing in this one.
    world.writers_lost.clear()
    world.data_lost.clear()
    planned = History.of(seed)
    users = planned.users(world)
    async with AsyncExitStack() as stack:
        for user in users:
            stack.push_async_callback(user.end)
        await planned.play(world, users)
        await world.heal()
        return await check(world, users)


async def deployment(count: int) -> dict[str, int]:
    """Three servers are drained and started anew, one after the other, while so many users ask and read.

    Raises:
        Violation: an answer was not written to its end, or a reader was set back.
    """
    async with World(3, SHUTDOWN_GRACE_SECONDS="10") as world, AsyncExitStack() as stack:
        users = await _come(world, stack, count)
        is_rolling = True

        async def ask(user: User) -> None:
            number = 0
            while is_rolling:
                script = Script(f"{user.name}.{number}", think_seconds=0.2, pieces=30, every_seconds=0.1)
                await user.send(None, script=script, twice=number % 3 == 0)
                await asyncio.sleep(0.5)
                number += 1

        asking = [asyncio.create_task(ask(user)) for user in users]
        try:
            await asyncio.sleep(1)
            await roll(world)
        finally:
            is_rolling = False
            await asyncio.gather(*asking)
        seen = await check(world, users)
        if seen.keys() != {"readers", "resets", "COMPLETE"} or seen["resets"]:
            raise Violation(f"not everything was whole: {seen}")
        return seen


async def database_away(streams: int, seconds: float) -> dict[str, int]:
    """PostgreSQL is killed in the middle of so many streams, and comes back after so many seconds. Pools are small.

    Raises:
        Violation: a stream stood still meanwhile, a request did not fail fast and as one to repeat, or anything is not
            as it should be afterwards.
    """
    async with World(2, DATABASE_POOL_SIZE="2") as world, AsyncExitStack() as stack:
        users = await _come(world, stack, 10)
        for number in range(streams // len(users)):
            # Some end while it is away, some after.
            pieces = int((10 + seconds * (0.3 + number / 5)) * 5)
            scripts = [Script(f"{user.name}.{number}", 0, pieces, every_seconds=0.2) for user in users]
            await asyncio.gather(*(user.send(None, script=s) for user, s in zip(users, scripts, strict=True)))
        readers = [reader for user in users for reader in user.readers]
        async with asyncio.timeout(30):
            while not all(reader.held for reader in readers):
                await asyncio.sleep(0.05)
        world.kill_postgres()
        gone = time.monotonic()
        connections = [reader.connections for reader in readers]
        while time.monotonic() - gone < seconds:
            before = [len(reader.held) for reader in readers]
            await asyncio.sleep(2)
            # Who has come anew meanwhile may have to wait: at another server than the writer's, only the database knows
            # whose the answer is.
            stayed = [
                (reader, length)
                for reader, length, count in zip(readers, before, connections, strict=True)
                if reader.connections == count
            ]
            if still := [reader for reader, length in stayed if _stands(world, reader, length)]:
                raise Violation(f"{len(still)} streams stood still without the database")
            if len(stayed) < len(readers) // 10:
                raise Violation("too few readers stayed to tell")
            await _is_refused_fast(users[0])
        await world.start_postgres()
        seen = await check(world, users)
        if (seen["COMPLETE"], seen["resets"]) != (streams, 0):
            raise Violation(f"not everything was whole: {seen}")
        return seen


async def _come(world: World, stack: AsyncExitStack, count: int) -> list[User]:
    users = [User(world, f"user{number}", random.Random(number)) for number in range(count)]
    for user in users:
        stack.push_async_callback(user.end)
    await asyncio.gather(*(user.begin() for user in users))
    return users


def _stands(world: World, reader: Reader, length: int) -> bool:
    """Whether a reader got nothing, though its answer goes on."""
    if len(reader.held) > length:
        return False
    said = next(answered for answered in world.vendor.answered if reader.held.startswith(answered.head))
    return not said.is_whole


async def _is_refused_fast(user: User) -> None:
    async with user.client() as client:
        asked = time.monotonic()
        try:
            await client.run("{ threads(first: 1) { nodes { id } } }")
        except GraphQLErrors as error:
            if error.code == "UNAVAILABLE" and time.monotonic() - asked < _FAST_SECONDS:
                return
            raise Violation(f"without the database: {error.code} after {time.monotonic() - asked:.1f} s") from error
        raise Violation("a request without a database was answered")
