"""`python -m tests.faults`: what goes wrong on real servers, checked from the outside.

python -m tests.faults --seeds 200           a deployment, a database that is away, and so many random histories
python -m tests.faults --seeds 200 --jobs 2  two at a time
python -m tests.faults --seed 17             one of the histories again
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
import traceback
from pathlib import Path

from tests.faults import scenarios
from tests.faults.history import History
from tests.faults.world import World

# A history and its check take 15 to 30 s; one that hangs is a failure.
_SEED_SECONDS = 240.0
# Servers are new after so many, so that what they have become is not what is tested.
_SEEDS_PER_WORLD = 20


async def run(seeds: list[int], nodes: int, jobs: int) -> int:
    """Run these histories, so many at a time; how many failed."""
    left, failed = list(seeds), list[int]()

    async def work() -> None:
        while left:
            async with World(nodes) as world:
                for _ in range(_SEEDS_PER_WORLD):
                    if not left:
                        return
                    seed = left.pop(0)
                    if not await _run_one(world, seed):
                        failed.append(seed)
                        break  # the next begins with servers that nothing has happened to

    await asyncio.gather(*(work() for _ in range(jobs)))
    print(f"{len(seeds) - len(failed)} of {len(seeds)} histories held", flush=True)
    for seed in failed:
        print(f"FAILED: make faults SEED={seed}", flush=True)
    return len(failed)


async def run_named() -> None:
    """Run what is no random history."""
    for name, scenario in (
        ("three servers are deployed under 50 streams", scenarios.deployment(10)),
        ("PostgreSQL is away for 20 s in the middle of 100 streams", scenarios.database_away(100, 20)),
    ):
        started = time.monotonic()
        seen = await scenario
        print(f"{name}: held in {time.monotonic() - started:.0f} s: {seen}", flush=True)


async def _run_one(world: World, seed: int) -> bool:
    started = time.monotonic()
    try:
        async with asyncio.timeout(_SEED_SECONDS):
            seen = await scenarios.history(world, seed)
    except Exception:
        print(f"{History.of(seed)}", flush=True)
        traceback.print_exc()
        folder = Path(tempfile.mkdtemp(prefix=f"threadgraph-seed-{seed}-"))
        for node in world.nodes:
            Path(folder, f"server{node.number}.log").write_text(node.log)
        print(f"  FAILED; the servers' logs are in {folder}", flush=True)
        return False
    print(f"{History.of(seed)}\n  held in {time.monotonic() - started:.0f} s: {seen}", flush=True)
    return True


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    if options.seed is not None:
        return 1 if asyncio.run(run([options.seed], options.nodes, 1)) else 0
    if options.first == 1:
        asyncio.run(run_named())
    seeds = list(range(options.first, options.first + options.seeds))
    return 1 if asyncio.run(run(seeds, options.nodes, options.jobs)) else 0


if __name__ == "__main__":
    sys.exit(main())
