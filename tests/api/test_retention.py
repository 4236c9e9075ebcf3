"""What expires: temporary threads, threads with an expiry, all threads where the operator says so, shares, keys."""

from __future__ import annotations

import asyncio
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from models.ids import IdKind, parse_id
from server.runtime import Server
from services import thread_deletion
from services.sweeper import Retention, Sweeper
from tests.client import Client, GraphQLErrors

DAY = 86_400.0
THREAD = "query($id: ID!) { thread(id: $id) { id temporary expiresAt } }"
EXPIRE = """
mutation($input: SetThreadExpiryInput!) { setThreadExpiry(input: $input) { thread { id expiresAt } } }
"""


def sweeper(server: Server, *, threads: float | None = None, keys: float = 30 * DAY) -> Sweeper:
    """A sweeper of another node."""
    keep = Retention(threads=threads, changes=7 * DAY, idempotency_keys=keys)
    return Sweeper(server.database, keep, end_live=server.generations.end_live, every_seconds=3_600)


async def sql(server: Server, query: str, *values: object) -> list[Any]:
    connection = await asyncpg.connect(server.database.url)
    try:
        return list(await connection.fetch(query, *values))
    finally:
        await connection.close()


async def find(client: Client, thread_id: str) -> dict[str, Any] | None:
    found: dict[str, Any] | None = (await client.run(THREAD, {"id": thread_id}))["thread"]
    return found


async def expire_now(server: Server, thread_id: str) -> None:
    """As if its time had come."""
    key = parse_id(IdKind.THREAD, thread_id)
    await sql(server, "UPDATE threads SET expires_at = now() - interval '1 second' WHERE id = $1", key)


async def ended(client: Client, **more: Any) -> dict[str, Any]:
    turn = await client.send("Hello", **more)
    await client.finish(turn["assistantMessage"]["id"])
    return turn


async def test_a_temporary_thread_is_in_no_list_and_expires_after_its_last_turn(server: Server, client: Client) -> None:
    turn = await ended(client, temporary=True)
    thread_id = turn["thread"]["id"]
    first = await find(client, thread_id)
    assert first is not None
    assert first["temporary"]
    until = datetime.fromisoformat(first["expiresAt"])
    assert timedelta(0) < until - datetime.now(UTC) <= timedelta(seconds=server.settings.temporary_thread_seconds)
    assert (await client.run("{ threads { nodes { id } } }"))["threads"]["nodes"] == []
    listed = await client.run("{ threads(filter: {temporary: true}) { nodes { id } } }")
    assert listed["threads"]["nodes"] == [{"id": thread_id}]
    await ended(client, threadId=thread_id)
    later = await find(client, thread_id)
    assert later is not None
    assert datetime.fromisoformat(later["expiresAt"]) > until


async def test_what_expires_goes_with_all_that_hangs_on_it_and_stays_counted(server: Server, client: Client) -> None:
    project = await client.run('mutation { createProject(input: {name: "P"}) { project { id } } }')
    project_id = project["createProject"]["project"]["id"]
    kept = await ended(client, projectId=project_id)
    turn = await ended(client, temporary=True, projectId=project_id)
    await expire_now(server, turn["thread"]["id"])
    await sweeper(server).sweep()
    assert await find(client, turn["thread"]["id"]) is None
    assert await find(client, kept["thread"]["id"]) is not None
    key = parse_id(IdKind.THREAD, turn["thread"]["id"])
    assert await sql(server, "SELECT FROM messages WHERE thread_id = $1", key) == []
    answer = parse_id(IdKind.MESSAGE, turn["assistantMessage"]["id"])
    assert len(await sql(server, "SELECT FROM usage_events WHERE message_id = $1", answer)) == 1
    with pytest.raises(GraphQLErrors) as gone:
        await client.read(turn["assistantMessage"]["id"])
    assert gone.value.code == "NOT_FOUND"


# A statement that deletes more than two messages of the thread fails.
_GUARD = """
CREATE FUNCTION two_at_most() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF (SELECT count(*) FROM gone) > 2 THEN RAISE 'too many at once'; END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER two_at_most AFTER DELETE ON messages
    REFERENCING OLD TABLE AS gone FOR EACH STATEMENT EXECUTE FUNCTION two_at_most();
"""


