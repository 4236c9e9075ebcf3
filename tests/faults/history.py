"""A random history from a seed: who does what when, and what goes wrong when. The same seed gives the same history."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeAlias

from tests.faults.users import User
from tests.faults.world import World

_SECONDS = 7.0
_USERS = 3

Fault: TypeAlias = Callable[[World, random.Random], Awaitable[None]]


async def _kill(world: World, chance: random.Random) -> None:
    number = chance.randrange(len(world.nodes))
    await world.kill_node(number)
    await asyncio.sleep(chance.uniform(0, 4))
    await world.nodes[number].start()


async def _drain(world: World, chance: random.Random) -> None:
    number = chance.randrange(len(world.nodes))
    await world.drain_node(number)
    await world.nodes[number].start()


async def _freeze(world: World, chance: random.Random) -> None:
    number = chance.randrange(len(world.nodes))
    world.freeze_node(number)
    await asyncio.sleep(chance.choice([0.5, 2, 6]))
    world.nodes[number].thaw()


async def _flush_valkey(world: World, chance: random.Random) -> None:
    await world.flush_valkey()


async def _restart_valkey(world: World, chance: random.Random) -> None:
    world.kill_valkey()
    await asyncio.sleep(chance.uniform(0, 3))
    await world.valkey.start()


async def _freeze_valkey(world: World, chance: random.Random) -> None:
    world.valkey.freeze()
    await asyncio.sleep(chance.choice([1, 4, 7]))
    world.valkey.thaw()


async def _part_from_valkey(world: World, chance: random.Random) -> None:
    line = chance.choice(world.nodes).to_valkey
    if chance.random() < 0.5:
        line.hold()
    else:
        await line.cut()
    await asyncio.sleep(chance.choice([1, 4, 7]))
    line.heal()


async def _slow_valkey(world: World, chance: random.Random) -> None:
    line = chance.choice(world.nodes).to_valkey
    line.delay(chance.choice([0.05, 0.3]))
    await asyncio.sleep(3)
    line.heal()


async def _lose_notices(world: World, chance: random.Random) -> None:
    for _ in range(5):
        await world.cut_subscriptions()
        await asyncio.sleep(chance.uniform(0, 0.8))


async def _repeat_notices(world: World, chance: random.Random) -> None:
    world.repeat_notices(str(chance.random()))


async def _restart_postgres(world: World, chance: random.Random) -> None:
    world.kill_postgres()
    await asyncio.sleep(chance.uniform(0, 3))
    await world.start_postgres()


async def _part_from_postgres(world: World, chance: random.Random) -> None:
    line = chance.choice(world.nodes).to_database
    if chance.random() < 0.5:
        line.hold()
    else:
        await line.cut()
    await asyncio.sleep(chance.choice([1, 3, 6]))
    line.heal()


async def _drop_postgres(world: World, chance: random.Random) -> None:
    for node in world.nodes:
        await node.to_database.drop()


FAULTS: dict[str, Fault] = {
    "kill a server": _kill,
    "drain a server": _drain,
    "freeze a server": _freeze,
    "flush Valkey": _flush_valkey,
    "restart Valkey": _restart_valkey,
    "freeze Valkey": _freeze_valkey,
    "part a server from Valkey": _part_from_valkey,
    "slow Valkey": _slow_valkey,
    "lose notices": _lose_notices,
    "repeat notices": _repeat_notices,
    "restart PostgreSQL": _restart_postgres,
    "part a server from PostgreSQL": _part_from_postgres,
    "drop PostgreSQL's connections": _drop_postgres,
}
_DOINGS = ("send", "send anew", "edit", "retry", "stop", "read", "delete")
_WEIGHTS = (4, 6, 2, 2, 3, 3, 1)


@dataclass(frozen=True, slots=True)
class Doing:
    """What somebody does, and when; `place` chooses among what there is then."""

    seconds: float
    user: int
    what: str
    place: int
    twice: bool


@dataclass(frozen=True, slots=True)
class Failing:
    """What goes wrong, and when; `seed` chooses where and for how long."""

    seconds: float
    what: str
    seed: str


@dataclass(frozen=True)
class History:
    """A plan."""

    seed: int
    doings: list[Doing]
    failings: list[Failing]

    @classmethod
    def of(cls, seed: int) -> History:
        """The history of a seed."""
        chance = random.Random(seed)
        doings = [
            Doing(
                chance.uniform(0, _SECONDS),
                chance.randrange(_USERS),
                chance.choices(_DOINGS, _WEIGHTS)[0],
                chance.randrange(8),
                chance.random() < 0.3,
            )
            for _ in range(chance.randint(15, 30))
        ]
        failings = [
            Failing(chance.uniform(0.3, _SECONDS), chance.choice(list(FAULTS)), f"{seed} {number}")
            for number in range(chance.randint(1, 4))
        ]
        return cls(
            seed,
            sorted(doings, key=lambda doing: doing.seconds),
            sorted(failings, key=lambda failing: failing.seconds),
        )

    def __str__(self) -> str:
        faults = ", ".join(f"{failing.seconds:.1f} s {failing.what}" for failing in self.failings)
        return f"seed {self.seed}: {len(self.doings)} doings; {faults}"

    def users(self, world: World) -> list[User]:
        """Those who take part, not there yet."""
        return [
            User(world, f"{self.seed}.{number}", random.Random(f"{self.seed} {number}")) for number in range(_USERS)
        ]

    async def play(self, world: World, users: list[User]) -> None:
        """Let it happen; all faults are over, but not yet healed from, when this returns. The users are still there."""
        await asyncio.gather(*(user.begin() for user in users))
        started = time.monotonic()
        failing = asyncio.create_task(self._fail(world, started))
        try:
            await asyncio.gather(*(self._do(number, user, started) for number, user in enumerate(users)))
        finally:
            await asyncio.wait({failing})
        await failing

    async def _do(self, number: int, user: User, started: float) -> None:
        for doing in self.doings:
            if doing.user != number:
                continue
            await _until(started + doing.seconds)
            match doing.what:
                case "send":
                    await user.send(doing.place, twice=doing.twice)
                case "send anew":
                    await user.send(None, twice=doing.twice)
                case "edit":
                    await user.edit(doing.place, twice=doing.twice)
                case "retry":
                    await user.retry(doing.place, twice=doing.twice)
                case "stop":
                    await user.stop(doing.place)
                case "read":
                    await user.read_again(doing.place)
                case "delete":
                    await user.delete(doing.place)

    async def _fail(self, world: World, started: float) -> None:
        # One after the other: a node that is being killed cannot be frozen.
        for failing in self.failings:
            await _until(started + failing.seconds)
            await FAULTS[failing.what](world, random.Random(failing.seed))


async def _until(moment: float) -> None:
    await asyncio.sleep(max(0.0, moment - time.monotonic()))


async def roll(world: World) -> None:
    """A deployment: every server is drained and started anew, one after the other."""
    for node in world.nodes:
        await node.end(signal.SIGTERM)
        await node.start()
