"""Servers whose clocks are wrong: who lives, what is newest and what has ended is the database's to say."""

from __future__ import annotations

import asyncio
import signal
import time
from contextlib import AsyncExitStack
from pathlib import Path

import orjson

from tests.client import connect, text_of
from tests.conftest import make_database
from tests.e2e.test_process import STEADY, read_some, running
from tests.valkey import ValkeyServer

AHEAD_SECONDS, BEHIND_SECONDS = 7_200, -300
# Read by Python at its start, before anything of ours. What Python's libraries read otherwise stays right.
WRONG_CLOCK = """
import time

_time, _time_ns = time.time, time.time_ns
time.time = lambda: _time() + {0}
time.time_ns = lambda: _time_ns() + {0} * 10**9
"""


async def test_servers_with_wrong_clocks_end_the_answers_of_the_dead_and_no_others(
    postgres_url: str, tmp_path: Path
) -> None:
    scripts = tmp_path / "scripts.json"
    scripts.write_bytes(orjson.dumps({"steady": {"wordsPerSecond": 200, "steps": [{"text": STEADY}]}}))
    async with AsyncExitStack() as stack:
        valkey = await stack.enter_async_context(ValkeyServer())
        environment = {
            "DATABASE_URL": await make_database(postgres_url),
            "BROADCAST_URL": valkey.url,
            "SESSION_SECRET": "s" * 32,
            "SCRIPTED_MODELS_FILE": str(scripts),
            "LEASE_SECONDS": "3",
        }
        nodes, clients = [], []
        for name, seconds in (("ahead", AHEAD_SECONDS), ("behind", BEHIND_SECONDS)):
            clock = tmp_path / f"clock-{name}"
            clock.mkdir()
            (clock / "sitecustomize.py").write_text(WRONG_CLOCK.format(seconds))
            folder = {"DATA_DIR": str(tmp_path / name), "PYTHONPATH": str(clock)}
            nodes.append(await stack.enter_async_context(running(environment, **folder)))
            clients.append(await stack.enter_async_context(connect(nodes[-1].address)))
        ahead, behind = clients
        # By the clock of who made it; a token from the future would be refused for as long as it is.
        await behind.sign_in()
        session = "mutation { startAnonymousSession { expiresAt } }"
        ends = [(await client.run(session))["startAnonymousSession"]["expiresAt"] for client in clients]
        assert ends[0] > ends[1], "the clocks are wrong"
        ahead.token, ahead.id = behind.token, behind.id

        early = await ahead.send("first", model="steady")
        late = await behind.send("second", model="steady")
        answers = [turn["assistantMessage"]["id"] for turn in (early, late)]
        # Longer than a lease and a look for those that ran out; each server reads what the other writes.
        reads = [read_some(behind, answers[0], 10_000), read_some(ahead, answers[1], 10_000)]
        for held, _ in await asyncio.gather(*reads):
            assert STEADY.startswith(held)
        for message_id in answers:
            assert (await ahead.message(message_id))["status"] == "STREAMING"
        for client in clients:
            listed = (await client.run("{ threads { nodes { id } } }"))["threads"]["nodes"]
            assert [node["id"] for node in listed] == [late["thread"]["id"], early["thread"]["id"]]
        assert (await ahead.stop(answers[1]))["status"] == "STOPPED"

        reading = asyncio.create_task(behind.read(answers[0]))
        await nodes[0].end(signal.SIGKILL)
        killed = time.monotonic()
        events = await reading
        assert time.monotonic() - killed < 15
        ended = events[-1]["message"]
        assert (ended["status"], ended["error"]["code"]) == ("INTERRUPTED", "SERVER_LOST")
        assert text_of(events) == ended["text"]
        again = await behind.retry(answers[0], model="steady")
        await behind.stop(again["assistantMessage"]["id"])
