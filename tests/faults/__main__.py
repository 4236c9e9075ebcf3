"""`python -m tests.faults`: random histories under faults on real servers, each checked from the outside.

python -m tests.faults --seeds 200           so many histories, from seed 1 on
python -m tests.faults --seed 17             one of them again
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
import traceback
from pathlib import Path

from tests.faults.checker import check
from tests.faults.history import History
from tests.faults.world import World

# A history and its check take 15 to 30 s; one that hangs is a failure.
_SEED_SECONDS = 240.0
# Servers are new after so many, so that what they have become is not what is tested.
_SEEDS_PER_WORLD = 20


async def run(seeds: list[int], nodes: int) -> int:
    """Run these histories; how many failed."""
    failed: list[int] = []
    for at in range(0, len(seeds), _SEEDS_PER_WORLD):
        left = seeds[at : at + _SEEDS_PER_WORLD]
        while left:
            async with World(nodes) as world:
                while left:
                    seed = left.pop(0)
                    if not await _run_one(world, seed):
                        failed.append(seed)
                        break  # the next begins with servers that nothing has happened to
    for seed in failed:
        print(f"FAILED: make faults SEED={seed}", flush=True)
    return len(failed)


async def _run_one(world: World, seed: int) -> bool:
    history = History.of(seed)
    started = time.monotonic()
    print(history, flush=True)
    users = history.users(world)
    try:
        async with asyncio.timeout(_SEED_SECONDS):
            await history.play(world, users)
            await world.heal()
            seen = await check(world, users)
    except Exception:
        traceback.print_exc()
        folder = Path(tempfile.mkdtemp(prefix=f"threadgraph-seed-{seed}-"))
        for node in world.nodes:
            Path(folder, f"server{node.number}.log").write_text(node.log)
        print(f"  FAILED; the servers' logs are in {folder}", flush=True)
        return False
    finally:
        await asyncio.gather(*(user.end() for user in users), return_exceptions=True)
    print(f"  held in {time.monotonic() - started:.0f} s: {seen}", flush=True)
    return True


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--nodes", type=int, default=3)
    options = parser.parse_args()
    seeds = [options.seed] if options.seed is not None else list(range(options.first, options.first + options.seeds))
    return 1 if asyncio.run(run(seeds, options.nodes)) else 0


if __name__ == "__main__":
    sys.exit(main())