@pytest.mark.parametrize("who", ["its owner", "its project", "a sweeper"])
async def test_no_statement_deletes_more_of_a_long_thread_than_a_batch(
    server: Server, client: Client, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    made = await client.run('mutation { createProject(input: {name: "Long"}) { project { id } } }')
    project_id = made["createProject"]["project"]["id"]
    turn = await ended(client, projectId=project_id)
    thread_id = turn["thread"]["id"]
    for _ in range(2):
        await ended(client, threadId=thread_id)
    monkeypatch.setattr(thread_deletion, "_BATCH", 2)
    connection = await asyncpg.connect(server.database.url)
    try:
        await connection.execute(_GUARD)
        match who:
            case "its owner":
                await client.run(
                    "mutation($id: ID!) { deleteThread(input: {threadId: $id}) { __typename } }", {"id": thread_id}
                )
            case "its project":
                await client.run(
                    "mutation($id: ID!) { deleteProject(input: {projectId: $id, deleteThreads: true}) { __typename } }",
                    {"id": project_id},
                )
            case _:
                await expire_now(server, thread_id)
                await sweeper(server).sweep()
    finally:
        await connection.execute("DROP FUNCTION two_at_most CASCADE")
        await connection.close()
    assert await find(client, thread_id) is None


# The thread of this title cannot be deleted.
_STUCK = """
CREATE FUNCTION stuck() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE 'this one stays';
END $$;
CREATE TRIGGER stuck BEFORE DELETE ON threads
    FOR EACH ROW WHEN (OLD.title = 'Stuck') EXECUTE FUNCTION stuck();
"""


@pytest.mark.parametrize("why", ["expired", "retired"])
async def test_a_thread_that_cannot_be_deleted_keeps_no_other(server: Server, client: Client, why: str) -> None:
    stuck, *others = [(await ended(client))["thread"]["id"] for _ in range(3)]
    await sql(server, "UPDATE threads SET title = 'Stuck' WHERE id = $1", parse_id(IdKind.THREAD, stuck))
    column = "expires_at" if why == "expired" else "updated_at"
    for years, thread_id in enumerate((stuck, *others)):
        since = datetime(1998, 1, 1, tzinfo=UTC) + timedelta(days=365 * years)
        await sql(server, f"UPDATE threads SET {column} = $2 WHERE id = $1", parse_id(IdKind.THREAD, thread_id), since)
    node = sweeper(server, threads=20 * 365 * DAY)
    connection = await asyncpg.connect(server.database.url)
    try:
        await connection.execute(_STUCK)
        await node.sweep()
    finally:
        await connection.execute("DROP FUNCTION stuck CASCADE")
        await connection.close()
    assert [bool(await find(client, thread_id)) for thread_id in (stuck, *others)] == [True, False, False]
    assert node.failed == 1
    await node.sweep()
    assert await find(client, stuck) is None


async def test_many_sweepers_at_once_delete_each_thread_once(server: Server, client: Client) -> None:
    turns = [await ended(client, temporary=True) for _ in range(6)]
    for turn in turns:
        await expire_now(server, turn["thread"]["id"])
    await asyncio.gather(*(sweeper(server).sweep() for _ in range(4)))
    for turn in turns:
        assert await find(client, turn["thread"]["id"]) is None
    owner = parse_id(IdKind.USER, client.id)
    told = await sql(server, "SELECT object_id FROM changes WHERE owner_id = $1 AND kind = 'THREAD_DELETED'", owner)
    assert len(told) == len({row[0] for row in told}) == 6


async def test_an_answer_that_is_written_is_ended_before_its_thread_expires(server: Server, client: Client) -> None:
    turn = await client.send("Live", model="hangs", temporary=True)
    async with client.reading(turn["assistantMessage"]["id"]) as reader:
        assert await reader.next() is not None
        await expire_now(server, turn["thread"]["id"])
        await sweeper(server).sweep()
        last: dict[str, Any] | None = None
        while (payload := await reader.next()) is not None:
            last = payload["data"]["messageStream"]
    assert last is not None
    assert last["message"]["status"] == "STOPPED"
    assert await find(client, turn["thread"]["id"]) is None


async def test_a_user_sets_when_a_thread_expires_and_takes_it_back(server: Server, client: Client) -> None:
    turn = await ended(client)
    at = datetime.now(UTC) + timedelta(days=3)
    data = await client.run(EXPIRE, {"input": {"threadId": turn["thread"]["id"], "expiresAt": at.isoformat()}})
    assert datetime.fromisoformat(data["setThreadExpiry"]["thread"]["expiresAt"]) == at
    await ended(client, threadId=turn["thread"]["id"])
    still = await find(client, turn["thread"]["id"])
    assert still is not None
    assert datetime.fromisoformat(still["expiresAt"]) == at, "a turn does not move what the user set"
    data = await client.run(EXPIRE, {"input": {"threadId": turn["thread"]["id"], "expiresAt": None}})
    assert data["setThreadExpiry"]["thread"]["expiresAt"] is None
    await sweeper(server).sweep()
    assert await find(client, turn["thread"]["id"]) is not None


@pytest.mark.parametrize(
    "at", ["2001-01-01T00:00:00Z", "9999-12-31T23:59:59Z", "2001-01-01T00:00:00", "0001-01-01T00:00:00Z"]
)
async def test_a_time_that_is_not_ahead_is_refused(client: Client, at: str) -> None:
    turn = await ended(client)
    with pytest.raises(GraphQLErrors) as refused:
        await client.run(EXPIRE, {"input": {"threadId": turn["thread"]["id"], "expiresAt": at}})
    assert (refused.value.code, refused.value.extensions["field"]) == ("BAD_USER_INPUT", "expiresAt")


@pytest.mark.parametrize("at", ["tomorrow", "", "2030-13-01T00:00:00Z", "\x00", "x" * 10_000])
async def test_what_is_no_time_is_refused(client: Client, at: str) -> None:
    turn = await ended(client)
    with pytest.raises(GraphQLErrors) as refused:
        await client.run(EXPIRE, {"input": {"threadId": turn["thread"]["id"], "expiresAt": at}})
    assert refused.value.code == "BAD_USER_INPUT"


async def test_a_temporary_thread_cannot_be_kept_for_ever(client: Client) -> None:
    turn = await ended(client, temporary=True)
    before = await find(client, turn["thread"]["id"])
    with pytest.raises(GraphQLErrors) as refused:
        await client.run(EXPIRE, {"input": {"threadId": turn["thread"]["id"], "expiresAt": None}})
    assert (refused.value.code, refused.value.extensions["field"]) == ("BAD_USER_INPUT", "expiresAt")
    assert await find(client, turn["thread"]["id"]) == before


async def test_the_operators_retention_deletes_threads_without_activity(server: Server, client: Client) -> None:
    old, fresh = await ended(client), await ended(client)
    key = parse_id(IdKind.THREAD, old["thread"]["id"])
    # Older than anything else in the database: the retention of this sweeper touches no other test's threads.
    await sql(server, "UPDATE threads SET updated_at = '1999-01-01T00:00:00Z' WHERE id = $1", key)
    await sweeper(server, threads=20 * 365 * DAY).sweep()
    assert await find(client, old["thread"]["id"]) is None
    assert await find(client, fresh["thread"]["id"]) is not None


async def test_a_key_is_forgotten_after_its_time(server: Server, client: Client) -> None:
    key = str(uuid.uuid4())
    first = await client.send("x", idempotencyKey=key)
    await client.finish(first["assistantMessage"]["id"])
    owner = parse_id(IdKind.USER, client.id)
    await sql(server, "UPDATE turns SET created_at = '1999-01-01T00:00:00Z' WHERE owner_id = $1", owner)
    await sweeper(server, keys=20 * 365 * DAY).sweep()
    second = await client.send("x", idempotencyKey=key)
    assert second["thread"]["id"] != first["thread"]["id"]


async def test_a_share_ends_at_its_time_and_its_owner_is_told(server: Server, client: Client) -> None:
    turn = await ended(client)
    owner, share = parse_id(IdKind.USER, client.id), uuid.uuid4()
    await sql(
        server,
        "INSERT INTO shares (id, owner_id, thread_id, token, title, includes_attachments, expires_at) "
        "VALUES ($1, $2, $3, $4, 't', false, now() - interval '1 second')",
        share,
        owner,
        parse_id(IdKind.THREAD, turn["thread"]["id"]),
        str(uuid.uuid4()),
    )
    await sweeper(server).sweep()
    assert await sql(server, "SELECT FROM shares WHERE id = $1", share) == []
    told = "SELECT FROM changes WHERE owner_id = $1 AND kind = 'SHARE_REVOKED' AND object_id = $2"
    assert len(await sql(server, told, owner, share)) == 1
