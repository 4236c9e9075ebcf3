"""What a request gets while PostgreSQL refuses, and that nothing is lost or left when it does not any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from models.ids import IdKind, parse_id
from server.runtime import Server
from tests.client import Client, GraphQLErrors, connect, text_of
from tests.conftest import make_database, test_settings
from tests.scripts import SCRIPTS, TextDelta

# Of every table, as PostgreSQL itself refuses when there is no block left: the same error in the same place.
FULL = """
CREATE FUNCTION no_room() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'could not extend file "base/1/1": No space left on device' USING ERRCODE = 'disk_full';
END $$;
DO $$
DECLARE name text;
BEGIN
    FOR name IN SELECT tablename FROM pg_tables WHERE schemaname = 'public' LOOP
        EXECUTE format('CREATE TRIGGER aaa_no_room BEFORE INSERT OR UPDATE ON %I EXECUTE FUNCTION no_room()', name);
    END LOOP;
END $$;
"""
ROOM = "DROP FUNCTION no_room CASCADE"


@asynccontextmanager
async def serving(
    postgres_url: str, folder: Path, **changes: object
) -> AsyncIterator[tuple[Client, asyncpg.Connection]]:
    """A server on a database of its own, a user, and another way to the database."""
    url = await make_database(postgres_url)
    server = Server(test_settings(url, folder, **changes), providers=SCRIPTS.models())
    await server.start()
    beside = await asyncpg.connect(url)
    try:
        async with connect(server.address) as client:
            await client.sign_in()
            yield client, beside
    finally:
        await beside.close()
        await server.drain()
        await server.close()


async def refused(client: Client, thread_id: str, **more: Any) -> dict[str, Any]:
    """What is said to who sends now."""
    with pytest.raises(GraphQLErrors) as found:
        await client.send("Now?", threadId=thread_id, **more)
    extensions: dict[str, Any] = found.value.errors[0]["extensions"]
    return extensions


async def test_without_room_on_the_disk_reading_works_and_writing_is_told_to_wait(
    postgres_url: str, tmp_path: Path
) -> None:
    async with serving(postgres_url, tmp_path) as (client, beside):
        idle = (await client.send("Before"))["thread"]["id"]
        async with asyncio.timeout(20):
            while len(await client.path(idle)) < 2 or (await client.path(idle))[1]["status"] == "STREAMING":
                await asyncio.sleep(0.01)
        question = "Midway"
        turn = await client.send(question, model="driven")
        queue = SCRIPTS.driven.queue(question)
        async with client.reading(turn["assistantMessage"]["id"]) as reading:
            queue.put_nowait(TextDelta("before, "))
            first = await reading.next()
            await beside.execute(FULL)
            for _ in range(2):
                assert await refused(client, idle, idempotencyKey="full") == {"code": "UNAVAILABLE", "retryAfter": 1}
            assert [message["text"] for message in await client.path(idle)] == ["Before", "Hello world"]
            # An answer under way is read on, and its end waits for room.
            queue.put_nowait(TextDelta("after"))
            second = await reading.next()
            assert text_of([payload["data"]["messageStream"] for payload in (first, second)]) == "before, after"
            queue.put_nowait(None)
            assert (await client.message(turn["assistantMessage"]["id"]))["status"] == "STREAMING"
            await beside.execute(ROOM)
            ended = [event async for event in reading.events()][-1]["message"]
        assert (ended["status"], ended["text"]) == ("COMPLETE", "before, after")
        # The very request that was refused.
        again = await client.send("Now?", threadId=idle, idempotencyKey="full")
        assert (await client.finish(again["assistantMessage"]["id"]))["status"] == "COMPLETE"
        assert len(await client.path(idle)) == 4


async def test_a_stop_leaves_the_model_at_once_though_the_database_does_not_answer(
    postgres_url: str, tmp_path: Path
) -> None:
    async with serving(postgres_url, tmp_path, database_timeout_seconds=1) as (client, beside):
        question = "Stop without a database"
        turn = await client.send(question, model="driven")
        answer = turn["assistantMessage"]["id"]
        queue = SCRIPTS.driven.queue(question)
        async with client.reading(answer) as reading:
            queue.put_nowait(TextDelta("so far"))
            await reading.next()
            async with beside.transaction():
                await beside.execute("LOCK TABLE messages IN ACCESS EXCLUSIVE MODE")
                with pytest.raises(GraphQLErrors) as refused:
                    await client.stop(answer)
                assert refused.value.code == "UNAVAILABLE"
                async with asyncio.timeout(20):
                    await SCRIPTS.driven.closing(question).wait()
            ended = [event async for event in reading.events()][-1]["message"]
        assert (ended["status"], ended["text"]) == ("STOPPED", "so far")


async def test_a_server_that_shuts_down_takes_over_no_answer(postgres_url: str, tmp_path: Path) -> None:
    server = Server(test_settings(await make_database(postgres_url), tmp_path), providers=SCRIPTS.models())
    before = asyncio.all_tasks()
    await server.start()
    (reaper,) = [task for task in asyncio.all_tasks() - before if task.get_name() == "reaper"]
    await server.drain()
    assert reaper.done()
    await server.close()


async def test_whoever_loses_a_deadlock_is_told_to_try_again_and_has_written_nothing(
    postgres_url: str, tmp_path: Path
) -> None:
    async with serving(postgres_url, tmp_path) as (client, beside):
        turn = await client.send("Before")
        await client.finish(turn["assistantMessage"]["id"])
        thread_id, question = turn["thread"]["id"], turn["userMessage"]["id"]
        async with beside.transaction():
            await beside.execute("LOCK TABLE messages IN SHARE MODE")
            # An edit locks the thread, then waits for the table; here the other way round.
            editing = asyncio.create_task(client.edit(question, "Now?", idempotencyKey="deadlock"))
            async with asyncio.timeout(20):
                while not await beside.fetchval(
                    "SELECT EXISTS (SELECT FROM pg_locks WHERE relation = 'messages'::regclass AND NOT granted)"
                ):
                    await asyncio.sleep(0.005)
            # PostgreSQL ends the transaction that has waited for a second first: the server's.
            await beside.execute("SELECT FROM threads WHERE id = $1 FOR UPDATE", parse_id(IdKind.THREAD, thread_id))
            with pytest.raises(GraphQLErrors) as lost:
                await editing
            assert lost.value.extensions == {"code": "UNAVAILABLE", "retryAfter": 1}
        assert (await client.path(thread_id))[0]["id"] == question
        again = await client.edit(question, "Now?", idempotencyKey="deadlock")
        assert (await client.finish(again["assistantMessage"]["id"]))["status"] == "COMPLETE"
        assert [message["text"] for message in await client.path(thread_id)] == ["Now?", "Hello world"]


async def test_a_statement_that_takes_too_long_is_given_up_on_both_sides(postgres_url: str, tmp_path: Path) -> None:
    async with serving(postgres_url, tmp_path, database_timeout_seconds=1) as (client, beside):
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        )
        async with beside.transaction():
            await beside.execute("LOCK TABLE projects IN ACCESS EXCLUSIVE MODE")
            asked = [asyncio.create_task(client.post("{ projects { nodes { id } } }")) for _ in range(30)]
            async with asyncio.timeout(20):
                answers = await asyncio.gather(*asked)
                assert {body["errors"][0]["extensions"]["code"] for _, body in answers} == {"UNAVAILABLE"}
                while await beside.fetchval(waiting):
                    await asyncio.sleep(0.01)
            # Over a socket as well, and what somebody has left is not waited for.
            async with client.subscribe("{ projects { nodes { id } } }", {}) as operation:
                with pytest.raises(GraphQLErrors) as refused:
                    await operation.next()
                assert refused.value.code == "UNAVAILABLE"
            async with client.subscribe("{ projects { nodes { id } } }", {}) as operation:
                async with asyncio.timeout(20):
                    while not await beside.fetchval(waiting):
                        await asyncio.sleep(0.005)
                    operation.abort()
                    while await beside.fetchval(waiting):
                        await asyncio.sleep(0.005)
        assert await client.run("{ projects { nodes { id } } }") == {"projects": {"nodes": []}}
